"""Data: random-access sources of images, and streams whose only state is the step number.

A `Source` answers `len(source)` and `source.read(i)`.  `train_stream` walks a fresh seeded permutation of the whole
source in every epoch: the example at position p = step * batch_size + j is permutation(seed, p // N)[p % N], and
the seed of its augmentations is a function of (seed, epoch, index) alone.  Hence any step can be reproduced by
itself: nothing about the stream is saved in a checkpoint, and the batch does not depend on the number of hosts,
threads or restarts.  As in the official code (google-research/simclr, tf2/data.py: `repeat` before `batch`),
batches run across the ends of epochs, so no image is left out of any epoch.

An unreadable image never shortens a batch, which would leave the hosts with different counts: the next readable
image takes its place, the file is named in the log, and the run stops beyond a given share of such files.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import logging
import os
import pathlib
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from simclr_jax.data.sets import textures

logger = logging.getLogger(__name__)

FASHION_CLASSES = (
  "t-shirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_PIXELS = 64_000_000
SPECS = (
  "fashion:SPLIT, textures:SPLIT, textures64:SPLIT, npz:FILE[:SPLIT], folder:PATH, files:PATH,"
  " tfds:NAME[/CONFIG][:SPLIT],"
  " or tfrecord:, array_record:, webdataset: or parquet: with a folder or pattern of shards"
)


class BadImage(Exception):
  """One image cannot be used; the message is the reason, in a few words."""


# ---- decoding --------------------------------------------------------------------------------------------------


_FIRST_BYTES = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"))
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: a[::-1].swapaxes(0, 1),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def sniff(data: bytes) -> str | None:
  """The image format that the first bytes announce; file names are not to be trusted."""
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "WEBP"
  return next((kind for magic, kind in _FIRST_BYTES if data.startswith(magic)), None)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes one JPEG, PNG, WebP, BMP or single-frame GIF to uint8 [h, w, 3], upright.

  Grey, palette and CMYK images become RGB; 16 bits a channel become 8; transparent pixels are laid over white; the
  EXIF orientation is applied.  The size in the header is checked before a pixel is decoded, because a PNG of one
  megabyte can unfold to a gigabyte.

  Raises:
    BadImage: empty, not an image, truncated, animated, or more than `max_pixels` pixels.
  """
  from PIL import Image, ImageOps

  if not data:
    raise BadImage("empty file")
  kind = sniff(data)
  if kind is None:
    raise BadImage(f"not a jpeg, png, webp, bmp or gif: it begins with {bytes(data[:12])!r}")
  if kind == "JPEG":
    return _decode_jpeg(data, jpeg_header(data, max_pixels=max_pixels)[2])
  try:
    with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
      width, height = picture.size
      if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels in its header, above the limit of {max_pixels}")
      if getattr(picture, "is_animated", False):
        raise BadImage(f"animated {kind.lower()} of {picture.n_frames} frames")
      picture = ImageOps.exif_transpose(picture)
      if picture.mode.startswith("I"):  # 16-bit grey, whatever its byte order
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
      if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
      return np.asarray(picture.convert("RGB"))
  except BadImage:
    raise
  except Image.DecompressionBombError as error:  # Pillow's own limit, of 179 million
    raise BadImage(f"far above the limit of {max_pixels} pixels, by its header: {error}") from error
  except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error and more
    raise BadImage(f"broken {kind.lower()}: {_one_line(error)}") from error


def jpeg_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, int]:
  """(height, width, EXIF orientation 1 to 8) of a JPEG, without decoding it.

  Raises:
    BadImage: more than `max_pixels` pixels, or no header that gives a size.
  """
  at, orientation = 2, 1
  try:
    while True:
      marker, length = struct.unpack_from(">HH", data, at)
      if marker == 0xFFFF:  # a fill byte
        at += 1
      elif marker >> 8 != 0xFF or marker in (0xFFD9, 0xFFDA):
        raise BadImage("broken jpeg: no size in its header")
      elif 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # a start of frame
        height, width = struct.unpack_from(">HH", data, at + 5)
        if width * height > max_pixels:
          raise BadImage(f"{width} x {height} pixels in its header, above the limit of {max_pixels}")
        return height, width, orientation
      elif marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD8:  # those without a length
        at += 2
      else:
        if marker == 0xFFE1 and data[at + 4 : at + 10] == b"Exif\0\0":
          orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
  except struct.error:
    raise BadImage("broken jpeg: it ends inside its header") from None


def _exif_orientation(tiff: bytes) -> int:
  order = "<" if tiff[:2] == b"II" else ">"
  with contextlib.suppress(struct.error):  # a damaged tag does not make the pixels bad
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
      tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
      if tag == _EXIF_ORIENTATION:
        return value if value in _UPRIGHT else 1
  return 1


