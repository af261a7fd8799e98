"""The folder of an export: it appears complete, under a free name, with a card and the digests of its files.

Layout: <folder>/{card.json, manifest.json}, the files of its format, and what opens it without this package.
"""

import contextlib
import json
import os

from etils import epath

from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.errors import UserError

SCHEMA_VERSION = 2  # of card.json, docs/card.schema.json; version 1 called the key card_version
LARGEST = 8192  # side of the images that a card may speak of, in pixels
# What opening an encoder needs of its card, and how the types are called in JSON.
_NEEDED = {"architecture": dict, "preprocessing": dict, "pretraining": dict, "feature_dimension": int}
_KINDS = {dict: "an object", int: "a number"}


def check_vacant(path, *, overwrite: bool) -> epath.Path:
  """The absolute path of an export to be written.

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set, or what it holds is neither an export nor the rest of one.
  """
  path = files.absolute(path)
  if path.exists() and not path.is_dir():
    raise UserError(f"{path} is a file: name a folder")
  if not files.is_remote(path) and os.path.islink(path):
    raise UserError(f"{path} is a symbolic link to {os.path.realpath(path)}: name that folder, or delete the link")
  if path.exists() and any(path.iterdir()):
    if not overwrite:
      raise UserError(f"{path} is not empty: add --overwrite or name another folder")
    named = _named(path) | _named(_temporary(path))
    if "card.json" not in named:
      raise UserError(f"{path} has no card.json of an export, so it is not one: delete it yourself")
    if foreign := [name for name in checkpoint.not_in_manifest(path) if name not in named]:
      raise UserError(f"{path}/{foreign[0]} is not part of the export there: move it elsewhere, or name another folder")
  return path


def _temporary(path) -> epath.Path:
  return path.parent / f".{path.name}.tmp"


def _named(path) -> set[str]:
  """The files that the card and the manifest of an export name, of which one is enough; empty for another folder."""
  named = set()
  with contextlib.suppress(UserError, OSError):
    named.update(_read_json(path / "manifest.json"))
  with contextlib.suppress(UserError, OSError):
    if isinstance(digests := _read_json(path / "card.json").get("files"), dict):
      named.update(digests, ["card.json"])
  return named


def save_export(path, fill, *, overwrite: bool = False) -> epath.Path:
  """Makes the folder of an export: `fill(folder)` writes its files, card.json among them, under a temporary name.

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set, or it cannot be written.
    OSError: the disk is full.
  """
  path = check_vacant(path, overwrite=overwrite)
  temporary = _temporary(path)
  try:
    if path.exists() and not (path / "manifest.json").exists():  # while its temporary folder still says whose it is
      _delete(path)
    for left_behind in (temporary, _aside(path)):
      if left_behind.exists():
        left_behind.rmtree()
    temporary.mkdir(parents=True)
  except OSError as error:
    raise UserError(f"{path} cannot be written ({error.strerror or error}): name another folder") from None
  try:
    fill(temporary)
    checkpoint.seal(temporary)
  except Exception as error:
    full = files.disk_is_full(error, temporary)
    temporary.rmtree(missing_ok=True)
    if full:
      raise OSError(f"could not write {path}: the disk is full; free space or name another folder") from None
    raise
  _replace(path, temporary)
  return path


def _replace(path, temporary):
  """Gives the temporary folder its final name, which an older export may have.

  A process may be killed at any point of this.  On a disk `path` is then one of the two, or there is none.  In a bucket, where
  renaming a folder copies its files, it may be part of one, which `check_vacant` recognizes by what it or the temporary folder
  names.
  """
  if files.is_remote(path):
    if path.exists():
      _delete(path)
    temporary.rename(path)
    return
  aside = _aside(path)
  if path.exists():
    path.rename(aside)
  temporary.rename(path)
  aside.rmtree(missing_ok=True)


def _aside(path) -> epath.Path:
  return path.parent / f".{path.name}.old.tmp"


def _delete(path):
  """Deletes an export, and last of all the files that name the others."""
  for entry in path.iterdir():
    if entry.name not in ("card.json", "manifest.json"):
      entry.rmtree() if entry.is_dir() else entry.unlink()
  path.rmtree()


def write_card(path, card: dict):
  """card.json of the export in the folder `path`; `files` becomes the SHA-256 of every file that is there now."""
  digests = checkpoint.digests(path)
  digests.pop("card.json", None)
  card = {"schema_version": SCHEMA_VERSION, **card, "files": digests}
  files.write_text(path / "card.json", json.dumps(card, indent=2, sort_keys=True))


def read_card(path) -> dict:
  """card.json of an export, after checking that its files are those that were written.

  A folder may come from anybody: nothing in it is run, and only plain files inside it are read.

  Raises:
    ValueError: it is not such a folder or is damaged, or its card has an unknown version or lacks an entry.
  """
  path = files.absolute(path)
  card_path = path / "card.json"
  if not card_path.exists():
    raise UserError(f"{path} is not an exported encoder (card.json is missing): give the folder `simclr export` wrote")
  card = _read_json(card_path)
  version = card.get("schema_version", card.get("card_version"))
  if version not in range(1, SCHEMA_VERSION + 1):
    raise UserError(f"{card_path}: schema_version {version}, this package reads 1 to {SCHEMA_VERSION}")
  for key, kind in _NEEDED.items():
    if not isinstance(value := card.get(key), kind):
      raise UserError(f"{card_path}: {key} is {value!r}, expected {_KINDS[kind]}; export it again")
  size = card["preprocessing"].get("size")
  if type(size) is not int or not 0 < size <= LARGEST:
    raise UserError(f"{card_path}: preprocessing.size is {size!r}, expected 1 to {LARGEST} pixels; export it again")
  for name in _read_json(path / "manifest.json") if (path / "manifest.json").exists() else ():
    if name.startswith("/") or ".." in name.split("/"):
      raise UserError(f"{path}/manifest.json names {name}, which is not inside the folder: do not trust it")
    _check_plain(path / name)
  checkpoint.verify(path)
  return card


def _check_plain(path):
  """Raises UserError for a pipe, a device or the like, of which reading would not end."""
  if not files.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f"{path} is not a plain file: do not trust this folder")


def _read_json(path) -> dict:
  """What is in a JSON file of an export, which has to be an object."""
  _check_plain(path)
  try:
    value = json.loads(path.read_text())
  except ValueError:  # UnicodeDecodeError too
    value = None
  if not isinstance(value, dict):
    raise UserError(f"{path} is damaged: it is not the JSON that was written; export it again")
  return value
