"""The variables of this folder as a function of images: resnet.py applied to them, and head.py if the head is here."""

import jax
from resnet import resnet


def from_variables(trees, card):
  """images float32 [n, h, w, 3] in [0, 1] -> h [n, d], or (h, z); `trees` maps "encoder" (and "projector") to variables."""
  encoder = resnet(
    **{key: value for key, value in card["architecture"].items() if key != "name"} | {"dtype": "float32"}
  )
  if "projector" in card:
    from head import Projector

    head = Projector(**card["projector"])

  @jax.jit
  def encode(images):
    with jax.default_matmul_precision("highest"):
      h = encoder.apply(trees["encoder"], images, train=False)
      return (h, head.apply(trees["projector"], h)) if "projector" in card else h

  return encode
