"""Has the representation collapsed?  Numbers that fall when it does, and one sentence that says what they mean."""

import jax.numpy as jnp

# The rank of n images is at most n: of the test images of healthy runs of smoke and textures, 8 have one of 5, 20 one of 10
# or 12, all of them one of 34 or 43.  So a rank is only asked of four times as many images.
IMAGES_PER_RANK = 4


def _unit(z):
  return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def embedding_std(z) -> float:
  """Mean over dimensions of the standard deviation of z / |z|, z [n, d]; 1/sqrt(d) if spread evenly, 0 if collapsed.

  Source: SimSiam, arXiv 2011.10566, section 4.1.
  """
  return float(jnp.mean(jnp.std(_unit(z), axis=0)))


def rank(h) -> float:
  """RankMe: exp of the entropy of the singular values of h [n, d], between 1 and min(n, d).

  Source: arXiv 2210.02885, eq. 1 and 2.
  """
  s = jnp.linalg.svd(jnp.asarray(h, jnp.float32), compute_uv=False)
  p = s / jnp.maximum(s.sum(), 1e-12) + 1e-7
  return float(jnp.exp(-jnp.sum(p * jnp.log(p))))


def alignment(pairs) -> float:
  """Mean squared distance of the two unit vectors of each positive pair, pairs [n, 2, d]; 0 if views do not matter.

  Source: Wang and Isola, arXiv 2005.10242, with alpha = 2.
  """
  x = _unit(pairs)
  return float(jnp.mean(jnp.sum(jnp.square(x[:, 0] - x[:, 1]), axis=-1)))


def uniformity(h) -> float:
  """Log of the mean of exp(-2 |h_i - h_j|^2) over all pairs of unit vectors i != j, h [n, d]; 0 if collapsed, about -4 if
  spread evenly.

  Source: Wang and Isola, arXiv 2005.10242, with t = 2.
  """
  x = _unit(h)
  potential = jnp.exp(-2.0 * jnp.maximum(2.0 - 2.0 * x @ x.T, 0.0))
  return float(jnp.log((jnp.sum(potential) - jnp.trace(potential)) / (len(x) * (len(x) - 1))))


def spectrum(h) -> jnp.ndarray:
  """The eigenvalues of the covariance of h [n, d] as fractions of their sum, largest first, [min(n, d)].

  Source: Jing et al., arXiv 2110.09348, Figure 2.
  """
  squares = jnp.square(jnp.linalg.svd(h - jnp.mean(h, axis=0), compute_uv=False))
  return squares / jnp.maximum(jnp.sum(squares), 1e-12)


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
    "images": len(h),
  }


def verdict(numbers: dict, *, scored: bool = True) -> tuple[bool, str]:
  """(collapsed?, one plain sentence) from `summary`; `scored`: whether there are scores that the sentence may refer to.

  Collapsed: the standard deviation of z is under a tenth of that of an even spread, or h has an effective rank under
  2.  In trouble: under a half, an effective rank under 5 or a fiftieth of the dimensions, or most dimensions dead.  Neither is
  said of too few images, see IMAGES_PER_RANK.
  """
  std, even = numbers["embedding_std"], numbers["embedding_std_even"]
  rank_, d, dead = numbers["rank"], numbers["dimensions"], numbers["dead_dimensions"]
  facts = (
    f"std of z {std:.3f} of {even:.3f} if spread evenly, effective rank of h {rank_:.0f} of {d}, {dead} dead dimensions"
  )
  wanted, n = max(5, d / 50), numbers["images"]
  if n >= IMAGES_PER_RANK * 2 and (std < 0.1 * even or rank_ < 2):
    return (
      True,
      f"COLLAPSED: all images get nearly the same embedding ({facts}); lower the learning rate, or raise the temperature of a contrastive loss",
    )
  if n < IMAGES_PER_RANK * wanted:
    return False, f"too few images ({n}) to judge how much of their space the embeddings use ({facts})"
  if std < 0.5 * even or rank_ < wanted or dead > d / 2:
    watch = "; watch kNN, and collapse" if scored else ""
    return False, f"narrow: the embeddings use little of their space ({facts}){watch}"
  good = "; the scores say how good they are" if scored else ""
  return False, f"healthy: the embeddings have not collapsed{good} ({facts})"
