"""Sharded sets of encoded images: TFRecord, array_record, WebDataset tars, Parquet.

All are random access: where each record lies is found once, by hopping from header to header, and kept in a small file
in the user's cache, named after the sizes and times of the shards.  So `train_stream` gives these sets the same as all
others: a permutation of the whole set in each epoch, and batches that are a function of (seed, step).
"""

import collections
import functools
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable, Sequence

import numpy as np

from simclr_jax.data.crc import masked_crc
from simclr_jax.data.decode import IMAGE_SUFFIXES, BadImage, ReadError, is_junk, one_line
from simclr_jax.data.labels import make_labels
from simclr_jax.data.records import (
  cache_file,
  load_cache,
  open_shard,
  parse_example,
  plain_label,
  read_labels,
  read_range,
  read_record,
  read_tfrecord_labels,
  refuse_gzip,
  save_cache,
  scan,
  scan_tfrecord,
  versions,
)
from simclr_jax.data.sources import Source, by_shard, say_once, skipped_text
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

IMAGE_KEYS = ("image/encoded", "image", "jpg", "jpeg", "png", "webp", "img", "bytes")
LABEL_KEYS = ("image/class/label", "label", "cls", "class", "target")
CLASSES = "classes.json"  # beside the shards, names of the labels; `simclr data prepare` writes it


def find(kind: str, rest: str, suffixes: Sequence[str]) -> list[str]:
  """The files that `rest`, a file, a folder or a pattern, means, sorted.

  Raises:
    ValueError: there are none, or a folder lacks some of those that the names of the others speak of.
  """
  path = files.expanded(rest)
  if path.is_dir():
    ending = re.compile("(" + "|".join(re.escape(suffix) for suffix in suffixes) + r")(-\d+-of-\d+)?$")
    found = [p for p in path.iterdir() if ending.search(p.name) and not is_junk("", p.name)]
    _check_whole(f"{kind}:{rest}", [p.name for p in found])
  else:
    found = [path] if path.is_file() else [p for p in path.parent.glob(path.name) if not is_junk("", p.name)]
  if not found:
    raise UserError(
      f"{kind}:{rest}: no shards there; give a folder with *{suffixes[0]}* files, or a pattern such as"
      f" {kind}:/data/train-*"
    )
  return sorted(os.fspath(p) for p in found)


def _check_whole(spec: str, names: Sequence[str]):
  """Raises UserError if some of the shards that are called images-00003-of-00010.tfrecord or the like are missing: what is
  there may lack whole classes."""
  sets = collections.defaultdict(list)
  for name in names:
    if match := re.fullmatch(r"(.*-)\d+-of-(\d+)(.*)", name):
      sets[match.groups()].append(name)
  for (_, count, _), there in sets.items():
    if len(there) < int(count):
      raise UserError(
        f"{spec}: {len(there):,} of {int(count):,} shards are there, such as {min(there)}; prepare or copy the others, or name"
        f" these with a pattern, as {spec.rstrip('/')}/*"
      )


