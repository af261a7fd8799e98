"""Operators of the papers' ablations, and `two_views` with them: cutout, Sobel, AutoAugment, one-sided compositions.

Source: arXiv 2002.05709, Figures 4 and 5, Table 1 and appendix B.2.
"""

import functools
import math

import tensorflow as tf

from simclr_jax import augment


def two_views(image, seed, *, extra=(), **options):
  """`augment.two_views` with operators of EXTRA between color distortion and blur.

  Args:
    extra: names of EXTRA with probabilities, such as (("sobel", 0.1), ("solarize", 0.2)), drawn for each view in
      this order: the other transformations of arXiv 2002.05709, Figure 4 and B.2.  With one_sided=True they are
      applied only to the first view, as in Figure 5.  Where "color" is among them, it is the color distortion of
      `options`, which then takes place there instead.
    options: those of `augment.two_views`.
  Raises:
    ValueError: as `augment.two_views` and `apply_extra`; or "color" is named, and color_strength is 0.
  """
  if not extra:
    return augment.two_views(image, seed, **options)
  distort = {}
  if any(name == "color" for name, _ in extra):
    if options.get("color_strength") == 0:
      raise ValueError("extra color: expected color_strength above 0")
    distort = {own: options.pop(name) for name, own in COLOR.items() if name in options}
    options["color_strength"] = 0.0
  operators = EXTRA | {"color": functools.partial(color, **distort)}
  apply = functools.partial(apply_extra, extra=extra, operators=operators)
  return augment.two_views(image, seed, extra=apply, **options)


def sobel(image, seed=None):
  """Edges: the length of the Sobel gradient of each channel, over 4 (a step from 0 to 1), clipped; [h, w, 3] to the same."""
  gradient = tf.image.sobel_edges(tf.convert_to_tensor(image)[None])[0]
  return augment.clip(tf.sqrt(tf.reduce_sum(gradient**2, -1)) / 4)


def solarize(image, seed=None):
  """Inverts the pixels of at least 1/2."""
  return tf.where(image < 0.5, image, 1 - image)


