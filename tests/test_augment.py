"""The family T against the official golden numbers, float64 references, and the laws of its random draws.

Every draw below comes from a fixed seed, so the statistical tests are deterministic; their tolerances are 4 to 5
standard errors of a right implementation.
"""

import colorsys
import itertools
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from simclr_jax import augment

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/official_golden.json").read_text())
IMAGE = (0.5 + 0.5 * np.sin(0.05 * np.arange(360))).reshape(12, 10, 3).astype(np.float32)  # GOLDEN["image"]
ROUNDING = 5e-7  # a few units in the last place of a float32 near 1, for values that took tens of operations
WHOLE = {"crop_sampler": "torchvision", "crop_area": (1.0, 1.0)}  # on a square image, always the whole of it


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def draw(fn, n):
  """fn(seed) for n seeds, as numpy arrays stacked along axis 0."""
  seeds = tf.data.Dataset.range(n).map(lambda i: fn(tf.stack([tf.cast(i, tf.int32), 7])))
  return tf.nest.map_structure(lambda x: x.numpy(), next(iter(seeds.batch(n))))


# The official numbers.


@pytest.mark.parametrize("case", GOLDEN["blur"], ids=lambda c: f"{c['kernel_size']}-{c['sigma']}")
def test_blur_golden(case):
  out = augment.gaussian_blur(IMAGE, kernel_size=case["kernel_size"], sigma=case["sigma"]).numpy()
  np.testing.assert_allclose(out[0, :, 0], case["out_row0_ch0"], rtol=0, atol=ROUNDING)
  np.testing.assert_allclose(out.sum(dtype=np.float64), case["out_sum"], rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["center_crop"], ids=lambda c: "x".join(map(str, c["hw"])))
def test_center_box_golden(case):
  (height, width), (h, w) = case["hw"], case["crop"]
  expected = ((height - h + 1) // 2, (width - w + 1) // 2, h, w)
  assert tuple(int(v) for v in augment.center_box(height, width)) == expected


def test_center_box_rounds_half_to_even():
  assert int(augment.center_box(12, 12)[2]) == 10  # 10.5
  assert int(augment.center_box(20, 36)[2]) == 18  # 17.5
  assert [int(v) for v in augment.center_box(375, 500)] == [24, 86, 328, 328]


def test_center_crop_golden():
  out = augment.center_crop(IMAGE, size=8).numpy()
  assert out.shape == (8, 8, 3) and out.dtype == np.float32
  np.testing.assert_allclose(out[0, :, 0], GOLDEN["eval_preproc_8x8_ch0_row0"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind, key", [("bicubic", "row0_ch0"), ("bicubic_tf1", "row0_ch0_tf1_legacy")])
def test_resize_golden(kind, key):
  square = [case for case in GOLDEN["resize_bicubic"] if case["size"][0] == case["size"][1]]
  assert len(square) == 2
  for case in square:
    out = augment.resize_image(IMAGE, case["size"][0], kind=kind).numpy()
    np.testing.assert_allclose(out[0, :, 0], case[key], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
  "name, factors",
  [("contrast_0_5", [1, 0.5, 1, 0]), ("saturation_1_7", [1, 1, 1.7, 0]), ("hue_0_15", [1, 1, 1, 0.15])],
)
def test_color_golden(name, factors):
  out = augment.color_jitter(IMAGE, tf.constant(factors, tf.float32), tf.range(4)).numpy()
  np.testing.assert_allclose(out[0, 0], GOLDEN["color"][name], rtol=0, atol=ROUNDING)


def test_grayscale_golden():
  out = augment.grayscale(IMAGE).numpy()
  np.testing.assert_allclose(out[0, 0], np.repeat(GOLDEN["color"]["gray"], 3), rtol=0, atol=ROUNDING)
  np.testing.assert_allclose(out, np.repeat(IMAGE @ [[0.2989], [0.587], [0.114]], 3, axis=-1), atol=ROUNDING)


# float64 references.


def reference_jitter(image, factors, order, brightness):
  x = image.astype(np.float64)
  for op in order:
    if op == 0:
      x = x * factors[0] if brightness == "v2" else x + (factors[0] - 1)
    elif op == 1:
      mean = x.mean(axis=(0, 1))
      x = (x - mean) * factors[1] + mean
    else:
      hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)])
      if op == 2:
        hsv[:, 1] = np.clip(hsv[:, 1] * factors[2], 0, 1)
      else:
        hsv[:, 0] = (hsv[:, 0] + factors[3]) % 1
      x = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(x.shape)
    x = np.clip(x, 0, 1)
  return x


