"""InstDisc (arXiv 1805.01978): every image is a class of its own, and a memory bank holds the class vectors.

A view is classified among all images of the data set by a non-parametric softmax over the bank, or by noise-contrastive
estimation (NCE) with some of its rows.  Both views of an image are instances of its class; the bank learns their mean.
The paper's head is a linear layer to 128 dimensions, config.projector.kind=linear.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.methods import simclr
from simclr_jax.methods.method import Method

ROWS = 1024  # the rows of the bank are a multiple of it, so that any usual number of devices can share them


@dataclasses.dataclass(frozen=True)
class InstDisc(Method):
  """Its extra state is dict(bank, normalizer):

  bank: float32 [images rounded up, d], unit vectors, random at first; split over the devices.
  normalizer: float32, NCE's constant Z, which the first batch estimates (section 3.2); 0 before that.

  Attributes:
    images: of the data set.
    negatives: m of NCE, rows of the bank that are drawn for each batch; 0: softmax over all of it.
    decay: of the rows of the bank; the rest is the new vector.
    proximal: lambda, weight of the squared distance from the row of the bank (section 3.3).
    temperature: tau.
    precision: of the similarities.
  """

  images: int
  negatives: int
  decay: float
  proximal: float
  temperature: float
  chance_loss: float | None = None
  precision: str = "highest"
  split = ("bank",)

  def init(self, variables, outputs):
    rows = -(-self.images // ROWS) * ROWS
    bank = contrast.l2_normalize(jax.random.normal(jax.random.key(0), (rows, outputs.z.shape[-1])))
    return {"bank": bank, "normalizer": jnp.zeros(())}

  def loss(self, outputs, extra, network, batch):
    bank, tau = extra["bank"], self.temperature
    v = contrast.l2_normalize(outputs.z)
    own = bank[batch.index][:, None]  # [n, 1, d]
    positive = jnp.sum(v * own, -1) / tau
    rows = self.draws(batch) if self.negatives else slice(self.images)
    logits = jnp.einsum("nvd,kd->nvk", v, bank[rows], precision=self.precision) / tau
    normalizer = extra["normalizer"]
    if self.negatives:
      seen = jax.lax.stop_gradient(self.images * jnp.mean(jnp.exp(logits)))
      normalizer = jnp.where(normalizer > 0, normalizer, seen)
      # Log of P(i | v) / (m P_n), P_n = 1 / images; the posterior h of section 3.2 is its sigmoid.
      shift = jnp.log(normalizer) + math.log(self.negatives / self.images)
      losses = jax.nn.softplus(shift - positive) + jnp.sum(jax.nn.softplus(logits - shift), -1)
    else:
      losses = jax.nn.logsumexp(logits, axis=-1) - positive
    loss = jnp.mean(losses) + self.proximal * jnp.mean(jnp.sum(jnp.square(v - own), -1))
    # Rows of images that are in the batch twice, at the border of two epochs, get the mean of both.
    same = jnp.float32(batch.index[:, None] == batch.index[None, :])
    mean = jax.lax.stop_gradient(jnp.matmul(same, jnp.mean(v, 1), precision="highest") / same.sum(1, keepdims=True))
    row = contrast.l2_normalize(self.decay * own[:, 0] + (1 - self.decay) * mean)
    metrics = {"positive_similarity": tau * jnp.mean(positive)}
    return loss, metrics, {"index": batch.index, "row": row, "normalizer": normalizer}

  def draws(self, batch):
    """Indices of the negatives' rows, int32 [m]: a function of the seeds of the batch's images, whatever their order."""
    return jax.random.randint(jax.random.key(jnp.sum(batch.seed)), (self.negatives,), 0, self.images)

  def after(self, variables, extra, updates):
    bank = extra["bank"].at[updates["index"]].set(updates["row"])
    return {"bank": bank, "normalizer": updates["normalizer"]}


def create(config, mesh, source=None) -> InstDisc:
  """The method of `config.instdisc` and `config.loss.temperature`, for a run on the images of `source`."""
  c, temperature = config.instdisc, simclr.temperature(config)
  chance = math.log(len(source)) if not c.negatives and not c.proximal else None
  return InstDisc(len(source), c.negatives, c.decay, c.proximal, temperature, chance, simclr.precision(config))
