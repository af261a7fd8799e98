"""The family T of SimCLR: random crop and resize, flip, color distortion, Gaussian blur.

`two_views` draws the positive pair of one image, t(x) and t'(x) with t, t' ~ T (arXiv:2002.05709, section 2.1 and
appendix A).  Every function is a pure function of its arguments, works eagerly and inside tf.data, and has the
numerics of the official code (google-research/simclr, tf2/data_util.py) unless a named option says otherwise.
Images have channels last and values in [0, 1]; like the official encoders' input, they are not normalized further.
"""

import numpy as np
import tensorflow as tf

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of a random crop
SIGMA_RANGE = (0.1, 2.0)  # of the blur, in pixels
MAX_STRENGTH = 1.25  # where 1 - 0.8 s, the lowest contrast and saturation factor, reaches 0

RESIZES = ("bicubic", "bicubic_tf1", "bilinear", "bicubic_antialias")  # kinds of resize_image


def two_views(
  image,
  seed,
  *,
  size,
  color_strength=1.0,
  blur=True,
  crop_sampler="official",
  brightness="v2",
  crop_area=(0.08, 1.0),
  flip=True,
  color_jitter_prob=0.8,
  grayscale_prob=0.2,
  blur_prob=0.5,
  color_order="random",
  resize="bicubic",
  extra=None,
  one_sided=False,
):
  """Two independent views of one image: crop, resize, flip, color distortion, blur, in this order.

  Args:
    image: [h, w, 3], uint8, or floating point in [0, 1].
    seed: [2] integers.  The views are a pure function of (image, seed).
    size: side of the views, in pixels.
    color_strength: s of appendix A, at most 1.25; 0 switches off both jitter and grayscale, as in tf2/.
    blur: whether views are blurred.  Under 20 pixels they never are: a tenth of the side makes a 1-tap kernel.
    crop_sampler, crop_area: see `sample_box`.
    brightness, color_order: see `color_distort`.
    flip: whether views are mirrored left-right with probability 1/2.
    color_jitter_prob, grayscale_prob, blur_prob: probabilities of the three, drawn for each view.
    resize: see `resize_image`.
    extra: a function (view, seed) -> view that is applied between color distortion and blur, or None; see
      augment_extra.py.
    one_sided: the views share crop and flip, and the second view gets nothing else: the compositions of Figure 5.
  Returns:
    [2, size, size, 3] float32 in [0, 1].
  Raises:
    ValueError: an option, or the shape or dtype of image, is out of range.
  """
  crops, views = [], []
  for view_seed in tf.unstack(tf.random.split(seed, 2)):
    crop_seed, color_seed, blur_seed = tf.unstack(tf.random.split(view_seed, 3))
    if one_sided and views:
      views.append(clip(crops[0]))
      break
    crops.append(_crop_and_flip(image, crop_seed, size, crop_sampler, crop_area, flip, resize))
    view = color_distort(
      crops[-1],
      color_seed,
      strength=color_strength,
      brightness=brightness,
      jitter_prob=color_jitter_prob,
      grayscale_prob=grayscale_prob,
      order=color_order,
    )
    view = clip(view)  # here and not before the jitter, which in the official code sees the bicubic overshoot
    view = extra(view, tf.random.experimental.stateless_fold_in(view_seed, 3)) if extra else view
    views.append(random_blur(view, blur_seed, prob=blur_prob) if blur else view)
  return tf.stack(views)


def two_crops(image, seed, *, size, crop_sampler="official", crop_area=(0.08, 1.0), flip=True, resize="bicubic"):
  """The geometric half of `two_views`, for augment_on_device.py to finish: the same boxes and flips for the same seed.

  Args:
    image: [h, w, 3] uint8.  The other arguments are those of `two_views`.
  Returns:
    [2, size, size, 3] uint8: overshoot is clipped and fractions are cut off, because rounding would cost a twentieth of the
    total time; level k therefore stands for [k, k + 1).
  Raises:
    ValueError: an option, or the shape or dtype of image, is out of range.
  """
  if tf.as_dtype(image.dtype) != tf.uint8:
    raise ValueError(f"image of dtype {tf.as_dtype(image.dtype).name}: expected uint8")
  crops = []
  for view_seed in tf.unstack(tf.random.split(seed, 2)):
    crop_seed = tf.random.split(view_seed, 3)[0]
    view = _crop_and_flip(image, crop_seed, size, crop_sampler, crop_area, flip, resize, finish=_levels)
    crops.append(view)
  return tf.stack(crops)


