"""Configs: find a recipe, apply --config.key=value, check every value, and turn durations into steps.

A config holds rules (`base_lr`, `lr_scaling`, `train_epochs`); the arithmetic is done by the code that uses them, so
changing the batch size on the command line changes the learning rate with it.
"""

import ast
import difflib
import json
import math
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_flags

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def recipe_folder() -> pathlib.Path:
  """Folder of the recipes: inside the installed package, or beside it in a checkout."""
  inside = PACKAGE / "configs"
  return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_recipe(name: str) -> str:
  """`smoke`, `smoke.py`, `configs/smoke.py` or a path to a file (all with an optional `:argument`) -> `path[:argument]`.

  Raises:
    ValueError: no such file; names the nearest recipe.
  """
  path, colon, argument = name.partition(":")
  candidates = [pathlib.Path(path), recipe_folder() / pathlib.Path(path).name]
  for candidate in candidates:
    candidate = candidate if candidate.suffix == ".py" else candidate.with_suffix(".py")
    if candidate.is_file():
      return f"{candidate}{colon}{argument}"
  known = sorted(p.stem for p in recipe_folder().glob("[!_]*.py"))
  near = difflib.get_close_matches(pathlib.Path(path).stem, known, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}"
  raise ValueError(f"--config={name}: no such recipe; {hint}")


def load(recipe: str, overrides=()) -> ml_collections.FrozenConfigDict:
  """The config of a recipe with overrides such as `--config.batch_size=512` applied, checked and frozen.

  Raises:
    ValueError: unknown recipe or key, value of the wrong type, impossible value; always one line.
  """
  argv = ["simclr", f"--config={find_recipe(recipe)}"]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except Exception as error:  # whatever a recipe raises; absl puts a traceback before its words
    text = str(error).strip() if isinstance(error, flags.Error) else f"{type(error).__name__}: {error}"
    kind, _, words = text.splitlines()[-1].strip().partition(": ")
    words = (
      words if kind == "ValueError" else f"the recipe has no variant {recipe.partition(':')[2]!r} ({kind}: {words})"
    )
    raise ValueError(f"--config={recipe}: {words}") from None
  return override(holder.value, overrides)


