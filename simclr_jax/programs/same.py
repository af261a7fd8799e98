"""A resumed run continues with the config and the data that it began with."""

import hashlib
import json

import jax
import numpy as np

from simclr_jax import data
from simclr_jax.data import Source
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, files, metrics, processes
from simclr_jax.runtime.errors import UserError

FILE = "data.json"  # in the workdir: the fingerprints of its data
# Beginnings of the keys that a resumed run may be given other values of: they change neither the steps that it has made
# nor what its scores mean.
MAY_CHANGE = ("rollback.", "checkpoint.", "log.", "evaluate.every_", "evaluate.batch_size", "data.max_bad_fraction", "data.changed")  # fmt: skip


def begun(workdir, resume: bool):
  """`workdir` if a run that is resumed has begun in it; None otherwise."""
  return workdir if resume and checkpoint.folder(workdir).exists() else None


def same_config(config, workdir):
  """The config of the run in `workdir` with the values of `config` of the keys MAY_CHANGE; raises UserError if another key
  has another value."""
  return same_as(config_lib.from_json(checkpoint.read_config(workdir)), config)


def same_as(kept, config):
  """`same_config` for a config that is kept elsewhere."""
  values, now = config_lib.flatten(kept), config_lib.flatten(config)
  kept = config_lib.replace(kept, {key: now[key] for key in values.keys() & now if key.startswith(MAY_CHANGE)})
  if values.get("norm_scope") == "device" and not values["norm_devices"]:  # an earlier version did not keep it
    kept = config_lib.replace(kept, {"norm_devices": getattr(config, "norm_devices", 0)})
  config_lib.check_same(kept, config)
  return kept


def claim(config, workdir, train: Source, test: Source, *, resume: bool, overwrite: bool, starts=(), more=None):
  """(config to keep, the absolute workdir, made if needed) of a run that trains on `train` and scores `test`.

  The config that is kept has data.changed=refuse: what was accepted once are these changes, and no later ones.

  Args:
    starts: folders that the run starts from, which it may not replace.
    more: other sources to compare and keep, by the names of what chooses them.

  Raises:
    UserError: the folder belongs to another run or to no run, or holds the data; a run is resumed with another config or
      data, or would hold out images that it has trained on; or the package that config.log names is not installed.
  """
  if not jax.process_index():  # which sends the numbers
    metrics.check_wandb(config.log.wandb)
  if begun(workdir, resume):
    same_config(config, workdir)
  sources = {"data.train": train, "data.test": test, **(more or {})}
  fingerprints = check_data(workdir, resume, config.data.changed, sources)
  # Where changes are refused, check_data has compared these images.
  if config.data.changed == "accept" and begun(workdir, resume) and not config.data.test and test is not train:
    check_held_out(workdir, test, "begin a new run")
  specs = (config.data.train, config.data.test)
  agree(fingerprints)
  path = workdir_lib.claim(workdir, resume=resume, overwrite=overwrite, specs=specs, starts=starts)
  keep_data(path, fingerprints)
  return config_lib.replace(config, {"data.changed": "refuse"}), path


def difference(before: dict, now: dict) -> str:
  """What differs between two fingerprints of a source, in words; empty if nothing does that the earlier one has, which
  may be of an earlier version."""
  count = f"{now['images']:,} images instead of {before['images']:,}" if before["images"] != now["images"] else ""
  other = [name for name in before if name != "images" and before[name] != now.get(name)]
  return " and ".join(part for part in (count, f"other {', '.join(other)}" if other else "") if part)


def check_result(file, made_by: dict, what: str):
  """A result may be reused only if the same inputs made it: compares them with those that `file` names.

  Args:
    file: next to the result; written if it does not exist.
    made_by: JSON values by name: weights of encoders, fingerprints of data.  A name that the file lacks, which is of an
      earlier version, is not compared.
    what: the result, for the message.

  Raises:
    UserError: other inputs made the result; the message names the first that differs.
  """
  if file.exists():
    before = json.loads(files.read_sealed(file))
    other = [name for name in sorted(before) if _differs(before[name], made_by.get(name))]
    if other:
      raise UserError(
        f"{what} was made with another {other[0]}: use another --workdir, or --overwrite to make everything again"
      )
  elif not jax.process_index():
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_sealed(file, json.dumps(made_by, indent=2))


def _differs(before, now) -> bool:
  """Whether two checksums or fingerprints differ."""
  both = isinstance(before, dict) and isinstance(now, dict)
  return bool(difference(before, now)) if both else before != now


def refuse_changed(name: str, what: str):
  raise UserError(
    f"{name} is not what the run began with: {what}; restore the data, use another --workdir, or accept the change with"
    " --config.data.changed=accept"
  )