class ShardSource(Source):
  """What the four have in common.  `_facts` are cached arrays with one entry per record, and what was `skipped`.

  `of_shard` is that of `records.scan`.
  """

  def __init__(self, kind: str, rest: str, suffixes: Sequence[str], of_shard: Callable[[str], dict]):
    self._spec, self._shards = f"{kind}:{rest}", find(kind, rest, suffixes)
    self._lock, self._made = threading.Lock(), None
    self._seen = versions(self._spec, self._shards)
    self._cache = cache_file(kind, self._shards, self._seen)
    self._facts = load_cache(self._cache)
    if self._facts is None:
      self._facts = scan(self._shards, of_shard, self._cache)
      save_cache(self._cache, self._facts)
    self.skipped = self._facts.get("skipped", np.asarray([], np.str_)).tolist()
    said = skipped_text(self.skipped)
    if not len(self._facts["shard"]):
      raise UserError(
        f"{self._spec}: {len(self._shards)} shards without a single image; name others" + (f"; {said}" if said else "")
      )
    if said:
      say_once(f"{self._spec}: {said}")

  def __len__(self):
    return len(self._facts["shard"])

  def places(self, rows=None):
    shard = self._facts["shard"]
    rows = np.arange(len(shard)) if rows is None else np.asarray(rows)
    names = [path if files.is_remote(path) else os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in self._shards]  # fmt: skip
    return by_shard(names, shard[rows], rows - np.searchsorted(shard, shard[rows]))

  def name(self, i):
    return files.printable(f"{self._shards[self._facts['shard'][i]]}:{i}")

  def name_in_set(self, i):
    return self.name(i).removeprefix(f"{files.printable(os.path.dirname(self._shards[0]))}/")

  def _classes(self):
    """(int32 [N] or None, names of the classes), from the cache; else the whole set is read once."""
    with self._lock:  # the threads of a stream
      if self._made is None:
        self._made = self._make_classes()
    return self._made

  def _make_classes(self):
    if "label" not in self._facts:
      self._facts["label"] = self._read_labels()
      save_cache(self._cache, self._facts)
    labels, names = make_labels(self._facts["label"], self._known_names(), what=f"{self._spec}: labels")
    return (labels, names) if (labels >= 0).any() else (None, ())

  def _known_names(self) -> Sequence[str]:
    """The names of the classes, where the set says them."""
    listed = files.absolute(self._shards[0]).parent / CLASSES
    if not listed.exists():
      return ()
    try:
      names = json.loads(files.read_text(listed))
    except ValueError:
      names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise UserError(f"{listed}: expected a list of the names of the classes in JSON; correct it, or delete it")
    return names

  def _read_labels(self) -> np.ndarray:
    return read_labels(self._spec, range(len(self)), lambda i: self._record(i)[1])

  @property
  def labels(self):
    return self._classes()[0]

  @property
  def class_names(self):
    return self._classes()[1]

  def item(self, i):
    return self._record(i)[0], -1 if self.labels is None else int(self.labels[i])

  def _listing(self):
    return *map(os.path.basename, self._shards), *(self._facts[key] for key in sorted(self._facts) if key != "label")

  def _record(self, i) -> tuple[bytes, int | str | None]:
    """(the encoded image, the label as it is stored); raises BadImage."""
    raise NotImplementedError


class _Examples(ShardSource):
  """Records that are serialized tf.train.Example messages: bytes under one of IMAGE_KEYS, a label of LABEL_KEYS."""

  def _record(self, i):
    return self._parsed(self._bytes(i), i)

  def _parsed(self, record, i):
    features = parse_example(record)
    found = next((key for key in IMAGE_KEYS if key in features and features[key].bytes_list.value), None)
    if found is None:
      raise BadImage(
        f"no image under {', '.join(IMAGE_KEYS)}; the record has {', '.join(sorted(features)) or 'nothing'}"
      )
    stored = next((features[key] for key in LABEL_KEYS if key in features), None)
    label = None if stored is None else getattr(stored, stored.WhichOneof("kind") or "int64_list").value
    return features[found].bytes_list.value[0], plain_label(list(label or ()), self.name(i))

  def _bytes(self, i) -> bytes:
    raise NotImplementedError


class TFRecordSource(_Examples):
  """TFRecord files, uncompressed."""

  def __init__(self, rest):
    super().__init__("tfrecord", rest, (".tfrecord", ".tfrecords"), scan_tfrecord)

  def _bytes(self, i):
    return read_record(*self._where(i))

  def _where(self, i):
    shard, offset, length = (int(self._facts[key][i]) for key in ("shard", "offset", "length"))
    return self._shards[shard], offset, length, self._seen[shard]

  def _read_labels(self):
    where = self._shards, self._seen, self._facts, self._cache
    return read_tfrecord_labels(self._spec, *where, lambda record, i: self._parsed(record, i)[1])


