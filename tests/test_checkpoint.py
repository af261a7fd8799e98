"""Checkpoints: exact round trips, refusals that name the cure, and a full disk that costs nothing already saved."""

import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import model
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain, trained
from simclr_jax.runtime import checkpoint, errors, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def task():
  return pretrain.make_task(tiny.config(), tiny.source(), mesh=mesh_lib.make_mesh())


@pytest.fixture(scope="module")
def state(task):
  return jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh_lib.make_mesh()))(jax.random.key(0))


def test_round_trip_on_another_number_of_devices(tmp_path, task, state):
  saved, state = checkpoint.Checkpoints(tmp_path), state.replace(step=state.step + 3)
  saved.save(3, state, {"encoder": model.keep_encoder(state)}, "{}")
  saved.close()
  mesh = mesh_lib.make_mesh(jax.devices()[:2])
  step, restored = checkpoint.Checkpoints(tmp_path).restore_newest(loop.abstract_state(task, mesh))
  assert step == 3
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  assert restored.params["encoder"]["stem_conv"]["kernel"].sharding.mesh == mesh


def test_empty_parts_of_the_state_do_not_matter(tmp_path):
  """A state that has gained an empty part since it was saved, or lost one, is still restored."""
  full = {"step": np.int32(7), "params": {"w": np.arange(4.0)}, "old": {}, "opt": (np.ones(2), ())}
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(1, full, {}, "{}")
  placed = mesh_lib.replicated(mesh_lib.make_mesh())
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), full)
  del like["old"]
  step, restored = checkpoint.Checkpoints(tmp_path).restore_newest({**like, "extra": {}, "more": {"none": ()}})
  assert step == 1 and restored["extra"] == {} and restored["more"] == {"none": ()} and "old" not in restored
  assert restored["step"] == 7 and restored["params"]["w"].sharding == placed
  np.testing.assert_array_equal(restored["opt"][0], np.ones(2))
  with pytest.raises(ValueError, match=r"extra/bank is nothing there and float32\[3\] in this config"):
    bank = jax.ShapeDtypeStruct((3,), np.float32, sharding=placed)
    checkpoint.Checkpoints(tmp_path).restore_newest({**like, "extra": {"bank": bank}})


def test_the_encoder_item_is_the_encoder_alone(tmp_path, state):
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(3, state, {"encoder": model.keep_encoder(state)}, "{}")
  like = jax.eval_shape(lambda s: model.keep_encoder(s), state)
  step, variables = checkpoint.read_run_export(tmp_path, "encoder", like)
  assert step == 3 and set(variables) == {"params", "batch_stats"}
  assert not {"projector", "classifier", "encoder"} & set(variables["params"])
  jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(model.keep_encoder(state)))
  with pytest.raises(ValueError, match="no checkpoint of step 4; steps there: 3"):
    checkpoint.read_run_export(tmp_path, "encoder", like, 4)


def test_another_architecture_is_refused_by_name(tmp_path, state):
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(3, state, {"encoder": model.keep_encoder(state)}, "{}")
  wider = pretrain.make_task(tiny.config(**{"encoder.width": 0.125}), tiny.source(), mesh=mesh_lib.make_mesh())
  with pytest.raises(
    ValueError, match=r"another architecture: .* is float32\[4\] there and float32\[8\] in this config"
  ) as error:
    checkpoint.Checkpoints(tmp_path).restore_newest(loop.abstract_state(wider, mesh_lib.make_mesh()))
  assert "\n" not in str(error.value)


