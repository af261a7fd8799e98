"""Orbax: the encoder's variables as this package reads them, and encoder.py or vit.py, which need jax and flax alone."""

import pathlib

from etils import epath

from simclr_jax import encoder, projector, vit
from simclr_jax.runtime import checkpoint


def write(folder, export):
  checkpoint.save_trees(epath.Path(folder), export.trees())
  copy_model(folder, export)
  export.copy(folder, load="load_orbax.py")


def copy_model(folder, export):
  """from_variables.py, resnet.py or vit.py, and head.py for the projector: the last are this package's modules, which
  import nothing of it."""
  name = export.card["architecture"]["name"]
  network = {"resnet": encoder, "vit": vit}[name]
  export.copy(folder, from_variables="from_variables.py", **{name: pathlib.Path(network.__file__).resolve()})
  if export.projector:
    export.copy(folder, head=pathlib.Path(projector.__file__).resolve())
