"""Sharded sources, damaged data in every form we know, and the programs that look at a data set."""

import io
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import assert_same, crop_like, encoded, gradient, numbered, png, save, take

from simclr_jax import __main__ as cli
from simclr_jax import augment, data
from simclr_jax.data import shards
from simclr_jax.programs import data as dataset

N = 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(i):
  return encoded(np.full((9, 12, 3), 8 * i, np.uint8), "PNG")


def write_tfrecord(folder):
  for k in range(3):
    items = ((picture(i), i % 4, f"{i}") for i in range(10 * k, 10 * k + 10))
    shards.write_tfrecord(str(folder / f"part-{k}.tfrecord"), items)


def write_array_record(folder):
  import tensorflow as tf
  from array_record.python import array_record_module

  def feature(value):
    if isinstance(value, bytes):
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  for k in range(3):
    writer = array_record_module.ArrayRecordWriter(str(folder / f"part-{k}.array_record"), "group_size:1")
    for i in range(10 * k, 10 * k + 10):
      features = {"image": feature(picture(i)), "label": feature(i % 4)}
      writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    writer.close()


def write_webdataset(folder):
  for k in range(3):
    with tarfile.open(folder / f"part-{k}.tar", "w") as tar:
      for i in range(10 * k, 10 * k + 10):
        for ending, body in (("png", picture(i)), ("cls", str(i % 4).encode()), ("txt", b"a caption")):
          member = tarfile.TarInfo(f"{i:04}.{ending}")
          member.size = len(body)
          tar.addfile(member, io.BytesIO(body))


def write_parquet(folder):
  import pyarrow
  import pyarrow.parquet

  for k in range(3):
    rows = range(10 * k, 10 * k + 10)
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in rows]
    table = pyarrow.table({"image": images, "label": [i % 4 for i in rows]})
    pyarrow.parquet.write_table(table, folder / f"part-{k}.parquet", row_group_size=4)


WRITERS = {
  "tfrecord": write_tfrecord,
  "array_record": write_array_record,
  "webdataset": write_webdataset,
  "parquet": write_parquet,
}


def sharded(kind, tmp_path):
  folder = tmp_path / kind
  folder.mkdir()
  WRITERS[kind](folder)
  return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_sharded_sources(kind, tmp_path):
  """Each image and label once, by number; whole folder or pattern; index from the cache the second time."""
  folder = sharded(kind, tmp_path)
  source = data.open_source(f"{kind}:{folder}")
  assert len(source) == N and source.num_classes == 4 and source.labels.tolist() == [i % 4 for i in range(N)]
  for i in (0, 9, 10, 29):
    image, label = source.read_labelled(i)
    assert image.shape == (9, 12, 3) and (image == 8 * i).all() and label == i % 4 and "part-" in source.name(i)
  batches = take(data.train_stream(source, crop_like, batch_size=10, seed=3), 4)
  again = data.open_source(f"{kind}:{folder}/part-*")
  parts = [data.train_stream(again, crop_like, batch_size=10, seed=3, start_step=1, process_index=h, process_count=2) for h in range(2)]  # fmt: skip
  for batch in batches[1:]:
    rows = [next(part) for part in parts]
    for key in ("index", "label", "seed"):
      np.testing.assert_array_equal(np.concatenate([row[key] for row in rows]), batch[key])
    np.testing.assert_array_equal(np.concatenate([row["views"]["noise"] for row in rows]), batch["views"]["noise"])
  assert sorted(np.concatenate([b["index"] for b in batches[:3]])) == list(range(N))
  with pytest.raises(ValueError, match=f"{kind}:{tmp_path}/none: no shards there"):
    data.open_source(f"{kind}:{tmp_path}/none")


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "parquet"])
def test_a_shard_that_disappears_during_a_run(kind, tmp_path, caplog):
  """Its images are named, counted and replaced up to the share; beyond it the run stops with one line."""
  folder = sharded(kind, tmp_path)
  source = data.open_source(f"{kind}:{folder}")
  assert source.labels is not None
  stream = data.train_stream(source, crop_like, batch_size=10, seed=0, max_bad_fraction=0.5, bad_file=str(tmp_path / "bad.txt"))  # fmt: skip
  next(stream)
  (folder / f"part-1.{kind if kind != 'webdataset' else 'tar'}").unlink()
  batches = take(stream, 30)
  assert all(len(batch["index"]) == 10 for batch in batches)
  if kind != "parquet":  # which has kept the groups of its last images
    assert not set(range(10, 20)) & set(np.concatenate([b["index"] for b in batches[5:]]).tolist())
  assert 1 <= len(stream.bad) <= 10 and all("part-1" in name for name in stream.bad)
  assert len((tmp_path / "bad.txt").read_text().splitlines()) == len(stream.bad)
  with pytest.raises(ValueError, match="more than the 1 allowed by max_bad_fraction=0.001; .*part-1") as raised:
    take(data.train_stream(source, crop_like, batch_size=10, seed=0), 9)
  assert "\n" not in str(raised.value)


