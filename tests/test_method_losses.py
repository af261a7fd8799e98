"""The loss of every method against a float64 loop over the formula of its paper, in value and gradient."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import data, methods
from simclr_jax.methods import alignment, autoencoder, byol, instdisc, moco, moco_v3, supcon
from simclr_jax.model import Outputs, Predicted
from simclr_jax.programs import config as config_lib
from simclr_jax.views import Batch

N, D = 5, 3
RNG = np.random.default_rng(0)
Z, TARGET = RNG.normal(size=(2, N, 2, D))  # what is trained, and what the averaged network says
BATCH = Batch(
  pixels=None,
  label=jnp.array([0, 1, 0, -1, -1]),
  index=jnp.array([4, 0, 7, 2, 6]),
  seed=jnp.arange(2 * N).reshape(N, 2),
)


def unit(x):
  return x / np.linalg.norm(x)


def softmax_loss(positive, others):
  """-log of the positive's part of the softmax."""
  e = np.exp(np.array([positive, *others]))
  return -np.log(e[0] / e.sum())


def numerical_gradient(function, z, step=1e-6):
  out = np.zeros_like(z)
  for i in np.ndindex(*z.shape):
    moved = [z.copy(), z.copy()]
    moved[0][i] += step
    moved[1][i] -= step
    out[i] = (function(moved[0]) - function(moved[1])) / (2 * step)
  return out


def compare(method, extra, reference):
  """`reference` is z float64 [n, 2, d] -> loss; z is the prediction too."""

  def loss(z):
    outputs = Predicted(None, z, None, z) if hasattr(method, "predictor") else Outputs(None, z, None)
    network = lambda variables: (Outputs(None, jnp.float32(TARGET), None), {})  # noqa: E731
    return method.loss(outputs, extra, network, BATCH)[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(Z))
  assert float(value) == pytest.approx(reference(Z), rel=1e-5)
  np.testing.assert_allclose(gradient, numerical_gradient(reference, Z), atol=1e-5)


def test_supcon():
  """L_out of arXiv 2004.11362; each unlabeled image is a class of its own."""
  label, tau = [0, 1, 0, 10, 11], 0.4

  def reference(z):
    views = [(label[i], unit(z[i, v])) for i in range(N) for v in (0, 1)]
    losses = []
    for a, (own, anchor) in enumerate(views):
      others = [b for b in range(2 * N) if b != a]
      total = np.log(sum(np.exp(anchor @ views[b][1] / tau) for b in others))
      losses.append(-np.mean([anchor @ views[b][1] / tau - total for b in others if views[b][0] == own]))
    return np.mean(losses)

  compare(supcon.SupCon({"temperature": tau}), {}, reference)


def test_alignment():
  def reference(z):
    return np.mean([np.sum((unit(z[i, 0]) - unit(z[i, 1])) ** 2) for i in range(N)])

  compare(alignment.Alignment(), {}, reference)


def test_byol():
  def reference(p):
    pairs = [(i, v) for i in range(N) for v in (0, 1)]
    return sum(np.sum((unit(p[i, v]) - unit(TARGET[i, 1 - v])) ** 2) for i, v in pairs) / N

  compare(byol.BYOL(lambda: None, 0.9, 10), {"average": {}, "step": 0}, reference)


@pytest.mark.parametrize("queued", [1, 4, 6])
def test_moco(queued):
  queue = np.stack([unit(row) for row in RNG.normal(size=(6, D))])

  def reference(z):
    losses = []
    for i in range(N):
      for v in (0, 1):
        q = unit(z[i, v])
        losses.append(softmax_loss(q @ unit(TARGET[i, 1 - v]) / 0.3, [q @ k / 0.3 for k in queue[:queued]]))
    return np.mean(losses)

  extra = {"average": {}, "queue": jnp.float32(queue), "queued": jnp.int32(queued)}
  compare(moco.MoCo(6, 0.9, 0.3), extra, reference)


def test_moco_with_an_empty_queue_has_nothing_to_learn_from():
  method = moco.MoCo(6, 0.9, 0.3)
  extra = {"average": {}, "queue": jnp.zeros((6, D)), "queued": jnp.int32(0)}
  compare(method, extra, lambda z: 0.0)


def test_moco_v3():
  def reference(q):
    total = 0.0
    for v in (0, 1):
      for i in range(N):
        logits = [unit(q[i, v]) @ unit(TARGET[j, 1 - v]) / 0.3 for j in range(N)]
        total += softmax_loss(logits[i], logits[:i] + logits[i + 1 :]) / N
    return 2 * 0.3 * total

  compare(moco_v3.MoCoV3(lambda: None, 0.9, 10, 0.3), {"average": {}, "step": 0}, reference)


IMAGES = 9
BANK = np.stack([unit(row) for row in RNG.normal(size=(IMAGES, D))])
BANK_ROWS = jnp.zeros((instdisc.ROWS, D)).at[:IMAGES].set(BANK)


