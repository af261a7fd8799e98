"""Linear evaluation and kNN against independent implementations."""

import numpy as np
import pytest

from simclr_jax import diagnostics, knn, probe


def blobs(n, d, classes, spread, seed=0):
  rng = np.random.default_rng(seed)
  y = rng.integers(classes, size=n)
  centres = np.random.default_rng(99).standard_normal((classes, d))
  return (centres[y] + spread * rng.standard_normal((n, d))).astype(np.float32), y.astype(np.int32)


def float64_regression(x, y, classes, l2, steps=20000):
  """Gradient descent in float64 on the standardised features, to the optimum of the same objective."""
  x = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
  kernel, bias = np.zeros((x.shape[1], classes)), np.zeros(classes)
  onehot = np.eye(classes)[y]
  rate = 1.0 / (np.linalg.norm(x, 2) ** 2 / len(x) / 2 + 1 + l2)
  for _ in range(steps):
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    kernel -= rate * (x.T @ (p - onehot) / len(x) + l2 * kernel)
    bias -= rate * (p - onehot).mean(0)
  return x @ kernel + bias


def test_lbfgs_finds_the_optimum():
  x, y = blobs(300, 6, 4, 1.0)
  classifier = probe.logistic_regression(x, y, num_classes=4, l2s=(1e-2,))
  want = float64_regression(x.astype(np.float64), y, 4, 1e-2)
  got = x @ classifier["kernel"] + classifier["bias"]
  # Logits are unique up to a constant per example, which the penalty on the kernel pins only for the kernel.
  np.testing.assert_allclose(got - got.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=5e-3)


def test_penalty_is_chosen_on_held_out_examples():
  """With 200 dimensions of noise and 120 examples a strong penalty generalises best, and is what is picked."""
  x, y = blobs(120, 4, 2, 1.5)
  x = np.concatenate([x, np.random.default_rng(5).standard_normal((120, 200)).astype(np.float32)], 1)
  classifier = probe.logistic_regression(x, y, num_classes=2, folds=5)
  assert classifier["l2"] >= 1e-2


def test_held_out_parts_are_disjoint_balanced_and_cover_all():
  y = np.repeat(np.arange(5), 20)
  parts = probe._held_out(y, 5, np.random.default_rng(0))
  assert (parts.sum(0) == 1).all()
  assert all((np.bincount(y[part]) == 4).all() for part in parts)
  assert np.bincount(y[probe._held_out(y, 1, np.random.default_rng(0))[0]]).tolist() == [2] * 5


def test_few_labels_is_balanced_and_seeded():
  y = np.repeat(np.arange(5), 20)
  chosen = probe.few_labels(y, 3, np.random.default_rng(1))
  assert np.bincount(y[chosen]).tolist() == [3] * 5 and len(set(chosen)) == 15
  np.testing.assert_array_equal(chosen, probe.few_labels(y, 3, np.random.default_rng(1)))


def test_knn_against_a_double_loop():
  bank, bank_y = blobs(200, 5, 3, 2.0)
  queries, y = blobs(50, 5, 3, 2.0, seed=1)
  b = bank / np.linalg.norm(bank, axis=1, keepdims=True)
  q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
  want = []
  for row in q:
    similarity = b @ row
    votes = np.zeros(3)
    for j in np.argsort(-similarity)[:7]:
      votes[bank_y[j]] += np.exp(similarity[j] / 0.1)
    want.append(votes.argmax())
  got = knn.predict(bank, bank_y, queries, k=7, temperature=0.1, num_classes=3)
  np.testing.assert_array_equal(got, want)
  value = knn.accuracy(bank, bank_y, queries, y, k=7, temperature=0.1, num_classes=3)
  assert value == pytest.approx(np.mean(np.array(want) == y))


def test_rank_counts_the_directions_that_are_used():
  rng = np.random.default_rng(0)
  flat = rng.standard_normal((400, 3)) @ np.linalg.qr(rng.standard_normal((20, 20)))[0][:3]
  assert diagnostics.rank(flat) == pytest.approx(3, abs=0.1)
  assert diagnostics.rank(rng.standard_normal((4000, 20))) > 19


def test_verdict():
  rng = np.random.default_rng(0)
  h, z = rng.standard_normal((500, 32)), rng.standard_normal((500, 16))
  assert diagnostics.embedding_std(z) == pytest.approx(16**-0.5, rel=0.05)
  collapsed, text = diagnostics.verdict(diagnostics.summary(h, z))
  assert not collapsed and text.startswith("healthy")
  same = np.ones((500, 16)) + 1e-3 * z
  collapsed, text = diagnostics.verdict(diagnostics.summary(np.ones((500, 32)) + 1e-4 * h, same))
  assert collapsed and text.startswith("COLLAPSED")
  dead = np.concatenate([h[:, :8], np.zeros((500, 24))], 1)
  assert diagnostics.dead_dimensions(dead) == 24
