"""Files are written whole or not at all, on a disk and in a bucket."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil

import bucket
import numpy as np
import pytest
import tiny

from simclr_jax.evaluation import features
from simclr_jax.exporting import folder
from simclr_jax.programs import pretrain
from simclr_jax.runtime import checkpoint, files, metrics

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, monkeypatch):
  """A folder to write to; nothing that belongs into the bucket may appear in the working directory."""
  monkeypatch.chdir(tmp_path)
  with bucket.buckets(tmp_path / "buckets"):
    yield tmp_path / "here" if request.param == "disk" else "gs://mine/here"
  assert {path.name for path in tmp_path.iterdir()} <= {"here", "buckets"}


def test_written_overwritten_read(place):
  path = files.absolute(place) / "a.txt"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, "one")
  files.write_text(path, "two\n")
  assert files.read_text(path) == "two\n" and [file.name for file in path.parent.iterdir()] == ["a.txt"]
  assert files.sha256(path) == hashlib.sha256(b"two\n").hexdigest()
  files.append_text(path, "three\n")
  files.append_text(path.parent / "b.txt", "new")
  assert files.read_text(path) == "two\nthree\n" and files.read_text(path.parent / "b.txt") == "new"
  with files.local(path) as local:
    assert pathlib.Path(local).read_text() == "two\nthree\n" and local.endswith("a.txt")


def test_created_once_and_removed_by_content(place):
  path = files.absolute(place) / "LOCK"
  path.parent.mkdir(parents=True, exist_ok=True)
  assert files.create_text(path, "mine") and not files.create_text(path, "yours") and files.read_text(path) == "mine"
  files.remove_text(path, "yours")
  assert files.read_text(path) == "mine"
  files.remove_text(path, "mine")
  files.remove_text(path, "mine")
  assert not path.exists() and files.create_text(path, "yours")


def test_in_a_bucket_a_file_that_was_created_but_not_confirmed_is_this_process_s(tmp_path):
  """The answer to the first try is lost; the second, which the client sends by itself, finds the file there."""
  with bucket.buckets(tmp_path):
    files.write_text("gs://mine/LOCK", "mine")
    assert files.create_text("gs://mine/LOCK", "mine") and not files.create_text("gs://mine/LOCK", "yours")


def test_in_a_bucket_a_step_that_was_not_finished_is_moved_aside(tmp_path, capsys):
  """Orbax writes it under its last name there, and only then a file that says that it is complete."""
  with bucket.buckets(tmp_path):
    files.write_text("gs://mine/run/checkpoints/2/state/d/x", "half")
    assert checkpoint._newest_complete("gs://mine/run") is None
    assert files.read_text("gs://mine/run/damaged/2.0/state/d/x") == "half"
    assert not files.absolute("gs://mine/run/checkpoints/2").exists()
  assert (
    "2 has no manifest.json: it was not written to the end; moved to gs://mine/run/damaged/2.0"
    in capsys.readouterr().out
  )


def test_a_folder_is_moved(place):
  path = files.absolute(place)
  (path / "a").mkdir(parents=True, exist_ok=True)
  files.write_text(path / "a/x.txt", "x")
  (path / "aside").mkdir(parents=True, exist_ok=True)
  files.move(path / "a", path / "aside/1.0")
  assert not (path / "a").exists() and files.read_text(path / "aside/1.0/x.txt") == "x"


def test_a_part_of_a_file_of_one_version(place):
  path = files.absolute(place) / "a.bin"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_bytes(path, b"0123456789")
  seen = files.version(path)
  assert files.read_part(str(path), 2, 3, seen) == b"234" and files.read_part(str(path), 8, 9, seen) == b"89"
  files.write_bytes(path, b"abcdefghij")
  assert files.version(path) != seen


def test_no_other_clouds_and_no_bucket_without_its_client(monkeypatch):
  with pytest.raises(ValueError, match="^s3://a/b: expected a path on this machine, or gs://BUCKET/NAME$"):
    files.absolute("s3://a/b")
  monkeypatch.setattr(files, "_has_gcsfs", lambda: False)
  with pytest.raises(
    ValueError, match=r"^gs://a/b: gs:// needs gcsfs, which is not installed: pip install 'simclr_jax\[gcs\]'$"
  ):
    files.absolute("gs://a/b")


def test_names_that_are_not_utf8_keep_their_bytes(place):
  path = files.absolute(place) / "names.txt"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, os.fsdecode(b"caf\xe9.png") + "\n")
  assert path.read_bytes() == b"caf\xe9.png\n" and os.fsencode(files.read_text(path)) == b"caf\xe9.png\n"


def test_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(files.absolute("a/b")) == f"{tmp_path}/a/b"
  assert str(files.absolute("gs://bucket/a") / "b") == "gs://bucket/a/b"
  assert files.absolute(files.absolute("gs://bucket/a")) == files.absolute("gs://bucket/a")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  files.write_text(path, "good")

  def full(descriptor):
    raise OSError("No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    files.write_text(path, "half")
  assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


def test_a_run_folder(place):
  """Claimed, written to, claimed again, and cleared."""
  workdir = checkpoint.claim_workdir(place, resume=False, overwrite=False)
  files.write_text(workdir / "config.json", '{"seed": 0}')
  writer = metrics.Writer(workdir)
  for step in (1, 2, 3):
    writer.scalars(step, {"loss": 1.0 / step, "bad": float("nan")})
  writer.close()
  again = metrics.Writer(workdir, resume_step=2)
  again.scalars(3, {"loss": 0.5})
  again.close()
  assert [(row["step"], row["loss"], row.get("bad")) for row in metrics.read(place)] == [
    (1, 1.0, None), (2, 0.5, None), (3, 0.5, None)
  ]  # fmt: skip
  checkpoint.mark_complete(workdir, 3)
  assert checkpoint.read_config(place) == '{"seed": 0}' and files.read_text(workdir / "COMPLETE") == "step 3\n"
  with pytest.raises(ValueError, match="is not empty: add --resume"):
    checkpoint.claim_workdir(place, resume=False, overwrite=False)
  assert not (checkpoint.claim_workdir(place, resume=True, overwrite=False) / "COMPLETE").exists()
  assert not (checkpoint.claim_workdir(place, resume=False, overwrite=True) / "config.json").exists()


def test_an_export(place):
  def fill(folder_):
    files.write_text(folder_ / "weights", "1 2 3")
    needed = {"architecture": {}, "preprocessing": {"size": 8}, "pretraining": {}, "feature_dimension": 4}
    folder.write_card(folder_, {"name": "mine", **needed})

  path = folder.save_export(place, fill)
  card = folder.read_card(place)
  assert card["name"] == "mine" and list(card["files"]) == ["weights"]
  with pytest.raises(ValueError, match="is not empty: add --overwrite"):
    folder.save_export(place, fill)
  folder.save_export(place, fill, overwrite=True)
  files.write_text(path / "weights", "1 2 4")
  with pytest.raises(checkpoint.Damaged, match="weights is damaged"):
    folder.read_card(place)


def save_export(place, number):
  """An export as Orbax writes it: the names of some files are others each time."""

  def fill(to):
    (to / f"{number}").mkdir()
    for name in ("a", f"{number}/{number}", f"z{number}"):
      files.write_text(to / name, f"{name} {number}")
    needed = {"architecture": {}, "preprocessing": {"size": 8}, "pretraining": {}, "feature_dimension": 4}
    folder.write_card(to, {"number": number, **needed})

  return folder.save_export(place, fill, overwrite=True)


class Killed(BaseException):
  """Ends this process."""


@contextlib.contextmanager
def killed_after(survives):
  """Within it this process ends after so many changes to files; gives a list that is then filled."""
  done, ended = itertools.count(), []

  def counted(what):
    def call(*args, **options):
      if ended or next(done) == survives:
        ended.append(what)  # and whatever would clean up does not
        raise Killed
      return what(*args, **options)

    return call

  with pytest.MonkeyPatch.context() as patch:
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
      patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(shutil, "copyfile", counted(shutil.copyfile))
    with contextlib.suppress(Killed):
      yield ended


def test_an_export_whose_replacement_is_killed_is_replaced_by_the_next(place):
  path, number = files.absolute(place) / "encoder", 1
  save_export(path, number)
  for survives in itertools.count():
    with killed_after(survives) as ended:
      save_export(path, number + 1)
    if not ended:
      break
    if not files.is_remote(path) and path.exists():  # the old one or the new one
      assert folder.read_card(path)["number"] in (number, number + 1)
    number += 2
    save_export(path, number)
    assert folder.read_card(path)["number"] == number
    assert [entry.name for entry in path.parent.iterdir()] == ["encoder"]
  assert survives > 8


@pytest.mark.parametrize("lost", [["card.json"], ["manifest.json"], ["card.json", "manifest.json"]])
def test_an_export_that_has_lost_a_list_of_its_files_is_replaced_and_nothing_else_is(place, lost):
  path = save_export(files.absolute(place) / "encoder", 1)
  for name in lost:
    (path / name).unlink()
  if len(lost) == 2:  # as any folder
    with pytest.raises(ValueError, match="delete it yourself"):
      save_export(path, 2)
    return
  files.write_text(path / "thesis.tex", "")
  with pytest.raises(ValueError, match="encoder/thesis.tex is not part of the export there"):
    save_export(path, 2)
  (path / "thesis.tex").unlink()
  assert folder.read_card(save_export(path, 2))["number"] == 2


@pytest.mark.parametrize("name, content", [
  ("card.json", {}), ("card.json", {"files": ["card.json"]}), ("manifest.json", {"a": ""}),
  ("manifest.json", {"files": {}, "step": 1, "run": "x"}),  # of a checkpoint
])  # fmt: skip
def test_a_folder_that_is_no_export_is_not_replaced(place, name, content):
  path = files.absolute(place)
  path.mkdir(parents=True)
  files.write_text(path / name, json.dumps(content))
  with pytest.raises(ValueError, match="delete it yourself"):
    save_export(path, 1)
  assert files.read_text(path / name) == json.dumps(content)


@pytest.mark.slow
def test_a_whole_run_in_a_bucket(tmp_path, monkeypatch):
  """But for what Orbax writes, whose arrays go past epath."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(checkpoint, "folder", lambda workdir: files.absolute("checkpoints"))
  monkeypatch.setattr(
    checkpoint, "save_trees", lambda path, trees: [files.write_text(path / name / "x", "") for name in trees]
  )
  spec = tiny.npz(tmp_path / "tiny.npz")
  config = tiny.config(**{"data.train": spec, "data.test": f"{spec}:test", "encoder.width": 0.015625, "train_steps": 2})
  with bucket.buckets(tmp_path / "buckets"):
    pretrain.run(config, "gs://mine/run")
  found = {file.name for file in (tmp_path / "buckets/mine/run").iterdir()}
  assert {"COMPLETE", "config.json", "encoder", "metrics.jsonl", "report.html", "scores.json", "views.png"} <= found
  assert {path.name for path in tmp_path.iterdir()} == {"buckets", "checkpoints", "tiny.npz"}


