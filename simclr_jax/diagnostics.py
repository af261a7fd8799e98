"""Has the representation collapsed?  Numbers that fall when it does, and one sentence that says what they mean."""

import jax.numpy as jnp


def embedding_std(z) -> float:
  """Mean over dimensions of the standard deviation of z / |z|, z [n, d]; 1/sqrt(d) if spread evenly, 0 if collapsed.

  Source: SimSiam, arXiv 2011.10566, section 4.1.
  """
  z = z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)
  return float(jnp.mean(jnp.std(z, axis=0)))


def rank(h) -> float:
  """RankMe: exp of the entropy of the singular values of h [n, d], between 1 and min(n, d).

  Source: arXiv 2210.02885, eq. 1 and 2.
  """
  s = jnp.linalg.svd(jnp.asarray(h, jnp.float32), compute_uv=False)
  p = s / jnp.maximum(s.sum(), 1e-12) + 1e-7
  return float(jnp.exp(-jnp.sum(p * jnp.log(p))))


def dead_dimensions(h) -> int:
  """Number of the d dimensions of h [n, d] that do not vary over the n examples."""
  return int(jnp.sum(jnp.std(h, axis=0) < 1e-6))


def summary(h, z) -> dict:
  """The numbers above for h [n, d] and z [n, d'], by the names they have in metrics.jsonl."""
  return {
    "embedding_std": embedding_std(z),
    "embedding_std_even": z.shape[1] ** -0.5,
    "rank": rank(h),
    "dimensions": h.shape[1],
    "dead_dimensions": dead_dimensions(h),
  }


def verdict(numbers: dict) -> tuple[bool, str]:
  """(collapsed?, one plain sentence) from `summary`.

  Collapsed: the standard deviation of z is under a tenth of that of an even spread, or h has an effective rank under
  2.  In trouble: under a half, an effective rank under 5 or a fiftieth of the dimensions, or most dimensions dead.
  """
  std, even = numbers["embedding_std"], numbers["embedding_std_even"]
  rank_, d, dead = numbers["rank"], numbers["dimensions"], numbers["dead_dimensions"]
  facts = (
    f"std of z {std:.3f} of {even:.3f} if spread evenly, effective rank of h {rank_:.0f} of {d}, {dead} dead dimensions"
  )
  if std < 0.1 * even or rank_ < 2:
    return (
      True,
      f"COLLAPSED: all images get nearly the same embedding ({facts}); lower the learning rate or raise the temperature",
    )
  if std < 0.5 * even or rank_ < max(5, d / 50) or dead > d / 2:
    return False, f"narrow: the embeddings use little of their space ({facts}); watch kNN, and collapse"
  return False, f"healthy: the embeddings have not collapsed; the scores say how good they are ({facts})"