def cut(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(file):
  file.unlink()


def zero(file):
  data = bytearray(file.read_bytes())
  data[: len(data) // 2 + 1] = bytes(len(data) // 2 + 1)
  file.write_bytes(bytes(data))


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, state):
  workdir = tmp_path_factory.mktemp("run")
  with checkpoint.Checkpoints(workdir) as saved:
    for step in (1, 2):
      saved.save(step, state.replace(step=state.step + step), {"encoder": model.keep_encoder(state)}, "{}")
  return workdir


@pytest.mark.parametrize("damage", [cut, delete, zero, flip])
def test_every_damage_to_every_file_is_found(tmp_path, two_steps, damage, capsys):
  files = [f.relative_to(two_steps) for f in two_steps.glob("checkpoints/2/**/*") if f.is_file() and f.stat().st_size]
  assert {"manifest.json", "manifest.ocdbt", "metadata", "_METADATA"} <= {f.name for f in files} and len(files) > 10
  for number, file in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(two_steps, workdir)
    damage(workdir / file)
    assert checkpoint._newest_complete(workdir) == 1, file
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("checkpoint of step 2 skipped")
    assert file.name in said or file.name == "manifest.json"  # a damaged name in it is that of a file that is missing
    assert (workdir / "damaged" / "2.0").is_dir()  # kept, for who wants to look
    shutil.rmtree(workdir)


def test_a_damaged_step_is_skipped_and_saved_again(tmp_path, two_steps, task, state):
  workdir = tmp_path / "run"
  shutil.copytree(two_steps, workdir)
  flip(max(workdir.glob("checkpoints/2/state/**/d/*"), key=lambda f: f.stat().st_size))
  like = loop.abstract_state(task, mesh_lib.make_mesh())
  with pytest.raises(checkpoint.Damaged, match="damaged: its SHA-256 is not the one in manifest.json"):
    checkpoint.read_run_export(workdir, "encoder", jax.eval_shape(lambda s: model.keep_encoder(s), state), 2)
  saved = checkpoint.Checkpoints(workdir)
  step, restored = saved.restore_newest(like)
  assert step == restored.step == 1
  saved.save(2, state.replace(step=state.step + 2), {"encoder": model.keep_encoder(state)}, "{}")
  saved.close()
  assert checkpoint.Checkpoints(workdir).restore_newest(like)[0] == 2


def small(step, value=1.0):
  return {"step": np.int32(step), "w": np.full(3, value)}


def saved_steps(workdir, *steps, keep=3):
  saved = checkpoint.Checkpoints(workdir, keep=keep)
  for step in steps:
    saved.save(step, small(step), {}, "{}", {"recent": [0.1 * step]})
  saved.close()


def test_the_last_sealed_step_is_deleted_only_after_the_next_is_sealed(tmp_path, monkeypatch):
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  saved.save(1, small(1), {}, "{}")
  saved.wait()
  seal = checkpoint.seal

  def killed(path, **keywords):
    assert (tmp_path / "checkpoints/1/manifest.json").exists() and (tmp_path / "checkpoints/2").exists()
    raise OSError("No space left on device")

  monkeypatch.setattr(checkpoint, "seal", killed)
  saved.save(2, small(2), {}, "{}")
  with pytest.raises(OSError, match="could not save step 2: the disk is full; step 1 in .*checkpoints is complete"):
    saved.wait()
  monkeypatch.setattr(checkpoint, "seal", seal)
  again = checkpoint.Checkpoints(tmp_path, keep=1)
  assert again.latest_step() == 1
  again.save(2, small(2), {}, "{}")
  again.wait()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_step_is_written_while_training_goes_on(tmp_path, monkeypatch):
  """Its arrays are those of the moment, whatever is done with the buffers; `save` does not wait for the disk."""
  seal, written = checkpoint.seal, threading.Event()

  def slow(path, **keywords):
    assert written.wait(60)
    seal(path, **keywords)

  monkeypatch.setattr(checkpoint, "seal", slow)
  donating = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  state = donating({"step": jnp.int32(0), "w": jnp.arange(1 << 20, dtype=jnp.float32)})
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  saved.save(1, state, {}, "{}")
  for _ in range(3):
    state = donating(state)
  saved.check()
  assert not (tmp_path / "checkpoints/1/manifest.json").exists()
  written.set()
  assert saved.latest_step() == 1
  step, kept = checkpoint.read_run_state(tmp_path)
  assert step == kept["step"] == 1
  np.testing.assert_array_equal(kept["w"], np.arange(1 << 20) + 1)


def test_a_failure_in_the_background_is_known_at_once(tmp_path, monkeypatch):
  saved = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint, "seal", lambda *_, **__: (_ for _ in ()).throw(OSError("no such bucket")))
  saved.save(1, small(1), {}, "{}")
  saved._thread.join()
  for what in (saved.check, saved.wait, lambda: saved.save(2, small(2), {}, "{}")):
    with pytest.raises(checkpoint.NotSaved, match="could not save step 1: no such bucket; no checkpoint exists yet"):
      what()


