"""More than two views of an image: the first two are those that there are of two, and the others differ from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import methods, views
from simclr_jax.programs import pretrain
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 24, 24, 3), np.uint8)
SEEDS = RNG.integers(0, 1000, (3, 2)).astype(np.int32)


def made(where, count):
  pipeline = views.pipeline(where=where, canvas=24, views=count, size=20, blur=False)
  if pipeline.host:
    pixels = np.stack([np.asarray(pipeline.host(image, seed)) for image, seed in zip(IMAGES, SEEDS, strict=True)])
  else:
    pixels = {"image": IMAGES, "extent": np.full((3, 2), 24, np.int32)}
  index = np.arange(3, dtype=np.int32)
  batch = Batch(pixels=pixels, label=index, index=index, seed=SEEDS)
  wanted = pipeline.spec(3).pixels
  assert jax.tree.map(lambda x: (x.shape, x.dtype), wanted) == jax.tree.map(lambda x: (x.shape, x.dtype), pixels)
  return np.asarray(jax.jit(pipeline.device)(batch))


@pytest.mark.parametrize("where", ["host", "device", "device_crop"])
def test_the_first_two_views_are_those_of_two(where):
  two, five = made(where, 2), made(where, 5)
  assert two.shape == (3, 2, 20, 20, 3) and five.shape == (3, 5, 20, 20, 3)
  np.testing.assert_array_equal(five[:, :2], two)
  for i in range(3):
    assert len({view.tobytes() for view in five[i]}) == 5


def test_seeds_of_many_views_wrap_around():
  """Those of the first five pairs, which fit 32 bits, are as before; all are different."""
  seeds = []
  half = lambda batch, pair, seed: (seeds.append(np.asarray(seed)), jnp.zeros((3, 2, 4)))[1]  # noqa: E731
  batch = Batch(pixels=None, label=None, index=None, seed=jnp.asarray(SEEDS))
  assert views._device(half, 16)(batch).shape == (3, 16, 4)
  expected = [np.asarray(SEEDS, np.int64) + pair * 0x1E3779B1 for pair in range(8)]
  for seed, wanted in zip(seeds, expected, strict=True):
    np.testing.assert_array_equal(seed, wanted.astype(np.uint32).view(np.int32).reshape(seed.shape))
  assert len({seed.tobytes() for seed in seeds}) == 8


def test_a_step_of_three_views():
  config = tiny.config(**{"augment.views": 3})
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh(jax.devices()[:1]))
  batch = next(iter(task.stream(0)))
  assert batch.pixels.shape == (16, 3, 16, 16, 3)
  state, metrics = jax.eval_shape(task.step, jax.eval_shape(task.init, jax.random.key(0)), batch)
  assert metrics["loss"].shape == () and metrics["online_accuracy"].shape == ()
  assert pretrain._first_views(task, pretrain.view_pipeline(config)).shape[1] == 2


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"method": "moco"},
      "config.augment.views=3: config.method='moco' is for 2 views; more are for simclr with nt_xent",
    ),
    ({"loss.name": "decoupled"}, "config.method='simclr' with config.loss.name=decoupled is for 2 views"),
  ],
)
def test_who_compares_two_views_says_so(changes, message):
  with pytest.raises(ValueError, match=message):
    methods.create(tiny.config(**{"augment.views": 3}, **changes), None, tiny.source())
  with pytest.raises(ValueError, match="augment.views=1: expected a"):
    functools.partial(views.pipeline, views=1, size=20)()
  with pytest.raises(ValueError, match="augment.views=3: augment.one_sided is of two views; expected 2"):
    functools.partial(views.pipeline, views=3, size=20, one_sided=True)()
