"""Supervised contrastive learning, SupCon (arXiv 2004.11362): all views of an image's class are its positives.

The loss is contrast.supervised, the paper's L_out; encoder and head are those of SimCLR.  Images without a label, in a set
that has labels, are each a class of their own, as in SimCLR.
"""

import dataclasses

import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.methods import simclr
from simclr_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class SupCon(Method):
  """`loss_options` is what contrast.supervised takes."""

  loss_options: dict

  def loss(self, outputs, extra, network, batch):
    labels = jnp.where(batch.label < 0, -1 - batch.index, batch.label)
    loss, metrics = contrast.supervised(outputs.z, labels=labels, **self.loss_options)
    return loss, metrics, {}


def create(config, mesh, source=None) -> SupCon:
  """The method of `config.loss`: temperature, normalize and precision.

  Raises:
    ValueError: the training images have no labels.
  """
  if source is not None and not source.num_classes:
    raise ValueError(
      f"config.method='supcon' learns from labels and {config.data.train} has none: expected a data set with classes, or"
      " config.method=simclr"
    )
  options = {key: config.loss[key] for key in ("normalize", "precision") if config.loss[key] is not None}
  return SupCon({"temperature": simclr.temperature(config), **options})
