"""Which rows of features count in a score: those with a label, if all features are finite."""

import numpy as np

from simclr_jax.runtime.errors import UserError


def check_finite(h, what: str = "h") -> np.ndarray:
  """`h` as an array; features that are not finite would turn every score into that of chance.

  Raises:
    UserError: h [n, d] holds NaN or infinity; names the number of rows and the first.
  """
  h = np.asarray(h)
  bad = np.flatnonzero(~np.isfinite(h).all(axis=tuple(range(1, h.ndim))))
  if len(bad):
    raise UserError(
      f"{what}: {len(bad):,} of {len(h):,} rows hold NaN or infinity, row {bad[0]} first; check these images, or use a "
      "checkpoint from before training diverged"
    )
  return h


def labeled(labels) -> np.ndarray:
  """bool [n]: which rows have a label; -1 stands for none, where an image may have several classes for "do not judge".

  Raises:
    UserError: none has.
  """
  labels = np.asarray(labels)
  known = labels >= 0 if labels.ndim == 1 else (labels >= 0).any(1)
  if not known.any():
    raise UserError(f"none of the {len(labels):,} images has a label: a score needs some")
  return known
