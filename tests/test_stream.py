"""Streams that are a function of the step number alone."""

import logging
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from images import gradient, numbered, save

from simclr_jax import data


def crop_like(image, seed):
  """A transform that shows both of its inputs: the middle pixel and noise that the seed alone decides."""
  import tensorflow as tf

  noise = tf.random.stateless_uniform([2], seed)
  return {"pixel": image[tf.shape(image)[0] // 2, tf.shape(image)[1] // 2], "noise": noise}


def resized(image):
  import tensorflow as tf

  return tf.image.resize(tf.cast(image, tf.float32), [8, 8])


def take(stream, n):
  return [next(stream) for _ in range(n)]


def flat(batch):
  return {**{k: v for k, v in batch.items() if k != "views"}, **batch["views"]}


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    batch, other = flat(batch), flat(other)
    assert batch.keys() == other.keys()
    for key in batch:
      assert batch[key].dtype == other[key].dtype
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


@pytest.fixture(params=["array", "folder"])
def source(request, tmp_path):
  """21 labeled images, image i all i, in memory or as files."""
  if request.param == "array":
    return data.ArraySource(numbered(21), np.arange(21) % 4)
  for i in range(21):
    save(tmp_path / f"{i // 7}" / f"{i:02}.png", np.full((4 + i % 2, 4, 3), i, np.uint8))
  return data.FolderSource(str(tmp_path))


def test_epochs_are_permutations(source):
  stream = data.train_stream(source, crop_like, batch_size=6, seed=5)
  batches = take(stream, 14)  # 84 examples: 4 epochs of 21, whose ends fall inside batches
  index = np.concatenate([batch["index"] for batch in batches])
  orders = index.reshape(4, 21)
  for order in orders:
    assert sorted(order) == list(range(21))
  assert len({tuple(order) for order in orders}) == 4
  for batch in batches:
    assert batch["index"].dtype == batch["label"].dtype == np.int32 and batch["index"].shape == (6,)
    np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
    np.testing.assert_array_equal(batch["views"]["pixel"], np.repeat(batch["index"][:, None], 3, 1))
  noise = np.concatenate([batch["views"]["noise"] for batch in batches])
  assert len(np.unique(noise)) == noise.size  # no two examples, in any epoch, share their randomness
  other = np.concatenate([b["index"] for b in take(data.train_stream(source, crop_like, batch_size=6, seed=6), 3)])
  assert (other != index[:18]).any()


def test_restart_is_identical(source):
  straight = take(data.train_stream(source, crop_like, batch_size=6, seed=5), 12)
  for start in (1, 3, 10):  # step 3 runs over the end of the first epoch
    assert_same(
      take(data.train_stream(source, crop_like, batch_size=6, seed=5, start_step=start), 2), straight[start:][:2]
    )


@pytest.mark.parametrize("hosts, workers", [(2, 1), (4, 3)])
def test_hosts_together_read_what_one_reads(source, hosts, workers):
  one = take(data.train_stream(source, crop_like, batch_size=8, seed=5), 6)
  parts = [
    data.train_stream(source, crop_like, batch_size=8, seed=5, process_index=host, process_count=hosts, workers=workers)
    for host in range(hosts)
  ]
  for batch in one:
    rows = [flat(next(part)) for part in parts]
    for key, whole in flat(batch).items():
      np.testing.assert_array_equal(np.concatenate([row[key] for row in rows]), whole, err_msg=key)


def test_the_stream_of_another_process_is_the_same():
  """Nothing of this process (hash seed, thread timing, order of imports) enters the stream."""
  source = data.ArraySource(numbered(21))
  here = np.concatenate([flat(b)["noise"] for b in take(data.train_stream(source, crop_like, batch_size=6, seed=5), 5)])
  code = (
    "import sys; sys.path.insert(0, 'tests'); from images import *; from test_stream import *; s = data.ArraySource(numbered(21)); "
    "b = take(data.train_stream(s, crop_like, batch_size=6, seed=5, start_step=3, workers=1), 2); "
    "print(np.concatenate([flat(x)['noise'] for x in b]).tobytes().hex())"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
  )
  assert run.stdout.strip() == here[18:].tobytes().hex(), run.stderr


def test_batch_must_split_over_hosts(source):
  with pytest.raises(ValueError, match="batch_size=6 .*4 processes"):
    data.train_stream(source, crop_like, batch_size=6, seed=0, process_count=4)


def test_a_failing_transform_says_so(source):
  import tensorflow as tf

  def fails(image, seed):
    with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(image)[0], 99, "the words of the transform")]):
      return tf.identity(image)

  with pytest.raises(tf.errors.OpError, match="the words of the transform"):
    next(data.train_stream(source, fails, batch_size=2, seed=0))


