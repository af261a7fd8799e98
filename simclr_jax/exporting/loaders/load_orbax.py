"""h of this folder with jax, flax and Orbax: images float32 [n, h, w, 3] in [0, 1] -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
from resnet import resnet

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "orbax-checkpoint")


def load():
  card = json.loads((HERE / "card.json").read_text())
  architecture = {key: value for key, value in card["architecture"].items() if key != "name"}
  encoder = resnet(**architecture | {"dtype": "float32"})
  variables = ocp.StandardCheckpointer().restore(HERE / "encoder")
  if "projector" in card:
    from head import Projector

    head, head_variables = Projector(**card["projector"]), ocp.StandardCheckpointer().restore(HERE / "projector")

  @jax.jit
  def encode(images):
    with jax.default_matmul_precision("highest"):
      h = encoder.apply(variables, images, train=False)
      return (h, head.apply(head_variables, h)) if "projector" in card else h

  return encode
