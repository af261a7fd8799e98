"""`nt_xent_tiled` against float64 and against the dense form: any number of devices, tile, temperature and dtype."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from simclr_jax import contrast

ROOT = pathlib.Path(__file__).parent.parent
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # compiling is nearly all of what these tests do


def make_mesh(devices):
  return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def reference(z, temperature, normalize=True):
  """Loss and gradient in float64 by matrices, as the loops of test_contrast.py (which check them below)."""
  z = np.asarray(z, np.float64)
  raw = z.reshape(-1, z.shape[-1])
  norm = np.sqrt((raw * raw).sum(-1, keepdims=True)) if normalize else 1.0
  rows = raw / norm
  logits = rows @ rows.T / temperature
  n = len(rows)
  i, positive = np.arange(n), np.arange(n) ^ 1
  odds = logits - logits[i, positive][:, None]
  odds[i // 2 == i[:, None] // 2] = -np.inf
  top = np.maximum(odds.max(1), 0)
  total = np.exp(odds - top[:, None]).sum(1)
  losses = np.where(top > 0, top + np.log(total + np.exp(-top)), np.log1p(total))
  p = np.exp(odds - losses[:, None])
  q = p.sum(1)
  gradient = ((p + p.T) @ rows - (q + q[positive])[:, None] * rows[positive]) / temperature / n
  if normalize:
    gradient = (gradient - rows * (gradient * rows).sum(-1, keepdims=True)) / norm
  return losses.mean(), gradient.reshape(z.shape)


def random_z(n, d, noise, seed=0):
  """Pairs around a common direction; noise=None: all 2n rows independent, 0.05: nearly solved."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(n, 2, d))
  return (z if noise is None else rng.normal(size=(n, 1, d)) + noise * z).astype(np.float32)


def compiled(loss=contrast.nt_xent_tiled, compiler_options=FAST_COMPILE, **keywords):
  """(z, temperature) -> loss, metrics, gradient; the temperature static, as a config has it."""

  @functools.partial(jax.jit, static_argnums=1, compiler_options=compiler_options)
  def run(z, temperature):
    (value, metrics), gradient = jax.value_and_grad(lambda z: loss(z, temperature, **keywords), has_aux=True)(z)
    return value, metrics, gradient

  return run


def error(actual, expected):
  """Largest difference against the largest entry."""
  return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def assert_exact(actual, z, temperature, normalize=True):
  """Against float64, to what float32 can carry.

  A float32 cosine is off by some 1e-7, a logit by 1e-7 / temperature, and so is, relatively, the loss of a
  solved batch and any gradient. The mean over anchors of an unsolved batch keeps 1e-6 at any temperature.
  """
  loss, metrics, gradient = actual
  expected_loss, expected_gradient = reference(z, temperature, normalize)
  rounding = 2e-7 / temperature
  assert abs(loss - expected_loss) <= (1e-6 + (rounding if expected_loss < 0.1 else 0)) * expected_loss
  assert error(gradient, expected_gradient) <= max(1e-5, rounding)
  assert all(np.isfinite(m) for m in metrics.values())


def test_reference_against_loops():
  from test_contrast import loop_nt_xent

  for noise in (None, 0.05):
    z = random_z(6, 5, noise)
    for temperature, normalize in ((0.1, True), (1.0, False)):
      loss, gradient = reference(z, temperature, normalize)
      expected_loss, expected_gradient = loop_nt_xent(z, temperature, normalize)
      np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
      assert error(gradient, expected_gradient) < 1e-12


def check_exact(devices, n, tile, temperature):
  run = compiled(mesh=make_mesh(devices) if devices > 1 else None, tile=tile)
  for noise in (None, 0.05):
    z = random_z(n, 128, noise)
    assert_exact(run(z, temperature), z, temperature)


