"""Streams of batches whose only state is the step number.

`train_stream` walks a fresh seeded permutation of the whole source in every epoch: the example at position
p = step * batch_size + j is permutation(seed, p // N)[p % N], and the seed of its augmentations is a function of
(seed, epoch, index) alone.  Hence any step can be reproduced by itself: nothing about the stream is saved in a
checkpoint, and the batch does not depend on the number of hosts, threads or restarts.  As in the official code
(google-research/simclr, tf2/data.py: `repeat` before `batch`), batches run across the ends of epochs, so no image is
left out of any epoch.

An unreadable image never shortens a batch, which would leave the hosts with different counts: the next readable
image takes its place, the file is named in the log, and the run stops beyond a given fraction of such files.
"""

import concurrent.futures
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from simclr_jax.data.decode import BadImage, import_tensorflow, jpeg_header, sniff
from simclr_jax.data.order import draws
from simclr_jax.data.sources import Source, first_readable, say_once
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

CHUNK = 16  # images that are read in one call of Python
ENDLESS = 2**40  # steps
MAX_BYTES_IN_MEMORY = 1 << 30
AHEAD = 2  # batches that are made, or complete, while the loop holds another


class _Reader:
  """Reads examples for the threads of a stream; replaces, counts and names the unreadable ones."""

  def __init__(self, source: Source, max_bad_fraction: float, bad_file=None):
    self.source = source
    self.bad: dict[int, str] = {}
    self._error: Exception | None = None  # the first that ends the stream
    # One damaged file should not stop a run over a small folder, unless max_bad_fraction is zero.
    self._allowed = max(1, int(max_bad_fraction * len(source))) if max_bad_fraction > 0 else 0
    self._fraction = max_bad_fraction
    self._file = epath.Path(bad_file) if bad_file else None
    self._lines = files.read_text(self._file).splitlines() if self._file and self._file.exists() else []
    self._lock = threading.Lock()

  def read(self, index: int):
    """-> uint8 [h, w, 3], label, index of the image that was read; ValueError where too many are unreadable."""
    i = int(index)
    for _ in range(len(self.source)):
      if i not in self.bad:
        try:
          return *self.source.read_labeled(i), i
        except BadImage as reason:
          self._count(i, str(reason))
      i = (i + 1) % len(self.source)
    raise UserError(f"all {len(self.bad)} images are unreadable; the first is {self.source.name(0)} ({self.bad[0]})")

  def stored(self, index: int, canvas: int | None):
    """-> bytes, height and width, label and index of an image for TensorFlow to finish.

    A JPEG that needs nothing but decoding is given as it is, its height and width as 0; others as their pixels,
    averaged down to fit on a canvas of that side if there is one.
    """
    if index not in self.bad:
      with contextlib.suppress(BadImage):  # `read` meets it again, and says so
        item, label = self.source.item(index)
        if isinstance(item, bytes) and sniff(item) == "JPEG" and item.endswith(b"\xff\xd9"):
          header = jpeg_header(item)
          side = max(header.height, header.width)
          if header.plain and header.orientation == 1 and side <= (canvas or side):
            return item, (0, 0), label, index
    image, label, index = self.read(index)
    image = _reduced(image, canvas) if canvas else image
    return image.tobytes(), image.shape[:2], label, index

  def found_bad(self, index) -> bool:
    """Reads the images at `index` [n] one by one; returns whether that found a new unreadable one."""
    if self._error:
      raise self._error
    before = len(self.bad)
    for i in np.unique(index):
      self.read(i)
    return len(self.bad) > before

  @contextlib.contextmanager
  def failing(self):
    """Keeps the error that is raised below it: TensorFlow would pass on its text alone."""
    try:
      yield
    except Exception as error:
      self._error = self._error or error
      raise

  def _count(self, i: int, reason: str):
    with self._lock:
      if i not in self.bad:
        self.bad[i] = reason
        self._report(i, reason)
      if self._error:  # the first, whichever thread meets one after it
        raise self._error

  def _report(self, i, reason):
    count, name = len(self.bad), self.source.name(i)
    line = f"{name}\t{reason}"
    if self._file and line not in self._lines:
      self._lines.append(line)
      files.write_text(self._file, "".join(f"{line}\n" for line in self._lines))
    if count <= 20:
      # Once, though a training stream, evaluation and others meet it.
      say_once(f"unreadable image {name}: {reason}; the next image takes its place")
    elif count == 21:
      say_once(f"more than 20 unreadable images; the others are counted{'' if self._file else ' but not named'}")
    if count == self._allowed + 1:
      self._error = UserError(
        f"{count} of {len(self.source)} images are unreadable, more than the {self._allowed} allowed by"
        f" max_bad_fraction={self._fraction:g}; the last is {name} ({reason}): raise max_bad_fraction, or remove or"
        " repair them, after which a resumed run needs data.changed=accept"
      )


