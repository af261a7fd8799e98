"""What makes training on a CPU fast, set before jax is imported."""

import glob
import os

# XLA:CPU sends single convolutions down a slow path; this takes that path away and about doubles a ResNet's step.
CPU_XLA_FLAGS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"

_ACCELERATORS = ("/dev/nvidia*", "/dev/accel*", "/dev/vfio*")


def prepare() -> str | None:
  """Sets XLA_FLAGS to CPU_XLA_FLAGS if the run will be on a CPU; call it before jax is imported.

  A run will be on a CPU if JAX_PLATFORMS is cpu or, with JAX_PLATFORMS unset, if the machine shows no accelerator.
  XLA_FLAGS that the user has set are left alone.

  Returns:
    the line to print that says what was set, or None if nothing was.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms:
    on_cpu = platforms == "cpu"
  else:
    on_cpu = not any(glob.glob(pattern) for pattern in _ACCELERATORS)
  if not on_cpu or "XLA_FLAGS" in os.environ:
    return None
  os.environ["XLA_FLAGS"] = CPU_XLA_FLAGS
  return (
    f"CPU run: set XLA_FLAGS={CPU_XLA_FLAGS} (faster convolutions; set XLA_FLAGS yourself to keep your own)"
  )