@pytest.mark.parametrize("brightness", ["v2", "v1"])
def test_color_jitter_in_every_order_against_float64(brightness):
  rng = np.random.default_rng(3)
  image = rng.random((6, 5, 3)).astype(np.float32)
  results = []
  for order in itertools.permutations(range(4)):
    factors = (np.array([1, 1, 1, 0]) + rng.uniform(-1, 1, 4) * [0.8, 0.8, 0.8, 0.2]).astype(np.float32)
    out = augment.color_jitter(image, tf.constant(factors), tf.constant(order), brightness=brightness).numpy()
    np.testing.assert_allclose(out, reference_jitter(image, factors, order, brightness), rtol=0, atol=3e-6)
    results.append(out)
  assert len({out.tobytes() for out in results}) == 24


def test_clip_comes_after_each_operation():
  image = np.array([[[0.9, 0.1, 0.1], [0.2, 0.3, 0.4]]], np.float32)
  factors = tf.constant([1.8, 0.3, 1.0, 0.0])
  out = augment.color_jitter(image, factors, tf.range(4)).numpy()  # brightness first: 1.62 must be cut to 1
  assert out[0, 0, 0] == pytest.approx(0.36 + 0.3 * (1 - (1 + 0.36) / 2) + (1 + 0.36) / 2 - 0.36, abs=1e-6)


@pytest.mark.parametrize(
  "shape, kernel_size, sigma",
  [((9, 13, 3), 5, 0.1), ((2, 20, 8, 3), 4, 2.0), ((7, 7, 1), 22, 1.3), ((40, 40, 3), 4, 0.7)],
)
def test_blur_against_float64(shape, kernel_size, sigma):
  image = np.random.default_rng(0).random(shape).astype(np.float32)
  radius = kernel_size // 2
  kernel = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
  kernel /= kernel.sum()
  expected = image.astype(np.float64)
  for axis in (-2, -3):
    expected = np.apply_along_axis(lambda v: np.convolve(v, kernel)[radius:-radius], axis, expected)
  out = augment.gaussian_blur(image, kernel_size=kernel_size, sigma=sigma).numpy()
  np.testing.assert_allclose(out, expected, rtol=0, atol=ROUNDING)


def test_blur_pads_with_zeros_and_one_tap_is_identity():
  white = np.ones((40, 40, 3), np.float32)
  out = augment.gaussian_blur(white, kernel_size=22, sigma=2.0).numpy()
  np.testing.assert_allclose([out[0, 0, 0], out[0, 20, 0], out[20, 20, 0]], [0.360, 0.600, 1.0], atol=5e-4)
  np.testing.assert_array_equal(augment.gaussian_blur(IMAGE, kernel_size=1, sigma=1.0), IMAGE)


def test_crop_is_the_official_order_bit_for_bit():
  """Convert the whole image, crop, resize with tf.image, against ours: crop, convert, resize."""
  image = noise(37, 50, 3)
  whole = tf.image.convert_image_dtype(image, tf.float32)
  overshoot = False
  for i in range(5):
    y, x, h, w = augment.sample_box(37, 50, (i, 1))
    expected = tf.image.resize(whole[y : y + h, x : x + w], [24, 24], method="bicubic", antialias=False).numpy()
    out = augment.random_crop(image, (i, 1), size=24).numpy()
    np.testing.assert_array_equal(out, expected)
    overshoot |= out.max() > 1 or out.min() < 0
  assert overshoot  # so the clip of the views, below, has something to do


