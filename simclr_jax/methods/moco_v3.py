"""MoCo v3 (arXiv 2104.02057): a momentum encoder and a predictor, negatives from the batch, and no queue.

Keys come from the momentum encoder; the negatives of a query are the keys of the other images in the view that is not its
own.  The projection head is that of `config.projector`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import contrast, optimizer
from simclr_jax.methods import momentum, simclr
from simclr_jax.projector import Predictor


@dataclasses.dataclass(frozen=True)
class MoCoV3(momentum.MomentumEncoder):
  """The average computes the keys.

  Attributes:
    temperature: of the softmax.
    precision: of the similarities.
  """

  temperature: float
  chance_loss: float | None = None
  precision: str = "highest"

  def loss(self, outputs, extra, network, batch):
    """2 tau times cross-entropy, mean over images, summed over both orders of the views (Algorithm 1)."""
    keys, batch_stats = network(extra["average"])
    q = contrast.l2_normalize(outputs.prediction)
    k = jax.lax.stop_gradient(contrast.l2_normalize(keys.z))[:, ::-1]
    logits = jnp.einsum("nvd,mvd->vnm", q, k, precision=self.precision) / self.temperature
    positive = jnp.diagonal(logits, axis1=1, axis2=2)
    loss = 2 * self.temperature * jnp.sum(jnp.mean(jax.nn.logsumexp(logits, axis=2) - positive, axis=1))
    own = jnp.eye(len(q), dtype=bool)
    hit = positive > jnp.max(jnp.where(own, -jnp.inf, logits), axis=2)
    return loss, {"contrastive_accuracy": jnp.mean(hit)}, {"batch_stats": batch_stats}


def create(config, mesh, source=None) -> MoCoV3:
  """The method of `config.moco_v3` and `config.loss.temperature`, for a run on the images of `source`."""
  temperature = simclr.temperature(config)
  chance = 4 * temperature * float(np.log(config.batch_size))
  predictor = Predictor(config.moco_v3.hidden)
  steps = optimizer.train_steps(config, len(source))
  return MoCoV3(predictor, config.moco_v3.decay, steps, temperature, chance, simclr.precision(config))
