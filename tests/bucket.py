"""gs:// without a network: a folder that epath takes for all buckets, with the manners of an object store."""

import contextlib
import os
from unittest import mock

from etils.epath import backend, gpath

from simclr_jax.runtime import lock


class Buckets(backend._OsPathBackend):
  """Folders need not be made, and appending writes a new object, as it does with gcsfs."""

  def __init__(self, root):
    self._root = f"{root}/"

  def _local(self, path):
    return os.fspath(path).replace("gs://", self._root)

  def open(self, path, mode):
    local = self._local(path)
    if "r" not in mode:
      os.makedirs(os.path.dirname(local), exist_ok=True)
    return super().open(local, mode.replace("a", "w"))

  def makedirs(self, path, *, exist_ok=False, mode=None):
    pass

  def mkdir(self, path, *, exist_ok=False, mode=None):
    pass

  def exists(self, path):
    return super().exists(self._local(path))

  def isdir(self, path):
    return super().isdir(self._local(path))

  def listdir(self, path):
    return super().listdir(self._local(path))

  def glob(self, path):
    return [found.replace(self._root, "gs://") for found in super().glob(self._local(path))]

  def rmtree(self, path):
    super().rmtree(self._local(path))

  def remove(self, path):
    super().remove(self._local(path))

  def rename(self, path, dst):
    super().rename(self._local(path), self._local(dst))

  def replace(self, path, dst):
    super().replace(self._local(path), self._local(dst))

  def copy(self, path, dst, overwrite):
    os.makedirs(os.path.dirname(self._local(dst)), exist_ok=True)
    super().copy(self._local(path), self._local(dst), overwrite)

  def stat(self, path):
    return super().stat(self._local(path))


@contextlib.contextmanager
def buckets(root):
  """Within it gs://NAME/... lies in the folder NAME below `root`."""
  fake = Buckets(root)
  with (
    mock.patch.object(gpath, "_PREFIX_TO_BACKEND", {"gs": fake, None: backend.os_backend}),
    mock.patch.object(gpath, "_GCS_BACKENDS", {fake}),
    mock.patch.object(gpath, "_is_tf_installed", lambda: False),
  ):
    try:
      yield
    finally:
      lock.release_all()  # or it happens when the process ends, at the real gs://
