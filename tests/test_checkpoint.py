"""Checkpoints: exact round trips, refusals that name the cure, and a full disk that costs nothing already saved."""

import os
import subprocess

import jax
import numpy as np
import pytest
import tiny

from simclr_jax import model, pretrain
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib


@pytest.fixture(scope="module")
def task():
  return pretrain.make_task(tiny.config(), tiny.source(), mesh=mesh_lib.make_mesh())


@pytest.fixture(scope="module")
def state(task):
  return jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh_lib.make_mesh()))(jax.random.key(0))


def test_round_trip_on_another_number_of_devices(tmp_path, task, state):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(3, state, model.keep_encoder(state), "{}")
  saved.close()
  mesh = mesh_lib.make_mesh(jax.devices()[:2])
  restored = checkpoint.Checkpoints(tmp_path).restore(3, loop.abstract_state(task.init, mesh))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  assert restored.params["encoder"]["stem_conv"]["kernel"].sharding.mesh == mesh


def test_the_encoder_item_is_the_encoder_alone(tmp_path, state):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(3, state, model.keep_encoder(state), "{}")
  like = jax.eval_shape(lambda s: model.keep_encoder(s), state)
  step, variables = checkpoint.read_run_encoder(tmp_path, like)
  assert step == 3 and set(variables) == {"params", "batch_stats"}
  assert not {"projector", "classifier", "encoder"} & set(variables["params"])
  jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(model.keep_encoder(state)))
  with pytest.raises(ValueError, match="no checkpoint of step 4; steps there: 3"):
    checkpoint.read_run_encoder(tmp_path, like, 4)


def test_another_architecture_is_refused_by_name(tmp_path, state):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(3, state, model.keep_encoder(state), "{}")
  wider = pretrain.make_task(tiny.config(**{"encoder.width": 0.125}), tiny.source(), mesh=mesh_lib.make_mesh())
  with pytest.raises(
    ValueError, match=r"another architecture: .* is float32\[4\] there and float32\[8\] in this config"
  ) as error:
    saved.restore(3, loop.abstract_state(wider.init, mesh_lib.make_mesh()))
  assert "\n" not in str(error.value)


def test_workdir_rules(tmp_path):
  run = tmp_path / "run"
  checkpoint.claim_workdir(str(run), resume=False, overwrite=False)
  checkpoint.claim_workdir(str(run), resume=False, overwrite=False)  # still empty
  (run / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="is not empty: add --resume to go on, --overwrite"):
    checkpoint.claim_workdir(str(run), resume=False, overwrite=False)
  with pytest.raises(ValueError, match="has no config.json, so it is no run"):
    checkpoint.claim_workdir(str(run), resume=False, overwrite=True)
  assert (run / "notes.txt").read_text() == "mine"
  (run / "config.json").write_text("{}")
  checkpoint.claim_workdir(str(run), resume=True, overwrite=False)
  assert (run / "notes.txt").exists()
  checkpoint.claim_workdir(str(run), resume=False, overwrite=True)
  assert list(run.iterdir()) == []
  with pytest.raises(ValueError, match="is a file"):
    checkpoint.claim_workdir(__file__, resume=False, overwrite=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system has to be mounted")
def test_a_full_disk_keeps_the_last_good_step(tmp_path, task, state):
  disk = tmp_path / "disk"
  disk.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
    pytest.skip("mount is not permitted here")
  try:
    saved = checkpoint.Checkpoints(disk, keep=10)
    saved.save(1, state, model.keep_encoder(state), "{}")
    (disk / "filler").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 100_000))
    with pytest.raises(OSError, match="could not save step 2: the disk is full; step 1 in .* is complete") as error:
      saved.save(2, state, model.keep_encoder(state), "{}")
    assert "\n" not in str(error.value)
    again = checkpoint.Checkpoints(disk, keep=10)
    assert again.latest_step() == 1
    restored = again.restore(1, loop.abstract_state(task.init, mesh_lib.make_mesh()))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_batch_that_does_not_divide_names_the_nearest():
  with pytest.raises(ValueError, match="batch_size=12 cannot be split over 8 devices: use 8 or 16"):
    mesh_lib.check_divisible(12, mesh_lib.make_mesh())