@pytest.mark.parametrize("resize", ["bicubic", "bicubic_tf1"])
def test_center_crop_of_the_whole_image_is_identity(resize):
  image = noise(32, 32, 3)
  out = augment.center_crop(image, size=32, proportion=1.0, resize=resize).numpy()
  np.testing.assert_array_equal(out, tf.image.convert_image_dtype(image, tf.float32))


# The laws of the draws.


def draw_boxes(height, width, n=10_000, **options):
  box = draw(lambda seed: tf.stack(augment.sample_box(height, width, seed, **options)), n)
  y, x, h, w = box.T
  assert y.min() >= 0 and x.min() >= 0 and (y + h).max() <= height and (x + w).max() <= width
  return y, x, h, w, h * w / (height * width)


def reference_official_boxes(height, width, n):
  """The law of TensorFlow's sampler: aspect uniform, then height uniform among those of admissible area."""
  rng, boxes = np.random.default_rng(0), []
  while len(boxes) < n:
    aspect = rng.uniform(3 / 4, 4 / 3)
    low = round(np.sqrt(0.08 * height * width / aspect))
    high = min(round(np.sqrt(height * width / aspect)), height, int(width / aspect))
    h = rng.integers(low, high + 1)
    w = round(h * aspect)
    if w <= width and h * w >= 0.1 * height * width:
      boxes.append((h, w))
  return np.array(boxes).T


def reference_torchvision_boxes(height, width, n):
  rng, boxes = np.random.default_rng(0), []
  for _ in range(n):
    for _ in range(10):
      area = height * width * rng.uniform(0.08, 1)
      aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
      w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
      if w <= width and h <= height:
        break
    else:
      h, w = min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))
    boxes.append((h, w))
  return np.array(boxes).T


@pytest.mark.parametrize("height, width, mean", [(224, 224, 0.42), (375, 500, 0.38)])
def test_official_boxes(height, width, mean):
  y, x, h, w, area = draw_boxes(height, width)
  assert 0.0995 < area.min() < 0.101  # min_object_covered binds, not the lowest area 0.08
  assert area.max() > 0.97 * min(1, 4 / 3 * height / width)
  assert area.mean() == pytest.approx(mean, abs=0.01)
  slack = 1 / h.min()  # w is rounded to whole pixels
  assert 3 / 4 - slack < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 4 / 3 + slack
  reference_h, reference_w = reference_official_boxes(height, width, 10_000)
  quantiles = np.linspace(0.05, 0.95, 10)
  for ours, reference in ((area, reference_h * reference_w / (height * width)), (w / h, reference_w / reference_h)):
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(reference, quantiles), atol=0.03)
  # The corner is uniform in the room that is left.
  for corner, room in ((y, height - h), (x, width - w)):
    assert (corner[room > 50] / room[room > 50]).mean() == pytest.approx(0.5, abs=0.015)


def test_official_crop_area_above_a_tenth_binds():
  area = draw_boxes(224, 224, 2000, crop_area=(0.35, 0.6))[-1]
  assert 0.345 < area.min() < 0.36 and 0.59 < area.max() < 0.605


@pytest.mark.parametrize("height, width, mean", [(224, 224, 0.48), (375, 500, 0.435)])
def test_torchvision_boxes(height, width, mean):
  y, x, h, w, area = draw_boxes(height, width, crop_sampler="torchvision")
  assert 0.079 < area.min() < 0.082 and area.max() > 0.99
  assert area.mean() == pytest.approx(mean, abs=0.01)  # not 0.54: large boxes often do not fit, and are drawn again
  reference_h, reference_w = reference_torchvision_boxes(height, width, 10_000)
  quantiles = np.linspace(0.05, 0.95, 10)
  for ours, reference in ((area, reference_h * reference_w / (height * width)), (w / h, reference_w / reference_h)):
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(reference, quantiles), atol=0.03)
  assert 0.74 < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 1.35
  for corner, room in ((y, height - h), (x, width - w)):
    keep = room > 50
    assert (corner[keep] / room[keep]).mean() == pytest.approx(0.5, abs=0.015)
    assert (corner == 0).any() and (corner == room)[keep].any()


