"""SimCLRv2's memory: a network of moving-average weights whose outputs are kept as further negatives.

As in MoCo (arXiv 1911.05722), but for the negatives alone: positives come from the batch, whose negatives stay too
(arXiv 2006.10029, section 2).  The official code does not contain it, though the paper's figures were made with it.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.model import TrainState
from simclr_jax.runtime import loop


@flax.struct.dataclass
class MemoryState(TrainState):
  """A training state, and what it remembers."""

  average: dict  # {"params", "batch_stats"} of the moving-average network
  bank: jax.Array  # float32 [size, d]: normalised z of the last size / 2n batches, the newest first


def train_step(state: MemoryState, batch, *, plain, model, decay: float, loss: dict, views):
  """One update by `plain` with the bank's negatives; then the averages move, and their z of this batch are kept.

  Args:
    plain: (state, batch, loss=..., views=...) -> (state, metrics), pretrain.train_step with all else bound.
    decay: average <- decay * average + (1 - decay) * weights; BatchNorm of the averaged network sees the batch.
    loss: what contrast.nt_xent takes.
    views: batch -> [n, 2, h, w, 3], as in pretrain.train_step; both networks see the same.
  """
  batch = {**batch, "views": views(batch)}
  (_, z, _), seen = model.apply(state.average, batch["views"], train=True, mutable=["batch_stats"])
  z = z.reshape(-1, z.shape[-1])
  if loss.get("normalize", True):
    z = contrast.l2_normalize(z)
  banked = jnp.minimum(state.step * len(z), len(state.bank))
  known = functools.partial(contrast.nt_xent, **loss, bank=state.bank, banked=banked)
  before = TrainState(state.step, state.params, state.batch_stats, state.opt_state)
  weights, metrics = plain(before, batch, loss=known, views=lambda batch: batch["views"])
  average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, state.average["params"], weights.params)
  bank = jnp.concatenate([z, state.bank])[: len(state.bank)]
  return MemoryState(
    weights.step,
    weights.params,
    weights.batch_stats,
    weights.opt_state,
    {"params": average, "batch_stats": seen["batch_stats"]},
    bank,
  ), metrics | {"remembered": banked.astype(jnp.float32)}


def remember(task: loop.Task, model, *, size: int, decay: float, loss: dict, views) -> loop.Task:
  """A pretraining task with a memory of `size` projections.

  Raises:
    ValueError: size or decay is out of range.
  """
  if size < 1 or not 0 <= decay < 1:
    raise ValueError(f"memory.size={size}, memory.decay={decay}: expected at least 1, and at least 0 and below 1")

  def init(key):
    state = task.init(key)
    average = {"params": state.params, "batch_stats": state.batch_stats}
    views = jnp.zeros((1, 2, 32, 32, 3))
    z = jax.eval_shape(functools.partial(model.apply, train=False), average, views)[1]
    bank = jnp.zeros((size, z.shape[-1]))
    return MemoryState(state.step, state.params, state.batch_stats, state.opt_state, average, bank)

  step = functools.partial(train_step, plain=task.step, model=model, decay=decay, loss=loss, views=views)
  return dataclasses.replace(task, init=init, step=step)
