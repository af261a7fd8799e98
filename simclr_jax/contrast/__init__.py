"""The contrastive loss: NT-Xent (SimCLR, arXiv 2002.05709, equation 1 and Algorithm 1) and its relatives.

`nt_xent` is the loss on one page: the whole similarity matrix, plain JAX.
`nt_xent_tiled` is the same function in the memory of one tile, on one device or around a ring of them.
`nt_xent_auto` chooses the cheaper of the two.

In all functions z is [n, 2, d]: the projections of n images with two views each; axis 1 holds the views of an image.  NT-Xent
also takes k views, [n, k, d], and compares all pairs of them.
Both views of image i are each other's positive; the 2n - 2 views of the other images are the negatives.
This package needs only jax and numpy.
"""

import functools

from simclr_jax.contrast.nt_xent import nt_xent
from simclr_jax.contrast.relatives import (
  cauchy,
  debiased,
  decoupled,
  margin_triplet,
  nt_logistic,
  supervised,
  without_false_negatives,
)
from simclr_jax.contrast.similarities import PRECISIONS, REDUCTIONS, l2_normalize
from simclr_jax.contrast.tiled import choose, nt_xent_auto, nt_xent_tiled

LOSSES = {
  "nt_xent": nt_xent_auto,
  "decoupled": decoupled,
  "debiased": debiased,
  "cauchy": cauchy,
  "nt_logistic": nt_logistic,
  "nt_logistic_semi_hard": functools.partial(nt_logistic, semi_hard=True),
  "margin_triplet": margin_triplet,
  "margin_triplet_semi_hard": functools.partial(margin_triplet, semi_hard=True),
}

__all__ = [
  "LOSSES",
  "PRECISIONS",
  "REDUCTIONS",
  "cauchy",
  "choose",
  "debiased",
  "decoupled",
  "l2_normalize",
  "margin_triplet",
  "nt_logistic",
  "nt_xent",
  "nt_xent_auto",
  "nt_xent_tiled",
  "supervised",
  "without_false_negatives",
]
