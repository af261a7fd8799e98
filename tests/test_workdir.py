"""What may become a workdir, what --overwrite deletes, and who has a workdir at a time."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import bucket
import numpy as np
import pytest

from simclr_jax import data
from simclr_jax.programs import trained
from simclr_jax.programs import workdir as of_programs
from simclr_jax.runtime import checkpoint, files, lock, loop

MARKS = {"LOCK", "RUN", "RUN.sha256"}


@pytest.fixture(autouse=True)
def locks_are_given_back():
  yield
  lock.release_all()


def claim(path, resume=False, overwrite=False, **keywords):
  return checkpoint.claim_workdir(str(path), resume=resume, overwrite=overwrite, **keywords)


def names(path):
  return {entry.name for entry in path.iterdir()}


def test_workdir_rules(tmp_path):
  run = tmp_path / "run"
  claim(run)
  claim(run)  # still empty
  (run / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="is not empty: add --resume to resume the run, --overwrite"):
    claim(run)
  (run / "config.json").write_text("{}")
  (run / "checkpoints/4").mkdir(parents=True)
  claim(run, resume=True)
  assert (run / "notes.txt").exists()
  with pytest.raises(ValueError, match="--overwrite: notes.txt was not written by a run; move it elsewhere"):
    claim(run, overwrite=True)
  assert (run / "notes.txt").read_text() == "mine" and (run / "checkpoints/4").exists()
  (run / "notes.txt").unlink()
  claim(run, overwrite=True)
  assert names(run) == MARKS
  with pytest.raises(ValueError, match="is a file"):
    claim(__file__)
  with pytest.raises(ValueError, match="contradict each other"):
    claim(run, resume=True, overwrite=True)


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
@pytest.mark.parametrize("more", [(), ("config.json",)])
def test_a_folder_of_images_is_never_taken_over(tmp_path, flag, more):
  photos = {f"{i}.jpg" for i in range(48)} | set(more)
  for name in photos:
    (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match=f"--{flag}: the folder is not a run .it holds 0.jpg and no file RUN"):
    claim(tmp_path, **{flag: True})
  assert names(tmp_path) == photos


def test_resume_takes_an_empty_folder_an_absent_one_and_a_run_of_an_earlier_version(tmp_path):
  (tmp_path / "compiled").mkdir()
  claim(tmp_path, resume=True)
  claim(tmp_path / "absent", resume=True)
  old = tmp_path / "old"
  old.mkdir()
  for name in ("config.json", "metrics.jsonl", "food101"):
    (old / name).write_text("{}")
  claim(old, resume=True)
  assert MARKS < names(old)


def test_overwrite_deletes_what_a_killed_export_left(tmp_path):
  of_programs.claim(tmp_path / "run", resume=False, overwrite=False)
  for name in (".encoder.tmp", ".encoder.old.tmp", ".encoder_torch.tmp", ".export.old.tmp"):
    (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / name / "card.json").write_text("{}")
  of_programs.claim(tmp_path / "run", resume=False, overwrite=True)
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LOCK", "RUN", "RUN.sha256"]


def test_overwrite_through_a_link_empties_the_folder_and_spares_what_a_link_in_it_leads_to(tmp_path):
  run, link, elsewhere = tmp_path / "run", tmp_path / "link", tmp_path / "elsewhere"
  claim(run)
  (run / "metrics.jsonl").write_text("")
  link.symlink_to(run)
  claim(link, overwrite=True)
  assert names(run) == MARKS and link.is_symlink()
  (elsewhere / "4").mkdir(parents=True)
  (run / "checkpoints").symlink_to(elsewhere)
  with pytest.raises(ValueError, match="checkpoints is a symbolic link to .*elsewhere: delete what you do not need"):
    claim(run, overwrite=True)
  assert (elsewhere / "4").exists()


def test_a_run_and_its_data_lie_apart(tmp_path):
  photos = tmp_path / "photos"
  photos.mkdir()
  link = tmp_path / "link"
  link.symlink_to(photos)
  for where in (photos, photos / "deep/run", tmp_path, link / "run"):
    with pytest.raises(ValueError, match="the data is in .*photos; a run and its data must not contain each other"):
      of_programs.claim(where, resume=False, overwrite=False, specs=(f"folder:{photos}",))
  assert names(tmp_path) == {"photos", "link"} and not names(photos)
  of_programs.claim(
    tmp_path / "photos2", resume=False, overwrite=False, specs=(f"folder:{photos}", "fashion:train", "")
  )
  np.savez(tmp_path / "run.npz", images=np.zeros(1))
  of_programs.claim(tmp_path / "run", resume=False, overwrite=False, specs=(f"npz:{tmp_path}/run.npz:train",))
  with pytest.raises(ValueError, match="must not contain each other"):
    claim("gs://b/data/run", data=["gs://b/data"])


@pytest.mark.parametrize("name", ["config.json", "skipped.json", "RUN"])
def test_a_damaged_file_that_a_resume_reads_is_named(tmp_path, name):
  claim(tmp_path)
  checkpoint.write_config(tmp_path, '{"seed": 0, "temperature": 0.2}')
  skipped = loop._Skipped(tmp_path)
  skipped.add(4, 2)
  read = {
    "config.json": lambda: checkpoint.read_config(tmp_path),
    "skipped.json": lambda: loop._Skipped(tmp_path)._rows,
    "RUN": lambda: checkpoint.run_id(tmp_path),
  }[name]
  file, before = tmp_path / name, read()
  content = file.read_bytes()
  for damaged in (b"", content[:-3], *(flipped(content, bit) for bit in range(0, 8 * len(content), 5))):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256 is not the one in {name}.sha256") as error:
      read()
    assert "\n" not in str(error.value)
  file.unlink()
  if name != "RUN":  # which may be missing, in a run of an earlier version
    with pytest.raises(ValueError, match=f"{name} is missing, although its seal"):
      read()
  (tmp_path / f"{name}.sha256").unlink()
  file.write_bytes(content)  # as an earlier version left it
  assert read() == before


def flipped(content, bit):
  out = bytearray(content)
  out[bit // 8] ^= 1 << bit % 8
  return bytes(out)


@pytest.mark.parametrize("content", ["", "[[1]]", "{}{", "[4]", "nothing"])
def test_unsealed_files_of_earlier_versions_are_checked_for_what_they_hold(tmp_path, content):
  (tmp_path / "skipped.json").write_text(content)
  with pytest.raises(ValueError, match="skipped.json is damaged: it is not what was written"):
    loop._Skipped(tmp_path)
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(ValueError, match="config.json is damaged: it is not a JSON object"):
    checkpoint.read_config(tmp_path)


def test_a_process_that_is_killed_between_seal_and_file_leaves_a_file_that_can_be_read(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  files.write_sealed(path, "first")
  write = files.write_bytes

  def killed(where, content):
    if str(where) == str(path):
      raise KeyboardInterrupt
    write(where, content)

  monkeypatch.setattr(files, "write_bytes", killed)
  with pytest.raises(KeyboardInterrupt):
    files.write_sealed(path, "second")
  assert files.read_sealed(path) == "first"
  monkeypatch.setattr(files, "write_bytes", write)
  files.write_sealed(path, "third")
  assert files.read_sealed(path) == "third"


def test_overwrite_spares_the_run_that_the_new_one_starts_from(tmp_path):
  run = tmp_path / "run"
  claim(run)
  (run / "encoder").mkdir()
  for start in (run, run / "encoder"):
    with pytest.raises(
      ValueError, match="--overwrite would delete .*run.*, which this starts from: name another folder"
    ):
      of_programs.claim(run, resume=False, overwrite=True, starts=("", str(start)))
  of_programs.claim(run / "tuned", resume=False, overwrite=True, starts=(str(run),))
  assert (run / "encoder").exists()


def test_a_start_that_is_no_run_is_not_called_the_workdir(tmp_path):
  with pytest.raises(ValueError, match=f"^{tmp_path}: no run here"):
    trained.open_start(tmp_path)


HOLDER = """
import sys, time
from simclr_jax.runtime import lock
lock.take(sys.argv[1])
print("taken", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(workdir, seconds):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(workdir), str(seconds)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout and process.stdout.readline() == "taken\n"
  return process


def test_a_second_run_is_told_who_has_the_workdir_and_a_killed_one_is_taken_over(tmp_path):
  first = holder(tmp_path, 60)
  with pytest.raises(
    ValueError, match=f"is in use by process {first.pid} on .*, started 2.*: wait for that run"
  ) as told:
    claim(tmp_path, resume=True)
  assert "\n" not in str(told.value)
  with pytest.raises(ValueError, match="is in use by"):
    claim(tmp_path, overwrite=True)
  first.kill()
  first.wait()
  assert (tmp_path / "LOCK").exists()
  claim(tmp_path, resume=True)
  assert json.loads((tmp_path / "LOCK").read_text())["process"] == os.getpid()
  checkpoint.mark_complete(tmp_path, 4)
  assert not (tmp_path / "LOCK").exists()
  last = holder(tmp_path, 0)  # which gives it back when it ends
  last.wait()
  assert not (tmp_path / "LOCK").exists()


def test_the_lock_of_process_0_is_waited_for_where_it_shows_late(tmp_path, monkeypatch):
  here, there = tmp_path / "here", tmp_path / "there"
  claim(here)
  text = lock.text_of(here)
  there.mkdir()
  (there / "LOCK").write_text(json.dumps(lock._me() | {"process": 1, "beat": 0}))  # of an earlier run
  monkeypatch.setattr(lock, "SHARED", 0.1)
  with pytest.raises(ValueError, match=f"--workdir={there}: .* does not see there what {socket.gethostname()} has"):
    lock.check_shared(there, text)
  monkeypatch.setattr(lock, "SHARED", 60.0)
  threading.Timer(0.3, lambda: (there / "LOCK").write_text(json.dumps(json.loads(text) | {"beat": 3}))).start()
  lock.check_shared(there, text)


def test_one_thread_shows_signs_of_life_however_often_a_lock_is_taken(tmp_path):
  for _ in range(5):
    lock.take(tmp_path)
    lock.release(tmp_path)
  assert sum(thread.name == "locks of workdirs" for thread in threading.enumerate()) == 1


def kill_after_deletions(monkeypatch, run, count):
  """Of what a run has written, not of marks that each claim takes away."""
  kind, left = type(files.absolute(run)), iter(range(count))

  def dying(delete):
    def method(self, *args, **options):
      if self.parent.name == run.name and self.name not in ("LOCK", "COMPLETE") and next(left, None) is None:
        raise KeyboardInterrupt
      return delete(self, *args, **options)

    return method

  for name in ("unlink", "rmtree"):
    monkeypatch.setattr(kind, name, dying(getattr(kind, name)))


def test_overwrite_that_is_killed_can_be_repeated(tmp_path, monkeypatch):
  """After each of its deletions."""
  written = ("config.json", "checkpoints/4/state", "metrics.jsonl", "scores.json", "encoder/card.json")
  for count in range(len(written) + 2):  # RUN and its seal
    run = tmp_path / f"{count}"
    claim(run)
    for name in written:
      (run / name).parent.mkdir(parents=True, exist_ok=True)
      (run / name).write_text("{}")
    with monkeypatch.context() as patch:
      kill_after_deletions(patch, run, count)
      with pytest.raises(KeyboardInterrupt):
        of_programs.claim(run, resume=False, overwrite=True)
    of_programs.claim(run, resume=False, overwrite=True)
    assert names(run) == MARKS


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path):
  (tmp_path / "LOCK").write_text(json.dumps(lock._me() | {"ticks": "1", "beat": 3}))
  claim(tmp_path)


