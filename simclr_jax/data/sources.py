"""Data sets with access by index, and sets derived from them: parts, selections, and several sets joined to one."""

import collections
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence

import numpy as np

from simclr_jax.data.decode import BadImage, decode, may_be_deep, one_line, significant_bits
from simclr_jax.data.labels import make_labels
from simclr_jax.data.order import permutation
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

SAMPLE = 32  # images that a look at the contents of a set reads
say_once = functools.cache(logging.getLogger(__name__).warning)


def digest(parts: Iterable) -> str:
  """16 hexadecimal digits that identify a sequence of bytes, strings or arrays."""
  total = hashlib.sha256()
  for part in parts:
    part = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
    part = np.ascontiguousarray(part).reshape(-1).view(np.uint8) if isinstance(part, np.ndarray) else part
    total.update(len(part).to_bytes(8, "little"))
    total.update(part)
  return total.hexdigest()[:16]


def skipped_text(names: Sequence[str]) -> str:
  """How many files were skipped, of which kinds, and one of them; empty for none."""
  if not len(names):
    return ""
  kinds = [os.path.splitext(name)[1].lower() or "without a suffix" for name in names]
  counts = collections.Counter(kinds).most_common()
  example = min(name for name, kind in zip(names, kinds, strict=True) if kind == counts[0][0])
  listed = ", ".join(f"{count:,} {kind}" for kind, count in counts[:5]) + (" and others" if len(counts) > 5 else "")
  are = "file is" if len(names) == 1 else "files are"
  return f"{len(names):,} {are} not read as images ({listed}), such as {files.printable(example)}"


