"""Features of a whole data set: every image once, center-cropped, in order."""

import dataclasses
import functools

import jax
import numpy as np

from simclr_jax import augment_on_device, data
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import processes
from simclr_jax.runtime.errors import UserError

CACHE_BYTES = 1 << 30  # evaluation images kept in memory between evaluations, at most


_center_crop = jax.jit(augment_on_device.center_crop, static_argnames=("size", "proportion", "resize"))


@dataclasses.dataclass(frozen=True)
class Crop:
  """How evaluation crops and resizes images; arguments as in augment.center_crop.

  Arrays are cropped in JAX.  A set whose images have to be decoded anyway is cropped by TensorFlow, image by image on
  the threads of its stream: the same pixels within 1e-5.
  """

  size: int
  proportion: float
  resize: str = "bicubic"

  def __call__(self, images) -> np.ndarray:
    """[n, h, w, 3], or a list of [h, w, 3] of several sizes -> float32 [n, size, size, 3] in [0, 1]."""
    crop = functools.partial(_center_crop, **dataclasses.asdict(self))
    images = [np.asarray(image) for image in images]
    if len({(image.shape, image.dtype) for image in images}) == 1:
      return np.asarray(crop(np.asarray(images)))
    # On canvases whose sides are powers of two there are few shapes to compile, however many the images have.
    parts = []
    for image in images:
      sides = (1 << (side - 1).bit_length() for side in image.shape[:2])
      canvas = np.zeros((*sides, *image.shape[2:]), image.dtype)
      canvas[: image.shape[0], : image.shape[1]] = image
      parts.append(np.asarray(crop(canvas[None], np.asarray([image.shape[:2]], np.int32))))
    return np.concatenate(parts)

  def batches(self, source, **options):
    """`data.eval_batches` of the cropped images."""
    return data.eval_batches(source, self._in_tensorflow, of_arrays=self, **options)

  def _in_tensorflow(self, image):
    from simclr_jax import augment

    return augment.center_crop(image, **dataclasses.asdict(self))


class EvalSet:
  """The images of a source as evaluation sees them: float32 [size, size, 3] in [0, 1], center-cropped.

  Sets that fit in CACHE_BYTES are decoded once and kept.  `labeled` leaves out the images without a label of a set that
  has labels: they take part in no score.
  """

  def __init__(
    self, source, *, size: int, crop: float, batch_size: int, resize: str = "bicubic", max_bad_fraction: float = 0.001,
    labeled: bool = False,
  ):  # fmt: skip
    self.source, self._labeled = source, labeled and source.num_classes > 0
    self._crop = Crop(size, crop, resize)
    self._batch_size, self._max_bad_fraction = batch_size, max_bad_fraction
    self._cache = self._rows = self._seen = None

  def batches(self):
    """This process's rows of every batch in order: dict(image [b, size, size, 3], label, mask, index [b]); mask is
    false in padding and in rows that are left out or unreadable."""
    if self._cache is not None:
      return iter(self._cache)
    batches = self._noted(
      self._crop.batches(
        self.source,
        batch_size=self._batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=self._max_bad_fraction,
      )
    )
    if len(self.source) * self._crop.size**2 * 12 <= CACHE_BYTES:
      self._cache = list(batches)
      return iter(self._cache)
    return batches

  def images(self, rows):
    """float32 [m, size, size, 3] of single rows of the features."""
    return self._crop([self.source.read(int(i)) for i in self.rows()[rows]])

  def pixels(self):
    """float32 [n, side * side * 3], or [n, side * side] if all is gray: the representation that everything must beat;
    images over 64 pixels are averaged down to a side of about 32."""
    block = 1 if self._crop.size <= 64 else self._crop.size // 32
    side = self._crop.size // block
    parts = []
    for batch in self.batches():
      x = batch["image"][:, : side * block, : side * block]
      x = x.reshape(len(x), side, block, side, block, 3).mean((2, 4)).reshape(len(x), -1)
      parts.append(processes.gather_rows(x)[processes.gather_rows(batch["mask"])])
    x = np.concatenate(parts)
    red = x[:, ::3]
    # The products of a crop may round the channels differently.
    gray = all(np.allclose(red, x[:, k::3], rtol=0, atol=1e-6) for k in (1, 2))
    return red if gray else x

  def _noted(self, batches):
    """The batches, of which indices, labels and masks are kept: images need not be read again for them."""
    seen = []
    for batch in batches:
      if self._labeled:
        batch["mask"] = batch["mask"] & (batch["label"] >= 0)
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
      if self._labeled and not self._rows.size:
        raise UserError(f"no image in the set of {self.source.name(0)} has a label, so it cannot be scored")
    return self._rows

  def rows(self):
    """int32 [n]: which image of the source each row of the features is; unreadable ones have none."""
    return self._readable()[0]

  def labels(self):
    """int32 [n]; -1 where there is none."""
    return self._readable()[1]


def crop_of(config) -> Crop:
  """How `config` evaluates."""
  return Crop(config.augment.size, config.evaluate.crop, config.augment.resize or "bicubic")


def eval_set(
  source, config, mesh, *, size=None, crop=None, resize=None, max_bad_fraction=None, labeled=False
) -> EvalSet:
  """The images of a source as `config` evaluates them, or in another way; batches divide over the mesh."""
  return EvalSet(
    source,
    size=size or config.augment.size,
    crop=crop or config.evaluate.crop,
    batch_size=-(-config.evaluate.batch_size // mesh.size) * mesh.size,
    resize=resize or config.augment.resize or "bicubic",
    max_bad_fraction=config.data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
    labeled=labeled,
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


def train_examples(source, config):
  """The training images that evaluation uses: all, or `config.evaluate.train_examples` of those that have a label."""
  count = config.evaluate.train_examples
  return data.Subset(data.labeled(source), count, config.seed) if count else source
