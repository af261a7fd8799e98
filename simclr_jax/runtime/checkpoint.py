"""Checkpoints: Orbax behind a few functions.

Layout of a run's checkpoint:  <workdir>/checkpoints/<step>/{state, config, loop.json, manifest.json} and a folder for each
export
Orbax writes under a temporary name and renames when complete, so a run that dies while saving keeps the last good step.
It does not notice a damaged file: a flipped bit loads as another number.  manifest.json holds the SHA-256 of every file, the
step and the id of the run; it is written last, and only files that agree with it are loaded.  An older step is deleted
only after it is written.
"""

import contextlib
import errno
import fnmatch
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simclr_jax.runtime import errors, files, lock, processes
from simclr_jax.runtime.config import read_config as read_config  # part of what this module offers
from simclr_jax.runtime.errors import Unavailable, UserError


def folder(workdir) -> epath.Path:
  return files.absolute(workdir) / "checkpoints"


# What the loop and the programs on it leave at the top of a workdir; a program has more names of its own.
WRITES = (
  "RUN", "RUN.sha256", "LOCK", "COMPLETE", "config.json", "config.json.sha256", "skipped.json", "skipped.json.sha256",
  "metrics.jsonl", "checkpoints", "damaged", "compiled", "profile", "wandb", "events.out.tfevents.*", "h.tsv",
  "labels.tsv", "projector_config.pbtxt",
)  # fmt: skip
BEFORE_A_RUN = {"RUN", "RUN.sha256", "LOCK", "compiled"}  # what a folder may hold in which no run has begun


def claim_workdir(workdir, *, resume: bool, overwrite: bool, writes=(), data=()) -> epath.Path:
  """The absolute workdir, made if needed, marked as that of a run, and locked until the run or the process ends.

  Args:
    writes: patterns of the names that the program writes in it, in addition to WRITES; --overwrite deletes nothing else.
    data: paths of the training data, which must not be in the workdir, nor the workdir in one of them.

  Raises:
    ValueError: the folder is not empty and neither resume nor overwrite was requested, or both were; or its content
      is not a run or was not written by one; or another run is using it; or it cannot be written; or the processes of this
      run do not share it.
  """
  if resume and overwrite:
    raise UserError("--resume and --overwrite contradict each other: give one of them")
  owner = processes.run_on_primary(lambda: _claim(workdir, resume, overwrite, (*WRITES, *writes), data))
  if processes.process_index():
    lock.check_shared(workdir, owner)
  return files.absolute(workdir)


