"""Other losses on the same z, each differing from NT-Xent in one term, each with the whole matrix in memory."""

import math

import jax
import jax.numpy as jnp

from simclr_jax.contrast.similarities import MASKED, compare, dot, matrix_metrics, potentials, prepare, reduce, row_dot


def decoupled(z, temperature, *, normalize=True, precision="highest"):
  """Decoupled contrastive loss (Yeh et al., arXiv 2110.06848): NT-Xent without the positive in its denominator.

  Args and returns: as `nt_xent`, the mean over the 2n anchors. Raises ValueError for n = 1 too.
  """
  y, metrics = prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = compare(y, precision)
  losses = jax.nn.logsumexp(negatives, axis=1) - positive
  return jnp.mean(losses), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def supervised(z, temperature, *, labels, normalize=True, precision="highest"):
  """Supervised contrastive loss, L_out (Khosla et al., arXiv 2004.11362): all views of a class are positives.

  Args:
    z, temperature, normalize, precision: as for `nt_xent`; labels: [n] integers.

  Returns:
    The mean over anchors of the mean over their positives of -log softmax over all other 2n - 1 views, without
    the factor tau of that paper's code; and the metrics of `nt_xent`, which do not use the labels.
  """
  if labels.shape != z.shape[:1]:
    raise ValueError(f"labels have shape {labels.shape}; expected {z.shape[:1]}, one for each image of z")
  y, metrics = prepare(z, temperature, normalize, "mean", precision)
  logits, _, negatives = compare(y, precision)
  itself = jnp.eye(len(logits), dtype=bool)
  label = jnp.repeat(labels, 2)
  positives = (label[:, None] == label[None, :]) & ~itself
  log_p = logits - jax.nn.logsumexp(jnp.where(itself, MASKED, logits), axis=1, keepdims=True)
  losses = -jnp.sum(jnp.where(positives, log_p, 0.0), axis=1) / jnp.sum(positives, axis=1)
  return jnp.mean(losses), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def without_false_negatives(
  z, temperature, *, labels, removed=1.0, normalize=True, reduction="mean", precision="highest"
):
  """NT-Xent without a fraction of its false negatives: views of other images of the anchor's class.

  It is an oracle, because it uses labels, which contrastive learning does not have (Chuang et al., arXiv 2007.00224,
  Figure 2: "unbiased").

  Args:
    z, temperature, normalize, reduction, precision: as for `nt_xent`; labels: [n] integers, -1 for an image that has none.
    removed: the fraction of pairs of images of the same class to leave out, 0 to 1; their positions in the batch determine
      which.

  Returns: loss and metrics as `nt_xent`, the metrics over all negatives.
  """
  if labels.shape != z.shape[:1]:
    raise ValueError(f"labels have shape {labels.shape}; expected {z.shape[:1]}, one for each image of z")
  if not 0 <= removed <= 1:
    raise ValueError(f"removed is {removed}; expected a fraction, 0 to 1")
  y, metrics = prepare(z, temperature, normalize, reduction, precision)
  logits, positive, negatives = compare(y, precision)
  drawn = jnp.triu(jax.random.uniform(jax.random.key(0), (len(z), len(z))), 1)
  left_out = (labels[:, None] == labels[None, :]) & (labels[:, None] >= 0) & (drawn + drawn.T < removed)
  true = jnp.where(jnp.repeat(jnp.repeat(left_out, 2, 0), 2, 1), MASKED, negatives)
  losses = jax.nn.softplus(jax.nn.logsumexp(true, axis=1) - positive)
  return reduce(losses, reduction), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def debiased(z, temperature, *, class_prior=0.1, normalize=True, precision="highest"):
  """Debiased contrastive loss (Chuang et al., arXiv 2007.00224, equation 8, one positive).

  The N = 2n - 2 terms of the denominator become N g, an estimate of what true negatives would add:
  g = max((mean e^neg - prior e^pos) / (1 - prior), e^(-1/tau)).

  Args:
    z, temperature, normalize, precision: as for `nt_xent`. class_prior: the probability that a "negative" has the
      anchor's class, at least 0 and below 1; 0 gives NT-Xent.

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`. Raises ValueError for n = 1 too.
  """
  if not 0 <= class_prior < 1:
    raise ValueError(f"class_prior is {class_prior}; expected at least 0 and below 1, such as 0.1 for ten classes")
  if not normalize:
    raise ValueError("normalize is False; expected True: the lower limit e^(-1/tau) is that of unit vectors")
  y, metrics = prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = compare(y, precision)
  count = len(logits) - 2
  log_mean = jax.nn.logsumexp(negatives, axis=1) - math.log(count)
  top = jax.lax.stop_gradient(jnp.maximum(log_mean, positive))
  estimate = (jnp.exp(log_mean - top) - class_prior * jnp.exp(positive - top)) / (1 - class_prior)
  floor = jnp.finfo(jnp.float32).tiny  # keeps the gradient of log finite where the maximum below takes over
  log_g = jnp.maximum(top + jnp.log(jnp.maximum(estimate, floor)), -1.0 / temperature)
  losses = jax.nn.softplus(math.log(count) + log_g - positive)
  return jnp.mean(losses), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def cauchy(z, *, precision="highest"):
  """NT-Xent with a heavy-tailed similarity, for two-dimensional maps (t-SimCNE, Boehm et al., arXiv 2210.09879).

  The logit of a pair is log(1 / (1 + |z_i - z_j|^2)), z as it comes: no normalization and no temperature.

  Args: z, precision: as for `nt_xent`.
  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`, over these logits.
  """
  y, metrics = prepare(z, 1.0, False, "mean", precision)
  n, _, d = y.shape
  rows = y.reshape(2 * n, d)
  if d <= 3:  # |a|^2 + |b|^2 - 2ab loses digits far from the origin, and saves nothing here
    squared = jnp.sum(jnp.square(rows[:, None].astype(jnp.float32) - rows[None, :].astype(jnp.float32)), axis=-1)
  else:
    square = row_dot(rows, rows)
    squared = jnp.maximum(square[:, None] + square[None, :] - 2.0 * dot(rows, rows.T, precision), 0.0)
  logits = -jnp.log1p(squared)
  image = jnp.arange(2 * n) // 2
  negatives = jnp.where(image[:, None] == image[None, :], MASKED, logits)
  difference = y[:, 0].astype(jnp.float32) - y[:, 1].astype(jnp.float32)
  positive = jnp.repeat(-jnp.log1p(row_dot(difference, difference)), 2)
  losses = jax.nn.softplus(jax.nn.logsumexp(negatives, axis=1) - positive)
  potentials = jnp.exp(-2.0 * squared.reshape(n, 2, 2 * n)[:, 0, 0::2])
  return jnp.mean(losses), metrics | matrix_metrics(logits, negatives, potentials)


