"""Configs: frozen dataclasses that know type, default, range and meaning of every key, filled from recipes and flags.

A config holds rules, such as how a learning rate follows from the batch size; the arithmetic is done by the code that
uses them, so changing one value on the command line changes what depends on it.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import numbers
import pathlib
import re
import shutil
import textwrap
import types
import typing

from simclr_jax.runtime.errors import UserError

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
REQUIRED = dataclasses.MISSING


# ---- keys and sections -----------------------------------------------------------------------------------------------


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def frozen(cls):
  """Decorator for every section."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def key(
  default, meaning: str, *, at_least=None, above=None, at_most=None, below=None, choices=(), needed="", option=True
):
  """A key of a section.

  Args:
    default: its value if none is given, or REQUIRED.
    meaning: one line for the reader of `--help`.
    at_least, above, at_most, below: limits of the number, or of every number of a tuple.
    choices: the possible values, or those of a tuple's elements.
    needed: what to give, for a value that must not be empty.
    option: whether it is an argument of the function that `**section` goes to.
  """
  limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
  about = {"meaning": meaning, **limits, "choices": choices, "needed": needed, "option": option}
  return dataclasses.field(default=default, metadata=about)


def section(kind, /, **defaults):
  """A nested section; the defaults of its keys can be changed here."""
  return dataclasses.field(default_factory=functools.partial(kind, **defaults))


@frozen
class Section:
  """Base of all sections and configs: values are always converted to the type of their key and checked.

  `**section` gives the keys that are arguments of its function, without those that are None, so that functions that know
  nothing of configs can take one.
  """

  def __post_init__(self):
    for field in dataclasses.fields(self):
      object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
    self.check()

  def check(self):
    """Raises UserError if values contradict each other; keys in the message are relative to this section."""

  def keys(self):
    fields = dataclasses.fields(self)
    return [f.name for f in fields if f.metadata.get("option", True) and getattr(self, f.name) is not None]

  def __getitem__(self, name):
    return getattr(self, name)


class _Text(str):
  """A value as it was typed, which its key's type has yet to parse."""

  __repr__ = str.__str__


def _checked(field, value):
  if _section_of(field.type) or _is_table(field.type):
    return value
  try:
    converted = _convert(value, field.type)
  except (SyntaxError, TypeError, ValueError):
    raise UserError(f"{field.name}={value!r}: expected {expected(field)}") from None
  m = field.metadata
  every = converted if isinstance(converted, tuple) else () if converted is None else (converted,)
  possible = all(
    (m["at_least"] is None or v >= m["at_least"])
    and (m["above"] is None or v > m["above"])
    and (m["at_most"] is None or v <= m["at_most"])
    and (m["below"] is None or v < m["below"])
    and (not m["choices"] or v in m["choices"])
    for v in every
  )
  if not possible or m["needed"] and not converted:
    raise UserError(f"{field.name}={value!r}: expected {expected(field)}")
  return converted


def _convert(value, kind):
  """`value` as the type `kind` of a key.

  Raises:
    SyntaxError, TypeError, ValueError: it is not of that type.
  """
  kind, optional = _without_none(kind)
  if optional and (value is None or (isinstance(value, _Text) and value == "None")):
    return None
  if typing.get_origin(kind) is tuple:
    kinds = typing.get_args(kind)
    value = _literal(value) if isinstance(value, _Text) else value
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
    return tuple(_convert(v, k) for v, k in zip(value, kinds, strict=True))
  if isinstance(value, _Text):
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    value = words.get(value.lower(), value) if kind is bool else kind(value)
  abstract = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
  if not isinstance(value, abstract) or (isinstance(value, bool) and kind is not bool):
    raise TypeError
  value = kind(value)
  if kind is float and not math.isfinite(value):
    raise ValueError
  return value


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return str(text)