class ArrayRecordSource(_Examples):
  """array_record files; they know their own positions."""

  def __init__(self, rest):
    from array_record.python import array_record_module

    def of_shard(path):
      reader = array_record_module.ArrayRecordReader(path)
      if not reader.ok():
        raise UserError(f"array_record:{rest}: {path} is not an array_record file, or damaged")
      count = reader.num_records()
      reader.close()
      return {"place": np.arange(count, dtype=np.int64)}

    super().__init__("array_record", rest, (".array_record",), of_shard)
    self._open = array_record_module.ArrayRecordReader
    self._local = threading.local()

  def _bytes(self, i):
    path = self._shards[self._facts["shard"][i]]
    # A reader a thread and shard; a file that has gone since is still open, and so still readable.
    readers = self._local.__dict__
    if path not in readers:
      if len(readers) > 64:
        readers.clear()
      readers[path] = self._open(path)
    try:
      return readers[path].read([int(self._facts["place"][i])])[0]
    except Exception as error:  # ValueError, IndexError, SystemError: pybind's choice
      readers.pop(path, None)
      raise ReadError(f"{path}: record {self._facts['place'][i]} cannot be read") from error


class WebDatasetSource(ShardSource):
  """Tar files whose members share a path up to the first dot of the base name: 0001.jpg with 0001.cls.

  A .cls file holds a number, or the name of a class.  An image with a longer ending than another of its sample, such as a mask
  0001.mask.png beside 0001.jpg, is skipped.
  """

  def __init__(self, rest):
    super().__init__("webdataset", rest, (".tar",), functools.partial(_scan_tar, f"webdataset:{rest}"))

  def name(self, i):
    return files.printable(f"{self._shards[self._facts['shard'][i]]}:{self._facts['name'][i]}")

  def _record(self, i):
    shard, offset, length = (int(self._facts[key][i]) for key in ("shard", "offset", "length"))
    return read_range(self._shards[shard], offset, length, self._seen[shard]), self._facts["label"][i]


def _scan_tar(spec, path):
  labels, images, others, links = {}, [], {}, []
  try:
    with open_shard(path) as file:
      if file.seek(0, os.SEEK_END):  # else it is empty, which tarfile takes for damage
        refuse_gzip(path, file)
        with tarfile.open(fileobj=file, mode="r:") as tar:
          for member in tar:
            folder, name = os.path.split(member.name.removeprefix("./"))
            if (member.islnk() or member.issym()) and name.lower().endswith(IMAGE_SUFFIXES):
              links.append(member.name)
            if not member.isfile() or is_junk(folder, name):
              continue
            key, _, ending = name.partition(".")
            key = os.path.join(folder, key)
            if f".{ending.lower()}".endswith(IMAGE_SUFFIXES):
              images.append((key, member.name, member.offset_data, member.size, ending.count(".")))
              continue
            others.setdefault(key, member.name)
            if ending.lower() == "cls":
              labels[key] = tar.extractfile(member).read().decode("utf-8", "surrogateescape")
              labels[key] = files.printable(labels[key].strip())
          # After a damaged header tarfile takes what it has found for all there is.
          file.seek(tar.offset)
          if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")
  except (tarfile.TarError, ValueError) as error:
    raise UserError(f"{spec}: {path} is not a plain tar file, or damaged ({error}); make it again") from error
  except OSError as error:
    raise UserError(f"{spec}: {path} cannot be read ({one_line(error)}); try again when it is readable") from error
  whole = {}  # key -> its image: of 0001.jpg and 0001.mask.png the first, whatever their order
  skipped = []
  for image in sorted(images, key=lambda image: image[-1]):
    if (other := whole.setdefault(image[0], image)) is image:
      continue
    if other[-1] == image[-1]:
      raise UserError(
        f"{spec}: {path} has several images of one sample, {other[1]} and {image[1]}: make shards with one of them"
      )
    skipped.append(image[1])
  skipped += [name for key, name in others.items() if key not in whole] + links
  rows = [(name, offset, size, labels.get(key, "")) for key, name, offset, size, _ in images if whole[key][1] == name]
  columns = list(zip(*rows, strict=True)) or [()] * 4
  kinds = {"name": np.str_, "offset": np.int64, "length": np.int64, "label": np.str_}
  facts = {name: np.asarray(column, kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)}
  return {**facts, "skipped": np.asarray(skipped, np.str_)}


