"""The projection head against a plain float64 loop, and its parameters against the official counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from simclr_jax.projector import Projector


def count(params):
  return sum(v.size for v in jax.tree.leaves(params))


def random_variables(model, h):
  """Initialized variables with every leaf changed, so that each matters."""
  variables = model.init(jax.random.key(0), h)
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(tree, [v + rng.uniform(0.05, 0.5, v.shape).astype(np.float32) for v in leaves])


def reference(variables, h, layers, train):
  """[h, each layer's output] and the new moving averages, one layer, row and channel at a time."""
  outputs, new_stats = [np.asarray(h, np.float64)], {}
  for i in range(layers):
    kernel = np.asarray(variables["params"][f"dense{i}"]["kernel"], np.float64)
    norm = {k: np.asarray(v, np.float64) for k, v in variables["params"][f"norm{i}"].items()}
    stats = {k: np.asarray(v, np.float64) for k, v in variables["batch_stats"][f"norm{i}"].items()}
    x = outputs[-1] @ kernel
    mean, var = np.copy(stats["mean"]), np.copy(stats["var"])
    if train:
      for c in range(x.shape[1]):
        mean[c] = sum(x[:, c]) / len(x)
        var[c] = sum((x[:, c] - mean[c]) ** 2) / len(x)
    new_stats[f"norm{i}"] = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var}
    last = i == layers - 1
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
      for c in range(x.shape[1]):
        y[row, c] = (x[row, c] - mean[c]) / np.sqrt(var[c] + 1e-5) * norm["scale"][c]
        if not last:
          y[row, c] = max(y[row, c] + norm["bias"][c], 0)
    outputs.append(y)
  return outputs, new_stats


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind, layers, depth", [("nonlinear", 2, 2), ("nonlinear", 3, 3), ("linear", 3, 1)])
def test_equals_a_float64_loop(kind, layers, depth, train):
  h = np.random.default_rng(0).uniform(0, 2, (8, 12)).astype(np.float32)
  model = Projector(layers=layers, out_dim=5, kind=kind)
  variables = random_variables(model, h)
  expected, expected_stats = reference(variables, h, depth, train)
  for tap in (None, *range(depth + 1)):
    z, state = model.apply(variables, h, train=train, tap=tap, mutable=["batch_stats"])
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, expected[-1 if tap is None else tap], rtol=1e-4, atol=1e-5, err_msg=str(tap))
  if train:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["batch_stats"], expected_stats)
  else:
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


def test_parameters():
  h = jnp.zeros((2, 2048))
  params = Projector(layers=3, out_dim=128).init(jax.random.key(0), h)["params"]
  assert count(params) == 8_659_072  # of the official code
  assert count(params) == 2 * (2048 * 2048 + 2 * 2048) + 2048 * 128 + 128
  flat = traverse_util.flatten_dict(params, sep="/")
  assert set(flat) == {
    "dense0/kernel", "norm0/scale", "norm0/bias",
    "dense1/kernel", "norm1/scale", "norm1/bias",
    "dense2/kernel", "norm2/scale",
  }  # fmt: skip
  for path, value in flat.items():
    if path.endswith("kernel"):
      np.testing.assert_allclose(value.std(), 0.01, rtol=0.02)
      assert abs(value.mean()) < 1e-4 and abs(value).max() > 0.035  # normal, not truncated at two deviations
    else:
      assert np.all(value == path.endswith("scale")), path


def test_tap_does_not_change_what_is_initialized():
  h = jnp.zeros((2, 16))
  full, tapped = (jax.eval_shape(lambda t=tap: Projector().init(jax.random.key(0), h, tap=t)) for tap in (None, 0))
  assert jax.tree.structure(full) == jax.tree.structure(tapped)


def test_none_is_the_identity():
  h = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  model = Projector(kind="none")
  assert not model.init(jax.random.key(0), h)
  np.testing.assert_array_equal(model.apply({}, h, train=True), h)
  np.testing.assert_array_equal(model.apply({}, h, tap=0), h)


def test_bfloat16_input_gives_float32():
  h = jnp.ones((4, 6), jnp.bfloat16)
  z, variables = Projector(layers=2).init_with_output(jax.random.key(0), h)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((z, variables)))


@pytest.mark.parametrize(
  "kwargs, tap, words",
  [
    ({"kind": "mlp"}, None, "mlp.*none, linear, nonlinear"),
    ({"layers": 0}, None, "layers=0"),
    ({"out_dim": 0}, None, "out_dim=0"),
    ({}, 4, "tap 4: expected 0 .h. to 3"),
    ({"kind": "none"}, 1, "tap 1: expected 0 .h. to 0"),
  ],
)
def test_impossible_values(kwargs, tap, words):
  with pytest.raises(ValueError, match=words) as error:
    Projector(**kwargs).init(jax.random.key(0), jnp.zeros((2, 8)), tap=tap)
  assert "\n" not in str(error.value)