def _without_none(kind):
  """(the type, whether None is possible too)."""
  if not isinstance(kind, types.UnionType):
    return kind, False
  (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
  return kind, True


def _section_of(kind):
  """The class of a key that is a section, else None."""
  kind, _ = _without_none(kind)
  return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _is_table(kind) -> bool:
  """Whether a key holds {name: section}, or a dict that nobody checks."""
  return typing.get_origin(kind) is dict


def _default_section(field):
  """The section that stands where none is given, or None."""
  return None if field.default_factory is REQUIRED else field.default_factory()


# ---- from dicts and back ---------------------------------------------------------------------------------------------


def build(kind, values: dict):
  """A config of the class `kind` from nested dicts, such as those of a recipe or of JSON; missing keys get their defaults.

  Raises:
    UserError: unknown or missing key, value of the wrong type or out of range; one line, with the path of the key.
  """
  return _build(kind, values, "", kind, None)


def _build(kind, values, path, root, default):
  fields = {field.name: field for field in dataclasses.fields(kind)}
  made = {name: getattr(default, name) for name in fields} if default is not None else {}
  for name, value in values.items():
    if name not in fields:
      raise _unknown(root, f"{path}{name}", value)
    made[name] = _part(fields[name], value, f"{path}{name}", root)
  for name, field in fields.items():
    if name not in made and field.default is REQUIRED and field.default_factory is REQUIRED:
      if not _section_of(field.type):
        raise UserError(f"config.{path}{name} is missing: expected {expected(field)}")
      made[name] = _part(field, {}, f"{path}{name}", root)  # names the key in it that is missing
  try:
    return kind(**made)
  except UserError as error:
    raise UserError(f"config.{path}{error}") from None


def _part(field, value, path, root):
  kind, table = _section_of(field.type), _is_table(field.type)
  value = to_dict(value) if isinstance(value, Section) else value
  if isinstance(value, _Text) and (kind or table):
    value = _literal(value)
  if not (kind or table):
    if isinstance(value, dict):
      raise _unknown(root, path, value)
    return value
  if value is None and _without_none(field.type)[1]:
    return None
  if not isinstance(value, dict):
    raise UserError(f"config.{path}={value!r}: this is a section; give its keys, as --config.{path}.KEY=VALUE")
  if table:
    row = _section_of(typing.get_args(field.type)[1])
    return {k: _build(row, v, f"{path}.{k}.", root, None) for k, v in value.items()} if row else value
  return _build(kind, value, f"{path}.", root, _default_section(field))


def _unknown(root, path, value=None) -> UserError:
  """The error about a key that does not exist, with the nearest that does, wherever it is."""
  while isinstance(value, dict) and value:
    name, value = next(iter(value.items()))
    path = f"{path}.{name}"
  known = [row.key for row in describe(root)]
  leaf = path.rpartition(".")[2]
  near = [one for one in known if one.rpartition(".")[2] == leaf] or difflib.get_close_matches(path, known, n=1)
  if not near:
    leaves = {one.rpartition(".")[2]: one for one in known}
    near = [leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=1)]
  hint = f"did you mean config.{near[0]}?" if near else "--help of the program lists every key"
  return UserError(f"config.{path}: no such key; {hint}")


def to_dict(config) -> dict:
  """A config or section as nested dicts with every key except sections that are None; tuples stay tuples."""
  if isinstance(config, Section):
    parts = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {f.name: to_dict(part) for f, part in parts.items() if part is not None or not _section_of(f.type)}
  return {name: to_dict(value) for name, value in config.items()} if isinstance(config, dict) else config


def replace(config, changes: dict):
  """A checked copy with the values of `changes`, {dotted key: value}; a section may be given whole, as dict or Section.

  Raises:
    UserError: as for `build`.
  """
  return build(type(config), merge(to_dict(config), changes, type(config)))


def merge(values: dict, changes: dict, kind) -> dict:
  """Nested dicts of a config of class `kind` with the values of `changes`, {dotted key: value}, in them.

  Raises:
    UserError: a key goes through something that is not a section.
  """
  for dotted, value in changes.items():
    *sections, leaf = dotted.split(".")
    place = values
    for name in sections:
      if place.get(name) is None:
        place[name] = {}
      place = place[name]
      if not isinstance(place, dict):
        raise _unknown(kind, dotted)
    place[leaf] = value
  return values


def override(config, overrides):
  """A checked copy with `--config.key=value` strings applied.

  Raises:
    UserError: as for `build`.
  """
  return replace(config, parse(overrides))


