"""Records inside large files: where they lie, found once and cached, and reading one of them."""

import contextlib
import hashlib
import io
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from simclr_jax.data.crc import masked_crc, masked_crcs
from simclr_jax.data.decode import MAX_BYTES, BadImage, ReadError, one_line
from simclr_jax.runtime import files, watchdog
from simclr_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)


CACHE_VERSION = 4  # of what is kept
THREADS = 64  # that read the shards of a bucket, where a request takes tens of milliseconds
BLOCK = 1 << 22  # bytes of one request of them: an ImageNet shard of 140 MB takes 35 instead of 1,250
SAVE = 10.0  # seconds after which what was found so far is saved


def read_range(path: str, offset: int, length: int, seen: tuple, read_part=None) -> bytes:
  """`length` bytes of a file from byte `offset` on; raises ReadError if the file is gone, truncated or unreadable, or if it is
  in a bucket and its version is no longer `seen`.

  A length that no image can have, as in a sparse file, is a BadImage.

  Args:
    read_part: by default `files.read_part`.
  """
  if length > MAX_BYTES:
    raise BadImage(f"{length:,} bytes, above the limit of {MAX_BYTES:,} for an image")
  try:
    data = (read_part or files.read_part)(path, offset, length, seen)
  except OSError as error:
    raise ReadError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
  if len(data) != length:
    raise ReadError(f"{path}: ends after {offset + len(data)} bytes, {offset + length} were there before")
  return data


def open_shard(path: str, seen: tuple | None = None):
  """A shard, opened to be read from front to back: a local one without a buffer, since most of it is passed over; one in a
  bucket in blocks of BLOCK bytes, of the version `seen` or of the present one."""
  if not files.is_remote(path):
    return open(path, "rb", buffering=0)
  return io.BufferedReader(_Object(path, seen or files.version(path)), BLOCK)


class _Object(io.RawIOBase):
  """An object in a bucket, which its generation tells from what is written in its place; each read is a request."""

  def __init__(self, path, seen):
    self._path, self._seen, self._at = path, seen, 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def seek(self, offset, whence=os.SEEK_SET):
    self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._seen[0]}[whence]
    return self._at

  def readinto(self, buffer):
    length = max(min(len(buffer), self._seen[0] - self._at), 0)
    found = files.read_part(self._path, self._at, length, self._seen) if length else b""
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)


def refuse_gzip(path: str, file):
  """Raises UserError for a compressed shard, in which no record can be read without everything before it."""
  file.seek(0)
  if file.read(3) == b"\x1f\x8b\x08":
    raise UserError(
      f"{path}: is compressed with GZIP, so single records cannot be read; decompress it once with gunzip"
    )
  file.seek(0)


def read_record(path: str, offset: int, length: int, seen: tuple, read_part=None) -> bytes:
  """The payload of a TFRecord record; raises BadImage if its checksum does not match, and ReadError as `read_range`."""
  stored = read_range(path, offset, length + 4, seen, read_part)
  data, checksum = stored[:length], int.from_bytes(stored[length:], "little")
  if masked_crc(data) != checksum:
    raise BadImage(f"{path}: the record at byte {offset} is damaged (its checksum does not match)")
  return data


@contextlib.contextmanager
def _mapping(shards: Sequence[str]):
  """`map`; for shards of a bucket one that calls the function in THREADS threads."""
  if not any(map(files.is_remote, shards)):
    yield map
    return
  pool = futures.ThreadPoolExecutor(THREADS)
  try:
    yield pool.map
  finally:
    pool.shutdown(cancel_futures=True)


