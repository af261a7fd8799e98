"""h of this folder with jax, flax and safetensors: images float32 [n, h, w, 3] in [0, 1] -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import json
import pathlib

import jax
from flax import traverse_util
from resnet import resnet
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "safetensors")


def load():
  card = json.loads((HERE / "card.json").read_text())
  architecture = {key: value for key, value in card["architecture"].items() if key != "name"}
  encoder = resnet(**architecture | {"dtype": "float32"})
  trees = traverse_util.unflatten_dict(load_file(HERE / "model.safetensors"), sep="/")
  if "projector" in card:
    from head import Projector

    head = Projector(**card["projector"])

  @jax.jit
  def encode(images):
    with jax.default_matmul_precision("highest"):
      h = encoder.apply(trees["encoder"], images, train=False)
      return (h, head.apply(trees["projector"], h)) if "projector" in card else h

  return encode