def _claim(workdir, resume, overwrite, writes, data):
  _check_apart(workdir, data)
  path = files.absolute(workdir)
  if path.exists() and not path.is_dir():
    raise UserError(f"--workdir={workdir} is a file: name a folder")
  names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
  left_behind = [name for name in names if files.is_left_behind(name)]
  names = [name for name in names if name not in left_behind]
  filled = [name for name in names if name not in BEFORE_A_RUN]
  foreign = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in writes)]
  if filled and not (resume or overwrite):
    raise UserError(
      f"--workdir={workdir} is not empty: add --resume to resume the run, --overwrite to start over, or name another"
    )
  if filled and not _is_run(names, foreign):
    flag = "resume" if resume else "overwrite"
    raise UserError(
      f"--workdir={workdir} --{flag}: the folder is not a run (it holds {filled[0]} and no file RUN); "
      "name an empty or a new one"
    )
  if overwrite and foreign:
    raise UserError(
      f"--workdir={workdir} --overwrite: {foreign[0]} was not written by a run; move it elsewhere, or name another folder"
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock.take(path)
    if files.is_remote(path):  # what may be written there and not deleted is found out now, not with the first old step
      lock.release(path)
      lock.take(path)
    for name in left_behind:
      (path / name).unlink(missing_ok=True)
    if overwrite:
      _empty_workdir(path, names)
    (path / "COMPLETE").unlink(missing_ok=True)  # of the run before, which goes on
    if not (path / "RUN").exists():
      files.write_sealed(path / "RUN", f"{_id_in_checkpoints(path) or uuid.uuid4().hex}\n")
    run_id(path)  # or it is damaged
    return lock.text_of(path)
  except Unavailable:
    raise
  except OSError as error:
    raise UserError(f"--workdir={workdir} cannot be written ({error.strerror or error}): name another folder") from None


def _check_apart(workdir, data):
  """Raises UserError where the run would write into its data, or delete it."""
  for given in data:
    if files.is_within(workdir, given) or files.is_within(given, workdir):
      raise UserError(f"--workdir={workdir}: the data is in {given}; a run and its data must not contain each other")


def _is_run(names, foreign) -> bool:
  """Whether a folder is that of a run: it is marked, or of an earlier version, which left no mark."""
  known = {"checkpoints", "metrics.jsonl", "run.json"}
  return "RUN" in names or "config.json" in names and bool(known.intersection(names) or not foreign)


def _empty_workdir(path, names):
  """Deletes what a run has written, and last what marks the folder as that of a run: killed meanwhile, it still is one."""
  marks = ("RUN", "RUN.sha256")
  names = sorted(set(names) - {lock.NAME}, key=lambda name: (name in marks, name))
  for entry in (path / name for name in names):
    if entry.is_dir() and not files.is_remote(entry) and os.path.islink(entry):
      raise UserError(
        f"{entry} is a symbolic link to {os.path.realpath(entry)}: delete what you do not need, and the link"
      )
    entry.rmtree() if entry.is_dir() else entry.unlink()


def run_id(workdir) -> str | None:
  """An id that distinguishes this run from every other, or None for a run of an earlier version.

  Raises:
    UserError: the file RUN is damaged.
  """
  path = files.absolute(workdir) / "RUN"
  return files.read_sealed(path).strip() if path.exists() else None


def _id_in_checkpoints(workdir) -> str | None:
  """Of the newest checkpoint that says which run it is of."""
  for step in reversed(_steps(workdir)):
    with contextlib.suppress(Damaged):
      if found := _manifest(folder(workdir) / str(step)).run:
        return found
  return None


class NotSaved(OSError):
  """A checkpoint could not be written.  Orbax's threads may be stuck then, so end the process without waiting."""

  exit_at_once = True


class NotSavedNow(NotSaved, Unavailable):
  """It is a bucket that could not be written, for another reason than permissions or a wrong name."""


class Damaged(UserError):
  """A checkpoint does not hold what was written."""


def digests(path) -> dict:
  """{name: SHA-256} of every file below `path` except its manifest."""
  return {name: files.sha256(path / name) for name in _file_names(path)}


def _file_names(path, below=""):
  for entry in sorted((path / below).iterdir()):
    name = f"{below}{entry.name}"
    if entry.is_dir():
      yield from _file_names(path, f"{name}/")
    elif name != "manifest.json":
      yield name


class _Manifest(NamedTuple):
  files: dict  # name -> SHA-256
  step: int | None  # of a checkpoint; None in an export, and where an earlier version wrote it
  run: str | None


def seal(path, *, step: int | None = None, run: str | None = None):
  """Writes manifest.json: the digests of what is below `path`, for a checkpoint with its step and the id of its run."""
  found = digests(path)
  manifest = found if step is None else {"files": found, "step": step, "run": run}
  files.write_text(path / "manifest.json", json.dumps(manifest, indent=0))


def _manifest(path) -> _Manifest:
  try:
    found = json.loads(files.read_text(path / "manifest.json"))
    if isinstance(found.get("files"), dict):
      return _Manifest(dict(found["files"]), int(found["step"]), found["run"])
    return _Manifest(dict(found), None, None)
  except FileNotFoundError:
    raise Damaged(f"{path} has no manifest.json: it was not written to the end") from None
  except (ValueError, TypeError, KeyError, AttributeError):
    raise Damaged(f"{path}/manifest.json is not the JSON that was written") from None


_MADE_AGAIN = ("__pycache__", ".DS_Store", ".cache", ".ipynb_checkpoints")  # by Python, macOS, Hugging Face, Jupyter


def not_in_manifest(path) -> list[str]:
  """The files below `path` that were added after it was sealed, without those that programs make again; all of them if the
  manifest is missing or damaged."""
  try:
    known = _manifest(path).files
  except Damaged:
    known = {}
  added = (name for name in _file_names(path) if name not in known)
  return [name for name in added if not any(part in _MADE_AGAIN for part in name.split("/"))]


def verify(path, *, step: int | None = None, run: str | None = None):
  """Raises Damaged, on one line, unless `path` holds the files of its manifest, which are of this step and run."""
  manifest = _manifest(path)
  if step is not None and manifest.step not in (step, None):
    raise Damaged(f"{path} is the checkpoint of step {manifest.step}")
  if run is not None and manifest.run not in (run, None):
    raise Damaged(f"{path} belongs to another run")
  for name in sorted(manifest.files):
    if not (path / name).exists():
      raise Damaged(f"{path}/{name} is missing")
    if files.sha256(path / name) != manifest.files[name]:
      raise Damaged(f"{path}/{name} is damaged: its SHA-256 is not the one in manifest.json")


def _newest_complete(workdir) -> int | None:
  """The newest step that is what was written; damaged ones are named and moved to <workdir>/damaged."""
  for step in reversed(_steps(workdir)):
    path = folder(workdir) / str(step)
    try:
      verify(path, step=step, run=run_id(workdir))
      return step
    except Damaged as why:
      aside = files.absolute(workdir) / "damaged"
      aside.mkdir(exist_ok=True)
      target = next(t for n in range(1000) if not (t := aside / f"{step}.{n}").exists())
      files.move(path, target)  # where checkpoints/ is a link to another disk, a folder is not renamed but copied
      print(f"checkpoint of step {step} skipped: {why}; moved to {target}", flush=True)
  return None


def _steps(workdir) -> list[int]:
  """The steps that have a folder; whatever else lies beside them is left alone."""
  path = folder(workdir)
  found = [p.name for p in path.iterdir() if p.is_dir()] if path.exists() else []
  return sorted(int(name) for name in found if name.isdecimal() and name == str(int(name)))


class Checkpoints:
  """The checkpoints of one run.

  A step is written in the background: `save` returns when the arrays have been copied from the devices (on a CPU when they
  are kept from being overwritten).  All processes of a run call the same methods in the same order, but for `check` and
  `settle`.
  """

  def __init__(self, workdir, *, keep: int = 3):
    self._folder = folder(workdir)
    self._newest = processes.run_on_primary(lambda: _newest_complete(workdir))
    self._workdir, self._keep = files.absolute(workdir), keep
    self._writing = None  # the step that is being written
    self._thread, self._failure = threading.Thread(), None  # what finishes it, and why that failed
    # Old steps are deleted here, once the new one is sealed, and not by Orbax, before.
    options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True, cleanup_tmp_directories=True)
    if files.is_remote(workdir):
      files.check_bucket(self._folder)
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  @property
  def newest_sealed(self) -> int | None:
    """The newest step that this process knows to be sealed; another one may still be being written."""
    return self._newest

  def latest_step(self) -> int | None:
    """The newest step that is sealed; waits for the one that is being written."""
    self.wait()
    return self._newest

  def save(self, step: int, state, exports: Mapping[str, Any], config_json: str, loop: Mapping[str, Any] | None = None):
    """Begins to write one step: the state to resume from, the config, and each tree of `exports` as an item of its name.

    Waits until the previous step is sealed.  Once this step is sealed, the oldest steps are deleted.  Does nothing if the
    step already exists.

    Args:
      loop: JSON values that the loop keeps in addition to the state; `loop` returns them.

    Raises:
      NotSaved: the disk is full or gone; names the step that is still good.
    """
    self.wait()
    if step == self._newest:
      return
    processes.run_on_primary(lambda: lock.check(self._workdir))
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      config=ocp.args.JsonSave(json.loads(config_json)),
      **{name: ocp.args.StandardSave(tree) for name, tree in exports.items()},
    )
    try:
      processes.run_on_primary(lambda: self._check_space((state, exports)))
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._not_saved(step, error) from None
    self._writing = step
    self._thread = threading.Thread(target=self._finish, args=(step, loop or {}), name=f"checkpoint of step {step}")
    self._thread.start()

  def _finish(self, step, loop):
    """What is left to do once the arrays have been copied; process 0 seals."""
    try:
      self._manager.wait_until_finished()
      if not processes.process_index():
        path = self._folder / str(step)
        files.write_text(path / "loop.json", json.dumps(loop))
        seal(path, step=step, run=run_id(self._workdir))
        for old in _steps(self._workdir)[: -self._keep]:
          (self._folder / str(old)).rmtree()
    except Exception as error:
      self._failure = self._not_saved(step, error)

  def _not_saved(self, step, error) -> NotSaved:
    """Orbax raises many types, with messages of many lines."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # or each array that failed prints a traceback of its own
    last = self._newest
    survivor = f"step {last} in {self._folder} is complete" if last is not None else "no checkpoint exists yet"
    remote, text = files.is_remote(self._folder), " ".join(str(error).split())
    reason = "the disk is full" if not remote and files.disk_is_full(error, self._folder) else text[:200]
    lasting = re.search(r"Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|\b40[134]\b", text)
    kind = NotSavedNow if remote and not lasting and not isinstance(error, FileNotFoundError) else NotSaved
    cure = "" if remote else "free space and "
    return kind(f"could not save step {step}: {reason}; {survivor}; {cure}{errors.to_resume}")

  def wait(self):
    """Waits until the step that is being written is sealed.

    Raises:
      NotSaved: it could not be written; in every process where process 0 could not seal it.
    """
    if self._writing is None:
      return
    self._thread.join()
    self.check()
    processes.run_on_primary(self.check)
    self._newest, self._writing = self._writing, None

  def check(self):
    """Raises NotSaved if this process already knows that the step which is being written has failed."""
    if self._failure:
      raise self._failure

  def settle(self):
    """For a process that ends with an error: waits for the step that is being written to finish."""
    if self._writing is not None and not self._failure:
      self._thread.join()

  def _check_space(self, trees):
    """Raises OSError where the disk has no room, before Orbax finds out, prints pages, and hangs on the last bytes."""
    if not files.is_remote(self._folder):
      needed = sum(x.nbytes for x in jax.tree.leaves(trees) if hasattr(x, "nbytes")) + (1 << 20)
      if shutil.disk_usage(self._folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def loop(self) -> dict:
    """What was given to `save` as `loop` with the newest step; {} if an earlier version wrote it."""
    path = self._folder / str(self._newest) / "loop.json"
    return json.loads(files.read_text(path)) if path.exists() else {}

  def restore_newest(self, like):
    """(step, the state of the newest undamaged checkpoint, placed as `like`); (0, None) if there is none.

    Args:
      like: a tree of jax.ShapeDtypeStruct with shardings, on whatever devices there are now.

    Raises:
      ValueError: the checkpoint has another architecture (the message names the first difference), or it holds the state
        of another step.
    """
    if self._newest is None:
      return 0, None
    path = self._folder / str(self._newest)
    state = _restore(path / "state", like)
    if hasattr(state, "step") and int(state.step) != self._newest:
      raise Damaged(f"{path} holds the state of step {int(state.step)}: give the folder that name again, or delete it")
    return self._newest, state

  def close(self):
    """Waits as `wait` does, and ends Orbax's threads."""
    self.wait()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def read_run_export(workdir, name: str, like, step: int | None = None, flag: str = "--workdir="):
  """(step, the export of this name as numpy) of a run's newest sealed checkpoint, or of `step`.

  Args:
    like: tree of jax.ShapeDtypeStruct, what the run's config describes.
    flag: see read_config.

  Raises:
    ValueError: no such checkpoint, or it is damaged.
  """
  step = _find_step(workdir, step, flag)
  return step, restore(folder(workdir) / str(step) / name, like)


