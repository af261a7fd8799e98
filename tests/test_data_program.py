"""The programs that look at a data set."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from images import gradient, save
from PIL import Image

from simclr_jax import __main__ as cli
from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import data as dataset
from simclr_jax.programs import embed, flags


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
  """25 images of two classes, one of them unreadable."""
  for i in range(25):
    save(tmp_path / f"set/{'ab'[i % 2]}/{i:02}.jpg", gradient(40 + i, 60), quality=90)
  (tmp_path / "set/a/02.jpg").write_bytes(b"")
  return tmp_path / "set"


def test_inspect(folder, tmp_path, capsys):
  assert cli.main(["data", "inspect", f"folder:{folder}", "--output", str(tmp_path / "sheet.png")]) == 0
  out = capsys.readouterr().out
  for words in ("25 images", "JPEG 24", "40 x 60 to 64 x 60", "classes        2, 12 to 13", "a/02.jpg: empty file"):
    assert words in out, words
  assert Image.open(tmp_path / "sheet.png").size == (768, 288)
  assert dataset.inspect(f"folder:{folder}", limit=5)["images"] == 25


def test_systems_without_affinity_are_inspected_too(folder, monkeypatch, capsys):
  monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
  assert cli.main(["data", "inspect", f"folder:{folder}"]) == 0
  assert "25 images" in capsys.readouterr().out


def test_prepare_leaves_other_folders_alone_and_says_that_the_disk_is_full(folder, tmp_path, monkeypatch):
  before = sorted(folder.rglob("*"))
  with pytest.raises(ValueError, match="--output=.* holds a and no prepared shards: name an empty or a new folder"):
    dataset.prepare(f"folder:{folder}", str(folder))
  assert sorted(folder.rglob("*")) == before

  def full(path, items):
    raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")

  monkeypatch.setattr(shards, "write_tfrecord", full)
  with pytest.raises(OSError, match="images-00000-of-00003.tfrecord: the disk is full; free space and run") as error:
    dataset.prepare(f"folder:{folder}", str(tmp_path / "full"), images_per_shard=10)
  assert error.value.errno is None and "\n" not in str(error.value)


def test_inspect_says_what_is_not_read_and_how_16_bits_are_scaled(tmp_path, capsys):
  save(tmp_path / "set/1.png", np.full((4, 4), 4000, np.uint16))
  for i in range(40):
    (tmp_path / f"set/{i}.heic").write_bytes(b"")
  result = dataset.inspect(f"folder:{tmp_path}/set")
  assert len(result["skipped"]) == 40 and result["bits"] == 12 and result["images"] == 1
  out = capsys.readouterr().out
  assert "skipped        40 files are not read as images (40 .heic), such as 0.heic" in out
  assert "16-bit images  scaled from 12 bits, 0 to 4,095, to 0 to 255" in out


def test_inspect_and_prepare_take_names_that_are_no_text(tmp_path, capsys):
  for name, body in ((b"a\xff/good\xfe\t.png", None), (b"a\xff/bad\n\xff.png", b""), (b"b/1.png", None)):
    save(tmp_path / "set" / os.fsdecode(name), gradient())
    if body is not None:
      (tmp_path / "set" / os.fsdecode(name)).write_bytes(body)
  assert dataset.inspect(f"folder:{tmp_path}/set")["classes"] == {r"a\xff": 2, "b": 1}
  assert r"a\xff/bad\n\xff.png: empty file" in capsys.readouterr().out
  assert dataset.prepare(f"folder:{tmp_path}/set", str(tmp_path / "shards")) == 2
  assert (tmp_path / "shards/unreadable.txt").read_text().endswith("a\\xff/bad\\n\\xff.png\tempty file\n")
  source = data.open_source(f"tfrecord:{tmp_path}/shards")
  assert source.class_names == (r"a\xff", "b") and source.labels.tolist() == [0, 1]


def test_prepare_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
  def prepare(output):
    return dataset.prepare(f"folder:{folder}", str(tmp_path / output), images_per_shard=10)

  assert prepare("straight") == 24
  write, calls = shards.write_tfrecord, []

  def dies(path, items):
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return write(path, items)

  monkeypatch.setattr(shards, "write_tfrecord", dies)
  with pytest.raises(KeyboardInterrupt):
    prepare("stopped")
  assert prepare("stopped") == 24 and len(calls) == 4  # the first shard is not written again
  for path in (tmp_path / "straight").iterdir():
    if path.name != "prepare.json":
      assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name
  assert (tmp_path / "straight/unreadable.txt").read_text().endswith("a/02.jpg\tempty file\n")
  source = data.open_source(f"tfrecord:{tmp_path}/straight")
  original = data.open_source(f"folder:{folder}")
  assert source.class_names == ("a", "b") and len(source) == 24 and source.labels.tolist() == [0] * 12 + [1] * 12
  np.testing.assert_array_equal(source.read(0), original.read(0))
  assert cli.main(["data", "prepare", f"folder:{folder}", "--output", str(tmp_path / "straight")]) == 1
  assert "other settings" in capsys.readouterr().err


def test_prepare_stops_while_the_images_are_gone(folder, tmp_path, monkeypatch):
  """Such as on a disk that was taken away; what it had not read yet is not left out for good."""
  write, calls = shards.write_tfrecord, []

  def write_once(path, items):
    write(path, items)
    calls.append(path)
    if len(calls) == 1:
      folder.rename(tmp_path / "elsewhere")

  monkeypatch.setattr(shards, "write_tfrecord", write_once)
  with pytest.raises(
    ValueError, match="20.jpg cannot be read now .No such file.*: make it readable and run the same"
  ) as error:
    dataset.prepare(f"folder:{folder}", str(tmp_path / "shards"), images_per_shard=10)
  assert "\n" not in str(error.value) and len(calls) == 1
  (tmp_path / "elsewhere").rename(folder)
  assert dataset.prepare(f"folder:{folder}", str(tmp_path / "shards"), images_per_shard=10) == 24
  (tmp_path / "shards/images-00001-of-00003.tfrecord").unlink()
  spec = f"tfrecord:{tmp_path}/shards"
  with pytest.raises(
    ValueError, match="2 of 3 shards are there, such as images-00000-of-00003.tfrecord; prepare or copy"
  ):
    data.open_source(spec)
  assert len(data.open_source(f"{spec}/*.tfrecord")) == 14


def test_prepare_refuses_a_set_that_has_changed(folder, tmp_path):
  """Its shards would get the names of classes that they were not written with."""
  before = f"folder:{folder}"
  assert dataset.prepare(before, str(tmp_path / "shards")) == 24
  plan = tmp_path / "shards/prepare.json"
  (folder / "a").rename(folder / "z")
  with pytest.raises(ValueError, match="is not what .* was begun with: other classes.*; use another --output"):
    dataset.prepare(before, str(tmp_path / "shards"))
  assert data.open_source(f"tfrecord:{tmp_path}/shards").class_names == ("a", "b")
  (folder / "z").rename(folder / "a")
  plan.write_text(
    json.dumps({key: value for key, value in json.loads(plan.read_text()).items() if key != "fingerprint"})
  )
  assert dataset.prepare(before, str(tmp_path / "shards")) == 24  # of an earlier version


def test_prepare_smaller_keeps_the_brightness_of_16_bit_images(tmp_path):
  for i, side in enumerate((40, 12, 50)):
    save(tmp_path / f"set/{i}.png", np.full((side, side), 3000, np.uint16))
  dataset.prepare(f"files:{tmp_path}/set", str(tmp_path / "small"), short_side=20)
  source = data.open_source(f"tfrecord:{tmp_path}/small")
  assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [187, 187, 187]


def test_prepare_smaller(folder, tmp_path):
  dataset.prepare(f"folder:{folder}", str(tmp_path / "small"), short_side=20)
  source = data.open_source(f"tfrecord:{tmp_path}/small")
  assert {min(source.read(i).shape[:2]) for i in range(24)} == {20}


@pytest.mark.slow
def test_benchmark_measures_every_stage(folder, capsys):
  rates = dataset.benchmark(f"folder:{folder}", size=16, seconds=0.1)
  out = capsys.readouterr().out
  assert rates["read"] > rates["device"] > 0 and "augment.where=device_crop" in out and "v5e" in out


def test_advice_names_the_first_setting_that_suffices():
  text = dataset.advice({"host": 1.0, "device": 100.0, "device_crop": 300.0}, 224)
  assert "23 a CPU: augment.where=device\n" in text and "none: smaller files" in text


def test_folder_in_memory(folder):
  images, extent, numbers = data.in_memory(data.open_source(f"folder:{folder}"), max_bad_fraction=0.1)
  assert images.shape == (25, 64, 64, 3) and extent.max(0).tolist() == [64, 60]
  assert numbers.tolist() == [0, 2, 2, *range(3, 25)]  # 1 is unreadable, and has the label of the image in its place


@pytest.mark.parametrize(
  "argv",
  [
    ["data", "prepare", "SET", "--output=OUT", "--short_side=-5"],
    ["data", "prepare", "SET", "--output=OUT", "--images_per_shard=-5"],
    ["data", "prepare", "SET", "--output=OUT", "--images_per_shard=0"],
    ["data", "benchmark", "SET", "--size=0"],
    ["data", "benchmark", "SET", "--resize=foo"],
    ["data", "inspect", "SET", "--limit=-3", "--output=OUT"],
    ["map", "--features=SET", "--images=0", "--output=OUT"],
    ["embed", "--encoder=x", "--data=SET", "--output=OUT", "--images_per_part=0"],
    ["plan", "--config=smoke", "--topology=v4:2x2x1", "--batch_size=0"],
  ],
)
def test_impossible_counts_are_refused_before_anything_is_written(argv, tmp_path, capsys):
  words = [word.replace("OUT", str(tmp_path / "out")).replace("SET", f"folder:{tmp_path}") for word in argv]
  with pytest.raises(SystemExit):
    cli.main(words)
  error = capsys.readouterr().err.splitlines()[-1]
  assert "expected a whole number of at least" in error or "invalid choice: 'foo'" in error
  assert not list(tmp_path.iterdir())


def test_the_benchmark_takes_every_interpolation():
  assert flags.RESIZES == config_lib.RESIZES


def test_what_is_written_does_not_become_a_part_of_the_set(folder, tmp_path):
  before = sorted(folder.rglob("*"))
  spec = f"folder:{folder}"
  (tmp_path / "link").symlink_to(folder)
  for call in (
    lambda: dataset.prepare(spec, folder / "shards"),
    lambda: dataset.prepare(spec, tmp_path / "link/shards"),
    lambda: dataset.inspect(spec, output=str(folder / "sheet.png")),
    lambda: embed.run(tmp_path, spec, folder / "features.npz"),
  ):
    with pytest.raises(
      ValueError, match="--output=.* is in the data set .*, of which it would become a part: name another"
    ):
      call()
  assert sorted(folder.rglob("*")) == before
