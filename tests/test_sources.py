"""Data sets by name: arrays, folders, and what they say when something is missing."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from images import gradient, numbered, save

from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.data.sets import textures
from simclr_jax.programs import scores
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


def test_fashion():
  train, test = data.open_source("fashion:train"), data.open_source("fashion:test")
  assert (len(train), len(test), train.num_classes) == (10000, 2000, 10)
  assert train.labels.dtype == np.int32 and train.labels[:5].tolist() == [9, 0, 0, 3, 0]
  assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]
  image = train.read(0)
  assert image.shape == (28, 28, 3) and image.dtype == np.uint8 and (image[..., :1] == image).all()
  assert train.class_names[9] == "ankle boot" and train.name(7) == "fashion:train:7"
  # The mean and deviation of all 60,000 are 0.2860 and 0.3530.
  assert abs(train.images.mean() / 255 - 0.286) < 0.003 and abs(train.images.std() / 255 - 0.353) < 0.003


def test_textures_by_name():
  train, test = data.open_source("textures:train"), data.open_source("textures:test")
  assert (len(train), len(test), train.read(0).shape) == (5000, 2000, (32, 32, 3))
  assert data.open_source("textures:train").images is train.images  # drawn once
  np.testing.assert_array_equal(train.read(12), textures.image(0, 12)[0])
  np.testing.assert_array_equal(test.read(12), textures.image(1, 12)[0])


def test_array_source():
  gray = data.ArraySource(numbered(3))
  assert gray.labels is None and gray.num_classes == 0 and gray.read(2).shape == (4, 4, 3) and (gray.read(2) == 2).all()
  color = data.ArraySource(np.stack([gradient()] * 2), np.array([[0], [4]]))
  assert color.num_classes == 5 and color.read_labeled(1)[1] == 4
  for images, labels, message in [
    (np.zeros((3, 4, 4), np.float32), None, "float32.*give uint8"),
    (np.zeros((3, 4, 4, 4), np.uint8), None, r"\[3, 4, 4, 4\].*give uint8"),
    (numbered(3)[:0], None, "no images"),
    (numbered(3), np.zeros(2, int), "for 3 images"),
    (numbered(3), np.zeros(3), "float64.*integers"),
    (numbered(3), np.array([0, -2, 2]), "-2 is among them.*integers >= 0"),
  ]:
    with pytest.raises(ValueError, match=message):
      data.ArraySource(images, labels)


def test_npz(tmp_path):
  file = str(tmp_path / "set.npz")
  np.savez(file, x=numbered(5), y=np.arange(5), train_images=numbered(3), x_val=numbered(4), y_val=np.arange(4))
  assert len(data.open_source(f"npz:{file}")) == 5
  assert data.open_source(f"npz:{file}:train").labels is None
  assert data.open_source(f"npz:{file}:val").labels.tolist() == [0, 1, 2, 3]
  with pytest.raises(ValueError, match="holds the arrays x, y, train_images.*expected images under test_images"):
    data.open_source(f"npz:{file}:test")
  with pytest.raises(ValueError, match="there is no file .*absent.npz"):
    data.open_source(f"npz:{tmp_path}/absent.npz:train")
  np.savez(tmp_path / "bytes.npz", x=numbered(2), y=[1, 0], class_names=np.asarray([b"cat", "café".encode()]))
  assert data.open_source(f"npz:{tmp_path}/bytes.npz").class_names == ("cat", "café")
  (tmp_path / "text.npz").write_text("not a zip file")
  np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], object))
  for name in ("text", "pickled"):
    with pytest.raises(ValueError, match="cannot read .*numpy.savez") as raised:
      data.open_source(f"npz:{tmp_path}/{name}.npz")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", ["", "fashion", "fashion:valid", "textures:", "folder:", "mnist:train", "tfds", "x"])
def test_unknown_specs(spec):
  with pytest.raises(ValueError, match="use ") as raised:
    data.open_source(spec)
  assert repr(spec) in str(raised.value) and "\n" not in str(raised.value)


def test_folder_with_labels(tmp_path):
  for name in ("cat/2.png", "cat/1.jpg", "cat/deep/er/3.bmp", "ant/9.WEBP", ".hidden/1.png", "cat/.4.png"):
    save(tmp_path / name, gradient())
  (tmp_path / "empty class").mkdir()
  (tmp_path / "notes.txt").write_text("not an image")
  (tmp_path / "cat/loop").symlink_to(tmp_path / "cat")
  source = data.open_source(f"folder:{tmp_path}")
  assert source.class_names == ("ant", "cat", "empty class") and source.labels.tolist() == [0, 1, 1, 1]
  names = [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))]
  assert names == ["ant/9.WEBP", "cat/1.jpg", "cat/2.png", "cat/deep/er/3.bmp"]
  np.testing.assert_array_equal(source.read(2), gradient())


def test_links_between_folders_put_no_image_into_two_classes(tmp_path):
  for name in ("a/1.png", "b/deep/2.png", "b/3.png", ".kept/4.png"):
    save(tmp_path / name, gradient())
  save(tmp_path.parent / f"{tmp_path.name}-outside" / "5.png", gradient())
  for name, target in (
    ("a/up", ".."), ("a/b", "../b"), ("a/deep", "../b/deep"), ("b/deep/above", "../.."), ("b/a", "../a"),
    ("a/kept", "../.kept"), ("a/outside", f"../../{tmp_path.name}-outside"), ("b/outside", f"../../{tmp_path.name}-outside"),
    ("b/self", "self"), ("b/self.png", "self.png"),
  ):  # fmt: skip
    (tmp_path / name).symlink_to(target)
  source = data.open_source(f"folder:{tmp_path}")
  names = [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))]
  assert names == ["a/1.png", "a/kept/4.png", "a/outside/5.png", "b/3.png", "b/deep/2.png"]
  assert source.labels.tolist() == [0, 0, 0, 1, 1] and source.skipped == ["b/self", "b/self.png"]
  everything = data.open_source(f"files:{tmp_path}")
  assert len({os.path.realpath(everything.name(i)) for i in range(len(everything))}) == len(everything) == 5


def test_a_part_of_a_set_that_was_moved_is_the_same(tmp_path, monkeypatch):
  """As the whole set is; of images in memory, npz:FILE, the name of the file is a part of their names."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for i in range(6):
    save(tmp_path / f"one/images/{i % 2}/{i}.png", np.full((4, 4, 3), i, np.uint8))
  for k in range(2):
    rows = [((tmp_path / f"one/images/{i % 2}/{i}.png").read_bytes(), i % 2, f"{i}") for i in range(k, 6, 2)]
    (tmp_path / "one/records").mkdir(exist_ok=True)
    shards.write_tfrecord(str(tmp_path / f"one/records/{k}.tfrecord"), rows)

  def prints(root):
    found = []
    for spec in (f"folder:{root}/images", f"files:{root}/images", f"tfrecord:{root}/records"):
      source = data.open_source(spec)
      found += [
        source.fingerprint(),
        data.Subset(source, 3, 0).fingerprint(),
        data.Selection(source, [1, 4]).fingerprint(),
      ]
      found += [data.Selection(source, [1, 5]).fingerprint(), data.Joined([source, source]).fingerprint()]
    return found

  before = prints(tmp_path / "one")
  shutil.copytree(tmp_path / "one", tmp_path / "other/place")
  assert prints(tmp_path / "other/place") == before
  assert len({json.dumps(one) for one in before}) == len(before)