def read_run_state(workdir, step: int | None = None, flag: str = "--workdir="):
  """(step, state as nested dicts of numpy arrays) of a run's newest sealed checkpoint, or of `step`; raises ValueError."""
  step = _find_step(workdir, step, flag)
  return step, read_tree(folder(workdir) / str(step) / "state")


def _find_step(workdir, step, flag):
  """`step`, or the newest that is what was written; the run may be training, so newer ones are named and left alone."""
  steps = _steps(workdir)
  if not steps or (step is not None and step not in steps):
    have = ", ".join(map(str, steps)) or "none"
    raise UserError(f"{flag}{workdir}: no checkpoint{'' if step is None else f' of step {step}'}; steps there: {have}")
  if step is None:
    step = processes.run_on_primary(lambda: _newest_sealed(workdir, steps))  # another may be sealed a moment later
    if not processes.process_index():
      return step
  verify(folder(workdir) / str(step), step=step, run=run_id(workdir))
  return step


def _newest_sealed(workdir, steps) -> int:
  """The newest of `steps` that is what was written; raises Damaged, of the newest, if none is."""
  passed = {}
  for step in reversed(steps):
    path = folder(workdir) / str(step)
    try:
      verify(path, step=step, run=run_id(workdir))
    except Damaged as why:
      passed[step] = why
      continue
    for other, why in passed.items():
      sealed = (folder(workdir) / str(other) / "manifest.json").exists()
      print(f"checkpoint of step {other} passed over: {why if sealed else 'it is not sealed yet'}", flush=True)
    return step
  raise passed[steps[-1]]


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
      f"checkpoint {where} has another architecture: {key} is {has} there and {needs} in this config "
      f"({len(different)} such differences): use the config it was made with, or another --workdir"
    )


def write_config(workdir, config_json: str):
  """config.json of a run, sealed; by process 0."""
  if not jax.process_index():
    files.write_sealed(files.absolute(workdir) / "config.json", config_json)


def mark_complete(workdir, step: int | None = None):
  """Writes a file COMPLETE to a run's folder and unlocks it: the run has done and written everything."""
  if not jax.process_index():
    files.write_text(files.absolute(workdir) / "COMPLETE", "" if step is None else f"step {step}\n")
    lock.release(workdir)


def save_trees(path, trees: dict):
  """Writes each tree of `trees`, name -> variables, to a folder of that name below `path`.

  Arrays are stored as host numpy, so a folder written by a pod opens on a laptop.

  Raises:
    OSError: the disk is full; checked beforehand, because Orbax's threads print pages of errors when they find out.
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
