"""Image files in folders, labeled by sub-folder or not at all."""

import os

from simclr_jax.data.decode import IMAGE_SUFFIXES, BadImage, is_junk
from simclr_jax.data.labels import make_labels
from simclr_jax.data.sources import Source, spread
from simclr_jax.runtime.errors import UserError

SIZES = 10_000  # files whose sizes are part of a fingerprint: seconds where a look at each of a million takes minutes


class FolderSource(Source):
  """Image files below a folder, in sorted order.

  Every sub-folder (hidden ones apart) is a class, in alphabetical order, and owns the images at any depth below it;
  empty ones count, so that a training and a validation folder number their classes alike.  Without sub-folders, or
  when none holds an image, the images directly inside are unlabeled.  Files without an image's suffix are ignored.
  """

  def __init__(self, path: str):
    self._root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(self._root):
      raise UserError(f"folder:{path}: there is no folder {self._root}; give the path of a folder of images")
    loose, folders = _scan_folder(self._root)
    self._files, labels = [], []
    for label, folder in enumerate(folders):
      files = _below(self._root, folder)
      self._files += files
      labels += [label] * len(files)
    if self._files and loose:
      raise UserError(
        f"folder:{path}: holds {len(loose)} images (such as {loose[0]}) beside class folders with images; move them"
        " into class folders, or keep images without labels in a folder of their own"
      )
    if not self._files and not loose:
      raise UserError(
        f"folder:{path}: no image in {self._root}; expected files ending in {' '.join(IMAGE_SUFFIXES)}, directly"
        " inside or in one sub-folder a class"
      )
    self._labels, self.class_names = None, ()
    if self._files:
      self._labels, self.class_names = make_labels(labels, folders, what=f"folder:{path}: labels")
    self._files = self._files or loose

  @property
  def labels(self):
    return self._labels

  def __len__(self):
    return len(self._files)

  def name(self, i):
    return os.path.join(self._root, self._files[i])

  def _listing(self):
    yield from self._files
    for i in spread(len(self), SIZES).tolist():
      try:
        yield str(os.path.getsize(os.path.join(self._root, self._files[i])))
      except OSError:
        yield ""

  def item(self, i):
    try:
      with open(self.name(i), "rb") as file:
        return file.read(), -1 if self._labels is None else int(self._labels[i])
    except OSError as error:
      raise BadImage(error.strerror or str(error)) from error


def _below(root: str, folder: str) -> list[str]:
  """Sorted paths, from root, of the image files at any depth below a folder of it."""
  files, pending = [], [folder]
  seen = {os.path.realpath(os.path.join(root, folder))}
  while pending:
    here = pending.pop()
    found, below = _scan_folder(os.path.join(root, here))
    files += [os.path.join(here, file) for file in found]
    for sub in (os.path.join(here, sub) for sub in below):
      target = os.path.realpath(os.path.join(root, sub))
      if target not in seen:  # a link may point at one of its parents
        seen.add(target)
        pending.append(sub)
  return sorted(files)


class FilesSource(FolderSource):
  """Every image file at any depth below a folder, in sorted order, without labels; hidden folders are left out."""

  def __init__(self, path: str):
    self._root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(self._root):
      raise UserError(f"files:{path}: there is no folder {self._root}; give the path of a folder of images")
    self._files, self._labels = _below(self._root, ""), None
    if not self._files:
      raise UserError(
        f"files:{path}: no image in or below {self._root}; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
      )


def _scan_folder(path: str) -> tuple[list[str], list[str]]:
  """Sorted names of the image files and of the folders directly inside `path`, without hidden and system ones."""
  files, folders = [], []
  try:
    with os.scandir(path) as entries:
      for entry in entries:
        if is_junk("", entry.name):
          continue
        if entry.is_dir():
          folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
          files.append(entry.name)
  except OSError as error:
    raise UserError(f"folder:{path}: cannot be listed ({error.strerror}); check that it may be read") from error
  return sorted(files), sorted(folders)
