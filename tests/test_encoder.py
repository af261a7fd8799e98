"""The encoder against numbers of the official code, and what those numbers cannot show."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simclr_jax.encoder import DEPTHS, BatchNorm, Block, Conv, resnet

CASES = json.loads((pathlib.Path(__file__).parent / "golden/official_golden.json").read_text())["resnet"]["cases"]

# What float32 rounding does, for (stem, block_group1..4, h): the first five relative to the tensor's standard
# deviation, h to its largest element.  Each is some 5 times the largest difference seen, and the differences are no
# larger than what a relative change of 1e-7 of the input does.
EVAL_TOLERANCES = (5e-6, 5e-6, 5e-6, 5e-6, 5e-6, 5e-5)
# With a batch of 2 and images of 64 pixels, the last BatchNorms in train mode see 8 values a channel.
TRAIN_TOLERANCES = (5e-6, 5e-6, 5e-6, 5e-6, 5e-6, 5e-4)
# The BatchNorm inside a selective kernel sees 2 values a channel: it makes them +1 and -1, and where they are almost
# equal, rounding decides which is which.
TRAIN_TOLERANCES_SK = (5e-6, 2e-5, 1e-4, 1e-2, 1e-2, np.inf)


STAGES = ("stem", "block_group1", "block_group2", "block_group3", "block_group4")


def case_name(case):
  ratios = f"-sk{case['sk_ratio']}" * (case["sk_ratio"] > 0) + f"-se{case['se_ratio']}" * (case["se_ratio"] > 0)
  return f"r{case['depth']}-{case['width']}x-{case['image_size']}px{ratios}"


def hash_uniform(n, k):
  """The golden file's deterministic pseudo-random numbers in [-1, 1]."""
  m = np.uint64(2**32 - 1)
  x = (np.arange(n, dtype=np.uint64) + np.uint64(1 + k * 1000003)) & m
  x = (x * np.uint64(2654435761)) & m
  x ^= x >> np.uint64(16)
  x = (x * np.uint64(2246822519)) & m
  x ^= x >> np.uint64(13)
  x = (x * np.uint64(3266489917)) & m
  x ^= x >> np.uint64(16)
  return x.astype(np.float64) / 2**31 - 1


def creation_order(case):
  """Paths of (convolutions, BatchNorms) in the order in which the official code creates them."""
  stem = ["1", "2", "3"] if case["sk_ratio"] > 0 and case["image_size"] > 32 else [""]
  convs, norms = [("stem_conv" + i,) for i in stem], [("stem_norm" + i,) for i in stem]
  blocks, bottleneck = DEPTHS[case["depth"]]
  for g, count in enumerate(blocks, 1):
    for b in range(1, count + 1):
      names = ["shortcut_conv", "shortcut_norm"] if b == 1 else []
      if bottleneck and case["sk_ratio"] > 0:
        names += ["conv1", "norm1", "sk/conv", "sk/norm", "sk/reduce_conv", "sk/reduce_norm", "sk/expand_conv"]
        names += ["conv3", "norm3"]
      else:
        names += [f"{kind}{i}" for i in range(1, 4 if bottleneck else 3) for kind in ("conv", "norm")]
      if case["se_ratio"] > 0:
        names += ["se/reduce_conv", "se/expand_conv"]
      for name in names:
        path = (f"group{g}", f"block{b}", *name.split("/"))
        (norms if "norm" in name else convs).append(path)
  return convs, norms