# Tiles that divide the images of a device and tiles that do not, one and many tiles, rings of odd and even length;
# 0.01 takes the running maximum of each row, the other temperatures the fixed shift.
@pytest.mark.parametrize(
  "devices, n, tile, temperature",
  [
    (1, 96, None, 0.1),
    (1, 90, 16, 0.01),
    (2, 96, 16, 0.05),
    (3, 60, 7, 0.1),
    (4, 96, 11, 0.01),
    (8, 96, None, 1.0),
    (8, 96, 5, 0.1),
  ],
)
def test_exact_value_and_gradient(devices, n, tile, temperature):
  check_exact(devices, n, tile, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_exact_value_and_gradient_of_larger_batches(devices, temperature):
  for tile in (None, 64, 50):
    check_exact(devices, 512, tile, temperature)


@pytest.mark.parametrize("devices, tile, temperature", [(1, 10, 0.01), (8, 3, 0.2)])
def test_metrics_are_those_of_the_dense_form(devices, tile, temperature):
  z = random_z(56, 8, 0.8)
  _, expected, _ = compiled(contrast.nt_xent)(z, temperature)
  _, metrics, _ = compiled(mesh=make_mesh(devices), tile=tile)(z, temperature)
  assert metrics.keys() == expected.keys()
  assert 0 < expected["contrastive_accuracy_all"] < expected["contrastive_accuracy"] < 1
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_unnormalized_logits_of_any_size():
  run = compiled(mesh=make_mesh(3), tile=4, normalize=False)
  dense = compiled(contrast.nt_xent, normalize=False)
  for scale in (0.3, 3.0):  # logits up to 600
    z = scale * random_z(33, 16, 1.0)
    loss, metrics, gradient = run(z, 0.5)
    expected_loss, expected_gradient = reference(z, 0.5, normalize=False)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert error(gradient, expected_gradient) < 1e-5
    for name, value in dense(z, 0.5)[1].items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_few_images(temperature):
  run = compiled()
  loss, metrics, gradient = run(random_z(1, 16, None), temperature)  # no negatives: nothing to learn
  assert loss == 0 and not np.any(gradient)
  assert metrics["contrastive_accuracy"] == 1 and all(np.isfinite(m) for m in metrics.values())
  z = random_z(2, 16, None)  # on one device one tile an image, so that a tile may hold no negative at all
  assert_exact(compiled(tile=1)(z, temperature), z, temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.04])
def test_degenerate_batches(temperature):
  batches = {
    "collapsed": np.ones((12, 2, 24)),
    "antipodal": np.ones((12, 2, 24)) * np.array([1, -1] * 6)[:, None, None],
    "orthogonal": np.eye(24).reshape(12, 2, 24),
    "zero": np.zeros((12, 2, 24)),
  }
  run, dense = compiled(tile=2), compiled(contrast.nt_xent)
  for kind, z in batches.items():
    loss, metrics, gradient = run(z.astype(np.float32), temperature)
    dense_loss, dense_metrics, dense_gradient = dense(z.astype(np.float32), temperature)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-5, err_msg=kind)
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-5, err_msg=kind)
    for name in metrics:
      np.testing.assert_allclose(metrics[name], dense_metrics[name], rtol=1e-4, atol=1e-5, err_msg=kind + name)


def test_reduction_precision_and_bfloat16():
  z, keywords = random_z(32, 64, 1.0), {"reduction": "official_sum", "precision": "default"}
  loss, _, gradient = compiled(tile=5, **keywords)(z, 0.1)
  dense_loss, _, dense_gradient = compiled(contrast.nt_xent, **keywords)(z, 0.1)
  np.testing.assert_allclose(loss, dense_loss, rtol=1e-6)
  # With bfloat16 operands the two forms round the probabilities at different places.
  assert error(gradient, np.asarray(dense_gradient)) < 1e-2
  half = jnp.asarray(z, jnp.bfloat16)
  loss, _, gradient = compiled(mesh=make_mesh(2))(half, 0.1)
  assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
  np.testing.assert_allclose(loss, reference(half.astype(jnp.float32), 0.1)[0], rtol=1e-6)


def test_temperature_can_be_learned():
  z = random_z(24, 16, 1.0)
  slopes = [
    jax.jit(jax.grad(lambda t, f=f: f(z, t)[0]), compiler_options=FAST_COMPILE)(0.2)
    for f in (contrast.nt_xent, functools.partial(contrast.nt_xent_tiled, mesh=make_mesh(2), tile=4))
  ]
  slope = (reference(z, 0.2 + 1e-5)[0] - reference(z, 0.2 - 1e-5)[0]) / 2e-5
  np.testing.assert_allclose(slopes, slope, rtol=1e-5)


def test_images_can_be_permuted():
  z, order = random_z(40, 16, 1.0), np.random.default_rng(1).permutation(40)
  run = compiled(mesh=make_mesh(5), tile=3)
  loss, _, gradient = run(z, 0.1)
  permuted_loss, _, permuted_gradient = run(z[order], 0.1)
  np.testing.assert_allclose(permuted_loss, loss, rtol=1e-6)
  assert error(permuted_gradient, np.asarray(gradient)[order]) < 1e-6