def _of_shards(shards: Sequence[str], of_shard: Callable[[int], dict], begun: pathlib.Path) -> list[dict]:
  """[of_shard(0), of_shard(1), ...], dicts of arrays; those of a bucket many at the same time.

  What is done is saved in the file `begun` every SAVE seconds, and when this ends with an error.  The next call goes on there.
  """
  found = [{} for _ in shards]
  for name, array in (load_cache(begun) or {}).items():
    shard, _, key = name.partition("/")
    found[int(shard)][key] = array
  rest = [shard for shard, arrays in enumerate(found) if not arrays]

  def save():
    save_cache(begun, {f"{shard}/{key}": array for shard, arrays in enumerate(found) for key, array in arrays.items()})

  saved = time.monotonic()
  try:
    with _mapping(shards) as mapped:
      for shard, arrays in zip(rest, mapped(of_shard, rest), strict=True):
        found[shard] = arrays
        if threading.current_thread() is threading.main_thread():
          watchdog.set_phase("start")  # a large set may take longer than any phase
        if time.monotonic() > saved + SAVE:
          save()
          saved = time.monotonic()
  except BaseException:
    if any(found):
      save()
    raise
  with contextlib.suppress(OSError):
    begun.unlink(missing_ok=True)
  return found


def scan(shards: Sequence[str], of_shard: Callable[[str], dict], cache: pathlib.Path) -> dict[str, np.ndarray]:
  """Where the records of some shards lie.

  Args:
    of_shard: the path of a shard -> arrays, of which the first has an entry for each record.
    cache: what `cache_file` says; what is found of some shards is kept beside it until all are done.

  Returns:
    the arrays of all shards, one after the other, and int32 `shard` [N], the number of each record's.
  """
  found = _of_shards(shards, lambda number: of_shard(shards[number]), cache.with_name(f"{cache.stem}-scan.npz"))
  counts = [len(next(iter(arrays.values()))) for arrays in found]
  joined = {key: np.concatenate([arrays[key] for arrays in found]) for key in found[0]}
  return {"shard": np.repeat(np.arange(len(shards), dtype=np.int32), counts), **joined}


def scan_tfrecords(shards: Sequence[str], cache: pathlib.Path) -> dict[str, np.ndarray]:
  """Where the records of TFRecord files lie: int32 shard [N], int64 offset [N] and length [N] of the payloads.

  The checksums of the lengths are verified here, those of the payloads when they are read.

  Raises:
    UserError: a shard is cut off, damaged, compressed or cannot be read.
  """
  return scan(shards, scan_tfrecord, cache)


def scan_tfrecord(path: str) -> dict[str, np.ndarray]:
  headers, places = [], []
  try:
    with open_shard(path) as file:
      size, at = file.seek(0, os.SEEK_END), 0
      # A record: length (8 bytes, little-endian), its checksum (4), the payload, the payload's checksum (4).
      while at + 12 <= size:
        file.seek(at)
        header = file.read(12)
        headers.append(header)
        places.append(at)
        at += 16 + int.from_bytes(header[:8], "little")
      rows = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, 12)
      wrong = np.flatnonzero(masked_crcs(rows[:, :8]) != rows[:, 8:].copy().view("<u4")[:, 0])
      if len(wrong) and not wrong[0]:
        refuse_gzip(path, file)
  except UserError:
    raise
  except Exception as error:  # OSError, a short read
    raise UserError(f"{path}: cannot be read ({one_line(error)}); try again when it is readable") from error
  if len(wrong) or at != size:
    at = places[wrong[0]] if len(wrong) else places[-1] if at > size else at
    raise UserError(f"{path}: is cut off or damaged after {at} of {size} bytes; copy or prepare it again")
  lengths = rows[:, :8].copy().view("<u8")[:, 0].astype(np.int64)
  return {"offset": np.asarray(places, np.int64) + 12, "length": lengths}


def versions(spec: str, shards: Sequence[str]) -> list[tuple]:
  """`files.version` of every shard."""

  def version(path):
    try:
      return files.version(path)
    except OSError as error:
      raise UserError(f"{spec}: cannot read the shard {path} ({one_line(error)}); prepare it again") from error

  with _mapping(shards) as mapped:
    return list(mapped(version, shards))


