"""The other transformations of the papers against NumPy, SciPy and Pillow, and their place in `two_views`."""

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from PIL import Image, ImageOps

from simclr_jax import augment, pretrain
from simclr_jax.runtime import config as config_lib

IMAGE = np.random.default_rng(0).random((24, 24, 3)).astype(np.float32) ** 2
SEED = (1, 2)


def test_sobel():
  expected = [np.hypot(*(scipy.ndimage.sobel(IMAGE[..., c], axis, mode="mirror") for axis in (0, 1))) for c in range(3)]
  np.testing.assert_allclose(augment.sobel(IMAGE), np.clip(np.stack(expected, -1) / 4, 0, 1), atol=1e-5)


def test_solarize():
  np.testing.assert_allclose(augment.solarize(np.float32([[[0.2, 0.5, 0.9]]])), [[[0.2, 0.5, 0.1]]], atol=1e-7)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
def test_equalize_is_pillows(spread):
  levels = np.uint8(np.round(255 * (0.3 + spread * 0.6 * IMAGE)))
  expected = np.asarray(ImageOps.equalize(Image.fromarray(levels)))
  np.testing.assert_array_equal(np.round(255 * augment.equalize(levels / np.float32(255)).numpy()), expected)


def test_motion_blur_is_the_mean_along_a_line():
  dot = np.zeros((60, 60, 3), np.float32)
  dot[30, 30] = 1
  angles = set()
  for k in range(8):
    line = augment.motion_blur(dot, (0, k)).numpy()
    assert line.sum() == pytest.approx(3, rel=1e-5) and line.max() < 0.35  # 7 pixels, two of which may round to one
    at = np.argwhere(line[..., 0] > 0)
    covariance = np.linalg.eigvalsh(np.cov(at.T))
    assert 4 <= len(at) <= 7 and covariance[0] < 0.2 * covariance[1]
    angles.add(tuple(at[0] - at[-1]))
  assert len(angles) > 3


def test_cutout_is_a_square_of_half_the_side():
  sizes = set()
  for k in range(30):
    out = augment.cutout(np.zeros((24, 24, 3), np.float32), (0, k)).numpy()
    rows, columns = (out[..., 0] == 0.5).any(1).sum(), (out[..., 0] == 0.5).any(0).sum()
    assert (out == 0.5).sum() == 3 * rows * columns and 6 <= rows <= 12 and 6 <= columns <= 12
    sizes.add((rows, columns))
  assert len(sizes) > 5


def test_rotate():
  turned = {k: augment.rotate(IMAGE, (0, k)).numpy() for k in range(12)}
  found = {[np.array_equal(x, np.rot90(IMAGE, k)) for k in range(4)].index(True) for x in turned.values()}
  assert found == {1, 2, 3}


def test_noise():
  grey = np.full((64, 64, 3), 0.5, np.float32)
  spreads = [np.std(augment.noise(grey, (0, k))) for k in range(40)]
  assert min(spreads) < 0.03 and 0.16 < max(spreads) < 0.205 and np.mean(spreads) == pytest.approx(0.1, abs=0.03)


def test_they_take_their_place_in_the_views():
  """Given probability 0 nothing changes, given 1 they act on every view; in tf.data as eagerly; mistakes are one line."""
  options = {"size": 16, "color_strength": 0.0, "blur": False}
  plain = augment.two_views(IMAGE, SEED, **options)
  every = tuple((name, 1.0) for name in augment.EXTRA)
  np.testing.assert_array_equal(augment.two_views(IMAGE, SEED, **options, extra=[(n, 0.0) for n, _ in every]), plain)
  solarized = augment.two_views(IMAGE, SEED, **options, extra=(("solarize", 1.0),))
  np.testing.assert_array_equal(solarized, np.stack([augment.solarize(view) for view in plain]))
  data = tf.data.Dataset.from_tensors(IMAGE).map(lambda x: augment.two_views(x, SEED, **options, extra=every))
  in_graph, eager = next(iter(data)), augment.two_views(IMAGE, SEED, **options, extra=every)
  assert in_graph.shape == (2, 16, 16, 3)
  np.testing.assert_allclose(in_graph, eager, atol=1e-5)
  half = [augment.two_views(IMAGE, (0, k), **options, extra=(("rotate", 0.5),)) for k in range(20)]
  without = [augment.two_views(IMAGE, (0, k), **options) for k in range(20)]
  share = np.mean([np.array_equal(a, b) for x, y in zip(half, without, strict=True) for a, b in zip(x, y, strict=True)])
  assert 0.25 < share < 0.75
  with pytest.raises(ValueError, match="extra='sobell': expected one of 'sobel'"):
    augment.two_views(IMAGE, SEED, **options, extra=(("sobell", 0.5),))
  with pytest.raises(ValueError, match="extra sobel=2: expected a probability"):
    augment.two_views(IMAGE, SEED, **options, extra=(("sobel", 2),))


def test_the_device_says_that_it_has_none_of_them():
  for recipe in ("v1:1x", "v1:1x-broader"):
    pretrain._check_augmentation(config_lib.load(recipe))
  with pytest.raises(ValueError, match="augment.extra is done by the host"):
    pretrain.augmentation(config_lib.load("v1:1x-broader", ["--config.augment.where=device"]))
