"""The other transformations of the papers against NumPy, SciPy and Pillow, and their place in `two_views`."""

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from simclr_jax import augment_extra
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain

IMAGE = np.random.default_rng(0).random((24, 24, 3)).astype(np.float32) ** 2
SEED = (1, 2)


def test_sobel():
  expected = [np.hypot(*(scipy.ndimage.sobel(IMAGE[..., c], axis, mode="mirror") for axis in (0, 1))) for c in range(3)]
  np.testing.assert_allclose(augment_extra.sobel(IMAGE), np.clip(np.stack(expected, -1) / 4, 0, 1), atol=1e-5)


def test_solarize():
  np.testing.assert_allclose(augment_extra.solarize(np.float32([[[0.2, 0.5, 0.9]]])), [[[0.2, 0.5, 0.1]]], atol=1e-7)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
def test_equalize_is_pillows(spread):
  levels = np.uint8(np.round(255 * (0.3 + spread * 0.6 * IMAGE)))
  expected = np.asarray(ImageOps.equalize(Image.fromarray(levels)))
  np.testing.assert_array_equal(np.round(255 * augment_extra.equalize(levels / np.float32(255)).numpy()), expected)


def test_motion_blur_is_the_mean_along_a_line():
  dot = np.zeros((60, 60, 3), np.float32)
  dot[30, 30] = 1
  angles = set()
  for k in range(8):
    line = augment_extra.motion_blur(dot, (0, k)).numpy()
    assert line.sum() == pytest.approx(3, rel=1e-5) and line.max() < 0.35  # 7 pixels, two of which may round to one
    at = np.argwhere(line[..., 0] > 0)
    covariance = np.linalg.eigvalsh(np.cov(at.T))
    assert 4 <= len(at) <= 7 and covariance[0] < 0.2 * covariance[1]
    angles.add(tuple(at[0] - at[-1]))
  assert len(angles) > 3


def test_cutout_is_a_square_of_half_the_side():
  sizes = set()
  for k in range(30):
    out = augment_extra.cutout(np.zeros((24, 24, 3), np.float32), (0, k)).numpy()
    rows, columns = (out[..., 0] == 0.5).any(1).sum(), (out[..., 0] == 0.5).any(0).sum()
    assert (out == 0.5).sum() == 3 * rows * columns and 6 <= rows <= 12 and 6 <= columns <= 12
    sizes.add((rows, columns))
  assert len(sizes) > 5


def test_rotate():
  turned = {k: augment_extra.rotate(IMAGE, (0, k)).numpy() for k in range(12)}
  found = {[np.array_equal(x, np.rot90(IMAGE, k)) for k in range(4)].index(True) for x in turned.values()}
  assert found == {1, 2, 3}


def test_noise():
  gray = np.full((64, 64, 3), 0.5, np.float32)
  spreads = [np.std(augment_extra.noise(gray, (0, k))) for k in range(40)]
  assert min(spreads) < 0.03 and 0.16 < max(spreads) < 0.205 and np.mean(spreads) == pytest.approx(0.1, abs=0.03)


def pillow(name, image, magnitude, sign):
  """An operation of AutoAugment as the paper's authors made it, of Pillow's; ranges of arXiv:1805.09501, Table 6."""
  step, side = (magnitude or 0) / 9, image.size[0]
  if name == "posterize":
    return ImageOps.posterize(image, 8 - round(4 * step))
  if name == "solarize_from":
    return ImageOps.solarize(image, 255 - 255 * step)
  if name in ("invert", "equalize", "autocontrast"):
    return getattr(ImageOps, name)(image)
  if name in ("saturate", "contrast", "sharpen"):
    enhancer = {"saturate": "Color", "contrast": "Contrast", "sharpen": "Sharpness"}[name]
    return getattr(ImageEnhance, enhancer)(image).enhance(1 + sign * 0.9 * step)
  if name == "turn":
    return image.rotate(sign * 30 * step)
  return image.transform((side, side), Image.Transform.AFFINE, (1, sign * 0.3 * step, 0, 0, 1, 0))


@pytest.mark.parametrize("name", sorted({op[0] for pair in augment_extra.AUTOAUGMENT for op in pair}))
def test_autoaugment_is_pillows(name):
  smooth = scipy.ndimage.gaussian_filter(IMAGE, (1, 1, 0))
  levels = np.uint8(np.round(10 + 235 * (smooth - smooth.min()) / np.ptp(smooth)))
  for magnitude in {op[2] for pair in augment_extra.AUTOAUGMENT for op in pair if op[0] == name}:
    for sign in (-1, 1):
      ours = np.asarray(augment_extra.autoaugment_op(name, np.float32(levels), magnitude, float(sign)))
      theirs = np.asarray(pillow(name, Image.fromarray(levels), magnitude, sign), np.float32)
      assert ((ours == np.round(ours)) & (ours >= 0) & (ours <= 255)).all()
      # One level of rounding; a turned pixel half-way between two may take the other.
      assert np.mean(np.abs(ours - theirs).max(-1) > 1) <= (0.02 if name == "turn" else 0), (magnitude, sign)
      assert magnitude in (None, 0) or np.abs(ours - levels).max() > 1


