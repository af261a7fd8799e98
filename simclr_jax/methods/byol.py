"""BYOL (arXiv 2006.07733): a predictor on one view predicts the output of a moving average of the network for the other.

There are no negatives.  The predictor, together with a target that gets no gradient and changes slowly, keeps the
embeddings from becoming equal.  The projection head is that of `config.projector`.  LARS and weight decay leave out
biases and BatchNorm, also in the predictor, as in the paper's section 3.3 (optimizer.exclude_from_lars).
"""

import dataclasses

import jax
import jax.numpy as jnp

from simclr_jax import contrast, optimizer
from simclr_jax.methods import momentum
from simclr_jax.methods.method import Method
from simclr_jax.projector import Predictor


@dataclasses.dataclass(frozen=True)
class BYOL(Method):
  """Its extra state is dict(target, step):

  target: {"params", "batch_stats"} of the target network; its BatchNorm sees the batch.
  step: int32, number of updates done, on which the decay depends.

  Attributes:
    predictor: q.
    decay: of the target network at the start; it rises to 1 along a cosine.
    total_steps: of the run.
  """

  predictor: Predictor
  decay: float
  total_steps: int
  chance_loss = None  # a collapsed network has the least loss: there is no level to compare it with

  def init(self, variables, outputs):
    return {"target": variables, "step": jnp.zeros((), jnp.int32)}

  def loss(self, outputs, extra, network, batch):
    """The mean over images of |p - z'|^2 = 2 - 2 cos(p, z'), unit vectors, summed over both orders of the views."""
    target, batch_stats = network(extra["target"])
    z = jax.lax.stop_gradient(contrast.l2_normalize(target.z))
    cosine = jnp.sum(contrast.l2_normalize(outputs.prediction) * z[:, ::-1], -1)
    loss = jnp.mean(jnp.sum(2 - 2 * cosine, axis=1))
    return loss, {"positive_similarity": jnp.mean(cosine)}, {"batch_stats": batch_stats}

  def after(self, variables, extra, updates):
    decay = momentum.cosine(self.decay, extra["step"], self.total_steps)
    return {
      "target": momentum.average(extra["target"], variables, updates["batch_stats"], decay),
      "step": extra["step"] + 1,
    }


def create(config, mesh, source=None) -> BYOL:
  """The method of `config.byol`, for a run on the images of `source`."""
  predictor = Predictor(config.byol.hidden)
  return BYOL(predictor, config.byol.decay, optimizer.train_steps(config, len(source)))
