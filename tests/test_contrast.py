"""NT-Xent on one page against the official code's numbers and against a float64 double loop."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import contrast

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "official_golden.json").read_text())["ntxent"]


def pair_major(rows):
  """Official order, all first views then all second views -> [n, 2, d]."""
  rows = np.asarray(rows)
  return np.swapaxes(rows.reshape(2, len(rows) // 2, -1), 0, 1)


def unit(z):
  return z / np.sqrt(np.maximum((z * z).sum(-1, keepdims=True), 1e-12))


def loop_loss(z, temperature, normalize=True):
  """Equation 1 by two loops over anchors and candidates, in float64."""
  z = np.asarray(z, np.float64)
  rows = (unit(z) if normalize else z).reshape(-1, z.shape[-1])
  losses = []
  for i in range(len(rows)):
    logits = {k: float(rows[i] @ rows[k]) / temperature for k in range(len(rows)) if k != i}
    top = max(logits.values())
    losses.append(top - logits[i ^ 1] + np.log(sum(np.exp(v - top) for v in logits.values())))
  return np.mean(losses)


def loop_gradient(z, temperature, normalize=True):
  """d loop_loss / dz in float64, row by row from the softmax, through the normalisation."""
  z = np.asarray(z, np.float64)
  raw = z.reshape(-1, z.shape[-1])
  rows = unit(raw) if normalize else raw
  gradient = np.zeros_like(rows)
  for i in range(len(rows)):
    others = [k for k in range(len(rows)) if k != i]
    logits = rows[others] @ rows[i] / temperature
    p = np.exp(logits - logits.max())
    p = p / p.sum() - (np.array(others) == (i ^ 1))
    gradient[i] += p @ rows[others] / temperature / len(rows)
    gradient[others] += np.outer(p, rows[i]) / temperature / len(rows)
  if normalize:
    norm = np.sqrt((raw * raw).sum(-1, keepdims=True))
    gradient = (gradient - rows * (gradient * rows).sum(-1, keepdims=True)) / norm
  return gradient.reshape(z.shape)


def random_z(n, d, seed=0, noise=1.0):
  """Pairs around a common direction: noise 1 is far from solved, 0.05 nearly solved."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(n, 1, d)) + noise * rng.normal(size=(n, 2, d))).astype(np.float32)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"n{c['n']}d{c['d']}t{c['temperature']}")
def test_official_numbers(case):
  n, d = case["n"], case["d"]
  z = pair_major(np.sin(0.7 * np.arange(2 * n * d)).astype(np.float32).reshape(2 * n, d))

  def loss_fn(z):
    return contrast.nt_xent(z, case["temperature"], normalize=case["hidden_norm"], reduction="official_sum")

  (loss, metrics), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(z)
  np.testing.assert_allclose(loss, case["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics["contrastive_accuracy"], case["contrast_acc"])
  np.testing.assert_allclose(metrics["entropy"], case["entropy"], rtol=1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(gradient), case["grad_norm"], rtol=2e-6)
  if case["grad"] is not None:
    np.testing.assert_allclose(gradient, pair_major(case["grad"]), atol=1e-5 * np.abs(case["grad"]).max())


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("noise", [1.0, 0.05])
@pytest.mark.parametrize("normalize", [True, False])
def test_equation_one(temperature, noise, normalize):
  z = random_z(20, 16, noise=noise) * (1.0 if normalize else 0.3)

  def fn(z):
    return contrast.nt_xent(z, temperature, normalize=normalize)[0]

  loss, gradient = jax.jit(jax.value_and_grad(fn))(z)
  np.testing.assert_allclose(loss, loop_loss(z, temperature, normalize), rtol=1e-5, atol=1e-12)
  expected = loop_gradient(z, temperature, normalize)
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
