"""Image files in folders, labeled by subfolder or not at all."""

import collections
import errno
import os

import numpy as np

from simclr_jax.data.decode import IMAGE_SUFFIXES, MAX_BYTES, BadImage, ReadError, is_junk, sniff
from simclr_jax.data.labels import make_labels
from simclr_jax.data.sources import Source, say_once, skipped_text, spread
from simclr_jax.runtime import files as files_lib
from simclr_jax.runtime.errors import UserError

SIZES = 10_000  # files whose sizes are part of a fingerprint: seconds where a look at each of a million takes minutes


class FilesSource(Source):
  """Every image file at any depth below a folder, in sorted order, without labels.

  Hidden folders and those made by systems are left out.  A file counts as an image if it has the suffix of a readable format,
  or has no suffix and begins like an image.  Other files, such as HEIC, are in `skipped` and in one line of the log.
  """

  kind = "files"

  def __init__(self, path: str):
    self._root = os.path.abspath(os.path.expanduser(path))
    self._labels, self.skipped = None, []
    if not os.path.isdir(self._root):
      raise UserError(f"{self.kind}:{path}: there is no folder {self._root}; give the path of a folder of images")
    self._files = self._find(path)
    said = skipped_text(self.skipped)
    if not self._files:
      raise UserError(
        f"{self.kind}:{path}: no image in or below {self._root}; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        + (f"; {said}" if said else "")
      )
    if said:
      say_once(f"{self.kind}:{files_lib.printable(path)}: {said}")

  def _find(self, path) -> list[str]:
    """The paths from the root of the image files."""
    return self._below([""])[0]

  @property
  def labels(self):
    return self._labels

  def __len__(self):
    return len(self._files)

  def _path(self, i):
    return os.path.join(self._root, self._files[i])

  def name(self, i):
    return files_lib.printable(self._path(i))

  def name_in_set(self, i):
    return self._files[i]

  def _listing(self):
    yield from self._files
    for i in spread(len(self), SIZES).tolist():
      try:
        yield str(os.path.getsize(self._path(i)))
      except OSError:
        yield ""

  def item(self, i):
    try:
      with open(self._path(i), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
          raise BadImage(f"{size:,} bytes, above the limit of {MAX_BYTES:,} for an image")
        return file.read(), -1 if self._labels is None else int(self._labels[i])
    except OSError as error:
      # A link to nothing and a file that may not be read stay so; what is gone, or does not answer, may come back.
      stays = error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM) and os.path.lexists(self._path(i))
      raise (BadImage if stays else ReadError)(error.strerror or str(error)) from error

  def places(self, rows=None):
    root, found = os.path.realpath(self._root), collections.defaultdict(list)
    for name in self._files if rows is None else (self._files[i] for i in rows):
      folder, _, name_in_it = name.rpartition("/")  # os.path.split takes seconds for a million
      found[folder].append(name_in_it)
    return {os.path.join(root, folder).rstrip("/"): np.asarray(names, object) for folder, names in found.items()}

  def _below(self, folders: list[str]) -> list[list[str]]:
    """For each of some folders of the root, the sorted paths from the root of the image files at any depth below it.

    A folder below them that links lead to is listed once: where it is, or through a link if it is in none of them.
    """
    files, pending, links = [[] for _ in folders], collections.deque(enumerate(folders)), collections.deque()
    given, seen = set(folders), {self._target(folder) for folder in ("", *folders)}
    while pending or links:
      number, here = (pending or links).popleft()
      if here not in given:
        if (target := self._target(here)) in seen:
          continue
        seen.add(target)
      found, below = self._scan(here)
      files[number] += found
      for sub in below:
        (links if os.path.islink(os.path.join(self._root, sub)) else pending).append((number, sub))
    return [sorted(found) for found in files]

  def _target(self, folder: str) -> str:
    return os.path.realpath(os.path.join(self._root, folder))

  def _scan(self, folder: str) -> tuple[list[str], list[str]]:
    """Sorted paths, from the root, of the image files and of the folders directly inside a folder of it."""
    files, folders = [], []
    path = os.path.join(self._root, folder)
    try:
      with os.scandir(path) as entries:
        for entry in entries:
          name = os.path.join(folder, entry.name)
          if is_junk("", entry.name):
            continue
          try:
            if entry.is_dir():
              folders.append(name)
            elif entry.is_file() or entry.is_symlink():  # a link to nothing is named when it is read
              (files if _is_image(entry) else self.skipped).append(name)
          except OSError:  # a link to itself
            self.skipped.append(name)
    except OSError as error:
      reason = f"cannot be listed ({error.strerror}); check that it may be read"
      raise UserError(f"{self.kind}:{files_lib.printable(path)}: {reason}") from error
    return sorted(files), sorted(folders)


def _is_image(entry: os.DirEntry) -> bool:
  if os.path.splitext(entry.name)[1]:
    return entry.name.lower().endswith(IMAGE_SUFFIXES)
  try:
    with open(entry.path, "rb", buffering=0) as file:
      return sniff(file.read(256)) not in (None, "HEIC")
  except OSError:
    return False


class FolderSource(FilesSource):
  """Image files below a folder, in sorted order.

  Every subfolder (except hidden ones) is a class, in alphabetical order, and contains the images at any depth below it;
  empty ones count, so that a training and a validation folder number their classes alike.  Without subfolders, or
  when none holds an image, the images directly inside are unlabeled.  FilesSource says which files are images.
  """

  kind = "folder"

  def _find(self, path):
    loose, folders = self._scan("")
    files, labels = [], []
    for label, below in enumerate(self._below(folders)):
      files += below
      labels += [label] * len(below)
    if files and loose:
      raise UserError(
        f"folder:{path}: holds {len(loose)} images (such as {files_lib.printable(loose[0])}) next to class folders with images; move them"
        " into class folders, or keep images without labels in a folder of their own"
      )
    if files:
      names = map(files_lib.printable, folders)
      self._labels, self.class_names = make_labels(labels, names, what=f"folder:{path}: labels")
    return files or loose
