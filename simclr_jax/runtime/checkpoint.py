"""Checkpoints: Orbax behind a few functions.

Layout of a run's checkpoint:  <workdir>/checkpoints/<step>/{state, encoder, config, manifest.json}
Layout of an Orbax export:     <folder>/{encoder/, card.json, manifest.json}, and what opens it without this package
Orbax writes under a temporary name and renames when complete, so a run that dies while saving keeps the last good step.
It does not notice a damaged file: a flipped bit loads as another number.  manifest.json holds the SHA-256 of every file;
it is written last, and nothing is loaded that does not agree with it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simclr_jax.runtime import processes

SCHEMA_VERSION = 2  # of card.json, docs/card.schema.json; version 1 called the key card_version


def absolute(path) -> epath.Path:
  """Orbax wants absolute paths, and gs:// ones as they are."""
  return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def folder(workdir) -> epath.Path:
  return absolute(workdir) / "checkpoints"


def claim_workdir(workdir, *, resume: bool, overwrite: bool) -> epath.Path:
  """The absolute workdir, made if needed.

  Raises:
    ValueError: the folder holds something and neither resume nor overwrite was asked for, or both were, or there is
      nothing to resume, or it cannot be written.
  """
  if resume and overwrite:
    raise ValueError("--resume and --overwrite contradict each other: give one of them")
  processes.on_first(lambda: _claim(workdir, resume or overwrite, overwrite))
  return absolute(workdir)


def _claim(workdir, filled_is_fine, overwrite):
  path = absolute(workdir)
  if path.exists() and not path.is_dir():
    raise ValueError(f"--workdir={workdir} is a file: name a folder")
  # Another process may have put a compiled program there already.
  filled = path.exists() and any(entry.name != "compiled" for entry in path.iterdir())
  if filled and not filled_is_fine:
    raise ValueError(
      f"--workdir={workdir} is not empty: add --resume to go on, --overwrite to start again, or name another"
    )
  if overwrite and filled:
    if not (path / "config.json").exists():
      raise ValueError(
        f"--workdir={workdir} --overwrite: the folder has no config.json, so it is no run; delete it yourself"
      )
    path.rmtree()
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.write_text("written and deleted")
    probe.unlink()
    (path / "COMPLETE").unlink(missing_ok=True)  # of the run before, which goes on
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} cannot be written ({error.strerror or error}): name another folder"
    ) from None


class Damaged(ValueError):
  """A checkpoint does not hold what was written."""


def _files(path, below=""):
  """Names of all files under `path`, but for its manifest."""
  for entry in sorted((path / below).iterdir()):
    name = f"{below}{entry.name}"
    if entry.is_dir():
      yield from _files(path, f"{name}/")
    elif name != "manifest.json":
      yield name


def _digest(file) -> str:
  sha = hashlib.sha256()
  with file.open("rb") as stream:
    while block := stream.read(1 << 22):
      sha.update(block)
  return sha.hexdigest()


def _seal(path):
  """Writes manifest.json: the SHA-256 of every file below `path`."""
  write_text(path / "manifest.json", json.dumps({name: _digest(path / name) for name in _files(path)}, indent=0))


def _verify(path):
  """Raises Damaged, on one line, unless `path` holds the files of its manifest."""
  try:
    manifest = json.loads((path / "manifest.json").read_text())
    wanted = dict(manifest)
  except FileNotFoundError:
    raise Damaged(f"{path} has no manifest.json: it was not written to the end") from None
  except (ValueError, TypeError):
    raise Damaged(f"{path}/manifest.json is not the JSON that was written") from None
  for name in sorted(wanted):
    if not (path / name).exists():
      raise Damaged(f"{path}/{name} is missing")
    if _digest(path / name) != wanted[name]:
      raise Damaged(f"{path}/{name} is damaged: its SHA-256 is not the one in manifest.json")


def _newest_complete(workdir) -> int | None:
  """The newest step that is what was written; damaged ones are named and moved to <workdir>/damaged."""
  for step in reversed(_steps(workdir)):
    try:
      _verify(folder(workdir) / str(step))
      return step
    except Damaged as why:
      aside = absolute(workdir) / "damaged"
      aside.mkdir(exist_ok=True)
      target = next(t for n in range(1000) if not (t := aside / f"{step}.{n}").exists())
      (folder(workdir) / str(step)).rename(target)
      print(f"checkpoint of step {step} skipped: {why}; moved to {target}", flush=True)
  return None