@pytest.mark.parametrize("where", ["disk", "gs"])
def test_the_owner_on_another_machine_is_known_by_its_signs_of_life(tmp_path, where, monkeypatch, capsys):
  monkeypatch.setattr(lock, "SILENCE", 0.3)
  with bucket.buckets(tmp_path):
    run = files.absolute(tmp_path / "run" if where == "disk" else "gs://b/run")
    run.mkdir(parents=True)
    other = lock._me() | {"machine": "another", "host": "node7", "process": 123}
    files.write_text(run / "LOCK", json.dumps(other))
    began = time.monotonic()
    claim(run)
    assert time.monotonic() - began > 0.3 and "process 123 on node7: waiting up to" in capsys.readouterr().out
    lock.release(run)
    files.write_text(run / "LOCK", json.dumps(other))
    monkeypatch.setattr(lock, "SILENCE", 60.0)  # the sign comes with the first sleep, however slow the machine is
    monkeypatch.setattr(lock.time, "sleep", lambda _: files.write_text(run / "LOCK", json.dumps(other | {"beat": 1})))
    with pytest.raises(ValueError, match="is in use by process 123 on node7"):
      claim(run, resume=True)


def test_a_lock_that_others_take_for_moments_is_waited_for(tmp_path, monkeypatch):
  (tmp_path / "LOCK").write_text(json.dumps(lock._me() | {"beat": 3}))
  monkeypatch.setattr(lock, "PATIENCE", 0.3)
  with pytest.raises(ValueError, match="is in use by process"), lock.held(tmp_path):
    pytest.fail("it was not free")
  monkeypatch.setattr(lock, "PATIENCE", 60.0)
  threading.Timer(0.3, (tmp_path / "LOCK").unlink).start()
  with lock.held(tmp_path):
    assert (tmp_path / "LOCK").exists()
  assert not (tmp_path / "LOCK").exists()


