"""Crop and resize as card.json says: the pixels that the scores were measured on.  This file needs NumPy alone."""

import numpy as np


def center_crop(image, *, size: int, proportion: float, resize: str):
  """The central square of `proportion` of the shorter side, resized and clipped.

  Args:
    image: [h, w, 3], uint8, or floating point in [0, 1].
    size: side of the result, in pixels.
    proportion: card["preprocessing"]["center_crop"].
    resize: "bicubic", "bicubic_tf1", "bilinear" or "bicubic_antialias".
  Returns:
    [size, size, 3] float32 in [0, 1].
  """
  height, width = image.shape[:2]
  side = max(1, round(proportion * min(height, width)))
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  square = image[top : top + side, left : left + side]
  pixels = square.astype(np.float32) / 255 if square.dtype == np.uint8 else square.astype(np.float32)
  weights = _weights(side, size, resize)
  return np.clip(np.einsum("pw,qwc->qpc", weights, np.tensordot(weights, pixels, 1)), 0, 1, dtype=np.float32)


def _weights(length: int, size: int, resize: str):
  """[size, length]: what each of `size` pixels takes of `length`; rows add up to 1."""
  half, a = (0.0, -0.75) if resize == "bicubic_tf1" else (0.5, -0.5)
  scale = np.float32(length) / np.float32(size)  # places are rounded as TensorFlow rounds them
  wide = max(scale, 1.0) if resize == "bicubic_antialias" else 1.0  # a kernel as wide as the pixels that it makes
  at = np.maximum((np.arange(size, dtype=np.float32) + np.float32(half)) * scale, 0) - np.float32(half)
  reach = int(np.ceil(2 * wide)) + 1
  if resize in ("bicubic", "bicubic_tf1"):  # TensorFlow looks these kernels up in a table of 1024 steps a pixel
    at = np.floor(at) + np.round((at - np.floor(at)) * 1024) / 1024
  taps = np.floor(at).astype(int)[:, None] + np.arange(-reach, reach + 1)
  t = np.abs(taps - at[:, None]) / wide
  if resize == "bilinear":
    weight = np.maximum(1 - t, 0)
  else:  # Keys' kernel
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weight = np.where(t < 1, near, np.where(t < 2, far, 0))
  if resize != "bicubic_tf1":  # which repeats the pixel at the edge instead
    weight = np.where((taps >= 0) & (taps < length), weight, 0)
  matrix = np.zeros((size, length), np.float32)
  np.add.at(matrix, (np.arange(size)[:, None], np.clip(taps, 0, length - 1)), weight)
  return matrix / matrix.sum(1, keepdims=True)
