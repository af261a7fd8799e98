"""Data: random-access sources of images, and streams whose only state is the step number.

A `Source` (sources.py) answers `len(source)` and `source.read(i)`; `open_source` opens one by name.  `train_stream`
(stream.py) makes batches of it in an order that is a function of the seed and the step (order.py).
"""

import difflib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from simclr_jax.data.classes import align, labeled, match_classes
from simclr_jax.data.decode import MAX_PIXELS, BadImage, ReadError, decode, jpeg_header, significant_bits, sniff
from simclr_jax.data.folders import FilesSource, FolderSource
from simclr_jax.data.labels import make_labels
from simclr_jax.data.order import draws, example_seeds, permutation
from simclr_jax.data.sets import fashion, textures
from simclr_jax.data.shards import ArrayRecordSource, ParquetSource, TFRecordSource, WebDatasetSource
from simclr_jax.data.sources import (
  AbstractSource,
  ArraySource,
  Joined,
  Selection,
  Source,
  Subset,
  class_balanced,
  first_readable,
  open_npz,
  place_of_npz,
  skipped_text,
  split_npz,
)
from simclr_jax.data.stream import MAX_BYTES_IN_MEMORY, Stream, check_fits, cores, eval_batches, in_memory, train_stream
from simclr_jax.data.tfds import TfdsSource
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

__all__ = [
  "EMBEDDED", "KINDS", "MAX_BYTES_IN_MEMORY", "MAX_PIXELS", "AbstractSource", "ArrayRecordSource", "ArraySource", "BadImage", "FilesSource",
  "FolderSource", "Joined", "ParquetSource", "ReadError", "Selection", "Source", "Stream", "Subset", "TFRecordSource", "TfdsSource", "WebDatasetSource",
  "align", "check_fits", "class_balanced", "cores", "decode", "draws", "eval_batches", "example_seeds", "first_readable", "in_memory", "jpeg_header", "labeled",
  "make_labels", "match_classes", "open_source", "permutation", "place_of_npz", "significant_bits", "skipped_text", "sniff", "split_npz",
  "train_stream",
]  # fmt: skip


@functools.lru_cache(maxsize=4)  # textures take a second to draw
def _embedded(kind: str, split: str) -> ArraySource:
  if kind == "fashion":
    title = f"fashion:{split}"
    return ArraySource(*fashion.split(split), class_names=fashion.CLASS_NAMES, title=title, place=title)
  seed, count = {"train": (0, 5000), "test": (1, 2000)}[split]
  images, labels = textures.split(seed, count, size=64 if kind == "textures64" else 32)
  title = f"{kind}:{split}"
  return ArraySource(images, labels, class_names=textures.CLASS_NAMES, title=title, place=title)


class Kind(NamedTuple):
  """How a data set KIND:NAME is opened, and where it is.

  Attributes:
    name: what NAME stands for, as messages say it.
    open: NAME -> Source.
    is_path: whether NAME is a path, in which nothing may be written while the data is read.
    in_bucket: whether that path may also be a gs:// path.
  """

  name: str
  open: Callable[..., Source]
  is_path: bool = True
  in_bucket: bool = False


EMBEDDED = ("fashion", "textures", "textures64")  # inside this package, each with the splits train and test
KINDS = {
  **{kind: Kind("SPLIT", functools.partial(_embedded, kind), is_path=False) for kind in EMBEDDED},
  "npz": Kind("FILE[:SPLIT]", open_npz, in_bucket=True),
  "folder": Kind("PATH", FolderSource),
  "files": Kind("PATH", FilesSource),
  "tfds": Kind("NAME[/CONFIG][:SPLIT]", TfdsSource, is_path=False),
  "tfrecord": Kind("SHARDS", TFRecordSource, in_bucket=True),
  "array_record": Kind("SHARDS", ArrayRecordSource),
  "webdataset": Kind("SHARDS", WebDatasetSource, in_bucket=True),
  "parquet": Kind("SHARDS", ParquetSource),
}


def open_source(spec: str, *, data_dir: str | None = None) -> Source:
  """Opens a data set by name.

  fashion:train|test      the first 10,000 / 2,000 images of Fashion-MNIST, inside this package, 28 pixels, gray
  textures:train|test     5,000 / 2,000 procedural color images of 32 pixels; textures64: of 64 pixels
  npz:FILE[:SPLIT]        uint8 arrays `images` or `x`, optionally `labels` or `y` and `class_names`; with
                          SPLIT: `SPLIT_images`, `x_SPLIT`, ... and likewise for labels
  folder:PATH             image files, labeled by sub-folder or not at all; see FolderSource
  files:PATH              image files at any depth, without labels; see FilesSource
  tfds:NAME[/CONFIG][:SPLIT]  any prepared TensorFlow Datasets set with an image, e.g. tfds:imagenet2012:train[:10%];
                          looked for in data_dir, else in $TFDS_DATA_DIR, else in ~/tensorflow_datasets
  tfrecord:SHARDS, array_record:SHARDS, webdataset:SHARDS, parquet:SHARDS
                          sharded records, SHARDS a folder or a pattern such as /data/train-*; see shards.py

  Raises:
    ValueError: the set is unknown, missing or empty; the message names the path and the cure.
  """
  kind, _, rest = spec.partition(":")
  if kind in EMBEDDED and rest not in ("train", "test"):
    raise UserError(f"{spec!r} names no split of {kind}: use {kind}:train or {kind}:test")
  if not rest or kind not in KINDS:
    known = ", ".join(f"{kind}:{row.name}" for kind, row in KINDS.items())
    raise UserError(
      f"{spec!r} is not a data set{_instead(spec) or ': use'} {known}; SHARDS is a folder or a pattern of files"
    )
  if KINDS[kind].is_path and not KINDS[kind].in_bucket and files.is_remote(rest):
    raise UserError(
      f"{spec}: {kind}: can only be read from this machine; write a copy to the bucket once, with simclr data prepare "
      f"{kind}:PATH --output=gs://BUCKET/NAME, and name it as tfrecord:gs://BUCKET/NAME"
    )
  return KINDS[kind].open(rest, **({"data_dir": data_dir} if kind == "tfds" else {}))


def _instead(spec: str) -> str:
  """What is probably meant by a path alone, or by a misspelled kind; empty where there is no telling."""
  kind, _, rest = spec.partition(":")
  near = difflib.get_close_matches(kind, KINDS, n=1)
  if rest and near:
    meant = f"{near[0]}:{rest}"
  elif spec.endswith(".npz"):
    meant = f"npz:{spec}"
  elif spec.startswith(("/", "~", ".")) or os.path.isdir(spec):
    meant = f"folder:{spec}"
  else:
    return ""
  return f"; did you mean {meant}? Known are"
