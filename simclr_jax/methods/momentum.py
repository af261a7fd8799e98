"""The moving average of a network, which MoCo calls the momentum encoder and BYOL the target network."""

import jax
import jax.numpy as jnp


def average(before, variables, batch_stats, decay):
  """The averaged network {"params", "batch_stats"} after an update: params <- decay * params + (1 - decay) * weights.

  Args:
    before: the averaged network so far.
    variables: the trained network, whose params are the weights.
    batch_stats: those of the averaged network, which its own BatchNorm has updated on the batch.
  """
  move = lambda a, w: decay * a + (1 - decay) * w  # noqa: E731
  return {"params": jax.tree.map(move, before["params"], variables["params"]), "batch_stats": batch_stats}


def cosine(start, step, total: int):
  """The decay after `step` of `total` updates, from `start` to 1: 1 - (1 - start) (cos(pi step / total) + 1) / 2.

  Source: BYOL, arXiv 2006.07733, section 3.3; MoCo v3 (arXiv 2104.02057) has the same schedule.
  """
  return 1 - (1 - start) * (jnp.cos(jnp.pi * step / total) + 1) / 2