def cache_file(kind: str, shards: Sequence[str], seen: Sequence[tuple]) -> pathlib.Path:
  """Where the facts about shards of these versions are cached, which are others when they are read as another kind."""
  facts = [CACHE_VERSION, kind, *zip(shards, seen, strict=True)]
  return files.user_cache() / f"tfrecord-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"


def read_labels(spec: str, indices: Sequence[int], label: Callable[[int], object]) -> np.ndarray:
  """`label` of the records at some indices, as integers or texts, for the cache and for `make_labels`.

  A damaged record has no label: -1.

  Raises:
    UserError: a record cannot be read at the moment, so nothing may be cached.
  """
  found = []
  for i in indices:
    try:
      found.append(label(i))
    except ReadError as error:
      raise _unreadable(spec, error) from error
    except BadImage:
      found.append(None)
  if any(isinstance(one, str) for one in found) or max((one for one in found if one is not None), default=0) >= 2**63:
    return np.asarray(["" if one is None else str(one) for one in found], np.str_)
  return np.asarray([-1 if one is None else one for one in found], np.int64)


def _unreadable(spec: str, error) -> UserError:
  return UserError(f"{spec}: the labels cannot be read ({error}); try again when the file is readable")


def read_tfrecord_labels(
  spec: str, shards: Sequence[str], seen: Sequence[tuple], facts: dict, cache: pathlib.Path, label
) -> np.ndarray:
  """`label(payload, i)` of every record i, as `read_labels`; each shard is read from front to back.

  Args:
    seen: the versions of the shards, with which `facts`, what `scan_tfrecords` returned, were found.
    cache: what `cache_file` says.
  """

  def of_shard(number):
    path, rows = shards[number], range(*np.searchsorted(facts["shard"], [number, number + 1]).tolist())
    try:
      with open_shard(path, seen[number]) as file:

        def read_part(path, begin, length, seen):
          file.seek(begin)
          return file.read(length)

        def of_record(i):
          offset, length = int(facts["offset"][i]), int(facts["length"][i])
          return label(read_record(path, offset, length, seen[number], read_part), i)

        return {"label": read_labels(spec, rows, of_record)}
    except OSError as error:
      raise _unreadable(spec, f"{path}: {one_line(error)}") from error

  found = _of_shards(shards, of_shard, cache.with_name(f"{cache.stem}-labels.npz"))
  return np.concatenate([arrays["label"] for arrays in found])


def parse_example(record: bytes):
  """A serialized tf.train.Example as a mapping from names to features; raises BadImage."""
  import tensorflow as tf

  try:
    return tf.train.Example.FromString(record).features.feature
  except Exception as error:  # google.protobuf.message.DecodeError, a class of a package we do not depend on
    raise BadImage("broken record") from error


def plain_label(value, what: str) -> int | str | None:
  """The label that a record holds, whatever type it is stored in: a number, a string, or None.

  Raises:
    UserError: a number with a fraction, or a list that is not one-hot.
  """
  if isinstance(value, list | tuple | np.ndarray) and len(value) > 1:
    if not set(value) <= {0, 1} or sum(value) > 1:
      raise UserError(f"{what}: its label is a list of {len(value)} values; expected a single one, or a one-hot row")
    return list(value).index(1) if sum(value) else None
  if isinstance(value, list | tuple | np.ndarray):
    value = value[0] if len(value) else None
  if isinstance(value, bytes):
    return files.printable(value.decode("utf-8", "surrogateescape"))
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, float) and value != value:  # how tables store a number that is missing
    return None
  if isinstance(value, float) and not value.is_integer() or value != int(value):
    raise UserError(f"{what}: its label is {value}; expected a whole number or a string")
  return int(value)


def load_cache(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except Exception:  # absent, or torn: it is only a cache
    return None


def save_cache(path: pathlib.Path, arrays: dict[str, np.ndarray]):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())
  except OSError as error:
    logger.info("no cache of record offsets at %s: %s", path, error)