def equalize(image, seed=None):
  """A flat histogram in each channel, at 256 levels, as Pillow's ImageOps.equalize."""
  levels = tf.cast(tf.round(image * 255), tf.int32)

  def channel(x):
    counts = tf.math.bincount(tf.reshape(x, [-1]), minlength=256, maxlength=256)
    last = tf.reduce_max(tf.where(counts > 0, tf.range(256), -1))
    step = (tf.reduce_sum(counts) - counts[last]) // 255
    table = (step // 2 + tf.cumsum(counts, exclusive=True)) // tf.maximum(step, 1)
    return tf.where(step > 0, tf.gather(tf.minimum(table, 255), x), x)

  return tf.cast(tf.stack([channel(x) for x in tf.unstack(levels, axis=-1)], -1), tf.float32) / 255


def motion_blur(image, seed):
  """The mean along a line through each pixel, a tenth of the height long, of an angle uniform in [0, pi); zero padding."""
  height, _, channels = augment.check_static(image)
  radius = max(1, height // 20)
  angle = math.pi * tf.random.stateless_uniform([], seed)
  along = tf.range(-radius, radius + 1, dtype=tf.float32)
  place = tf.cast(tf.round(tf.stack([along * tf.sin(angle), along * tf.cos(angle)], 1)), tf.int32) + radius
  size = 2 * radius + 1
  kernel = tf.scatter_nd(place, tf.fill([size], 1 / size), [size, size])
  kernel = tf.tile(kernel[:, :, None, None], [1, 1, channels, 1])
  return tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "SAME")[0]


def cutout(image, seed):
  """A gray square of half the height about a random pixel, cut off at the border (arXiv:1708.04552)."""
  height, width, _ = augment.check_static(image)
  center = tf.random.stateless_uniform([2], seed) * [height, width]
  y, x = tf.range(height, dtype=tf.float32) + 0.5, tf.range(width, dtype=tf.float32) + 0.5
  inside = (tf.abs(y - center[0]) < height / 4)[:, None] & (tf.abs(x - center[1]) < height / 4)[None]
  return tf.where(inside[..., None], 0.5, image)


def rotate(image, seed):
  """A turn by 90, 180 or 270 degrees; the image is square."""
  return tf.image.rot90(image, tf.random.stateless_uniform([], seed, 1, 4, tf.int32))


def noise(image, seed):
  """Gaussian noise, independent for pixels and channels, of a standard deviation uniform in [0, 0.2]; clipped."""
  strength, values = tf.unstack(tf.random.split(seed, 2))
  scale = tf.random.stateless_uniform([], strength, 0, 0.2)
  return augment.clip(image + scale * tf.random.stateless_normal(tf.shape(image), values))


def crop(image, seed):
  """Another random crop, resized to the original size; the image is square."""
  return augment.clip(augment.random_crop(image, seed, size=augment.check_static(image)[0]))


def color(image, seed, *, strength=1.0, **options):
  """`augment.color_distort`, clipped."""
  return augment.clip(augment.color_distort(image, seed, strength=strength, **options))


def blur(image, seed):
  """`random_blur`, always."""
  return augment.random_blur(image, seed, prob=1.0)


# The policy for ImageNet of arXiv:1805.09501, Table 9: pairs of (operation, probability, magnitude 0 to 9 or None).
AUTOAUGMENT = (
  (("posterize", 0.4, 8), ("turn", 0.6, 9)),
  (("solarize_from", 0.6, 5), ("autocontrast", 0.6, None)),
  (("equalize", 0.8, None), ("equalize", 0.6, None)),
  (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
  (("equalize", 0.4, None), ("solarize_from", 0.2, 4)),
  (("equalize", 0.4, None), ("turn", 0.8, 8)),
  (("solarize_from", 0.6, 3), ("equalize", 0.6, None)),
  (("posterize", 0.8, 5), ("equalize", 1.0, None)),
  (("turn", 0.2, 3), ("solarize_from", 0.6, 8)),
  (("equalize", 0.6, None), ("posterize", 0.4, 6)),
  (("turn", 0.8, 8), ("saturate", 0.4, 0)),
  (("turn", 0.4, 9), ("equalize", 0.6, None)),
  (("equalize", 0.0, None), ("equalize", 0.8, None)),
  (("invert", 0.6, None), ("equalize", 1.0, None)),
  (("saturate", 0.6, 4), ("contrast", 1.0, 8)),
  (("turn", 0.8, 8), ("saturate", 1.0, 2)),
  (("saturate", 0.8, 8), ("solarize_from", 0.8, 7)),
  (("sharpen", 0.4, 7), ("invert", 0.6, None)),
  (("shear", 0.6, 5), ("equalize", 1.0, None)),
  (("saturate", 0.4, 0), ("equalize", 0.6, None)),
  (("equalize", 0.4, None), ("solarize_from", 0.2, 4)),
  (("solarize_from", 0.6, 5), ("autocontrast", 0.6, None)),
  (("invert", 0.6, None), ("equalize", 1.0, None)),
  (("saturate", 0.6, 4), ("contrast", 1.0, 8)),
  (("equalize", 0.8, None), ("equalize", 0.6, None)),
)


def autoaugment(image, seed):
  """One of the 25 pairs of operations of AutoAugment's policy for ImageNet, with magnitudes in ten steps.

  The operations are Pillow's, on 256 levels; those with a direction take either with probability 1/2.
  """
  choice, drawn, signs = tf.unstack(tf.random.split(seed, 3))
  drawn, signs = tf.random.stateless_uniform([2], drawn), tf.random.stateless_uniform([2], signs)
  levels = tf.round(tf.convert_to_tensor(image) * 255)

  def pair(operations, x):
    for i, (name, prob, magnitude) in enumerate(operations):
      apply = functools.partial(autoaugment_op, name, x, magnitude, tf.where(signs[i] < 0.5, -1.0, 1.0))
      x = tf.cond(drawn[i] < prob, apply, lambda x=x: x)
    return x

  number = tf.random.stateless_uniform([], choice, 0, len(AUTOAUGMENT), tf.int32)
  levels = tf.switch_case(number, [functools.partial(pair, operations, levels) for operations in AUTOAUGMENT])
  return tf.ensure_shape(levels, image.shape) / 255


def autoaugment_op(name, levels, magnitude, sign):
  """One operation of AUTOAUGMENT: levels [h, w, 3] float32, whole numbers from 0 to 255, to the same; sign is -1 or 1."""
  step = (magnitude or 0) / 9
  height, width, _ = augment.check_static(levels)

  def blend(other, factor):  # Pillow's enhancers: 1 leaves the image, 0 gives the other, above 1 goes away from it
    return tf.floor(tf.clip_by_value(other + factor * (levels - other), 0.0, 255.0))

  def move(a, b, c, d, center):  # the pixel at center + [a b; c d] (p - center), nothing interpolated, black beyond
    u, v = center
    transform = [a, b, u - a * u - b * v, c, d, v - c * u - d * v, 0.0, 0.0]
    return tf.raw_ops.ImageProjectiveTransformV3(
      images=levels[None], transforms=tf.stack([tf.stack([tf.cast(x, tf.float32) for x in transform])]),
      output_shape=[height, width], fill_value=0.0, interpolation="NEAREST",
    )[0]  # fmt: skip

  if name == "posterize":
    keep = float(2 ** round(4 * step))
    return tf.floor(levels / keep) * keep
  if name == "solarize_from":
    return tf.where(levels < 255 - 255 * step, levels, 255 - levels)
  if name == "invert":
    return 255 - levels
  if name == "equalize":
    return equalize(levels / 255) * 255
  if name == "autocontrast":
    low, high = (f(levels, (0, 1), keepdims=True) for f in (tf.reduce_min, tf.reduce_max))
    return tf.where(high > low, tf.floor((levels - low) * (255 / tf.maximum(high - low, 1)) + 1e-3), levels)
  if name in ("saturate", "contrast"):
    luma = tf.floor(tf.tensordot(levels, [0.299, 0.587, 0.114], 1) + 0.5)[..., None]
    return blend(luma if name == "saturate" else tf.floor(tf.reduce_mean(luma) + 0.5), 1 + sign * 0.9 * step)
  if name == "sharpen":
    kernel = tf.tile(tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13, [1, 1, 3, 1])
    inner = tf.floor(tf.nn.depthwise_conv2d(levels[None], kernel, [1, 1, 1, 1], "VALID")[0] + 0.5)
    border = tf.pad(tf.ones([height - 2, width - 2, 1], tf.bool), [[1, 1], [1, 1], [0, 0]])
    return blend(tf.where(border, tf.pad(inner, [[1, 1], [1, 1], [0, 0]]), levels), 1 + sign * 0.9 * step)
  if name == "turn":
    angle = sign * math.radians(30 * step)
    cos, sin = tf.cos(angle), tf.sin(angle)
    return move(cos, -sin, sin, cos, ((width - 1) / 2, (height - 1) / 2))
  if name == "shear":
    return move(1.0, sign * 0.3 * step, 0.0, 1.0, (-0.5, -0.5))
  raise ValueError(f"name={name!r}: not an operation of AUTOAUGMENT")


# What `extra` of `two_views` may name.  Each maps [h, w, 3] float32 in [0, 1] and a seed to the same.
EXTRA = {
  op.__name__: op
  for op in (sobel, solarize, equalize, motion_blur, cutout, rotate, noise, crop, color, blur, autoaugment)
}

# Options of `two_views` and those of `color` that they set.
COLOR = {
  "color_strength": "strength", "brightness": "brightness", "color_jitter_prob": "jitter_prob",
  "grayscale_prob": "grayscale_prob", "color_order": "order",
}  # fmt: skip


def apply_extra(image, seed, extra, operators=EXTRA):
  """Each of `extra`, ((name, probability), ...), with its probability, in this order; see `two_views` above.

  Raises:
    ValueError: a name is not in EXTRA, or its number is not a probability.
  """
  shape = image.shape
  for i, (name, prob) in enumerate(extra):
    augment.check_choice("extra", name, tuple(EXTRA))
    augment.check_probability(f"extra {name}", prob)
    drawn, own = tf.unstack(tf.random.split(tf.random.experimental.stateless_fold_in(seed, i), 2))
    apply = tf.random.stateless_uniform([], drawn) < prob
    image = tf.cond(apply, lambda x=image, op=operators[name], s=own: op(x, s), lambda x=image: x)
    image = tf.ensure_shape(image, shape)
  return image