def test_array_stream_is_cheap():
  source = data.ArraySource(np.zeros((5000, 28, 28), np.uint8))
  stream = data.train_stream(source, lambda image, seed: image, batch_size=256, seed=0)
  take(stream, 4)
  start = time.process_time()
  take(stream, 20)
  assert (time.process_time() - start) / (20 * 256) < 2e-4  # CPU-seconds an image; measured 4e-5


# ---- unreadable images -----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
  """40 images of which 3 cannot be read, in three ways."""
  for i in range(40):
    save(tmp_path / f"{i:02}.jpg", np.full((16, 16, 3), i * 6, np.uint8), quality=95)
  jpeg = (tmp_path / "05.jpg").read_bytes()
  (tmp_path / "05.jpg").write_bytes(jpeg[: len(jpeg) * 3 // 4])
  (tmp_path / "06.jpg").write_bytes(b"")
  (tmp_path / "39.jpg").write_text("a text file named .jpg")
  return data.FolderSource(str(tmp_path))


def test_unreadable_images_are_replaced_counted_and_named(damaged, caplog):
  with caplog.at_level(logging.WARNING):
    stream = data.train_stream(damaged, crop_like, batch_size=20, seed=0, max_bad_fraction=0.1)
    batches = take(stream, 6)
  for epoch in range(3):
    index = np.concatenate([batch["index"] for batch in batches[2 * epoch : 2 * epoch + 2]])
    # 5 and 6 are replaced by 7, 39 by 0: the count stays 40
    assert sorted(index) == sorted([i for i in range(40) if i not in (5, 6, 39)] + [7, 7, 0])
  for batch in batches:
    assert np.abs(batch["views"]["pixel"].astype(int) - 6 * batch["index"][:, None]).max() <= 3
  noise = np.concatenate([batch["views"]["noise"] for batch in batches])
  assert len(np.unique(noise)) == noise.size  # the stand-in is augmented anew
  reasons = {os.path.basename(name): reason for name, reason in stream.bad.items()}
  assert sorted(reasons) == ["05.jpg", "06.jpg", "39.jpg"]
  assert "broken jpeg" in reasons["05.jpg"] and "empty" in reasons["06.jpg"] and "not a jpeg" in reasons["39.jpg"]
  named = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
  assert len(named) == 3 and all(any(file in line for line in named) for file in reasons)
  again = data.train_stream(damaged, crop_like, batch_size=20, seed=0, max_bad_fraction=0.1, start_step=4)
  assert_same(take(again, 2), batches[4:])
  again = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
  assert again == named  # said once, however many streams meet them


def test_the_run_stops_past_the_fraction(damaged):
  with pytest.raises(ValueError, match=r"[23] of 40 images are unreadable, more than the 1 allowed.*\.jpg") as raised:
    take(data.train_stream(damaged, crop_like, batch_size=20, seed=0, max_bad_fraction=0.001), 4)
  assert "\n" not in str(raised.value) and "a resumed run needs data.changed=accept" in str(raised.value)
  with pytest.raises(ValueError, match="[123] of 40 images .* the 0 allowed"):
    take(data.train_stream(damaged, crop_like, batch_size=20, seed=0, max_bad_fraction=0), 4)
  with pytest.raises(ValueError, match="more than the 1 allowed"):
    list(data.eval_batches(damaged, resized, batch_size=16))


def test_twenty_are_named_and_all_are_counted(tmp_path, caplog):
  for i in range(25):
    (tmp_path / f"{i:02}.png").write_bytes(b"")
  save(tmp_path / "99.png", gradient())
  with caplog.at_level(logging.WARNING):
    stream = data.train_stream(data.FolderSource(str(tmp_path)), crop_like, batch_size=26, seed=0, max_bad_fraction=1)
    assert (take(stream, 2)[1]["index"] == 25).all()
  assert len(stream.bad) == 25
  assert sum(str(tmp_path) in record.getMessage() for record in caplog.records) == 20
  assert sum("counted but not named" in record.getMessage() for record in caplog.records) == 1


def test_all_unreadable(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.jpg").write_bytes(b"")
  with pytest.raises(ValueError, match="unreadable"):
    next(data.train_stream(data.FolderSource(str(tmp_path)), crop_like, batch_size=2, seed=0, max_bad_fraction=1.0))


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 21, 32])
def test_eval_batches(source, batch_size):
  batches = list(data.eval_batches(source, resized, batch_size=batch_size))
  assert len(batches) == -(-21 // batch_size)
  assert all(batch["image"].shape == (batch_size, 8, 8, 3) for batch in batches)
  whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  assert whole["mask"].dtype == bool and whole["mask"].sum() == 21 and whole["mask"][:21].all()
  np.testing.assert_array_equal(whole["index"][:21], np.arange(21))
  np.testing.assert_array_equal(whole["label"][:21], source.labels)
  np.testing.assert_array_equal(whole["image"][:21, 0, 0, 0], np.arange(21))
  assert (whole["index"][21:] == -1).all() and (whole["label"][21:] == -1).all()


def test_eval_batches_of_several_processes(source):
  whole = list(data.eval_batches(source, resized, batch_size=8))
  parts = [data.eval_batches(source, resized, batch_size=8, process_index=i, process_count=4) for i in range(4)]
  for batch, *rows in zip(whole, *parts, strict=True):
    for key in batch:
      np.testing.assert_array_equal(np.concatenate([r[key] for r in rows]), batch[key])


def test_eval_masks_unreadable_images(damaged):
  batches = list(data.eval_batches(damaged, resized, batch_size=16, max_bad_fraction=0.1))
  mask, index = (np.concatenate([batch[key] for batch in batches]) for key in ("mask", "index"))
  assert index[:40].tolist() == list(range(40))
  assert np.flatnonzero(~mask).tolist() == [5, 6, 39, *range(40, 48)]


def test_unlabeled(tmp_path):
  source = data.ArraySource(numbered(6))
  assert (next(data.train_stream(source, crop_like, batch_size=4, seed=0))["label"] == -1).all()
  assert (next(data.eval_batches(source, resized, batch_size=4))["label"] == -1).all()


def test_importing_the_module_does_not_import_tensorflow():
  code = "import sys, simclr_jax.data; sys.exit('tensorflow' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_arrays_as_canvases():
  source = data.ArraySource(numbered(10))
  batch = next(data.train_stream(source, None, batch_size=4, seed=0))
  assert batch["views"]["image"].shape == (4, 4, 4, 3) and batch["views"]["extent"].tolist() == [[4, 4]] * 4
  np.testing.assert_array_equal(batch["views"]["image"][:, 0, 0, 0], batch["index"])
  images, extent, _ = data.in_memory(source)
  assert images.shape == (10, 4, 4, 3) and extent.shape == (10, 2)
  with pytest.raises(ValueError, match="augment.where=device_crop"):
    data.in_memory(source, max_bytes=400)


class Photos(data.ArraySource):
  """Large images, each made when it is read."""

  def __init__(self):
    super().__init__(numbered(20))
    self.array_extent = None

  def item(self, i):
    return np.full((1000 + i, 900, 3), 8 * i, np.uint8), -1


def test_large_images_take_the_memory_of_their_canvases():
  source = Photos()
  tracemalloc.start()
  images, extent, _ = data.in_memory(source, canvas=32)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert images.shape == (20, 32, 32, 3) and extent.tolist() == [[-(-(1000 + i) // 32), 29] for i in range(20)]
  assert images[:, 5, 5, 0].tolist() == [8 * i for i in range(20)]
  assert peak < 30e6  # of 56 MB of images


def test_what_does_not_fit_in_memory_is_known_from_one_image():
  data.check_fits(data.ArraySource(numbered(10)))
  many = data.Selection(Photos(), np.zeros(1400, int))
  with pytest.raises(ValueError, match="1400 images of 512 x 512 pixels are 1.0 GiB, above the 1.0 GiB"):
    data.check_fits(many)
  data.check_fits(many, canvas=256)
