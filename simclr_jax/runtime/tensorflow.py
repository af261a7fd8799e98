"""TensorFlow without its start-up messages, and kept off the accelerators, which JAX uses, whoever imports it first."""

import functools
import importlib.abc
import importlib.util
import os
import sys
import tempfile


def quieten():
  """Call it before anything that might import TensorFlow; it imports nothing itself."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if "tensorflow" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
  """Finds TensorFlow as Python would, and wraps the execution of its module.

  It stays, for some libraries only ask whether TensorFlow is there.
  """

  asking = False

  def find_spec(self, name, path, target=None):
    if name != "tensorflow" or self.asking:
      return None
    self.asking = True
    try:
      spec = importlib.util.find_spec(name)
    finally:
      self.asking = False
    if spec and spec.loader:
      spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)
    return spec


def _execute(execute, module):
  """TensorFlow 2.21 writes to file descriptor 2 before it reads TF_CPP_MIN_LOG_LEVEL; what it wrote is shown if it fails."""
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as chatter:
    os.dup2(chatter.fileno(), 2)
    try:
      execute(module)
      module.config.set_visible_devices([], "GPU")
    except BaseException:
      chatter.seek(0)
      os.write(stderr, chatter.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
