"""k-nearest-neighbor classification of h: it needs no training and no tuning, so it is the number to watch.

Source: weighted vote of arXiv 1805.01978 (section 3.4): cosine similarity, weights exp(similarity / temperature).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.evaluation.rows import check_finite, labeled

CHUNK = 1024  # queries at a time, which bounds memory at CHUNK x bank similarities


@functools.partial(jax.jit, static_argnames="k")
def _nearest(bank, queries, k):
  return jax.lax.top_k(jnp.matmul(queries, bank.T, precision="highest"), k)


def _unit(x):
  x = jnp.asarray(x, jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(bank, queries, *, k: int):
  """(cosine similarities [m, k], indices [m, k]) of the k rows of bank [n, d] closest to each of queries [m, d].

  Raises:
    UserError: a feature is not finite.
  """
  bank, queries = _unit(check_finite(bank, "features of the bank")), _unit(check_finite(queries, "features"))
  k = min(k, len(bank))
  parts = [_nearest(bank, queries[i : i + CHUNK], k) for i in range(0, len(queries), CHUNK)]
  similarities, indices = zip(*parts, strict=True)
  return np.concatenate(similarities), np.concatenate(indices)


def predict(bank, bank_labels, queries, *, k: int = 20, temperature: float = 0.1, num_classes: int):
  """Predicted class int [m] of each query, by a weighted vote of its k nearest rows of the bank that have a label.

  Args:
    bank: [n, d]; bank_labels: int [n], -1 where there is no label; queries: [m, d].

  Raises:
    UserError: a feature is not finite, or no row of the bank has a label.
  """
  known = labeled(bank_labels)
  bank_labels = np.asarray(bank_labels)[known]
  similarities, indices = nearest(np.asarray(bank)[known], queries, k=k)
  # Less the nearest one's: the same vote, and at no temperature do all weights underflow.
  weights = np.exp((similarities - similarities[:, :1]) / temperature)
  votes = np.zeros((len(indices), num_classes))
  rows = np.arange(len(indices))
  for j in range(indices.shape[1]):
    np.add.at(votes, (rows, bank_labels[indices[:, j]]), weights[:, j])
  return votes.argmax(1)


def accuracy(bank, bank_labels, queries, labels, **keywords) -> float:
  """Fraction of the queries with a label that `predict` gets right."""
  known = labeled(labels)
  return float(np.mean(predict(bank, bank_labels, np.asarray(queries)[known], **keywords) == np.asarray(labels)[known]))
