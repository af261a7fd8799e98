"""Every test sees 8 virtual CPU devices, with the XLA flags that `simclr` itself sets on a CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
)
