"""The family T on the accelerator: crop, color distortion and blur of whole batches, inside the training step.

These are the same operations with the same numbers as in augment.py, which applies them to one image at a time on the host;
only the random draws differ.  They come from a key for every example, so a view depends only on its example's seed, not on
its batch or on the number of devices or hosts.

Every image has its own order of the four color operations, yet there is no branch: brightness and contrast are affine,
saturation and hue are one step in the HSV hexcone and commute, so every order of the four is a choice of what the slots

    HSV, affine, HSV, affine, HSV

do, most of them nothing.  Blur is a product with a banded matrix, and so is the crop with its resize: on matrix units this
takes a percent of a ResNet-50's step, where a grouped convolution takes a tenth.
"""

import functools

import jax
import jax.numpy as jnp

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of a random crop
SIGMA_RANGE = (0.1, 2.0)  # of the blur, in pixels
MAX_STRENGTH = 1.25  # where 1 - 0.8 s, the lowest contrast and saturation factor, reaches 0
GRAY = (0.2989, 0.587, 0.114)
TRIES = 32  # boxes drawn at once; with the papers' values each is accepted nine times out of ten


def two_views(
  image,
  extent,
  seed,
  *,
  size,
  crop_sampler="official",
  crop_area=(0.08, 1.0),
  flip=True,
  resize="bicubic",
  precision="default",
  **color_and_blur_options,
):
  """Two views of every image of a batch; the counterpart of augment.two_views.

  Args:
    image: [n, H, W, 3] uint8; image i fills the top left corner, and the rest of the canvas is ignored.
    extent: [n, 2] int32, height and width of the images on their canvases.
    seed: [n, 2] int32, one for every example.
    size: side of the views, in pixels.
    crop_sampler, crop_area, flip, resize: as in augment.two_views.
    precision: of the products, as in jax.lax.dot_general.  A TPU's "default" rounds the operands to bfloat16: errors
      of about half of a 256th; "highest" is float32.
    color_and_blur_options: see `color_and_blur`.
  Returns:
    [n, 2, size, size, 3] float32 in [0, 1].
  Raises:
    ValueError: an option is out of range.
  """
  crops = random_crops(
    image, extent, seed, size=size, crop_sampler=crop_sampler, crop_area=crop_area, flip=flip, resize=resize,
    precision=precision,
  )  # fmt: skip
  return color_and_blur(crops, seed, precision=precision, **color_and_blur_options)


