"""Labels of every usual kind, and classes matched by name."""

import io
import json
import tarfile
import types

import numpy as np
import pytest
import tiny
from images import encoded, gradient, numbered, save

from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.data.records import plain_label
from simclr_jax.evaluation import embed
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import splits, transfer

EYE = np.eye(3, dtype=np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
  "values, numbers, names",
  [
    ([0, 1, 2, 1], [0, 1, 2, 1], "0 1 2"),
    ([0, 4], [0, 4], "0 1 2 3 4"),  # small gaps keep their numbers
    ([1, 10, 3], [1, 10, 3], "0 1 2 3 4 5 6 7 8 9 10"),
    ([0, 255], [0, 1], "0 255"),
    ([10**8, 5, 10**8], [1, 0, 1], "5 100000000"),
    (np.array([2**40, 2**63 + 1, 0], np.uint64), [1, 2, 0], "0 1099511627776 9223372036854775809"),
    (np.array([2**31 - 1, 0, 1], np.int32), [2, 0, 1], "0 1 2147483647"),
    (np.array([[2], [0]], np.int8), [2, 0], "0 1 2"),
    ([True, False], [1, 0], "0 1"),
    ([0, -1, 1], [0, -1, 1], "0 1"),
    ([-1, 10**9], [-1, 0], "1000000000"),
    ([-1, -1], [-1, -1], ""),
    ([], [], ""),
    (EYE[[2, 0]], [2, 0], "0 1 2"),
    (np.vstack([EYE[1], 0 * EYE[0]]).astype(bool), [1, -1], "0 1 2"),
    (["dog", "cat", "dog"], [1, 0, 1], "cat dog"),
    (np.array([b"dog", b"", b"a"]), [1, -1, 0], "a dog"),
    (np.array([["dog"], [None]], object), [0, -1], "dog"),
    (["2", "10", "-1", "0"], [2, 10, -1, 0], "0 1 2 3 4 5 6 7 8 9 10"),
    (["1", "01"], [1, 0], "01 1"),
    (["9" * 30, "8" * 30, ""], [1, 0, -1], f"{'8' * 30} {'9' * 30}"),
    (["1", "cat"], [0, 1], "1 cat"),
  ],
)
def test_labels_become_classes(values, numbers, names):
  made, found = data.make_labels(values)
  assert made.dtype == np.int32 and made.tolist() == numbers and " ".join(found) == names


def test_labels_with_class_names():
  names = ("cat", "dog", "empty")
  for values in ([1, -1, 0], ["dog", "", "cat"], [[0, 1, 0], [0, 0, 0], [1, 0, 0]]):
    made, found = data.make_labels(values, names)
    assert made.tolist() == [1, -1, 0] and found == names
  assert data.make_labels(["20", "10"], ("10", "20"))[0].tolist() == [1, 0]


@pytest.mark.parametrize(
  "values, names, message",
  [
    ([0, -7], (), "labels: -7 is among them; expected integers >= 0, or -1"),
    ([0, 3], ("a", "b"), "3 is among them; expected 0 to 1, the numbers of a, b"),
    (["a", "c"], ("a", "b"), "c is not among the 2 classes, which are a, b"),
    (["a"], ("a", "a"), "same name"),
    ([0.5, 1.0], (), r"labels are float64 \[2\]; expected integers, texts or one-hot"),
    ([[1, 1], [0, 1]], (), r"int64 \[2, 2\] and not one-hot"),
    ([[np.nan, 1]], (), "not one-hot"),
    ([[1, 2], [3]], (), r"object \[2\] with list among them"),
    (np.zeros((2, 2, 2), int), (), r"labels are int64 \[2, 2, 2\]"),
    (3, (), r"labels are int64 \[\]"),
    (np.array(["2020-01-01"], "datetime64[D]"), (), "datetime64"),
  ],
)
def test_impossible_labels_are_one_line(values, names, message):
  with pytest.raises(ValueError, match=message) as raised:
    data.make_labels(values, names)
  assert "\n" not in str(raised.value)


