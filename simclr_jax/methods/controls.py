"""Controls: SimCLR's network and views with labels, or without the negatives of the same class.

They are not meant for pretraining; the claims about SimCLR are measured against them.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn

from simclr_jax import contrast, model
from simclr_jax.methods import simclr
from simclr_jax.methods.method import Method


class Logits(nn.Module):
  """A linear classifier on z; with projector.kind=none on h.  Initial values are the online classifier's."""

  num_classes: int

  @nn.compact
  def __call__(self, z, views, train=False):
    """z [m, d] -> float32 [m, num_classes]."""
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(z)


@dataclasses.dataclass(frozen=True)
class Control(Method):
  """`of_batch` is (outputs, batch) -> (loss, metrics)."""

  of_batch: Callable
  predictor: nn.Module | None = None

  def loss(self, outputs, extra, network, batch):
    loss, metrics = self.of_batch(outputs, batch)
    return loss, metrics, {}


def _check_labels(config, source):
  if source is None or not source.num_classes:
    raise ValueError(f"config.method={config.method!r}: needs labeled training images")


def supervised(config, mesh, source=None) -> Control:
  """Cross-entropy on the labels of both views: the supervised baseline of arXiv 2002.05709, Table 1, at equal compute.

  Raises:
    ValueError: there are no labels.
  """
  _check_labels(config, source)

  def of_batch(outputs, batch):
    loss, _ = model.cross_entropy(outputs.prediction, batch.label)
    return loss, {}

  return Control(of_batch, Logits(source.num_classes))


def oracle(config, mesh, source=None) -> Control:
  """NT-Xent that knows which negatives have the anchor's class, and leaves out a fraction config.removed_negatives of them.

  Raises:
    ValueError: the loss has no temperature, or there are no labels.
  """
  _check_labels(config, source)
  options = simclr.check_options(config, contrast.without_false_negatives, ("z", "labels", "removed"))
  options["removed"] = config.removed_negatives
  return Control(lambda outputs, batch: contrast.without_false_negatives(outputs.z, labels=batch.label, **options))
