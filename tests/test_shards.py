"""Sharded sources."""

import io
import shutil
import tarfile
import threading
import time

import bucket
import numpy as np
import pytest
from images import encoded
from test_stream import crop_like, take

from simclr_jax import data
from simclr_jax.data import records, shards

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
    image, label = source.read_labeled(i)
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
  assert source.fingerprint() == again.fingerprint() and source.skipped == []
  with pytest.raises(ValueError, match=f"{kind}:{tmp_path}/none: no shards there"):
    data.open_source(f"{kind}:{tmp_path}/none")


def test_a_mask_is_no_image_of_its_sample(tmp_path):
  def write(name, endings):
    with tarfile.open(tmp_path / name, "w") as tar:
      for i in range(3):
        for ending in endings:
          body = str(i).encode() if ending == "cls" else picture(i if "." not in ending else 9)
          member = tarfile.TarInfo(f"{i:04}.{ending}")
          member.size = len(body)
          tar.addfile(member, io.BytesIO(body))
    return f"webdataset:{tmp_path / name}"

  for name, endings in (("a.tar", ("seg.png", "png", "cls")), ("b.tar", ("png", "seg.png", "cls"))):
    source = data.open_source(write(name, endings))
    assert len(source) == 3 and [source.read_labeled(i)[1] for i in range(3)] == [0, 1, 2]
    np.testing.assert_array_equal(source.read(2), data.decode(picture(2)))
    assert list(source.skipped) == [f"{i:04}.seg.png" for i in range(3)]
  assert len(data.open_source(write("c.tar", ("left.png", "cls")))) == 3
  for endings in (("png", "jpg"), ("left.png", "right.png")):
    with pytest.raises(ValueError, match="has several images of one sample, 0000.*: make shards with one of them"):
      data.open_source(write(f"{endings[0]}.tar", endings))


def test_links_in_a_tar_are_named(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    member = tarfile.TarInfo("0.png")
    member.size = len(picture(0))
    tar.addfile(member, io.BytesIO(picture(0)))
    for name, kind in (("1.png", tarfile.LNKTYPE), ("2.png", tarfile.SYMTYPE)):
      link = tarfile.TarInfo(name)
      link.type, link.linkname = kind, "0.png"
      tar.addfile(link)
  source = data.open_source(f"webdataset:{tmp_path}/a.tar")
  assert len(source) == 1 and source.skipped == ["1.png", "2.png"]


def test_what_is_known_of_shards_of_one_kind_is_not_taken_for_another(tmp_path):
  folder = sharded("parquet", tmp_path)
  assert len(data.open_source(f"parquet:{folder}/part-0.parquet")) == 10
  with pytest.raises(ValueError, match="part-0.parquet") as error:
    data.open_source(f"tfrecord:{folder}/part-0.parquet")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "parquet"])
def test_a_shard_that_disappears_during_a_run(kind, tmp_path, caplog):
  """Its images are named, counted and replaced up to the allowed fraction; beyond it the run stops with one line."""
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


@pytest.mark.parametrize("kind", ["tfrecord", "array_record", "parquet"])
def test_labels_that_cannot_be_read_are_an_error_and_not_kept(kind, tmp_path, monkeypatch):
  folder = sharded(kind, tmp_path)
  source, hidden = data.open_source(f"{kind}:{folder}"), folder / f"part-1.{kind}"
  hidden.rename(tmp_path / "hidden")
  with pytest.raises(ValueError, match=f"{kind}:{folder}: .*part-1.*; try again") as raised:
    source.labels  # noqa: B018
  assert "\n" not in str(raised.value)
  (tmp_path / "hidden").rename(hidden)
  assert data.open_source(f"{kind}:{folder}").labels.tolist() == [i % 4 for i in range(N)]


def test_a_scan_that_cannot_read_is_an_error_and_not_kept(tmp_path, monkeypatch):
  for kind in ("tfrecord", "webdataset"):
    folder = sharded(kind, tmp_path)

    class Failing(io.FileIO):
      def read(self, *size):
        if self.tell() > 100:
          raise OSError(5, "Input/output error")
        return super().read(*size)

    with monkeypatch.context() as patch:
      for module in (records, shards):
        patch.setattr(module, "open_shard", lambda path, failing=Failing: failing(path))
      with pytest.raises(ValueError, match="part-0.* cannot be read .*Input/output error.*; try again") as raised:
        data.open_source(f"{kind}:{folder}")
      assert "\n" not in str(raised.value)
    assert data.open_source(f"{kind}:{folder}").labels.tolist() == [i % 4 for i in range(N)]


