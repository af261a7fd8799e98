"""Memory that malloc was told to keep goes back to the kernel when it is asked for."""

import subprocess
import sys

import pytest

PROGRAM = """
import re
from simclr_jax.runtime import cpu
print(cpu.prepare())
import numpy as np

def resident():
  return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MB

arrays = [np.ones(1 << 20) for _ in range(40)]  # 8 MB each
after = np.ones(10)
del arrays
kept = resident()
cpu.give_back_memory()
print(kept - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_kept_memory_can_be_given_back():
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
  said, given_back = done.stdout.splitlines()
  assert "malloc keeps freed memory" not in said or float(given_back) > 250