def hashed_variables(model, case):
  """The variables that the golden file's "weights" rule gives; the shapes are the model's."""
  size = case["image_size"]
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, size, size, 3)))
  params = traverse_util.flatten_dict(shapes["params"])
  stats = traverse_util.flatten_dict(shapes["batch_stats"])
  filled_params, filled_stats = {}, {}
  convs, norms = creation_order(case)
  for k, path in enumerate(convs):
    shape = params[*path, "kernel"].shape
    s = hash_uniform(int(np.prod(shape)), k).reshape(shape)
    filled_params[*path, "kernel"] = np.float32(np.sqrt(6 / np.prod(shape[:3])) * s)
    if (*path, "bias") in params:
      filled_params[*path, "bias"] = np.float32(0.1 * hash_uniform(shape[-1], k))
  for k, path in enumerate(norms):
    s = hash_uniform(params[*path, "scale"].size, k)
    filled_params[*path, "scale"] = np.float32(1 + 0.1 * s)
    filled_params[*path, "bias"] = np.float32(0.1 * s)
    filled_stats[*path, "mean"] = np.float32(0.1 * s)
    filled_stats[*path, "var"] = np.float32(1 + 0.1 * np.abs(s))
  assert filled_params.keys() == params.keys() and filled_stats.keys() == stats.keys()
  return {
    "params": traverse_util.unflatten_dict(filled_params),
    "batch_stats": traverse_util.unflatten_dict(filled_stats),
  }


def images(size, n=2):
  return np.float32(0.5 + 0.5 * hash_uniform(n * size * size * 3, 7)).reshape(n, size, size, 3)


def random_variables(model, x):
  """Variables like initial ones, but every BatchNorm matters; much faster than compiling `init`."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)

  def fill(path, shape):
    leaf = path[-1].key
    scale, shift = (np.prod(shape.shape[:3]) ** -0.5, 0) if leaf == "kernel" else (0.1, leaf in ("scale", "var"))
    return (scale * rng.normal(size=shape.shape) + shift).astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def build(case, resnet=resnet, **kwargs):
  stem = "cifar" if case["image_size"] <= 32 else "imagenet"
  ratios = {"sk_ratio": case["sk_ratio"], "se_ratio": case["se_ratio"]}
  return resnet(case["depth"], width=case["width"], stem=stem, **ratios, **kwargs)


def assert_matches(golden, intermediates, h, tolerances):
  for name, tolerance in zip(STAGES, tolerances[:-1], strict=True):
    shape, mean, std = golden[name]
    (x,) = intermediates[name]
    x = np.asarray(x, np.float64)
    assert list(x.shape) == shape, name
    np.testing.assert_allclose(x.mean(), mean, rtol=0, atol=tolerance * std, err_msg=name)
    np.testing.assert_allclose(x.std(), std, rtol=tolerance, err_msg=name)
  assert h.dtype == np.float32
  error = np.abs(np.asarray(h)[:, :6] - golden["avg_pool_first6"]).max() / np.abs(h).max()
  assert error <= tolerances[-1], error


# What these run is in the others as well.
SLOW = ("r50-1x-32px", "r18-2x-64px")


@pytest.mark.parametrize(
  "case", [pytest.param(c, id=case_name(c), marks=[pytest.mark.slow] * (case_name(c) in SLOW)) for c in CASES]
)
def test_golden(case):
  assert_golden(build(case), case)


def assert_golden(model, case):
  """The official code's numbers, in inference and in training mode."""
  variables = hashed_variables(model, case)
  assert sum(v.size for v in jax.tree.leaves(variables["params"])) == case["n_params"]
  x = images(case["image_size"])

  @functools.partial(jax.jit, static_argnums=2)
  def apply(variables, x, train):
    return model.apply(variables, x, train, mutable=["intermediates", "batch_stats"])

  h, state = apply(variables, x, False)
  assert_matches(case["eval"], state["intermediates"], h, EVAL_TOLERANCES)
  train_tolerances = TRAIN_TOLERANCES_SK if case["sk_ratio"] > 0 and case["depth"] >= 50 else TRAIN_TOLERANCES
  h, state = apply(variables, x, True)
  assert_matches(case["train"], state["intermediates"], h, train_tolerances)
  stem_norm = "stem_norm" if "stem_norm" in state["batch_stats"] else "stem_norm1"
  moving_mean = state["batch_stats"][stem_norm]["mean"]
  np.testing.assert_allclose(moving_mean[:4], case["stem_moving_mean_after_one_train_step_first4"], rtol=0, atol=1e-7)


