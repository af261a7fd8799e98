"""t-SimCNE (arXiv 2210.09879): SimCLR with the Cauchy kernel and, in the end, a two-dimensional output: a map of the images.

One run has three stages (section 3): first z, in many dimensions; then only a new two-dimensional output layer, with
everything before it frozen; then all of it, at a low learning rate.  The map is a network, so it can also place new images:
`simclr map --method=tsimcne`.

In the paper the new layer replaces the last layer of the head; here it follows that layer.  Both are linear, and z is kept.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import contrast, optimizer
from simclr_jax.methods import simclr
from simclr_jax.methods.method import Method


class Plane(nn.Module):
  """The output layer: z [m, d] -> float32 [m, 2, 2], the point in the plane, and again with no gradient to z."""

  @nn.compact
  def __call__(self, z, views=None, train=False):
    return nn.Dense(2, name="output")(jnp.stack([z, jax.lax.stop_gradient(z)], axis=1))


@dataclasses.dataclass(frozen=True)
class TSimCNE(Method):
  """Its extra state is dict(step), the int32 number of updates done.

  Attributes:
    ends: numbers of updates after which the first two stages end.
    last_lr: learning rate of the third stage, as a fraction of that of the others.
    precision: of the products in the loss.
  """

  ends: tuple[int, int]
  last_lr: float
  predictor: Plane = Plane()
  precision: str = "highest"

  def init(self, variables, outputs):
    return {"step": jnp.zeros((), jnp.int32)}

  def stage(self, step):
    """0, 1 or 2, for an int32 step."""
    return sum(jnp.int32(step >= end) for end in self.ends)

  def loss(self, outputs, extra, network, batch):
    stage = self.stage(extra["step"])
    point = jnp.where(stage == 1, outputs.prediction[:, :, 1], outputs.prediction[:, :, 0])
    cauchy = functools.partial(contrast.cauchy, precision=self.precision)
    loss, metrics = jax.lax.cond(stage == 0, lambda: cauchy(outputs.z), lambda: cauchy(point))
    return loss, metrics | {"stage": stage + 1.0}, {}

  def after(self, variables, extra, updates):
    return {"step": extra["step"] + 1}

  def optimizer(self, config, num_examples):
    """(optax transformation, schedule): in place of optimizer.create, whose schedule every stage runs through anew."""
    begins, ends = (0, *self.ends), (*self.ends, optimizer.train_steps(config, num_examples))
    rates = []
    for begin, end, factor in zip(begins, ends, (1.0, 1.0, self.last_lr), strict=True):
      warmup = 0.0 if begin else config.optimizer.warmup_epochs
      c = dataclasses.replace(config.optimizer, base_lr=factor * config.optimizer.base_lr, warmup_epochs=warmup)
      rates.append(
        optimizer.learning_rate(dataclasses.replace(config, train_steps=end - begin, optimizer=c), num_examples)
      )

    def schedule(step):
      now = [rate(step - begin) for rate, begin in zip(rates, begins, strict=True)]
      return jnp.select([step < end for end in self.ends], now[:2], now[2])

    # All but the output layer in the first stage, neither encoder nor head in the second.
    trains = {
      "predictor": lambda step: self.stage(step) > 0,
      **dict.fromkeys(("encoder", "projector"), lambda step: self.stage(step) != 1),
    }
    return optimizer.staged(optimizer.rule(config, schedule), trains), schedule


def create(config, mesh, source=None) -> TSimCNE:
  """The method of `config.tsimcne`, for a run on the images of `source`.

  Raises:
    ValueError: the run is too short for three stages, or takes a jump of the loss for divergence.
  """
  if config.rollback.spike:
    raise ValueError(
      f"config.rollback.spike={config.rollback.spike}: with config.method='tsimcne' the loss jumps where a stage begins; "
      "set it to 0"
    )
  total, stages = optimizer.train_steps(config, len(source)), config.tsimcne.stages
  ends = tuple(int(total * part / sum(stages)) for part in itertools.accumulate(stages[:2]))
  if not 0 < ends[0] < ends[1] < total:
    raise ValueError(
      f"config.tsimcne.stages={stages} of {total} steps: expected at least one step in each stage; train longer"
    )
  return TSimCNE(ends, config.tsimcne.last_lr, precision=simclr.precision(config))
