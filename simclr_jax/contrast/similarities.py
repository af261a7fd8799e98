"""What every loss on z shares: checks, logits of all pairs, and the metrics of the similarity matrix."""

import functools
import itertools

import jax
import jax.numpy as jnp

REDUCTIONS = {"mean": 1.0, "official_sum": 2.0}
PRECISIONS = ("highest", "high", "default")
# Stands for -inf in a masked logit: exp of it is exactly 0 beside any real logit, and unlike -inf it leaves
# a row without negatives (n = 1) with loss 0 and gradient 0 where inf - inf would be NaN.
MASKED = jnp.finfo(jnp.float32).min


def over_pairs(loss):
  """Extends a loss of z [n, 2, d] to z [n, k, d]: the mean of loss and metrics over all k (k - 1) / 2 pairs of views.

  The negatives of a pair are the 2n - 2 views of the other images in that pair: the full graph of arXiv 1906.05849,
  section 3.3.
  """

  @functools.wraps(loss)
  def mean(z, *args, **keywords):
    k = z.shape[1] if z.ndim == 3 else 2
    if k <= 2:
      return loss(z, *args, **keywords)
    pairs = [loss(z[:, jnp.array(pair)], *args, **keywords) for pair in itertools.combinations(range(k), 2)]
    return jax.tree.map(lambda *values: sum(values) / len(pairs), *pairs)

  return mean


def compare(y, precision):
  """Logits of all 2n views, 2i and 2i + 1 of image i: all [2n, 2n], of the positives [2n], of the negatives alone."""
  n, _, d = y.shape
  rows = y.reshape(2 * n, d)
  logits = dot(rows, rows.T, precision)
  image = jnp.arange(2 * n) // 2
  negatives = jnp.where(image[:, None] == image[None, :], MASKED, logits)
  return logits, jnp.repeat(row_dot(y[:, 0], y[:, 1]), 2), negatives


def matrix_metrics(logits, negatives, potentials):
  """The metrics that `prepare` leaves, from the matrices [2n, 2n] and `potential` between first views [n, n]."""
  logits, negatives, potentials = jax.lax.stop_gradient((logits, negatives, potentials))
  n = len(logits) // 2
  first = logits.reshape(n, 2, 2 * n)[:, 0]  # [n, 2n], the rows of first views
  cross = first[:, 1::2]  # [n, n], the official logits_ab
  own = jnp.eye(n, dtype=bool)
  positive = jnp.sum(jnp.where(own, cross, 0.0), axis=1)  # as the matrix has it: equal rows are exact ties
  p = jax.nn.softmax(cross, axis=1)
  return summary(
    hit=positive > jnp.max(jnp.where(own, MASKED, cross), axis=1),
    hit_all=jnp.repeat(positive, 2) > jnp.max(negatives, axis=1),
    entropy=-jnp.sum(p * jnp.log(p + 1e-8), axis=1),
    potential=jnp.sum(jnp.where(own, 0.0, potentials)),
  )


def potentials(y, temperature, logits):
  n = len(y)
  first = logits.reshape(n, 2, 2 * n)[:, 0]
  square = row_dot(y[:, 0], y[:, 0])
  return pair_potential(first[:, 0::2], square, square, temperature)


def prepare(z, temperature, normalize, reduction, precision, fewest=1):
  """Checks the arguments; returns y = z / sqrt(tau), so that logits are y y^T, and the metrics that need no matmul."""
  if z.ndim != 3 or z.shape[1] != 2:
    raise ValueError(
      f"z has shape {z.shape}; expected [n, 2, d], both views of an image side by side: stack them on axis 1"
    )
  if isinstance(temperature, int | float) and not temperature > 0:
    raise ValueError(f"temperature is {temperature}; expected a number above 0, such as 0.1")
  for name, value, known in (("reduction", reduction, REDUCTIONS), ("precision", precision, PRECISIONS)):
    if value not in known:
      raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
  n = len(z)
  if n < fewest:
    raise ValueError(f"batch of {n} images; expected at least {fewest}")
  z = z.astype(jnp.float32)
  if normalize:
    z = l2_normalize(z)
  y = z * jax.lax.rsqrt(jnp.asarray(temperature, jnp.float32))
  if precision == "default":
    y = y.astype(jnp.bfloat16)
  z = jax.lax.stop_gradient(z)
  # Reductions over the views, not z[:, 0] and z[:, 1]: XLA would copy each of those out of z.
  both = jnp.sum(z, axis=1)  # [n, d]
  between_images = jnp.sum(jnp.square(jnp.sum(both, axis=0))) - jnp.sum(jnp.square(both))
  return y, {
    "positive_similarity": jnp.sum(jnp.prod(z, axis=1)) / n,
    "negative_similarity": between_images / max(1.0, 4.0 * n * (n - 1)),
    "alignment": 2.0 * jnp.sum(jnp.square(z - both[:, None] / 2.0)) / n,  # |a - b|^2 = 2 |a - m|^2 + 2 |b - m|^2
  }


def l2_normalize(z):
  """z [..., d] divided by its norms, with the floor of tf.math.l2_normalize."""
  return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))


def dot(a, b, precision):
  """a b in float32 from float32 or bfloat16 operands."""
  return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def row_dot(a, b):
  return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def positives(blocks):
  """[count, 2, size, d] -> logits of the positives [count, size]."""
  return jnp.sum(jnp.prod(blocks.astype(jnp.float32), axis=1), axis=-1)


def pair_potential(logits, square_i, square_j, temperature):
  """exp(-2 |z_i - z_j|^2) of each pair, from logits y_i y_j and the squared norms of y = z / sqrt(tau)."""
  distance = temperature * (square_i[:, None] + square_j[None, :] - 2.0 * logits)
  return jnp.exp(-2.0 * jnp.maximum(distance, 0.0))


def summary(*, hit, hit_all, entropy, potential):
  """Metrics from: hits of the first views [n] and of all anchors [2n], entropies [n], and the summed potential."""
  n = hit.shape[0]
  uniformity = jnp.log(jnp.maximum(potential / (n * (n - 1.0)), jnp.finfo(jnp.float32).tiny)) if n > 1 else 0.0
  return {
    "contrastive_accuracy": jnp.mean(hit, dtype=jnp.float32),
    "contrastive_accuracy_all": jnp.mean(hit_all, dtype=jnp.float32),
    "entropy": jnp.mean(entropy),
    "uniformity": jnp.asarray(uniformity, jnp.float32),
  }


def reduce(losses, reduction):
  return jnp.mean(losses) * REDUCTIONS[reduction]