def _levels(view):
  return tf.cast(tf.clip_by_value(view, 0.0, 255.0), tf.uint8)


def one_view(image, seed, *, size, crop_sampler="official", crop_area=(0.08, 1.0), flip=True, resize="bicubic"):
  """Crop, resize and flip only: what linear evaluation and fine-tuning train on (arXiv:2002.05709, B.5, B.6).

  Arguments as in `two_views`.  Returns [size, size, 3] float32 in [0, 1].  Raises ValueError.
  """
  return clip(_crop_and_flip(image, seed, size, crop_sampler, crop_area, flip, resize))


def center_crop(image, *, size, proportion=0.875, resize="bicubic"):
  """Evaluation preprocessing: the central square of `proportion` of the shorter side, resized and clipped.

  As tf2/data_util.py `center_crop` for a square target: crop and then resize, not "resize to 256, crop 224".  For
  sizes up to 32 the official code uses the image as it is; `proportion=1.0` with a size x size image does the same.

  Args:
    image: [h, w, 3], uint8, or floating point in [0, 1].
    size: side of the result, in pixels.
    proportion: side of the crop over the shorter side of the image, in (0, 1].
    resize: see `resize_image`.
  Returns:
    [size, size, 3] float32 in [0, 1].
  Raises:
    ValueError: an option, or the shape or dtype of image, is out of range.
  """
  image = _check_image(image)
  shape = tf.shape(image)
  y, x, h, w = center_box(shape[0], shape[1], proportion=proportion)
  return clip(resize_image(image[y : y + h, x : x + w], size, kind=resize))