def color_and_blur(
  views,
  seed,
  *,
  color_strength=1.0,
  blur=True,
  brightness="v2",
  color_jitter_prob=0.8,
  grayscale_prob=0.2,
  blur_prob=0.5,
  color_order="random",
  precision="default",
):
  """Color distortion and blur of crops, with the options of augment.two_views.

  Args:
    views: [n, 2, h, w, 3], uint8 as `augment.two_crops` leaves them, or floating point in [0, 1].
    seed: [n, 2] int32, one for every example.
    color_order: "random", a new order for every view; or "fixed", brightness, contrast, saturation, hue, in half the time.
    precision: of the blur's products, see `two_views`.
  Returns:
    [n, 2, h, w, 3] float32 in [0, 1].
  Raises:
    ValueError: an option is out of range.
  """
  if not 0 <= color_strength <= MAX_STRENGTH:
    raise ValueError(f"color_strength={color_strength!r}: expected 0 to {MAX_STRENGTH}")
  if brightness not in ("v2", "v1"):
    raise ValueError(f"brightness={brightness!r}: expected one of 'v2', 'v1'")
  if color_order not in ("random", "fixed"):
    raise ValueError(f"color_order={color_order!r}: expected one of 'random', 'fixed'")
  for name, value in (
    ("color_jitter_prob", color_jitter_prob),
    ("grayscale_prob", grayscale_prob),
    ("blur_prob", blur_prob),
  ):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}={value!r}: expected a probability, 0 to 1")
  n, two, height, width, channels = views.shape
  # Three planes: channels side by side would be taken apart and put together again around every operation.
  planes = tuple(views.reshape(n * two, height, width, channels)[..., k] for k in range(3))
  if views.dtype == jnp.uint8:
    # The host cut the fraction off; its middle, half a level, is the estimate that is nowhere off by more than that.
    planes = tuple(jnp.minimum((x.astype(jnp.float32) + 0.5) / 255, 1) for x in planes)
  color_keys, blur_keys = (view_keys(seed, purpose) for purpose in ("color", "blur"))
  if color_strength:
    jitter, gray, factors, order = sample_color(
      color_keys, strength=color_strength, jitter_prob=color_jitter_prob, grayscale_prob=grayscale_prob
    )
    order = order if color_order == "random" else None
    planes = _choose(jitter, _color_jitter(planes, factors, order, brightness), planes)
    planes = _choose(gray, (_luma(planes),) * 3, planes)
  planes = tuple(jnp.clip(x, 0, 1) for x in planes)
  if blur and height >= 20:  # under 20 pixels the kernel has one tap
    apply, sigma = sample_blur(blur_keys, prob=blur_prob)
    rows, columns = (_band(length, height // 10, sigma) for length in (height, width))
    blurred = tuple(jnp.clip(_sandwich(rows, x, columns, precision), 0, 1) for x in planes)
    planes = _choose(apply, blurred, planes)
  return jnp.stack(planes, axis=-1).reshape(views.shape)


# ---- color ----------------------------------------------------------------------------------------------------


def color_jitter(images, factors, order, *, brightness="v2"):
  """Brightness, contrast, saturation and hue in the order given, each followed by a clip to [0, 1].

  Args:
    images: [n, h, w, 3] float32 in [0, 1], up to bicubic overshoot.
    factors: [n, 4], of the four; of the hue, its turn in circles.
    order: [n, 4] integers, the indices of the four in the order in which they are applied; None for 0, 1, 2, 3.
    brightness: "v2" multiplies by the factor, "v1" adds the factor minus one.
  Returns:
    [n, h, w, 3] float32 in [0, 1].
  """
  planes = tuple(images[..., k] for k in range(3))
  return jnp.stack(_color_jitter(planes, factors, order, brightness), axis=-1)


def _color_jitter(planes, factors, order, brightness):
  if order is None:
    no = jnp.zeros(len(factors), bool)  # a constant: the compiler leaves out what it does not choose
    planes = _affine(planes, factors[:, 0], factors[:, 1], ~no, brightness)
    planes = _affine(planes, factors[:, 0], factors[:, 1], no, brightness)
    return _hexcone(planes, factors[:, 2], factors[:, 3], ~no, ~no)
  place = jnp.argsort(order, axis=-1)  # when each of the four has its turn
  bright, contrast, saturation, hue = (place[:, k] for k in range(4))
  # The slot of an HSV operation is the number of affine ones before it.
  slot_saturation, slot_hue = ((bright < p).astype(int) + (contrast < p) for p in (saturation, hue))
  # Where both come first, what the clip between them would do to the overshoot is done before them.
  both_first = (slot_saturation == 0) & (slot_hue == 0)
  planes = _choose(both_first, tuple(jnp.clip(x, 0, 1) for x in planes), planes)
  for slot in range(3):
    if slot:
      # Materialized, or the compiler computes everything before the mean once for the mean and once more for its use.
      planes = jax.lax.optimization_barrier(planes)
      first = bright < contrast if slot == 1 else contrast < bright
      planes = _affine(planes, factors[:, 0], factors[:, 1], first, brightness)
    planes = _hexcone(planes, factors[:, 2], factors[:, 3], slot_saturation == slot, slot_hue == slot)
  return planes


def _affine(planes, brightness_factor, contrast_factor, is_brightness, brightness):
  """Brightness where `is_brightness`, else contrast about the mean of each channel; clipped."""
  b, c, choice = (v[:, None, None] for v in (brightness_factor, contrast_factor, is_brightness))
  scale, shift = (b, 0 * b) if brightness == "v2" else (1 + 0 * b, b - 1)
  scale = jnp.where(choice, scale, c)
  means = (jnp.mean(x, axis=(1, 2), keepdims=True) for x in planes)
  return tuple(
    jnp.clip(scale * x + jnp.where(choice, shift, mean * (1 - c)), 0, 1) for x, mean in zip(planes, means, strict=True)
  )


def _hexcone(planes, saturation, turn, with_saturation, with_hue):
  """Saturation times a factor and hue turned, each where its flag says so; clipped where either does.

  A channel lies below the largest, V, by the chroma C times a share that depends on the hue alone.
  """
  saturation, turn, with_saturation, with_hue = (
    v[:, None, None] for v in (saturation, turn, with_saturation, with_hue)
  )
  r, g, b = planes
  value, low = jnp.maximum(jnp.maximum(r, g), b), jnp.minimum(jnp.minimum(r, g), b)
  chroma = value - low
  new = jnp.where(with_saturation, jnp.where(value > 0, jnp.minimum(saturation * chroma, value), 0), chroma)
  over = 1 / jnp.where(chroma > 0, chroma, 1)
  sixths = jnp.where(r == value, (g - b) * over, jnp.where(g == value, 2 + (b - r) * over, 4 + (r - g) * over))
  sixths = sixths + jnp.where(with_hue, 6 * turn, 0)
  out = []
  for plane, offset in zip(planes, (5, 3, 1), strict=True):
    k = offset + sixths
    k = k - 6 * jnp.floor(k * (1 / 6))
    changed = jnp.clip(value - new * jnp.clip(jnp.minimum(k, 4 - k), 0, 1), 0, 1)
    out.append(jnp.where(with_saturation | with_hue, changed, plane))
  return tuple(out)


def grayscale(images):
  """Luma of [..., 3] (weights 0.2989, 0.587, 0.114) in all three channels."""
  return jnp.broadcast_to(_luma(jnp.moveaxis(images, -1, 0))[..., None], images.shape)


def _luma(planes):
  return sum(weight * x for weight, x in zip(GRAY, planes, strict=True))


# ---- blur ------------------------------------------------------------------------------------------------------


def gaussian_blur(images, *, kernel_size, sigma, precision="highest"):
  """Separable Gaussian blur with zero padding, as augment.gaussian_blur, as two products with banded matrices.

  Args:
    images: [n, h, w, c] float32.
    kernel_size: the kernel has 2 * (kernel_size // 2) + 1 taps.
    sigma: [n], standard deviations in pixels.
  Returns:
    As images.
  """
  rows, columns = (_band(length, kernel_size, sigma) for length in images.shape[1:3])
  planes = (_sandwich(rows, images[..., k], columns, precision) for k in range(images.shape[-1]))
  return jnp.stack(list(planes), axis=-1)


def _band(length, kernel_size, sigma):
  """[n, length, length]: the blur along one axis as a matrix."""
  radius = kernel_size // 2
  distance = jnp.arange(length)[:, None] - jnp.arange(length)
  weight = jnp.exp(-(distance**2) / (2 * sigma[:, None, None] ** 2))
  taps = jnp.exp(-(jnp.arange(-radius, radius + 1) ** 2) / (2 * sigma[:, None] ** 2)).sum(-1)
  return jnp.where(jnp.abs(distance) <= radius, weight, 0) / taps[:, None, None]


def _sandwich(rows, plane, columns, precision):
  """rows [n, p, h] · plane [n, h, w] · columns [n, q, w] transposed -> [n, p, q]."""
  x = jnp.einsum("nph,nhw->npw", rows, plane, precision=precision)
  return jnp.einsum("npw,nqw->npq", x, columns, precision=precision)


# ---- crop ------------------------------------------------------------------------------------------------------


def random_crops(image, extent, seed, *, size, crop_sampler, crop_area, flip, resize, precision):
  """Two random boxes of every image, resized and mirrored or not; arguments as in `two_views`.

  Returns [n, 2, size, size, 3] float32, bicubic overshoot of [0, 1] not clipped.
  """
  n = len(image)
  keys, flip_keys = view_keys(seed, "crop"), view_keys(seed, "flip")
  height, width = (jnp.repeat(extent[:, k], 2) for k in range(2))
  y, x, h, w = sample_boxes(keys, height, width, crop_sampler=crop_sampler, crop_area=crop_area)
  mirrored = jax.vmap(jax.random.bernoulli)(flip_keys) if flip else jnp.zeros(2 * n, bool)
  rows = resize_matrix(y, h, size, image.shape[1], kind=resize)
  columns = resize_matrix(x, w, size, image.shape[2], mirrored, kind=resize)
  # What a TPU would round to bfloat16 anyway is kept in it: half the bytes.  Pixels are whole and below 256: exact.
  dtype = jnp.bfloat16 if precision == "default" else jnp.float32
  rows, columns = (m.reshape(n, 2, size, -1).astype(dtype) for m in (rows, columns))
  x = jnp.einsum("nvph,nhwc->nvpwc", rows, image.astype(dtype), precision=precision)
  x = jnp.einsum("nvqw,nvpwc->nvpqc", columns, x, precision=precision, preferred_element_type=jnp.float32)
  return x / 255


def center_crop(images, extent=None, *, size, proportion=0.875, resize="bicubic"):
  """Evaluation preprocessing: the central square of `proportion` of the shorter side, resized and clipped.

  Args:
    images: [n, H, W, 3], uint8, or floating point in [0, 1].
    extent: [n, 2] int32, heights and widths of images that lie in the top left corners; None for whole images.
    size, proportion, resize: as in augment.center_crop.
  Returns:
    [n, size, size, 3] float32 in [0, 1].
  Raises:
    ValueError: an option, or the shape or dtype of images, is out of range.
  """
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images of shape {list(images.shape)}: expected [n, h, w, 3]")
  if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images of dtype {images.dtype}: expected uint8 (0 to 255) or a float type (0 to 1)")
  if not 0 < proportion <= 1:
    raise ValueError(f"proportion={proportion!r}: expected above 0 and up to 1; the official value is 0.875")
  if not isinstance(size, int) or size < 1:
    raise ValueError(f"size={size!r}: expected a positive integer, the side of the result in pixels")
  # One box for all is one row here, so one matrix for all below.
  height, width = (jnp.asarray([images.shape[1:3]]) if extent is None else extent).T
  side = jnp.round(proportion * jnp.minimum(height, width).astype(jnp.float32)).astype(jnp.int32)
  side = jnp.maximum(side, 1)
  rows = resize_matrix((height - side + 1) // 2, side, size, images.shape[1], kind=resize)
  columns = resize_matrix((width - side + 1) // 2, side, size, images.shape[2], kind=resize)
  x = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
  x = jnp.matmul(rows[:, None], jnp.moveaxis(x, -1, 1), precision="highest")  # [n, 3, size, W]
  x = jnp.matmul(x, columns[:, None].mT, precision="highest")
  return jnp.clip(jnp.moveaxis(x, 1, -1), 0, 1)


def resize_matrix(start, length, size, canvas, mirrored=False, *, kind="bicubic"):
  """A resize along one axis as a matrix of weights.

  Args:
    start, length: [n] int32, where the pieces to be resized lie on a canvas of `canvas` pixels.
    size: pixels after the resize.
    mirrored: [n] boolean, or one for all: whether the piece is flipped.
    kind: one of augment.RESIZES, see augment.resize_image.  The cubic kernels' argument is rounded to 1/1024, as in
      TensorFlow's table, which "bicubic_antialias" does not use.
  Returns:
    [n, size, canvas] float32; rows add up to 1.  Taps beyond the piece are left out, but for "bicubic_tf1", which
    repeats the pixel at the edge.
  Raises:
    ValueError: another kind.
  """
  if kind not in ("bicubic", "bicubic_tf1", "bilinear", "bicubic_antialias"):
    raise ValueError(f"resize={kind!r}: expected one of 'bicubic', 'bicubic_tf1', 'bilinear', 'bicubic_antialias'")
  a = -0.75 if kind == "bicubic_tf1" else -0.5
  start, length, mirrored = start[:, None], length[:, None], jnp.reshape(mirrored, (-1, 1))
  pixel = jnp.where(mirrored, jnp.arange(size)[::-1], jnp.arange(size))
  half = 0 if kind == "bicubic_tf1" else 0.5
  # TensorFlow divides and then rounds a product; large images show it where the compiler multiplies by 1 / size or
  # fuses the subtraction.  The barrier and the maximum, which changes nothing, keep it from both.
  scale = length / jax.lax.optimization_barrier(jnp.full(length.shape, size, jnp.float32))
  if kind == "bicubic_antialias":
    offset = jnp.arange(canvas) - start  # [n, canvas]
    far = jnp.abs(offset[:, None] + 0.5 - ((pixel + 0.5) * scale)[..., None]) / jnp.maximum(scale, 1)[..., None]
    weights = jnp.where(((offset >= 0) & (offset < length))[:, None], _keys(far, a), 0)
    return weights / weights.sum(-1, keepdims=True)
  at = jnp.maximum((pixel + half) * scale, 0) - half  # [n, size]
  floor = jnp.floor(at)
  fraction = at - floor
  if kind != "bilinear":
    fraction = jnp.round(fraction * 1024) / 1024
  first = floor.astype(jnp.int32) - 1
  weights = []  # of the four taps, each [n, size]: small arrays, which the compiler then fuses into the products
  for k in range(4):
    t = jnp.abs(k - 1 - fraction)
    weight = _keys(t, a) if kind != "bilinear" else jnp.maximum(1 - t, 0)
    inside = (first + k >= 0) & (first + k < length)
    weights.append(weight if kind == "bicubic_tf1" else jnp.where(inside, weight, 0))
  total = sum(weights)
  matrix = jnp.zeros((), jnp.float32)
  for k, weight in enumerate(weights):
    tap = start + jnp.clip(first + k, 0, length - 1)  # [n, size]; taps that are left out add 0
    matrix += jnp.where(jnp.arange(canvas) == tap[..., None], (weight / total)[..., None], 0)
  return matrix


def _keys(t, a):
  """Keys' cubic kernel at the distance t >= 0, in pixels."""
  near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
  return jnp.where(t < 1, near, jnp.where(t < 2, far, 0))


def sample_boxes(keys, height, width, *, crop_sampler="official", crop_area=(0.08, 1.0)):
  """One random box in every image, by the law of augment.sample_box.

  Args:
    keys: [n] PRNG keys.
    height, width: [n] int32.
  Returns:
    (y, x, h, w), each [n] int32: top left corner and size.
  Raises:
    ValueError: unknown sampler, or not 0 < lowest <= highest <= 1.
  """
  if crop_sampler not in ("official", "torchvision"):
    raise ValueError(f"crop_sampler={crop_sampler!r}: expected one of 'official', 'torchvision'")
  low, high = crop_area
  if not 0 < low <= high <= 1:
    raise ValueError(f"crop_area={crop_area!r}: expected 0 < lowest <= highest <= 1, for example (0.08, 1.0)")
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2 * TRIES + 2,)))(keys)
  first, second, corner = uniform[:, :TRIES], uniform[:, TRIES : 2 * TRIES], uniform[:, -2:]
  image_h, image_w = height[:, None].astype(jnp.float32), width[:, None].astype(jnp.float32)
  law = _official if crop_sampler == "official" else _torchvision
  h, w, fits = law(first, second, image_h, image_w, low, high)
  choice = jnp.argmax(fits, axis=1)[:, None]
  found = jnp.any(fits, axis=1, keepdims=True)
  h, w = (jnp.take_along_axis(v, choice, axis=1) for v in (h, w))
  if crop_sampler == "official":  # the corner never touches the far edge, but for boxes that leave no choice
    h, w = jnp.where(found, h, image_h), jnp.where(found, w, image_w)
    y, x = (jnp.floor(corner[:, k : k + 1] * room) for k, room in enumerate((image_h - h, image_w - w)))
  else:
    h = jnp.where(found, h, jnp.minimum(image_h, jnp.round(image_w / ASPECT_RANGE[0])))
    w = jnp.where(found, w, jnp.minimum(image_w, jnp.round(image_h * ASPECT_RANGE[1])))
    room_h, room_w = image_h - h, image_w - w
    y = jnp.floor(jnp.where(found, corner[:, :1] * (room_h + 1), room_h / 2))
    x = jnp.floor(jnp.where(found, corner[:, 1:] * (room_w + 1), room_w / 2))
  return tuple(v[:, 0].astype(jnp.int32) for v in (y, x, h, w))


def _official(first, second, image_h, image_w, low, high):
  """TensorFlow's sample_distorted_bounding_box with min_object_covered = 0.1: aspect uniform, then height uniform."""
  aspect = ASPECT_RANGE[0] + (ASPECT_RANGE[1] - ASPECT_RANGE[0]) * first
  lowest, highest = low * image_h * image_w, high * image_h * image_w
  least, most = jnp.round(jnp.sqrt(lowest / aspect)), jnp.round(jnp.sqrt(highest / aspect))
  most = jnp.where(jnp.round(most * aspect) > image_w, jnp.floor((image_w + 0.5) / aspect), most)
  most = jnp.where(jnp.round(most * aspect) > image_w, most - 1, most)
  most = jnp.minimum(most, image_h)
  least = jnp.minimum(least, most)
  h = least + jnp.floor(second * (most - least + 1))
  for step in (1, -1):  # a box that misses the range by a rounding error gets a second chance
    area = h * jnp.round(h * aspect)
    h = h + jnp.where(area < lowest if step > 0 else area > highest, step, 0)
  w = jnp.round(h * aspect)
  area = h * w
  fits = (area >= jnp.maximum(lowest, 0.1 * image_h * image_w)) & (area <= highest)
  return h, w, fits & (h >= 1) & (w >= 1) & (h <= image_h) & (w <= image_w)


def _torchvision(first, second, image_h, image_w, low, high):
  """RandomResizedCrop: area uniform, aspect log-uniform, ten tries."""
  area = image_h * image_w * (low + (high - low) * first)
  aspect = ASPECT_RANGE[0] * (ASPECT_RANGE[1] / ASPECT_RANGE[0]) ** second
  h, w = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
  return h, w, (h >= 1) & (h <= image_h) & (w >= 1) & (w <= image_w) & (jnp.arange(TRIES) < 10)


# ---- draws -----------------------------------------------------------------------------------------------------


PURPOSES = ("crop", "flip", "color", "blur")


def view_keys(seed, purpose):
  """[n, 2] int32, one seed for every example -> [2 n] keys, of view 0 and 1 of each, for one purpose alone."""
  keys = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
  number = 2 * PURPOSES.index(purpose) + jnp.arange(2)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(keys, number).reshape(-1)


def sample_color(keys, *, strength, jitter_prob=0.8, grayscale_prob=0.2):
  """What a color distortion draws, by the law of augment.sample_color.

  Returns:
    (jitter, gray, factors, order) for the n keys: two booleans [n]; [n, 4] float32, the factors of brightness,
    contrast and saturation, and the turn of the hue; [n, 4] int32, the order of the four.
  """
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (10,)))(keys)
  spread = strength * jnp.asarray((0.8, 0.8, 0.8, 0.2))
  factors = jnp.asarray((1.0, 1.0, 1.0, 0.0)) + (2 * uniform[:, 2:6] - 1) * spread
  return uniform[:, 0] < jitter_prob, uniform[:, 1] < grayscale_prob, factors, jnp.argsort(uniform[:, 6:], axis=-1)


def sample_blur(keys, *, prob=0.5):
  """What a random blur draws for n keys: (whether, sigma), a boolean and a float32, each [n]."""
  uniform = jax.vmap(functools.partial(jax.random.uniform, shape=(2,)))(keys)
  low, high = SIGMA_RANGE
  return uniform[:, 0] < prob, low + (high - low) * uniform[:, 1]


def _choose(flag, yes, no):
  """Planes `yes` where the flag of the image is set, else `no`."""
  return tuple(_where(flag, a, b) for a, b in zip(yes, no, strict=True))


def _where(flag, yes, no):
  """jnp.where with a flag for every image: [n], [n, ...], [n, ...]."""
  return jnp.where(flag.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)
