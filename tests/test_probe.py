"""Linear evaluation and kNN against independent implementations."""

import types

import numpy as np
import pytest
import tiny

from simclr_jax import data, diagnostics
from simclr_jax.evaluation import knn, linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import probe, trained
from simclr_jax.runtime import mesh as mesh_lib


def blobs(n, d, classes, spread, seed=0):
  rng = np.random.default_rng(seed)
  y = rng.integers(classes, size=n)
  centers = np.random.default_rng(99).standard_normal((classes, d))
  return (centers[y] + spread * rng.standard_normal((n, d))).astype(np.float32), y.astype(np.int32)


def float64_regression(x, y, classes, l2, steps=20000):
  """Gradient descent in float64 on the standardized features, to the optimum of the same objective."""
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
  classifier = linear.logistic_regression(x, y, num_classes=4, l2s=(1e-2,))
  want = float64_regression(x.astype(np.float64), y, 4, 1e-2)
  got = x @ classifier["kernel"] + classifier["bias"]
  # Logits are unique up to a constant per example, which the penalty on the kernel pins only for the kernel.
  np.testing.assert_allclose(got - got.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=5e-3)


def penalized_loss(x, y, kernel, bias, l2) -> float:
  logits = x.astype(np.float64) @ kernel + bias
  losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[np.arange(len(y)), y]
  return losses.mean() + 0.5 * l2 * np.sum(kernel.astype(np.float64) ** 2)


def test_lbfgs_agrees_with_scikit_learn_and_on_a_mesh_with_itself():
  """Same features, same penalty: accuracy to 1e-3 and loss to 1e-4, relative; 401 examples do not divide by 8."""
  linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install .[test]")
  x, y = blobs(401, 12, 5, 3.0)
  x = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
  test_x, test_y = blobs(2000, 12, 5, 3.0, seed=1)
  for l2 in (1e-4, 1e-2, 1.0):
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=10000).fit(x, y)
    wanted = penalized_loss(x, y, theirs.coef_.T, theirs.intercept_, l2)
    for mesh in (None, mesh_lib.make_mesh()):
      ours = linear.logistic_regression(x, y, num_classes=5, l2s=(l2,), mesh=mesh)
      assert penalized_loss(x, y, ours["kernel"], ours["bias"], l2) == pytest.approx(wanted, rel=1e-4)
      assert linear.accuracy(ours, test_x, test_y) == pytest.approx(theirs.score(test_x, test_y), abs=1e-3)


@pytest.mark.parametrize("examples", [400, 90])
def test_features_of_unequal_variance(examples, monkeypatch):
  """Standard deviations from 1 to 1e-3 along oblique axes, much as those of pixels: scikit-learn's loss, in few iterations."""
  linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install .[test]")
  x, y = blobs(examples, 120, 4, 3.0)
  oblique, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(120, 120)))
  x = (x * np.logspace(0, -3, 120) @ oblique).astype(np.float32)
  x = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
  calls, objective = [], linear._objective
  monkeypatch.setattr(linear, "_objective", lambda *arguments: calls.append(1) or objective(*arguments))
  for l2 in (1e-5, 1e-2):
    calls.clear()
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=100_000).fit(x, y)
    wanted = penalized_loss(x, y, theirs.coef_.T, theirs.intercept_, l2)
    ours = linear.logistic_regression(x, y, num_classes=4, l2s=(l2,))
    assert penalized_loss(x, y, ours["kernel"], ours["bias"], l2) == pytest.approx(wanted, abs=1e-5)
  assert len(calls) < 60  # in coordinates that are not scaled, 62 and 91


def test_one_against_the_rest_is_as_many_regressions_of_two_classes():
  """A column of a multi-label problem, "difficult" examples left out, is the two-class problem by itself."""
  linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install .[test]")
  x, y = blobs(300, 6, 3, 2.0)
  x = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
  labels = np.eye(3, dtype=int)[y]
  labels[::7, 1] = -1
  ours = linear.logistic_regression(x, labels, num_classes=3, l2s=(1e-2,))
  for c in range(3):
    judged = labels[:, c] >= 0
    # Our loss is a mean over all 300, whether they are judged or not.
    theirs = linear_model.LogisticRegression(C=1 / (300 * 1e-2), tol=1e-8).fit(x[judged], labels[judged, c])
    np.testing.assert_allclose(ours["kernel"][:, c], theirs.coef_[0], atol=2e-3)


def test_the_45_penalties_of_the_paper():
  assert len(linear.L2_GRID_45) == 45
  assert linear.L2_GRID_45[0] == pytest.approx(1e-6) and linear.L2_GRID_45[-1] == pytest.approx(1e5)
  x, y = blobs(200, 4, 3, 1.5)
  held_out = np.arange(200) % 4 == 0
  chosen = linear.logistic_regression(x, y, num_classes=3, l2s=linear.L2_GRID_45, held_out=held_out)
  scores = [  # from the strongest penalty to the weakest, which is how ties are broken
    linear.accuracy(
      linear.logistic_regression(x[~held_out], y[~held_out], num_classes=3, l2s=(l2,)), x[held_out], y[held_out]
    )
    for l2 in (1e5, 1e2, chosen["l2"])
  ]
  assert scores[2] >= max(scores)


