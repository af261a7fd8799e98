"""Limits of the operating system for this process, checked before anything runs into them."""

import contextlib
import resource

from simclr_jax.runtime.errors import UserError

FILES = 256  # open at a time; small runs have been seen to hang with 64
ADDRESSES = 4 << 30  # bytes of address space; with 3 GiB the smallest recipe runs out of it while it compiles


def check():
  """Raises this process's limit of open files as far as possible; XLA, TensorFlow and Orbax hang when they run out.

  Raises:
    UserError: the limit is still too low, or there is too little address space.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
  if soft != resource.RLIM_INFINITY and soft < most:
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
      soft = most
  if soft != resource.RLIM_INFINITY and soft < FILES:
    raise UserError(f"this process may open {soft} files at a time and needs {FILES}: raise it with ulimit -n")
  space, _ = resource.getrlimit(resource.RLIMIT_AS)
  if space != resource.RLIM_INFINITY and space < ADDRESSES:
    raise UserError(
      f"this process may use {space / (1 << 30):.1f} GiB of address space and needs {ADDRESSES >> 30}: raise it with ulimit -v"
    )
