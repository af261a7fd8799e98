"""Checks that every device holds the same: all copies of replicated arrays must be equal bit for bit.

Nothing else would reveal a difference: a device with a flipped bit in its copy of the parameters computes other gradients
from then on, which are averaged with all others, and the loss keeps falling.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from simclr_jax.runtime import processes

ODD = 0x9E3779B1  # tells leaves apart that have changed places


def difference(mesh: Mesh, tree) -> str:
  """Compares the copies of every replicated array of `tree` on all devices of the mesh; every process calls it.

  It takes one pass over the arrays on each device, and four bytes of traffic from each.

  Returns:
    which devices have copies that differ from the majority, in words; empty if all are equal.
  """
  leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.size and x.sharding.is_fully_replicated]
  return named(mesh, processes.gather(_checksums(mesh)(leaves))) if mesh.size > 1 and leaves else ""


@functools.lru_cache
def _checksums(mesh):
  """[arrays] -> uint32 [devices], of each device's own copies; a flipped bit always changes it."""

  def of_one(leaves):
    total = jnp.uint32(0)
    for leaf in leaves:
      total = total * jnp.uint32(ODD) + jnp.sum(_words(leaf), dtype=jnp.uint32)
    return total[None]

  copies, split = PartitionSpec(), PartitionSpec("data")
  return jax.jit(jax.shard_map(of_one, mesh=mesh, in_specs=(copies,), out_specs=split, check_vma=False))


def _words(x):
  """The bits of an array as uint32, for types of up to 32 bits."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  bits = jnp.dtype(x.dtype).itemsize * 8
  return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def named(mesh: Mesh, sums) -> str:
  """What the checksums [devices], in the order of the mesh, say; empty if they are equal."""
  values, counts = np.unique(sums, return_counts=True)
  if len(values) == 1:
    return ""
  differing = [d for d, value in zip(mesh.devices.flat, sums, strict=True) if value != values[counts.argmax()]]
  if 2 * counts.max() <= len(sums):  # no copy is that of most
    differing = list(mesh.devices.flat)
  where = ", ".join(f"device {device.id} of process {device.process_index}" for device in differing[:4])
  more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
  return (
    f"the state is not the same on all {mesh.size} devices: {where}{more} differ from the others; a bit has flipped there or "
    "the device is broken"
  )