@pytest.mark.parametrize("ending", features.FORMATS)
def test_features(place, ending):
  if ending == ".parquet":
    pytest.importorskip("pyarrow")
  path = files.absolute(place) / f"h{ending}"
  path.parent.mkdir(parents=True, exist_ok=True)
  h = np.arange(12, dtype=np.float32).reshape(3, 4)
  name = np.asarray(["a.png", "é.png", os.fsdecode(b"caf\xe9.png")])
  made = features.Features(h, name, np.int32([0, 1, -1]), np.int64([0, 1, 5]), "files:/x", "runs/y", "sha256:0")
  written = set()
  for _ in range(5):
    features.write(path, made)
    written.add(path.read_bytes())
  assert len(written) == 1  # the same features are the same bytes
  found = features.load(path)
  for key in ("h", "label", "index"):
    np.testing.assert_array_equal(getattr(found, key), getattr(made, key))
    assert getattr(found, key).dtype == getattr(made, key).dtype
  assert found.about == made.about and found.name[:2].tolist() == ["a.png", "é.png"]
  assert found.name[2] == (name[2] if ending != ".parquet" else "caf\\udce9.png")
  odd = dataclasses.replace(made, data=os.fsdecode(b"folder:/\xff"))
  features.write(path, odd)
  assert features.load(path).data == (odd.data if ending != ".safetensors" else "folder:/\\udcff")
