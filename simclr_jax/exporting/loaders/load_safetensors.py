"""h of this folder with jax, flax and safetensors: images float32 [n, h, w, 3] in [0, 1] -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

from flax import traverse_util
from from_variables import from_variables
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("jax", "flax", "safetensors")


def load():
  return from_variables(traverse_util.unflatten_dict(load_file(HERE / "model.safetensors"), sep="/"))
