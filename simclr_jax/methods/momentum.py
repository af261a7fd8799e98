"""The moving average of a network, which MoCo calls the momentum encoder and BYOL the target network."""

import dataclasses

import jax
import jax.numpy as jnp

from simclr_jax.methods.method import Method
from simclr_jax.projector import Predictor


@dataclasses.dataclass(frozen=True)
class MomentumEncoder(Method):
  """What BYOL and MoCo v3 have in common.  The extra state is dict(average, step):

  average: {"params", "batch_stats"} of the averaged network; its BatchNorm sees the batch.
  step: int32, number of updates done, on which the decay depends.

  Attributes:
    predictor: of the trained network's z.
    decay: of the average at the start; it rises to 1 along a cosine.
    total_steps: of the run.
  """

  predictor: Predictor
  decay: float
  total_steps: int

  def init(self, variables, outputs):
    return {"average": variables, "step": jnp.zeros((), jnp.int32)}

  def after(self, variables, extra, updates):
    decay = cosine(self.decay, extra["step"], self.total_steps)
    return {"average": average(extra["average"], variables, updates["batch_stats"], decay), "step": extra["step"] + 1}


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
