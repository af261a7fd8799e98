"""`textures`: a procedural color set in which color identifies the image and says nothing of its class.

SimCLR (arXiv:2002.05709, section 3.1 and figure 6) explains why cropping needs color distortion beside it: two
crops of one image share a color histogram, so a network can solve the contrastive task by color alone.  This
set isolates that effect.  The ten classes are patterns; frequency, phase, warp, rotation, polarity, covered
fraction, palette, color cast and illumination are drawn independently of the class.

Every image is a pure function of (seed, index): nothing is stored, downloaded or licensed.
"""

import numpy as np

from simclr_jax.runtime.errors import UserError

CLASS_NAMES = (
  "stripes_h",
  "stripes_v",
  "checker",
  "dots",
  "rings",
  "blobs",
  "bricks",
  "crosses",
  "zigzag",
  "block_noise",
)

_TAU = np.float32(2 * np.pi)


def _wave(x):
  """Triangle wave of period 1 with values in [0, 1]: 0 at the integers, 1 half-way between them."""
  return 1 - np.abs(2 * (x - np.floor(x)) - 1)


def _field(label, u, v, rng):
  """The continuous field whose level sets are the pattern: u, v float32 [size, size] in periods -> the same."""
  name = CLASS_NAMES[label]
  if name == "stripes_h":
    return _wave(v)
  if name == "stripes_v":
    return _wave(u)
  if name == "checker":
    return np.sin(_TAU / 2 * u) * np.sin(_TAU / 2 * v)
  if name == "dots":
    return -np.hypot(_wave(u) - 1, _wave(v) - 1)
  if name == "rings":
    du, dv = rng.uniform(-1.6, 1.6, 2).astype(np.float32)
    return _wave(np.hypot(u - u.mean() - du, v - v.mean() - dv))
  if name == "blobs":
    # Plane waves of like length in random directions: isotropic, without a lattice.
    angles, phases = rng.uniform(0, _TAU, (2, 5, 1, 1)).astype(np.float32)
    return np.sin(_TAU * 0.8 * (np.cos(angles) * u + np.sin(angles) * v) + phases).sum(0)
  if name == "bricks":
    row = np.floor(v)
    return np.minimum(_wave(v), 2 * _wave(0.5 * (u + row)))
  if name == "crosses":
    a, b = 1 - _wave(u), 1 - _wave(v)
    # An upright cross: near either axis of its cell, and inside the cell.
    return -np.maximum(np.minimum(a, b), 0.4 * np.maximum(a, b))
  if name == "zigzag":
    return _wave(v + 0.9 * _wave(0.8 * u))
  cells = rng.random((16, 16), dtype=np.float32)
  return cells[np.floor(2 * v).astype(np.int32) % 16, np.floor(2 * u).astype(np.int32) % 16]


def image(seed: int, index: int, *, size: int = 32) -> tuple[np.ndarray, int]:
  """Draws image `index` of the set `seed`.

  Args:
    seed: which set; two seeds share no image.
    index: which image, >= 0; its class is index % 10, so any run of ten images is balanced.
    size: side in pixels, 32 or 64.

  Returns:
    (uint8 [size, size, 3], label in 0..9, naming CLASS_NAMES[label]).
  """
  if size not in (32, 64):
    raise UserError(f"size={size}: textures are drawn at 32 or 64 pixels; use one of these")
  rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
  label = index % 10
  (turn, frequency, phase_u, phase_v, warp, warp_u, warp_v, covered, softness, cast_strength, light, light_angle) = (
    rng.random(12, dtype=np.float32).tolist()
  )

  # Coordinates: rotated by +-0.2 rad, bent by a slow wave, then counted in periods of the pattern.
  line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
  x, y = line[None, :], line[:, None]
  angle = 0.4 * (turn - 0.5)
  u = np.cos(angle, dtype=np.float32) * x + np.sin(angle, dtype=np.float32) * y
  v = np.cos(angle, dtype=np.float32) * y - np.sin(angle, dtype=np.float32) * x
  bend = np.float32(0.04 * warp)
  u, v = u + bend * np.sin(_TAU * (v + np.float32(warp_u))), v + bend * np.sin(_TAU * (u + np.float32(warp_v)))
  periods = np.float32(2 + 2.5 * frequency)
  field = _field(label, periods * u + np.float32(8 * phase_u), periods * v + np.float32(8 * phase_v), rng)

  # Cut at a quantile: the covered fraction, and with it the color histogram, is then independent of the class.
  rank = int((0.3 + 0.4 * covered) * size * size)
  level = np.partition(field, rank, axis=None)[rank]
  spread = np.float32(0.1 + 0.4 * softness) * (field.std() + np.float32(1e-6))
  ink = np.clip((field - level) / spread + np.float32(0.5), 0, 1)[..., None]

  # Two random colors that differ in luminance by at least 0.25 (the shape must be visible in gray too), either
  # of which may be the brighter (polarity); a cast and a light gradient over both.
  colors = rng.random((2, 3), dtype=np.float32)
  luminance = np.array([0.299, 0.587, 0.114], np.float32)
  while abs(float((colors[0] - colors[1]) @ luminance)) < 0.25:
    colors = rng.random((2, 3), dtype=np.float32)
  cast = 1 + np.float32(0.4 * cast_strength) * (rng.random(3, dtype=np.float32) - np.float32(0.5))
  slope = np.cos(light_angle * _TAU) * x + np.sin(light_angle * _TAU) * y
  shade = (1 + np.float32(0.5 * light) * slope)[..., None]
  picture = (colors[0] + ink * (colors[1] - colors[0])) * cast * shade
  picture += np.float32(0.03) * rng.standard_normal(picture.shape, dtype=np.float32)
  return (np.clip(picture, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8), label


def split(seed: int, count: int, *, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """The first `count` images of the set `seed`: (uint8 [count, size, size, 3], int32 labels [count])."""
  images = np.empty((count, size, size, 3), np.uint8)
  for index in range(count):
    images[index] = image(seed, index, size=size)[0]
  return images, np.arange(count, dtype=np.int32) % 10