def _steps(workdir) -> list[int]:
  path = folder(workdir)
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.exists() else []


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir, *, keep: int = 3):
    self._folder = folder(workdir)
    self._newest = processes.on_first(lambda: _newest_complete(workdir))
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, encoder: dict, config_json: str):
    """Writes one step: the state to resume from, the encoder's variables as an item of their own, the config.

    Does nothing if the step is there already.

    Raises:
      OSError: the disk is full or gone; names the step that is still good.
    """
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      encoder=ocp.args.StandardSave(encoder),
      config=ocp.args.JsonSave(json.loads(config_json)),
    )
    last = self.latest_step()
    try:
      self._manager.save(step, args=args, force=True)
      self._manager.wait_until_finished()
      processes.on_first(lambda: _seal(self._folder / str(step)))
      self._newest = step
    except Exception as error:  # Orbax raises many types here, with many-line messages
      logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # or each array that failed prints a traceback of its own
      survivor = f"step {last} in {self._folder} is complete" if last is not None else "no checkpoint exists yet"
      reason = "the disk is full" if _no_space(error, self._folder) else " ".join(str(error).split())[:200]
      raise OSError(
        f"could not save step {step}: {reason}; {survivor}; free space and run again with --resume"
      ) from None

  def restore_newest(self, like):
    """(step, the state of the newest undamaged checkpoint, placed as `like`); (0, None) if there is none.

    Args:
      like: a tree of jax.ShapeDtypeStruct with shardings, on whatever devices there are now.

    Raises:
      ValueError: the checkpoint is of another architecture; names the first difference.
    """
    if self._newest is None:
      return 0, None
    return self._newest, _restore(self._folder / str(self._newest) / "state", like)

  def close(self):
    self._manager.close()


def read_run_encoder(workdir, like, step: int | None = None):
  """(step, encoder variables as numpy) of a run's newest checkpoint, or of `step`.

  Args:
    like: tree of jax.ShapeDtypeStruct, the encoder that the run's config describes.

  Raises:
    ValueError: no such checkpoint, or it is damaged.
  """
  step = _find_step(workdir, step)
  return step, _restore(folder(workdir) / str(step) / "encoder", _empty(like))


def read_run_state(workdir, step: int | None = None):
  """(step, state as nested dicts of numpy arrays) of a run's newest checkpoint, or of `step`; raises ValueError."""
  step = _find_step(workdir, step)
  return step, read_tree(folder(workdir) / str(step) / "state")


def _find_step(workdir, step):
  steps = _steps(workdir)
  if not steps or (step is not None and step not in steps):
    have = ", ".join(map(str, steps)) or "none"
    raise ValueError(
      f"--workdir={workdir}: no checkpoint{'' if step is None else f' of step {step}'}; steps there: {have}"
    )
  step = steps[-1] if step is None else step
  _verify(folder(workdir) / str(step))
  return step


def read_tree(path) -> dict:
  """What an item was saved as, as nested dicts of numpy arrays; {} if there is no such item."""
  path = absolute(path)
  if not path.exists():
    return {}
  with _by_this_process() as checkpointer:
    return checkpointer.restore(path, _empty(checkpointer.metadata(path).item_metadata.tree))


def _empty(like):
  return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)


def _restore(path, like):
  host = isinstance(jax.tree.leaves(like)[0], np.ndarray)
  with _by_this_process() if host else ocp.StandardCheckpointer() as checkpointer:
    _compare(_shapes(checkpointer.metadata(path).item_metadata.tree), _shapes(like), path)
    return checkpointer.restore(path, like)


def _shapes(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    for path, leaf in leaves
  }


def _compare(saved: dict, wanted: dict, where):
  different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
  if different:
    key = different[0]
    has, needs = (f"{v[1]}{list(v[0])}" if v else "nothing" for v in (saved.get(key), wanted.get(key)))
    raise ValueError(
      f"checkpoint {where} is of another architecture: {key} is {has} there and {needs} in this config "
      f"({len(different)} such differences): use the config it was made with, or another --workdir"
    )


def _no_space(error, path) -> bool:
  text = str(error)
  free = shutil.disk_usage(path).free if os.path.isdir(path) else 1 << 40
  return "No space left" in text or "RESOURCE_EXHAUSTED" in text or free < 1 << 20


