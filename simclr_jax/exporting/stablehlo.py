"""StableHLO by jax.export: one program for CPU, CUDA and TPU and any batch size, and the weights that go into it.

jax guarantees to read such a program for six months after it was written, no longer: a convenience, never the archive.
The weights are arguments, so that they stay readable by themselves and no size limit of the program applies.
"""

import jax
import numpy as np
from flax import traverse_util
from jax import export as jax_export

PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder, export):
  flat = {key: np.asarray(x) for key, x in traverse_util.flatten_dict(export.trees(), sep="/").items()}

  def encode(weights, images):
    return export.apply(traverse_util.unflatten_dict(weights, sep="/"), images)

  (n,) = jax_export.symbolic_shape("n")
  images = jax.ShapeDtypeStruct((n, export.size, export.size, 3), np.float32)
  program = jax_export.export(jax.jit(encode), platforms=PLATFORMS)(flat, images)
  (folder / "encode.stablehlo").write_bytes(program.serialize())
  np.savez(folder / "weights.npz", **flat)
  export.copy(folder, load="load_stablehlo.py")