class ParquetSource(ShardSource):
  """Parquet files with a column of encoded images, as bytes or as Hugging Face's struct of bytes and path; the names of
  the classes are those of its metadata.

  Parquet reads whole row groups, so a random image costs its group.  The groups of the last few images are kept, but
  for fast training, convert the set to records once with simclr data prepare.  Needs pyarrow.
  """

  def __init__(self, rest):
    try:
      import pyarrow.parquet as parquet
    except ImportError as error:
      raise UserError(f"parquet:{rest}: needs pyarrow; pip install pyarrow") from error
    self._parquet, spec = parquet, f"parquet:{rest}"

    def of_shard(path):
      group, place = [], []
      try:
        file = parquet.ParquetFile(path)
      except Exception as error:  # pyarrow.ArrowInvalid, OSError
        raise UserError(f"{spec}: {path} is not a Parquet file, or damaged; make it again") from error
      for k in range(file.num_row_groups):
        rows = file.metadata.row_group(k).num_rows
        group += [k] * rows
        place += range(rows)
      return {"group": np.asarray(group, np.int32), "place": np.asarray(place, np.int64)}

    super().__init__("parquet", rest, (".parquet",), of_shard)
    names = parquet.ParquetFile(self._shards[0]).schema_arrow.names
    self._image = next((key for key in IMAGE_KEYS if key in names), None)
    if self._image is None:
      raise UserError(f"{spec}: columns {', '.join(names)}; one of {', '.join(IMAGE_KEYS)} is needed")
    self._label_column = next((key for key in LABEL_KEYS if key in names), None)
    self._group = functools.lru_cache(maxsize=8)(self._read_group)

  def _read_group(self, shard, group):
    path = self._shards[shard]
    try:
      return self._parquet.ParquetFile(path).read_row_group(group, columns=[self._image])
    except Exception as error:  # pyarrow.ArrowException and OSError
      raise ReadError(f"{path}: row group {group} cannot be read") from error

  def _known_names(self):
    stored = self._parquet.read_schema(self._shards[0]).metadata or {}
    features = json.loads(stored.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return super()._known_names() or (features.get(self._label_column) or {}).get("names") or ()

  def _read_labels(self):
    if not self._label_column:
      return np.full(len(self), -1, np.int64)
    columns = []
    for path in self._shards:
      try:
        columns += self._parquet.read_table(path, columns=[self._label_column])[self._label_column].to_pylist()
      except Exception as error:  # pyarrow.ArrowException and OSError
        raise UserError(f"{self._spec}: {path}: the labels cannot be read ({one_line(error)}); try again") from error
    return read_labels(self._spec, range(len(self)), lambda i: plain_label(columns[i], self.name(i)))

  def _record(self, i):
    shard, group, place = (int(self._facts[key][i]) for key in ("shard", "group", "place"))
    table = self._group(shard, group)
    image = table[self._image][place].as_py()
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
      raise BadImage(f"no bytes in column {self._image}")
    return image, None


def write_tfrecord(path: str, items) -> int:
  """Writes (image bytes, label or -1, name) as tf.train.Example records, completely or not at all; returns their number.

  A shard is held in memory, because TensorFlow's own writer accesses buckets in a different way than the reader here.
  """
  import tensorflow as tf

  def feature(value):
    if isinstance(value, bytes):
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  parts = []
  for image, label, name in items:
    features = {"image/encoded": feature(image), "image/filename": feature(name.encode("utf-8", "surrogateescape"))}
    if label >= 0:
      features["image/class/label"] = feature(int(label))
    record = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    length = len(record).to_bytes(8, "little")
    parts += [length, masked_crc(length).to_bytes(4, "little"), record, masked_crc(record).to_bytes(4, "little")]
  files.write_bytes(path, b"".join(parts))
  return len(parts) // 4
