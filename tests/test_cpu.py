"""Memory that malloc was told to keep goes back to the kernel where a program is large."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import re
from simclr_jax.runtime import cpu
assert not cpu.make_room(cpu.LARGE)  # nothing was set
print(cpu.prepare())
import numpy as np

def resident():
  return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MB

arrays = [np.ones(1 << 20) for _ in range(40)]  # 8 MB each
after = np.ones(10)
del arrays
kept = resident()
print(cpu.make_room(cpu.LARGE - 1), kept - resident() > 250)
print(cpu.make_room(cpu.LARGE), kept - resident() > 250)
assert not cpu.make_room(cpu.LARGE) and not cpu.make_room(None)  # done already
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_large_program_gets_the_memory_that_malloc_keeps():
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
  environment["JAX_PLATFORMS"] = "cpu"
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
  said, small, large = done.stdout.splitlines()
  assert "malloc keeps freed memory" in said and small == "False False" and large == "True True"
