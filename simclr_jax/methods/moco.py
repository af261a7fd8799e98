"""MoCo v2 (arXiv 1911.05722, 2003.04297): positives from a momentum encoder, negatives from a queue of its past outputs.

The papers shuffle the images between devices before the keys are encoded, because each of their devices normalizes by its
own small part of the batch: a query and its key, normalized together, would give each other away.  Here BatchNorm spans
the global batch, so query and key of an image share their statistics with all other images, and shuffling would
change nothing.

Both views are queries, each with the other's key, because the network encodes both anyway; the loss is the mean of the
paper's loss over the two orders, and both keys of an image are enqueued.
"""

import dataclasses

import jax
import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.methods import momentum, simclr
from simclr_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class MoCo(Method):
  """Its extra state is dict(average, queue, queued):

  average: {"params", "batch_stats"} of the momentum encoder; its BatchNorm sees the batch.
  queue: float32 [size, d], normalized keys of the last size / 2n batches, the newest first; split over the devices.
  queued: int32, how many of the rows are filled.  In the first step there are none, and the loss is 0.

  Attributes:
    size: keys in the queue.
    decay: of the momentum encoder.
    temperature: of the softmax.
    precision: of the similarities.
  """

  size: int
  decay: float
  temperature: float
  precision: str = "highest"
  split = ("queue",)

  def init(self, variables, outputs):
    queue = jnp.zeros((self.size, outputs.z.shape[-1]))
    return {"average": variables, "queue": queue, "queued": jnp.zeros((), jnp.int32)}

  def loss(self, outputs, extra, network, batch):
    keys, batch_stats = network(extra["average"])
    q = contrast.l2_normalize(outputs.z)
    k = jax.lax.stop_gradient(contrast.l2_normalize(keys.z))
    positive = jnp.sum(q * k[:, ::-1], -1) / self.temperature
    logits = jnp.einsum("nvd,kd->nvk", q, extra["queue"], precision=self.precision) / self.temperature
    negatives = jnp.where(jnp.arange(self.size) < extra["queued"], logits, jnp.finfo(jnp.float32).min)
    loss = jnp.mean(jax.nn.softplus(jax.nn.logsumexp(negatives, axis=-1) - positive))
    metrics = {
      "contrastive_accuracy": jnp.mean(positive > jnp.max(negatives, axis=-1)),
      "queued": extra["queued"].astype(jnp.float32),
    }
    return loss, metrics, {"keys": k.reshape(-1, k.shape[-1]), "batch_stats": batch_stats}

  def after(self, variables, extra, updates):
    keys = updates["keys"]
    return {
      "average": momentum.average(extra["average"], variables, updates["batch_stats"], self.decay),
      "queue": jnp.concatenate([keys, extra["queue"]])[: self.size],
      "queued": jnp.minimum(extra["queued"] + len(keys), self.size),
    }


def create(config, mesh, source=None) -> MoCo:
  """The method of `config.moco` and `config.loss.temperature`."""
  return MoCo(config.moco.size, config.moco.decay, simclr.temperature(config), simclr.precision(config))