def nt_logistic(z, temperature, *, semi_hard=False, normalize=True, precision="highest"):
  """NT-Logistic, the competitor of arXiv 2002.05709, Tables 2 and 4: -log s(pos) - log s(-neg), s the sigmoid.

  An anchor's negatives are the n - 1 other images in the view that is not its own (ibid., appendix B.10).

  Args:
    z, temperature, normalize, precision: as for `nt_xent`.
    semi_hard: use only the nearest negative that is farther than the positive (ibid., section 5.1); an
      anchor without one keeps its positive term. Otherwise, use the mean over all negatives.

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`. Raises ValueError for n = 1 too.
  """
  y, metrics = prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = compare(y, precision)
  terms = jax.nn.softplus(negatives)  # -log s(-neg); 0 where masked
  losses = jax.nn.softplus(-positive) + _over_negatives(terms, positive, negatives, semi_hard)
  return jnp.mean(losses), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def margin_triplet(z, *, margin=0.8, semi_hard=False, normalize=True, precision="highest"):
  """Margin triplet loss, the competitor of arXiv 2002.05709, Tables 2 and 4: max(neg - pos + margin, 0).

  Similarities are cosines, negatives and semi_hard as for `nt_logistic`; an anchor without a semi-hard negative
  adds 0. The paper tried margins 0, 0.4, 0.8 and 1.6 (appendix B.10).

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent` at tau = 1. Raises ValueError for n = 1 too.
  """
  y, metrics = prepare(z, 1.0, normalize, "mean", precision, fewest=2)
  similarity, positive, negatives = compare(y, precision)
  terms = jnp.maximum(negatives - positive[:, None] + margin, 0.0)  # 0 where masked
  losses = _over_negatives(terms, positive, negatives, semi_hard)
  return jnp.mean(losses), metrics | matrix_metrics(similarity, negatives, potentials(y, 1.0, similarity))


def _over_negatives(terms, positive, negatives, semi_hard):
  """The mean of an anchor's terms [2n, 2n] over its n - 1 negatives in the other view, or its semi-hard one."""
  view = jnp.arange(len(terms)) % 2
  candidate = (view[:, None] != view[None, :]) & (negatives > MASKED)
  if not semi_hard:
    return jnp.sum(jnp.where(candidate, terms, 0.0), axis=1) / (len(terms) // 2 - 1)
  candidate &= negatives < positive[:, None]
  nearest = jnp.argmax(jnp.where(candidate, negatives, MASKED), axis=1)[:, None]
  term = jnp.take_along_axis(jnp.where(candidate, terms, 0.0), nearest, axis=1)
  return term[:, 0]