def _decode_jpeg(data: bytes, orientation: int) -> np.ndarray:
  tf = _tensorflow()
  if b"\xff\xd9" not in data[-1024:]:  # cut off; TensorFlow would find out too, but writes to stderr that it did
    from PIL import Image

    try:
      Image.open(io.BytesIO(data), formats=("JPEG",)).load()
    except Exception as error:
      raise BadImage(f"broken jpeg: {_one_line(error)}") from error
  try:
    # libjpeg-turbo by way of TensorFlow: nearly twice Pillow's speed, without the interpreter's lock, CMYK handled.
    pixels = np.asarray(tf.io.decode_jpeg(data, channels=3))
  except tf.errors.OpError as error:
    raise BadImage(f"broken jpeg: {_one_line(error)}") from error
  return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def _one_line(error: Exception) -> str:
  # TensorFlow prefixes "{{function_node ...}}" and suffixes "[Op:...]".
  text = " ".join(str(getattr(error, "message", error)).split())
  return text.rpartition("}} ")[2].partition(" [Op:")[0][:200] or type(error).__name__


# ---- sources ---------------------------------------------------------------------------------------------------


class Source:
  """Images by number.  `class_names` is empty, and `labels` None, where there are no labels."""

  class_names: Sequence[str] = ()

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def labels(self) -> np.ndarray | None:
    """int32 [N], or None where there are no labels."""
    return None

  def several_labels(self) -> np.ndarray | None:
    """int8 [N, classes] where an image may have several classes: 1, 0, or -1 where it is too difficult to judge."""
    return None

  def __len__(self) -> int:
    raise NotImplementedError

  def name(self, i: int) -> str:
    """What to call image i in a message: its file, or set:index."""
    raise NotImplementedError

  def item(self, i: int) -> tuple[bytes | np.ndarray, int]:
    """(image i as it is stored: the bytes of a file, or uint8 [h, w, 3]; its label or -1); raises BadImage."""
    raise NotImplementedError

  def read(self, i: int) -> np.ndarray:
    """Image i as uint8 [h, w, 3]; raises BadImage."""
    return self.read_labelled(i)[0]

  def read_labelled(self, i: int) -> tuple[np.ndarray, int]:
    """(image i, its label or -1), in one read; raises BadImage."""
    item, label = self.item(i)
    return (decode(item) if isinstance(item, bytes) else item), label


class ArraySource(Source):
  """Images in memory.

  Args:
    images: uint8 [N, h, w], [N, h, w, 1] or [N, h, w, 3]; grey becomes three equal channels when read.
    labels: integers [N] or [N, 1], >= 0, or None.
    class_names: names of the labels; by default their numbers.
    title: what messages call the set.
  """

  def __init__(self, images, labels=None, *, class_names: Sequence[str] = (), title: str = "array"):
    images = np.asarray(images)
    if images.ndim == 3:
      images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
      raise ValueError(
        f"{title}: images are {images.dtype} {list(images.shape)}; give uint8 [N, h, w] or [N, h, w, 3], values 0 to 255"
      )
    if not len(images):
      raise ValueError(f"{title}: holds no images; give at least one")
    if labels is not None:
      labels = np.asarray(labels)
      if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
          f"{title}: labels are {labels.dtype} {list(labels.shape)} for {len(images)} images; give integers >= 0 of"
          f" shape [{len(images)}], or none"
        )
      labels = labels.reshape(-1).astype(np.int32)
      class_names = tuple(class_names) or tuple(str(c) for c in range(int(labels.max()) + 1))
    self.images, self.class_names, self._labels, self._title = images, class_names, labels, title

  @property
  def labels(self):
    return self._labels

  def __len__(self):
    return len(self.images)

  def name(self, i):
    return f"{self._title}:{i}"

  def item(self, i):
    return self.gather(np.asarray([i]))[0], -1 if self._labels is None else int(self._labels[i])

  def gather(self, indices: np.ndarray) -> np.ndarray:
    """The images at int [b] as uint8 [b, h, w, 3]."""
    images = self.images[indices]
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


class Unseen(Source):
  """A data set of which nothing but its size is known, for planning."""

  def __init__(self, num_examples: int, num_classes: int):
    self._num_examples = num_examples
    self.class_names = ("",) * num_classes

  def __len__(self):
    return self._num_examples


class Subset(Source):
  """`count` images of another source, drawn without replacement by `seed`; all of them, as they are, for count 0."""

  def __init__(self, source: Source, count: int, seed: int):
    self._source, self.class_names = source, source.class_names
    chosen = permutation(seed, 0, len(source))[: count or None]
    self._chosen = np.sort(chosen)

  @property
  def labels(self):
    return None if self._source.labels is None else self._source.labels[self._chosen]

  def __len__(self):
    return len(self._chosen)

  def name(self, i):
    return self._source.name(int(self._chosen[i]))

  def item(self, i):
    return self._source.item(int(self._chosen[i]))


