"""Devices of one run that no longer hold the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_loop import run, task

from simclr_jax.programs import pretrain, same
from simclr_jax.runtime import loop, replicas
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch


def with_flipped_bit(x, device, bit):
  """The replicated array with one bit of the copy on one device flipped."""
  copies = []
  for shard in x.addressable_shards:
    copy = np.array(shard.data)
    if shard.device == device:
      copy.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
    copies.append(jax.device_put(copy, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, copies)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_one_flipped_bit_in_one_copy_is_found(dtype):
  mesh = mesh_lib.make_mesh()
  put = lambda x: jax.device_put(x, mesh_lib.replicated(mesh))  # noqa: E731
  tree = {"a": put(jnp.ones((3, 5))), "b": put(jnp.arange(24).reshape(4, 6).astype(dtype)), "c": put(jnp.int32(3))}
  tree["split"] = jax.device_put(jnp.arange(8.0), mesh_lib.batch_sharding(mesh))  # of which nobody has a copy
  assert replicas.difference(mesh, tree) == ""
  rng = np.random.default_rng(0)
  for bit in [0] if dtype == "bool" else rng.integers(0, 8 * tree["b"].nbytes, 20):
    device = mesh.devices.flat[rng.integers(mesh.size)]
    damaged = tree | {"b": with_flipped_bit(tree["b"], device, int(bit))}
    assert f"not the same on all 8 devices: device {device.id} of process 0 differ" in replicas.difference(
      mesh, damaged
    )


def test_two_devices_accuse_each_other():
  mesh = mesh_lib.make_mesh(jax.devices()[:2])
  assert "device 0 of process 0, device 1 of process 0 differ" in replicas.named(mesh, np.uint32([1, 2]))


@pytest.mark.parametrize("at", [7, 150])
def test_a_run_stops_before_it_saves_what_differs(tmp_path, at, monkeypatch):
  """Within AGREE_EVERY steps, or at the next checkpoint."""
  update, mesh = loop.Loop.update, mesh_lib.make_mesh()

  def damaged(self, batch):
    update(self, batch)
    if self.step == at:
      self.state.params["w"] = with_flipped_bit(self.state.params["w"], mesh.devices.flat[5], 29)

  monkeypatch.setattr(loop.Loop, "update", damaged)
  done = {7: 65, 150: 195}[at]
  kept = {7: "nothing was saved before", 150: "step 130 was saved before"}[at]
  with pytest.raises(
    loop.Disagreement, match=f"after step {done}, the state is not the same .*: device 5 of process 0 differ.*; {kept}"
  ):
    run(tmp_path, task(400))
  with pytest.raises(loop.Disagreement, match="after step (99|199), "):
    run(tmp_path / "no checkpoints", task(400), checkpoint_every=0)


def test_other_rows_on_the_devices_are_found(tmp_path):
  """As of a process whose stream is a batch behind, or has another seed."""
  source, config = tiny.source(), tiny.config()
  check = same.batch_check(source, config.batch_size, config.seed)
  made = pretrain.make_task(config, source, mesh=mesh_lib.make_mesh())
  stream = made.stream(0)
  batches = [next(stream) for _ in range(7)]  # over the end of an epoch
  for number, batch in enumerate(batches):
    assert check(batch, number) == ""
    shuffled = dataclasses.replace(batch, seed=batch.seed[::-1])
    assert check(shuffled, number) == ""
    assert f"16 of the 16 rows of batch {number} are not those of seed 0" in check(batches[number - 1], number)
  half = Batch(pixels=None, label=None, index=None, seed=np.r_[batches[2].seed[:8], batches[1].seed[8:]])
  assert check(half, 2).startswith("8 of the 16 rows of batch 2")
  wrong = dataclasses.replace(task(4), check_batch=lambda batch, number: f"batch {number} is another")
  with pytest.raises(loop.Disagreement, match="after step 0, batch 0 is another; nothing was saved before"):
    run(tmp_path, wrong)
