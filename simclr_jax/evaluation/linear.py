"""Linear evaluation: how well does a linear classifier on the frozen h do?

`logistic_regression` is a full-batch multinomial regression by L-BFGS on features computed once; its L2 is chosen on
held-out training examples (v1 paper, App. B.8; `METRICS` are the scores of its data sets).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from simclr_jax.evaluation.rows import check_finite, labeled
from simclr_jax.runtime import mesh as mesh_lib

L2_GRID = tuple(float(x) for x in np.logspace(-6, 0, 7))  # on features of unit variance, with the loss a mean
L2_GRID_45 = tuple(float(x) for x in np.logspace(-6, 5, 45))  # v1 paper, App. B.8
SWEEP = dict(max_steps=60, tolerance=1e-3)  # a rough fit ranks the penalties
FINAL = dict(max_steps=1000, tolerance=3e-5)  # in float32 no less can be told from rounding
FOLDS = 5
SPLIT_SEED = 0  # of held-out parts and few-label draws; not the run's seed, so that runs are scored alike


@jax.jit
@jax.value_and_grad
def _objective(weights, x, y, sample_weight, l2):
  """Mean cross-entropy and its L2 penalty, summed over problems that share their examples.

  weights [problems, d + 1, classes], the bias in the last row; x [n, d]; sample_weight [n, problems].
  Labels y [n] are classes; y [n, classes] are 1, 0 or -1 (do not ask) of each class by itself.
  """

  def one(weights, sample_weight):
    logits = jnp.matmul(x, weights[:-1], precision="highest") + weights[-1]
    if y.ndim == 1:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    else:
      losses = jnp.sum(jnp.where(y < 0, 0, optax.sigmoid_binary_cross_entropy(logits, y)), 1)
    return jnp.sum(sample_weight * losses) / jnp.sum(sample_weight) + 0.5 * l2 * jnp.sum(weights[:-1] ** 2)

  return jnp.sum(jax.vmap(one, in_axes=(0, 1))(weights, sample_weight))


def _principal_axes(x):
  """(axes [d, r], the variance of the n rows along each [r]) of centered x [n, d].

  r is at most n: outside the span of the rows a penalized solution is zero.
  """
  if len(x) < x.shape[1]:
    _, singular, axes = np.linalg.svd(x, full_matrices=False)
    return axes.T, singular**2 / len(x)
  variance, axes = np.linalg.eigh(x.T @ x / len(x))
  return axes, np.maximum(variance, 0)


def _fit(start, x, y, sample_weight, l2, variance, *, max_steps, tolerance):
  """L-BFGS from `start` [problems, d + 1, classes] for `max_steps` iterations, or until the gradient is below the tolerance.

  The columns of x are uncorrelated, with `variance` [d].  In coordinates divided by `scale`, the Hessian at zero weights is
  near the identity, so that few iterations do what takes hundreds where the variances differ by orders of magnitude.  The
  gradient is that in these coordinates.
  """
  curvature = 1 / start.shape[-1] if y.ndim == 1 else 0.25  # of the cross-entropy in a logit, when nothing is known
  scale = np.append(curvature * variance + l2, curvature)[:, None] ** -0.5

  def flat(w):
    value, grad = _objective((w.reshape(start.shape) * scale).astype(np.float32), x, y, sample_weight, l2)
    return float(value), (np.asarray(grad, np.float64) * scale).ravel()

  options = {"maxiter": max_steps, "gtol": tolerance, "ftol": 1e-10}
  found = scipy.optimize.minimize(flat, (start / scale).ravel(), jac=True, method="L-BFGS-B", options=options)
  return found.x.reshape(start.shape) * scale


def held_out_parts(labels, folds, rng):
  """bool [folds, n]: class-balanced parts; a single fold holds out a tenth."""
  parts = folds if folds > 1 else 10
  if labels.ndim == 2:  # several classes an image: balance by the first of them
    labels = (labels > 0).argmax(1)
  part = np.empty(len(labels), int)
  for c in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == c))
    part[members] = np.arange(len(members)) % parts
  return np.stack([part == f for f in range(folds)])


def top_1(logits, y) -> float:
  """Fraction of the rows of logits [n, classes] with a label whose largest is that of their class y [n]."""
  known = labeled(y)
  return float(np.mean(logits[known].argmax(1) == y[known]))


def mean_per_class(logits, y) -> float:
  """The mean over the classes in y [n] of the fraction of correctly classified examples: every class counts the same."""
  right = logits.argmax(1) == y
  return float(np.mean([right[y == c].mean() for c in np.unique(y[labeled(y)])]))


def average_precision(logits, y) -> float:
  """11-point interpolated average precision of one class, as PASCAL VOC 2007 (Everingham et al., IJCV 2010, 4.2).

  The mean over the recalls 0, 0.1, ..., 1 of the highest precision reached at that recall or more.

  Args:
    logits: [n], of the class.
    y: [n], 1 if the image has the class, 0 if not, -1 if it is not to be judged ("difficult").
  """
  order = np.argsort(-logits[y >= 0], kind="stable")
  hit = y[y >= 0][order] > 0
  found = np.cumsum(hit)
  precision = found / np.arange(1, len(hit) + 1)
  # Recall in whole numbers: found / total >= k / 10, without the rounding of tenths.
  reached = [precision[10 * found >= k * found[-1]] for k in range(11)]
  return float(np.mean([p.max() for p in reached]))


def mean_average_precision(logits, y) -> float:
  """Mean of `average_precision` over the classes; logits and y [n, classes]."""
  return float(np.mean([average_precision(logits[:, c], y[:, c]) for c in range(y.shape[1]) if (y[:, c] > 0).any()]))


METRICS = {"top_1": top_1, "mean_per_class": mean_per_class, "mean_average_precision": mean_average_precision}


def logistic_regression(
  x, y, *, num_classes: int, folds: int = 1, seed: int = SPLIT_SEED, l2s=L2_GRID, held_out=None, score=top_1, mesh=None
):
  """Multinomial logistic regression on x [n, d] with labels y [n]; one against the rest where y is [n, num_classes].

  Features are centered and divided by one number, their root mean variance (folded back into what is returned), so
  that the same penalties suit every representation.  L2 is the value of the grid with the best score on held-out
  training examples (a tenth, or `folds`-fold cross-validation), and the final fit uses all n.  With one example of each
  class nothing can be held out, and L2 is the largest of the grid.

  Args:
    y: integers [n], -1 where there is no label; or [n, num_classes] of 1, 0 and -1, as `average_precision` takes them.
    held_out: bool [n], the examples on which L2 is chosen, if the data set has a split for it.
    score: one of METRICS, (logits, y) -> a score to maximize.
    mesh: the devices over which the examples are split; one by default.

  Returns:
    dict(kernel [d, num_classes], bias [num_classes], l2): logits = x @ kernel + bias.

  Raises:
    UserError: a feature is not finite, or nothing has a label.
  """
  known = labeled(y)
  x, y = check_finite(x, "features")[known].astype(np.float32), np.asarray(y, np.int32)[known]
  held_out = None if held_out is None else held_out[known]
  mean, scale = x.mean(0), max(float(np.sqrt(x.var(0).mean())), 1e-12)
  x = (x - mean) / scale
  axes, variance = _principal_axes(x)
  x = x @ axes
  short = -len(x) % (mesh.size if mesh else 1)

  def place(array):  # its first axis over the examples
    array = np.pad(array, [(0, short)] + [(0, 0)] * (array.ndim - 1))
    return jax.device_put(array, mesh_lib.batch_sharding(mesh)) if mesh else jnp.asarray(array)

  x_device, y_device = place(x), place(y)
  grid = sorted(l2s, reverse=True)
  start = np.zeros((1, x.shape[1] + 1, num_classes))
  l2 = grid[0]
  parts = held_out_parts(y, folds, np.random.default_rng(seed)) if held_out is None else held_out[None]
  parts = parts[parts.any(1) & ~parts.all(1)]  # classes of few images leave a fold empty, or nothing to train on
  if len(grid) > 1 and len(parts):
    total = np.zeros(len(grid))
    weights, sample_weight = np.repeat(start, len(parts), 0), place((~parts).astype(np.float32).T)
    for i, candidate in enumerate(grid):  # from the strongest penalty to the weakest, each from the last one's end
      weights = _fit(weights, x_device, y_device, sample_weight, candidate, variance, **SWEEP)
      for w, part in zip(weights, parts, strict=True):
        total[i] += part.sum() * score(x[part] @ w[:-1] + w[-1], y[part])
    l2 = grid[int(total.argmax())]  # the strongest penalty among equals
  (weights,) = _fit(start, x_device, y_device, place(np.ones((len(y), 1), np.float32)), l2, variance, **FINAL)
  kernel = axes @ weights[:-1] / scale
  return {"kernel": kernel.astype(np.float32), "bias": (weights[-1] - mean @ kernel).astype(np.float32), "l2": l2}


def logits(classifier: dict, x):
  """[n, classes] of x [n, d]."""
  return x @ classifier["kernel"] + classifier["bias"]


def accuracy(classifier: dict, x, y) -> float:
  """Fraction of the rows of x [n, d] with a label whose largest logit is y [n]; raises UserError as `logistic_regression`."""
  return top_1(logits(classifier, check_finite(x, "features")), np.asarray(y))


def few_labels(labels, per_class: int, rng):
  """Indices of `per_class` examples of each class (all of a class that has fewer)."""
  classes = np.unique(labels[labeled(labels)])
  return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes])


def linear_evaluation(x, y, test_x, test_y, *, num_classes: int, seed: int = SPLIT_SEED, mesh=None) -> float:
  """Test accuracy with all labels."""
  return accuracy(logistic_regression(x, y, num_classes=num_classes, seed=seed, mesh=mesh), test_x, test_y)


def few_label_evaluation(
  x, y, test_x, test_y, *, num_classes: int, per_class: int = 10, draws: int = 5, seed: int = SPLIT_SEED
) -> float:
  """Mean test accuracy over `draws` class-balanced subsets with `per_class` labels each."""
  scores = []
  for draw in range(draws):
    chosen = few_labels(y, per_class, np.random.default_rng((seed, draw)))
    classifier = logistic_regression(x[chosen], y[chosen], num_classes=num_classes, folds=FOLDS, seed=seed)
    scores.append(accuracy(classifier, test_x, test_y))
  return float(np.mean(scores))


def regression_score(x, y, test_x, test_y, *, seed: int = SPLIT_SEED) -> float:
  """R² on test examples of a linear regression with an L2 penalty, of several targets together.

  Features are centered and scaled as in `logistic_regression`; the penalty of L2_GRID is the one with the best R² on a
  tenth of the training examples, or the largest where these are fewer than 4.

  Args:
    x: [n, d]; y: [n, targets]; test_x and test_y: the same of the test examples.

  Returns:
    1 minus the squared errors divided by the squared distances from the mean: 1 is perfect, 0 or less is no better than the
    mean.

  Raises:
    UserError: a feature is not finite.
  """
  x, test_x = (check_finite(part, "features").astype(np.float64) for part in (x, test_x))
  scale = max(float(np.sqrt(x.var(0).mean())), 1e-12)

  def score(x, y, test_x, test_y, l2):
    mean = x.mean(0)
    centered = (x - mean) / scale
    penalty = l2 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(centered.T @ centered + penalty, centered.T @ (y - y.mean(0)))
    error = test_y - y.mean(0) - (test_x - mean) / scale @ weights
    return 1 - float((error**2).sum() / ((test_y - test_y.mean(0)) ** 2).sum())

  if len(x) < 4:
    return score(x, y, test_x, test_y, max(L2_GRID))
  held_out = np.random.default_rng(seed).permutation(len(x)) < max(2, len(x) // 10)
  l2 = max(L2_GRID, key=lambda l2: score(x[~held_out], y[~held_out], x[held_out], y[held_out], l2))
  return score(x, y, test_x, test_y, l2)