def test_a_record_holds_one_label():
  for value, expected in ((3, 3), (b"cat", "cat"), ([], None), ([7], 7), ([0, 1, 0], 1), ([0, 0], None), (3.0, 3),
                          (float("nan"), None), (None, None), (True, 1), (2**40, 2**40)):  # fmt: skip
    assert plain_label(value, "x:1") == expected
  for value in ([2, 3], 0.5, [1, 1]):
    with pytest.raises(ValueError, match="x:1: its label is"):
      plain_label(value, "x:1")


def test_unlabeled_images_are_in_no_class():
  source = data.ArraySource(numbered(6), [0, -1, 1, 1, -1, 0], class_names=("a", "b"))
  assert source.labels.tolist() == [0, -1, 1, 1, -1, 0] and source.read_labeled(1)[1] == -1
  assert data.class_balanced(source.labels, 1.0, 0).tolist() == [0, 2, 3, 5]
  assert data.labeled(source).labels.tolist() == [0, 1, 1, 0] and len(data.labeled(source)) == 4
  none = data.ArraySource(numbered(2), [-1, -1])
  assert none.labels is None and none.num_classes == 0 and data.labeled(none) is none
  none = data.ArraySource(numbered(2), [-1, -1], class_names=("a", "b"))  # a split of a set that has labels elsewhere
  assert none.labels is None and none.num_classes == 0


def test_npz_with_texts(tmp_path):
  np.savez(tmp_path / "a.npz", images=numbered(3), labels=np.array(["dog", "cat", "dog"]))
  np.savez(tmp_path / "b.npz", images=numbered(3), labels=[1, 0, 1], class_names=["cat", "dog"])
  for name in "ab":
    source = data.open_source(f"npz:{tmp_path}/{name}.npz")
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]


def picture(i):
  return encoded(np.full((4, 4, 3), i, np.uint8), "PNG")


def write_tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, body in members:
      member = tarfile.TarInfo(name)
      member.size = len(body)
      tar.addfile(member, io.BytesIO(body))


def test_tars_as_tar_makes_them(tmp_path, caplog):
  """Names with ./ and folders, dots in folders, texts as classes, and what other systems leave."""
  write_tar(tmp_path / "a.tar", [
    ("./x.y/1.png", picture(1)), ("./x.y/1.cls", b"dog\n"), ("./x.y/._1.png", b"junk"), ("./x.y/2.PNG", picture(2)),
    ("./x.y/2.cls", b"cat"), ("./1.png", picture(3)), ("__MACOSX/3.png", b"junk"), ("./4.heic", b"heic"),
    ("./4.cls", b"cat"), ("./1.json", b"{}"),
  ])  # fmt: skip
  for _ in range(2):  # and from the cache
    assert data.open_source(f"webdataset:{tmp_path}/a.tar").skipped == ["./4.heic"]
  assert "a.tar: 1 file is not read as images (1 .heic), such as ./4.heic" in caplog.text
  source = data.open_source(f"webdataset:{tmp_path}/a.tar")
  assert len(source) == 3 and source.class_names == ("cat", "dog")
  assert source.labels.tolist() == [1, 0, -1] and [source.read(i)[0, 0, 0] for i in range(3)] == [1, 2, 3]
  write_tar(tmp_path / "b.tar", [(f"{i}.{end}", body) for i in range(3) for end, body in
                                 (("png", picture(i)), ("cls", b"%04d " % (1000 * i)))])  # fmt: skip
  assert data.open_source(f"webdataset:{tmp_path}/b.tar").class_names == ("0", "1000", "2000")


def test_a_damaged_header_inside_a_tar_is_found(tmp_path):
  write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i)) for i in range(3)])
  body = bytearray((tmp_path / "a.tar").read_bytes())
  body[1024 + 5] ^= 1  # the name in the second header
  (tmp_path / "a.tar").write_bytes(body)
  with pytest.raises(ValueError, match="a.tar is not a plain tar file, or damaged .damaged at byte 1024.; make it"):
    data.open_source(f"webdataset:{tmp_path}/a.tar")


