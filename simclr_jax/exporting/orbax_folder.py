"""Orbax: the encoder's variables as this package reads them, and encoder.py, which needs jax and flax alone."""

import pathlib

from etils import epath

from simclr_jax import encoder, projector
from simclr_jax.runtime import checkpoint


def write(folder, export):
  checkpoint.save_trees(epath.Path(folder), export.trees())
  copy_model(folder, export)
  export.copy(folder, load="load_orbax.py")


def copy_model(folder, export):
  """from_variables.py, resnet.py, and head.py for the projector: the last two are this package's modules, which import
  nothing of it."""
  export.copy(folder, from_variables="from_variables.py", resnet=pathlib.Path(encoder.__file__).resolve())
  if export.projector:
    export.copy(folder, head=pathlib.Path(projector.__file__).resolve())
