"""h of this folder with jax, flax and Orbax: images float32 [n, h, w, 3] in [0, 1] -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import orbax.checkpoint as ocp
from from_variables import from_variables

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "orbax-checkpoint")


def load():
  there = [name for name in ("encoder", "projector") if (HERE / name).exists()]
  return from_variables({name: ocp.StandardCheckpointer().restore(HERE / name) for name in there})
