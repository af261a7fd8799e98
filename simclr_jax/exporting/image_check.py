"""The images that an encoder takes.  This file needs NumPy alone and stands in every exported folder as well."""

import numpy as np

OVERSHOOT = 0.5  # below 0 and above 1: more than bicubic interpolation leaves, less than standardized images have


def check_images(images, size: int):
  """float32 [n, size, size, 3] of what an encoder is called with; uint8 0 to 255 becomes [0, 1].

  Without this, images of another range or size give an h that looks like any other and means nothing.

  Args:
    images: uint8, or floating point in [0, 1]: [n, size, size, 3], RGB.
    size: side of the images that the encoder was evaluated with, from its card.

  Raises:
    ValueError: another shape, dtype or range.
  """
  images = np.asarray(images)
  check_shape(images, size)
  return check_range(images)


def check_range(images):
  """float32 in [0, 1] of uint8 or such floats, of any shape; raises ValueError for others."""
  check_type(images)
  if images.dtype == np.uint8:
    return images.astype(np.float32) / 255
  images = images.astype(np.float32)
  low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 1.0)
  if not (-OVERSHOOT <= low and high <= 1 + OVERSHOOT):  # NaN is neither
    raise ValueError(
      f"images range from {low:g} to {high:g}: expected floats in [0, 1], without mean or std, or uint8 0 to 255"
    )
  return images


def check_type(images):
  if images.dtype != np.uint8 and images.dtype.kind != "f" and images.dtype.name != "bfloat16":
    raise ValueError(f"images are {images.dtype}: expected floats in [0, 1] or uint8 0 to 255")


def check_shape(images, size: int):
  """Raises ValueError unless `images` are floats or uint8 [n, size, size, 3]; it looks at shape and dtype alone."""
  check_type(images)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images are {list(images.shape)}: expected [n, {size}, {size}, 3]")
  if images.shape[1:3] != (size, size):
    raise ValueError(
      f"images are {images.shape[1]} x {images.shape[2]} and this encoder's card says {size} x {size}: crop and resize "
      "them as card.json's preprocessing says (simclr_jax.embed does)"
    )
