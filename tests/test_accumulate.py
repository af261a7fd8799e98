"""Microbatches give the gradients of the whole batch, on one device and on eight."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import accumulate, contrast, data, model, train_step
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain
from simclr_jax.projector import Projector
from simclr_jax.runtime import errors
from simclr_jax.runtime import mesh as mesh_lib

N, K, D = 32, 4, 8
MOMENTUM = 0.9


class Norm(nn.BatchNorm):
  """A BatchNorm that keeps the contract of accumulate.MOMENTS."""

  def __call__(self, x, train):
    if not (train or self.is_initializing()) and self.is_mutable_collection(accumulate.MOMENTS):
      axes = tuple(range(x.ndim - 1))
      self.put_variable(accumulate.MOMENTS, "mean", jnp.mean(x, axes))
      self.put_variable(accumulate.MOMENTS, "square", jnp.mean(jnp.square(x), axes))
    return super().__call__(x, use_running_average=not train)


class Net(nn.Module):
  """Two convolutions and a head, a BatchNorm after each."""

  @nn.compact
  def __call__(self, views, train):
    x = views.reshape(-1, *views.shape[2:])
    for i, width in enumerate((6, 12)):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
      x = nn.relu(Norm(momentum=MOMENTUM, name=f"BatchNorm_{i}")(x, train))
    x = nn.Dense(D, use_bias=False)(x.mean((1, 2)))
    return Norm(momentum=MOMENTUM, name="BatchNorm_2")(x, train).reshape(views.shape[0], 2, D)


def network(variables, batch, train=True):
  z, updated = Net().apply(variables, batch["views"], train, mutable=["batch_stats"])
  return z, updated["batch_stats"]


def moments(variables, batch):
  return Net().apply(variables, batch["views"], False, mutable=[accumulate.MOMENTS])[1][accumulate.MOMENTS]


nt_xent = functools.partial(contrast.nt_xent, temperature=0.3)


def in_parts(devices=1, batch_norm="microbatch", network=network):
  return accumulate.in_parts(network, parts=K, devices=devices, batch_norm=batch_norm, moments=moments)


def loss_of(z):
  return nt_xent(z)[0] + 0.01 * jnp.sum(jnp.sin(z))


@pytest.fixture(scope="module")
def problem():
  views = np.random.default_rng(0).random((N, 2, 12, 12, 3), np.float32)
  variables = Net().init(jax.random.key(0), views[:1], False)
  assert set(variables) == {"params", "batch_stats"}
  stats = jax.tree.map(lambda x: x + 0.1, variables["batch_stats"])
  return variables["params"], stats, {"views": views, "number": np.arange(N)}


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradients(network, params, stats, batch, train=True):
  """((loss, updated statistics), gradients)."""

  def objective(params):
    z, updated = network({"params": params, "batch_stats": stats}, batch, train)
    return loss_of(z), updated

  return jax.value_and_grad(objective, has_aux=True)(params)


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()) + 1e-7)


@pytest.mark.parametrize("devices", [1, 8])
def test_exact_statistics_equal_the_unsplit_step(problem, devices):
  """Gradients, statistics and loss of 4 microbatches against one batch, in training mode; 1e-5 of the largest."""
  params, stats, batch = problem
  (value, updated), want = gradients(network, params, stats, batch)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  split_step = jax.jit(functools.partial(gradients, in_parts(devices, "exact")))
  (loss, got_stats), got = split_step(params, stats, mesh_lib.global_batch(mesh, batch))
  close(got, want, 1e-5)
  close(got_stats, updated, 1e-5)
  np.testing.assert_allclose(loss, value, rtol=1e-6)


def test_frozen_statistics_equal_the_unsplit_step(problem):
  """With BatchNorm on given statistics a microbatch is a part of the batch and nothing else."""
  params, stats, batch = problem
  (_, _), want = gradients(network, params, stats, batch, False)
  (_, updated), got = gradients(in_parts(), params, stats, jax.tree.map(jnp.asarray, batch), False)
  close(got, want, 1e-5)
  jax.tree.map(np.testing.assert_array_equal, updated, stats)


def test_microbatch_statistics_are_that_function(problem):
  """Against plain differentiation of the same function written as a loop; and the moving statistics it should leave."""
  params, stats, batch = problem
  parts = accumulate.split(jnp.asarray(batch["views"]), K, 1)

  def objective(params):
    variables = {"params": params, "batch_stats": stats}
    return loss_of(accumulate.join(jnp.stack([network(variables, {"views": part})[0] for part in parts]), 1))

  want = jax.jit(jax.grad(objective))(params)
  (_, updated), got = gradients(in_parts(), params, stats, jax.tree.map(jnp.asarray, batch))
  close(got, want, 1e-5)
  # The first BatchNorm sees the same inputs either way, so its moving statistics are those of the unsplit step.
  (_, whole), unsplit = gradients(network, params, stats, batch)
  close(updated["BatchNorm_0"], whole["BatchNorm_0"], 1e-5)
  assert abs(unsplit["Conv_0"]["kernel"] - got["Conv_0"]["kernel"]).max() > 1e-4  # a different function


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_split_and_join(devices):
  x = jnp.arange(48).reshape(16, 3)
  parts = accumulate.split(x, 2, devices)
  np.testing.assert_array_equal(accumulate.join(parts, devices), x)
  rows = np.asarray(parts)[:, :, 0] // 3
  for part in rows:  # an equal share of each device's contiguous block
    assert np.bincount(part // (16 // devices)).tolist() == [8 // devices] * devices


def test_unknown_choice():
  with pytest.raises(ValueError, match="batch_norm='global': expected one of microbatch, exact"):
    in_parts(batch_norm="global")


@pytest.mark.parametrize(
  "changes", [{"norm_devices": 3}, {"norm_devices": 1}, {"norm_devices": 0}, {"microbatches": 2}]
)
def test_parts_for_batch_norm_that_make_no_sense_are_refused(changes):
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  with pytest.raises(errors.UserError, match="norm_scope=device") as refused:
    pretrain.check_batch(tiny.config(norm_scope="device", **changes), mesh)
  assert "\n" not in str(refused.value)


def test_batch_norm_of_devices_is_that_of_their_images_alone():
  """Each of four imagined devices gives what it gives by itself; the moving statistics of the first layer are those of the
  whole batch, whose statistics that layer would have had; inference mode knows no devices."""
  x = jax.random.uniform(jax.random.key(0), (N, 2, 8, 8, 3))
  variables = Net().init(jax.random.key(1), x[:1], False)
  plain = lambda variables, views, train=True: network(variables, {"views": views}, train)  # noqa: E731
  plain = functools.partial(jax.jit, static_argnames="train")(plain)
  grouped = functools.partial(jax.jit, static_argnames="train")(train_step.of_devices(plain, K))
  z, updated = grouped(variables, x)
  alone = [plain(variables, x[i : i + N // K])[0] for i in range(0, N, N // K)]
  np.testing.assert_allclose(z, np.concatenate(alone), atol=1e-5)
  assert np.abs(z - plain(variables, x)[0]).max() > 0.01
  for a, b in zip(*(jax.tree.leaves(u["BatchNorm_0"]) for u in (updated, plain(variables, x)[1])), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_array_equal(grouped(variables, x, train=False)[0], plain(variables, x, train=False)[0])


class Slow(nn.Module):
  """An encoder whose BatchNorm has another momentum, which it does not state."""

  momentum: float

  @nn.compact
  def __call__(self, x, train=False):
    return Norm(momentum=self.momentum, name="norm")(x.mean((1, 2)), train)


@pytest.mark.parametrize("momentum", [0.99, 1.0])
@pytest.mark.parametrize("how", ["microbatch", "exact", "device"])
def test_moving_statistics_of_another_momentum_are_those_of_the_unsplit_step(how, momentum):
  """The first BatchNorm sees the same inputs either way; the head's, with another momentum, only where statistics are exact."""
  net = model.SimCLR(Slow(momentum), Projector(1, 4, "linear"))
  x = jax.random.uniform(jax.random.key(0), (N, 2, 4, 4, 3)) + jnp.arange(N)[:, None, None, None, None]
  variables = net.init(jax.random.key(1), x[:1])
  _, unsplit = train_step.unsplit(net, lambda x: x)
  if how == "device":
    network = train_step.of_devices(unsplit, K)
  else:
    options = dict(microbatches=K, devices=1, batch_norm=how)
    _, network = train_step.in_microbatches(net, lambda x: x, **options)
  (_, want), (_, got) = unsplit(variables, x), network(variables, x)
  if momentum < 1:
    assert float(want["encoder"]["norm"]["var"][0]) > 1.5  # so that a wrong factor would show
  close(got if how == "exact" else got["encoder"], want if how == "exact" else want["encoder"], 1e-5)


class Silent(nn.Module):
  """An encoder with a plain BatchNorm of Flax."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.BatchNorm(use_running_average=not train, name="norm")(x.mean((1, 2)))


def silent() -> nn.Module:
  return Silent()


def test_an_encoder_that_writes_no_moments_trains_in_microbatches_but_not_with_exact_statistics():
  mine = {
    "encoder.depth": None,
    "encoder.width": 1.0,
    "encoder.stem": "imagenet",
    "encoder.name": "test_accumulate:silent",
  }
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  config = tiny.config(microbatches=2, **mine)
  pretrain.make_task(config, data.AbstractSource(96, 10), mesh=mesh)
  with pytest.raises(
    errors.UserError, match="microbatch_norm=exact: the BatchNorm encoder/norm does not write"
  ) as refused:
    pretrain.make_task(config_lib.replace(config, {"microbatch_norm": "exact"}), data.AbstractSource(96, 10), mesh=mesh)
  assert "\n" not in str(refused.value)
  own = tiny.config(microbatches=2, microbatch_norm="exact")
  pretrain.make_task(own, data.AbstractSource(96, 10), mesh=mesh)
