"""The contrastive losses on one page: the official code's numbers, and float64 loops over anchors and candidates."""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from simclr_jax import contrast

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "official_golden.json").read_text())["ntxent"]
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # compiling is nearly all of what these tests do


def pair_major(rows):
  """Official order, all first views then all second views -> [n, 2, d]."""
  rows = np.asarray(rows)
  return np.swapaxes(rows.reshape(2, len(rows) // 2, -1), 0, 1)


def unit(z):
  return z / np.sqrt(np.maximum((z * z).sum(-1, keepdims=True), 1e-12))


def loop_nt_xent(z, temperature, normalize=True):
  """Equation 1 and its gradient in float64, anchor by anchor.

  The loss of an anchor is log1p of the negatives' sum over the positive's: solved batches cancel otherwise,
  even in float64.
  """
  z = np.asarray(z, np.float64)
  raw = z.reshape(-1, z.shape[-1])
  rows = unit(raw) if normalize else raw
  losses, gradient = [], np.zeros_like(rows)
  for i in range(len(rows)):
    positive = float(rows[i] @ rows[i ^ 1]) / temperature
    negatives = [k for k in range(len(rows)) if k // 2 != i // 2]
    odds = np.array([math.exp(float(rows[i] @ rows[k]) / temperature - positive) for k in negatives])
    total = odds.sum()
    losses.append(math.log1p(total))
    p = odds / (1 + total)
    gradient[i] += (p @ rows[negatives] - p.sum() * rows[i ^ 1]) / temperature
    gradient[negatives] += p[:, None] * rows[i] / temperature
    gradient[i ^ 1] -= p.sum() * rows[i] / temperature
  gradient /= len(rows)
  if normalize:
    norm = np.sqrt((raw * raw).sum(-1, keepdims=True))
    gradient = (gradient - rows * (gradient * rows).sum(-1, keepdims=True)) / norm
  return np.mean(losses), gradient.reshape(z.shape)


def random_z(n, d, noise, seed=0):
  """Pairs around a common direction; noise=None: all 2n rows independent, 0.05: nearly solved."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(n, 2, d))
  return (z if noise is None else rng.normal(size=(n, 1, d)) + noise * z).astype(np.float32)


def compiled(loss, *arguments, **keywords):
  """z -> loss, metrics, gradient."""

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(z):
    (value, metrics), gradient = jax.value_and_grad(lambda z: loss(z, *arguments, **keywords), has_aux=True)(z)
    return value, metrics, gradient

  return run


def loss_and_gradient(loss, z, *arguments, **keywords):
  return compiled(loss, *arguments, **keywords)(jnp.asarray(z))


def loss_only(loss, z, *arguments, **keywords):
  run = jax.jit(lambda z: loss(z, *arguments, **keywords)[0], compiler_options=FAST_COMPILE)
  return run(jnp.asarray(z))


def assert_gradient(actual, expected, tolerance):
  """Largest difference against the largest entry."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"n{c['n']}d{c['d']}t{c['temperature']}")
def test_official_numbers(case):
  n, d = case["n"], case["d"]
  z = pair_major(np.sin(0.7 * np.arange(2 * n * d)).astype(np.float32).reshape(2 * n, d))
  keywords = {"normalize": case["hidden_norm"], "reduction": "official_sum"}
  loss, metrics, gradient = loss_and_gradient(contrast.nt_xent, z, case["temperature"], **keywords)
  np.testing.assert_allclose(loss, case["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics["contrastive_accuracy"], case["contrast_acc"])
  np.testing.assert_allclose(metrics["entropy"], case["entropy"], rtol=1e-5)
  # The official gradients are float32 too, up to 4e-6 of their largest entry away from float64.
  np.testing.assert_allclose(jnp.linalg.norm(gradient), case["grad_norm"], rtol=1e-5)
  if case["grad"] is not None:
    assert_gradient(gradient, pair_major(case["grad"]), 1e-5)


@pytest.mark.parametrize("temperature, normalize", [(0.05, True), (0.1, True), (1.0, True), (0.1, False)])
def test_equation_one(temperature, normalize):
  run = compiled(contrast.nt_xent, temperature, normalize=normalize)
  for noise in (None, 0.05):
    z = random_z(20, 16, noise) * (1.0 if normalize else 0.3)
    loss, _, gradient = run(z)
    expected_loss, expected_gradient = loop_nt_xent(z, temperature, normalize)
    np.testing.assert_allclose(loss, expected_loss, rtol=5e-6)
    assert_gradient(gradient, expected_gradient, 1e-5)


def test_loop_gradient_is_the_derivative():
  z = random_z(5, 4, None).astype(np.float64)
  _, gradient = loop_nt_xent(z, 0.3)
  direction = np.random.default_rng(1).normal(size=z.shape)
  step = 1e-5 * direction
  slope = (loop_nt_xent(z + step, 0.3)[0] - loop_nt_xent(z - step, 0.3)[0]) / 2e-5
  np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7)


def test_metrics():
  temperature, n = 0.2, 12
  z = random_z(n, 8, 0.8, seed=3)
  rows = unit(z.astype(np.float64)).reshape(2 * n, -1)
  s = rows @ rows.T
  ab = rows[0::2] @ rows[1::2].T
  p = np.exp(ab / temperature)
  p /= p.sum(1, keepdims=True)
  others = np.where(np.eye(2 * n, dtype=bool), -9, s)
  negative = np.arange(2 * n)[:, None] // 2 != np.arange(2 * n) // 2
  first = rows[0::2]
  squared = [((first[i] - first[j]) ** 2).sum() for i in range(n) for j in range(n) if i != j]
  expected = {
    "contrastive_accuracy": np.mean(ab.argmax(1) == np.arange(n)),
    "contrastive_accuracy_all": np.mean(others.argmax(1) == np.arange(2 * n) ^ 1),
    "entropy": -np.mean((p * np.log(p + 1e-8)).sum(1)),
    "positive_similarity": np.mean(np.diag(ab)),
    "negative_similarity": s[negative].mean(),
    "alignment": np.mean(((rows[0::2] - rows[1::2]) ** 2).sum(1)),
    "uniformity": np.log(np.mean(np.exp(-2 * np.array(squared)))),
  }
  assert 0 < expected["contrastive_accuracy_all"] < expected["contrastive_accuracy"] < 1
  _, metrics, _ = loss_and_gradient(contrast.nt_xent, z, temperature)
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_metrics_have_no_gradient():
  @jax.jit
  @jax.grad
  def gradient(z):
    return sum(contrast.nt_xent(z, 0.1)[1].values())

  assert not np.any(gradient(jnp.asarray(random_z(4, 8, None))))


def test_collapse_is_at_chance_and_never_a_hit():
  loss, metrics, gradient = loss_and_gradient(contrast.nt_xent, np.ones((8, 2, 4), np.float32), 0.1)
  np.testing.assert_allclose(loss, np.log(2 * 8 - 1), rtol=1e-6)
  assert metrics["contrastive_accuracy"] == metrics["contrastive_accuracy_all"] == 0
  assert np.abs(gradient).max() < 1e-6


def test_reductions_differ_by_two():
  z = random_z(6, 8, None)
  mean, official = (loss_only(contrast.nt_xent, z, 0.1, reduction=r) for r in ("mean", "official_sum"))
  np.testing.assert_allclose(official, 2 * mean, rtol=1e-6)


def test_default_precision_rounds_to_bfloat16():
  z = random_z(32, 64, None)
  exact, rounded = (loss_only(contrast.nt_xent, z, 0.1, precision=p) for p in ("highest", "default"))
  assert 1e-6 < abs(rounded / exact - 1) < 1e-2
  y = jnp.asarray(unit(z) / np.sqrt(0.1), jnp.bfloat16).astype(jnp.float32)
  by_hand = loss_only(contrast.nt_xent, y, 1.0, normalize=False)
  np.testing.assert_allclose(rounded, by_hand, rtol=1e-5)


def test_bfloat16_input_is_computed_in_float32():
  z = jnp.asarray(random_z(16, 32, None), jnp.bfloat16)
  loss, metrics, gradient = loss_and_gradient(contrast.nt_xent, z, 0.1)
  assert gradient.dtype == jnp.bfloat16
  assert loss.dtype == jnp.float32 and all(m.dtype == jnp.float32 for m in metrics.values())
  np.testing.assert_allclose(loss, loop_nt_xent(z.astype(jnp.float32), 0.1)[0], rtol=1e-6)


def test_sharded_equals_single_and_moves_only_z():
  n, d = 64, 16
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  z = random_z(n, d, None)
  loss, metrics, gradient = loss_and_gradient(contrast.nt_xent, z, 0.1)
  step = jax.jit(jax.value_and_grad(lambda z: contrast.nt_xent(z, 0.1), has_aux=True))
  sharded = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
  (loss_8, metrics_8), gradient_8 = step(sharded)
  np.testing.assert_allclose(loss_8, loss, rtol=1e-6)
  assert_gradient(gradient_8, np.asarray(gradient), 2e-6)
  for name in metrics:
    np.testing.assert_allclose(metrics_8[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  # Each device multiplies its own rows with all: an eighth of the work.
  flops = [f.lower(x).compile().cost_analysis()["flops"] for f, x in ((step, jnp.asarray(z)), (step, sharded))]
  assert flops[1] < 1.2 * flops[0] / 8


BAD_ARGUMENTS = {
  "expected [n, 2, d]": lambda z: contrast.nt_xent(z.reshape(-1, z.shape[-1]), 0.1),
  "temperature is 0": lambda z: contrast.nt_xent(z, 0),
  "reduction is 'sum'": lambda z: contrast.nt_xent(z, 0.1, reduction="sum"),
  "precision is 'float64'": lambda z: contrast.nt_xent(z, 0.1, precision="float64"),
  "expected at least 2": lambda z: contrast.decoupled(z[:1], 0.1),
  "labels have shape": lambda z: contrast.supervised(z, 0.1, labels=np.zeros(3, int)),
  "class_prior is 1": lambda z: contrast.debiased(z, 0.1, class_prior=1),
  "normalize is False": lambda z: contrast.debiased(z, 0.1, normalize=False),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_mistakes_are_named_in_one_line(message):
  with pytest.raises(ValueError) as error:
    BAD_ARGUMENTS[message](random_z(4, 8, None))
  assert message in str(error.value) and "\n" not in str(error.value)


# Each objective anchor by anchor, from the similarity s(a, b) of two rows; z is [2n, d] float64, unit rows but
# for the Cauchy kernel. `positive` is the other view's row, `negatives` the rows of other images.


def loop_objective(name, z, temperature, labels=None, margin=0.8, prior=0.1):
  rows = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
  rows = rows if name == "cauchy" else unit(rows)
  losses = []
  for i in range(len(rows)):
    s = rows @ rows[i] / (1 if name.startswith("margin") else temperature)
    if name == "cauchy":
      s = -np.log1p(((rows - rows[i]) ** 2).sum(1))
    positive = s[i ^ 1]
    negatives = np.array([s[k] for k in range(len(rows)) if k // 2 != i // 2])
    other_view = np.array([s[k] for k in range(len(rows)) if k // 2 != i // 2 and k % 2 != i % 2])
    if name.endswith("semi_hard"):
      other_view = np.sort(other_view[other_view < positive])[-1:]
    if name in ("nt_xent", "cauchy"):
      loss = np.log(np.exp(positive) + np.exp(negatives).sum()) - positive
    elif name == "decoupled":
      loss = np.log(np.exp(negatives).sum()) - positive
    elif name == "supervised":
      same = [k for k in range(len(rows)) if k != i and labels[k // 2] == labels[i // 2]]
      everyone = np.log(sum(np.exp(s[k]) for k in range(len(rows)) if k != i))
      loss = -np.mean([s[k] - everyone for k in same])
    elif name == "debiased":
      g = (np.exp(negatives).mean() - prior * np.exp(positive)) / (1 - prior)
      g = max(g, np.exp(-1 / temperature))
      loss = np.log(np.exp(positive) + len(negatives) * g) - positive
    elif name.startswith("nt_logistic"):
      loss = np.log1p(np.exp(-positive)) + (np.log1p(np.exp(other_view)).mean() if len(other_view) else 0)
    elif name.startswith("margin_triplet"):
      loss = np.maximum(other_view - positive + margin, 0).mean() if len(other_view) else 0
    losses.append(loss)
  return np.mean(losses)


OBJECTIVES = {**contrast.LOSSES, "supervised": contrast.supervised}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
  labels = np.array([0, 1, 2, 0, 1, 0, 3, 3, 1])
  keywords = {} if name == "cauchy" or name.startswith("margin") else {"temperature": 0.25}
  keywords |= {"labels": labels} if name == "supervised" else {}
  run = compiled(OBJECTIVES[name], **keywords)
  for noise in (1.0, 0.3):
    z = random_z(9, 6, noise, seed=5)
    loss, metrics, gradient = run(z)
    np.testing.assert_allclose(loss, loop_objective(name, z, 0.25, labels), rtol=2e-6)
    assert {"contrastive_accuracy", "entropy", "alignment", "uniformity"} < metrics.keys()
    direction = np.random.default_rng(6).normal(size=z.shape)
    high, low = (loop_objective(name, z.astype(np.float64) + e * direction, 0.25, labels) for e in (1e-6, -1e-6))
    np.testing.assert_allclose((gradient * direction).sum(), (high - low) / 2e-6, rtol=1e-4, atol=1e-6)


def test_debiased_floor_and_no_prior():
  solved = random_z(9, 6, 0.01, seed=5)  # the estimate is negative: the floor e^(-1/tau) takes over
  loss, _, gradient = loss_and_gradient(contrast.debiased, solved, 0.25)
  np.testing.assert_allclose(loss, loop_objective("debiased", solved, 0.25), rtol=1e-5)
  assert np.all(np.isfinite(gradient))
  z = random_z(9, 6, None)
  np.testing.assert_allclose(contrast.debiased(z, 0.25, class_prior=0.0)[0], contrast.nt_xent(z, 0.25)[0], rtol=1e-6)


def test_supervised_without_shared_labels_is_nt_xent():
  z = random_z(7, 6, None)
  loss = loss_only(contrast.supervised, z, 0.1, labels=jnp.arange(7))
  np.testing.assert_allclose(loss, loss_only(contrast.nt_xent, z, 0.1), rtol=1e-6)


@pytest.mark.parametrize("d", [2, 8])
def test_cauchy_far_from_the_origin(d):
  # Distances do not change with the origin; |a|^2 + |b|^2 - 2ab in float32 does, a little.
  z = random_z(9, d, 0.5)
  near, far = (loss_only(contrast.cauchy, z + offset) for offset in (0, 64))
  np.testing.assert_allclose(far, near, rtol=1e-5 if d == 2 else 1e-2)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_all_pairs_of_several_views(form, views):
  """The mean over pairs of views of the loss by its definition; of two views it is what it was, bit for bit."""
  z, tau = np.random.default_rng(0).normal(size=(6, views, 4)), 0.3
  unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
  losses = []
  for a, b in itertools.combinations(range(views), 2):
    for i, (u, v) in itertools.product(range(6), ((a, b), (b, a))):
      others = [unit[i, u] @ unit[j, w] for j in range(6) for w in (a, b) if j != i]
      e = np.exp(np.array([unit[i, u] @ unit[i, v], *others]) / tau)
      losses.append(-np.log(e[0] / e.sum()))
  loss = contrast.nt_xent if form == "dense" else functools.partial(contrast.nt_xent_tiled, tile=4)
  (value, metrics), gradient = jax.jit(jax.value_and_grad(lambda z: loss(z, tau), has_aux=True))(jnp.float32(z))
  assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
  assert gradient.shape == z.shape and 0 <= metrics["contrastive_accuracy"] <= 1
  if views == 2:
    plain = contrast.nt_xent.__wrapped__ if form == "dense" else contrast.nt_xent_tiled.__wrapped__
    options = {} if form == "dense" else {"tile": 4}
    np.testing.assert_array_equal(value, jax.jit(lambda z: plain(z, tau, **options)[0])(jnp.float32(z)))
  else:
    step = 1e-3 * np.random.default_rng(1).normal(size=z.shape)
    value_of = jax.jit(lambda z: loss(z, tau)[0])
    change = float(value_of(jnp.float32(z + step)) - value_of(jnp.float32(z - step))) / 2
    assert change == pytest.approx(float(np.sum(np.asarray(gradient) * step)), rel=2e-2)