def test_autoaugment_draws_all_its_pairs():
  levels = np.round(255 * IMAGE) / np.float32(255)
  views = [augment_extra.autoaugment(levels, (0, k)).numpy() for k in range(40)]
  assert len({view.tobytes() for view in views}) > 15 and all(view.shape == IMAGE.shape for view in views)
  assert any(np.allclose(view, levels, atol=1e-6) for view in views)  # some pairs may do nothing


def test_one_sided_views_share_their_crop():
  """Figure 5: transformations on one branch alone."""
  image = np.random.default_rng(1).random((40, 32, 3)).astype(np.float32)
  plain = augment_extra.two_views(image, SEED, size=24, color_strength=0.0, blur=False)
  options = dict(size=24, color_strength=0.0, blur=False, one_sided=True)
  np.testing.assert_array_equal(augment_extra.two_views(image, SEED, **options), np.stack([plain[0]] * 2))
  for name in ("crop", "color", "blur", "solarize"):
    of_color = {"color_strength": float(name == "color")}
    first, second = augment_extra.two_views(image, SEED, **options | of_color, extra=((name, 1.0),)).numpy()
    np.testing.assert_array_equal(second, plain[0])
    assert np.abs(first - second).max() > 0.02
  cropped = [
    augment_extra.two_views(image, (0, k), **options, extra=(("crop", 1.0), ("sobel", 1.0)))[0] for k in range(4)
  ]
  assert len({x.numpy().tobytes() for x in cropped}) == 4


def test_color_among_them_is_the_color_distortion_of_the_options():
  """As strong, and as often gray, as without `extra`; after the operators that are named before it."""
  options = dict(size=12, blur=False, color_order="fixed", color_jitter_prob=1.0)
  extra = (("sobel", 1.0), ("color", 1.0))
  gray = dict(color_strength=0.5, grayscale_prob=1.0)
  views = augment_extra.two_views(IMAGE, SEED, **options, **gray, extra=extra).numpy()
  np.testing.assert_allclose(views[..., 0], views[..., 2], atol=1e-6)
  colored = dict(color_strength=1e-3, grayscale_prob=0.0)
  weak = augment_extra.two_views(IMAGE, SEED, **options, **colored, extra=extra)
  edges = augment_extra.two_views(IMAGE, SEED, **options | {"color_strength": 0.0}, extra=extra[:1])
  np.testing.assert_allclose(weak, edges, atol=0.01)  # edges of colors, and not colored edges
  with pytest.raises(ValueError, match="extra color: expected color_strength above 0"):
    augment_extra.two_views(IMAGE, SEED, **options, color_strength=0.0, extra=extra)


@pytest.mark.slow
def test_they_take_their_place_in_the_views():
  """Given probability 0 nothing changes, given 1 they act on every view; in tf.data as eagerly; mistakes are one line."""
  options = {"size": 16, "color_strength": 0.0, "blur": False}
  plain = augment_extra.two_views(IMAGE, SEED, **options)
  every = tuple((name, 1.0) for name in augment_extra.EXTRA)
  np.testing.assert_array_equal(
    augment_extra.two_views(IMAGE, SEED, **options | {"color_strength": 1.0}, extra=[(n, 0.0) for n, _ in every]), plain
  )
  solarized = augment_extra.two_views(IMAGE, SEED, **options, extra=(("solarize", 1.0),))
  np.testing.assert_array_equal(solarized, np.stack([augment_extra.solarize(view) for view in plain]))
  data = tf.data.Dataset.from_tensors(IMAGE).map(
    lambda x: augment_extra.two_views(x, SEED, **options | {"color_strength": 1.0}, extra=every)
  )
  in_graph = next(iter(data))
  eager = augment_extra.two_views(IMAGE, SEED, **options | {"color_strength": 1.0}, extra=every)
  assert in_graph.shape == (2, 16, 16, 3)
  np.testing.assert_allclose(in_graph, eager, atol=1e-5)
  half = [augment_extra.two_views(IMAGE, (0, k), **options, extra=(("rotate", 0.5),)) for k in range(20)]
  without = [augment_extra.two_views(IMAGE, (0, k), **options) for k in range(20)]
  fraction = np.mean(
    [np.array_equal(a, b) for x, y in zip(half, without, strict=True) for a, b in zip(x, y, strict=True)]
  )
  assert 0.25 < fraction < 0.75
  with pytest.raises(ValueError, match="extra='sobell': expected one of 'sobel'"):
    augment_extra.two_views(IMAGE, SEED, **options, extra=(("sobell", 0.5),))
  with pytest.raises(ValueError, match="extra sobel=2: expected a probability"):
    augment_extra.two_views(IMAGE, SEED, **options, extra=(("sobel", 2),))


def test_the_device_says_that_it_has_none_of_them():
  for recipe in ("v1:1x", "v1:1x-broader", "ablations:autoaugment", "ablations:compose-crop-color"):
    pretrain.view_pipeline(config_lib.load(recipe)).check()
  with pytest.raises(ValueError, match="augment.extra is done by the host"):
    pretrain.view_pipeline(config_lib.load("v1:1x-broader", ["--config.augment.where=device"]))
  with pytest.raises(ValueError, match="augment.one_sided is done by the host"):
    pretrain.view_pipeline(config_lib.load("v1:1x", ["--config.augment.one_sided=True"]))
