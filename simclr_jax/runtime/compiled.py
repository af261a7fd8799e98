"""Where JAX keeps compiled programs, so that a resumed run does not compile them again.

A compiled program is machine code that runs as it is, whatever the config says.  So it is never read from a workdir,
which may come from anybody, but from a folder of this user to which nobody else can write.
"""

import os
import stat
import sys
import time

from simclr_jax.runtime import files

KEPT_DAYS = 30  # after which a program is deleted


def prepare():
  """Tells JAX the folder, which it reads when it is imported; JAX_COMPILATION_CACHE_DIR overrides it.

  Nothing is kept if the folder cannot be made, or if others can write to it.
  """
  if "jax" in sys.modules:
    return
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = files.user_cache() / "compiled"
    try:
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      if not (_is_mine(folder) and _is_mine(folder.parent)) or folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
      folder.parent.chmod(0o700)  # or the folder could be put in another's place, under a umask such as 002
      for program in folder.iterdir():
        if time.time() - program.stat().st_mtime > 86400 * KEPT_DAYS:
          program.unlink()
    except OSError:  # no home, a read-only one, or another process has deleted the same program
      return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # XLA's own, on GPUs, know no gs://


def _is_mine(path) -> bool:
  return path.stat().st_uid == os.geteuid()