def parse(overrides) -> dict:
  """{dotted key: value} of `--config.key=value` strings, for `replace`; the type of the key says what the value is."""
  changes = {}
  for text in overrides:
    name, equals, value = text.removeprefix("--config.").partition("=")
    if not equals:
      raise UserError(f"{text}: expected --config.{name}=VALUE")
    changes[name] = _Text(value)
  return changes


def flatten(config, prefix="") -> dict:
  """{dotted key: value} of a config, or of nested dicts."""
  out = {}
  for name, value in (to_dict(config) if isinstance(config, Section) else config).items():
    if isinstance(value, dict):
      out.update(flatten(value, f"{prefix}{name}."))
    else:
      out[f"{prefix}{name}"] = value
  return out


def to_json(config) -> str:
  """Every resolved value, as JSON."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True)


def difference(before, now) -> list[tuple]:
  """[(key, value before, value now)] of two configs; a tuple and a list with the same entries are equal."""
  a, b = (flatten(json.loads(to_json(c))) for c in (before, now))
  return [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def check_same(kept, now):
  """Raises UserError, in one line, if a run is to be resumed with another config than the one `kept` with it."""
  changed = difference(kept, now)
  if changed:
    name, before, value = changed[0]
    raise UserError(
      f"--resume: config.{name} is {before!r} in the run and {value!r} now; use the run's value, or another --workdir"
    )


def every(part, num_examples: int, batch_size: int) -> int:
  """Interval in steps of a section with `every_steps` and `every_epochs`, at most one of which is set; 0 = never."""
  if part.every_epochs:
    return max(1, round(part.every_epochs * num_examples / batch_size))
  return part.every_steps


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe_folder() -> pathlib.Path:
  """Folder of the recipes: inside the installed package, or beside it in a checkout."""
  inside = PACKAGE / "configs"
  return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_recipe(name: str) -> str:
  """The file of a recipe: `path[:argument]`.

  A bare name such as `smoke`, also written `configs/smoke.py`, is one that ships with the package; everything else, which
  has a folder or a suffix, is the path of a Python file.  Each may have an `:argument`.

  Raises:
    UserError: no such file, or not a Python file; names the nearest recipe.
  """
  path, colon, argument = name.partition(":")
  given = pathlib.Path(path)
  bare = path and path == given.name and not given.suffix
  shipped = recipe_folder() / f"{given.stem}.py"
  if not bare and given.is_file():
    if given.suffix != ".py":
      raise UserError(f"--config={name}: {path} is not a recipe, which is a Python file with a function get_config")
    return f"{path}{colon}{argument}"
  if (bare or path in (f"configs/{given.stem}", f"configs/{given.stem}.py")) and shipped.is_file():
    return f"{shipped}{colon}{argument}"
  known = sorted(p.stem for p in recipe_folder().glob("[!_]*.py"))
  near = difflib.get_close_matches(given.stem, known, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}"
  what = "no such recipe" if bare else f"no such recipe; {path} is not a file"
  raise UserError(f"--config={name}: {what}; {hint}")


def read_recipe(name: str) -> dict:
  """The nested dicts of what a recipe's `get_config`, called with the argument after the colon, returns.

  Raises:
    UserError: no such recipe or variant, or an error in the file.
  """
  path, colon, argument = find_recipe(name).partition(":")
  spec = importlib.util.spec_from_file_location(f"recipe_{pathlib.Path(path).stem}", path)
  assert spec and spec.loader  # find_recipe gives the path of a Python file
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*[argument] if colon else [])
  except Exception as error:  # whatever a recipe raises
    words = " ".join(str(error).split())
    if not isinstance(error, ValueError):
      what = f"the recipe has no variant {argument!r}" if hasattr(module, "get_config") else "the recipe does not run"
      words = f"{what} ({type(error).__name__}: {words})"
    raise UserError(f"--config={name}: {words}") from None
  return config.to_dict()


def read_config(workdir, flag: str = "--workdir=") -> str:
  """config.json of a run.

  Args:
    flag: what the message puts before the folder; empty where it is another flag, or a key, that names it.

  Raises:
    ValueError: there is no run in this folder, or the file is damaged.
  """
  from simclr_jax.runtime import files  # a tenth of a second, which --help does not wait for

  folder = files.absolute(workdir)
  try:
    text = files.read_sealed(folder / "config.json")
  except FileNotFoundError:
    raise UserError(f"{flag}{workdir}: no run here (config.json is missing); `simclr pretrain` makes one") from None
  except UserError as error:
    raise UserError(f"{error} (a copy is in {folder / 'checkpoints'}/STEP/config/metadata)") from None
  try:
    if not isinstance(json.loads(text), dict):
      raise ValueError
  except ValueError:
    raise UserError(f"{workdir}/config.json is damaged: it is not a JSON object; restore it from a copy") from None
  return text


# ---- for the reader --------------------------------------------------------------------------------------------------


class Row(typing.NamedTuple):
  """What `--help` and the page say about a key."""

  key: str
  type: str
  default: str
  meaning: str


def describe(kind, prefix="", default=None) -> list[Row]:
  """Every key of a config's class, in order; `default` is the section that stands where none is given, if there is one."""
  rows = []
  for field in dataclasses.fields(kind):
    name = f"{prefix}{field.name}"
    if part := _section_of(field.type):
      rows += describe(part, f"{name}.", _default_section(field))
    elif _is_table(field.type):
      row = typing.get_args(field.type)[1]
      rows += describe(row, f"{name}.NAME.") if _section_of(row) else []
    else:
      value = getattr(default, field.name, field.default)
      meaning = field.metadata["meaning"]
      choices = [str(choice) for choice in field.metadata["choices"]]
      unnamed = choices if any(choice not in meaning for choice in choices) else []
      values = ", ".join(unnamed) or _limits(field.metadata).removeprefix("of ")
      meaning += f" ({values})" if values else ""
      shown = "required" if value is REQUIRED else str(value) if value != "" else "''"
      rows.append(Row(name, _type_name(field.type), shown, meaning))
  return rows