def test_instdisc_with_the_softmax_over_all_images():
  def reference(z):
    losses = []
    for i, own in enumerate(np.asarray(BATCH.index)):
      for v in (0, 1):
        logits = [unit(z[i, v]) @ BANK[j] / 0.5 for j in range(IMAGES)]
        losses.append(softmax_loss(logits[own], [s for j, s in enumerate(logits) if j != own]))
        losses[-1] += 0.7 * np.sum((unit(z[i, v]) - BANK[own]) ** 2)
    return np.mean(losses)

  compare(instdisc.InstDisc(IMAGES, 0, 0.5, 0.7, 0.5), {"bank": BANK_ROWS, "normalizer": jnp.zeros(())}, reference)


@pytest.mark.parametrize("normalizer", [0.0, 21.0])
def test_instdisc_with_noise_contrastive_estimation(normalizer):
  """Equations 6 to 8 of arXiv 1805.01978, and the proximal term of 3.3."""
  m, tau = 4, 0.5
  method = instdisc.InstDisc(IMAGES, m, 0.5, 0.7, tau)
  drawn = np.asarray(method.draws(BATCH))
  assert len(drawn) == m and drawn.min() >= 0 and drawn.max() < IMAGES
  np.testing.assert_array_equal(drawn, method.draws(BATCH.replace(seed=BATCH.seed[::-1])))
  first = np.mean([np.exp(unit(Z[i, v]) @ BANK[k] / tau) for i in range(N) for v in (0, 1) for k in drawn])
  constant = normalizer or IMAGES * first

  def posterior(v, row):
    p = np.exp(row @ v / tau) / constant
    return p / (p + m / IMAGES)

  def reference(z):
    losses = []
    for i, own in enumerate(np.asarray(BATCH.index)):
      for v in (0, 1):
        f = unit(z[i, v])
        loss = -np.log(posterior(f, BANK[own])) - sum(np.log(1 - posterior(f, BANK[k])) for k in drawn)
        losses.append(loss + 0.7 * np.sum((f - BANK[own]) ** 2))
    return np.mean(losses)

  compare(method, {"bank": BANK_ROWS, "normalizer": jnp.float32(normalizer)}, reference)


def test_the_bank_of_an_image_that_is_twice_in_the_batch():
  method = instdisc.InstDisc(IMAGES, 0, 0.5, 0.0, 0.5)
  batch = BATCH.replace(index=jnp.array([4, 0, 4, 2, 6]))
  extra = {"bank": BANK_ROWS, "normalizer": jnp.zeros(())}
  _, _, updates = method.loss(Outputs(None, jnp.float32(Z), None), extra, None, batch)
  bank = method.after({}, extra, updates)["bank"]
  mean = np.mean([unit(Z[i, v]) for i in (0, 2) for v in (0, 1)], axis=0)
  np.testing.assert_allclose(bank[4], unit(0.5 * BANK[4] + 0.5 * mean), atol=1e-6)
  np.testing.assert_allclose(bank[0], unit(0.5 * BANK[0] + 0.25 * (unit(Z[1, 0]) + unit(Z[1, 1]))), atol=1e-6)
  np.testing.assert_array_equal(bank[1], BANK_ROWS[1])


def test_autoencoder():
  decoder = autoencoder.Decoder(18, 1 / 64, "cifar")
  z, views = jnp.float32(Z[:2, 0]), jnp.float32(RNG.random((2, 6, 6, 3)))
  variables = jax.jit(decoder.init)(jax.random.key(0), z, views)
  made = np.float64(jax.jit(lambda v: decoder.apply(v, z, (6, 6), False, method="reconstruct"))(variables))
  errors = [np.mean((made[i] - np.float64(views[i])) ** 2) for i in range(2)]
  np.testing.assert_allclose(jax.jit(decoder.apply)(variables, z, views), errors, rtol=1e-5)
  outputs = Predicted(None, None, None, jnp.float32(errors)[:, None])
  loss, _, updates = autoencoder.Autoencoder(decoder).loss(outputs, {}, None, BATCH)
  assert float(loss) == pytest.approx(np.mean(errors)) and updates == {}


@pytest.mark.parametrize("stem, size", [("cifar", 20), ("cifar", 16), ("imagenet", 45)])
def test_the_decoder_makes_images_of_every_size(stem, size):
  decoder = autoencoder.Decoder(18, 0.0625, stem)
  z, x = jnp.zeros((2, 8)), jnp.zeros((2, size, size, 3))
  variables = jax.eval_shape(decoder.init, jax.random.key(0), z, x)
  assert set(variables["params"]) >= {"unpool", "group1", "group2", "group3", "group4", "pixels"}
  made = lambda v, z: decoder.apply(v, z, (size, size), False, method="reconstruct")  # noqa: E731
  assert jax.eval_shape(made, variables, z).shape == x.shape
  assert jax.eval_shape(decoder.apply, variables, z, x).shape == (2,)


