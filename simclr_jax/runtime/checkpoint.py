"""Checkpoints: Orbax behind a few functions.

Layout of a run's checkpoint:  <workdir>/checkpoints/<step>/{state, config, manifest.json} and a folder for each export
Orbax writes under a temporary name and renames when complete, so a run that dies while saving keeps the last good step.
It does not notice a damaged file: a flipped bit loads as another number.  manifest.json holds the SHA-256 of every file;
it is written last, and nothing is loaded that does not agree with it.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simclr_jax.runtime import files, processes
from simclr_jax.runtime.errors import UserError


def folder(workdir) -> epath.Path:
  return files.absolute(workdir) / "checkpoints"


def claim_workdir(workdir, *, resume: bool, overwrite: bool) -> epath.Path:
  """The absolute workdir, made if needed.

  Raises:
    ValueError: the folder holds something and neither resume nor overwrite was asked for, or both were, or there is
      nothing to resume, or it cannot be written.
  """
  if resume and overwrite:
    raise UserError("--resume and --overwrite contradict each other: give one of them")
  processes.run_on_primary(lambda: _claim(workdir, resume or overwrite, overwrite))
  return files.absolute(workdir)


def _claim(workdir, filled_is_fine, overwrite):
  path = files.absolute(workdir)
  if path.exists() and not path.is_dir():
    raise UserError(f"--workdir={workdir} is a file: name a folder")
  # Another process may have put a compiled program there already.
  filled = path.exists() and any(entry.name != "compiled" for entry in path.iterdir())
  if filled and not filled_is_fine:
    raise UserError(
      f"--workdir={workdir} is not empty: add --resume to go on, --overwrite to start again, or name another"
    )
  if overwrite and filled:
    if not (path / "config.json").exists():
      raise UserError(
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
    raise UserError(f"--workdir={workdir} cannot be written ({error.strerror or error}): name another folder") from None


class Damaged(UserError):
  """A checkpoint does not hold what was written."""


def digests(path) -> dict:
  """{name: SHA-256} of every file below `path`, but for its manifest."""
  return {name: files.sha256(path / name) for name in _file_names(path)}


def _file_names(path, below=""):
  for entry in sorted((path / below).iterdir()):
    name = f"{below}{entry.name}"
    if entry.is_dir():
      yield from _file_names(path, f"{name}/")
    elif name != "manifest.json":
      yield name


def seal(path):
  """Writes manifest.json, the digests of what is below `path`."""
  files.write_text(path / "manifest.json", json.dumps(digests(path), indent=0))


def verify(path):
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
    if files.sha256(path / name) != wanted[name]:
      raise Damaged(f"{path}/{name} is damaged: its SHA-256 is not the one in manifest.json")


def _newest_complete(workdir) -> int | None:
  """The newest step that is what was written; damaged ones are named and moved to <workdir>/damaged."""
  for step in reversed(_steps(workdir)):
    try:
      verify(folder(workdir) / str(step))
      return step
    except Damaged as why:
      aside = files.absolute(workdir) / "damaged"
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
    self._newest = processes.run_on_primary(lambda: _newest_complete(workdir))
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, exports: Mapping[str, Any], config_json: str):
    """Writes one step: the state to resume from, the config, and each tree of `exports` as an item of its name.

    Does nothing if the step is there already.

    Raises:
      OSError: the disk is full or gone; names the step that is still good.
    """
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      config=ocp.args.JsonSave(json.loads(config_json)),
      **{name: ocp.args.StandardSave(tree) for name, tree in exports.items()},
    )
    last = self.latest_step()
    try:
      self._manager.save(step, args=args, force=True)
      self._manager.wait_until_finished()
      processes.run_on_primary(lambda: seal(self._folder / str(step)))
      self._newest = step
    except Exception as error:  # Orbax raises many types here, with many-line messages
      logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # or each array that failed prints a traceback of its own
      survivor = f"step {last} in {self._folder} is complete" if last is not None else "no checkpoint exists yet"
      reason = "the disk is full" if disk_is_full(error, self._folder) else " ".join(str(error).split())[:200]
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


def read_run_export(workdir, name: str, like, step: int | None = None):
  """(step, the export of this name as numpy) of a run's newest checkpoint, or of `step`.

  Args:
    like: tree of jax.ShapeDtypeStruct, what the run's config describes.

  Raises:
    ValueError: no such checkpoint, or it is damaged.
  """
  step = _find_step(workdir, step)
  return step, restore(folder(workdir) / str(step) / name, like)


def read_run_state(workdir, step: int | None = None):
  """(step, state as nested dicts of numpy arrays) of a run's newest checkpoint, or of `step`; raises ValueError."""
  step = _find_step(workdir, step)
  return step, read_tree(folder(workdir) / str(step) / "state")