def test_every_depth_counts_its_parameters():
  """Independent count: convolutions from the table of arXiv 1512.03385, two values a BatchNorm channel."""

  def count(depth, width):
    blocks, bottleneck = DEPTHS[depth]
    channels = int(64 * width)
    total = 3 * 3 * 3 * channels + 2 * channels
    for g, number in enumerate(blocks):
      f = int(64 * 2**g * width)
      out = 4 * f if bottleneck else f
      total += channels * out + 2 * out  # the projected shortcut
      for _ in range(number):
        if bottleneck:
          total += channels * f + 9 * f * f + f * out + 2 * (f + f + out)
        else:
          total += 9 * channels * f + 9 * f * f + 2 * (f + f)
        channels = out
    return total

  for depth in DEPTHS:
    for width in (0.25, 3) if depth in (18, 50) else (1.3,):
      model = resnet(depth, width=width, stem="cifar")
      h, shapes = jax.eval_shape(lambda m=model: m.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3))))
      assert sum(v.size for v in jax.tree.leaves(shapes["params"])) == count(depth, width), (depth, width)
      assert h.shape == (2, int(512 * width) * (4 if DEPTHS[depth][1] else 1)), (depth, width)
    assert sum(DEPTHS[depth][0]) * (3 if DEPTHS[depth][1] else 2) + 2 == depth


@pytest.mark.parametrize("bottleneck", [False, True])
def test_initial_values(bottleneck):
  block = Block(filters=16, stride=2, project=True, bottleneck=bottleneck, sk_ratio=0.0625, se_ratio=0.25)
  variables = jax.jit(block.init, static_argnums=2)(jax.random.key(0), jnp.zeros((1, 8, 8, 48)), False)
  last_norm = "norm3" if bottleneck else "norm2"
  for path, value in traverse_util.flatten_dict(variables["params"]).items():
    module, leaf = path[-2:]
    assert value.dtype == jnp.float32, path
    if leaf == "kernel":
      fan_in = np.prod(value.shape[:3])
      std = fan_in**-0.5
      np.testing.assert_allclose(value.std(), std, rtol=5 / np.sqrt(value.size), err_msg=str(path))
      assert np.abs(value).max() <= 2 / 0.8796 * std, path  # truncated at two standard deviations
    elif leaf == "scale":
      assert np.all(value == (0 if module == last_norm else 1)), path
    else:
      assert leaf == "bias" and np.all(value == 0), path
    # What LARS excludes it finds by path, so BatchNorms and only they are called so.
    assert ("norm" in module) == (leaf == "scale" or (leaf == "bias" and "conv" not in module)), path
  for path, value in traverse_util.flatten_dict(variables["batch_stats"]).items():
    assert "norm" in path[-2] and value.dtype == jnp.float32, path
    assert np.all(value == {"mean": 0, "var": 1}[path[-1]]), path


