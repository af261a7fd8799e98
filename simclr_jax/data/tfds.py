"""Prepared sets of TensorFlow Datasets."""

import contextlib
import functools
import os
import re

import numpy as np

from simclr_jax.data.decode import BadImage
from simclr_jax.data.labels import make_labels
from simclr_jax.data.records import (
  cache_file,
  load_cache,
  parse_example,
  read_record,
  read_tfrecord_labels,
  save_cache,
  scan_tfrecords,
  versions,
)
from simclr_jax.data.sources import SAMPLE, Source, by_shard, spread
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError


class TfdsSource(Source):
  """A prepared TensorFlow Datasets set, read from its TFRecord shards by byte offset.

  Nothing is shuffled, interleaved or decoded by TFDS: a record is one `pread`, and its encoded image goes through
  `decode`.  The offsets are found once by hopping from record header to record header and kept in a small file
  under $XDG_CACHE_HOME (~/.cache), named after the sizes and times of the shards.

  The labels stand inside the records.  `read_labeled` costs nothing extra; `labels` reads the whole split on its
  first use and then keeps them beside the offsets.
  """

  def __init__(self, rest: str, data_dir: str | None = None):
    import tensorflow_datasets as tfds

    name, _, split = rest.partition(":")
    spec = f"tfds:{rest}"
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    builder = tfds.builder_from_directory(_prepared_folder(spec, name, root))
    info = builder.info
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
      raise UserError(
        f"{spec}: {builder.data_dir} is stored as {info.file_format.value}, which has no reader here; prepare it with"
        f" {_command(name, root, file_format='tfrecord')}"
      )
    self._all_features = dict(info.features.items())
    self._image_key = _only_feature(spec, info.features, tfds.features.Image, "image")
    self._label_key = _only_feature(spec, info.features, tfds.features.ClassLabel, "label", required=False)
    self._names = tuple(info.features[self._label_key].names) if self._label_key else ()
    try:
      instructions = info.splits[split or "train"].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
      raise UserError(
        f"{spec}: no split {split or 'train'!r} in {builder.data_dir}; it has {', '.join(info.splits)}, and slices"
        " such as train[:10%]"
      ) from error
    if not sum(
      instruction.examples_in_shard if instruction.take < 0 else instruction.take for instruction in instructions
    ):
      raise UserError(f"{spec}: the split is empty; choose a larger slice of {', '.join(info.splits)}")
    self._title = f"tfds:{name}:{split or 'train'}"
    self._shards = [os.fspath(instruction.filename) for instruction in instructions]
    # Offsets and lengths of whole shards are what is cached; a slice of the split is a view of them.
    self._seen = versions(spec, self._shards)
    self._cache = cache_file("tfds", self._shards, self._seen)
    offsets = load_cache(self._cache)
    if offsets is None:
      offsets = scan_tfrecords(self._shards, self._cache)
      save_cache(self._cache, offsets)
    self._offsets = offsets
    kept = []
    for shard, instruction in enumerate(instructions):
      (rows,) = np.nonzero(offsets["shard"] == shard)
      if len(rows) != instruction.examples_in_shard:
        raise UserError(
          f"{spec}: {instruction.filename} holds {len(rows)} records, its description says"
          f" {instruction.examples_in_shard}; copy or prepare it again"
        )
      kept.append(rows[instruction.skip :][: instruction.take if instruction.take >= 0 else None])
    self._rows = np.concatenate(kept)
    self.class_names = self._names if self._has_labels() else ()

  def __len__(self):
    return len(self._rows)

  def name(self, i):
    return f"{self._title}:{i}"

  def places(self, rows=None):
    rows = self._rows if rows is None else self._rows[rows]
    return by_shard(self._shards, *(self._offsets[key][rows] for key in ("shard", "offset")))

  def _listing(self):
    return *map(os.path.basename, self._shards), self._offsets["length"][self._rows]

  def _has_labels(self) -> bool:
    """Whether an image has a label: one of a sample of them, or else any, as in a split for training without labels."""
    known = not self._label_key or "labels" in self._offsets
    for row in () if known else self._rows[spread(len(self), SAMPLE)]:
      with contextlib.suppress(BadImage):
        if self._label(self._features(row)) >= 0:
          return True
    return self.labels is not None

  def _label_listing(self):  # without reading every record; the sample's contents have theirs inside
    return ()

  def _contents(self):
    for i in spread(len(self), SAMPLE).tolist():
      try:
        yield self._bytes(self._rows[i])
      except BadImage:
        yield b""

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
      self._offsets["labels"] = read_tfrecord_labels(
        self._title,
        self._shards,
        self._seen,
        self._offsets,
        self._cache,
        lambda record, _: self._label(parse_example(record)),
      )
      save_cache(self._cache, self._offsets)
    labels, _ = make_labels(self._offsets["labels"][self._rows], self._names, what=f"{self._title}: labels")
    return labels if (labels >= 0).any() else None

  def several_labels(self):
    """Where the set has a list of classes an image (PASCAL VOC); a class that `labels` names and
    `labels_no_difficult` does not is there, but too difficult to judge."""
    import tensorflow_datasets as tfds

    feature = self._all_features.get("labels")
    if self._label_key or not isinstance(getattr(feature, "feature", None), tfds.features.ClassLabel):
      return None
    out = np.zeros((len(self), feature.feature.num_classes), np.int8)
    for i, row in enumerate(self._rows):
      try:
        features = self._features(row)
      except BadImage as error:
        raise UserError(f"{self._title}: the labels cannot be read ({error}); copy or prepare it again") from error
      out[i, list(features["labels"].int64_list.value)] = 1
      if "labels_no_difficult" in features:
        easy = set(features["labels_no_difficult"].int64_list.value)
        out[i, [c for c in features["labels"].int64_list.value if c not in easy]] = -1
    return out

  def _label(self, features) -> int:
    if not self._label_key:
      return -1
    (label,) = features[self._label_key].int64_list.value or (-1,)
    if not -1 <= label < len(self._names):
      raise BadImage(f"its label is {label}, and there are {len(self._names)} classes")
    return label

  def _features(self, row):
    """The tf.train.Example at `row`, as a mapping from names to features."""
    return parse_example(self._bytes(row))

  def _bytes(self, row):
    shard, offset, length = (int(self._offsets[key][row]) for key in ("shard", "offset", "length"))
    return read_record(self._shards[shard], offset, length, self._seen[shard])


