"""Sets of TensorFlow Datasets, read by byte offset."""

import shlex
import shutil

import numpy as np
import pytest
import tiny
from test_stream import crop_like

from simclr_jax import data
from simclr_jax.data import tfds as tfds_source
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import data as dataset
from simclr_jax.programs import splits, trained


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """A real TFDS set of 23 + 5 images in 3 + 1 TFRecord shards, made without network: image i is all i."""
  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    pkg_dir_path = None  # the class stands in a script, not in a package of its own

    def _info(self):
      image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
      label = tfds.features.ClassLabel(names=["even", "odd"])
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label}))

    def _split_generators(self, manager):
      splits = {"train": self._generate_examples(0, 23), "test": self._generate_examples(100, 105)}
      return splits | {"unlabelled": self._generate_examples(200, 204, label=-1)}

    def _generate_examples(self, start, stop, label=None):
      for i in range(start, stop):
        yield i, {"image": np.full((6 + i % 3, 7, 3), i, np.uint8), "label": i % 2 if label is None else label}

  folder = tmp_path_factory.mktemp("tfds")
  builder = Tiny(data_dir=str(folder))
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
  return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "simclr_jax"


def tfds_pixels(folder, split):
  """What TFDS itself reads, in its order."""
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(str(folder / "tiny" / "1.2.0"))
  return [(int(e["image"][0, 0, 0]), int(e["label"])) for e in tfds.as_numpy(builder.as_dataset(split=split))]


@pytest.mark.parametrize("split", ["train", "test", "train[:30%]", "train[5:17]", "train[-4:]"])
def test_tfds_reads_what_tfds_reads(tfds_folder, cache, split):
  source = data.open_source(f"tfds:tiny:{split}", data_dir=str(tfds_folder))
  expected = tfds_pixels(tfds_folder, split)
  assert len(source) == len(expected) and source.class_names == ("even", "odd")
  assert [(int(image[0, 0, 0]), label) for image, label in map(source.read_labeled, range(len(source)))] == expected
  assert source.labels.dtype == np.int32 and source.labels.tolist() == [label for _, label in expected]
  assert source.read(1).shape == (6 + expected[1][0] % 3, 7, 3)
  assert source.name(1) == f"tfds:tiny:{split}:1"


@pytest.mark.parametrize(
  "train, test, shared", [("train", "train[12:]", 11), ("train[:12]", "train[10:]", 2), ("train[:12]", "train[12:]", 0)]
)
def test_slices_that_overlap_are_not_scored(tfds_folder, cache, train, test, shared):
  section = tiny.config(
    **{"data.train": f"tfds:tiny:{train}", "data.test": f"tfds:tiny/1.2.0:{test}", "data.data_dir": str(tfds_folder)}
  ).data
  if not shared:
    assert sum(map(len, splits.open_data(section))) == 23
    return
  with pytest.raises(ValueError, match=rf"data.test=.* has {shared} images of data.train=.*, such as train\[:90%\]"):
    splits.open_data(section)


@pytest.mark.parametrize(
  "own, train, test, shared",
  [
    ("train[:12]", "train", "", r"\d of the 12"),  # half of each class is held out
    ("train", "train[12:]", "", "5 of the 5"),
    ("unlabelled+train[:12]", "test", "train[10:]", "2 of the 13"),
    ("all", "train", "test", "5 of the 5"),
    ("train[:12]", "train[:12]", "train[12:]", ""),
    ("train", "unlabelled", "test", ""),
  ],
)
def test_slices_that_training_has_seen_are_not_scored(tfds_folder, cache, own, train, test, shared, monkeypatch):
  monkeypatch.setattr(data, "align", lambda train, test, what: test)
  names = {"data.train": f"tfds:tiny:{train}", "data.test": test and f"tfds:tiny:{test}", "data.held_out": 0.5}
  section = tiny.config(**names, **{"data.data_dir": str(tfds_folder)}).data
  _, tested = splits.open_data(section)
  training = tiny.config(**{"data.train": f"tfds:tiny/1.2.0:{own}", "data.test": "fashion:test"})
  if not shared:
    monkeypatch.setattr(data, "open_source", None if own == "train" else data.open_source)  # other files are not opened
    trained.check_unseen(section, tested, "run", training)
    return
  with pytest.raises(ValueError, match=f"{shared} images to score are in tfds:tiny.*, which run was trained on"):
    trained.check_unseen(section, tested, "run", training)


def test_tfds_index_is_cached_and_keyed_by_the_shards(tfds_folder, cache, monkeypatch):
  first = data.open_source("tfds:tiny", data_dir=str(tfds_folder))
  labels = first.labels
  assert len(list(cache.iterdir())) == 1
  monkeypatch.setattr(tfds_source, "scan_tfrecords", None)
  monkeypatch.setattr(data.TfdsSource, "_features", None)
  second = data.open_source("tfds:tiny:train", data_dir=str(tfds_folder))
  np.testing.assert_array_equal(second.labels, labels)
  with pytest.raises(TypeError):  # other shards: not the cache of these
    data.open_source("tfds:tiny:test", data_dir=str(tfds_folder))


