"""Features of a whole data set: every image once, centre-cropped, in order."""

import functools

import jax
import numpy as np

from simclr_jax import augment, data
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import processes

CACHE_BYTES = 1 << 30  # evaluation images kept in memory between evaluations, at most


class EvalSet:
  """The images of a source as evaluation sees them: float32 [size, size, 3] in [0, 1], centre-cropped.

  Sets that fit in CACHE_BYTES are decoded once and kept.
  """

  def __init__(
    self, source, *, size: int, crop: float, batch_size: int, resize: str = "bicubic", max_bad_fraction: float = 0.001
  ):
    self.source = source
    self._size, self._crop, self._resize = size, crop, resize
    self._batch_size, self._max_bad_fraction = batch_size, max_bad_fraction
    self._cache = self._rows = self._seen = None

  def _transform(self, image):
    return augment.center_crop(image, size=self._size, proportion=self._crop, resize=self._resize)

  def batches(self):
    """This process's rows of every batch in order: dict(image [b, size, size, 3], label, mask, index [b]); mask is
    false in padding and unreadable rows."""
    if self._cache is not None:
      return iter(self._cache)
    batches = self._noted(
      data.eval_batches(
        self.source,
        self._transform,
        batch_size=self._batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=self._max_bad_fraction,
      )
    )
    if len(self.source) * self._size**2 * 12 <= CACHE_BYTES:
      self._cache = list(batches)
      return iter(self._cache)
    return batches

  def images(self, rows):
    """float32 [m, size, size, 3] of single rows of the features."""
    return np.stack([np.asarray(self._transform(self.source.read(int(i)))) for i in self.rows()[rows]])

  def pixels(self):
    """float32 [n, side * side * 3], or [n, side * side] if all is grey: the representation that everything must beat;
    images over 64 pixels are averaged down to a side of about 32."""
    block = 1 if self._size <= 64 else self._size // 32
    side = self._size // block
    parts = []
    for batch in self.batches():
      x = batch["image"][:, : side * block, : side * block]
      x = x.reshape(len(x), side, block, side, block, 3).mean((2, 4)).reshape(len(x), -1)
      parts.append(processes.gather_rows(x)[processes.gather_rows(batch["mask"])])
    x = np.concatenate(parts)
    red = x[:, ::3]
    grey = np.array_equal(red, x[:, 1::3]) and np.array_equal(red, x[:, 2::3])
    return red if grey else x

  def _noted(self, batches):
    """The batches, of which indices, labels and masks are kept: images need not be read again for them."""
    seen = []
    for batch in batches:
      seen.append((np.stack([batch["index"], batch["label"]], 1), batch["mask"]))
      yield batch
    self._seen = seen

  def _readable(self):
    """int32 [2, n]: index in the source and label of every readable image; the first call is for all processes."""
    if self._rows is None:
      if self._seen is None:
        for _ in self.batches():
          pass
      parts = [(processes.gather_rows(rows), processes.gather_rows(mask)) for rows, mask in self._seen]
      self._rows = np.concatenate([rows[mask] for rows, mask in parts]).T
    return self._rows

  def rows(self):
    """int32 [n]: which image of the source each row of the features is; unreadable ones have none."""
    return self._readable()[0]

  def labels(self):
    """int32 [n]; -1 where there is none."""
    return self._readable()[1]


def crop_of(config):
  """image -> float32 [size, size, 3] in [0, 1], cropped and resized as `config` evaluates."""
  return functools.partial(
    augment.center_crop,
    size=config.augment.size,
    proportion=config.evaluate.crop,
    resize=config.augment.resize or "bicubic",
  )


def eval_set(source, config, mesh, *, size=None, crop=None, resize=None, max_bad_fraction=None) -> EvalSet:
  """The images of a source as `config` evaluates them, or in another way; batches divide over the mesh."""
  return EvalSet(
    source,
    size=size or config.augment.size,
    crop=crop or config.evaluate.crop,
    batch_size=-(-config.evaluate.batch_size // mesh.size) * mesh.size,
    resize=resize or config.augment.resize or "bicubic",
    max_bad_fraction=config.data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
  )


def embed(fn, variables, eval_set: EvalSet, mesh):
  """Tree of float32 [n, ...] with the outputs of `fn(variables, images)` for every image of the set, in order.

  `fn` is jitted by the caller; the set's batch size is a multiple of the mesh.  Every process gets all of it.
  """
  outputs = []
  for batch in eval_set.batches():
    out = fn(variables, mesh_lib.global_batch(mesh, batch["image"]))
    keep = np.flatnonzero(processes.gather_rows(batch["mask"]))
    outputs.append(jax.tree.map(lambda x, keep=keep: processes.gather(x)[keep], out))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def bank(source, config):
  """The training images that evaluation uses: all, or `config.evaluate.train_examples` of them."""
  return data.Subset(source, config.evaluate.train_examples, config.seed) if config.evaluate.train_examples else source