def help_text(kind) -> str:
  """Every key of a config's class with type, default and meaning, as wide as the terminal."""
  return "keys of the config\n" + columns([row._replace(key=f"--config.{row.key}") for row in describe(kind)])


def explain(config, origin) -> str:
  """Every resolved key of a config with its value, where that comes from, and its meaning, as wide as the terminal.

  Args:
    origin: key -> "default", or who gave the value; a default that other values have changed becomes "derived".
  """
  about = {row.key: row for row in describe(type(config))}
  rows = []
  for name, value in flatten(config).items():
    row = about.get(name) or about.get(re.sub(r"\.[^.]+\.", ".NAME.", name, count=1))
    shown, source = "''" if value == "" else str(value), origin(name)
    if row and source == "default" and shown != row.default:
      source = "derived"
    rows.append((name, shown, source, row.meaning if row else "not used"))
  return columns(rows)


def columns(rows) -> str:
  """Rows of four cells as text, the last cell of each wrapped, as wide as the terminal."""
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  indent = " " * (sum(widths) + 8)
  width = max(shutil.get_terminal_size((140, 24)).columns, len(indent) + 40)
  lines = []
  for row in rows:
    first = "  " + "  ".join(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)) + "  "
    lines += textwrap.wrap(row[3], width, initial_indent=first, subsequent_indent=indent, drop_whitespace=True)
  return "\n".join(lines)


def expected(field) -> str:
  """What a key may be, for the end of an error."""
  m, (kind, optional) = field.metadata, _without_none(field.type)
  if m["needed"]:
    return m["needed"]
  if m["choices"]:
    what = f"one of {', '.join(map(str, m['choices']))}"
  elif typing.get_origin(kind) is tuple:
    example = f" such as {field.default!r}" if field.default else ""
    what = f"a tuple{example} of {_type_name(kind)} {_limits(m)}".rstrip()
  else:
    what = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
    what = f"{what} {_limits(m)}".rstrip()
  return f"{what} or None" if optional else what


def _limits(m) -> str:
  words = {"at_least": "of at least", "above": "above", "at_most": "at most", "below": "below"}
  return " and ".join(f"{word} {m[name]}" for name, word in words.items() if m[name] is not None)


def _type_name(kind) -> str:
  kind, optional = _without_none(kind)
  if typing.get_origin(kind) is tuple:
    name = "(" + ", ".join("..." if one is ... else _type_name(one) for one in typing.get_args(kind)) + ")"
  else:
    name = kind.__name__
  return f"{name} or None" if optional else name