class Selection(Subset):
  """The images of another source at `indices` [n], in that order."""

  def __init__(self, source: Source, indices):
    self._source, self.class_names, self._chosen = source, source.class_names, np.asarray(indices)


class Joined(Source):
  """The images of several sources with the same classes, one source after the other."""

  def __init__(self, sources: Sequence[Source]):
    self._sources, self.class_names = tuple(sources), sources[0].class_names
    self._begin = np.cumsum([0, *map(len, sources)])

  @property
  def labels(self):
    return None if self._sources[0].labels is None else np.concatenate([s.labels for s in self._sources])

  def __len__(self):
    return int(self._begin[-1])

  def _locate(self, i):
    part = int(np.searchsorted(self._begin, i, "right")) - 1
    return self._sources[part], int(i - self._begin[part])

  def name(self, i):
    source, j = self._locate(i)
    return source.name(j)

  def item(self, i):
    source, j = self._locate(i)
    return source.item(j)


def class_balanced(labels, fraction: float, seed: int) -> np.ndarray:
  """Sorted indices of a share of every class of labels [n], at least one image of each, drawn by `seed`.

  Of two shares of one seed the smaller is part of the larger.
  """
  chosen = []
  for c in np.unique(labels):
    members = np.flatnonzero(labels == c)
    chosen.append(members[permutation(seed, int(c), len(members))][: max(1, round(fraction * len(members)))])
  return np.sort(np.concatenate(chosen))


class FolderSource(Source):
  """Image files below a folder, in sorted order.

  Every sub-folder (hidden ones apart) is a class, in alphabetical order, and owns the images at any depth below it;
  empty ones count, so that a training and a validation folder number their classes alike.  Without sub-folders, or
  when none holds an image, the images directly inside are unlabelled.  Files without an image's suffix are ignored.
  """

  def __init__(self, path: str):
    self._root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(self._root):
      raise ValueError(f"folder:{path}: there is no folder {self._root}; give the path of a folder of images")
    loose, folders = _scan_folder(self._root)
    self._files, labels = [], []
    for label, folder in enumerate(folders):
      files = _below(self._root, folder)
      self._files += files
      labels += [label] * len(files)
    if self._files and loose:
      raise ValueError(
        f"folder:{path}: holds {len(loose)} images (such as {loose[0]}) beside class folders with images; move them"
        " into class folders, or keep images without labels in a folder of their own"
      )
    if not self._files and not loose:
      raise ValueError(
        f"folder:{path}: no image in {self._root}; expected files ending in {' '.join(IMAGE_SUFFIXES)}, directly"
        " inside or in one sub-folder a class"
      )
    self._labels = np.asarray(labels, np.int32) if self._files else None
    self.class_names = tuple(folders) if self._files else ()
    self._files = self._files or loose

  @property
  def labels(self):
    return self._labels

  def __len__(self):
    return len(self._files)

  def name(self, i):
    return os.path.join(self._root, self._files[i])

  def item(self, i):
    try:
      with open(self.name(i), "rb") as file:
        return file.read(), -1 if self._labels is None else int(self._labels[i])
    except OSError as error:
      raise BadImage(error.strerror or str(error)) from error


def _below(root: str, folder: str) -> list[str]:
  """Sorted paths, from root, of the image files at any depth below a folder of it."""
  files, pending = [], [folder]
  seen = {os.path.realpath(os.path.join(root, folder))}
  while pending:
    here = pending.pop()
    found, below = _scan_folder(os.path.join(root, here))
    files += [os.path.join(here, file) for file in found]
    for sub in (os.path.join(here, sub) for sub in below):
      target = os.path.realpath(os.path.join(root, sub))
      if target not in seen:  # a link may point at one of its parents
        seen.add(target)
        pending.append(sub)
  return sorted(files)


class FilesSource(FolderSource):
  """Every image file at any depth below a folder, in sorted order, without labels; hidden folders are left out."""

  def __init__(self, path: str):
    self._root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(self._root):
      raise ValueError(f"files:{path}: there is no folder {self._root}; give the path of a folder of images")
    self._files, self._labels = _below(self._root, ""), None
    if not self._files:
      raise ValueError(
        f"files:{path}: no image in or below {self._root}; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
      )


def _scan_folder(path: str) -> tuple[list[str], list[str]]:
  """Sorted names of the image files and of the folders directly inside `path`, hidden ones left out."""
  files, folders = [], []
  try:
    with os.scandir(path) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        if entry.is_dir():
          folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
          files.append(entry.name)
  except OSError as error:
    raise ValueError(f"folder:{path}: cannot be listed ({error.strerror}); check that it may be read") from error
  return sorted(files), sorted(folders)