def read_config(workdir) -> str:
  """config.json of a run.

  Raises:
    ValueError: there is no run in this folder.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"--workdir={workdir}: no run here (config.json is missing); `simclr pretrain` makes one")
  return path.read_text()


def mark_complete(workdir, step: int):
  """Leaves a file COMPLETE in a run's folder: everything that the run was to do and write is there."""
  if not jax.process_index():
    write_text(absolute(workdir) / "COMPLETE", f"step {step}\n")


def write_text(path, text: str):
  """Writes a whole file or nothing."""
  write_bytes(path, text.encode())


def write_bytes(path, content: bytes):
  """Writes a whole file or nothing."""
  path = epath.Path(path)
  temporary = path.parent / f".{path.name}.tmp"
  temporary.write_bytes(content)
  temporary.rename(path) if "://" in str(path) else os.replace(temporary, path)


def check_vacant(path, *, overwrite: bool) -> epath.Path:
  """The absolute path of an export to be written.

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set, or what it holds is no export.
  """
  path = absolute(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file: name a folder")
  if path.exists() and any(path.iterdir()):
    if not overwrite:
      raise ValueError(f"{path} is not empty: add --overwrite or name another folder")
    if not (path / "card.json").exists():
      raise ValueError(f"{path} has no card.json, so it is no export: delete it yourself")
  return path


def save_export(path, fill, *, overwrite: bool = False) -> epath.Path:
  """Makes the folder of an export: `fill(folder)` writes its files, card.json among them, under a temporary name.

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set, or it cannot be written.
    OSError: the disk is full.
  """
  path = check_vacant(path, overwrite=overwrite)
  temporary = path.parent / f".{path.name}.tmp"
  try:
    if temporary.exists():
      temporary.rmtree()
    temporary.mkdir(parents=True)
  except OSError as error:
    raise ValueError(f"{path} cannot be written ({error.strerror or error}): name another folder") from None
  try:
    fill(temporary)
    _seal(temporary)
    if path.exists():
      path.rmtree()
    temporary.rename(path)
  except Exception as error:
    full = _no_space(error, temporary)
    temporary.rmtree(missing_ok=True)
    if full:
      raise OSError(f"could not write {path}: the disk is full; free space or name another folder") from None
    raise
  return path


def save_trees(path, trees: dict):
  """Writes each tree of `trees`, name -> variables, to a folder of that name below `path`.

  Arrays are stored as host numpy, so a folder written by a pod opens on a laptop.

  Raises:
    OSError: the disk is full; found beforehand, for Orbax's threads print pages when they find it.
  """
  if os.path.isdir(path) and shutil.disk_usage(path).free < sum(x.nbytes for x in jax.tree.leaves(trees)):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
  with _by_this_process() as checkpointer:
    for name, tree in trees.items():
      checkpointer.save(path / name, jax.tree.map(np.asarray, tree))


def write_card(path, card: dict):
  """card.json of the export in the folder `path`; `files` becomes the SHA-256 of every file that is there now."""
  files = {name: _digest(path / name) for name in _files(path) if name != "card.json"}
  card = {"schema_version": SCHEMA_VERSION, **card, "files": files}
  write_text(path / "card.json", json.dumps(card, indent=2, sort_keys=True))


def _by_this_process():
  """A checkpointer that waits for no other process."""
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}")
  return ocp.StandardCheckpointer(**({"multiprocessing_options": alone} if processes.several() else {}))


def read_card(path) -> dict:
  """card.json of an export whose files are those that were written.

  Raises:
    ValueError: not such a folder, one that is damaged, or a card of an unknown version.
  """
  path = absolute(path)
  card_path = path / "card.json"
  if not card_path.exists():
    raise ValueError(f"{path} is no exported encoder (card.json is missing): give the folder `simclr export` wrote")
  card = json.loads(card_path.read_text())
  version = card.get("schema_version", card.get("card_version"))
  if version not in range(1, SCHEMA_VERSION + 1):
    raise ValueError(f"{card_path}: schema_version {version}, this package reads 1 to {SCHEMA_VERSION}")
  _verify(path)
  return card


def read_encoder(path, like) -> dict:
  """The encoder's variables as numpy, in a folder that save_trees wrote; `like` is a tree of shapes.

  Raises:
    ValueError: they are of other shapes.
  """
  return _restore(absolute(path) / "encoder", _empty(like))


def compare(tree, like, where):
  """Raises ValueError, naming the first difference, unless two trees have the same paths, shapes and dtypes."""
  _compare(_shapes(tree), _shapes(like), where)
