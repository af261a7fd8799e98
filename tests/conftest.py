"""Every test sees 8 virtual CPU devices, with the XLA flags that `simclr` itself sets on a CPU.

Most of the time goes into compiling programs that run for milliseconds, so the compiler optimizes nothing.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
  + " --xla_backend_optimization_level=1"
)
