"""Reading transformations from features: encoders that keep, or by construction drop, what is asked for."""

import numpy as np
import pytest
import tiny

from simclr_jax.evaluation import invariance, linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import trained, transforms
from simclr_jax.runtime.errors import UserError

SIDE = 12


def photos(count, seed=0):
  """Smooth random color images [count, 12, 12, 3], bright at the top as photographs are."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(size=(count, 3, 3, 3)).astype(np.float32)
  x = np.repeat(np.repeat(coarse, SIDE // 3, 1), SIDE // 3, 2)
  tint, light = rng.uniform(size=(count, 1, 1, 3)), np.linspace(1, 0.3, SIDE)[:, None, None]
  return np.clip((0.4 * x + 0.6 * tint) * light, 0, 1).astype(np.float32)


def value(x):
  """The brightest channel of each pixel, which no turn of the hue changes."""
  return {"h": small(x.max(-1, keepdims=True))}


def small(x):
  """[n, 12, 12, c] -> [n, 16 c], means of squares of three pixels."""
  return x.reshape(len(x), 4, 3, 4, 3, -1).mean((2, 4)).reshape(len(x), -1)


def everything(x):
  """The pixels, and what hue is made of."""
  return {"h": np.concatenate([small(x), x.std((1, 2)), invariance.mean_hue(x), x.std(-1).mean((1, 2))[:, None]], 1)}


def of(encode, seed=0):
  found = invariance.predictions(encode, photos(250), photos(250, 1), seed=seed)
  return {name: scores["h"] for name, scores in found.items()}


def test_an_encoder_without_color_scores_chance_on_hue():
  found = of(value)
  assert found["hue"] < 0.05
  assert found["rotation"] > 0.9  # it sees where the light comes from
  assert found["sobel"] > 0.9 and found["position"] > 0.1


def test_an_encoder_of_gray_images_cannot_tell_color_from_grayscale():
  gray = np.array([0.2989, 0.587, 0.114], np.float32)
  found = of(lambda x: {"h": small(x @ gray[:, None])})
  assert found["color"] == pytest.approx(0.5, abs=0.05)
  assert found["rotation"] > 0.9


def test_an_encoder_that_keeps_everything_scores_high():
  found = of(everything)
  assert found["hue"] > 0.75 and found["color"] > 0.9 and found["rotation"] > 0.9 and found["position"] > 0.1


def test_an_encoder_that_keeps_nothing_scores_chance():
  found = of(lambda x: {"h": np.random.default_rng(len(x)).normal(size=(len(x), 8))})
  for name, chance in invariance.CHANCE.items():
    assert found[name] == pytest.approx(chance, abs=0.1), name


def test_the_same_seed_gives_the_same_scores_and_several_features_are_scored_at_once():
  encode = lambda x: {"h": value(x)["h"], "z": x.mean((1, 2))}  # noqa: E731
  first = invariance.predictions(encode, photos(250), photos(250, 1), seed=3)
  assert first == invariance.predictions(encode, photos(250), photos(250, 1), seed=3)
  assert set(first) == set(invariance.CHANCE) and set(first["hue"]) == {"h", "z"}


def test_gray_images_have_no_color_to_predict():
  gray = np.repeat(photos(250).mean(-1, keepdims=True), 3, -1)
  found = invariance.predictions(value, gray, gray)
  assert found["color"] == {"h": None} and found["hue"] == {"h": None}
  assert found["rotation"]["h"] is not None


def test_the_hue_is_that_of_colorsys_and_turns_with_the_image():
  import colorsys

  from simclr_jax import augment_on_device

  x = np.broadcast_to(
    np.array([[0.8, 0.3, 0.2], [0.1, 0.5, 0.6], [0.3, 0.2, 0.9]], np.float32)[:, None, None], (3, 4, 4, 3)
  )
  cos, sin = invariance.mean_hue(x).T
  expected = [colorsys.rgb_to_hsv(*map(float, pixel))[0] for pixel in x[:, 0, 0]]
  np.testing.assert_allclose(np.arctan2(sin, cos) / (2 * np.pi) % 1, expected, atol=1e-6)
  turned = augment_on_device.color_jitter(x, np.array([[1, 1, 1, 0.25]] * 3, np.float32), None)
  cos, sin = invariance.mean_hue(np.asarray(turned)).T
  np.testing.assert_allclose(np.arctan2(sin, cos) / (2 * np.pi) % 1, np.mod(np.array(expected) + 0.25, 1), atol=1e-5)


def test_the_edges_are_those_of_the_augmentation():
  from simclr_jax import augment_extra

  x = photos(1)
  np.testing.assert_allclose(invariance.sobel(x)[0], augment_extra.sobel(x[0]).numpy(), atol=1e-6)


def test_regression_agrees_with_scipy_and_a_hopeless_one_scores_nothing():
  import scipy.stats

  rng = np.random.default_rng(0)
  x, noise = rng.normal(size=(400, 1)), rng.normal(size=(400, 1))
  y = 2 * x + noise
  r = scipy.stats.pearsonr(x[:, 0], y[:, 0]).statistic
  assert linear.regression_score(x, y, x, y) == pytest.approx(r**2, abs=1e-3)
  assert abs(linear.regression_score(x[:200], noise[:200], x[200:], noise[200:])) < 0.05
  circle = np.stack([np.cos(x[:, 0]), np.sin(x[:, 0])], 1)
  assert linear.regression_score(circle, circle, circle, circle) > 0.999
  for few in (2, 3, 4):
    assert np.isfinite(linear.regression_score(x[:few], y[:few], x, y))


def test_too_few_images_are_one_line(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz", 1)
  folder = tiny.export(tmp_path / "encoder", **{"data.train": f"{spec}:test", "data.test": spec})
  with pytest.raises(UserError, match="32 images to train and 1 to test; expected at least 2 of each"):
    transforms.run(folder)


def test_an_export_has_no_steps(tmp_path):
  with pytest.raises(ValueError, match="--step=3: .* holds one encoder"):
    transforms.run(tiny.export(tmp_path / "encoder"), step=3)


def test_an_image_size_that_the_encoder_does_not_take_is_one_line():
  encoder = config_lib.load("vit:textures").encoder
  start = trained.Start(encoder, tiny.config().projector, {"encoder": {}}, tiny.config())
  with pytest.raises(UserError, match="33"):
    transforms._encode(start, 33)
