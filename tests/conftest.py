"""Every test sees 8 virtual CPU devices, with the XLA flags that `simclr` itself sets on a CPU.

Most of the time goes into compiling programs that run for milliseconds.  So the compiler optimizes little, what it has made
is kept for all tests of the session, and tests of what does not depend on the number of devices ask for `one_device`.
"""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # two that wait for each other on a busy core take five times as long
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what follows
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    + " --xla_backend_optimization_level=1"
  )
  programs = tempfile.mkdtemp(prefix="simclr_jax_compiled_")
  atexit.register(shutil.rmtree, programs, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
  os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture(scope="module")
def one_device():
  """Programs use one device unless a test names others: compiling for eight takes three times as long."""
  import jax

  from simclr_jax.runtime import mesh

  make = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      mesh, "make_mesh", lambda devices=None: make(jax.devices()[:1] if devices in (None, jax.devices()) else devices)
    )
    yield
