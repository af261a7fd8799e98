"""The compiled step on 8 devices: same numbers as one device, an eighth of the work each, no image on the wire."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import contrast
from simclr_jax.methods import simclr
from simclr_jax.programs import pretrain
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


BATCH = 64  # large enough for the images, and not the copies of LARS on every device, to be most of the work


def batch_of(config, n=BATCH):
  rng = np.random.default_rng(0)
  size = config.augment.size
  views = rng.random((n, 2, size, size, 3), np.float32)
  index = np.arange(n, dtype=np.int32)
  return Batch(pixels=views, label=index % 10, index=index, seed=np.zeros((n, 2), np.int32))


@functools.lru_cache
def compiled(devices, stacking=None):
  """(compiled step, its task, mesh) on so many devices."""
  config = tiny.config(batch_size=BATCH)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  task = pretrain.make_task(config, tiny.source(), mesh=mesh)
  if stacking:
    task = stacking(task)
  state = loop.abstract_state(task, mesh)
  sharding = mesh_lib.batch_sharding(mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch_of(config))
  return loop.compile_step(task, mesh, state).lower(state, batch).compile(), task, mesh


def train(devices, steps=3):
  step, task, mesh = compiled(devices)
  state = jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(0))
  before = jax.device_get((state.params, state.batch_stats))
  for _ in range(steps):
    state, metrics = step(state, mesh_lib.global_batch(mesh, batch_of(tiny.config())))
  after = jax.device_get((state.params, state.batch_stats))
  return jax.tree.map(np.subtract, after, before), jax.device_get(metrics)


def test_eight_devices_equal_one():
  """Changes of parameters and statistics in 3 steps: those of every array agree in norm to 0.2 % (a channel that hardly
  varies amplifies rounding, with each compiler another one), which with a loss or BatchNorm per device they would not."""
  one, eight = train(1), train(8)
  for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(eight[0]), strict=True):
    assert np.linalg.norm(b - a) <= 2e-3 * np.linalg.norm(a)
  for key in ("loss", "contrastive_accuracy", "entropy"):
    np.testing.assert_allclose(eight[1][key], one[1][key], rtol=1e-4)


def collectives(text):
  """[(kind, [shapes])] of the compiled text."""
  return [
    (kind, [tuple(int(d) for d in s.split(",") if d) for s in re.findall(r"\w+\[([\d,]*)\]", result)])
    for result, kind in COLLECTIVE.findall(text)
  ]


def replicates_or_moves_images(step, single):
  """Why a compiled step on 8 devices is not data-parallel; an empty list if it is."""
  faults = []
  flops, whole = step.cost_analysis()["flops"], single.cost_analysis()["flops"]
  if flops > 1.05 * whole / 8:
    faults.append(f"{8 * flops / whole:.2f} times the FLOPs of one device")
  found = collectives(step.as_text())
  if not any(kind == "all-reduce" for kind, _ in found):
    faults.append("no all-reduce")
  # Images and activations have rank 4 and more with a batch; weight gradients (rank 4 too) are only ever all-reduced.
  faults += [f"{k} of {s}" for k, shapes in found for s in shapes if k != "all-reduce" and len(s) >= 4]
  return faults


def test_the_step_is_data_parallel():
  assert replicates_or_moves_images(compiled(8)[0], compiled(1)[0]) == []


def stack_views_wrongly(task):
  """All first views, then all second ones: right numbers, but the compiler gathers the images on every device."""

  def step(state, batch):
    views = jnp.swapaxes(batch.pixels, 0, 1)
    views = views.reshape(-1, 2, *views.shape[2:])
    return task.step(state, batch.replace(pixels=views))

  return loop.Task(**{**vars(task), "step": step})


def test_the_check_catches_a_wrong_stacking():
  assert replicates_or_moves_images(compiled(8, stack_views_wrongly)[0], compiled(1)[0])


def test_all_reduces_never_carry_images():
  """All-reduces are of parameters, statistics and embeddings: none as large as this device's share of the images."""
  config = tiny.config()
  share = BATCH // 8 * 2 * config.augment.size**2 * 3
  parameters = {tuple(x.shape) for x in jax.tree.leaves(loop.abstract_state(compiled(8)[1], compiled(8)[2]).params)}
  for _, shapes in collectives(compiled(8)[0].as_text()):
    for shape in shapes:
      assert shape in parameters or np.prod(shape) < share, shape


@pytest.mark.parametrize("reduction, factor", [("mean", 1), ("official_sum", 2)])
def test_chance_loss(reduction, factor):
  """Orthogonal embeddings at a high temperature know nothing; their loss tends to ln(2n - 1)."""
  config = tiny.config(**{"loss.reduction": reduction})
  z = np.random.default_rng(0).standard_normal((tiny.BATCH, 2, 64)).astype(np.float32)
  loss, _ = contrast.nt_xent(z, 1000.0, reduction=reduction)
  np.testing.assert_allclose(loss, simclr.chance_loss(config), rtol=1e-3)
  np.testing.assert_allclose(simclr.chance_loss(config), factor * np.log(2 * tiny.BATCH - 1), rtol=1e-6)


@pytest.mark.slow
def test_a_sharded_optimizer_state_changes_nothing_but_its_place():
  """ZeRO-1: the same parameters, an eighth of the optimizer's memory on each device, and it stays split."""
  config = tiny.config(batch_size=BATCH)
  mesh = mesh_lib.make_mesh()
  task = dataclasses.replace(pretrain.make_task(config, tiny.source(), mesh=mesh), zero1=True)
  state = loop.abstract_state(task, mesh)
  step = loop.compile_step(task, mesh, state)
  placed = jax.tree.map(lambda x: x.sharding, state)
  state = jax.jit(task.init, out_shardings=placed)(jax.random.key(0))
  before = jax.device_get(state.params)
  for _ in range(3):
    state, _ = step(state, mesh_lib.global_batch(mesh, batch_of(config)))
  changes = jax.tree.map(np.subtract, jax.device_get(state.params), before)
  for a, b in zip(jax.tree.leaves(train(8)[0][0]), jax.tree.leaves(changes), strict=True):
    assert np.linalg.norm(b - a) <= 2e-3 * np.linalg.norm(a)
  moments = jax.tree.leaves(state.opt_state)
  assert jax.tree.map(lambda x: x.sharding, state) == placed
  share = sum(x.addressable_shards[0].data.nbytes for x in moments) / sum(x.nbytes for x in moments)
  assert share < 0.16  # a few vectors have no axis that 8 divides
