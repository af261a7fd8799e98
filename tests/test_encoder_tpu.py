"""The encoder arranged for a TPU: the same parameters and numbers as the plain one, each piece against arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_encoder import CASES, assert_golden, build, case_name

from simclr_jax import accumulate, encoder, encoder_tpu, model
from simclr_jax.encoder_tpu import BatchNorm
from simclr_jax.projector import Projector

GOLDEN = ("r50-1x-64px", "r50-1x-64px-sk0.0625", "r50-1x-32px", "r18-1x-32px")


SLOW = ("r50-1x-64px", "r50-1x-32px")  # what they run is in the others as well


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(c, id=case_name(c), marks=[pytest.mark.slow] * (case_name(c) in SLOW))
    for c in CASES
    if case_name(c) in GOLDEN
  ],
)
def test_golden(case):
  assert_golden(build(case, resnet=encoder_tpu.resnet), case)


def in_pairs(x):
  """Two neighbors of a row packed into the channels."""
  return x.reshape(*x.shape[:2], x.shape[2] // 2, -1)


@pytest.mark.parametrize("pixel_packing", [1, 2])
def test_a_convolution_normalized_as_it_is_made(pixel_packing):
  """Values, moving averages and gradients, against float64 arithmetic and central differences."""
  rng = np.random.default_rng(0)
  x, kernel, cotangent = rng.normal(1, 2, (4, 3, 4, 3)), rng.normal(size=(3, 5)), rng.normal(size=(4, 3, 4, 5))
  scale, bias = rng.normal(1, 0.3, 5), rng.normal(0, 0.5, 5)
  stats = {"mean": rng.normal(0, 1, 5), "var": rng.uniform(1, 2, 5)}

  def textbook():
    y = x @ kernel
    return (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * scale + bias

  @functools.partial(jax.grad, argnums=(0, 1, 2, 3), has_aux=True)
  def ours(x, kernel, scale, bias):
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": jax.tree.map(np.float32, stats)}
    norm = BatchNorm(relu=False, pixel_packing=pixel_packing)
    x = in_pairs(x) if pixel_packing == 2 else x
    y, new = norm.apply(variables, x, True, kernel[None, None], mutable=["batch_stats"])
    y = y.reshape(cotangent.shape)
    return jnp.sum(y * cotangent), (y, new["batch_stats"])

  gradients, (y, new) = ours(*map(np.float32, (x, kernel, scale, bias)))
  np.testing.assert_allclose(y, textbook(), atol=1e-5)
  np.testing.assert_allclose(new["mean"], 0.9 * stats["mean"] + 0.1 * (x @ kernel).mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(new["var"], 0.9 * stats["var"] + 0.1 * (x @ kernel).var((0, 1, 2)), rtol=1e-5)
  for array, gradient in zip((x, kernel, scale, bias), gradients, strict=True):
    for index in np.ndindex(array.shape):
      value, ends = array[index], []
      for array[index] in (value + 1e-6, value - 1e-6):
        ends.append(np.sum(textbook() * cotangent))
      array[index] = value
      np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-6, atol=1e-4)


@pytest.mark.parametrize("bottleneck, stride", [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_pairs_of_pixels_are_the_same_block(bottleneck, stride):
  """Parameters, values, moving averages and gradients; a stride takes the pairs apart."""
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(4, 6, 8, 32)))
  options = dict(filters=8, stride=stride, project=True, bottleneck=bottleneck, sk_ratio=0.0, se_ratio=0.0)
  plain, paired = encoder.Block(**options), encoder_tpu.Block(**options, pixel_packing=2)
  shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), x, True))
  assert shapes == jax.eval_shape(lambda: paired.init(jax.random.key(0), in_pairs(x), True))
  variables = jax.tree.map(lambda v: np.float32(rng.normal(0.2, 0.5, v.shape)), shapes)
  shape = jax.eval_shape(lambda v: plain.apply(v, x, True, mutable=["batch_stats"])[0], variables).shape
  cotangent = np.float32(rng.normal(size=shape))

  def run(block, arrange):
    def loss(params, x):
      y, new = block.apply({**variables, "params": params}, arrange(x), True, mutable=["batch_stats"])
      return jnp.sum(y.reshape(shape) * cotangent), (y.reshape(shape), new)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(a).max())

  jax.tree.map(close, run(plain, lambda x: x), run(paired, in_pairs))


@pytest.mark.parametrize("arrangement", ["plain", "packed"])
@pytest.mark.parametrize(
  "arguments",
  [
    pytest.param(dict(depth=18, stem="cifar"), id="r18-cifar"),
    pytest.param(dict(depth=50), id="r50", marks=pytest.mark.slow),
    pytest.param(dict(depth=50, sk_ratio=0.0625), id="r50-sk", marks=pytest.mark.slow),
  ],
)
def test_moments_of_the_batch_are_those_that_training_normalizes_by(arrangement, arguments):
  """What accumulate.py relies on, in encoder and head: `batch_moments` of the first BatchNorm of a chain, in inference
  mode, are the moments that a training pass moves its averages by; and no other collection comes into being."""
  net = model.make_encoder(arrangement=arrangement, width=1 / 16, **arguments)
  images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), images))
  assert set(shapes) == {"params", "batch_stats"}
  variables = jax.jit(net.init)(jax.random.key(0), images)
  pick = {"mutable": [accumulate.MOMENTS]}
  _, seen = jax.jit(functools.partial(net.apply, train=False, **pick))(variables, images)
  _, moved = jax.jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))(variables, images)
  assert jax.tree.structure(seen[accumulate.MOMENTS]).num_leaves == jax.tree.structure(moved).num_leaves
  first = "stem_norm" if "stem_norm" in variables["params"] else "stem_norm1"
  moments, averages = seen[accumulate.MOMENTS][first], moved["batch_stats"][first]
  momentum = encoder.BN_MOMENTUM
  np.testing.assert_allclose((averages["mean"]) / (1 - momentum), moments["mean"], rtol=1e-4, atol=1e-5)
  variance = moments["square"] - moments["mean"] ** 2
  np.testing.assert_allclose((averages["var"] - momentum) / (1 - momentum), variance, rtol=1e-4, atol=1e-5)


def test_moments_of_the_head():
  head, h = Projector(2, 4), np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
  variables = head.init(jax.random.key(0), h)
  assert set(variables) == {"params", "batch_stats"}
  _, seen = head.apply(variables, h, train=False, mutable=[accumulate.MOMENTS])
  x = h @ variables["params"]["dense0"]["kernel"]
  np.testing.assert_allclose(seen[accumulate.MOMENTS]["norm0"]["mean"], x.mean(0), atol=1e-6)
  np.testing.assert_allclose(seen[accumulate.MOMENTS]["norm0"]["square"], (x**2).mean(0), atol=1e-6)


def test_an_unknown_arrangement_is_one_line():
  with pytest.raises(ValueError, match="arrangement 'dense': expected one of plain, packed"):
    model.make_encoder(arrangement="dense", depth=18)