def test_average_precision_worked_by_hand():
  """Ranked + - + - - +: precisions at the hits 1, 2/3, 3/6 for recalls 1/3, 2/3, 1.

  Recalls 0 to 0.3 see 1, 0.4 to 0.6 see 2/3, 0.7 to 1 see 1/2: (4 + 3 * 2/3 + 4 * 1/2) / 11 = 8 / 11.
  """
  logits = np.array([6.0, 5, 4, 3, 2, 1])
  y = np.array([1, 0, 1, 0, 0, 1])
  assert linear.average_precision(logits, y) == pytest.approx(8 / 11)
  shuffled = np.array([3, 0, 5, 2, 4, 1])
  assert linear.average_precision(logits[shuffled], y[shuffled]) == pytest.approx(8 / 11)
  # A difficult image between them changes nothing; a perfect ranking is 1; the only hit in last place is 1 / n.
  assert linear.average_precision(np.append(logits, 5.5), np.append(y, -1)) == pytest.approx(8 / 11)
  assert linear.average_precision(np.array([2.0, 1, 0]), np.array([1, 1, 0])) == pytest.approx(1)
  assert linear.average_precision(np.arange(10.0), (np.arange(10) == 0).astype(int)) == pytest.approx(0.1)
  # Ten hits, the first and the last nine of 20: recall exactly 0.1 is reached at precision 1.
  y = np.array([1] + [0] * 10 + [1] * 9)
  later = max((k + 1) / (k + 11) for k in range(1, 10))
  assert linear.average_precision(-np.arange(20.0), y) == pytest.approx((2 + 9 * later) / 11)
  both = linear.mean_average_precision(np.stack([logits, -logits], 1), np.stack([np.array([1, 0, 1, 0, 0, 1])] * 2, 1))
  backwards = (4 * 1 + 7 * 0.5) / 11  # ranked + - - + - +: precisions 1, 2/4, 3/6
  assert both == pytest.approx((8 / 11 + backwards) / 2)


def test_mean_per_class_worked_by_hand():
  """Three of class 0, all right; one of class 1, wrong: 3/4 of the images, half of the classes."""
  logits = np.array([[2.0, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]])
  y = np.array([0, 0, 0, 1])
  assert linear.top_1(logits, y) == 0.75
  assert linear.mean_per_class(logits, y) == 0.5


def test_penalty_is_chosen_on_held_out_examples():
  """With 200 dimensions of noise and 120 examples a strong penalty generalizes best, and is what is picked."""
  x, y = blobs(120, 4, 2, 1.5)
  x = np.concatenate([x, np.random.default_rng(5).standard_normal((120, 200)).astype(np.float32)], 1)
  classifier = linear.logistic_regression(x, y, num_classes=2, folds=5)
  assert classifier["l2"] >= 1e-2


def test_held_out_parts_are_disjoint_balanced_and_cover_all():
  y = np.repeat(np.arange(5), 20)
  parts = linear.held_out_parts(y, 5, np.random.default_rng(0))
  assert (parts.sum(0) == 1).all()
  assert all((np.bincount(y[part]) == 4).all() for part in parts)
  assert np.bincount(y[linear.held_out_parts(y, 1, np.random.default_rng(0))[0]]).tolist() == [2] * 5


@pytest.mark.parametrize("per_class", [1, 2, 3, 4, 5])
def test_classes_of_few_images_can_be_scored(per_class):
  """Where a fold is empty, or would hold out all that there is."""
  y = np.arange(4 * per_class) % 4
  x = (4 * np.eye(6)[y] + 0.1 * np.random.default_rng(0).normal(size=(len(y), 6))).astype(np.float32)
  assert linear.few_label_evaluation(x, y, x, y, num_classes=4) == 1
  assert linear.linear_evaluation(x, y, x, y, num_classes=4) == 1


def test_few_labels_is_balanced_and_seeded():
  y = np.repeat(np.arange(5), 20)
  chosen = linear.few_labels(y, 3, np.random.default_rng(1))
  assert np.bincount(y[chosen]).tolist() == [3] * 5 and len(set(chosen)) == 15
  np.testing.assert_array_equal(chosen, linear.few_labels(y, 3, np.random.default_rng(1)))


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


def test_views_of_a_finetuned_encoder_are_those_of_its_training():
  changes = {
    "augment.crop_area": (0.5, 0.9),
    "augment.flip": False,
    "augment.resize": "bicubic_tf1",
    "augment.size": 24,
  }
  tuned = config_lib.replace(config_lib.load("finetune:small"), changes)
  options = trained._for_evaluation(tuned, ()).augment
  assert {key: options[key.removeprefix("augment.")] for key in changes} == changes


def test_the_classifier_trains_on_the_pixels_that_it_is_tested_on(monkeypatch):
  """By SGD, which makes views of its own: with the interpolation of pretraining, and its flips if it had them."""
  options = {"augment.resize": "bicubic_antialias", "augment.flip": False, "probe.batch_size": 16}
  opened = types.SimpleNamespace(config=tiny.config(**options), encoder=None, variables={})
  seen = []
  monkeypatch.setattr(data, "train_stream", lambda source, function, **_: (seen.append(function), iter(()))[1])
  list(probe.make_task(opened, tiny.source()).stream(0))
  assert seen[0].keywords["resize"] == "bicubic_antialias" and seen[0].keywords["flip"] is False
