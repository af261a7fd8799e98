"""Images that are scored are never those that training sees, and only labels that are there count."""

import json
import types

import images
import numpy as np
import pytest
import tiny

from simclr_jax import data
from simclr_jax.evaluation import knn, linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, scores, splits
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError


def section(train, **changes):
  return tiny.config(**{"data.train": train, "data.test": "", **changes}).data


def save(path, n, labels=None, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)
  np.savez(path, images=images, **({} if labels is None else {"labels": labels}))
  return f"npz:{path}"


def test_a_tenth_of_every_class_is_held_out(tmp_path):
  labels = np.repeat([0, 1, 2], [50, 29, 1])
  train, test = splits.open_data(section(save(tmp_path / "a.npz", 80, labels)))
  assert np.bincount(test.labels).tolist() == [5, 3] and len(train) == 72
  assert 2 in train.labels  # the only one of its class stays
  names = [{source.name(i) for i in range(len(source))} for source in (train, test)]
  assert not names[0] & names[1]
  again = splits.open_data(section(save(tmp_path / "a.npz", 80, labels), seed=7))[1]
  assert [again.name(i) for i in range(8)] == [test.name(i) for i in range(8)]
  assert (labels[splits.hold_out(np.where(labels == 1, -1, labels), 0.1)] == 0).all()  # -1: not labeled


def test_without_labels_or_a_fraction_there_is_nothing_to_score(tmp_path):
  plain, labeled = save(tmp_path / "plain.npz", 20), save(tmp_path / "labeled.npz", 20, np.arange(20) % 2)
  for spec, changes, words in (
    (plain, {}, "has no labels, and scores need them"),
    (labeled, {"data.held_out": 0.0}, "data.held_out=0: no images are left to score"),
  ):
    train, test = splits.open_data(section(spec, **changes))
    assert test is train and len(train) == 20
    with pytest.raises(UserError, match=words):
      splits.check_labeled(section(spec, **changes), train, test)


def test_where_images_lie_is_told_without_asking_the_bucket(monkeypatch):
  monkeypatch.setattr(files, "expanded", lambda path: pytest.fail(f"{path} was looked for"))
  assert splits.may_hold("npz:gs://b/x.npz:train", "gs://b/x.npz:train")
  assert splits.may_hold("npz:gs://b/x.npz", "gs://b/x.npz:")
  assert not splits.may_hold("npz:gs://b/x.npz:train", "fashion:test")


@pytest.mark.parametrize("spelled", ["{}", "{}/../a.npz", "link"])
def test_a_set_is_not_scored_against_itself(tmp_path, spelled):
  spec = save(tmp_path / "a.npz", 20, np.arange(20) % 2)
  (tmp_path / "link").symlink_to(tmp_path / "a.npz")
  (tmp_path / "x").mkdir()
  other = {"{}": spec, "{}/../a.npz": f"npz:{tmp_path}/x/../a.npz", "link": f"npz:{tmp_path}/link"}[spelled]
  chosen = section(spec, **{"data.test": other})
  train, test = splits.open_data(chosen)
  assert test is train
  with pytest.raises(UserError, match="is data.train: a set that is scored against itself"):
    splits.check_labeled(chosen, train, test)
  assert f"data.test={other} is data.train" in splits.nothing_is_scored(chosen)
  assert "no images are held out" in splits.nothing_is_scored(section(spec))


@pytest.mark.parametrize("a, b, are_one", [
  ("tfds:cifar10", "tfds:cifar10:train", True),
  ("tfds:cifar10:", "tfds:cifar10", True),
  ("tfds:cifar10", "tfds:cifar10:test", False),
  ("npz:{}/a.npz:train", "npz:./a.npz:train", True),
  ("npz:~/a.npz:train", "npz:{}/link:train", True),
  ("npz:~/a.npz", "npz:a.npz", True),
  ("npz:{}/a.npz:train", "npz:./a.npz:test", False),
  ("npz:{}/a.npz", "npz:./a.npz:test", False),
  ("tfrecord:~/train-*", "tfrecord:{}/train-*", True),
  ("folder:{}/x/", "folder:x", True),
  ("folder:{}/x", "files:x", False),
  ("tfrecord:gs://mine/x/", "tfrecord:gs://mine/x", True),
  ("fashion:train", "fashion:test", False),
])  # fmt: skip
def test_one_set_is_spelled_in_many_ways(tmp_path, monkeypatch, a, b, are_one):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "a.npz").write_text("")
  (tmp_path / "link").symlink_to("a.npz")
  assert splits.are_one(a.format(tmp_path), b.format(tmp_path)) is are_one