def test_folder_without_labels(tmp_path):
  for i in (3, 1, 2):
    save(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8))
  (tmp_path / "nothing").mkdir()
  source = data.FolderSource(str(tmp_path))
  assert source.labels is None and source.num_classes == 0
  assert [source.read(i)[0, 0, 0] for i in range(3)] == [1, 2, 3]
  assert source.read_labeled(0)[1] == -1


def test_folder_errors(tmp_path):
  with pytest.raises(ValueError, match="no folder .*absent; give the path"):
    data.open_source(f"folder:{tmp_path}/absent")
  (tmp_path / "a").mkdir()
  (tmp_path / "a/x.heic").write_bytes(b"")
  with pytest.raises(ValueError, match="no image in .*expected files ending in .jpg"):
    data.open_source(f"folder:{tmp_path}")
  save(tmp_path / "a/x.png", gradient())
  save(tmp_path / "y.png", gradient())
  with pytest.raises(ValueError, match=r"1 images \(such as y.png\) next to class folders"):
    data.open_source(f"folder:{tmp_path}")


def test_what_is_no_image_is_counted_and_named(tmp_path, caplog):
  for i in range(2):
    save(tmp_path / f"a/{i}.png", gradient())
  save(tmp_path / "a/3.TIF", gradient())
  (tmp_path / "b").mkdir()
  (tmp_path / "a/0.png").rename(tmp_path / "b/image")  # found by its first bytes
  for name in ("a/1.heic", "b/2.HEIC", "b/notes", "a/x.txt", "readme.md"):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" if name.lower().endswith("c") else b"some text")
  source = data.open_source(f"folder:{tmp_path}")
  assert [os.path.relpath(source.name(i), tmp_path) for i in range(3)] == ["a/1.png", "a/3.TIF", "b/image"]
  assert sorted(source.skipped) == ["a/1.heic", "a/x.txt", "b/2.HEIC", "b/notes", "readme.md"]
  said = f"folder:{tmp_path}: 5 files are not read as images (2 .heic, "
  assert said in caplog.text and "such as a/1.heic" in caplog.text
  data.open_source(f"folder:{tmp_path}")
  assert caplog.text.count(said) == 1  # once
  for name in ("a/1.png", "a/3.TIF", "b/image"):
    (tmp_path / name).unlink()
  with pytest.raises(ValueError, match="no image in .*; 5 files are not read as images"):
    data.open_source(f"files:{tmp_path}")