class TfdsSource(Source):
  """A prepared TensorFlow Datasets set, read from its TFRecord shards by byte offset.

  Nothing is shuffled, interleaved or decoded by TFDS: a record is one `pread`, and its encoded image goes through
  `decode`.  The offsets are found once by hopping from record header to record header and kept in a small file
  under $XDG_CACHE_HOME (~/.cache), named after the sizes and times of the shards.

  The labels stand inside the records.  `read_labelled` costs nothing extra; `labels` reads the whole split on its
  first use and then keeps them beside the offsets.
  """

  def __init__(self, rest: str, data_dir: str | None = None):
    import tensorflow_datasets as tfds

    name, _, split = rest.partition(":")
    spec = f"tfds:{rest}"
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    builder = tfds.builder_from_directory(_prepared_folder(spec, name, root))
    info = builder.info
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
      raise ValueError(
        f"{spec}: {builder.data_dir} is stored as {info.file_format.value}, which has no reader here; prepare it with"
        f" tfds build {name} --file_format=tfrecord --data_dir={root}"
      )
    self._all_features = dict(info.features.items())
    self._image_key = _only_feature(spec, info.features, tfds.features.Image, "image")
    self._label_key = _only_feature(spec, info.features, tfds.features.ClassLabel, "label", required=False)
    if self._label_key:
      self.class_names = tuple(info.features[self._label_key].names)
    try:
      instructions = info.splits[split or "train"].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
      raise ValueError(
        f"{spec}: no split {split or 'train'!r} in {builder.data_dir}; it has {', '.join(info.splits)}, and slices"
        " such as train[:10%]"
      ) from error
    self._title = f"tfds:{name}:{split or 'train'}"
    self._shards = [os.fspath(instruction.filename) for instruction in instructions]
    # Offsets and lengths of whole shards are what is cached; a slice of the split is a view of them.
    self._cache = cache_file(spec, self._shards)
    offsets = load_cache(self._cache)
    if offsets is None:
      offsets = scan_tfrecords(self._shards)
      save_cache(self._cache, offsets)
    self._offsets = offsets
    kept = []
    for shard, instruction in enumerate(instructions):
      (rows,) = np.nonzero(offsets["shard"] == shard)
      if len(rows) != instruction.examples_in_shard:
        raise ValueError(
          f"{spec}: {instruction.filename} holds {len(rows)} records, its description says"
          f" {instruction.examples_in_shard}; copy or prepare it again"
        )
      kept.append(rows[instruction.skip :][: instruction.take if instruction.take >= 0 else None])
    self._rows = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    if not len(self._rows):
      raise ValueError(f"{spec}: the split is empty; choose a larger slice of {', '.join(info.splits)}")

  def __len__(self):
    return len(self._rows)

  def name(self, i):
    return f"{self._title}:{i}"

  def item(self, i):
    features = self._features(self._rows[i])
    if self._image_key not in features or not features[self._image_key].bytes_list.value:
      raise BadImage(f"no bytes under {self._image_key!r} in the record")
    return features[self._image_key].bytes_list.value[0], self._label(features)

  @functools.cached_property
  def labels(self):
    if not self._label_key:
      return None
    if "labels" not in self._offsets:
      count = len(self._offsets["shard"])
      labels = (self._label(self._features(row)) for row in range(count))
      self._offsets["labels"] = np.fromiter(labels, np.int32, count)
      save_cache(self._cache, self._offsets)
    return self._offsets["labels"][self._rows]

  def several_labels(self):
    """Where the set has a list of classes an image (PASCAL VOC); a class that `labels` names and
    `labels_no_difficult` does not is there, but too difficult to judge."""
    import tensorflow_datasets as tfds

    feature = self._all_features.get("labels")
    if self._label_key or not isinstance(getattr(feature, "feature", None), tfds.features.ClassLabel):
      return None
    out = np.zeros((len(self), feature.feature.num_classes), np.int8)
    for i, row in enumerate(self._rows):
      features = self._features(row)
      out[i, list(features["labels"].int64_list.value)] = 1
      if "labels_no_difficult" in features:
        easy = set(features["labels_no_difficult"].int64_list.value)
        out[i, [c for c in features["labels"].int64_list.value if c not in easy]] = -1
    return out

  def _label(self, features) -> int:
    return int(features[self._label_key].int64_list.value[0]) if self._label_key else -1

  def _features(self, row):
    """The tf.train.Example at `row`, as a mapping from names to features."""
    import tensorflow as tf

    shard, offset, length = (int(self._offsets[key][row]) for key in ("shard", "offset", "length"))
    record = read_range(self._shards[shard], offset, length)
    try:
      return tf.train.Example.FromString(record).features.feature
    except Exception as error:  # google.protobuf.message.DecodeError, a class of a package we do not depend on
      raise BadImage(f"broken record at byte {offset} of {self._shards[shard]}") from error


def is_remote(path: str) -> bool:
  """True for gs://bucket/... and the like, which TensorFlow reads and the operating system does not."""
  return "://" in path


