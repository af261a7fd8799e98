"""The variables of this folder as a function of images: resnet.py or vit.py applied to them, and head.py if it is here."""

import importlib

import jax


def from_variables(trees, card):
  """images float32 [n, h, w, 3] in [0, 1] -> h [n, d], or (h, z); `trees` maps "encoder" (and "projector") to variables."""
  arguments = dict(card["architecture"])
  name = arguments.pop("name")
  encoder = getattr(importlib.import_module(name), name)(**arguments | {"dtype": "float32"})
  if "projector" in card:
    from head import Projector

    head = Projector(**card["projector"])

  @jax.jit
  def encode(images):
    with jax.default_matmul_precision("highest"):
      h = encoder.apply(trees["encoder"], images, train=False)
      return (h, head.apply(trees["projector"], h)) if "projector" in card else h

  return encode