def test_names_that_are_no_text(tmp_path, caplog):
  """Bytes that are not UTF-8, tabs and line breaks: read as they are, written in one line."""
  names = [b"a\xff.png", b"b\tc.png", b"d\ne.png", "f\u2028\u00e9 g.png".encode(), b"h\\xff.png", b"bad\xfe\n.png"]
  for name in names:
    folder = tmp_path / os.fsdecode(b"class\xff")
    save(folder / os.fsdecode(name), gradient())
  (folder / os.fsdecode(b"skipped\xff.txt")).touch()
  with open(os.path.join(os.fsencode(folder), names[-1]), "wb"):
    pass
  source = data.open_source(f"folder:{tmp_path}")
  found = [os.path.basename(source.name(i)) for i in range(len(source))]
  assert found == [r"a\xff.png", r"b\tc.png", r"bad\xfe\n.png", r"d\ne.png", "f\\u2028\u00e9 g.png", r"h\\xff.png"]
  assert source.class_names == (r"class\xff",) and r"skipped\xff.txt" in caplog.text
  stream = data.train_stream(source, None, batch_size=6, seed=0, max_bad_fraction=1.0, bad_file=tmp_path / "bad.txt")
  next(stream)
  assert (tmp_path / "bad.txt").read_text() == f"{tmp_path}/class\\xff/bad\\xfe\\n.png\tempty file\n"


def test_a_file_too_large_to_be_an_image(tmp_path):
  save(tmp_path / "0.png", gradient())
  with open(tmp_path / "1.png", "wb") as file:
    file.truncate(200 << 30)  # sparse
  with pytest.raises(data.BadImage, match="214,748,364,800 bytes, above the limit of 1,073,741,824 for an image"):
    data.open_source(f"folder:{tmp_path}").read(1)


def test_the_bits_of_a_set(tmp_path, caplog):
  """Images of one set are scaled alike, by the largest value of a sample; parts of a set as the set."""
  for i, top in enumerate((100, 4095, 900)):
    save(tmp_path / f"{i}.png", np.full((4, 4), top, np.uint16))
  save(tmp_path / "3.png", gradient())
  source = data.open_source(f"folder:{tmp_path}")
  assert source.bits == 12 and caplog.text.count("scaled as such") == 1
  assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [6, 255, 56]
  np.testing.assert_array_equal(source.read(3), gradient())
  part = data.Selection(source, [0])
  assert part.bits == 12 and part.read(0)[0, 0, 0] == 6
  assert data.Joined([part, source]).read(1)[0, 0, 0] == 6
  batch = next(data.train_stream(source, None, batch_size=4, seed=0, canvas=64))
  assert sorted(batch["views"]["image"][:, 0, 0, 2]) == sorted([6, 255, 56, gradient()[0, 0, 2]])
  for count, top in enumerate((900, 70)):  # a darker test set is scaled as training
    save(tmp_path / f"train/a/{count}.png", np.full((4, 4), 4000, np.uint16))
    save(tmp_path / f"test/a/{count}.png", np.full((4, 4), top, np.uint16))
  sets = [data.open_source(f"folder:{tmp_path}/{name}") for name in ("train", "test")]
  assert sets[1].bits == 10 and data.align(*sets).read(0)[0, 0, 0] == 56 and data.align(sets[1], sets[1]).bits == 10
  assert data.ArraySource(numbered(3)).bits is None
  save(tmp_path / "4.png", np.full((4, 4), 60000, np.uint16))
  assert data.open_source(f"files:{tmp_path}").bits == 16


def test_the_first_image_may_be_unreadable(tmp_path):
  """The first readable one tells the size at which raw pixels are compared."""
  for i in range(3):
    save(tmp_path / f"{i}.png", np.full((6, 6, 3), i, np.uint8))
  (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
  source = data.open_source(f"folder:{tmp_path}")
  assert (data.first_readable(source) == 1).all()
  config = tiny.config(**{"data.max_bad_fraction": 0.5, "evaluate.batch_size": 8})
  evaluation = scores.PretrainEvaluation(config, source, source, mesh_lib.make_mesh())
  assert len(evaluation.raw[1].pixels()) == 2
  for i in range(1, 3):
    (tmp_path / f"{i}.png").write_bytes(b"")
  with pytest.raises(ValueError, match="none of the 3 images can be read: the last is .*2.png .empty file.$"):
    data.first_readable(source)


@pytest.mark.parametrize(
  "spec, meant",
  [
    ("/my/photos", "folder:/my/photos"),
    ("~/photos", "folder:~/photos"),
    ("arrays.npz", "npz:arrays.npz"),
    ("foldr:/my/photos", "folder:/my/photos"),
  ],
)
def test_a_path_alone_is_told_what_it_lacks(spec, meant):
  with pytest.raises(UserError) as error:
    data.open_source(spec)
  assert f"{spec!r} is not a data set; did you mean {meant}? Known are fashion:SPLIT" in str(error.value)


def test_the_page_and_the_docstring_name_every_kind_of_data_set():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text()
  for kind in data.KINDS:
    assert f"`{kind}:" in page and f"{kind}:" in data.open_source.__doc__
