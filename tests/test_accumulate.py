"""Microbatches give the gradients of the whole batch, on one device and on eight."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import accumulate, contrast
from simclr_jax.runtime import mesh as mesh_lib

N, K, D = 32, 4, 8


class Net(nn.Module):
  """Two convolutions and a head, a BatchNorm after each."""

  @nn.compact
  def __call__(self, views, train):
    x = views.reshape(-1, *views.shape[2:])
    for width in (6, 12):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dense(D, use_bias=False)(x.mean((1, 2)))
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x).reshape(views.shape[0], 2, D)


def forward(params, batch_stats, part, train):
  z, updated = Net().apply(
    {"params": params, "batch_stats": batch_stats}, part["views"], train, mutable=["batch_stats"]
  )
  return (z, {"online_loss": 0.01 * jnp.sum(jnp.sin(z))}), updated["batch_stats"]


loss = functools.partial(contrast.nt_xent, temperature=0.3)


@pytest.fixture(scope="module")
def problem():
  views = np.random.default_rng(0).random((N, 2, 12, 12, 3), np.float32)
  variables = Net().init(jax.random.key(0), views[:1], False)
  stats = jax.tree.map(lambda x: x + 0.1, variables["batch_stats"])
  return variables["params"], stats, {"views": views}


def unsplit(params, stats, batch, train):
  def objective(params):
    (z, side), updated = forward(params, stats, batch, train)
    return loss(z)[0] + side["online_loss"], updated

  return jax.value_and_grad(objective, has_aux=True)(params)


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()) + 1e-7)


@pytest.mark.parametrize("devices", [1, 8])
def test_exact_statistics_equal_the_unsplit_step(problem, devices):
  """Gradients, statistics and metrics of 4 microbatches against one batch, in training mode; 1e-5 of the largest."""
  params, stats, batch = problem
  (value, updated), want = unsplit(params, stats, batch, True)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  batch = mesh_lib.global_batch(mesh, batch)

  @jax.jit
  def split_step(params, stats, batch):
    parts = jax.tree.map(lambda x: accumulate.split(x, K, devices), batch)
    return accumulate.value_and_grad(forward, loss, params, stats, parts, devices=devices, batch_norm="exact")

  (metrics, got_stats), got = split_step(params, stats, batch)
  close(got, want, 1e-5)
  close(got_stats, updated, 1e-5)
  np.testing.assert_allclose(metrics["loss"] + metrics["online_loss"], value, rtol=1e-6)


def test_frozen_statistics_equal_the_unsplit_step(problem):
  """With BatchNorm on given statistics a microbatch is a part of the batch and nothing else."""
  params, stats, batch = problem
  (_, _), want = unsplit(params, stats, batch, False)
  parts = jax.tree.map(lambda x: accumulate.split(jnp.asarray(x), K, 1), batch)

  def frozen(params, stats, part, train):
    return forward(params, stats, part, False)

  _, got = accumulate.value_and_grad(frozen, loss, params, stats, parts, devices=1, batch_norm="microbatch")
  close(got, want, 1e-5)


def test_microbatch_statistics_are_that_function(problem):
  """Against plain differentiation of the same function written as a loop; and the moving statistics it should leave."""
  params, stats, batch = problem
  parts = jax.tree.map(lambda x: accumulate.split(jnp.asarray(x), K, 1), batch)

  def objective(params):
    outputs = [forward(params, stats, {"views": parts["views"][i]}, True)[0] for i in range(K)]
    z = accumulate.join(jnp.stack([z for z, _ in outputs]), 1)
    return loss(z)[0] + sum(side["online_loss"] for _, side in outputs)

  want = jax.grad(objective)(params)
  (_, updated), got = accumulate.value_and_grad(forward, loss, params, stats, parts, devices=1, batch_norm="microbatch")
  close(got, want, 1e-5)
  # The first BatchNorm sees the same inputs either way, so its moving statistics are those of the unsplit step.
  whole = forward(params, stats, batch, True)[1]
  close(updated["BatchNorm_0"], whole["BatchNorm_0"], 1e-5)
  unsplit_gradients = unsplit(params, stats, batch, True)[1]
  assert abs(unsplit_gradients["Conv_0"]["kernel"] - got["Conv_0"]["kernel"]).max() > 1e-4  # a different function


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_split_and_join(devices):
  x = jnp.arange(48).reshape(16, 3)
  parts = accumulate.split(x, 2, devices)
  np.testing.assert_array_equal(accumulate.join(parts, devices), x)
  rows = np.asarray(parts)[:, :, 0] // 3
  for part in rows:  # an equal share of each device's contiguous block
    assert np.bincount(part // (16 // devices)).tolist() == [8 // devices] * devices


def test_unknown_choice(problem):
  params, stats, batch = problem
  with pytest.raises(ValueError, match="batch_norm='global': expected one of microbatch, exact"):
    accumulate.value_and_grad(forward, loss, params, stats, batch, devices=1, batch_norm="global")