def spread(count: int, most: int) -> np.ndarray:
  """At most `most` numbers below count, int64, evenly spaced."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def by_shard(shards: Sequence[str], shard: np.ndarray, number: np.ndarray) -> dict[str, np.ndarray]:
  """`Source.places` of records [n] that are each a number in a shard."""
  order = np.argsort(shard, kind="stable")
  parts = np.split(number[order], np.searchsorted(shard[order], np.arange(1, len(shards))))
  return {path: part for path, part in zip(shards, parts, strict=True) if len(part)}


class Source:
  """Images with access by index.

  `skipped` names the files that are not images or cannot be read here.  Without labels, `class_names` is empty and `labels` is
  None.  `array_extent` is the height and width of images that are all in memory and of one size, which `gather` then returns;
  it is None for others.
  """

  class_names: Sequence[str] = ()
  array_extent: tuple[int, int] | None = None
  skipped: Sequence[str] = ()

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def labels(self) -> np.ndarray | None:
    """int32 [N], -1 for an image that has none; or None where no image has one."""
    return None

  def several_labels(self) -> np.ndarray | None:
    """int8 [N, classes] if an image may have several classes: 1, 0, or -1 if it is too difficult to judge."""
    return None

  def __len__(self) -> int:
    raise NotImplementedError

  def name(self, i: int) -> str:
    """What to call image i in a message: its file, or set:index."""
    raise NotImplementedError

  def name_in_set(self, i: int) -> str:
    """The same without the folder of the set, which may be moved."""
    return self.name(i)

  def item(self, i: int) -> tuple[bytes | np.ndarray, int]:
    """(image i as it is stored: the bytes of a file, or uint8 [h, w, 3]; its label or -1); raises BadImage."""
    raise NotImplementedError

  def read(self, i: int) -> np.ndarray:
    """Image i as uint8 [h, w, 3]; raises BadImage."""
    return self.read_labeled(i)[0]

  def read_labeled(self, i: int) -> tuple[np.ndarray, int]:
    """(image i, its label or -1), in one read; raises BadImage."""
    item, label = self.item(i)
    return self.decode(item), label

  def decode(self, item: bytes | np.ndarray) -> np.ndarray:
    """A stored image of this set as uint8 [h, w, 3]; raises BadImage."""
    if not isinstance(item, bytes):
      return item
    return decode(item, bits=(may_be_deep(item) and self.bits) or 16)

  @functools.cached_property
  def bits(self) -> int | None:
    """How many of their 16 bits the 16-bit images of this set use: 8, 10, 12, 14 or 16; None without such images.

    Cameras and microscopes write 12 bits into 16-bit files, whose upper 8 bits alone would be nearly black.  All images of a set
    are scaled alike, by the largest value in a fixed sample of them, or by 16 bits if the sample has no 16-bit image.
    """
    found = [significant_bits(item) for item in self._stored_sample() if isinstance(item, bytes)]
    used = max((one for one in found if one), default=None)
    if used is None:
      return None
    bits = next(bits for bits in (8, 10, 12, 14, 16) if bits >= used)
    if bits < 16:
      say_once(f"{self.name(0)} and others of its set: 16-bit images with values up to {bits} bits, scaled as such")
    return bits

  def fingerprint(self) -> dict[str, int | str | list[str]]:
    """Detects whether this set has changed, for `json`: the number of images, the names of the classes, and digests
    of the names and stored sizes, of the labels and of the contents of a fixed sample of the images.
    """
    return {
      "images": len(self),
      "classes": list(self.class_names),
      "names and sizes": digest(self._listing()),
      "labels": digest(self._label_listing()),
      "contents": digest(self._contents()),
    }

  def places(self, rows=None) -> dict[str, np.ndarray]:
    """Where the images, or those at int `rows` [n], lie: {path of a shard or folder, or name of a set of arrays: numbers of the
    records or names of the files in it}; empty where it is not known.  Two sets with a place in common share an image."""
    return {}

  def _listing(self) -> Iterable:
    return map(self.name_in_set, range(len(self)))

  def _label_listing(self) -> Iterable:
    return () if self.labels is None else (self.labels,)

  def _contents(self) -> Iterable:
    return self._stored_sample()

  def _stored_sample(self) -> Iterable[bytes]:
    """A fixed sample of the images as they are stored; no bytes of one that cannot be read."""
    for i in spread(len(self), SAMPLE).tolist():
      try:
        yield self.item(i)[0]
      except BadImage:
        yield b""

  def gather(self, indices: np.ndarray) -> np.ndarray:
    """The images at int [b] as uint8 [b, h, w, 3], of a source with an `array_extent`."""
    raise NotImplementedError


class ArraySource(Source):
  """Images in memory.

  Args:
    images: uint8 [N, h, w], [N, h, w, 1] or [N, h, w, 3]; gray becomes three equal channels when read.
    labels: anything that `make_labels` takes, or None.
    class_names: names of the labels; by default their numbers or strings.
    title: what messages call the set.
    place: the only name of the set, for `places`; empty where it has none.
  """

  def __init__(self, images, labels=None, *, class_names: Sequence[str] = (), title: str = "array", place: str = ""):
    images = np.asarray(images)
    if images.ndim == 3:
      images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
      raise UserError(
        f"{title}: images are {images.dtype} {list(images.shape)}; give uint8 [N, h, w] or [N, h, w, 3], values 0 to 255"
      )
    if not len(images):
      raise UserError(f"{title}: holds no images; give at least one")
    if labels is not None:
      labels, class_names = make_labels(labels, class_names, count=len(images), what=f"{title}: labels")
      if not (labels >= 0).any():
        labels, class_names = None, ()
    self.images, self.class_names, self._labels, self._title = images, class_names, labels, title
    self._place = place
    self.array_extent = images.shape[1:3]

  @property
  def labels(self):
    return self._labels

  def __len__(self):
    return len(self.images)

  def name(self, i):
    return f"{self._title}:{i}"

  def item(self, i):
    return self.gather(np.asarray([i]))[0], -1 if self._labels is None else int(self._labels[i])

  def places(self, rows=None):
    return {self._place: np.arange(len(self)) if rows is None else np.asarray(rows)} if self._place else {}

  def _listing(self):
    return (str(self.images.shape),)

  def _contents(self):
    return (self.images,)

  def gather(self, indices):
    images = self.images[indices]
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


class AbstractSource(Source):
  """A data set of which only the size is known, for planning."""

  def __init__(self, num_examples: int, num_classes: int):
    self._num_examples = num_examples
    self.class_names = ("",) * num_classes

  def __len__(self):
    return self._num_examples


class _Part(Source):
  """Base of sources derived from others; its fingerprint includes theirs, because only they know file sizes and contents."""

  def _sets(self) -> Sequence[Source]:
    raise NotImplementedError

  def fingerprint(self):
    whole = [json.dumps(source.fingerprint(), sort_keys=True) for source in self._sets()]
    return super().fingerprint() | {"files or arrays": digest(whole)}


class Subset(_Part):
  """`count` images of another source, drawn without replacement by `seed`; all of them, as they are, for count 0."""

  def __init__(self, source: Source, count: int, seed: int):
    self._source, self.class_names = source, source.class_names
    chosen = permutation(seed, 0, len(source))[: count or None]
    self._chosen = np.sort(chosen)

  def _sets(self):
    return (self._source,)

  @property
  def labels(self):
    return None if self._source.labels is None else self._source.labels[self._chosen]

  def __len__(self):
    return len(self._chosen)

  def name(self, i):
    return self._source.name(int(self._chosen[i]))

  def name_in_set(self, i):
    return self._source.name_in_set(int(self._chosen[i]))

  @property
  def bits(self):
    return self._source.bits

  def places(self, rows=None):
    return self._source.places(self._chosen if rows is None else self._chosen[rows])

  def item(self, i):
    return self._source.item(int(self._chosen[i]))

  @property
  def array_extent(self):
    return self._source.array_extent

  def gather(self, indices):
    return self._source.gather(self._chosen[indices])


class Selection(Subset):
  """The images of another source at `indices` [n], in that order."""

  def __init__(self, source: Source, indices):
    self._source, self.class_names, self._chosen = source, source.class_names, np.asarray(indices)


def first_readable(source: Source) -> np.ndarray:
  """The first image of a source that can be read, uint8 [h, w, 3].

  Raises:
    UserError: none can.
  """
  reason = "it is empty"
  for i in range(len(source)):
    try:
      return source.read(i)
    except BadImage as error:
      reason = f"the last is {source.name(i)} ({error})"
  raise UserError(f"none of the {len(source)} images can be read: {reason}")


class Relabeled(Selection):
  """A test set with the classes of the training set `train`: class c of the test set is class numbers[c] of the training set,
  or has no label for -1.  16-bit images are scaled as in the training set."""

  def __init__(self, source: Source, numbers, train: Source):
    super().__init__(source, np.arange(len(source)))
    self._train, self._numbers = train, np.append(np.asarray(numbers, np.int32), np.int32(-1))
    self.class_names = train.class_names

  @property
  def bits(self):
    return self._train.bits or self._source.bits

  @property
  def labels(self):
    return None if self._source.labels is None else self._numbers[self._source.labels]

  def fingerprint(self):
    return self._source.fingerprint()

  def item(self, i):
    item, label = self._source.item(i)
    return item, int(self._numbers[label])


class Joined(_Part):
  """The images of several sources with the same classes, one source after the other."""

  def __init__(self, sources: Sequence[Source]):
    self._sources, self.class_names = tuple(sources), sources[0].class_names
    self._begin = np.cumsum([0, *map(len, sources)])

  def _sets(self):
    return self._sources

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

  def name_in_set(self, i):
    source, j = self._locate(i)
    return source.name_in_set(j)

  def item(self, i):
    source, j = self._locate(i)
    return source.item(j)

  def read_labeled(self, i):
    source, j = self._locate(i)
    return source.read_labeled(j)


def class_balanced(labels, fraction: float, seed: int, at_least: int = 1, leave: int = 0) -> np.ndarray:
  """Sorted indices of a fraction of every class of labels [n], drawn by `seed`.

  Of each class at least `at_least` are drawn, if it has them, and at least `leave` are not.  For the same seed, a smaller
  fraction is part of a larger one.  Images without a label, -1, are never included.
  """
  chosen = [np.zeros(0, np.int64)]
  for c in np.unique(labels[labels >= 0]):
    members = np.flatnonzero(labels == c)
    count = min(max(at_least, round(fraction * len(members))), len(members) - leave)
    chosen.append(members[permutation(seed, int(c), len(members))][:count])
  return np.sort(np.concatenate(chosen))


def split_npz(rest: str) -> tuple[str, str]:
  """(path, split or "") of what follows npz:, which is FILE or FILE:SPLIT."""
  bucket, place, name = rest.rpartition("://")
  path, colon, split = name.rpartition(":")
  if not colon or files.expanded(rest).exists():
    return rest, ""
  return f"{bucket}{place}{path}", split


def place_of_npz(path: str, split: str) -> str:
  """The one name of the arrays of a file, however its path is spelled."""
  return f"{path if files.is_remote(path) else os.path.realpath(os.path.expanduser(path))}:{split}"


def open_npz(rest: str) -> ArraySource:
  path, split = split_npz(rest)
  if not files.expanded(path).is_file():
    raise UserError(f"npz:{rest}: there is no file {files.expanded(path)}; give the path of an .npz file")
  images_keys, labels_keys = (("images", "x"), ("labels", "y"))
  if split:
    images_keys = (f"{split}_images", f"{split}_x", f"images_{split}", f"x_{split}")
    labels_keys = (f"{split}_labels", f"{split}_y", f"labels_{split}", f"y_{split}")
  try:
    with files.local(os.path.expanduser(path)) as local, np.load(local, allow_pickle=False) as arrays:
      present = list(arrays.keys())
      image_key = next((key for key in images_keys if key in present), None)
      label_key = next((key for key in labels_keys if key in present), None)
      images = arrays[image_key] if image_key else None
      labels = arrays[label_key] if label_key else None
      class_names = arrays["class_names"].tolist() if "class_names" in present and label_key else ()
  except Exception as error:  # zipfile.BadZipFile, OSError, and ValueError for pickled objects or a plain .npy
    raise UserError(f"npz:{rest}: cannot read {path} ({one_line(error)}); save it with numpy.savez") from error
  if images is None:
    raise UserError(
      f"npz:{rest}: holds the arrays {', '.join(present)}; expected images under {' or '.join(images_keys)} and, if"
      f" any, labels under {' or '.join(labels_keys)}; name another split as npz:FILE:SPLIT"
    )
  return ArraySource(images, labels, class_names=class_names, title=f"npz:{rest}", place=place_of_npz(path, split))