def test_damaged_shards_are_refused_at_the_start(tmp_path):
  for kind, name in (("tfrecord", "part-1.tfrecord"), ("webdataset", "part-1.tar"), ("parquet", "part-1.parquet")):
    folder = sharded(kind, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(b"x" * 700 + whole[700:-700])
    with pytest.raises(ValueError, match=name) as raised:
      len(data.open_source(f"{kind}:{folder}"))
    assert "\n" not in str(raised.value)


def test_remote_shards_go_through_tensorflow(tmp_path, monkeypatch):
  """There is no bucket here: every path is taken for remote, so the same files are read the way gs:// is."""
  folder = sharded("tfrecord", tmp_path)
  local = data.open_source(f"tfrecord:{folder}")
  expected = take(data.train_stream(local, crop_like, batch_size=10, seed=3), 3)
  monkeypatch.setattr(data, "is_remote", lambda path: True)
  remote = data.open_source(f"tfrecord:{folder}")
  assert_same(take(data.train_stream(remote, crop_like, batch_size=10, seed=3), 3), expected)


# ---- bad data --------------------------------------------------------------------------------------------------


def jpeg(**options):
  return encoded(gradient(64, 96), "JPEG", **{"quality": 90, **options})


def frames(kind):
  moving = [Image.fromarray(np.roll(gradient(), 5 * i, 1)) for i in range(3)]
  return encoded(moving[0], kind, save_all=True, append_images=moving[1:])


def lying_jpeg():
  body = bytearray(jpeg())
  frame = body.index(b"\xff\xc0")
  body[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
  return bytes(body)


def flipped_byte():
  body = bytearray(jpeg())
  body[len(body) // 2] ^= 0x08
  return bytes(body)


def rotated():
  exif = Image.Exif()
  exif[0x0112] = 6
  return jpeg(exif=exif)


grey = gradient()[..., 0]
rgba = np.dstack([gradient(), grey])
# name: (bytes, shape, or the words of the reason for refusing it)
CASES = {
  "plain jpeg": (jpeg, (64, 96)),
  "progressive jpeg": (lambda: jpeg(progressive=True), (64, 96)),
  "grey jpeg": (lambda: encoded(grey, "JPEG"), (24, 40)),
  "cmyk jpeg": (lambda: encoded(Image.fromarray(np.dstack([rgba]), "CMYK"), "JPEG"), (24, 40)),
  "rotated by exif": (rotated, (96, 64)),
  "trailing bytes": (lambda: jpeg() + b"junk" * 9, (64, 96)),
  "flipped byte": (flipped_byte, (64, 96)),  # libjpeg decodes it: nothing in the file says otherwise
  "png": (lambda: encoded(gradient(), "PNG"), (24, 40)),
  "bmp": (lambda: encoded(gradient(), "BMP"), (24, 40)),
  "gif": (lambda: encoded(gradient(), "GIF"), (24, 40)),
  "webp": (lambda: encoded(gradient(), "WEBP"), (24, 40)),
  "palette png": (lambda: encoded(Image.fromarray(gradient()).quantize(64), "PNG"), (24, 40)),
  "16-bit grey png": (lambda: encoded(grey.astype(np.uint16) * 257, "PNG"), (24, 40)),
  "rgba png": (lambda: encoded(rgba, "PNG"), (24, 40)),
  "one pixel": (lambda: encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), (1, 1)),
  "empty": (lambda: b"", "empty"),
  "garbage": (lambda: bytes(range(256)) * 20, "not a jpeg"),
  "html": (lambda: b"<html><body>404</body></html>", "not a jpeg"),
  "tiff": (lambda: encoded(gradient(), "TIFF"), "not a jpeg"),
  "half a jpeg": (lambda: jpeg()[: len(jpeg()) // 2], "broken jpeg"),
  "jpeg without its end": (lambda: jpeg()[:-2], "broken jpeg"),
  "jpeg header alone": (lambda: jpeg()[:4], "broken jpeg"),
  "half a png": (lambda: encoded(gradient(200, 200), "PNG")[:400], "broken png"),
  "animated gif": (lambda: frames("GIF"), "animated gif"),
  "animated webp": (lambda: frames("WEBP"), "animated webp"),
  "png bomb": (lambda: png(20000, 20000, 8, 2, zlib.compress(b"\0" * 10**6)), "above the limit"),
  "jpeg header that lies": (lying_jpeg, "above the limit"),
}


def test_every_kind_of_file_under_a_wrong_name(tmp_path):
  """All 27 in one folder, all named .jpg: an epoch has its length, and exactly the bad ones are counted and named."""
  assert len(CASES) == 27
  files = {name: make() for name, (make, _) in CASES.items()}
  for name, body in files.items():
    (tmp_path / f"{name}.jpg").write_bytes(body)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=8)  # noqa: E731
  stream = data.train_stream(source, transform, batch_size=27, seed=0, max_bad_fraction=1.0)
  batch = next(stream)
  assert batch["views"].shape == (27, 2, 8, 8, 3)
  bad = {name.rpartition("/")[2].removesuffix(".jpg"): reason for name, reason in stream.bad.items()}
  for name, (_, expected) in CASES.items():
    if isinstance(expected, str):
      assert expected in bad.pop(name), name
    else:
      assert data.decode(files[name]).shape == (*expected, 3), name
  assert not bad
  whole = next(data.train_stream(source, None, batch_size=27, seed=0, max_bad_fraction=1.0, canvas=64))
  assert whole["views"]["image"].shape == (27, 64, 64, 3)
  for image, (height, width), i in zip(*whole["views"].values(), whole["index"], strict=True):
    expected = data.decode(files[source.name(i).rpartition("/")[2].removesuffix(".jpg")])
    if max(expected.shape) <= 64:
      np.testing.assert_array_equal(image[:height, :width], expected)
    else:
      assert (height, width) == tuple(-(-side // 2) for side in expected.shape[:2])
    assert not image[height:].any() and not image[:, width:].any()


def test_good_images_of_a_call_with_a_bad_one_are_what_they_are_without(tmp_path):
  """A call of TensorFlow fails as a whole; what its good images become must not show it."""
  for i in range(20):
    save(tmp_path / f"{i:02}.jpg", np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8), quality=90)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=16)  # noqa: E731
  good = next(data.train_stream(source, transform, batch_size=20, seed=0))
  whole = (tmp_path / "07.jpg").read_bytes()
  (tmp_path / "07.jpg").write_bytes(whole[:-40])
  stream = data.train_stream(source, transform, batch_size=20, seed=0, max_bad_fraction=0.1)
  mixed = next(stream)
  same = good["index"] != 7
  assert len(stream.bad) == 1 and same.sum() == 19
  np.testing.assert_array_equal(mixed["views"][same], good["views"][same])


WAYS = (
  lambda b: b"",
  lambda b: b[: len(b) // 2],
  lambda b: b[:-2],
  lambda b: b[:20],
  lambda b: b"<html>" + b,
  lambda b: bytes(len(b)),
  lambda b: frames("GIF"),
  lambda b: encoded(gradient(), "TIFF"),
  lambda b: png(20000, 20000, 8, 2, b"\0"),
  lambda b: encoded(gradient(200, 200), "PNG")[:300],
)


@pytest.mark.slow
def test_ten_thousand_files_of_which_three_in_a_hundred_are_damaged(tmp_path):
  """One epoch: as many examples as files, exactly 300 counted and named, in the log file too."""
  rng = np.random.default_rng(0)
  good = [encoded(rng.integers(0, 256, (32, 40, 3), np.uint8), "JPEG", quality=90) for _ in range(20)]
  damaged = {}
  for k, i in enumerate(rng.permutation(10_000)[:300]):
    damaged[int(i)] = k % 10
  for i in range(10_000):
    body = good[i % 20]
    (tmp_path / f"{i:05}.jpg").write_bytes(WAYS[damaged[i]](body) if i in damaged else body)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=16)  # noqa: E731
  bad_file = tmp_path / "unreadable.txt"
  stream = data.train_stream(
    source, transform, batch_size=100, seed=0, max_bad_fraction=0.03, bad_file=str(bad_file)
  )  # fmt: skip
  rows = sum(len(batch["index"]) for batch in take(stream, 100))
  named = {int(name[-9:-4]) for name in stream.bad}
  assert rows == 10_000 and len(stream.bad) == 300 and named == set(damaged)
  assert len(bad_file.read_text().splitlines()) == 300
  with pytest.raises(ValueError, match="200 allowed"):
    take(data.train_stream(source, transform, batch_size=100, seed=0, max_bad_fraction=0.02), 100)


@pytest.mark.slow
def test_resume_at_step_1000(tmp_path):
  """A fresh process at step 1,000 has its first batch, the same bytes, within 10 seconds; hosts 4 against 1 too."""
  rng = np.random.default_rng(0)
  for i in range(4096):
    save(tmp_path / f"{i:04}.jpg", rng.integers(0, 256, (32, 40, 3), np.uint8), quality=90)
  code = (
    "import sys, time, hashlib; start = time.time()\n"
    "from simclr_jax import augment; from simclr_jax.runtime import data\n"
    "s = data.FolderSource(sys.argv[1]); step, hosts = int(sys.argv[2]), int(sys.argv[3])\n"
    "t = lambda image, seed: augment.two_crops(image, seed, size=32)\n"
    "for h in range(hosts):\n"
    "  stream = data.train_stream(s, t, batch_size=64, seed=5, start_step=step, process_index=h, process_count=hosts)\n"
    "  for _ in range(int(sys.argv[4])): batch = next(stream)\n"
    "  for row, seed in zip(batch['views'], batch['seed']):\n"
    "    print(hashlib.sha256(row.tobytes() + seed.tobytes()).hexdigest())\n"
    "print(time.time() - start)"
  )

  def child(*arguments):
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, seconds = done.stdout.split()
    return rows, float(seconds)

  straight, _ = child("900", "1", "101")  # a run that gets to step 1,000 from step 900
  resumed, seconds = child("1000", "1", "1")
  split, _ = child("1000", "4", "1")
  assert len(straight) == 64 and resumed == straight and split == straight
  assert seconds < 10, seconds


# ---- programs --------------------------------------------------------------------------------------------------


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
  assert "18 a CPU: augment.where=device\n" in text and "none: smaller files" in text


def test_arrays_as_canvases():
  source = data.ArraySource(numbered(10))
  batch = next(data.train_stream(source, None, batch_size=4, seed=0))
  assert batch["views"]["image"].shape == (4, 4, 4, 3) and batch["views"]["extent"].tolist() == [[4, 4]] * 4
  np.testing.assert_array_equal(batch["views"]["image"][:, 0, 0, 0], batch["index"])
  images, extent = data.in_memory(source)
  assert images.shape == (10, 4, 4, 3) and extent.shape == (10, 2)
  with pytest.raises(ValueError, match="augment.where=device_crop"):
    data.in_memory(source, max_bytes=400)


def test_folder_in_memory(folder):
  images, extent = data.in_memory(data.open_source(f"folder:{folder}"), max_bad_fraction=0.1)
  assert images.shape == (25, 64, 64, 3) and extent.max(0).tolist() == [64, 60]