def override(config, overrides) -> ml_collections.FrozenConfigDict:
  """A checked copy of a config with `--config.key=value` strings applied.

  Raises:
    ValueError: as for `load`.
  """
  known = flatten(config)
  open_sections = tuple(key for key in SCHEMAS.get(program(config), ()) if key.endswith("."))
  argv, changed = ["simclr"], ml_collections.ConfigDict(config).copy_and_resolve_references().unlock()
  for text in overrides:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if key not in (*known, *_OPTIONAL) and not key.startswith(open_sections):
      raise ValueError(f"{text}: no such key; {_nearest(key, known)}")
    if not equals:
      raise ValueError(f"{text}: expected --config.{key}=VALUE")
    if key in known:
      argv.append(text)
    else:  # an option that the recipe leaves at its default; the function that takes it checks it
      *sections, leaf = key.split(".")
      place = changed
      for name in sections:
        if name not in place:
          place[name] = ml_collections.ConfigDict()
        place = place[name]
        if not hasattr(place, "items"):
          raise ValueError(f"{text}: no such key; {_nearest(key, known)}")
      place[leaf] = _literal(value)
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dict("config", changed.lock(), flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(" ".join(str(error).split())) from None
  return check(holder.value)


def _literal(text: str):
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def _nearest(key: str, known) -> str:
  near = difflib.get_close_matches(key, known, n=1)
  return f"did you mean config.{near[0]}?" if near else "the resolved config that a run prints shows every key"


def from_json(text: str) -> ml_collections.ConfigDict:
  """The config of a finished run; resuming and exporting read this, never the recipe again."""
  return ml_collections.FrozenConfigDict(json.loads(text))


def to_json(config) -> str:
  """Every resolved value, as JSON."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


# What a value may be, by key. A key of a recipe that is not here is refused, so a misspelt one cannot become a silent
# default. Keys that end in `.` open a section that goes to a science function as keyword arguments, which that function
# checks; its keys may be left out.
_POSITIVE = (lambda v: v > 0, "a number above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "a number of at least 0")
_SHARE = (lambda v: 0 <= v <= 1, "a share between 0 and 1")
_ANY = (lambda v: True, "")
SCHEMA = {
  "seed": _NOT_NEGATIVE,
  "data.train": (bool, "a data set such as fashion:train or folder:/my/images"),
  "data.test": _ANY,
  "data.data_dir": _ANY,
  "data.max_bad_fraction": _SHARE,
  "batch_size": _POSITIVE,
  "microbatches": _POSITIVE,
  "microbatch_norm": (lambda v: v in ("microbatch", "exact"), "microbatch or exact"),
  "zero1": (lambda v: isinstance(v, bool), "True (each device keeps a share of the optimizer state) or False"),
  "train_epochs": _NOT_NEGATIVE,
  "train_steps": _NOT_NEGATIVE,
  "augment.": _ANY,
  "encoder.": _ANY,
  "projector.": _ANY,
  "memory.": _ANY,
  "loss.": _ANY,
  "loss.temperature": _POSITIVE,
  "loss.reduction": (lambda v: v in ("mean", "official_sum"), "mean or official_sum"),
  "loss.precision": (lambda v: v in ("highest", "high", "default"), "highest, high or default"),
  "optimizer.name": _ANY,
  "optimizer.base_lr": _POSITIVE,
  "optimizer.lr_scaling": _ANY,
  "optimizer.warmup_epochs": _NOT_NEGATIVE,
  "optimizer.momentum": (lambda v: 0 <= v < 1, "a number of at least 0 and below 1"),
  "optimizer.weight_decay": _NOT_NEGATIVE,
  "evaluate.crop": (lambda v: 0 < v <= 1, "a share above 0 and at most 1"),
  "evaluate.batch_size": _POSITIVE,
  "evaluate.train_examples": _NOT_NEGATIVE,
  "evaluate.every_steps": _NOT_NEGATIVE,
  "evaluate.every_epochs": _NOT_NEGATIVE,
  "evaluate.knn_k": _POSITIVE,
  "evaluate.knn_temperature": _POSITIVE,
  "checkpoint.every_steps": _NOT_NEGATIVE,
  "checkpoint.every_epochs": _NOT_NEGATIVE,
  "checkpoint.keep": _POSITIVE,
  "log.every_steps": _POSITIVE,
  "log.wandb": (lambda v: isinstance(v, str), "a project of Weights & Biases, or '' for none"),
  "log.profile_steps": _NOT_NEGATIVE,
  "rollback.": _ANY,
  "probe.method": (lambda v: v in ("lbfgs", "lbfgs_45", "sgd"), "lbfgs, lbfgs_45 or sgd"),
  "probe.train_epochs": _POSITIVE,
  "probe.batch_size": _POSITIVE,
  "probe.base_lr": _POSITIVE,
}


_EVERY_TRAINING = (
  "seed",
  "data.",
  "batch_size",
  "train_",
  "augment.",
  "encoder.",
  "optimizer.",
  "evaluate.crop",
  "evaluate.batch_size",
  "evaluate.every",
  "checkpoint.",
  "log.",
  "rollback.",
)
_SHARED = {key: rule for key, rule in SCHEMA.items() if key.startswith(_EVERY_TRAINING)}
_START = {
  "program": _ANY,
  "start": _ANY,  # folder of a run, or an exported or imported encoder; empty: from scratch
  "tune_after": (lambda v: -1 <= v <= 4, "-1 (all is trained), 0 (frozen stem) or 1 to 4 (groups frozen up to it)"),
  "tap": _NOT_NEGATIVE,
  "projector.": _ANY,
  "labels.fraction": (lambda v: 0 < v <= 1, "a share above 0 and at most 1"),
  "labels.list": _ANY,
  "labels.seed": _NOT_NEGATIVE,
}
SCHEMAS = {
  "pretrain": SCHEMA,
  "finetune": {**_SHARED, **_START},
  "distill": {
    **_SHARED,
    **_START,
    "teacher": (bool, "the folder of a run of simclr finetune"),
    "temperature": _POSITIVE,
    "alpha": (lambda v: 0 < v <= 1, "a share above 0 and at most 1, 1 for no labels"),
    "cache": _ANY,
  },
  "downstream": {
    "program": _ANY,
    "seeds": (bool, "at least one seed, such as (0,)"),
    "pretrain": _ANY,
    "pretrain_epochs": _POSITIVE,
    "finetune": _ANY,
    "shares": (lambda v: v and all(0 < share <= 1 for share in v), "shares of the labels, such as (0.01, 0.1)"),
    "distill": _ANY,
    "distill_share": (lambda v: 0 < v <= 1, "one of the shares"),
    "transfer": _ANY,
  },
  "transfer": {
    "program": _ANY,
    "seed": _NOT_NEGATIVE,
    "start": (bool, "the folder of a run, or an exported or imported encoder"),
    "supervised": _ANY,
    "methods": (lambda v: v and set(v) <= {"linear", "finetune"}, "linear, finetune or both"),
    "rows.": _ANY,
    "data_dir": _ANY,
    "samples": _POSITIVE,
    "augment.": _ANY,
    "evaluate.crop": SCHEMA["evaluate.crop"],
    "evaluate.batch_size": _POSITIVE,
    "finetune.recipe": _ANY,
    "finetune.batch_size": _POSITIVE,
    **{
      f"{section}.{key}": rule
      for section in ("finetune", "from_scratch")
      for key, rule in (
        ("train_steps", _POSITIVE),
        ("base_lrs", (bool, "at least one learning rate")),
        ("weight_decays", (bool, "at least one weight decay, such as 0.0")),
      )
    },
  },
}


def program(config) -> str:
  """The command that a recipe is for."""
  return config.get("program", "pretrain")


_OPTIONAL = ("log.wandb", "log.profile_steps")  # off where a recipe does not name them


def check(config):
  """The config, frozen, if every key is known and every value possible; else ValueError on one line."""
  flat = flatten(config)
  if program(config) not in SCHEMAS:
    raise ValueError(f"config.program={config.program!r}: expected one of {', '.join(SCHEMAS)}")
  schema = SCHEMAS[program(config)]
  sections = tuple(key for key in schema if key.endswith("."))
  for key, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"config.{key}={value}: expected a finite number")
    rule = schema.get(key) or (_ANY if key.startswith(sections) else None)
    if rule is None:
      raise ValueError(f"config.{key}: no such key; {_nearest(key, schema)}")
    possible, expected = rule
    if not possible(value):
      raise ValueError(f"config.{key}={value!r}: expected {expected}")
  recipe = {"pretrain": "smoke.py"}.get(program(config), f"{program(config)}.py")
  missing = [key for key in schema if not key.startswith(sections) and key not in flat and key not in _OPTIONAL]
  if missing:
    raise ValueError(f"config.{missing[0]} is missing from the recipe; configs/{recipe} shows every key")
  if "train_steps" in flat and not config.train_epochs and not config.train_steps:
    raise ValueError("config.train_epochs=0 and config.train_steps=0: set one of them")
  return ml_collections.FrozenConfigDict(config)


def flatten(config, prefix="") -> dict:
  """{dotted key: value} of a nested config."""
  out = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      out.update(flatten(value, f"{prefix}{key}."))
    else:
      out[f"{prefix}{key}"] = value
  return out


def every(section, num_examples: int, batch_size: int) -> int:
  """Interval in steps of a section with `every_steps` and `every_epochs`, of which one may be set; 0 = never."""
  if section.every_steps and section.every_epochs:
    raise ValueError(
      f"every_steps={section.every_steps} and every_epochs={section.every_epochs}: set one and leave the other 0"
    )
  if section.every_epochs:
    return max(1, round(section.every_epochs * num_examples / batch_size))
  return section.every_steps


def difference(before, now) -> list[tuple]:
  """[(key, value before, value now)] of two configs; a tuple and a list with the same entries are equal."""
  a, b = (flatten(json.loads(to_json(c))) for c in (before, now))
  return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check_same(kept, now):
  """Raises ValueError, in one line, if a run is to be resumed with another config than the one `kept` with it."""
  changed = difference(kept, now)
  if changed:
    key, before, value = changed[0]
    raise ValueError(
      f"--resume: config.{key} is {before!r} in the run and {value!r} now; use the run's value, or another --workdir"
    )