def test_compressed_shards_say_so(tmp_path):
  import gzip

  shards.write_tfrecord(str(tmp_path / "a.tfrecord"), [(picture(0), 0, "0")])
  write_tar(tmp_path / "a.tar", [("1.png", picture(1))])
  for kind, name in (("tfrecord", "a.tfrecord"), ("webdataset", "a.tar")):
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}: is compressed with GZIP.*gunzip"):
      data.open_source(f"{kind}:{tmp_path}/{name}")


def test_labels_in_tfrecords(tmp_path):
  """An id of more than 32 bits, and none; the numbers of the classes are those of the items."""
  rows = [(picture(0), 2**31 - 1, "0"), (picture(1), -1, "1"), (picture(2), 2**40, "2")]
  shards.write_tfrecord(str(tmp_path / "a.tfrecord"), rows)
  for _ in range(2):  # and from the cache
    source = data.open_source(f"tfrecord:{tmp_path}/a.tfrecord")
    assert source.read_labeled(2)[1] == 1 and source.labels.tolist() == [0, -1, 1]
    assert source.class_names == ("2147483647", "1099511627776")


def test_labels_in_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  for name, labels, numbers, names in (
    ("text", ["dog", None, "cat"], [1, -1, 0], ("cat", "dog")),
    ("id", [2**62, None, 7], [1, -1, 0], ("7", str(2**62))),
    ("float", [1.0, None, 0.0], [1, -1, 0], ("0", "1")),
  ):
    table = pyarrow.table({"image": [picture(i) for i in range(3)], "label": labels})
    parquet.write_table(table, tmp_path / f"{name}.parquet")
    source = data.open_source(f"parquet:{tmp_path}/{name}.parquet")
    assert source.labels.tolist() == numbers and source.class_names == names and source.read_labeled(0)[1] == 1
  info = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
  table = pyarrow.table({"image": [picture(i) for i in range(2)], "label": [2, 0]})
  parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "named.parquet")
  assert data.open_source(f"parquet:{tmp_path}/named.parquet").class_names == ("ant", "bee", "cat")


# ---- the classes of a test set ----------------------------------------------------------------------------------------


class AllUnlabeled(data.AbstractSource):
  """A set that names classes, as the test split of ImageNet does, for images without labels."""


def classes(*names, labels=None):
  labels = list(range(len(names))) if labels is None else labels
  return data.ArraySource(numbered(len(labels)), labels, class_names=names)


@pytest.mark.parametrize(
  "train, test, labels",
  [
    (classes("a", "b", "c"), classes("a", "b", "c"), [0, 1, 2]),
    (classes("a", "b", "c"), classes("b", "c"), [1, 2]),  # lacks the first
    (classes("a", "b", "c"), classes("a", "b"), [0, 1]),  # lacks the last
    (classes("a", "b", "c"), classes("c", "a", labels=[0, 1, -1]), [2, 0, -1]),
    (classes("a", "b"), classes("b", "x", labels=[0, 0]), [1, 1]),  # an empty class is nobody's
    (classes("a", "b"), classes("0", "1", labels=[1, 0]), [1, 0]),  # numbers of named classes
    (classes("0", "1"), classes("a", "b", labels=[1, 0]), [1, 0]),
    (classes("1", "10", "2"), classes("0", "1", "2", labels=[1, 2]), [0, 2]),
    (classes("001", "002"), classes("2"), [1]),
    (classes("1", "2", "other"), classes("1", "2"), [0, 1]),
    (classes("5", "900"), classes("900"), [1]),
  ],
)
def test_test_classes_are_matched_by_name(train, test, labels):
  aligned = data.align(train, test)
  assert aligned.labels.tolist() == labels and tuple(aligned.class_names) == tuple(train.class_names)
  assert [aligned.item(i)[1] for i in range(len(aligned))] == labels and aligned.name(0) == test.name(0)
  assert aligned.array_extent == (4, 4) and (aligned.gather(np.array([0])) == 0).all()


