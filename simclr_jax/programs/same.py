"""A run that is resumed goes on with the config and the data that it began with."""

import json

import jax

from simclr_jax.data import Source
from simclr_jax.programs import config as config_lib
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.errors import UserError

FILE = "data.json"  # in the workdir: the fingerprints of its data


def same_config(config, workdir):
  """The config of the run in `workdir`; raises UserError if `config` is another, whatever its data.changed."""
  kept = config_lib.from_json(checkpoint.read_config(workdir))
  kept = config_lib.replace(kept, {"data.changed": config.data.changed})
  config_lib.check_same(kept, config)
  return kept


def difference(before: dict, now: dict) -> str:
  """What differs between two fingerprints of a source, in words; empty if nothing does."""
  count = f"{now['images']:,} images instead of {before['images']:,}" if before["images"] != now["images"] else ""
  other = [name for name in before if name != "images" and before[name] != now.get(name)]
  return " and ".join(part for part in (count, f"other {', '.join(other)}" if other else "") if part)


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
    UserError: they have changed, and that is to be refused.
  """
  now = {name: source.fingerprint() for name, source in sources.items()}
  file = files.absolute(workdir) / FILE
  kept = json.loads(files.read_text(file)) if resume and file.exists() else {}
  for name, fingerprint in now.items():
    what = difference(kept[name], fingerprint) if name in kept else ""
    if what and changed == "refuse":
      refuse_changed(name, what)
  return now


def classes_of(workdir) -> list[str]:
  """The classes that a run was trained with; empty where the folder does not say."""
  file = files.absolute(workdir) / FILE
  return json.loads(files.read_text(file))["data.train"]["classes"] if file.exists() else []


def keep_data(workdir, fingerprints: dict):
  """Keeps the fingerprints of the data in the claimed folder of a run."""
  if not jax.process_index():
    files.write_text(workdir / FILE, json.dumps(fingerprints, indent=2))