MISTAKES = {
  "one named 'data'": {"mesh": lambda: jax.make_mesh((2,), ("model",))},
  "multiple of 8": {"mesh": lambda: make_mesh(8)},
  "tile is 0": {"tile": lambda: 0},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message):
  keywords = {name: make() for name, make in MISTAKES[message].items()}
  with pytest.raises(ValueError) as error:
    contrast.nt_xent_tiled(random_z(12, 4, None), 0.1, **keywords)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_choice():
  for platform in ("cpu", "tpu"):
    assert contrast.choose(4096, 128, platform) == "dense"
    assert contrast.choose(262144, 128, platform) == "tiled"
  assert contrast.choose(4096, 8, "cpu") == "tiled"
  text = [
    str(jax.make_jaxpr(lambda z: contrast.nt_xent_auto(z, 0.1, mesh=make_mesh(8)))(jnp.zeros((n, 2, 8))))
    for n in (512, 4096)
  ]
  assert ["ppermute" in t for t in text] == [False, True]
  given = jax.make_jaxpr(lambda z: contrast.nt_xent_auto(z, 0.1, mesh=make_mesh(8), tile=32))(jnp.zeros((512, 2, 8)))
  assert "ppermute" in str(given)  # a tile that somebody asks for is used


def test_compiled_program_is_small_and_sends_only_neighbor_to_neighbor():
  n, d, devices = 4096, 128, 8
  mesh = make_mesh(devices)
  z = jax.ShapeDtypeStruct((n, 2, d), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
  tiled = compiled(mesh=mesh, compiler_options=None).lower(z, 0.1).compile()
  dense = compiled(contrast.nt_xent, compiler_options=None).lower(z, 0.1).compile()
  tiled_bytes, dense_bytes = (c.memory_analysis().temp_size_in_bytes for c in (tiled, dense))
  assert tiled_bytes <= 6 * 2**20
  assert dense_bytes > 80 * 2**20
  text = tiled.as_text()
  assert "collective-permute" in text
  assert not re.search(r"= \S+ (all-gather|all-to-all|reduce-scatter)", text)
  local = n // devices * 2 * d
  for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-reduce", text):
    assert np.prod([int(k) for k in shape.split(",")]) <= d  # the metrics' sums, nothing per image
  largest = max(np.prod([int(k) for k in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text))
  assert largest <= local


PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from simclr_jax import contrast
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
z = np.load(folder + "/z.npy")
mine = z[: len(z) // 2] if process == "0" else z[len(z) // 2 :]
z = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), mine)
step = jax.jit(jax.value_and_grad(lambda z: contrast.nt_xent_tiled(z, 0.1, mesh=mesh, tile=3), has_aux=True))
(loss, metrics), gradient = step(z)
shards = sorted(gradient.addressable_shards, key=lambda s: s.index[0].start)
np.savez(f"{folder}/{process}.npz", loss=loss, gradient=np.concatenate([s.data for s in shards]), **metrics)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
  z = random_z(56, 16, 1.0)
  np.save(tmp_path / "z.npy", z)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  processes = [
    subprocess.Popen([sys.executable, "-c", PROCESS, str(port), str(k), str(tmp_path)], env=environment) for k in (0, 1)
  ]
  try:
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
  finally:
    for p in processes:
      p.kill()
  loss, metrics, gradient = compiled(mesh=make_mesh(8), tile=3)(z, 0.1)
  results = [np.load(tmp_path / f"{k}.npz") for k in (0, 1)]
  for result in results:
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)
    for name in metrics:
      np.testing.assert_allclose(result[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  assert error(np.concatenate([r["gradient"] for r in results]), np.asarray(gradient)) < 1e-6


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)")
@pytest.mark.parametrize("topology", ["v4:4x4x8", "v5e:16x16"])
def test_compiled_for_tpus(topology):
  """B = 262,144: little memory, z never gathered, and computation between the start and the end of each hop."""
  program = ROOT / "benchmarks" / "contrast.py"
  output = subprocess.run(
    [sys.executable, program, "--tpu", "--topologies", topology, "--batches", "262144", "--forms", "tiled", "--json"],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  (row,) = json.loads(output.splitlines()[-1])
  assert row["temporaries_mib"] <= 16
  assert row["gathers"] == 0
  # Only the return of the traveling results is not overlapped: it happens once a pass, not once a hop.
  assert row["hops_overlapped"] == row["hops_in_loops"] > 0