@pytest.mark.parametrize(
  "train, test, message",
  [
    (classes("a", "b"), classes("b", "x"), "of classes that data.train does not have: x; only data.train has a:"),
    (classes("a", "b"), classes("a", "b", "x"), "does not have: x; only data.train has no other"),
    (classes("a", "b"), classes("0", "1", "2"), "does not have: 2;"),
    (classes("1", "2", "other"), classes("1", "3"), "does not have: 3; only data.train has 2, other"),
    (classes("a", "b"), data.ArraySource(numbered(2)), "has no classes and data.train 2"),
    (data.ArraySource(numbered(2)), classes("a", "b"), "has 2 classes and data.train none"),
    (classes("a", "a"), classes("a", "b"), "two classes are called a"),
    (classes("a", "b"), AllUnlabeled(2, 2), "none of its images has a label"),
  ],
)
def test_unknown_test_classes_are_refused(train, test, message):
  with pytest.raises(ValueError, match=message) as raised:
    data.align(train, test)
  assert "\n" not in str(raised.value)


def test_folders_of_systems_are_no_classes(tmp_path):
  for name in ("cat/1.png", "cat/@eaDir/2.png", "dog/3.png", "__MACOSX/4.png", "@eaDir/5.png", ".thumbnails/6.png",
               "lost+found/7.png"):  # fmt: skip
    save(tmp_path / name, gradient())
  source = data.open_source(f"folder:{tmp_path}")
  assert source.class_names == ("cat", "dog") and len(source) == 2
  assert len(data.open_source(f"files:{tmp_path}")) == 2


def set_of(folder, **counts):
  for name, count in counts.items():
    for i in range(count):
      save(folder / name / f"{i}.png", np.full((8, 8, 3), 9 * i, np.uint8))
  return f"folder:{folder}"


def test_every_program_matches_classes_by_name(tmp_path):
  train = set_of(tmp_path / "train", ant=1, bee=2, cat=2)
  test, other = set_of(tmp_path / "test", bee=1, cat=1), set_of(tmp_path / "other", bee=1, dog=1)
  config = tiny.config(**{"data.train": train, "data.test": test})
  wrong = config_lib.replace(config, {"data.test": other})
  more = set_of(tmp_path / "more", bee=1, cat=1)
  row = types.SimpleNamespace(train=train, validation=more, test=test, metric="top_1")
  by_transfer = transfer.splits(row, None)
  for labels in (
    splits.open_data(config.data)[1].labels,
    by_transfer[2].targets,
    by_transfer[0].targets[-2:],
  ):
    assert labels.tolist() == [1, 2]
  for refused in (
    lambda: splits.open_data(wrong.data),
    lambda: transfer.splits(types.SimpleNamespace(train=train, validation="", test=other, metric="top_1"), None),
  ):
    with pytest.raises(ValueError, match=f"{other} has images of classes that data.train does not have: dog"):
      refused()


def test_images_without_a_label_are_in_no_score():
  source = data.ArraySource(numbered(5), [0, -1, 1, 1, -1])
  images = embed.EvalSet(source, size=4, crop=1.0, batch_size=3, labeled=True)
  assert images.labels().tolist() == [0, 1, 1] and images.rows().tolist() == [0, 2, 3] and len(images.pixels()) == 3
  assert len(embed.EvalSet(source, size=4, crop=1.0, batch_size=3).rows()) == 5
  source.images, source._labels = source.images[1:2], source.labels[1:2]
  with pytest.raises(ValueError, match="no image in the set of array:0 has a label"):
    embed.EvalSet(source, size=4, crop=1.0, batch_size=3, labeled=True).rows()