def read_range(path: str, offset: int, length: int) -> bytes:
  """`length` bytes of a file from byte `offset` on; raises BadImage where the file is gone, cut off or unreadable."""
  try:
    if is_remote(path):
      with epath.Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    else:
      # Opened anew each time: a set may have more shards than a process may have open files.
      file = os.open(path, os.O_RDONLY)
      try:
        data = os.pread(file, length, offset)
      finally:
        os.close(file)
  except Exception as error:  # OSError, and what TensorFlow's file systems raise
    raise BadImage(f"{path}: {getattr(error, 'strerror', None) or _one_line(error)}") from error
  if len(data) != length:
    raise BadImage(f"{path}: ends after {offset + len(data)} bytes, {offset + length} were there before")
  return data


def _prepared_folder(spec: str, name: str, root: str) -> str:
  """The folder of the newest version of the set `name` (name, name/config or with a version) below `root`."""
  base = epath.Path(root) / name
  found = sorted(path.parent for below in ("", "*/", "*/*/") for path in base.glob(f"{below}dataset_info.json"))
  if not found:
    raise ValueError(
      f"{spec}: not prepared under {base}; prepare it once, with network access: tfds build {name} --data_dir={root}"
    )
  configs = sorted({path.parent.name for path in found if path.parent not in (base, base.parent)})
  if len(configs) > 1:
    raise ValueError(f"{spec}: {base} holds several configurations; name one: tfds:{name}/{configs[0]} (of {configs})")
  return os.fspath(max(found, key=lambda path: [int(part) for part in path.name.split(".") if part.isdigit()]))


def _only_feature(spec: str, features, kind: type, usual: str, *, required: bool = True) -> str | None:
  """The name of the feature of this kind: the usual one, or the only one."""
  names = [name for name, feature in features.items() if isinstance(feature, kind)]
  if usual in names:
    return usual
  if len(names) == 1:
    return names[0]
  if required:
    raise ValueError(f"{spec}: has {len(names)} features of kind {kind.__name__} ({list(features)}); one is needed")
  return None


def open_shard(path: str):
  """A shard, opened for hopping through it: unbuffered where it is local."""
  return epath.Path(path).open("rb") if is_remote(path) else open(path, "rb", buffering=0)


def scan_tfrecords(shards: Sequence[str]) -> dict[str, np.ndarray]:
  """Where the records of TFRecord files lie: int32 shard [N], int64 offset [N] and length [N] of the payloads."""
  shard_of, offsets, lengths = [], [], []
  for shard, path in enumerate(shards):
    with open_shard(path) as file:
      size, at = file.seek(0, os.SEEK_END) or file.tell(), 0
      # A record: length (8 bytes, little-endian), its checksum (4), the payload, the payload's checksum (4).
      while at + 12 <= size:
        file.seek(at)
        length = int.from_bytes(file.read(8), "little")
        if at + 16 + length > size:
          break
        shard_of.append(shard)
        offsets.append(at + 12)
        lengths.append(length)
        at += 16 + length
    if at != size:
      raise ValueError(f"{path}: is cut off or damaged after {at} of {size} bytes; copy or prepare it again")
  return {
    "shard": np.asarray(shard_of, np.int32),
    "offset": np.asarray(offsets, np.int64),
    "length": np.asarray(lengths, np.int64),
  }


def cache_file(spec: str, shards: Sequence[str]) -> pathlib.Path:
  try:
    facts = []
    for path in shards:
      status = epath.Path(path).stat() if is_remote(path) else os.stat(path)
      facts.append(
        (path, status.length, status.mtime) if is_remote(path) else (path, status.st_size, status.st_mtime_ns)
      )
  except OSError as error:
    raise ValueError(f"{spec}: cannot read the shard {error.filename} ({error.strerror}); prepare it again") from error
  folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "simclr_jax"
  return folder / f"tfrecord-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"


