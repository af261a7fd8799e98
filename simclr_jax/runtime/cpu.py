"""What makes training on a CPU fast, set before jax starts."""

import ctypes
import glob
import os

# XLA:CPU sends single convolutions down a slow path; without it a step takes about half the time.
CPU_XLA_FLAGS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

_ACCELERATORS = ("/dev/nvidia*", "/dev/accel*", "/dev/vfio*")
# mallopt(3): never hand freed memory back to the kernel, take none by mmap, and share one arena (others use mmap).
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def prepare() -> str | None:
  """Sets XLA's flags and malloc's parameters if the run will be on a CPU; call it first, before jax is imported.

  A run will be on a CPU if JAX_PLATFORMS is cpu or, with JAX_PLATFORMS unset, if the machine shows no accelerator.
  What the user has set in the environment, XLA_FLAGS or any of malloc's variables, is left alone.

  Returns:
    the line to print that says what was set, or None if nothing was.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms:
    on_cpu = platforms == "cpu"
  else:
    on_cpu = not any(glob.glob(pattern) for pattern in _ACCELERATORS)
  if not on_cpu:
    return None
  done = []
  if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = CPU_XLA_FLAGS
    done.append(f"XLA_FLAGS={CPU_XLA_FLAGS}")
  if _keep_freed_memory():
    done.append("malloc keeps freed memory")
  return f"CPU run, for speed: {'; '.join(done)}" if done else None


def _keep_freed_memory() -> bool:
  """Lets the temporaries of a step, hundreds of MB, reuse those of the step before.

  Otherwise glibc returns them to the kernel after each step, which then has to zero every page anew: a tenth of the
  time of a step of a small network.
  """
  if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):  # not glibc
    return False
  return all([mallopt(parameter, value) for parameter, value in _MALLOPT.values()])