def test_damaged_shards_are_refused_at_the_start(tmp_path):
  for kind, name in (("tfrecord", "part-1.tfrecord"), ("webdataset", "part-1.tar"), ("parquet", "part-1.parquet")):
    folder = sharded(kind, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(b"x" * 700 + whole[700:-700])
    with pytest.raises(ValueError, match=name) as raised:
      len(data.open_source(f"{kind}:{folder}"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset"])
def test_empty_shards_and_what_macos_leaves_beside_others(kind, tmp_path):
  folder = sharded(kind, tmp_path)
  ending = "tar" if kind == "webdataset" else kind
  (folder / f"part-a.{ending}").write_bytes(b"")
  (folder / f"._part-0.{ending}").write_bytes(b"\0\5\x16\7 not a shard")
  for spec in (f"{kind}:{folder}", f"{kind}:{folder}/*part-*.{ending}"):
    assert data.open_source(spec).labels.tolist() == [i % 4 for i in range(N)]


@pytest.mark.parametrize("content", ["", '{"0": "cat", "1": "dog"}', "[0, 1]", '"cat"'])
def test_names_of_classes_are_a_list_of_texts(content, tmp_path):
  folder = sharded("tfrecord", tmp_path)
  (folder / "classes.json").write_text(content)
  with pytest.raises(
    ValueError, match="classes.json: expected a list of the names of the classes in JSON; correct it"
  ) as raised:
    len(data.open_source(f"tfrecord:{folder}").class_names)
  assert "\n" not in str(raised.value)


class Slow:
  """Requests to the fake bucket that take 20 ms each; after `left` of them the connection is gone."""

  def __init__(self, patch):
    self.count, self.left, self.now, self.most, self._lock = 0, 10**9, 0, 0, threading.Lock()
    for name in ("info", "read_part"):
      patch.setattr(bucket.Buckets, name, self._slow(getattr(bucket.Buckets, name)))

  def _slow(self, what):
    def call(*args, **options):
      with self._lock:
        self.count, self.now, self.most = self.count + 1, self.now + 1, max(self.most, self.now + 1)
      try:
        if self.count > self.left:
          raise OSError("the connection is gone")
        time.sleep(0.02)
        return what(*args, **options)
      finally:
        with self._lock:
          self.now -= 1

    return call


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset"])
def test_many_shards_in_a_bucket_are_scanned_together(kind, tmp_path, monkeypatch):
  """A scan and a reading of labels that fail half way go on there."""
  monkeypatch.setattr(records, "THREADS", 8)
  place, images = tmp_path / "buckets/mine/set", [encoded(np.full((8, 8, 3), i, np.uint8), "PNG") for i in range(50)]
  place.mkdir(parents=True)
  for k in range(64):
    if kind == "tfrecord":
      shards.write_tfrecord(str(place / f"{k:03}.tfrecord"), [(image, i % 4, f"{i}") for i, image in enumerate(images)])
      continue
    with tarfile.open(place / f"{k:03}.tar", "w") as tar:
      for i, image in enumerate(images):
        for ending, content in (("png", image), ("cls", b"%d" % (i % 4))):
          member = tarfile.TarInfo(f"{i:03}.{ending}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
  with bucket.buckets(tmp_path / "buckets"):
    slow = Slow(monkeypatch)
    source = data.open_source(f"{kind}:gs://mine/set")
    labels = source.labels
    needed, slow.count = slow.count, 0
    assert len(source) == 3200 and labels.tolist() == [i % 4 for i in range(50)] * 64
    assert source.item(3199) == (images[49], 1)
    assert needed < 7 * 64 and slow.most >= 8  # a few a shard, and not one a record
    shutil.rmtree(tmp_path / "cache")
    tries, slow.left = 0, 64 + 100  # the versions of the shards, and then a part of what is needed
    while True:
      tries, slow.count = tries + 1, 0
      try:
        again = data.open_source(f"{kind}:gs://mine/set")
        assert again.labels.tolist() == labels.tolist()
        break
      except ValueError as error:
        assert "the connection is gone" in str(error) and tries < 9
    slow.left = 10**9
    assert tries > 1 and again.fingerprint() == source.fingerprint()
    assert len(list((tmp_path / "cache/simclr_jax").iterdir())) == 1


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset"])
def test_shards_in_a_bucket(kind, tmp_path):
  """The same images as from a disk; and none of an object that was written anew since, whatever its size and time."""
  folder = sharded(kind, tmp_path)
  local = data.open_source(f"{kind}:{folder}")
  shutil.copytree(folder, tmp_path / "buckets/mine/set")
  with bucket.buckets(tmp_path / "buckets"):
    remote = data.open_source(f"{kind}:gs://mine/set")
    assert [remote.item(i) for i in range(len(remote))] == [local.item(i) for i in range(N)]
    first, second = sorted((tmp_path / "buckets/mine/set").glob("part-*"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(data.BadImage, match="has been written anew since it was opened"):
      remote.item(0)
    remote.item(len(remote) - 1)
    for other in ("folder", "files", "parquet", "array_record"):
      with pytest.raises(ValueError, match=f"{other}: can only be read from this machine; write a copy"):
        data.open_source(f"{other}:gs://mine/set")
