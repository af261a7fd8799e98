"""Writing a file whole or not at all; to become runtime/files.py, which has the same functions."""

import os

from etils import epath


def write_bytes(path, content: bytes):
  """Writes all of a file or nothing: neither a reader nor a run that is killed ever leaves half a page."""
  path = epath.Path(path)
  partial = path.parent / f".{path.name}.{os.getpid()}.partial"
  try:
    partial.write_bytes(content)
    partial.rename(path) if "://" in str(path) else os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