def _find_step(workdir, step):
  steps = _steps(workdir)
  if not steps or (step is not None and step not in steps):
    have = ", ".join(map(str, steps)) or "none"
    raise UserError(
      f"--workdir={workdir}: no checkpoint{'' if step is None else f' of step {step}'}; steps there: {have}"
    )
  step = steps[-1] if step is None else step
  verify(folder(workdir) / str(step))
  return step


def read_tree(path) -> dict:
  """What an item was saved as, as nested dicts of numpy arrays; {} if there is no such item."""
  path = files.absolute(path)
  if not path.exists():
    return {}
  with _by_this_process() as checkpointer:
    return checkpointer.restore(path, _empty(checkpointer.metadata(path).item_metadata.tree))


def _empty(like):
  return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)


def restore(path, like):
  """The tree of the item or folder `path` as numpy, in the structure of `like`, a tree of shapes.

  Raises:
    ValueError: the tree there is another one; names the first difference.
  """
  return _restore(files.absolute(path), _empty(like))


def _restore(path, like):
  """Trees are compared leaf by leaf, so one that has gained or lost an empty part since it was saved is the same."""
  host = isinstance(jax.tree.leaves(like)[0], np.ndarray)
  with _by_this_process() if host else ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.metadata(path).item_metadata.tree
    _compare(_shapes(saved), _shapes(like), path)
    wanted = _by_name(like)
    restored = checkpointer.restore(path, jax.tree.map_with_path(lambda name, _: wanted[_name(name)], saved))
  restored = _by_name(restored)
  return jax.tree.map_with_path(lambda name, _: restored[_name(name)], like)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_name(tree) -> dict:
  """{path, such as params/layer/kernel: leaf}."""
  return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _shapes(tree) -> dict:
  return {name: (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for name, leaf in _by_name(tree).items()}


def _compare(saved: dict, wanted: dict, where):
  different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
  if different:
    key = different[0]
    has, needs = (f"{v[1]}{list(v[0])}" if v else "nothing" for v in (saved.get(key), wanted.get(key)))
    raise UserError(
      f"checkpoint {where} is of another architecture: {key} is {has} there and {needs} in this config "
      f"({len(different)} such differences): use the config it was made with, or another --workdir"
    )


def disk_is_full(error, path) -> bool:
  """Whether that is why writing below `path` failed; Orbax raises many types of error for it."""
  text = str(error)
  free = shutil.disk_usage(path).free if os.path.isdir(path) else 1 << 40
  return "No space left" in text or "RESOURCE_EXHAUSTED" in text or free < 1 << 20


def read_config(workdir) -> str:
  """config.json of a run.

  Raises:
    ValueError: there is no run in this folder.
  """
  path = files.absolute(workdir) / "config.json"
  if not path.exists():
    raise UserError(f"--workdir={workdir}: no run here (config.json is missing); `simclr pretrain` makes one")
  return path.read_text()


def mark_complete(workdir, step: int):
  """Leaves a file COMPLETE in a run's folder: everything that the run was to do and write is there."""
  if not jax.process_index():
    files.write_text(files.absolute(workdir) / "COMPLETE", f"step {step}\n")


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


def _by_this_process():
  """A checkpointer that waits for no other process."""
  if not processes.is_multiprocess():
    return ocp.StandardCheckpointer()
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}")
  return ocp.StandardCheckpointer(multiprocessing_options=alone)


def compare(tree, like, where):
  """Raises ValueError, naming the first difference, unless two trees have the same paths, shapes and dtypes."""
  _compare(_shapes(tree), _shapes(like), where)