@pytest.mark.parametrize(
  "error, now",
  [
    (ValueError('UNAVAILABLE: Error writing "gs://mine/run/d/1": HTTP response code: 503'), True),
    (ValueError("RESOURCE_EXHAUSTED: HTTP response code: 429"), True),
    (errors.Unavailable("b/mine/o: injected, 503"), True),
    (ValueError("PERMISSION_DENIED: HTTP response code: 403"), False),
    (OSError("b/mine/o: Forbidden: https://..."), False),
    (FileNotFoundError("b/mine/o"), False),
  ],
)
@pytest.mark.parametrize("where", ["gs://mine/run", "disk"])
def test_a_step_that_a_bucket_did_not_take_may_be_saved_by_a_restart(tmp_path, monkeypatch, error, now, where):
  saved = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(saved, "_folder", where if "://" in where else saved._folder)
  found = saved._not_saved(4, error)
  now = now and "://" in where
  assert isinstance(found, checkpoint.NotSaved) and isinstance(found, checkpoint.NotSavedNow) == now
  assert getattr(found, "exit_code", 1) == (142 if now else 1) and ("the disk is full" in str(found)) == (
    "RESOURCE_EXHAUSTED" in str(error) and where == "disk"
  )


def test_a_full_disk_is_found_before_orbax_finds_it(tmp_path, monkeypatch):
  """Which would print pages, and hang where even its metadata have no room."""
  saved_steps(tmp_path, 1)
  saved = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
  monkeypatch.setattr(saved._manager, "save", pytest.fail)
  with pytest.raises(checkpoint.NotSaved, match="could not save step 2: the disk is full; step 1 in .* is complete"):
    saved.save(2, small(2), {}, "{}")


def test_a_step_under_another_name_or_of_another_run_is_not_resumed(tmp_path, capsys):
  run, other = tmp_path / "run", tmp_path / "other"
  for workdir in (run, other):
    checkpoint.claim_workdir(str(workdir), resume=False, overwrite=False)
    checkpoint.write_config(workdir, "{}")
    saved_steps(workdir, 1, 2)
  steps = run / "checkpoints"
  (steps / "2").rename(steps / "20")
  assert checkpoint.Checkpoints(run).latest_step() == 1
  assert (
    "checkpoint of step 20 skipped: " in (said := capsys.readouterr().out) and "is the checkpoint of step 2;" in said
  )
  shutil.copytree(other / "checkpoints/2", steps / "2")
  with pytest.raises(ValueError, match="checkpoints/2 belongs to another run"):
    checkpoint.read_run_state(run, 2)
  assert checkpoint.Checkpoints(run).latest_step() == 1
  assert "belongs to another run; moved to" in capsys.readouterr().out
  shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("RUN*", "LOCK", ".LOCK*", "damaged"))
  checkpoint.claim_workdir(str(tmp_path / "copy"), resume=True, overwrite=False)  # knows itself by its checkpoints
  assert checkpoint.run_id(tmp_path / "copy") == checkpoint.run_id(run)
  assert checkpoint.Checkpoints(tmp_path / "copy").latest_step() == 1


def test_a_step_that_is_not_sealed_yet_or_damaged_is_passed_over_by_what_only_reads(tmp_path, capsys):
  saved_steps(tmp_path, 1, 2, 3)
  steps = tmp_path / "checkpoints"
  seal = (steps / "3/manifest.json").read_bytes()
  (steps / "3/manifest.json").unlink()  # as while a run is training
  (steps / "2/loop.json").unlink()
  before = sorted(str(path) for path in tmp_path.rglob("*"))
  assert checkpoint.read_run_state(tmp_path)[0] == 1
  assert capsys.readouterr().out.splitlines() == [
    "checkpoint of step 3 passed over: it is not sealed yet",
    f"checkpoint of step 2 passed over: {steps}/2/loop.json is missing",
  ]
  for step, words in ((3, "3 has no manifest.json"), (2, "2/loop.json is missing")):
    with pytest.raises(checkpoint.Damaged, match=words):
      checkpoint.read_run_state(tmp_path, step)
  assert sorted(str(path) for path in tmp_path.rglob("*")) == before
  flip(steps / "1/loop.json")
  with pytest.raises(checkpoint.Damaged, match="3 has no manifest.json"):
    checkpoint.read_run_state(tmp_path)
  (steps / "3/manifest.json").write_bytes(seal)
  assert checkpoint.read_run_state(tmp_path)[0] == 3
  assert capsys.readouterr().out == ""