def check_data(workdir, resume: bool, changed: str, sources: dict[str, Source]) -> dict:
  """Compares the sources of a run with those that it began with, before its folder is touched.

  Args:
    workdir: the folder of the run.
    changed: config.data.changed, "refuse" or "accept".
    sources: by their keys, such as data.train.

  Returns:
    their fingerprints, for `keep_data`.

  Raises:
    UserError: they have changed, and `changed` is "refuse".
  """
  now = {name: source.fingerprint() for name, source in sources.items()}
  file = files.absolute(workdir) / FILE
  kept = json.loads(files.read_sealed(file)) if resume and file.exists() else {}
  for name, fingerprint in now.items():
    what = difference(kept[name], fingerprint) if name in kept else ""
    if what and changed == "refuse":
      refuse_changed(name, what)
    if what and not jax.process_index():
      print(f"accepted    {name} is not what the run began with: {what}", flush=True)
  return now


def check_held_out(workdir, test: Source, cure: str = "name images to score with --config.data.test=..."):
  """Compares the images that are held out of the data of the run or export in `workdir` now with those that it held out.

  Raises:
    UserError: they are others, so that the run trained on some of them.
  """
  kept, run = held_out(workdir), run_of(workdir)
  workdir = run if (run / FILE).exists() else workdir
  if not kept and not jax.process_index():
    print(
      f"note        {workdir} does not say which images it held out: scores are right only if data.train has not changed"
    )
  if kept and (what := difference(kept, test.fingerprint())):
    raise UserError(
      f"data.train is not what {workdir} began with, so other images are held out now ({what}), and it trained on some "
      f"of them: restore the data, or {cure}"
    )


def held_out(path) -> dict:
  """The fingerprint, without the names of the classes, of the images that a run, or the training of an exported encoder, held
  out to score it; empty where it does not say."""
  file, card = run_of(path) / FILE, files.absolute(path) / "card.json"
  if file.exists():
    kept = json.loads(files.read_sealed(file)).get("data.test", {})
  else:
    kept = json.loads(files.read_text(card)).get("held_out", {}) if card.exists() else {}
  return {name: value for name, value in kept.items() if name != "classes"}


def held_out_of_training(workdir, config) -> dict | None:
  """What card.json keeps of the images that the run in `workdir` held out; None where `data.test` names the scored ones."""
  return None if config.data.test else held_out(workdir)


def agree(fingerprints: dict[str, dict]):
  """Checks that every process of a run reads the same data; one that scores fewer images would leave the others waiting.

  Args:
    fingerprints: of the sources by their keys, such as data.test.

  Raises:
    UserError: in every process.
  """
  facts = {}
  for name, found in fingerprints.items():
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    facts[name] = f"{found['images']:,} images, fingerprint {digest}"
  processes.agree(facts)


def run_of(path):
  """The folder of the run whose encoder is in `path`, which is that folder or its folder "encoder"."""
  path = files.absolute(path)
  return path.parent if path.name == "encoder" and (path / "card.json").exists() else path


def classes_of(path) -> list[str]:
  """The classes that a run, or the run whose encoder is in the folder, was trained with; empty where it does not say."""
  file = run_of(path) / FILE
  return json.loads(files.read_sealed(file))["data.train"]["classes"] if file.exists() else []


def images_of_training(path) -> int:
  """How many images a run, or the run whose encoder is in the folder, was trained on; 0 where it does not say."""
  file = run_of(path) / FILE
  return json.loads(files.read_sealed(file))["data.train"]["images"] if file.exists() else 0


def for_other_processes(source: Source) -> str:
  """loop.Task.data; a process that is alone has nobody to compare it with, and does not read the sample again."""
  return json.dumps(source.fingerprint()) if processes.is_multiprocess() else ""


def keep_data(workdir, fingerprints: dict):
  """Keeps the fingerprints of the data in the claimed folder of a run."""
  if not jax.process_index():
    files.write_sealed(workdir / FILE, json.dumps(fingerprints, indent=2))


def batch_check(source: Source, batch_size: int, seed: int):
  """loop.Task.check_batch: whether the rows on the devices, of all processes together, are those that (seed, number) says."""

  def check(batch, number: int) -> str:
    _, wanted = data.draws(source, batch_size=batch_size, seed=seed)(number)
    # In any order: that of the devices need not be that of the processes.
    found, wanted = (
      np.sort(np.ascontiguousarray(x).view(np.int64).ravel()) for x in (processes.gather(batch.seed), wanted)
    )
    if np.array_equal(found, wanted):
      return ""
    return f"{np.isin(found, wanted, invert=True).sum()} of the {batch_size} rows of batch {number} are not those of seed {seed}"

  return check