def test_a_sign_of_life_that_seemed_to_fail_is_not_another_owner():
  """It may have been written, and the answer lost."""
  text = json.dumps(lock._me() | {"beat": 0})
  assert lock._is_same_owner(json.dumps(lock._me() | {"beat": 7}), text)
  for other in ("", "{", "[]", json.dumps(lock._me() | {"process": 1, "beat": 0})):
    assert not lock._is_same_owner(other, text)


def test_a_process_that_is_killed_while_it_makes_a_workdir_leaves_one_that_can_be_taken(tmp_path):
  """At any moment: each of the files that it writes first may be there half, under its temporary name."""
  for made in ([], ["LOCK"], ["RUN.sha256"], ["RUN.sha256", "RUN"]):
    for half in (".RUN.sha256.4385.tmp", ".RUN.4385.tmp", ".LOCK.4385.tmp"):
      for flags in ({}, {"resume": True}, {"overwrite": True}):
        workdir = tmp_path / "run"
        workdir.mkdir()
        if "RUN" in made:
          files.write_sealed(workdir / "RUN", "0" * 32)
        elif "RUN.sha256" in made:
          files.write_text(workdir / "RUN.sha256", "0" * 64)
        (workdir / half).write_bytes(b"half")
        claim(workdir, **flags)
        assert checkpoint.run_id(workdir) and not (workdir / half).exists()
        lock.release(workdir)
        shutil.rmtree(workdir)