def _dataset(
  reader: _Reader, transform: Callable | None, canvas: int | None, draw: Callable, steps: range, workers: int
):
  """The batches of `steps` as a tf.data.Dataset: read in chunks, then image by image decoded and transformed, in order.

  JPEGs are decoded, once, by TensorFlow; whatever else there is, Python has decoded while reading.
  """
  tf, source = import_tensorflow(), reader.source
  rows = len(draw(steps.start)[0])
  gathers = source.array_extent is not None
  labels = source.labels if gathers else None
  whole = gathers and transform is None  # batches as they come out of memory
  chunk = rows if whole else min(CHUNK, rows)

  def read(number):
    """-> what is stored, heights and widths, seeds, labels and numbers of chunk `number` of the rows of all steps."""
    with reader.failing():
      begin, end = number * chunk, min((number + 1) * chunk, len(steps) * rows)
      parts = []
      for step in range(begin // rows, -(-end // rows)):
        cut = slice(max(begin - step * rows, 0), end - step * rows)
        parts.append([array[cut] for array in draw(steps[step])])
      index, seed = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
      if gathers:
        label = np.full(len(index), -1, np.int32) if labels is None else labels[index]
        images = source.gather(index)
        extent = np.tile(np.asarray(images.shape[1:3], np.int32), (len(index), 1))
        return images, extent, seed, label, index.astype(np.int32)
      items, extent, label, index = zip(*(reader.stored(int(i), canvas) for i in index), strict=True)
      return np.asarray(items, object), np.asarray(extent, np.int32), seed, np.int32(label), np.int32(index)

  def chunks(number):
    tensors = tf.numpy_function(read, [number], [tf.uint8 if gathers else tf.string, *[tf.int32] * 4])
    shapes = [[None, *source.array_extent, 3] if gathers else [None], [None, 2], [None, 2], [None], [None]]
    return tuple(tf.ensure_shape(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True))

  def batch(views, seed, label, index):
    return {"views": views, "label": label, "index": index, "seed": seed}

  def example(item, extent, seed, label, index):
    image = item
    if not gathers:
      raw = lambda: tf.reshape(tf.io.decode_raw(item, tf.uint8), [extent[0], extent[1], 3])  # noqa: E731
      image = tf.cond(extent[0] == 0, lambda: tf.io.decode_jpeg(item, channels=3), raw)
    if transform:
      return batch(transform(image, seed), seed, label, index)
    extent = tf.shape(image)[:2]
    image = tf.image.pad_to_bounding_box(image, 0, 0, canvas, canvas)
    return batch({"image": image, "extent": extent}, seed, label, index)

  parallel = dict(num_parallel_calls=workers, deterministic=True)
  dataset = tf.data.Dataset.range(-(-len(steps) * rows // chunk)).map(chunks, **parallel)
  if whole:
    dataset = dataset.map(lambda image, extent, *rest: batch({"image": image, "extent": extent}, *rest))
  else:
    dataset = dataset.unbatch().map(example, **parallel).batch(rows, drop_remainder=True)
  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = False
  options.threading.private_threadpool_size = workers
  options.threading.max_intra_op_parallelism = 1
  options.experimental_optimization.apply_default_optimizations = False
  return dataset.prefetch(AHEAD).with_options(options)


class Stream:
  """Iterator over the batches of `steps`, made AHEAD of time, in order.

  TensorFlow's decoder fails without saying on which image.  The images of that step are then decoded one by one, the
  bad ones are recorded, and the stream resumes from that step, since the step is its only state.

  `bad` maps the names of the unreadable images met so far to the reasons.
  """

  def __init__(self, reader: _Reader, transform, canvas, draw, steps: range, workers: int | None):
    self._reader, self._draw, self._steps = reader, functools.lru_cache(maxsize=4)(draw), steps
    workers = workers or cores()
    self._from = lambda steps: iter(_dataset(reader, transform, canvas, self._draw, steps, workers))
    self._batches = []  # the iterator, if there is one
    # An interpreter that goes while TensorFlow's threads call it may hang.
    weakref.finalize(self, self._batches.clear)
    import_tensorflow()

  @property
  def bad(self) -> dict[str, str]:
    return {self._reader.source.name(i): reason for i, reason in dict(self._reader.bad).items()}

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    if not self._steps:
      raise StopIteration
    tf = import_tensorflow()
    while True:
      try:
        if not self._batches:
          self._batches.append(self._from(self._steps))
        batch = next(self._batches[0])
        break
      except tf.errors.OpError:
        self._batches.clear()
        if not self._reader.found_bad(self._draw(self._steps.start)[0]):
          raise
    self._steps = self._steps[1:]
    return tf.nest.map_structure(lambda tensor: np.asarray(memoryview(tensor)), batch)


def _reduced(image, side: int):
  """The image averaged down by the smallest whole factor that makes it fit on a canvas."""
  factor = -(-max(image.shape[:2]) // side)
  if factor == 1:
    return image
  from PIL import Image

  return np.asarray(Image.fromarray(image).reduce(factor))


def cores() -> int:
  """The cores this process may use, which on a shared machine are fewer than the machine has."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_stream(
  source: Source,
  transform: Callable | None,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  max_bad_fraction: float = 0.001,
  bad_file: str | None = None,
  canvas: int = 512,
  workers: int | None = None,
) -> Stream:
  """The endless stream of training batches from step `start_step` on.

  Args:
    source: the images.
    transform: a TensorFlow function (image uint8 [h, w, 3], seed int32 [2]) -> tensor or dict of tensors, which takes all its
      randomness from the seed; None to leave images as they are.
    batch_size: images of the global batch; this process reads rows process_index * b to (process_index + 1) * b - 1
      of it, b = batch_size / process_count.
    seed: of the permutations and of the augmentations.
    max_bad_fraction: the fraction of distinct unreadable images met by this process beyond which the stream raises
      ValueError; any positive fraction allows at least one.
    bad_file: a text file to which the name of every unreadable image and the reason are appended.
    canvas: without a transform, the side of the square on which images of a folder or a set are placed; larger images are
      averaged down by an integer factor.  Images in memory, all of one size, need no canvas.
    workers: threads; by default one for every core this process may use.

  Returns:
    An iterator of dicts of numpy arrays: `views`, what `transform` returned, stacked, or without one dict(image uint8
    [b, H, W, 3], extent int32 [b, 2], the heights and widths of the images in the top left corners); `label` int32
    [b], -1 where there is none; `index` int32 [b], the images that were read; `seed` int32 [b, 2], of the example.
    The seed of an image that replaces an unreadable one is that of the place, so it is augmented differently from its
    own appearance in the same epoch.
  """
  draw = draws(source, batch_size=batch_size, seed=seed, process_index=process_index, process_count=process_count)
  reader = _Reader(source, max_bad_fraction, bad_file)
  return Stream(reader, transform, None if transform else canvas, draw, range(start_step, ENDLESS), workers)


def eval_batches(
  source: Source,
  transform: Callable,
  *,
  of_arrays: Callable | None = None,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  max_bad_fraction: float = 0.001,
  workers: int | None = None,
  begin: int = 0,
  end: int | None = None,
) -> Iterator[dict]:
  """Every image from `begin` to before `end` (default: all) once, in order; each process reads its own rows of every batch,
  as in `train_stream`.

  Args:
    transform: a TensorFlow function, image uint8 [h, w, 3] -> tensor.
    of_arrays: the same function of numpy or JAX, [b, h, w, 3] -> [b, ...]; with it images that are in memory need no
      TensorFlow.
    batch_size: rows of the global batch.

  Yields:
    Dicts of numpy arrays of batch_size / process_count rows: `image`, what `transform` returned, stacked; `label`
    int32, -1 where there is none; `index` int32; `mask` bool, false in the rows that pad the last batch (they repeat
    the last image, index -1) and in those of unreadable images (which hold the next readable image; `index` is the
    unreadable one).

  Raises:
    ValueError: more than the allowed fraction of unreadable images, as in `train_stream`.
  """
  if batch_size % process_count:
    raise UserError(f"batch_size={batch_size} cannot be split over {process_count} processes: use a multiple")
  rows = batch_size // process_count
  end = len(source) if end is None else end
  places = begin + np.arange(-(-(end - begin) // batch_size) * batch_size)
  places = places.reshape(-1, process_count, rows)[:, process_index]
  wanted = np.minimum(places, end - 1)
  if of_arrays and source.array_extent:
    label = np.full(len(source), -1, np.int32) if source.labels is None else source.labels
    batches = ({"views": of_arrays(source.gather(i)), "label": label[i], "index": i.astype(np.int32)} for i in wanted)
  else:
    reader, no_seed = _Reader(source, max_bad_fraction), np.zeros((rows, 2), np.int32)
    batches = Stream(
      reader,
      lambda image, seed: transform(image),
      None,
      lambda step: (wanted[step], no_seed),
      range(len(wanted)),
      workers,
    )
  for index, place, batch in zip(wanted, places, batches, strict=True):
    padding = place >= end
    batch = {"image": batch["views"], "label": batch["label"], "index": index.astype(np.int32), "read": batch["index"]}
    batch["mask"] = (batch["index"] == batch.pop("read")) & ~padding
    for key in ("index", "label"):
      batch[key] = np.where(padding, np.int32(-1), batch[key])
    yield batch


def in_memory(
  source: Source,
  *,
  canvas: int = 512,
  max_bytes: int = MAX_BYTES_IN_MEMORY,
  max_bad_fraction: float = 0.001,
  bad_file: str | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All images of a source, decoded, for sets that fit on a device.

  Returns:
    (uint8 [N, H, W, 3], heights and widths int32 [N, 2], numbers int64 [N]); images in memory as they are, others in the
    top left corners of squares as large as the largest needs, at most `canvas`.  The numbers are those of the images, which
    differ from their places where an image is unreadable and another stands for it.

  Raises:
    ValueError: more than max_bytes.
  """
  if source.array_extent:
    count = len(source)
    _check_fits(count, *source.array_extent, max_bytes)
    extents = np.tile(np.asarray(source.array_extent, np.int32), (count, 1))
    return source.gather(np.arange(count)), extents, np.arange(count)
  reader = _Reader(source, max_bad_fraction, bad_file)

  def read(i):
    image, _, number = reader.read(i)
    return _reduced(image, canvas), min(canvas, max(image.shape[:2])), number  # large ones take no memory meanwhile

  images, numbers, side = [], [], 0
  with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
    for image, needed, number in pool.map(read, range(len(source))):
      images.append(image)
      numbers.append(number)
      side = max(side, needed)
      _check_fits(len(source), side, side, max_bytes)
  canvases, extents = np.zeros((len(images), side, side, 3), np.uint8), np.empty((len(images), 2), np.int32)
  for image, place, extent in zip(images, canvases, extents, strict=True):
    extent[:] = image.shape[:2]
    place[: extent[0], : extent[1]] = image
  return canvases, extents, np.asarray(numbers)


def check_fits(source: Source, *, canvas: int = 512):
  """Raises UserError where `in_memory` surely would, after a look at one image: others may be larger."""
  height, width = source.array_extent or (min(canvas, max(first_readable(source).shape[:2])),) * 2
  _check_fits(len(source), height, width, MAX_BYTES_IN_MEMORY)


def _check_fits(count, height, width, max_bytes):
  if count * height * width * 3 > max_bytes:
    raise UserError(
      f"{count} images of {height} x {width} pixels are {count * height * width * 3 / 2**30:.1f} GiB, above the"
      f" {max_bytes / 2**30:.1f} GiB that are kept on a device: use augment.where=device_crop"
    )
