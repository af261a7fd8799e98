"""safetensors: the same variables in one file that many languages read and that cannot hold code.

Tensors are called by their paths, such as encoder/params/group1/block1/conv1/kernel; kernels are HWIO.
"""

from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from simclr_jax.exporting import orbax_folder
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

WEIGHTS = "model.safetensors"


def write(folder, export):
  save_file(traverse_util.flatten_dict(export.trees(), sep="/"), folder / WEIGHTS, metadata={"format": "np"})
  orbax_folder.copy_model(folder, export)
  export.copy(folder, load="load_safetensors.py")


def read(path) -> dict:
  """{"encoder": variables as numpy, and "projector" if it is there}.

  Raises:
    ValueError: the file is cut short or otherwise not one.
  """
  try:
    with files.local(path) as local:
      tensors = load_file(local)
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a complete safetensors file ({error}): export it again") from None
  return traverse_util.unflatten_dict(tensors, sep="/")