def test_messages_name_the_flag_that_was_given(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  for flag in ("--workdir=", ""):
    with pytest.raises(UserError, match=f"^{flag}{tmp_path}: no checkpoint; steps there: none"):
      checkpoint.read_run_state(tmp_path, flag=flag)
  checkpoint.write_config(tmp_path, config_lib.to_json(tiny.config()))
  with pytest.raises(UserError, match=f"^{tmp_path}: no checkpoint of step 7; steps there: none"):
    trained.open_start(tmp_path, 7)


def test_a_state_of_another_step_than_its_folder_is_refused(tmp_path, two_steps, task):
  """Where the manifest says neither step nor run, as those of earlier versions."""
  workdir = tmp_path / "run"
  shutil.copytree(two_steps, workdir)
  (workdir / "checkpoints/2").rename(workdir / "checkpoints/20")
  checkpoint.seal(workdir / "checkpoints/20")
  with pytest.raises(checkpoint.Damaged, match="checkpoints/20 holds the state of step 2: give the folder that name"):
    checkpoint.Checkpoints(workdir).restore_newest(loop.abstract_state(task, mesh_lib.make_mesh()))


def test_strays_beside_the_steps_do_not_matter(tmp_path):
  saved_steps(tmp_path, 1, 2)
  steps = tmp_path / "checkpoints"
  (steps / "7").write_text("a file")
  (steps / "notes.txt").write_text("mine")
  for stray in ("0004", "2 (copy)", "9_backup"):
    shutil.copytree(steps / "2", steps / stray)
  saved_steps(tmp_path, 3, 4, 5)
  assert {p.name for p in steps.iterdir()} == {"3", "4", "5", "7", "notes.txt", "0004", "2 (copy)", "9_backup"}
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 5


def test_a_damaged_step_on_another_disk_is_moved_aside(tmp_path, monkeypatch):
  """checkpoints/ may be a link to another disk, from which nothing can be renamed into the workdir."""
  if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
    pytest.skip("one disk only")
  disk = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
  try:
    (tmp_path / "checkpoints").symlink_to(disk)
    saved_steps(tmp_path, 1, 2)
    (disk / "2/manifest.json").unlink()
    assert checkpoint.Checkpoints(tmp_path).latest_step() == 1
    assert (tmp_path / "damaged/2.0/state").is_dir() and not (disk / "2").exists()
  finally:
    shutil.rmtree(disk)


def test_what_the_loop_keeps_is_saved_with_the_step(tmp_path):
  saved_steps(tmp_path, 1, 2)
  assert checkpoint.Checkpoints(tmp_path).loop() == {"recent": [0.2]}
  assert checkpoint.Checkpoints(tmp_path / "new").loop() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system has to be mounted")
def test_a_full_disk_keeps_the_last_good_step(tmp_path, task, state):
  disk = tmp_path / "disk"
  disk.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
    pytest.skip("mount is not permitted here")
  try:
    saved, state = checkpoint.Checkpoints(disk, keep=10), state.replace(step=state.step + 1)
    saved.save(1, state, {"encoder": model.keep_encoder(state)}, "{}")
    saved.wait()
    (disk / "filler").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 100_000))
    with pytest.raises(OSError, match="could not save step 2: the disk is full; step 1 in .* is complete") as error:
      saved.save(2, state, {"encoder": model.keep_encoder(state)}, "{}")
      saved.wait()
    assert "\n" not in str(error.value)
    again = checkpoint.Checkpoints(disk, keep=10)
    step, restored = again.restore_newest(loop.abstract_state(task, mesh_lib.make_mesh()))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_batch_that_does_not_divide_names_the_nearest():
  with pytest.raises(ValueError, match="batch_size=12 cannot be split over 8 devices: use 8 or 16"):
    mesh_lib.check_divisible(12, mesh_lib.make_mesh())