def test_upsampling_repeats_pixels():
  x = np.arange(6.0).reshape(1, 2, 3, 1)
  expected = np.array([[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]])
  np.testing.assert_array_equal(autoencoder.upsample(jnp.asarray(x), (3, 5))[0, :, :, 0], expected)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"method": "supcon"}, "config.method='supcon' learns from labels and fashion:train has none"),
    ({"method": "moco", "loss.temperature": None}, "config.method='moco' needs one, such as 0.2"),
    ({"method": "byol", "moco.size": 8}, "config.method='byol': config.moco is only for config.method=moco"),
    ({"method": "byol", "loss.name": "decoupled"}, "config.loss.name=decoupled: config.method='byol' has its own loss"),
    ({"method": "moco", "loss.tile": 4}, "config.loss.tile=4: config.method='moco' has its own loss; leave it out"),
    ({"method": "instdisc", "instdisc.decay": 1.0}, "instdisc.decay=1.0: expected a number of at least 0 and below 1"),
    (
      {
        "method": "autoencoder",
        "encoder.name": "vit",
        "encoder.size": "Ti",
        "encoder.patch": 8,
        "encoder.depth": None,
        "encoder.width": 1.0,
        "encoder.stem": "imagenet",
      },
      "encoder.name=vit has no matching decoder",
    ),  # fmt: skip
  ],
)
def test_mistakes_are_one_line(changes, message):
  with pytest.raises(ValueError) as error:
    methods.create(tiny.config(**changes), None, tiny.source(labeled=False))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_needs_the_number_of_images_asks_the_data():
  source = tiny.source(40)
  assert methods.create(tiny.config(method="instdisc"), None, source).images == 40
  assert methods.create(tiny.config(method="byol", train_steps=7), None, source).total_steps == 7


@pytest.mark.parametrize("method", ["moco", "byol", "autoencoder", "supervised", "supcon"])
def test_values_that_a_methods_own_loss_does_not_read_are_refused(method):
  source = data.AbstractSource(96, 10)
  methods.create(tiny.config(method=method, **{"loss.normalize": True}), None, source)
  for key, value in {"loss.normalize": False, "loss.name": "nt_logistic"}.items():
    config = tiny.config(method=method, **{key: value})
    if (method, key) == ("supcon", "loss.normalize"):
      methods.create(config, None, source)
      continue
    with pytest.raises(ValueError, match=f"config.{key}={value}: config.method='{method}' has its own loss"):
      methods.create(config, None, source)


@pytest.mark.parametrize(
  "recipe", ["smoke", "textures", "folder", "cifar10", "cifar10_cpu", "ablations", "v1", "v2", "vit"]
)
def test_each_method_is_one_option_away_from_every_recipe_of_simclr(recipe):
  for method in methods.METHODS:
    config = config_lib.load(f"configs/{recipe}.py", [f"--config.method={method}"])
    if (recipe, method) == ("vit", "autoencoder"):
      with pytest.raises(ValueError, match="encoder.name=vit has no matching decoder"):
        methods.create(config, None, data.AbstractSource(50_000, 10))
      continue
    assert hasattr(methods.create(config, None, data.AbstractSource(50_000, 10)), "loss")


@pytest.mark.parametrize("method", ["moco", "moco_v3", "instdisc", "tsimcne"])
def test_the_precision_of_similarities_is_that_of_the_config(method):
  source = data.AbstractSource(96, 10)
  for given, found in ((None, "highest"), ("default", "default")):
    config = tiny.config(method=method, **{"loss.precision": given, "train_steps": 99, "train_epochs": 0.0})
    assert methods.create(config, None, source).precision == found


def test_every_recipe_of_a_method_names_it_and_makes_it():
  from configs import methods as recipes

  variants = [*recipes.CIFAR10, *(f"{name}-imagenet" for name in recipes.IMAGENET)]
  assert set(recipes.CIFAR10) == set(methods.METHODS) - {"simclr", "memory", "tsimcne"}
  for variant in variants:
    config = config_lib.load(f"configs/methods.py:{variant}")
    method = methods.create(config, None, data.AbstractSource(1_281_167, 1000))
    assert config.method == variant.partition("-")[0] and hasattr(method, "loss")
  with pytest.raises(ValueError, match="expected one of moco, moco_v3, byol"):
    config_lib.load("configs/methods.py:alignment-imagenet")


def test_the_help_and_the_page_name_every_method():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "methods.md").read_text()
  meaning = config_lib.Pretrain.__dataclass_fields__["method"].metadata["meaning"]
  for name in methods.METHODS:
    assert f"`{name}`" in page and re.search(rf"\b{name}\b", meaning), name
  assert set(config_lib.SECTIONS) <= set(methods.METHODS)