def center_box(height, width, *, proportion=0.875):
  """Central square crop of a height x width image: (y, x, h, w), int32 scalars.  Sides half-way round to even."""
  if not 0 < proportion <= 1:
    raise ValueError(f"proportion={proportion!r}: expected above 0 and up to 1; the official value is 0.875")
  side = tf.cast(tf.round(proportion * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
  side = tf.maximum(side, 1)
  return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def random_crop(image, seed, *, size, crop_sampler="official", crop_area=(0.08, 1.0), resize="bicubic", finish=None):
  """A random box (`sample_box`) resized to [size, size, 3] float32, bicubic overshoot not clipped.

  Arguments as in `two_views`; `finish` instead gets the pixels as they are, uint8 images resized to [0, 255].
  Raises ValueError.
  """
  image = _check_image(image)
  shape = tf.shape(image)
  y, x, h, w = sample_box(shape[0], shape[1], seed, crop_sampler=crop_sampler, crop_area=crop_area)
  box = image[y : y + h, x : x + w]
  return finish(_resize(box, size, resize)) if finish else resize_image(box, size, kind=resize)


def sample_box(height, width, seed, *, crop_sampler="official", crop_area=(0.08, 1.0)):
  """One random crop box of a height x width image.

  "official" (tf2/data_util.py `distorted_bounding_box_crop`): aspect ratio uniform in [3/4, 4/3], height rather than
  area uniform, and at least 0.1 of the image covered, so that a lowest area under 0.1 never binds.  With (0.08, 1)
  areas start at 0.10 and average 0.42 on a square image, 0.39 on 375 x 500.
  "torchvision" (RandomResizedCrop): area uniform in `crop_area`, aspect ratio log-uniform in [3/4, 4/3], the first of
  ten tries that fits, else the largest central crop with an aspect ratio in that range.  With (0.08, 1) areas start
  at 0.08 and average 0.48 and 0.43.

  Args:
    height, width: integers, or int32 scalars.
    seed: [2] integers.
    crop_area: (lowest, highest) area of the box as a fraction of the image's.
  Returns:
    (y, x, h, w), int32 scalars: top left corner and size.
  Raises:
    ValueError: unknown sampler, or not 0 < lowest <= highest <= 1.
  """
  check_choice("crop_sampler", crop_sampler, ("official", "torchvision"))
  low, high = crop_area
  if not 0 < low <= high <= 1:
    raise ValueError(f"crop_area={crop_area!r}: expected 0 < lowest <= highest <= 1, for example (0.08, 1.0)")
  if crop_sampler == "torchvision":
    return _sample_box_torchvision(height, width, seed, low, high)
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.stack([height, width, 3]),
    [[[0.0, 0.0, 1.0, 1.0]]],
    seed,
    min_object_covered=0.1,
    aspect_ratio_range=ASPECT_RANGE,
    area_range=(low, high),
    max_attempts=100,
  )
  return begin[0], begin[1], extent[0], extent[1]


def _sample_box_torchvision(height, width, seed, low, high):
  tries = 10
  uniform = tf.random.stateless_uniform([2 * tries + 2], seed)
  image_h, image_w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
  area = image_h * image_w * (low + (high - low) * uniform[:tries])
  min_aspect, max_aspect = ASPECT_RANGE
  aspect = min_aspect * (max_aspect / min_aspect) ** uniform[tries : 2 * tries]
  h, w = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
  fits = (h >= 1) & (h <= image_h) & (w >= 1) & (w <= image_w)
  first = tf.argmax(fits)
  found = fits[first]
  h = tf.where(found, h[first], tf.minimum(image_h, tf.round(image_w / min_aspect)))
  w = tf.where(found, w[first], tf.minimum(image_w, tf.round(image_h * max_aspect)))
  room_h, room_w = image_h - h, image_w - w
  y = tf.floor(tf.where(found, uniform[-2] * (room_h + 1), room_h / 2))
  x = tf.floor(tf.where(found, uniform[-1] * (room_w + 1), room_w / 2))
  return tuple(tf.cast(v, tf.int32) for v in (y, x, h, w))


def resize_image(image, size, *, kind="bicubic"):
  """Resize to a square, not clipped: bicubic kernels overshoot [0, 1].

  Args:
    image: [h, w, c], uint8, or floating point in [0, 1].
    size: side of the result, in pixels.
    kind: "bicubic" has Keys' kernel, a = -0.5, and half-pixel centers (tf2/); "bicubic_tf1" has a = -0.75 and no
      half-pixel centers, the legacy kernel of the TF1 code that trained the released checkpoints; "bilinear" has
      half-pixel centers and is cheaper.  The official code does not antialias, so most pixels of a large photo are
      never read; "bicubic_antialias" is "bicubic" with a kernel as wide as an output pixel.
  Returns:
    [size, size, c] float32.
  Raises:
    ValueError: size is not a positive integer, or kind is none of RESIZES.
  """
  # The official code converts the whole image before it crops: the same numbers, more work.
  return _resize(tf.image.convert_image_dtype(image, tf.float32), size, kind)


def _resize(image, size, kind):
  check_choice("resize", kind, RESIZES)
  if not isinstance(size, int) or size < 1:
    raise ValueError(f"size={size!r}: expected a positive integer, the side of the result in pixels")
  if kind == "bicubic_antialias":
    return tf.image.resize(image, (size, size), "bicubic", antialias=True)
  if kind == "bilinear":
    return tf.raw_ops.ResizeBilinear(images=image[None], size=[size, size], half_pixel_centers=True)[0]
  half_pixel_centers = kind == "bicubic"  # this flag of the op chooses the kernel as well
  return tf.raw_ops.ResizeBicubic(images=image[None], size=[size, size], half_pixel_centers=half_pixel_centers)[0]


def color_distort(image, seed, *, strength, brightness="v2", jitter_prob=0.8, grayscale_prob=0.2, order="random"):
  """Color jitter, then grayscale (arXiv:2002.05709, appendix A; tf2/data_util.py `random_color_jitter`).

  With probability `jitter_prob`, it changes brightness, contrast about the mean of each channel, and saturation, by factors
  uniform in [1 - 0.8 s, 1 + 0.8 s], and turns the hue by up to 0.2 s of the circle, in an order drawn uniformly from the 24,
  each followed by a clip to [0, 1].  Independently, with probability `grayscale_prob`, it converts to grayscale.

  Args:
    image: [h, w, 3] float32 in [0, 1], up to bicubic overshoot.
    seed: [2] integers.
    strength: s, in [0, 1.25]; 0 leaves the image as it is, grayscale included, as in tf2/.
    brightness: "v2" multiplies, as the official code does now; "v1" adds a number uniform in [-0.8 s, 0.8 s], as it
      did for the results of arXiv:2002.05709.
    order: "random"; or "fixed", the order in which the four are named above, as with `random_order=False` in tf2/.
  Returns:
    [h, w, 3] float32; in [0, 1] if image is.
  Raises:
    ValueError: an option is out of range.
  """
  check_choice("brightness", brightness, ("v2", "v1"))
  check_choice("color_order", order, ("random", "fixed"))
  jitter, gray, factors, drawn = sample_color(
    seed, strength=strength, jitter_prob=jitter_prob, grayscale_prob=grayscale_prob
  )
  if strength == 0:
    return image
  order = drawn if order == "random" else tf.range(4)
  jittered = tf.cond(jitter, lambda: color_jitter(image, factors, order, brightness=brightness), lambda: image)
  return tf.cond(gray, lambda: grayscale(jittered), lambda: jittered)


def color_jitter(image, factors, order, *, brightness="v2"):
  """The four operations of `color_distort` with given factors [4] and order [4]; see `sample_color` for both."""
  ops = (
    lambda x: x * factors[0] if brightness == "v2" else x + (factors[0] - 1),
    lambda x: tf.image.adjust_contrast(x, factors[1]),
    lambda x: tf.image.adjust_saturation(x, factors[2]),
    lambda x: tf.image.adjust_hue(x, factors[3]),
  )
  for position in range(4):
    image = tf.switch_case(order[position], [lambda op=op, x=image: clip(op(x)) for op in ops])
  return image


def sample_color(seed, *, strength, jitter_prob=0.8, grayscale_prob=0.2):
  """What one call of `color_distort` draws; arguments as there.

  Returns:
    (jitter, gray, factors, order): two booleans; [4] float32, the factors of brightness, contrast and saturation,
    and the turn of the hue; [4] int32, the indices of these four in the order in which they are applied.
  Raises:
    ValueError: an option is out of range.
  """
  if not 0 <= strength <= MAX_STRENGTH:
    raise ValueError(
      f"color_strength={strength!r}: expected 0 to {MAX_STRENGTH}; above, contrast factors could be negative"
    )
  check_probability("color_jitter_prob", jitter_prob)
  check_probability("grayscale_prob", grayscale_prob)
  uniform = tf.random.stateless_uniform([10], seed)
  symmetric = 2 * uniform[2:6] - 1
  factors = [1.0, 1.0, 1.0, 0.0] + strength * symmetric * [0.8, 0.8, 0.8, 0.2]
  return uniform[0] < jitter_prob, uniform[1] < grayscale_prob, factors, tf.argsort(uniform[6:])


def grayscale(image):
  """Luma of [..., 3] (weights 0.2989, 0.587, 0.114) in all three channels."""
  return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def random_blur(image, seed, *, prob=0.5):
  """With probability `prob` a Gaussian blur: sigma uniform in [0.1, 2] pixels, kernel a tenth of the height.

  Sigma is drawn for every image and view (arXiv:2002.05709, appendix A).  The official code draws it once per view for
  a whole replica batch, and for each image only decides whether to blur it (tf2/data_util.py `batch_random_blur`).

  Args:
    image: [h, w, c] float32 in [0, 1], of static shape.  Left as it is under 20 pixels: the kernel has one tap.
    seed: [2] integers.
  Returns:
    [h, w, c] float32 in [0, 1].
  Raises:
    ValueError: prob, or the shape of image, is out of range.
  """
  height = check_static(image)[0]
  apply, sigma = sample_blur(seed, prob=prob)
  if height < 20:
    return image
  return tf.cond(apply, lambda: clip(gaussian_blur(image, kernel_size=height // 10, sigma=sigma)), lambda: image)


def sample_blur(seed, *, prob=0.5):
  """What one call of `random_blur` draws: (whether, sigma), a boolean and a float32 scalar."""
  check_probability("blur_prob", prob)
  uniform = tf.random.stateless_uniform([2], seed)
  low, high = SIGMA_RANGE
  return uniform[0] < prob, low + (high - low) * uniform[1]


def gaussian_blur(image, *, kernel_size, sigma):
  """Separable Gaussian blur with zero padding, so that edges darken (tf2/data_util.py `gaussian_blur`).

  Args:
    image: [h, w, c] or [n, h, w, c] float32; h, w and c static.
    kernel_size: the kernel has 2 * (kernel_size // 2) + 1 taps: 22 makes 23, and 1 changes nothing.
    sigma: standard deviation in pixels, a positive number or scalar tensor.
  Returns:
    As image.
  Raises:
    ValueError: kernel_size, or the shape of image, is out of range.
  """
  height, width, channels = check_static(image)
  if kernel_size < 1:
    raise ValueError(f"kernel_size={kernel_size!r}: expected at least 1, for example a tenth of the image's side")
  radius = kernel_size // 2
  distance = tf.range(radius + 1, dtype=tf.float32)
  half = tf.exp(-(distance**2) / (2 * tf.cast(sigma, tf.float32) ** 2))  # the kernel is symmetric
  half = half / (2 * tf.reduce_sum(half) - half[0])
  if radius > LONG:
    x = tf.reshape(image, [-1, height, width, channels])
    for length in (height, width):  # along the first axis, and then the axes change places
      x = _banded(x, half, length)
      x = tf.transpose(x, [0, 2, 1, 3])
    return tf.reshape(x, tf.shape(image) if len(image.shape) == 4 else image.shape)
  # Shifted rows and columns: the short kernels of small images cost far less than in depthwise_conv2d.
  x = tf.reshape(image, [-1, height, width * channels])
  padded = tf.pad(x, [[0, 0], [radius, radius], [0, 0]])
  x = _convolve([padded[:, k : k + height] for k in range(2 * radius + 1)], half)
  padded = tf.pad(x, [[0, 0], [0, 0], [radius * channels, radius * channels]])
  x = _convolve([padded[:, :, k * channels : (k + width) * channels] for k in range(2 * radius + 1)], half)
  return tf.reshape(x, tf.shape(image) if len(image.shape) == 4 else image.shape)


LONG = 5  # taps on a side, beyond which products beat sums of shifted images
BLOCK = 32  # rows that one product makes


def _banded(x, half, length):
  """Convolves [n, length, m, c] along its second axis, in blocks of rows: a few small products with one banded matrix."""
  radius, blocks = half.shape[0] - 1, -(-length // BLOCK)
  distance = abs(np.arange(BLOCK)[:, None] + radius - np.arange(BLOCK + 2 * radius))
  band = tf.gather(tf.concat([half, [0.0]], 0), np.minimum(distance, radius + 1))
  padded = tf.pad(x, [[0, 0], [radius, radius + blocks * BLOCK - length], [0, 0], [0, 0]])
  padded = tf.reshape(padded, [-1, *padded.shape[1:2], x.shape[2] * x.shape[3]])
  parts = tf.stack([padded[:, k * BLOCK : (k + 1) * BLOCK + 2 * radius] for k in range(blocks)], 1)
  return tf.reshape(tf.matmul(band, parts), [-1, blocks * BLOCK, x.shape[2], x.shape[3]])[:, :length]


def _convolve(shifts, half):
  """Sum of 2 r + 1 shifted images under a symmetric kernel, given as its center and one side: [r + 1]."""
  radius = len(shifts) // 2
  x = half[0] * shifts[radius]
  negative = tf.unstack(-half, num=radius + 1)
  for k in range(1, radius + 1):
    # Not a sum, for TensorFlow reorders sums in graphs: the last bit would differ between eager and tf.data.
    x = x - negative[k] * (shifts[radius - k] + shifts[radius + k])
  return x


def sample_flip(seed):
  """Whether a view is mirrored: a boolean scalar, true with probability 1/2."""
  return tf.random.stateless_uniform([], seed) < 0.5


def _crop_and_flip(image, seed, size, crop_sampler, crop_area, flip, resize, finish=None):
  crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
  options = {"crop_sampler": crop_sampler, "crop_area": crop_area, "resize": resize, "finish": finish}
  view = random_crop(image, crop_seed, size=size, **options)
  return tf.cond(sample_flip(flip_seed), lambda: tf.reverse(view, [1]), lambda: view) if flip else view


def clip(image):
  return tf.clip_by_value(image, 0.0, 1.0)


def _check_image(image):
  image = tf.convert_to_tensor(image)
  if not image.shape.is_compatible_with([None, None, 3]):
    raise ValueError(f"image of shape {image.shape}: expected [h, w, 3]; repeat a gray image's channel three times")
  if image.dtype != tf.uint8 and not image.dtype.is_floating:
    raise ValueError(f"image of dtype {image.dtype.name}: expected uint8 (0 to 255) or a float type (0 to 1)")
  return tf.ensure_shape(image, [None, None, 3])


def check_static(image):
  if len(image.shape) not in (3, 4) or None in tuple(image.shape[-3:]):
    raise ValueError(f"image of shape {image.shape}: expected [h, w, c] or [n, h, w, c] with h, w and c known")
  return tuple(image.shape[-3:])


def check_probability(name, value):
  if not 0 <= value <= 1:
    raise ValueError(f"{name}={value!r}: expected a probability, 0 to 1")


def check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
