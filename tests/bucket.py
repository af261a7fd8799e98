"""gs:// without a network: a folder that is taken for all buckets, with the manners of an object store."""

import contextlib
import os
import shutil
from unittest import mock

from etils.epath import backend, gpath
from fsspec.implementations import local

from simclr_jax.runtime import files, lock


class Buckets(local.LocalFileSystem):
  """Folders need not be made, and are gone with their last file; an object has a generation and cannot grow.  Renaming
  a folder copies its files and deletes them."""

  root: str  # of a subclass

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(os.fspath(path).replace("gs://", cls.root))

  def open(self, path, mode="rb", **options):
    if "r" not in mode:
      self._make_parent(path)
    return super().open(path, mode.replace("a", "w"), **options)

  def mv(self, path1, path2, **options):
    self._make_parent(path2)
    if not os.path.isdir(self._strip_protocol(path1)):
      return super().mv(path1, path2, **options)
    shutil.copytree(*map(self._strip_protocol, (path1, path2)), copy_function=shutil.copyfile, dirs_exist_ok=True)
    shutil.rmtree(self._strip_protocol(path1))

  def _make_parent(self, path):
    os.makedirs(os.path.dirname(self._strip_protocol(path)), exist_ok=True)

  def mkdir(self, path, create_parents=True, **options):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def exists(self, path, **options):
    path = self._strip_protocol(path)
    return os.path.isfile(path) or any(names for _, _, names in os.walk(path))

  def isdir(self, path):
    return self.exists(path) and super().isdir(path)

  def ls(self, path, detail=False, **options):
    found = super().ls(path, detail=detail, **options)
    return [one for one in found if self.exists(one["name"] if detail else one)]

  def glob(self, path, **options):
    return [found.replace(self.root, "") for found in super().glob(path, **options)]

  def info(self, path, **options):
    status = os.stat(self._strip_protocol(path))
    return {**super().info(path, **options), "generation": f"{status.st_ino}.{status.st_mtime_ns}"}

  def look_at_bucket(self, path):
    pass

  def read_part(self, path, begin, length, generation):
    if self.info(path)["generation"] != generation:
      raise FileExistsError(path)
    return self.cat_file(path, begin, begin + length)

  def remove_generation(self, path, generation):
    if self.info(path)["generation"] != generation:
      raise FileExistsError(path)
    self.rm(path)


class _Backend(type(backend.fsspec_backend)):
  def __init__(self, buckets):
    self._buckets = buckets

  def fs(self, path):
    return self._buckets


@contextlib.contextmanager
def buckets(root):
  """Within it gs://NAME/... lies in the folder NAME below `root`."""
  client = type("Buckets", (Buckets,), {"root": f"{root}/"})()
  fake = _Backend(client)
  with (
    mock.patch.object(gpath, "_PREFIX_TO_BACKEND", {"gs": fake, None: backend.os_backend}),
    mock.patch.object(gpath, "_GCS_BACKENDS", {fake}),
    mock.patch.object(gpath, "_is_tf_installed", lambda: False),
    mock.patch.object(files, "_bucket", lambda: client),
    mock.patch.object(files, "_has_gcsfs", lambda: True),
  ):
    try:
      yield
    finally:
      lock.release_all()  # or it happens when the process ends, at the real gs://