@pytest.mark.parametrize("padding, front", [("official", 0), ("torch", 1)])
def test_norm_relu_and_pool_of_the_stem(padding, front):
  """In this order, as the papers have them, whatever order computes them; with scales of both signs."""
  model = resnet(18, width=0.25, pool_padding=padding)
  x = images(32)
  variables = random_variables(model, x)
  norm = variables["params"]["stem_norm"]
  norm["scale"] = norm["scale"] * np.where(np.arange(16) % 3, 1, -1)
  keep = lambda module, _: module.name == "stem_conv"  # noqa: E731
  _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=keep))(variables, x)
  (before,), (after,) = state["intermediates"]["stem_conv"]["__call__"], state["intermediates"]["stem"]
  assert before.shape[1] == 16  # even: here the two differ
  stats = variables["batch_stats"]["stem_norm"]
  normed = (before - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
  padded = np.pad(np.maximum(normed, 0), ((0, 0), (front, 1), (front, 1), (0, 0)), constant_values=-np.inf)
  expected = [[padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 16, 2)] for i in range(0, 16, 2)]
  np.testing.assert_allclose(after, np.transpose(expected, (2, 0, 1, 3)), rtol=1e-4, atol=1e-5)
  # The same with the statistics of the batch, which also moves the averages as if nothing were turned round.
  _, state = jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats", "intermediates"]))(variables, x)
  mean, var = np.mean(before, (0, 1, 2)), np.var(before, (0, 1, 2))
  normed = (before - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
  padded = np.pad(np.maximum(normed, 0), ((0, 0), (front, 1), (front, 1), (0, 0)), constant_values=-np.inf)
  expected = [[padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 16, 2)] for i in range(0, 16, 2)]
  np.testing.assert_allclose(
    state["intermediates"]["stem"][0], np.transpose(expected, (2, 0, 1, 3)), rtol=1e-3, atol=1e-4
  )
  moved = state["batch_stats"]["stem_norm"]
  np.testing.assert_allclose(moved["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
  x = images(16, n=8)
  full, half = (resnet(18, width=0.25, stem="cifar", dtype=dtype) for dtype in (jnp.float32, "bfloat16"))
  variables = random_variables(half, x)

  @jax.jit
  def run_and_differentiate(params):
    def loss(params):
      h, state = half.apply({**variables, "params": params}, x, True, mutable=["batch_stats", "intermediates"])
      return h.sum(), (h, state)

    return jax.grad(loss, has_aux=True)(params)

  gradients, (h, state) = run_and_differentiate(variables["params"])
  run_full = jax.jit(lambda v, x: full.apply(v, x, True, mutable=["batch_stats"]))
  expected, expected_state = run_full(variables, x)
  assert h.dtype == jnp.float32
  assert all(v.dtype == jnp.bfloat16 for v in jax.tree.leaves(state["intermediates"]))
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((variables, state["batch_stats"], gradients)))
  # 8 bits of mantissa: 2^-9 a rounding, through some 20 layers.
  error = np.linalg.norm(h - expected) / np.linalg.norm(expected)
  assert 1e-5 < error < 2e-2, error
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02),
    state["batch_stats"],
    expected_state["batch_stats"],
  )


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_is_the_textbook_one(relu):
  """Values, moving averages and gradients, against float64 arithmetic and central differences."""
  rng = np.random.default_rng(0)
  x, cotangent = rng.normal(1, 2, (2, 4, 3, 3, 5))
  params = {"scale": rng.normal(1, 0.3, 5), "bias": rng.normal(0, 0.5, 5)}
  stats = {"mean": rng.normal(0, 1, 5), "var": rng.uniform(1, 2, 5)}

  def textbook(x, params):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    return np.maximum(y, 0) if relu else y

  def ours(x, params):
    variables = {"params": params, "batch_stats": stats}
    y, new = BatchNorm(relu=relu).apply(variables, x, True, mutable=["batch_stats"])
    return jnp.sum(y * cotangent), (y, new["batch_stats"])

  as_float32 = jax.tree.map(np.float32, (x, params, stats))
  stats32 = as_float32[2]
  stats, stats64 = stats32, stats
  gradients, (y, new) = jax.grad(ours, argnums=(0, 1), has_aux=True)(*as_float32[:2])
  np.testing.assert_allclose(y, textbook(x, params), atol=1e-5)
  np.testing.assert_allclose(new["mean"], 0.9 * stats64["mean"] + 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(new["var"], 0.9 * stats64["var"] + 0.1 * x.var((0, 1, 2)), rtol=1e-5)

  def slope(array):
    """d sum(textbook * cotangent) / d array, in place of one element after another."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      value, ends = array[index], []
      for array[index] in (value + 1e-6, value - 1e-6):
        ends.append(np.sum(textbook(x, params) * cotangent))
      array[index] = value
      result[index] = (ends[0] - ends[1]) / 2e-6
    return result

  np.testing.assert_allclose(gradients[0], slope(x), atol=1e-4)
  for name in params:
    np.testing.assert_allclose(gradients[1][name], slope(params[name]), atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_1x1_convolution_has_the_gradients_of_a_convolution(stride):
  rng = np.random.default_rng(0)
  x, kernel = np.float32(rng.normal(size=(2, 7, 7, 5))), np.float32(rng.normal(size=(1, 1, 5, 3)))

  def ours(x, kernel):
    return Conv(3, 1, stride).apply({"params": {"kernel": kernel}}, x)

  def reference(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )

  y, pullback = jax.vjp(ours, x, kernel)
  expected, expected_pullback = jax.vjp(reference, x, kernel)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  dy = np.float32(rng.normal(size=y.shape))
  for ours_, expected in zip(pullback(dy), expected_pullback(dy), strict=True):
    np.testing.assert_allclose(ours_, expected, atol=1e-5)


def test_batch_statistics_are_those_of_the_global_batch():
  """16 images on 8 devices, two on each: h and the moving statistics of one device."""
  model = resnet(18, width=0.25, stem="cifar")
  # Images of unlike brightness, in order, so that each device alone would have quite other statistics.
  x = images(16, n=16) * np.linspace(0.1, 1, 16, dtype=np.float32)[:, None, None, None]
  variables = random_variables(model, x)
  step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  h, state = step(*jax.device_put((variables, x), jax.devices()[0]))
  mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  h8, state8 = step(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), sharded)
  assert len(h8.sharding.device_set) == 8
  np.testing.assert_allclose(h8, h, rtol=0, atol=1e-4 * np.abs(h).max())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), state8, state)


@pytest.mark.parametrize(
  "kwargs, words",
  [
    ({"depth": 51}, "51.*18, 34, 50, 101, 152, 200"),
    ({"stem": "foo"}, "foo.*imagenet.*cifar"),
    ({"width": 0}, "width 0:"),
    ({"width": -1}, "width -1:"),
    ({"width": "2"}, "width '2':"),
    ({"width": float("nan")}, "width nan:"),
    ({"sk_ratio": -0.1}, "sk_ratio -0.1:"),
    ({"se_ratio": 2}, "se_ratio 2:"),
    ({"pool_padding": "same"}, "same.*official.*torch"),
    ({"dtype": "float16"}, "float16.*float32.*bfloat16"),
    ({"dtype": "float8"}, "float8.*float32.*bfloat16"),
  ],
)
def test_impossible_values(kwargs, words):
  with pytest.raises(ValueError, match=words) as error:
    resnet(**{"depth": 18, **kwargs})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("x", [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.float32)])
def test_impossible_images(x):
  with pytest.raises(ValueError, match=r"expected float images \[n, h, w, 3\]"):
    resnet(18, width=0.25).init(jax.random.key(0), x)


@pytest.mark.slow
@pytest.mark.parametrize("remat, regions", [("block", 8), ("group", 4), ("block,group,none,none", 3)])
def test_remat_changes_memory_and_nothing_else(remat, regions):
  """Same parameters, statistics and gradients; what the backward pass keeps is the activations between blocks."""
  x = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))

  def gradients(remat):
    model = resnet(18, width=0.125, stem="cifar", remat=remat)
    variables = model.init(jax.random.key(0), x)

    def loss(params):
      h, updated = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
      return jnp.sum(h**2), updated

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"]), str(
      jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables["params"])
    )

  (expected, _), (found, jaxpr) = gradients("none"), gradients(remat)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  assert jaxpr.count("remat2[") + jaxpr.count("checkpoint[") == regions