def test_a_run_that_was_taken_over_saves_nothing(tmp_path, monkeypatch):
  claim(tmp_path)
  monkeypatch.setitem(lock._lost, str(tmp_path / "LOCK"), "process 5 on node7")
  with pytest.raises(ValueError, match="process 5 on node7 has taken over; nothing was saved"):
    with checkpoint.Checkpoints(tmp_path) as saved:
      saved.save(1, {"a": np.ones(2)}, {}, "{}")


def test_the_lock_shows_that_its_owner_is_alive(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.01)
  path = tmp_path / "LOCK"
  done = subprocess.Popen(
    [sys.executable, "-c", f"from simclr_jax.runtime import lock\nlock.BEAT = 0.05\n{HOLDER}", str(tmp_path), "30"]
  )
  while not (path.exists() and json.loads(path.read_text() or "{}").get("beat", 0) > 1):
    time.sleep(0.01)
    assert done.poll() is None
  done.kill()
  done.wait()


def test_every_data_set_that_is_a_path_is_kept_apart_from_a_workdir():
  assert {kind for kind, row in data.KINDS.items() if not row.is_path} == {*data.EMBEDDED, "tfds"}
  for kind, row in data.KINDS.items():
    assert of_programs.paths(f"{kind}:/my/data") == (["/my/data"] if row.is_path else [])