def _prepared_folder(spec: str, name: str, root: str) -> str:
  """The folder of the newest version of the set `name` (name, name/config or with a version) below `root`."""
  base = files.expanded(root) / name
  found = sorted(path.parent for below in ("", "*/", "*/*/") for path in base.glob(f"{below}dataset_info.json"))
  if not found:
    raise UserError(f"{spec}: not prepared under {base}; prepare it once, with network access: {_command(name, root)}")
  configs = sorted({path.parent.name for path in found if path.parent not in (base, base.parent)})
  if len(configs) > 1:
    raise UserError(f"{spec}: {base} holds several configurations; name one: tfds:{name}/{configs[0]} (of {configs})")
  return os.fspath(max(found, key=lambda path: [int(part) for part in path.name.split(".") if part.isdigit()]))


def _command(name: str, root: str, **options: str) -> str:
  """The command that prepares a set; `tfds build` imports Apache Beam, which is not installed."""
  name = re.sub(r"/(\d+\.\d+\.\d+)$", r":\1", name)  # a version, as TFDS writes it
  options = {"data_dir": root, **options}
  arguments = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in options.items())])
  return f'python -c "import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"'


def _only_feature(spec: str, features, kind: type, usual: str, *, required: bool = True) -> str | None:
  """The name of the feature of this kind: the usual one, or the only one."""
  names = [name for name, feature in features.items() if isinstance(feature, kind)]
  if usual in names:
    return usual
  if len(names) == 1:
    return names[0]
  if required:
    raise UserError(f"{spec}: has {len(names)} features of kind {kind.__name__} ({list(features)}); one is needed")
  return None
