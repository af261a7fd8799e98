"""The procedural set: a pure function of (seed, index) whose colors name the image and not the class."""

import numpy as np
import pytest

from simclr_jax.data.sets import textures


@pytest.fixture(scope="module")
def splits():
  return textures.split(0, 1500), textures.split(1, 1000)


def color_histogram(images):
  """Share of the pixels in each of 4 x 4 x 4 color bins: [n, h, w, 3] -> [n, 64]."""
  code = (images // 64).astype(np.int64) @ np.array([16, 4, 1])
  return np.stack([np.bincount(one.ravel(), minlength=64) / one.size for one in code])


def gray_pixels(images):
  """[n, 32, 32, 3] -> [n, 256]: luminance, averaged over squares of 2 x 2."""
  gray = images @ np.array([0.299, 0.587, 0.114])
  return gray.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(len(images), -1)


def ridge_accuracy(x, y, x_test, y_test, penalty):
  """A linear classifier by least squares on one-hot labels."""
  mean, std = x.mean(0), x.std(0) + 1e-6
  x, x_test = (x - mean) / std, (x_test - mean) / std
  weights = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ (np.eye(10)[y] - 0.1))
  return np.mean((x_test @ weights).argmax(1) == y_test)


@pytest.mark.parametrize("size", [32, 64])
def test_pure_function_of_seed_and_index(size):
  image, label = textures.image(3, 47, size=size)
  assert image.shape == (size, size, 3) and image.dtype == np.uint8 and label == 7
  for other in range(40, 50):
    textures.image(3, other, size=size)  # whatever was drawn before
  np.testing.assert_array_equal(textures.image(3, 47, size=size)[0], image)
  np.testing.assert_array_equal(textures.split(3, 48, size=size)[0][47], image)
  assert (textures.image(3, 57, size=size)[0] != image).mean() > 0.5
  assert (textures.image(4, 47, size=size)[0] != image).mean() > 0.5


def test_only_the_two_sizes():
  with pytest.raises(ValueError, match="size=48.*32 or 64"):
    textures.image(0, 0, size=48)


def test_balanced_and_disjoint(splits):
  (images, labels), (test_images, test_labels) = splits
  assert (np.bincount(labels) == 150).all() and (np.bincount(test_labels) == 100).all()
  drawn = [image.tobytes() for image in (*images, *test_images)]
  assert len(set(drawn)) == len(drawn) == 2500


def test_color_says_nothing_of_the_class(splits):
  (images, labels), (test_images, test_labels) = splits
  x, x_test = color_histogram(images), color_histogram(test_images)
  assert ridge_accuracy(x, labels, x_test, test_labels, 0.1) < 0.15  # chance 0.10, standard error 0.01
  x, x_test = gray_pixels(images), gray_pixels(test_images)
  assert ridge_accuracy(x, labels, x_test, test_labels, 0.1) < 0.25


def test_color_identifies_the_image(splits):
  images = splits[1][0][:500]
  left, right = color_histogram(images[:, :, :20]), color_histogram(images[:, :, 12:])
  nearest = ((left[:, None] - right[None]) ** 2).sum(-1).argmin(1)
  assert np.mean(nearest == np.arange(500)) > 0.75


def test_the_class_is_visible(splits):
  """Where color fails, the spectrum of the luminance tells most classes apart, so the labels are learnable."""
  (images, labels), (test_images, test_labels) = splits

  def spectrum(images):
    gray = images @ np.array([0.299, 0.587, 0.114])
    gray = (gray - gray.mean((1, 2), keepdims=True)) / gray.std((1, 2), keepdims=True)
    return np.log(np.abs(np.fft.rfft2(gray)) + 1).reshape(len(images), -1)

  assert ridge_accuracy(spectrum(images), labels, spectrum(test_images), test_labels, 0.5) > 0.5