@pytest.mark.parametrize("height, width, box", [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_torchvision_falls_back_to_the_central_box(height, width, box):
  out = augment.sample_box(height, width, (0, 0), crop_sampler="torchvision", crop_area=(0.9, 1.0))
  assert tuple(int(v) for v in out) == box


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_color_draws(strength):
  n = 20_000
  jitter, gray, factors, order = draw(lambda seed: augment.sample_color(seed, strength=strength), n)
  assert jitter.mean() == pytest.approx(0.8, abs=0.012) and gray.mean() == pytest.approx(0.2, abs=0.012)
  assert abs(np.corrcoef(jitter, gray)[0, 1]) < 0.03
  for i, (center, half) in enumerate([(1, 0.8), (1, 0.8), (1, 0.8), (0, 0.2)]):
    unit = (factors[:, i] - center) / (half * strength)  # uniform in [-1, 1]
    assert -1.000001 <= unit.min() < -0.999 and 0.999 < unit.max() <= 1.000001
    np.testing.assert_allclose(np.quantile(unit, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.035)
  assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.035
  counts = np.unique(order, axis=0, return_counts=True)[1]
  assert len(counts) == 24 and (np.sort(order, axis=1) == np.arange(4)).all()
  assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001


def test_blur_draws():
  apply, sigma = draw(lambda seed: augment.sample_blur(seed), 10_000)
  assert apply.mean() == pytest.approx(0.5, abs=0.025)
  assert 0.1 <= sigma.min() < 0.101 and 1.998 < sigma.max() <= 2.0
  np.testing.assert_allclose(np.quantile(sigma, [0.25, 0.5, 0.75]), [0.575, 1.05, 1.525], atol=0.05)
  assert abs(np.corrcoef(apply, sigma)[0, 1]) < 0.05


def test_decisions_in_views_have_their_rates_and_are_independent():
  """The eight yes/no decisions behind a pair of views, read off the pixels, one kind at a time on the same seeds."""
  image = tf.image.convert_image_dtype(noise(20, 20, 3), tf.float32)
  off = {"flip": False, "color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
  decisions, n = [], 2000
  for kind, rate in (("flip", 0.5), ("color_jitter_prob", 0.8), ("grayscale_prob", 0.2), ("blur_prob", 0.5)):
    on = off | {kind: True if kind == "flip" else rate}

    def changed(seed, on=on):
      views = augment.two_views(image, seed, size=20, **WHOLE, **on)
      return tf.reduce_any(views != image, axis=[1, 2, 3])

    decided = draw(changed, n)  # [n, 2]
    np.testing.assert_allclose(decided.mean(axis=0), rate, atol=4.5 * 0.5 / n**0.5, err_msg=kind)
    decisions.append(decided)
  correlation = np.corrcoef(np.concatenate(decisions, axis=1).T)
  assert np.abs(correlation - np.eye(8)).max() < 4.5 / n**0.5


# The views.


def test_view_without_options_is_the_image_or_its_mirror():
  image = noise(24, 24, 3)
  expected = tf.image.convert_image_dtype(image, tf.float32).numpy()
  views = draw(lambda seed: augment.two_views(image, seed, size=24, blur=False, color_strength=0, **WHOLE), 20)
  mirrored = [np.array_equal(v, expected[:, ::-1]) for pair in views for v in pair]
  same = [np.array_equal(v, expected) for pair in views for v in pair]
  assert all(a != b for a, b in zip(mirrored, same, strict=True)) and 0 < sum(mirrored) < 40
  one = draw(lambda seed: augment.one_view(image, seed, size=24, **WHOLE), 20)
  assert {v.tobytes() for v in one} == {expected.tobytes(), expected[:, ::-1].tobytes()}


@pytest.mark.parametrize("image", [noise(24, 24, 3), (noise(33, 47, 3) / 255).astype(np.float32)])
def test_views_are_float32_in_unit_range(image):
  for options in ({}, {"color_strength": 0.0, "blur": False}, {"crop_sampler": "torchvision", "brightness": "v1"}):
    views = draw(lambda seed, options=options: augment.two_views(image, seed, size=32, **options), 20)
    assert views.shape == (20, 2, 32, 32, 3) and views.dtype == np.float32
    assert views.min() >= 0 and views.max() <= 1
  one = draw(lambda seed: augment.one_view(image, seed, size=32), 20)
  assert one.shape == (20, 32, 32, 3) and one.min() == 0 and one.max() == 1  # clipped, as noise overshoots


def test_jitter_sees_the_overshoot_unclipped(monkeypatch):
  seen = []
  monkeypatch.setattr(augment, "color_distort", lambda view, *_, **__: seen.append(view) or view)
  views = augment.two_views(noise(40, 40, 3), (1, 2), size=32, blur=False)
  for before, after in zip(seen, views, strict=True):
    assert tf.reduce_min(before) < 0 and tf.reduce_max(before) > 1
    np.testing.assert_array_equal(tf.clip_by_value(before, 0, 1), after)


def test_color_strength_zero_switches_off_grayscale_too():
  image = noise(24, 24, 3)
  options = dict(size=24, blur=False, color_jitter_prob=1.0, grayscale_prob=1.0, flip=False, **WHOLE)
  views = augment.two_views(image, (1, 2), color_strength=0.0, **options)
  np.testing.assert_array_equal(views[0], tf.image.convert_image_dtype(image, tf.float32))
  gray = augment.two_views(image, (1, 2), color_strength=0.1, **options).numpy()
  np.testing.assert_array_equal(gray[..., 0], gray[..., 2])


@pytest.mark.parametrize("size, blurred", [(19, False), (20, True), (28, True), (32, True)])
def test_blur_follows_the_size(size, blurred):
  image = noise(size, size, 3)
  sharp = augment.two_views(image, (1, 2), size=size, blur=False)
  np.testing.assert_array_equal(augment.two_views(image, (1, 2), size=size, blur_prob=0.0), sharp)
  views = augment.two_views(image, (1, 2), size=size, blur_prob=1.0)
  assert np.array_equal(views, sharp) != blurred


def test_blur_kernel_is_a_tenth_of_the_size():
  image = np.zeros((64, 64, 3), np.float32)
  image[32, 32] = 1
  for seed in range(20):
    out = augment.random_blur(image, (seed, 0), prob=1.0).numpy()
    assert np.count_nonzero(out[32, :, 0]) <= 7
  assert np.count_nonzero(augment.gaussian_blur(image, kernel_size=6, sigma=2.0).numpy()[32, :, 0]) == 7


@pytest.mark.parametrize("size, options", [(32, {}), (28, {"crop_sampler": "torchvision"}), (224, {"blur_prob": 1.0})])
def test_views_are_a_pure_function_of_image_and_seed(size, options):
  """Bit for bit: eagerly, in a tf.data graph, in another order, in parallel and with other images in between."""
  images = tf.constant(noise(4, 60, 50, 3))

  def views(i):
    return augment.two_views(images[i], tf.stack([tf.cast(i, tf.int32), 3]), size=size, **options)

  eager = [views(i).numpy() for i in range(4)]
  again = [views(i).numpy() for i in reversed(range(4))][::-1]
  order = [2, 0, 3, 1]
  graph = list(tf.data.Dataset.from_tensor_slices(order).map(views, num_parallel_calls=2))
  for i in range(4):
    np.testing.assert_array_equal(again[i], eager[i])
    np.testing.assert_array_equal(graph[order.index(i)], eager[i])


def test_other_seeds_and_the_two_views_differ():
  image = noise(60, 50, 3)
  seeds = [(0, 0), (1, 0), (0, 1), (-5, 2**31 - 1)]
  views = [view.numpy() for seed in seeds for view in augment.two_views(image, seed, size=32)]
  assert len({view.tobytes() for view in views}) == 8


def test_draws_do_not_depend_on_the_pixels():
  image = np.random.default_rng(0).uniform(0.4, 0.6, (60, 50, 3)).astype(np.float32)  # no clipping at either end
  options = dict(size=32, color_strength=0.0)
  for seed in ((1, 2), (3, 4)):
    views = augment.two_views(image, seed, **options)
    np.testing.assert_allclose(augment.two_views(image / 2, seed, **options), views / 2, atol=1e-6)


def test_images_of_unknown_shape_in_tf_data():
  images = [noise(40, 30, 3), noise(25, 61, 3)]
  signature = tf.TensorSpec([None, None, 3], tf.uint8)
  stream = tf.data.Dataset.from_generator(lambda: iter(images), output_signature=signature)
  views = stream.map(lambda image: augment.two_views(image, (1, 2), size=32))
  evaluated = stream.map(lambda image: augment.center_crop(image, size=32))
  assert views.element_spec.shape == (2, 32, 32, 3) and evaluated.element_spec.shape == (32, 32, 3)
  for image, view, crop in zip(images, views, evaluated, strict=True):
    np.testing.assert_array_equal(view, augment.two_views(image, (1, 2), size=32))
    np.testing.assert_array_equal(crop, augment.center_crop(image, size=32))


@pytest.mark.parametrize(
  "options, named",
  [
    ({"size": 0}, "size=0"),
    ({"size": 32.0}, "size=32.0"),
    ({"color_strength": 1.3}, "color_strength=1.3"),
    ({"color_strength": -0.1}, "color_strength=-0.1"),
    ({"crop_sampler": "tf"}, "crop_sampler='tf'"),
    ({"brightness": "v3"}, "brightness='v3'"),
    ({"brightness": "v3", "color_strength": 0}, "brightness='v3'"),
    ({"resize": "nearest"}, "resize='nearest'"),
    ({"crop_area": (0.0, 1.0)}, "crop_area=(0.0, 1.0)"),
    ({"crop_area": (0.5, 0.2)}, "crop_area=(0.5, 0.2)"),
    ({"color_jitter_prob": 1.5}, "color_jitter_prob=1.5"),
    ({"grayscale_prob": -1}, "grayscale_prob=-1"),
    ({"blur_prob": 2}, "blur_prob=2"),
    ({"image": noise(8, 8)}, "(8, 8)"),
    ({"image": noise(8, 8, 1)}, "(8, 8, 1)"),
    ({"image": np.zeros((8, 8, 3), np.int32)}, "int32"),
  ],
)
def test_bad_values_are_named_in_one_line(options, named):
  arguments = {"image": noise(8, 8, 3), "seed": (1, 2), "size": 32} | options
  with pytest.raises(ValueError) as error:
    augment.two_views(**arguments)
  assert named in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


def test_bad_values_elsewhere_are_named_in_one_line():
  for call, named in (
    (lambda: augment.center_crop(IMAGE, size=8, proportion=1.1), "proportion=1.1"),
    (lambda: augment.center_crop(IMAGE[..., :1], size=8), "(12, 10, 1)"),
    (lambda: augment.gaussian_blur(IMAGE, kernel_size=0, sigma=1.0), "kernel_size=0"),
    (lambda: augment.gaussian_blur(IMAGE[0], kernel_size=3, sigma=1.0), "(10, 3)"),
  ):
    with pytest.raises(ValueError) as error:
      call()
    assert named in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


def test_antialiased_crops_read_every_pixel():
  """Against Pillow, whose bicubic has the same kernel, and on noise, of which an average is left."""
  from PIL import Image

  rng = np.random.default_rng(0)
  image = np.kron(rng.random((8, 8, 3)), np.ones((40, 40, 1)))
  image = (255 * np.clip(image + 0.1 * rng.normal(size=image.shape), 0, 1)).astype(np.uint8)
  ours = np.asarray(augment.resize_image(image, 32, kind="bicubic_antialias"))
  pillow = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
  assert np.abs(ours.clip(0, 1) - pillow).max() < 1.5 / 255
  noise = rng.integers(0, 256, (256, 256, 3), np.uint8)  # of 16 x 16 pixels that become one
  averaged, sampled = (
    np.asarray(augment.resize_image(noise, 16, kind=kind)) for kind in ("bicubic_antialias", "bicubic")
  )
  assert averaged.std() < 0.04 and sampled.std() > 0.1
