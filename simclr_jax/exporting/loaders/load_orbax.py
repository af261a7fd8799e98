"""h of this folder with jax, flax and Orbax: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import orbax.checkpoint as ocp
from card_check import checked, read_card
from from_variables import from_variables

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "orbax-checkpoint")


def load():
  card = read_card()
  there = [name for name in ("encoder", "projector") if (HERE / name).exists()]
  trees = {name: ocp.StandardCheckpointer().restore(HERE / name) for name in there}
  return checked(from_variables(trees, card), card)