def test_two_splits_of_a_file_are_two_sets(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  train, test = splits.open_data(section(spec, **{"data.test": f"{spec}:test"}))
  assert (len(train), len(test)) == (96, 32)


def test_a_run_before_held_out_trained_on_everything():
  values = config_lib.to_dict(tiny.config(**{"data.test": ""}))
  del values["data"]["held_out"]
  assert config_lib.from_json(json.dumps(values)).data.held_out == 0
  assert config_lib.from_saved(values).data.held_out == 0  # of a card
  values["data"]["test"] = "fashion:test"
  assert config_lib.from_json(json.dumps(values)).data.held_out == 0.1


@pytest.fixture
def blobs():
  """h [120, 8] around three centers, and their classes."""
  rng = np.random.default_rng(0)
  y = np.arange(120) % 3
  return (3 * np.eye(8)[y] + 0.3 * rng.normal(size=(120, 8))).astype(np.float32), y


def test_rows_without_a_label_take_no_part_in_a_score(blobs):
  h, y = blobs
  some = y.copy()
  some[::2] = -1
  known = some >= 0
  for bank, queries in ((some, y), (y, some), (some, some)):
    assert knn.accuracy(h, bank, h, queries, k=5, num_classes=3) == 1
    classifier = linear.logistic_regression(h, bank, num_classes=3)
    assert linear.accuracy(classifier, h, queries) == 1
    assert linear.mean_per_class(linear.logits(classifier, h), queries) == 1
  alone = linear.logistic_regression(h[known], y[known], num_classes=3)
  np.testing.assert_array_equal(linear.logistic_regression(h, some, num_classes=3)["kernel"], alone["kernel"])
  assert (some[linear.few_labels(some, 5, np.random.default_rng(0))] >= 0).all()
  with pytest.raises(UserError, match="none of the 120 images has a label"):
    knn.accuracy(h, np.full(120, -1), h, y, num_classes=3)


def test_a_held_out_part_is_of_the_labeled_rows(blobs):
  h, y = blobs
  some = np.where(np.arange(120) % 4 == 0, -1, y)
  held_out = np.arange(120) < 40
  found = linear.logistic_regression(h, some, num_classes=3, held_out=held_out)
  known = some >= 0
  alone = linear.logistic_regression(h[known], some[known], num_classes=3, held_out=held_out[known])
  assert found["l2"] == alone["l2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(blobs, value):
  h, y = blobs
  broken = h.copy()
  broken[7, 3] = value
  classifier = linear.logistic_regression(h, y, num_classes=3)
  for score in (
    lambda: knn.accuracy(broken, y, h, y, num_classes=3),
    lambda: knn.accuracy(h, y, broken, y, num_classes=3),
    lambda: linear.logistic_regression(broken, y, num_classes=3),
    lambda: linear.accuracy(classifier, broken, y),
  ):
    with pytest.raises(UserError, match="1 of 120 rows hold NaN or infinity, row 7 first"):
      score()


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.002, 1e-6])
def test_no_temperature_makes_the_votes_of_knn_vanish(blobs, temperature):
  h, y = blobs
  far = h[:60] + 40 * np.eye(8, dtype=np.float32)[7]  # cosines well below 1
  other = h[60:] - 40 * np.eye(8, dtype=np.float32)[7]
  right = knn.accuracy(far, y[:60], -other, y[60:], k=5, temperature=temperature, num_classes=3)
  assert right == knn.accuracy(far, y[:60], -other, y[60:], k=5, temperature=1.0, num_classes=3)
  assert len(set(knn.predict(h, y, h + 1, temperature=temperature, num_classes=3).tolist())) == 3


def test_a_tenth_is_of_the_source(tmp_path):
  train, test = splits.open_data(section("fashion:train"))
  full = data.open_source("fashion:train")
  assert len(train) + len(test) == len(full) and abs(len(test) - len(full) / 10) < 10
  np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(test.labels), np.bincount(full.labels))


@pytest.mark.parametrize("spec, title", [("fashion:train", "fashion"), ("npz:/data/cifar10.npz:train", "cifar10"),
  ("npz:set.npz", "set"), ("folder:/my/images/", "images"), ("tfds:imagenet2012/5.1.0:train[:10%]", "imagenet2012"),
  ("tfds:cifar10:train", "cifar10"), ("tfrecord:gs://bucket/set/train-*", "train-*")])  # fmt: skip
def test_a_heading_names_the_data_set(spec, title):
  assert splits.title(spec) == title


def test_an_image_is_no_neighbor_of_itself_where_training_images_are_a_part_of_the_test_images():
  source = tiny.source(10)
  train = data.Selection(source, [1, 3, 5, 7])
  parts = [types.SimpleNamespace(source=part, rows=lambda part=part: np.arange(len(part))) for part in (train, source)]
  evaluation = types.SimpleNamespace(train=parts[0], test=parts[1])
  # Image 3 is training image 1; image 4 is not a training image.
  found = scores._others(evaluation, [3, 4], np.asarray([[1, 0, 2], [2, 1, 3]]))
  assert found.tolist() == [[0, 2], [2, 1]]


def test_of_equal_logits_the_first_is_the_answer():
  evaluation = object.__new__(finetune.ClassifierEvaluation)
  logits = np.asarray([[1.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 3, 2, 1, 5, 4]])
  for labels in ([0, 0, 4], [1, 5, 0], [1, 3, 5]):
    found = evaluation.scores(logits, np.asarray(labels))
    assert found["accuracy"] == np.mean(logits.argmax(1) == labels)
  assert evaluation.scores(logits, np.asarray([1, 5, 0]))["top_5"] == pytest.approx(1 / 3)
  with pytest.raises(UserError, match="logits"):
    evaluation.scores(np.full((2, 3), np.nan), np.asarray([0, 1]))


def test_a_copy_is_the_same_set(tmp_path):
  spec = save(tmp_path / "a.npz", 20, np.arange(20) % 2)
  copy = save(tmp_path / "b.npz", 20, np.arange(20) % 2)
  train, test = splits.open_data(section(spec, **{"data.test": copy}))
  assert test is train


def test_sets_that_share_images_are_refused(tmp_path):
  for i in range(6):
    images.save(tmp_path / f"photos/{'ab'[i % 2]}/{i}.png", np.full((4, 4, 3), i, np.uint8))
  with pytest.raises(
    UserError, match="data.test=folder:.*/photos has 6 images of data.train=files:.*: name sets that do not"
  ):
    splits.open_data(section(f"files:{tmp_path}", **{"data.test": f"folder:{tmp_path}/photos"}))
  train, test = splits.open_data(section(f"files:{tmp_path}/photos/a", **{"data.test": f"files:{tmp_path}/photos/b"}))
  assert len(train) == len(test) == 3
