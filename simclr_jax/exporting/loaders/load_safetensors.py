"""h of this folder with jax, flax and safetensors: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

from card_check import checked, read_card
from flax import traverse_util
from from_variables import from_variables
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "safetensors")


def load():
  card = read_card()
  trees = traverse_util.unflatten_dict(load_file(HERE / "model.safetensors"), sep="/")
  return checked(from_variables(trees, card), card)
