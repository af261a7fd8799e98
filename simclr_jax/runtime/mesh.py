"""Placement of arrays: one mesh axis, `data`; batches are split over it, everything else is copied to every device."""

import functools
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simclr_jax.runtime.errors import UserError


def make_mesh(devices=None) -> Mesh:
  """A one-axis mesh `data` over `devices` (default: all devices of all processes).

  The axis type is Auto: the compiler places the collectives, so statistics and losses over the global batch are the
  plain formulas.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def check_devices():
  """Raises UserError, in one line, if JAX finds no devices, for example if JAX_PLATFORMS names one that is not there."""
  try:
    jax.devices()
  except Exception as error:  # RuntimeError, or an AssertionError without a word
    why = (
      " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())[:300].rstrip(".")
      or "this JAX has no such backend"
    )
    given = os.environ.get("JAX_PLATFORMS")
    setting = f"JAX_PLATFORMS={given}" if given else "JAX_PLATFORMS is not set"
    raise UserError(
      f"{setting}: no devices ({why}); install JAX for them, unset the variable, or set it to cpu"
    ) from None


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over all devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, tree):
  """Shardings that split axis 0 of every leaf over all devices; leaves whose size is not a multiple are replicated."""
  split = lambda leaf: batch_sharding(mesh) if leaf.ndim and leaf.shape[0] % mesh.size == 0 else replicated(mesh)  # noqa: E731
  return jax.tree.map(split, tree)


def zero1(mesh: Mesh, opt_state):
  """Shardings for an optimizer state of which every device keeps a part (ZeRO stage 1, arXiv 1910.02054).

  A leaf is split along its longest axis that the number of devices divides; if there is none, it is replicated.
  Each part of a parameter's update is then computed where that part of the state is, and gathered.
  """

  def split(leaf):
    axes = [a for a in range(leaf.ndim) if leaf.shape[a] % mesh.size == 0 and leaf.shape[a]]
    if not axes:
      return replicated(mesh)
    longest = max(axes, key=lambda a: leaf.shape[a])
    return NamedSharding(mesh, PartitionSpec(*(["data" if a == longest else None for a in range(leaf.ndim)])))

  return jax.tree.map(split, opt_state)


def global_batch(mesh: Mesh, local):
  """A tree of this process's numpy rows [b_local, ...] -> the global arrays [b, ...], split over `data`.

  Leaves that are already JAX arrays, such as images on the devices, are left as they are.
  """
  sharding = batch_sharding(mesh)
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else put(x), local)


def check_divisible(batch_size: int, mesh: Mesh, name: str = "batch_size"):
  """Raises ValueError unless every device gets the same number of images."""
  if batch_size % mesh.size:
    below, above = batch_size // mesh.size * mesh.size, -(-batch_size // mesh.size) * mesh.size
    nearest = " or ".join(str(b) for b in (below, above) if b)
    raise UserError(f"{name}={batch_size} cannot be split over {mesh.size} devices: use {nearest}")
