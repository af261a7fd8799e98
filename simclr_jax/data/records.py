"""Records inside large files: where they lie, found once and cached, and reading one of them."""

import hashlib
import io
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from simclr_jax.data.crc import masked_crc, masked_crcs
from simclr_jax.data.decode import MAX_BYTES, BadImage, one_line
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)


CACHE_VERSION = 4  # of what is kept


class ReadError(BadImage):
  """Bytes cannot be read at the moment; the record may be intact."""


def read_range(path: str, offset: int, length: int, seen: tuple) -> bytes:
  """`length` bytes of a file from byte `offset` on; raises ReadError if the file is gone, truncated or unreadable, or if it is
  in a bucket and its version is no longer `seen`.

  A length that no image can have, as in a sparse file, is a BadImage.
  """
  if length > MAX_BYTES:
    raise BadImage(f"{length:,} bytes, above the limit of {MAX_BYTES:,} for an image")
  try:
    data = files.read_part(path, offset, length, seen)
  except OSError as error:
    raise ReadError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
  if len(data) != length:
    raise ReadError(f"{path}: ends after {offset + len(data)} bytes, {offset + length} were there before")
  return data


def open_shard(path: str):
  """A shard, opened for random access: unbuffered if it is local."""
  return files.absolute(path).open("rb") if files.is_remote(path) else open(path, "rb", buffering=0)


def refuse_gzip(path: str, file):
  """Raises UserError for a compressed shard, in which no record can be read without everything before it."""
  file.seek(0)
  if file.read(3) == b"\x1f\x8b\x08":
    raise UserError(
      f"{path}: is compressed with GZIP, so single records cannot be read; decompress it once with gunzip"
    )
  file.seek(0)


def read_record(path: str, offset: int, length: int, seen: tuple) -> bytes:
  """The payload of a TFRecord record; raises BadImage if its checksum does not match, and ReadError as `read_range`."""
  stored = read_range(path, offset, length + 4, seen)
  data, checksum = stored[:length], int.from_bytes(stored[length:], "little")
  if masked_crc(data) != checksum:
    raise BadImage(f"{path}: the record at byte {offset} is damaged (its checksum does not match)")
  return data


def scan_tfrecords(shards: Sequence[str]) -> dict[str, np.ndarray]:
  """Where the records of TFRecord files lie: int32 shard [N], int64 offset [N] and length [N] of the payloads.

  The checksums of the lengths are verified here, those of the payloads when they are read.

  Raises:
    UserError: a shard is cut off, damaged, compressed or cannot be read.
  """
  shard_of, offsets, lengths = [], [], []
  for shard, path in enumerate(shards):
    headers, places = [], []
    try:
      with open_shard(path) as file:
        size, at = file.seek(0, os.SEEK_END) or file.tell(), 0
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
    shard_of += [shard] * len(places)
    offsets += [place + 12 for place in places]
    lengths += rows[:, :8].copy().view("<u8")[:, 0].tolist()
  return {
    "shard": np.asarray(shard_of, np.int32),
    "offset": np.asarray(offsets, np.int64),
    "length": np.asarray(lengths, np.int64),
  }


def versions(spec: str, shards: Sequence[str]) -> list[tuple]:
  """`files.version` of every shard."""
  found = []
  for path in shards:
    try:
      found.append(files.version(path))
    except OSError as error:
      raise UserError(f"{spec}: cannot read the shard {path} ({one_line(error)}); prepare it again") from error
  return found


def cache_file(shards: Sequence[str], seen: Sequence[tuple]) -> pathlib.Path:
  """Where the facts about shards of these versions are cached."""
  facts = [CACHE_VERSION, *zip(shards, seen, strict=True)]
  return files.user_cache() / f"tfrecord-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"


def read_labels(spec: str, count: int, label: Callable[[int], object]) -> np.ndarray:
  """`label` of every record from 0 to before count, as integers or texts [count], for the cache and for `make_labels`.

  A damaged record has no label: -1.

  Raises:
    UserError: a record cannot be read at the moment, so nothing may be cached.
  """
  found = []
  for i in range(count):
    try:
      found.append(label(i))
    except ReadError as error:
      raise UserError(f"{spec}: the labels cannot be read ({error}); try again when the file is readable") from error
    except BadImage:
      found.append(None)
  if any(isinstance(one, str) for one in found) or max((one for one in found if one is not None), default=0) >= 2**63:
    return np.asarray(["" if one is None else str(one) for one in found], np.str_)
  return np.asarray([-1 if one is None else one for one in found], np.int64)


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
