"""NT-Xent (SimCLR, arXiv 2002.05709, equation 1 and Algorithm 1) on one page: the whole similarity matrix, plain JAX."""

import jax
import jax.numpy as jnp

from simclr_jax.contrast.similarities import (
  MASKED,
  compare,
  dot,
  matrix_metrics,
  over_pairs,
  potentials,
  prepare,
  reduce,
)


@over_pairs
def nt_xent(z, temperature, *, normalize=True, reduction="mean", precision="highest", bank=None, banked=0):
  """NT-Xent over the global batch, with the whole [2n, 2n] matrix of similarities in memory.

  Under jit, z may be sharded over its first axis; the negatives still span all of z.

  Args:
    z: [n, 2, d] projections, any float type; computed in float32.  [n, k, d] for k > 2 views: see `over_pairs`.
    temperature: tau > 0, a number or a scalar array (which may be learned).
    normalize: divide each projection by its norm (cosine similarity); otherwise plain dot products.
    reduction: "mean" over the 2n anchors (the paper's equation), or "official_sum": the mean over the n images
      of the sum over both views, twice as large (official code: objective.py).
    precision: of the similarities. "highest" is float32; "high" is three bfloat16 passes on a TPU; "default"
      rounds z to bfloat16 and accumulates in float32, on every platform, as a TPU does by default.
    bank, banked: [k, d] more negatives for every anchor, used as they are, of which the first `banked` count: the
      memory of SimCLRv2 (methods/memory.py).  The metrics leave them out.

  Returns:
    loss, a float32 scalar, and metrics, float32 scalars without gradient:
      contrastive_accuracy: how often a first view is more similar to its positive than to the second view of
        every other image (official code: metrics.py; ties are misses).
      contrastive_accuracy_all: the same for all 2n anchors against all 2n - 2 negatives.
      entropy: of the softmax over the n second views, mean over first views, nats (official code: metrics.py).
      positive_similarity, negative_similarity: mean cosine (or dot product) of positive and negative pairs.
      alignment: mean squared distance of positive pairs (Wang & Isola, arXiv 2005.10242, alpha = 2).
      uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over all pairs i != j of first views (ibid., t = 2).

  Raises:
    ValueError: z is not [n, 2, d], temperature is not positive, reduction or precision is not one of the above.
  """
  y, metrics = prepare(z, temperature, normalize, reduction, precision)
  logits, positive, negatives = compare(y, precision)
  # -log(e^pos / (e^pos + sum e^neg)) = log(1 + e^(lse(neg) - pos)), which keeps its digits when nearly 0.
  against = (
    negatives if bank is None else jnp.concatenate([negatives, _remembered(y, temperature, bank, banked, precision)], 1)
  )
  losses = jax.nn.softplus(jax.nn.logsumexp(against, axis=1) - positive)
  return reduce(losses, reduction), metrics | matrix_metrics(logits, negatives, potentials(y, temperature, logits))


def _remembered(y, temperature, bank, banked, precision):
  """Logits [2n, k] of all views against a bank of projections."""
  scaled = (bank * jax.lax.rsqrt(jnp.asarray(temperature, jnp.float32))).astype(y.dtype)
  logits = dot(y.reshape(-1, y.shape[-1]), scaled.T, precision)
  return jnp.where(jnp.arange(len(bank)) < banked, logits, MASKED)
