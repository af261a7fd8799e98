"""BYOL (arXiv 2006.07733): a predictor on one view predicts the output of a moving average of the network for the other.

There are no negatives.  The predictor, together with a target that gets no gradient and changes slowly, keeps the
embeddings from becoming equal.  The projection head is that of `config.projector`.  LARS and weight decay leave out
biases and BatchNorm, also in the predictor, as in the paper's section 3.3 (optimizer.exclude_from_lars).
"""

import jax
import jax.numpy as jnp

from simclr_jax import contrast, optimizer
from simclr_jax.methods import momentum
from simclr_jax.projector import Predictor


class BYOL(momentum.MomentumEncoder):
  """The average is the target network."""

  chance_loss = None  # a collapsed network has the least loss: there is no level to compare it with

  def loss(self, outputs, extra, network, batch):
    """The mean over images of |p - z'|^2 = 2 - 2 cos(p, z'), unit vectors, summed over both orders of the views."""
    target, batch_stats = network(extra["average"])
    z = jax.lax.stop_gradient(contrast.l2_normalize(target.z))
    cosine = jnp.sum(contrast.l2_normalize(outputs.prediction) * z[:, ::-1], -1)
    loss = jnp.mean(jnp.sum(2 - 2 * cosine, axis=1))
    return loss, {"positive_similarity": jnp.mean(cosine)}, {"batch_stats": batch_stats}


def create(config, mesh, source=None) -> BYOL:
  """The method of `config.byol`, for a run on the images of `source`."""
  predictor = Predictor(config.byol.hidden)
  return BYOL(predictor, config.byol.decay, optimizer.train_steps(config, len(source)))
