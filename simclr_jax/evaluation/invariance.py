"""What a representation keeps of the transformations of an image, and what it has become invariant to.

A linear classifier predicts from frozen features which transformation an image went through: color or grayscale, the
rotation, original or with noise, original or its edges.  A linear regression predicts two continuous ones: the hue, and
where the crop was taken.

Source: arXiv 2002.05709, Table 3, which trains nonlinear classifiers on h and on z and, for the last three of the four
predictions, pretrains with that transformation among the augmentations.
"""

from collections.abc import Callable

import numpy as np

from simclr_jax import augment_on_device
from simclr_jax.evaluation import linear

CHANCE = {"color": 1 / 2, "rotation": 1 / 4, "noise": 1 / 2, "sobel": 1 / 2, "hue": 0.0, "position": 0.0}
CLASSES = {  # prediction -> the versions of an image that are told apart
  "color": ("original", "grayscale"),
  "rotation": ("original", "turn 90", "turn 180", "turn 270"),
  "noise": ("original", "noise"),
  "sobel": ("original", "sobel"),
}
NOISE = 0.1  # standard deviation of the Gaussian noise
CROP = 0.6  # side of the crops whose position is predicted, as a fraction of the image's
COLORFUL = 0.02  # mean chroma, in the direction of the mean hue, below which an image has no hue
CHUNK = 250  # images encoded at once


def predictions(encode: Callable, train, test, *, seed: int = 0) -> dict[str, dict[str, float | None]]:
  """How well the transformations of an image can be predicted from its features; a function of its arguments.

  Args:
    encode: float32 images [m, s, s, 3] in [0, 1] -> {name: features [m, d]}, such as {"h": ..., "z": ...}.
    train, test: images as `encode` takes them, on which the readouts are fitted and scored; no image is in both.
    seed: of the noise, the turns of the hue and the places of the crops.

  Returns:
    {prediction: {name: score}} for the keys of CHANCE, which holds the scores of uninformative features.  "color",
    "rotation", "noise" and "sobel" are accuracies; "hue", whose target is the point of the unit circle at the mean hue
    weighted by chroma, and "position" are coefficients of determination (R²).  None where gray images leave nothing to
    predict.
  """
  parts = [_Features(encode, images, seed + k * 2**32) for k, images in enumerate((train, test))]
  names = list(parts[0].of["original"])
  colorful = [part.has_hue for part in parts]
  gray = min(has.sum() for has in colorful) < max(2, len(test) // 10)
  out = {}
  for prediction, versions in CLASSES.items():
    y, test_y = (np.repeat(np.arange(len(versions)), len(images)) for images in (train, test))

    def score(name, versions=versions, y=y, test_y=test_y):
      x, test_x = (np.concatenate([part.of[version][name] for version in versions]) for part in parts)
      return linear.linear_evaluation(x, y, test_x, test_y, num_classes=len(versions))

    out[prediction] = {name: None if gray and prediction == "color" else score(name) for name in names}
  for prediction, rows in (("hue", colorful), ("position", [slice(None), slice(None)])):

    def score(name, prediction=prediction, rows=rows):
      data = [
        (part.of[prediction][name][keep], part.target[prediction][keep]) for part, keep in zip(parts, rows, strict=True)
      ]
      return linear.regression_score(*data[0], *data[1])

    out[prediction] = {name: None if gray and prediction == "hue" else score(name) for name in names}
  return out


class _Features:
  """Features of every version of some images.

  Attributes:
    of: {version: {name: [n, d]}}.
    target: {"hue", "position"} -> float64 [n, 2], what is predicted from the versions of those names.
    has_hue: bool [n].
  """

  def __init__(self, encode, images, seed):
    rng = np.random.default_rng(seed)
    turns = rng.uniform(-0.5, 0.5, len(images))
    room = images.shape[1] - round(CROP * images.shape[1])
    corners = rng.integers(0, room + 1, (len(images), 2))
    pieces = [slice(i, i + CHUNK) for i in range(0, len(images), CHUNK)]
    of, hues = {}, []
    for piece in pieces:
      versions = _versions(images[piece], turns[piece], corners[piece], rng)
      hues.append(mean_hue(versions["hue"]))
      for version, pixels in versions.items():
        short = CHUNK - len(pixels) if len(images) > CHUNK else 0  # one shape to compile
        found = encode(np.pad(pixels, [(0, short), (0, 0), (0, 0), (0, 0)]))
        of.setdefault(version, []).append({name: np.asarray(x)[: len(pixels)] for name, x in found.items()})
    self.of = {v: {name: np.concatenate([p[name] for p in parts]) for name in parts[0]} for v, parts in of.items()}
    hue = np.concatenate(hues)
    length = np.linalg.norm(hue, axis=1, keepdims=True)
    self.has_hue = length[:, 0] >= COLORFUL
    self.target = {"hue": hue / np.maximum(length, 1e-12), "position": corners / max(room / 2, 1) - 1}


def _versions(x, turns, corners, rng):
  """{version: float32 [m, s, s, 3]} of images x."""
  still = np.ones((len(x), 3))
  factors = np.concatenate([still, turns[:, None]], 1).astype(np.float32)
  versions = {"original": x, "grayscale": augment_on_device.grayscale(x)}
  versions |= {f"turn {90 * k}": np.rot90(x, k, (1, 2)) for k in (1, 2, 3)}
  versions |= {
    "noise": np.clip(x + rng.normal(0, NOISE, x.shape), 0, 1),
    "sobel": sobel(x),
    "hue": augment_on_device.color_jitter(x, factors, None),
    "position": _crops(x, corners),
  }
  return {version: np.asarray(pixels, np.float32) for version, pixels in versions.items()}


def sobel(x):
  """Edges: the length of the Sobel gradient of each channel, over 4, clipped; x [n, h, w, 3] to the same."""
  padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
  rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]  # smoothed along the height
  columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
  across, down = rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2]
  return np.minimum(np.sqrt(across**2 + down**2) / 4, 1)


def _crops(x, corners):
  """Squares of CROP of the side with their top left corners at `corners` [n, 2], resized to what x was."""
  size, length = x.shape[1], np.full(len(x), round(CROP * x.shape[1]), np.int32)
  rows, columns = (augment_on_device.resize_matrix(corners[:, k].astype(np.int32), length, size, size) for k in (0, 1))
  return np.clip(np.einsum("nph,nhwc,nqw->npqc", rows, x, columns, optimize=True), 0, 1)


def mean_hue(x):
  """float64 [n, 2]: the mean over the pixels of x [n, h, w, 3] of (cos, sin) of their hue, weighted by their chroma."""
  r, g, b = np.moveaxis(np.asarray(x, np.float64), -1, 0)
  high, low = x.max(-1), x.min(-1)
  chroma = np.maximum(high - low, 1e-12)
  sixths = np.where(r == high, (g - b) / chroma, np.where(g == high, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
  angle = np.pi / 3 * sixths
  weighted = (high - low)[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
  return weighted.mean((1, 2))
