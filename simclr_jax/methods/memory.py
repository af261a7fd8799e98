"""SimCLRv2's memory: a network of moving-average weights whose outputs are kept as additional negatives.

This is as in MoCo (arXiv 1911.05722), but only for negatives: positives come from the batch, whose negatives are also kept
(arXiv 2006.10029, section 2).  The official code does not contain it, though the paper's figures were made with it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.methods import momentum, simclr
from simclr_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Memory(Method):
  """Its extra state is dict(average, bank, banked):

  average: {"params", "batch_stats"} of the moving-average network.
  bank: float32 [size, d], normalized z of the last size / 2n batches, the newest first.
  banked: int32, how many of the rows are filled.

  Attributes:
    size: number of projections in the bank.
    decay: average <- decay * average + (1 - decay) * weights; BatchNorm of the averaged network sees the batch.
    loss_options: what contrast.nt_xent takes.
    chance_loss: with a full bank.
  """

  size: int
  decay: float
  loss_options: dict
  chance_loss: float | None = None

  def init(self, variables, outputs):
    bank = jnp.zeros((self.size, outputs.z.shape[-1]))
    return {"average": variables, "bank": bank, "banked": jnp.zeros((), jnp.int32)}

  def loss(self, outputs, extra, network, batch):
    remembered, batch_stats = network(extra["average"])
    z = jax.lax.stop_gradient(remembered.z.reshape(-1, remembered.z.shape[-1]))
    if self.loss_options.get("normalize", True):
      z = contrast.l2_normalize(z)
    negatives = {"bank": extra["bank"], "banked": extra["banked"]}
    loss, metrics = contrast.nt_xent(outputs.z, **self.loss_options, **negatives)
    metrics |= {"remembered": extra["banked"].astype(jnp.float32)}
    return loss, metrics, {"z": z, "batch_stats": batch_stats}

  def after(self, variables, extra, updates):
    average = momentum.average(extra["average"], variables, updates["batch_stats"], self.decay)
    bank = jnp.concatenate([updates["z"], extra["bank"]])[: self.size]
    banked = jnp.minimum(extra["banked"] + len(updates["z"]), self.size)
    return {"average": average, "bank": bank, "banked": banked}


def create(config, mesh, source=None) -> Memory:
  """The method of `config.memory`.

  Raises:
    ValueError: the loss is not NT-Xent, or has an option that it does not take here.
  """
  if config.loss.name != "nt_xent":
    raise ValueError(f"config.loss.name={config.loss.name!r}: the memory bank is for nt_xent")
  options = simclr.check_options(config, contrast.nt_xent, ("z", "bank", "banked"))
  return Memory(config.memory.size, config.memory.decay, options, simclr.chance_loss(config, config.memory.size))
