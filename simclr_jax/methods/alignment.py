"""Alignment alone: the two views of an image are pulled together, and nothing keeps the images apart.

This is SimCLR's loss without negatives, or BYOL without predictor and target network: the loss is lowest when
all images have the same embedding, and training gets there (SimSiam, arXiv 2011.10566, section 4.1).  It is included to show
collapse.
"""

import dataclasses

import jax.numpy as jnp

from simclr_jax import contrast
from simclr_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Alignment(Method):
  """The distance of the two views."""

  chance_loss = None  # a collapsed network has the least loss: there is no level to compare it with

  def loss(self, outputs, extra, network, batch):
    """The mean over images of |z - z'|^2 = 2 - 2 cos(z, z'), unit vectors."""
    cosine = jnp.sum(jnp.prod(contrast.l2_normalize(outputs.z), axis=1), -1)
    return jnp.mean(2 - 2 * cosine), {"positive_similarity": jnp.mean(cosine)}, {}


def create(config, mesh, source=None) -> Alignment:
  """The method, which has no options."""
  return Alignment()
