"""The order of the examples and the seeds of their augmentations: functions of (seed, step), without any state."""

import functools
import logging
from collections.abc import Callable, Sized

import numpy as np

from simclr_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of epoch `epoch`: a permutation of range(n), int64 [n], read-only; 8 bytes an image.

  It sorts raw Philox draws, because NumPy guarantees the bits of its generators forever, but not the order in which its
  shuffles use them.
  """
  draws = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
  order = np.argsort(draws, kind="stable")
  order.setflags(write=False)
  return order


def example_seeds(seed: int, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
  """Two int32 for every example, a function of (seed, epoch, index) alone: [b], [b] -> int32 [b, 2]."""
  state = np.zeros(np.shape(index), np.uint64)
  for word in (np.uint64(seed % 2**64), epoch, index):
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that mixes all 64 bits.
    state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
  halves = np.stack([state >> np.uint64(32), state & np.uint64(0xFFFFFFFF)], axis=-1)
  return halves.astype(np.uint32).view(np.int32)


def draws(
  source: Sized, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """Which images form the batches of this process, without reading any.

  Arguments as for `train_stream`.  Returns a function, step -> (index int64 [b], seed int32 [b, 2]).
  """
  if batch_size % process_count:
    raise UserError(f"batch_size={batch_size} cannot be split over {process_count} processes: use a multiple")
  if batch_size > len(source):
    logger.warning(
      "batch_size=%d exceeds the %d images: every batch repeats images, which then count as negatives of themselves",
      batch_size,
      len(source),
    )
  rows = batch_size // process_count

  def draw(step):
    position = step * batch_size + process_index * rows + np.arange(rows)
    epoch, place = np.divmod(position, len(source))
    index = np.empty(rows, np.int64)
    for e in np.unique(epoch):
      index[epoch == e] = permutation(seed, int(e), len(source))[place[epoch == e]]
    return index, example_seeds(seed, epoch, index)

  return draw
