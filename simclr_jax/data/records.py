"""Records inside large files: where they lie, found once and cached, and reading one of them."""

import hashlib
import io
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from simclr_jax.data.decode import BadImage, one_line
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)


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
    raise BadImage(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
  if len(data) != length:
    raise BadImage(f"{path}: ends after {offset + len(data)} bytes, {offset + length} were there before")
  return data


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
      raise UserError(f"{path}: is cut off or damaged after {at} of {size} bytes; copy or prepare it again")
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
    raise UserError(f"{spec}: cannot read the shard {error.filename} ({error.strerror}); prepare it again") from error
  return files.user_cache() / f"tfrecord-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"


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
