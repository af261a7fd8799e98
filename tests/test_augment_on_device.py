"""The device's half of the augmentation: the pixels of augment.py for the same parameters, and the laws of its draws.

Every draw comes from a fixed seed; tolerances of the statistics are 4 to 5 standard errors.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tiny

from simclr_jax import augment, data, views
from simclr_jax import augment_on_device as device
from simclr_jax.programs import pretrain
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib

N = 20_000


@functools.cache
def jitted(fn, **options):
  return jax.jit(functools.partial(fn, **options))


def images(n, size=12, seed=0, overshoot=0.0):
  """Random pictures with flat, gray and black pixels among them, where hue and saturation are not defined."""
  x = np.random.default_rng(seed).uniform(-overshoot, 1 + overshoot, (n, size, size, 3)).astype(np.float32)
  x[:, 0, 0], x[:, 0, 1], x[:, 0, 2] = 0, 1, 0.5
  x[:, 1, 0, 1:] = x[:, 1, 0, :1]
  return x


def seeds(n):
  return data.example_seeds(3, np.zeros(n, int), np.arange(n))


# ---- the same pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", augment.RESIZES)
@pytest.mark.parametrize(
  "height, width, size, proportion", [(28, 28, 28, 1.0), (120, 97, 15, 0.875), (269, 466, 224, 1.0)]
)
def test_center_crop(resize, height, width, size, proportion):
  """Whole images, images on larger canvases, and floating-point images: what the host makes of them."""
  options = dict(size=size, proportion=proportion, resize=resize)
  crop = jitted(device.center_crop, **options)
  x = np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8)
  expected = np.stack([augment.center_crop(image, **options) for image in x])
  canvas, extent = np.full((2, height + 5, width + 9, 3), 77, np.uint8), np.tile(np.int32([height, width]), (2, 1))
  canvas[:, :height, :width] = x
  for ours in (crop(x), crop(canvas, extent), crop((x / 255).astype(np.float32))):
    assert ours.dtype == np.float32 and ours.shape == (2, size, size, 3)
    # A wide kernel's weights carry the rounding of where its center lies on a side of hundreds of pixels.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 if resize == "bicubic_antialias" else 1e-6)


@pytest.mark.parametrize("brightness", ["v2", "v1"])
def test_color_jitter_in_every_order(brightness):
  orders = np.array(list(itertools.permutations(range(4))), np.int32)
  rng = np.random.default_rng(1)
  factors = (np.array([1, 1, 1, 0]) + rng.uniform(-1, 1, (24, 4)) * [0.8, 0.8, 0.8, 0.2]).astype(np.float32)
  x = images(24)
  ours = np.asarray(device.color_jitter(x, factors, orders, brightness=brightness))
  theirs = [
    augment.color_jitter(x[i], tf.constant(factors[i]), tf.constant(orders[i]), brightness=brightness)
    for i in range(24)
  ]
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
  assert np.abs(ours - np.asarray(device.color_jitter(x, factors, orders[::-1], brightness=brightness))).max() > 0.1


@pytest.mark.parametrize("brightness", ["v2", "v1"])
def test_color_jitter_in_fixed_order(brightness):
  """Brightness, contrast, saturation, hue on the device; on the host, that order and no other whatever is drawn."""
  rng = np.random.default_rng(1)
  factors = (np.array([1, 1, 1, 0]) + rng.uniform(-1, 1, (8, 4)) * [0.8, 0.8, 0.8, 0.2]).astype(np.float32)
  x = images(8, overshoot=0.2)
  theirs = [augment.color_jitter(x[i], factors[i], tf.range(4), brightness=brightness) for i in range(8)]
  np.testing.assert_allclose(
    jitted(device.color_jitter, order=None, brightness=brightness)(x, factors), theirs, rtol=0, atol=1e-5
  )
  for seed in seeds(8):
    factors = augment.sample_color(seed, strength=1.0, jitter_prob=1.0)[2]
    ours = augment.color_distort(x[0], seed, strength=1.0, jitter_prob=1.0, grayscale_prob=0.0, order="fixed")
    np.testing.assert_allclose(ours, augment.color_jitter(x[0], factors, tf.range(4)), rtol=0, atol=1e-6)


def test_color_jitter_of_bicubic_overshoot():
  """Beyond [0, 1] too, but for saturation and hue both first: there the clip comes before them, not between."""
  orders = np.array([o for o in itertools.permutations(range(4)) if set(o[:2]) != {2, 3}], np.int32)
  rng = np.random.default_rng(1)
  n = len(orders)
  factors = (np.array([1, 1, 1, 0]) + rng.uniform(-1, 1, (n, 4)) * [0.8, 0.8, 0.8, 0.2]).astype(np.float32)
  x = images(n, overshoot=0.2)
  theirs = [augment.color_jitter(x[i], tf.constant(factors[i]), tf.constant(orders[i])) for i in range(n)]
  np.testing.assert_allclose(device.color_jitter(x, factors, orders), theirs, rtol=0, atol=1e-5)


def test_grayscale():
  np.testing.assert_allclose(device.grayscale(images(2)), augment.grayscale(images(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, kernel_size", [(40, 4), (64, 6), (33, 22), (20, 1)])
def test_blur(size, kernel_size):
  sigma = np.array([0.1, 0.7, 2.0], np.float32)
  x = images(3, size)
  theirs = [augment.gaussian_blur(x[i], kernel_size=kernel_size, sigma=sigma[i]) for i in range(3)]
  ours = device.gaussian_blur(x, kernel_size=kernel_size, sigma=sigma)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width", [(57, 43), (9, 14)], ids=["down", "up"])
def test_resize_of_a_box_on_a_canvas(kind, height, width):
  canvas = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)  # what is around the box must not matter
  y, x, size = 5, 11, 24
  rows, columns = (
    device.resize_matrix(jnp.array([a]), jnp.array([n]), size, 64, kind=kind) for a, n in ((y, height), (x, width))
  )
  ours = np.einsum("ph,hwc,qw->pqc", rows[0], canvas / 255.0, columns[0])
  theirs = augment.resize_image(canvas[y : y + height, x : x + width], size, kind=kind)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_crops_are_of_the_boxes_and_flips_that_are_drawn():
  n, canvas = 6, np.random.default_rng(0).integers(0, 256, (6, 50, 60, 3), np.uint8)
  extent = np.array([[50, 60], [31, 60], [50, 22], [40, 40], [20, 20], [50, 60]], np.int32)
  options = dict(size=16, crop_sampler="official", crop_area=(0.08, 1.0), flip=True, resize="bicubic")
  ours = jitted(device.random_crops, precision="highest", **options)(canvas, extent, seeds(n))
  keys, flips = device.view_keys(seeds(n), "crop"), device.view_keys(seeds(n), "flip")
  boxes = device.sample_boxes(keys, *(jnp.repeat(extent[:, k], 2) for k in range(2)))
  for i in range(2 * n):
    y, x, h, w = (int(v[i]) for v in boxes)
    assert y + h <= extent[i // 2, 0] and x + w <= extent[i // 2, 1]
    expected = augment.resize_image(canvas[i // 2, y : y + h, x : x + w], 16).numpy()
    expected = expected[:, ::-1] if jax.random.bernoulli(flips[i]) else expected
    np.testing.assert_allclose(ours[i // 2, i % 2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_two_crops_are_the_views_of_the_host_in_256_levels(resize):
  image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
  for seed in ((0, 1), (5, -7), (2**31 - 1, 3)):
    crops = augment.two_crops(image, seed, size=32, resize=resize).numpy()
    views = augment.two_views(image, seed, size=32, resize=resize, color_strength=0.0, blur=False).numpy()
    assert crops.dtype == np.uint8
    back = device.color_and_blur(crops[None], seeds(1), color_strength=0.0, blur=False)[0]
    np.testing.assert_allclose(back, views, rtol=0, atol=0.501 / 255)


# ---- the same laws ---------------------------------------------------------------------------------------------


def host_draws(fn):
  both = tf.data.Dataset.from_tensor_slices(data.example_seeds(8, np.zeros(N, int), np.arange(N)))
  return tf.nest.map_structure(lambda x: x.numpy(), next(iter(both.map(fn, num_parallel_calls=2).batch(N))))


def same_law(ours, theirs):
  """Means, deviations and quantiles of two samples of N agree within their sampling errors."""
  ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
  spread = theirs.std()
  assert abs(ours.mean() - theirs.mean()) < 4.5 * spread * (2 / N) ** 0.5
  assert abs(ours.std() - spread) < 4.5 * spread * (2 / N) ** 0.5
  grid = np.linspace(0.02, 0.98, 25)
  # Kolmogorov and Smirnov: the largest difference of two distribution functions, at p = 1e-4.
  cuts = np.quantile(theirs, grid)
  below = [np.searchsorted(np.sort(sample), cuts, side="right") / N for sample in (ours, theirs)]
  assert np.abs(below[0] - below[1]).max() < 2.23 * (2 / N) ** 0.5


@pytest.mark.parametrize("sampler", ["official", "torchvision"])
@pytest.mark.parametrize("height, width, area", [(375, 500, (0.08, 1.0)), (32, 32, (0.35, 0.9))])
def test_boxes(sampler, height, width, area):
  options = {"crop_sampler": sampler, "crop_area": area}
  theirs = host_draws(lambda seed: tf.stack(augment.sample_box(height, width, seed, **options))).T
  keys = device.view_keys(seeds(N // 2), "crop")
  full = jnp.full(N, height), jnp.full(N, width)
  ours = jax.jit(functools.partial(device.sample_boxes, **options))(keys, *full)
  y, x, h, w = ours
  assert min(y.min(), x.min()) >= 0 and (y + h).max() <= height and (x + w).max() <= width
  for a, b in zip((*ours, ours[2] * ours[3], ours[3] / ours[2]), (*theirs, theirs[2] * theirs[3], theirs[3] / theirs[2]), strict=True):  # fmt: skip
    same_law(a, b)


def test_color_and_blur_draws():
  keys = device.view_keys(seeds(N // 2), "color")
  jitter, gray, factors, order = jax.jit(functools.partial(device.sample_color, strength=0.7))(keys)
  their_jitter, their_gray, their_factors, their_order = host_draws(lambda s: augment.sample_color(s, strength=0.7))
  for a, b in ((jitter, their_jitter), (gray, their_gray), *zip(factors.T, their_factors.T, strict=True)):
    same_law(a, b)
  assert np.abs(np.corrcoef(np.stack([jitter, gray, *factors.T])) - np.eye(6)).max() < 0.035
  counts = np.unique(np.asarray(order), axis=0, return_counts=True)[1]
  assert len(counts) == 24 and ((counts - N / 24) ** 2 / (N / 24)).sum() < 49.7  # chi-square, p = 0.001
  apply, sigma = device.sample_blur(device.view_keys(seeds(N // 2), "blur"))
  their_apply, their_sigma = host_draws(augment.sample_blur)
  same_law(apply, their_apply)
  same_law(sigma, their_sigma)
  # The purposes and the two views of an example know nothing of each other.
  streams = np.stack([apply[::2], apply[1::2], jitter[::2], jitter[1::2], sigma[::2], factors[::2, 0]])
  assert np.abs(np.corrcoef(streams) - np.eye(6)).max() < 5 * (2 / N) ** 0.5


@pytest.mark.slow
def test_moments_of_finished_views():
  """Mean, deviation and chroma of 20,000 views made on the host, and finished on, or wholly by, the device."""
  image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  image[:20] //= 3
  image[..., 0] //= 2

  def moments(views):
    channel = views.mean((2, 3))
    return [channel[..., 0], channel[..., 2], views.std((2, 3, 4)), np.ptp(views, axis=-1).mean((2, 3))]

  n = N // 2
  host = host_draws(lambda seed: augment.two_views(image, seed, size=20))[:n]
  crops = host_draws(lambda seed: augment.two_crops(image, seed, size=20))[:n]
  on_crops = np.asarray(jax.jit(device.color_and_blur)(crops, seeds(n)))
  extent = np.tile(np.array([40, 30], np.int32), (n, 1))
  whole = jax.jit(functools.partial(device.two_views, size=20))(
    np.broadcast_to(image, (n, *image.shape)), extent, seeds(n)
  )
  for finished in (on_crops, np.asarray(whole)):
    for a, b in zip(moments(finished), moments(host), strict=True):
      same_law(a.reshape(-1), b.reshape(-1))


# ---- views of an example ---------------------------------------------------------------------------------------


def test_a_view_depends_on_its_seed_alone():
  x = (images(8, 24) * 255).astype(np.uint8)
  views = np.stack([x, x[::-1]], axis=1)
  finish = jitted(device.color_and_blur)
  whole = np.asarray(finish(views, seeds(8)))
  part = np.asarray(finish(views[3:6], seeds(8)[3:6]))
  np.testing.assert_allclose(part, whole[3:6], rtol=0, atol=1e-6)
  alike = np.asarray(jitted(device.color_and_blur, color_jitter_prob=1.0)(np.stack([views[0]] * 8), seeds(8)))
  assert len({view.tobytes() for view in alike.reshape(16, -1)}) == 16
  assert whole.min() >= 0 and whole.max() <= 1 and whole.dtype == np.float32


def test_options_switch_off():
  x = images(4, 24)
  views = np.stack([x, x], axis=1)
  off = dict(color_jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)

  def finish(**options):
    return np.asarray(jitted(device.color_and_blur, **options)(views, seeds(4)))

  np.testing.assert_array_equal(finish(**off), views)
  np.testing.assert_array_equal(finish(color_strength=0.0, blur=False), views)
  gray = finish(**{**off, "grayscale_prob": 1.0})
  np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
  assert np.abs(finish(**{**off, "blur_prob": 1.0}) - views).max() > 0.1


@pytest.mark.parametrize(
  "call, named",
  [
    (lambda v: device.color_and_blur(v, seeds(1), color_strength=1.3), "color_strength=1.3"),
    (lambda v: device.color_and_blur(v, seeds(1), brightness="v3"), "brightness='v3'"),
    (lambda v: device.color_and_blur(v, seeds(1), color_order="none"), "color_order='none'"),
    (lambda v: device.color_and_blur(v, seeds(1), blur_prob=2), "blur_prob=2"),
    (lambda v: device.center_crop(v[:, 0], size=0), "size=0"),
    (lambda v: device.center_crop(v[:, 0], size=4, proportion=1.5), "proportion=1.5"),
    (lambda v: device.center_crop(v[0, 0], size=4), "images of shape [8, 8, 3]"),
    (lambda v: device.center_crop(v[:, 0].astype(int), size=4), "images of dtype int64"),
    (lambda v: device.two_views(v[:, 0], np.array([[8, 8]]), seeds(1), size=4, resize="nearest"), "resize='nearest'"),
    (lambda v: device.two_views(v[:, 0], np.array([[8, 8]]), seeds(1), size=4, crop_sampler="x"), "crop_sampler='x'"),
    (lambda v: device.two_views(v[:, 0], np.array([[8, 8]]), seeds(1), size=4, crop_area=(0, 1)), "crop_area=(0, 1)"),
  ],
)  # fmt: skip
def test_bad_values_are_named_in_one_line(call, named):
  with pytest.raises(ValueError) as error:
    call(np.zeros((1, 2, 8, 8, 3), np.uint8))
  assert named in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


# ---- in the training step --------------------------------------------------------------------------------------


def run(where, devices=8, steps=2, start=0, **changes):
  config = tiny.config(**{"augment.where": where, "augment.size": 20, "augment.blur": True, **changes})
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  task = pretrain.make_task(config, tiny.source(), mesh=mesh)
  step = loop.compile_step(task, mesh, loop.abstract_state(task, mesh))
  state = jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(0))
  stream = task.stream(start)
  for _ in range(steps):
    state, metrics = step(state, mesh_lib.global_batch(mesh, next(stream)))
  return task, step, state, jax.device_get(metrics), mesh_lib.global_batch(mesh, next(stream))


def test_resident_equals_device_crop():
  """Where the images live changes nothing: the same views from the same seeds."""
  views = []
  for where in ("resident", "device_crop"):
    config, mesh = tiny.config(**{"augment.where": where}), mesh_lib.make_mesh()
    batch = mesh_lib.global_batch(mesh, next(pretrain.make_task(config, tiny.source(), mesh=mesh).stream(2)))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(batch))
    views.append(np.asarray(jax.jit(pretrain.view_pipeline(config).device)(batch)))
    labels = tiny.source().labels[batch.index]
    np.testing.assert_array_equal(batch.label, labels)
  np.testing.assert_array_equal(*views)


def test_resident_images_that_do_not_fit_are_refused_before_the_folder_is_touched(tmp_path, monkeypatch):
  monkeypatch.setattr("simclr_jax.data.stream.MAX_BYTES_IN_MEMORY", 1000)
  config = tiny.config(**{"augment.where": "resident", "data.train": tiny.npz(tmp_path / "tiny.npz"), "data.test": ""})
  with pytest.raises(ValueError, match="images of 28 x 28 pixels are .* use augment.where=device_crop"):
    pretrain.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "device_crop"])
def test_the_step_moves_no_image(where):
  """On 8 devices: no collective of rank 4 or more but the all-reduces of gradients."""
  task, step, state, metrics, batch = run(where)
  assert np.isfinite(metrics["loss"])
  text = step.lower(state, batch).compile().as_text()
  for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
      shapes = [s.split(",") for s in re.findall(r"\w+\[([\d,]*)\]", result)]
      assert all(len(shape) < 4 for shape in shapes), (kind, result)


@pytest.mark.slow
def test_microbatches_see_the_same_views():
  """With exact BatchNorm, a batch in two parts makes the step of the whole: so each part augments as the whole did."""
  whole = run("device", 2, 1)[3]
  parts = run("device", 2, 1, **{"microbatches": 2, "microbatch_norm": "exact"})[3]
  np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-4)
  np.testing.assert_allclose(parts["grad_norm"], whole["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize(
  "options, named", [({"where": "tpu"}, "augment.where='tpu'"), ({"canvas": 0}, "augment.canvas=0")]
)
def test_impossible_places_are_named(options, named):
  with pytest.raises(ValueError) as error:
    views.pipeline(**options, size=20)
  assert named in str(error.value) and "expected" in str(error.value)