def load_cache(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except Exception:  # absent, or torn: it is only a cache
    return None


def save_cache(path: pathlib.Path, arrays: dict[str, np.ndarray]):
  temporary = path.with_suffix(f".{os.getpid()}.npz")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(temporary, **arrays)
    os.replace(temporary, path)  # whole or not at all, also when several processes do it at once
  except OSError as error:
    logger.info("no cache of record offsets at %s: %s", path, error)


@functools.lru_cache(maxsize=4)
def _texture_split(split: str, size: int) -> ArraySource:
  seed, count = {"train": (0, 5000), "test": (1, 2000)}[split]
  title = f"textures{'' if size == 32 else size}:{split}"
  return ArraySource(*textures.split(seed, count, size=size), class_names=textures.CLASS_NAMES, title=title)


def _embedded_fashion(split: str) -> ArraySource:
  file = pathlib.Path(__file__).parent / "sets" / "fashion_mnist_12k.npz"
  with np.load(file, allow_pickle=False) as arrays:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
  return ArraySource(images, labels, class_names=FASHION_CLASSES, title=f"fashion:{split}")


def _npz(rest: str) -> ArraySource:
  path, split = (rest, "") if os.path.exists(rest) or ":" not in rest else rest.rsplit(":", 1)
  if not os.path.isfile(path):
    raise ValueError(f"npz:{rest}: there is no file {os.path.abspath(path)}; give the path of an .npz file")
  images_keys, labels_keys = (("images", "x"), ("labels", "y"))
  if split:
    images_keys = (f"{split}_images", f"{split}_x", f"images_{split}", f"x_{split}")
    labels_keys = (f"{split}_labels", f"{split}_y", f"labels_{split}", f"y_{split}")
  try:
    with np.load(path, allow_pickle=False) as arrays:
      present = list(arrays.keys())
      image_key = next((key for key in images_keys if key in present), None)
      label_key = next((key for key in labels_keys if key in present), None)
      images = arrays[image_key] if image_key else None
      labels = arrays[label_key] if label_key else None
  except Exception as error:  # zipfile.BadZipFile, OSError, and ValueError for pickled objects or a plain .npy
    raise ValueError(f"npz:{rest}: cannot read {path} ({_one_line(error)}); save it with numpy.savez") from error
  if images is None:
    raise ValueError(
      f"npz:{rest}: holds the arrays {', '.join(present)}; expected images under {' or '.join(images_keys)} and, if"
      f" any, labels under {' or '.join(labels_keys)}; name another split as npz:FILE:SPLIT"
    )
  return ArraySource(images, labels, title=f"npz:{rest}")


def open_source(spec: str, *, data_dir: str | None = None) -> Source:
  """Opens a data set by name.

  fashion:train|test      the first 10,000 / 2,000 images of Fashion-MNIST, inside this package, 28 pixels, grey
  textures:train|test     5,000 / 2,000 procedural colour images of 32 pixels; textures64: of 64 pixels
  npz:FILE[:SPLIT]        uint8 arrays `images` or `x`, optionally `labels` or `y`; with SPLIT: `SPLIT_images`,
                          `x_SPLIT`, ... and likewise for labels
  folder:PATH             image files, labelled by sub-folder or not at all; see FolderSource
  files:PATH              image files at any depth, without labels; see FilesSource
  tfds:NAME[/CONFIG][:SPLIT]  any prepared TensorFlow Datasets set with an image, e.g. tfds:imagenet2012:train[:10%];
                          looked for in data_dir, else in $TFDS_DATA_DIR, else in ~/tensorflow_datasets
  tfrecord:SHARDS, array_record:SHARDS, webdataset:SHARDS, parquet:SHARDS
                          sharded records, SHARDS a folder or a pattern such as /data/train-*; see shards.py

  Raises:
    ValueError: unknown, missing or empty; the message names the path and the cure.
  """
  kind, _, rest = spec.partition(":")
  if kind in ("fashion", "textures", "textures64"):
    if rest not in ("train", "test"):
      raise ValueError(f"{spec!r} names no split of {kind}: use {kind}:train or {kind}:test")
    return _embedded_fashion(rest) if kind == "fashion" else _texture_split(rest, 64 if kind == "textures64" else 32)
  openers = {
    "npz": _npz,
    "folder": FolderSource,
    "files": FilesSource,
    "tfds": functools.partial(TfdsSource, data_dir=data_dir),
  }
  if rest and kind in ("tfrecord", "array_record", "webdataset", "parquet"):
    from simclr_jax.data import shards

    return shards.FORMATS[kind](rest)
  if not rest or kind not in openers:
    raise ValueError(f"{spec!r} is not a data set: use {SPECS}")
  return openers[kind](rest)


# ---- streams ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of epoch `epoch`: a permutation of range(n), int64 [n], read-only; 8 bytes an image.

  It sorts raw Philox draws, because NumPy keeps the bits of its generators for ever but not the order that its
  shuffles make of them.
  """
  draws = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
  order = np.argsort(draws, kind="stable")
  order.setflags(write=False)
  return order


def example_seeds(seed: int, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
  """Two int32 for every example, a function of (seed, epoch, index) alone: [b], [b] -> int32 [b, 2]."""
  state = np.zeros(np.shape(index), np.uint64)
  for word in (np.uint64(seed % 2**64), epoch, index):
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that mixes all 64 bits.
    state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
  halves = np.stack([state >> np.uint64(32), state & np.uint64(0xFFFFFFFF)], axis=-1)
  return halves.astype(np.uint32).view(np.int32)


class _Reader:
  """Reads examples for the threads of a stream; replaces, counts and names the unreadable ones."""

  def __init__(self, source: Source, max_bad_fraction: float, bad_file=None):
    self.source = source
    self.bad: dict[int, str] = {}
    self._error: Exception | None = None  # the first that ends the stream
    # One damaged file should not stop a run over a small folder, unless the share is set to zero.
    self._allowed = max(1, int(max_bad_fraction * len(source))) if max_bad_fraction > 0 else 0
    self._share = max_bad_fraction
    self._file = epath.Path(bad_file) if bad_file else None
    self._lines = self._file.read_text().splitlines() if self._file and self._file.exists() else []
    self._lock = threading.Lock()

  def read(self, index: int):
    """-> uint8 [h, w, 3], label, index of the image that was read; ValueError where too many are unreadable."""
    i = int(index)
    for _ in range(len(self.source)):
      if i not in self.bad:
        try:
          return *self.source.read_labelled(i), i
        except BadImage as reason:
          self._count(i, str(reason))
      i = (i + 1) % len(self.source)
    raise ValueError(f"all {len(self.bad)} images are unreadable; the first is {self.source.name(0)} ({self.bad[0]})")

  def stored(self, index: int, canvas: int | None):
    """-> bytes, height and width, label and index of an image for TensorFlow to finish.

    A JPEG that needs nothing but decoding is given as it is, its height and width as 0; others as their pixels,
    averaged down to fit on a canvas of that side if there is one.
    """
    if index not in self.bad:
      with contextlib.suppress(BadImage):  # `read` meets it again, and says so
        item, label = self.source.item(index)
        if isinstance(item, bytes) and sniff(item) == "JPEG" and item.endswith(b"\xff\xd9"):
          height, width, orientation = jpeg_header(item)
          if orientation == 1 and max(height, width) <= (canvas or max(height, width)):
            return item, (0, 0), label, index
    image, label, index = self.read(index)
    image = _reduced(image, canvas) if canvas else image
    return image.tobytes(), image.shape[:2], label, index

  def found_bad(self, index) -> bool:
    """Reads the images `index` [n] one by one; whether an unreadable one was among them that was not known."""
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
      self._file.write_text("".join(f"{line}\n" for line in self._lines))
    if count <= 20:
      logger.warning("unreadable image %s: %s; the next image takes its place", name, reason)
    elif count == 21:
      logger.warning("more than 20 unreadable images; the others are counted%s", "" if self._file else " but not named")
    if count == self._allowed + 1:
      self._error = ValueError(
        f"{count} of {len(self.source)} images are unreadable, more than the {self._allowed} allowed by"
        f" max_bad_fraction={self._share:g}; the last is {name} ({reason}): remove or repair them, or"
        " raise max_bad_fraction"
      )


CHUNK = 16  # images that are read in one call of Python
ENDLESS = 2**40  # steps
AHEAD = 2  # batches that are made, or complete, while the loop holds another


def _dataset(
  reader: _Reader, transform: Callable | None, canvas: int | None, draw: Callable, steps: range, workers: int
):
  """The batches of `steps` as a tf.data.Dataset: read in chunks, then image by image decoded and transformed, in order.

  JPEGs are decoded, once, by TensorFlow; whatever else there is, Python has decoded while reading.
  """
  tf, source = _tensorflow(), reader.source
  rows = len(draw(steps.start)[0])
  gathers = isinstance(source, ArraySource)
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
        labels = source.labels
        label = np.full(len(index), -1, np.int32) if labels is None else labels[index]
        images = source.gather(index)
        extent = np.tile(np.asarray(images.shape[1:3], np.int32), (len(index), 1))
        return images, extent, seed, label, index.astype(np.int32)
      items, extent, label, index = zip(*(reader.stored(int(i), canvas) for i in index), strict=True)
      return np.asarray(items, object), np.asarray(extent, np.int32), seed, np.int32(label), np.int32(index)

  def chunks(number):
    tensors = tf.numpy_function(read, [number], [tf.uint8 if gathers else tf.string, *[tf.int32] * 4])
    shapes = [[None, *source.images.shape[1:3], 3] if gathers else [None], [None, 2], [None, 2], [None], [None]]
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
  bad ones noted, and the stream goes on from that step: the step is all the state it has.

  `bad` maps the names of the unreadable images met so far to the reasons.
  """

  def __init__(self, reader: _Reader, transform, canvas, draw, steps: range, workers: int | None):
    self._reader, self._draw, self._steps = reader, functools.lru_cache(maxsize=4)(draw), steps
    workers = workers or _cores()
    self._from = lambda steps: iter(_dataset(reader, transform, canvas, self._draw, steps, workers))
    self._batches = []  # the iterator, if there is one
    # An interpreter that goes while TensorFlow's threads call it may hang.
    weakref.finalize(self, self._batches.clear)
    _tensorflow()

  @property
  def bad(self) -> dict[str, str]:
    return {self._reader.source.name(i): reason for i, reason in dict(self._reader.bad).items()}

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    if not self._steps:
      raise StopIteration
    tf = _tensorflow()
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


def _tensorflow():
  import tensorflow as tf

  # Parallelism is over images; splitting operations as well only costs.  TensorFlow that runs already keeps its own.
  with contextlib.suppress(RuntimeError):
    tf.config.threading.set_intra_op_parallelism_threads(1)
  return tf


def _cores() -> int:
  """The cores this process may use, which on a shared machine are fewer than the machine has."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draws(
  source: Source, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """Which images make the batches of this process, without reading one.

  Arguments as for `train_stream`.  Returns a function, step -> (index int64 [b], seed int32 [b, 2]).
  """
  if batch_size % process_count:
    raise ValueError(f"batch_size={batch_size} cannot be split over {process_count} processes: use a multiple")
  if batch_size > len(source):
    logger.warning(
      "batch_size=%d exceeds the %d images: every batch repeats images, which then count as negatives of themselves",
      batch_size,
      len(source),
    )
  rows = batch_size // process_count

  def draw(step):
    position = step * batch_size + process_index * rows + np.arange(rows)
    epoch, place = np.divmod(position, len(source))
    index = np.empty(rows, np.int64)
    for e in np.unique(epoch):
      index[epoch == e] = permutation(seed, int(e), len(source))[place[epoch == e]]
    return index, example_seeds(seed, epoch, index)

  return draw


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
    transform: a TensorFlow function (image uint8 [h, w, 3], seed int32 [2]) -> tensor or dict of tensors, all its
      randomness taken from the seed; None for images as they are.
    batch_size: images of the global batch; this process reads rows process_index * b to (process_index + 1) * b - 1
      of it, b = batch_size / process_count.
    seed: of the permutations and of the augmentations.
    max_bad_fraction: the share of distinct unreadable images, met by this process, beyond which the stream raises
      ValueError; any positive share allows at least one.
    bad_file: a text file to which the name of, and the reason for, every unreadable image are appended.
    canvas: without a transform, the side of the square on which images of a folder or a set are laid; larger ones are
      averaged down by a whole factor.  Images in memory, all of one size, need none.
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
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  max_bad_fraction: float = 0.001,
  workers: int | None = None,
  begin: int = 0,
  end: int | None = None,
) -> Iterator[dict]:
  """Every image from `begin` to before `end` (default: all) once, in order; of every batch each process reads its rows,
  as in `train_stream`.

  Args:
    transform: a TensorFlow function, image uint8 [h, w, 3] -> tensor.
    batch_size: rows of the global batch.

  Yields:
    Dicts of numpy arrays of batch_size / process_count rows: `image`, what `transform` returned, stacked; `label`
    int32, -1 where there is none; `index` int32; `mask` bool, false in the rows that pad the last batch (they repeat
    the last image, index -1) and in those of unreadable images (which hold the next readable image; `index` is the
    unreadable one).

  Raises:
    ValueError: more than the allowed share of unreadable images, as in `train_stream`.
  """
  reader = _Reader(source, max_bad_fraction)
  if batch_size % process_count:
    raise ValueError(f"batch_size={batch_size} cannot be split over {process_count} processes: use a multiple")
  rows = batch_size // process_count
  end = len(source) if end is None else end
  places = begin + np.arange(-(-(end - begin) // batch_size) * batch_size)
  places = places.reshape(-1, process_count, rows)[:, process_index]
  wanted = np.minimum(places, end - 1)
  no_seed = np.zeros((rows, 2), np.int32)
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
  max_bytes: int = 1 << 30,
  max_bad_fraction: float = 0.001,
  bad_file: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """All images of a source, decoded, for sets that fit on a device.

  Returns:
    (uint8 [N, H, W, 3], heights and widths int32 [N, 2]); images in memory as they are, others in the top left corners
    of squares as large as the largest needs, at most `canvas`.

  Raises:
    ValueError: more than max_bytes.
  """
  if isinstance(source, ArraySource):
    count, shape = len(source), source.images.shape[1:3]
    _check_fits(count, *shape, max_bytes)
    return source.gather(np.arange(count)), np.tile(np.asarray(shape, np.int32), (count, 1))
  reader = _Reader(source, max_bad_fraction, bad_file)
  images = []
  with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
    for image, _, _ in pool.map(reader.read, range(len(source))):
      images.append(image)
      _check_fits(len(source), min(canvas, max(image.shape[:2])), min(canvas, max(image.shape[:2])), max_bytes)
  side = min(canvas, max(max(image.shape[:2]) for image in images))
  canvases, extents = np.zeros((len(images), side, side, 3), np.uint8), np.empty((len(images), 2), np.int32)
  for image, canvas, extent in zip(images, canvases, extents, strict=True):
    small = _reduced(image, side)
    extent[:] = small.shape[:2]
    canvas[: extent[0], : extent[1]] = small
  return canvases, extents


def _check_fits(count, height, width, max_bytes):
  if count * height * width * 3 > max_bytes:
    raise ValueError(
      f"{count} images of {height} x {width} pixels are {count * height * width * 3 / 2**30:.1f} GiB, above the"
      f" {max_bytes / 2**30:.1f} GiB that are kept on a device: use augment.where=device_crop"
    )
