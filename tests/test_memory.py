"""The memory bank: its loss against a float64 loop, and what a step keeps, on a network of two layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import contrast, methods, model, optimizer, train_step
from simclr_jax.methods import memory
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain
from simclr_jax.projector import Projector
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch


def by_hand(z, bank, temperature):
  z = z / np.linalg.norm(z, axis=-1, keepdims=True)
  losses = []
  for i in range(len(z)):
    for a in range(2):
      positive = z[i, a] @ z[i, 1 - a]
      negatives = [z[i, a] @ z[j, b] for j in range(len(z)) for b in range(2) if j != i] + [z[i, a] @ m for m in bank]
      e = np.exp(np.array([positive, *negatives]) / temperature)
      losses.append(-np.log(e[0] / e.sum()))
  return np.mean(losses)


@pytest.mark.parametrize("banked", [0, 5, 12])
def test_the_loss_against_a_loop(banked):
  rng = np.random.default_rng(0)
  z, bank = rng.normal(size=(6, 2, 4)), rng.normal(size=(12, 4))
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  loss, _ = contrast.nt_xent(jnp.asarray(z), 0.3, bank=jnp.asarray(bank), banked=banked)
  assert float(loss) == pytest.approx(by_hand(z, bank[:banked], 0.3), rel=1e-5)
  gradients = [
    jax.jit(jax.grad(lambda z, k=k: contrast.nt_xent(z, 0.3, **k)[0]))(jnp.float32(z))
    for k in ({"bank": jnp.float32(bank), "banked": 0}, {})
  ]
  np.testing.assert_allclose(*gradients, atol=1e-7)


class Toy(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, name="conv")(x.reshape(len(x), -1))
    return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def test_a_step_averages_and_remembers():
  net = model.SimCLR(Toy(), Projector(2, 4), num_classes=3)
  tx = optimizer.sgd_nesterov(0.1)
  method = memory.Memory(size=24, decay=0.9, loss_options={"temperature": 0.5})
  state = pretrain.init_state(jax.random.key(0), model=net, method=method, tx=tx, image_size=32)
  views, network = train_step.unsplit(net, lambda batch: batch.pixels)
  options = dict(views=views, network=network, method=method, tx=tx, schedule=lambda step: 0.1)
  step, kept = jax.jit(functools.partial(train_step.train_step, **options)), []
  rng, index = np.random.default_rng(0), jnp.arange(8)
  for k in range(3):
    pixels = jnp.float32(rng.random((8, 2, 32, 32, 3)))
    batch = Batch(pixels=pixels, label=index % 3, index=index, seed=None)
    (_, z, _), _ = net.apply(state.extra["average"], pixels, train=True, mutable=["batch_stats"])
    z = np.asarray(z).reshape(16, 4)
    kept.insert(0, z / np.linalg.norm(z, axis=1, keepdims=True))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    (_, own, _), _ = net.apply(variables, pixels, train=True, mutable=["batch_stats"])
    before = state
    state, metrics = step(state, batch)
    banked = min(16 * k, 24)
    assert float(metrics["remembered"]) == banked
    assert float(metrics["loss"]) == pytest.approx(
      by_hand(np.float64(own), np.float64(before.extra["bank"][:banked]), 0.5), rel=1e-4
    )
    np.testing.assert_allclose(state.extra["bank"][: 16 * (k + 1)], np.concatenate(kept)[:24], atol=1e-5)
    jax.tree.map(
      lambda a, b, w: np.testing.assert_allclose(a, 0.9 * b + 0.1 * w, atol=1e-6),
      state.extra["average"]["params"], before.extra["average"]["params"], state.params,
    )  # fmt: skip
  assert int(state.step) == 3


def test_impossible_values_are_named():
  with pytest.raises(ValueError, match="memory.decay=1.0"):
    config_lib.override(tiny.config(), ["--config.memory.size=24", "--config.memory.decay=1.0"])


def test_chance_counts_what_is_remembered():
  config = config_lib.override(tiny.config(), ["--config.memory.size=4096"])
  assert methods.create(config, None).chance_loss == pytest.approx(np.log(2 * config.batch_size - 1 + 4096))


def test_a_recipe_may_name_the_loss():
  """`loss.name` chooses the function and is not handed to it."""
  values = ["--config.loss.name=nt_xent", "--config.memory.size=64", "--config.memory.decay=0.9"]
  config = config_lib.override(tiny.config(), values)
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh(jax.devices()[:1]))
  state = jax.eval_shape(task.init, jax.random.key(0))
  batch = pretrain.view_pipeline(config).spec(config.batch_size)
  assert "remembered" in jax.eval_shape(task.step, state, batch)[1]
