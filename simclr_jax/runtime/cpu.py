"""A machine without an accelerator: tells JAX before it starts, and sets what makes training on a CPU fast."""

import ctypes
import glob
import os

# XLA:CPU sends single convolutions down a slow path; without it a step takes about half the time.
CPU_XLA_FLAGS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

# NVIDIA, the same in WSL, AMD, TPU.
_ACCELERATORS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio*")
# mallopt(3): never hand freed memory back to the kernel, take none by mmap, and share one arena (others use mmap).
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}

# Its defaults; the threshold above which mmap is used is the largest to which it would have risen by itself.
_AS_USUAL = {"M_TRIM_THRESHOLD": (-1, 64 << 20), "M_MMAP_THRESHOLD": (-3, 32 << 20), "M_MMAP_MAX": (-4, 65536)}
LARGE = 1 << 30  # bytes
_kept = False  # whether malloc was told so


def choose_platform() -> bool:
  """Sets JAX_PLATFORMS=cpu if it is unset and the machine shows no accelerator; call it before jax is imported.

  JAX would find out by itself, but only after plugins such as libtpu have looked for their devices and complained.

  Returns:
    whether the run will be on a CPU.
  """
  if not os.environ.get("JAX_PLATFORMS") and not any(glob.glob(pattern) for pattern in _ACCELERATORS):
    os.environ["JAX_PLATFORMS"] = "cpu"
  return os.environ.get("JAX_PLATFORMS") == "cpu"


def prepare() -> str | None:
  """`choose_platform` and, on a CPU, XLA's flags and malloc's parameters; call it before jax is imported.

  Variables that the user has set, XLA_FLAGS or any of malloc's, are left alone.

  Returns:
    the line to print that says what was set, or None if nothing was.
  """
  if not choose_platform():
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
  global _kept
  _kept = all([mallopt(parameter, value) for parameter, value in _MALLOPT.values()])
  return _kept


def make_room(program_bytes: int | None) -> bool:
  """Undoes what `prepare` told malloc, if a program is LARGE, and returns freed memory to the kernel.

  When malloc keeps memory, small arrays end up between the temporaries of two steps, so the temporaries of the next step do
  not fit there and the process grows to three or four times their size.  Without that a step takes up to a fifth longer, but
  the kernel does not kill the run.

  Returns:
    whether anything was undone.
  """
  global _kept
  if not _kept or (program_bytes or 0) < LARGE:
    return False
  libc = ctypes.CDLL(None)
  for parameter, value in _AS_USUAL.values():
    libc.mallopt(parameter, value)
  libc.malloc_trim(0)
  _kept = False
  return True