def test_tfds_without_a_writable_cache(tfds_folder, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert len(data.open_source("tfds:tiny", data_dir=str(tfds_folder))) == 23


def test_a_split_without_labels_has_no_classes(tfds_folder, cache):
  """Such as that of STL-10, whose labels are all -1."""
  source = data.open_source("tfds:tiny:unlabelled", data_dir=str(tfds_folder))
  assert source.labels is None and source.class_names == () and source.read_labeled(1)[1] == -1
  section = config_lib.Data(train="tfds:tiny:unlabelled", data_dir=str(tfds_folder))
  train, test = splits.open_data(section)
  assert train is test and len(train) == 4
  both = data.open_source("tfds:tiny:unlabelled+train[:2]", data_dir=str(tfds_folder))
  assert both.num_classes == 2 and (both.labels >= 0).sum() == 2
  assert dataset.inspect("tfds:tiny:unlabelled", data_dir=str(tfds_folder))["unlabeled"] == 0


@pytest.mark.parametrize("name, version", [("mnist", ""), ("mnist/3.0.1", "3.0.1")])
def test_a_set_that_is_not_prepared_is_named_with_the_command_that_prepares_it(tmp_path, monkeypatch, name, version):
  import tensorflow_datasets as tfds

  with pytest.raises(ValueError, match=rf"not prepared under {tmp_path}/{name}; ") as error:
    data.open_source(f"tfds:{name}:train", data_dir=str(tmp_path))
  python, flag, code = shlex.split(str(error.value).partition("network access: ")[2])
  asked = []
  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda self: asked.append(self.data_dir))
  exec(code, {})
  assert (python, flag) == ("python", "-c") and asked[0].startswith(f"{tmp_path}/mnist/{version}")


def test_tfds_errors(tfds_folder, cache, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(ValueError, match=f"not prepared under {tmp_path}/tiny"):
    data.open_source("tfds:tiny")
  with pytest.raises(ValueError, match="no split 'valid' .*train, test"):
    data.open_source("tfds:tiny:valid", data_dir=str(tfds_folder))
  with pytest.raises(ValueError, match="empty"):
    data.open_source("tfds:tiny:train[:0]", data_dir=str(tfds_folder))


def test_tfds_configurations_and_versions(tfds_folder, cache, tmp_path):
  for place in ("one/a/1.9.0", "one/a/1.10.0", "two/a/1.2.0", "two/b/1.2.0"):
    shutil.copytree(tfds_folder / "tiny/1.2.0", tmp_path / place)
  newest = data.open_source("tfds:one", data_dir=str(tmp_path))
  assert "/1.10.0/" in newest._shards[0]
  assert "/1.9.0/" in data.open_source("tfds:one/a/1.9.0:test", data_dir=str(tmp_path))._shards[0]
  assert len(data.open_source("tfds:two/b:test", data_dir=str(tmp_path))) == 5
  with pytest.raises(ValueError, match=r"several configurations; name one: tfds:two/a \(of \['a', 'b'\]\)"):
    data.open_source("tfds:two:test", data_dir=str(tmp_path))


def test_tfds_damaged_shard(tfds_folder, cache, tmp_path):
  shutil.copytree(tfds_folder, tmp_path / "copy")
  shard = sorted((tmp_path / "copy/tiny/1.2.0").glob("tiny-train*"))[1]
  source = data.open_source("tfds:tiny", data_dir=str(tmp_path / "copy"))
  whole = shard.read_bytes()
  shard.unlink()  # a shard that disappears during a run
  lost = [i for i in range(23) if not readable(source, i)]
  assert 5 <= len(lost) <= 10
  with pytest.raises(ValueError, match="cannot read the shard .*prepare it again"):
    data.open_source("tfds:tiny", data_dir=str(tmp_path / "copy"))
  shard.write_bytes(whole[:-5])
  with pytest.raises(ValueError, match="cut off or damaged"):
    data.open_source("tfds:tiny", data_dir=str(tmp_path / "copy"))


def readable(source, i):
  try:
    source.read(i)
  except data.BadImage:
    return False
  return True


def test_tfds_stream(tfds_folder, cache):
  source = data.open_source("tfds:tiny", data_dir=str(tfds_folder))
  batch = next(data.train_stream(source, crop_like, batch_size=23, seed=0))
  assert "labels" not in source._offsets and source.fingerprint()["images"] == 23  # without reading them all
  assert "labels" not in source._offsets
  pixels = dict(enumerate(tfds_pixels(tfds_folder, "train")))
  assert [(p[0], k) for p, k in zip(batch["views"]["pixel"], batch["label"], strict=True)] == [
    pixels[i] for i in batch["index"]
  ]
