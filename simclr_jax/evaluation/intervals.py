"""Differences over seeds: their mean, its interval, and what the interval says about a claim.

An interval is Student's t with n - 1 degrees of freedom over n paired differences, one per seed: both settings of a pair
have the same seed, so the effect of the seed on both cancels.
"""

import dataclasses

import numpy as np
import scipy.stats

SUPPORTED, NOT_SUPPORTED, CONTRARY = "supported", "not supported", "contrary"


@dataclasses.dataclass(frozen=True)
class Interval:
  """mean, and low and high of the confidence interval; both are not finite where there is one difference alone."""

  mean: float
  low: float
  high: float

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0


def interval(differences, confidence: float = 0.95) -> Interval:
  """The t-interval of the mean of differences [n].

  Raises:
    ValueError: there is none.
  """
  x = np.round(
    np.asarray(differences, np.float64), 9
  )  # or three differences of 0 would be a rounding error apart from it
  if not len(x):
    raise ValueError("no differences: expected one for each seed")
  mean = float(x.mean())
  if len(x) == 1:
    return Interval(mean, float("-inf"), float("inf"))
  half = float(scipy.stats.t.ppf(0.5 + confidence / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
  return Interval(mean, mean - half, mean + half)


def verdict(found: Interval, direction: int, margin: float) -> str:
  """What the interval says about a claim.

  Args:
    direction: 1 if the claim is that the difference is above 0; -1 if below 0; 0 if it does not matter, that is, lies
      within `margin` of 0.

  Returns:
    SUPPORTED if the whole interval agrees with the claim; CONTRARY if the whole interval contradicts the claim, which for
    direction 0 means that it lies beyond the margin on one side; NOT_SUPPORTED otherwise.
  """
  if direction == 0:
    if -margin < found.low and found.high < margin:
      return SUPPORTED
    return CONTRARY if found.low > margin or found.high < -margin else NOT_SUPPORTED
  low, high = (found.low, found.high) if direction > 0 else (-found.high, -found.low)
  return SUPPORTED if low > 0 else CONTRARY if high < 0 else NOT_SUPPORTED
