"""Where each half of the family T runs: the host's half, the device's half, and the batch that passes between them.

Only `pipeline` knows whether pixels are sent as float views, as uint8 crops or as whole images.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import augment_on_device

WHERE = ("host", "device", "device_crop", "resident")
CROP = ("size", "crop_sampler", "crop_area", "flip", "resize")
HOST_ONLY = ("extra", "one_sided")


@flax.struct.dataclass
class Batch:
  """One global batch of n images, split over the devices along the first axis.

  Attributes:
    pixels: what the host's half of a ViewPipeline made: k views, float32 or uint8 [n, k, size, size, 3]; or dict(image
      uint8 [n, h, w, 3], extent int32 [n, 2]), images in the top left corners of canvases and their heights and widths.
    label: int32 [n], -1 where there is none.
    index: int32 [n], positions of the images in the data set.
    seed: int32 [n, 2], seeds of the augmentation of each image.
    teacher: float32 [n, classes], logits of a teacher, in distillation from cached logits; else None.
  """

  pixels: Any
  label: Any
  index: Any
  seed: Any
  teacher: Any = None


def batches(rows):
  """Batches from the dicts of a stream of data: `views`, `label`, `index`, `seed`."""
  return (Batch(pixels=row["views"], label=row["label"], index=row["index"], seed=row["seed"]) for row in rows)


@dataclasses.dataclass(frozen=True)
class ViewPipeline:
  """The augmentation in two halves.

  Attributes:
    host: (image uint8 [h, w, 3], seed [2]) -> tensor, a TensorFlow function; None if the host leaves images as they are.
    device: Batch -> float32 [n, k, size, size, 3] in [0, 1], part of the compiled step.
    spec: n -> Batch of shapes and dtypes, which is all that compiling a step needs.
    canvas: side of the square on which images are sent if `host` is None.
    resident: whether the images are on the devices from the start.
  """

  host: Callable | None
  device: Callable
  spec: Callable
  canvas: int
  resident: bool

  def check(self):
    """Tries both halves on an image of 8 pixels, so that impossible values fail before a run begins.

    Raises:
      ValueError: an option is out of range.
    """
    image = np.zeros((8, 8, 3), np.uint8)
    pixels = {"image": image[None], "extent": np.full((1, 2), 8, np.int32)}
    if self.host:
      pixels = np.asarray(self.host(image, (0, 0)))[None]
    one = np.zeros(1, np.int32)
    jax.eval_shape(self.device, Batch(pixels=pixels, label=one, index=one, seed=np.zeros((1, 2), np.int32)))


def pipeline(
  *, where: str = "host", canvas: int = 512, views: int = 2, precision: str = "highest", **options
) -> ViewPipeline:
  """The pipeline of `config.augment`.

  where="host"         the host does everything: float32 views.
  where="device"       the host crops and flips: uint8 views; the step distorts colors and blurs.
  where="device_crop"  the host decodes: uint8 images on canvases; the step does everything else.
  where="resident"     the images are on the devices; the host sends their indices.

  Args:
    views: number k of views of each image, at least 2.  Views are made in pairs, the first of which is the pair of k = 2.
    precision: of the device's products; "default" makes no difference to a network that computes in bfloat16.
    options: those of `augment_extra.two_views`, or of augment_on_device.py.

  Raises:
    ValueError: unknown `where`, impossible `canvas` or `views`, or an option that only the host has, without the host.
  """
  if where not in WHERE:
    raise ValueError(f"augment.where={where!r}: expected one of {', '.join(WHERE)}")
  if not isinstance(canvas, int) or canvas < 1:
    raise ValueError(f"augment.canvas={canvas!r}: expected the side of the canvas in pixels")
  if not isinstance(views, int) or views < 2:
    raise ValueError(f"augment.views={views!r}: expected a number of views of at least 2")
  if views > 2 and options.get("one_sided"):
    raise ValueError(f"augment.views={views}: augment.one_sided is of two views; expected 2")
  if where == "host":
    spec = _spec(_views(views, options["size"], np.float32))
    return ViewPipeline(_host("two_views", views, options), _pixels, spec, canvas, False)
  for name in HOST_ONLY:
    if options.pop(name, ()):
      raise ValueError(f"augment.where={where!r}: augment.{name} is done by the host and needs augment.where=host")
  crop = {key: options.pop(key) for key in CROP if key in options}
  options["precision"] = precision
  if where == "device":
    color_and_blur = functools.partial(augment_on_device.color_and_blur, **options)
    half = lambda batch, pair, seed: color_and_blur(_two(batch.pixels, pair), seed)  # noqa: E731
    spec = _spec(_views(views, crop["size"], np.uint8))
    return ViewPipeline(_host("two_crops", views, crop), _device(half, views), spec, canvas, False)
  two_views = functools.partial(augment_on_device.two_views, **crop, **options)
  half = lambda batch, pair, seed: two_views(batch.pixels["image"], batch.pixels["extent"], seed)  # noqa: E731
  images = {"image": ((canvas, canvas, 3), np.uint8), "extent": ((2,), np.int32)}
  return ViewPipeline(None, _device(half, views), _spec(images), canvas, where == "resident")


def _host(name, views, options):
  """A function of augment_extra.py or augment.py, which need TensorFlow, imported when it is first called."""

  def half(image, seed):
    from simclr_jax import augment, augment_extra

    function = augment_extra.two_views if name == "two_views" else augment.two_crops
    if views == 2:
      return function(image, seed, **options)
    import tensorflow as tf

    seeds = [seed, *(tf.random.experimental.stateless_fold_in(seed, pair) for pair in range(1, -(-views // 2)))]
    return tf.concat([function(image, s, **options) for s in seeds], axis=0)[:views]

  return half


def _device(half, views):
  """Batch -> [n, views, ...], from (Batch, number of a pair, its seed [n, 2]) -> [n, 2, ...]."""

  def device(batch):
    # An odd constant: seeds of other pairs are as far apart as those of other images.
    steps = (np.arange(-(-views // 2)) * 0x1E3779B1).astype(np.uint32).view(np.int32)
    seeds = [batch.seed + step if step else batch.seed for step in steps]
    pairs = [half(batch, pair, seed) for pair, seed in enumerate(seeds)]
    return pairs[0] if views == 2 else jnp.concatenate(pairs, axis=1)[:, :views]

  return device


def _two(pixels, pair):
  """Views 2 pair and 2 pair + 1 of pixels [n, k, ...], the last one twice where k is odd."""
  if pixels.shape[1] == 2:
    return pixels
  return pixels[:, jnp.minimum(jnp.arange(2 * pair, 2 * pair + 2), pixels.shape[1] - 1)]


def _pixels(batch):
  return batch.pixels


def _views(views, size, dtype):
  return (views, size, size, 3), dtype


def _spec(pixels):
  """n -> Batch of ShapeDtypeStructs; `pixels` is (shape of one image's, dtype), or a dict of them."""

  def spec(n: int) -> Batch:
    shape = lambda row: jax.ShapeDtypeStruct((n, *row[0]), row[1])  # noqa: E731
    made = {name: shape(row) for name, row in pixels.items()} if isinstance(pixels, dict) else shape(pixels)
    number = shape(((), np.int32))
    return Batch(pixels=made, label=number, index=number, seed=shape(((2,), np.int32)))

  return spec
