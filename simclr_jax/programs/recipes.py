"""`simclr recipes`: every recipe with what it costs, what it should score and where this comes from.

A recipe's docstring is a contract: a title, then the fields below, whose further lines are indented.  Imports no JAX.
"""

import ast
import pathlib
import re
import shutil
import textwrap

from simclr_jax.programs import config as config_lib

FIELDS = ("Command", "Hardware", "Expected", "Source", "Data", "Rules")
SHOWN = {"Hardware": "hardware, time", "Expected": "expected", "Source": "source"}
LINES = 4  # of a cell


def header(path) -> dict[str, str]:
  """{"title": ..., "Command": ..., ...} of a recipe's file; a field's text keeps its lines, without their indentation."""
  text = ast.get_docstring(ast.parse(pathlib.Path(path).read_text())) or ""
  title, *rest = re.split(rf"^({'|'.join(FIELDS)}):", text, flags=re.MULTILINE)
  fields = {"title": title}
  fields.update(zip(rest[::2], rest[1::2], strict=True))
  return {key: "\n".join(line.strip() for line in value.strip().splitlines()) for key, value in fields.items()}


def all_headers() -> dict[str, dict[str, str]]:
  """{name: header} of the recipes that ship with the package."""
  return {path.stem: header(path) for path in sorted(config_lib.recipe_folder().glob("[!_]*.py"))}


def table(headers: dict, width: int) -> str:
  """The headers as text of at most `width` columns: one row per recipe, long cells cut after LINES lines."""
  first = max(len(name) for name in headers)
  space = max(width - first - 2 * len(SHOWN), 30)
  widths = [first, int(0.28 * space), int(0.44 * space), int(0.28 * space)]
  out = _row(["recipe", *SHOWN.values()], widths)
  for name, fields in headers.items():
    out += [""] + _row([name, *(" ".join(fields.get(key, "").split()) for key in SHOWN)], widths)
  return "\n".join(out)


def _row(cells, widths):
  columns = [
    textwrap.wrap(text, w, max_lines=LINES, placeholder=" …") or [""] for text, w in zip(cells, widths, strict=True)
  ]
  height = max(map(len, columns))
  columns = [column + [""] * (height - len(column)) for column in columns]
  return [
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
    for line in zip(*columns, strict=True)
  ]


def run(name: str = ""):
  """The program `simclr recipes`: prints the table, or the full header of one recipe.

  Raises:
    ValueError: no such recipe.
  """
  if not name:
    print(table(all_headers(), shutil.get_terminal_size((140, 24)).columns))
    print("\nsimclr recipes NAME shows the full header")
    return
  path = config_lib.find_recipe(name).partition(":")[0]
  fields = header(path)
  print(f"{path}\n\n{fields.pop('title')}\n")
  for field, text in fields.items():
    print(textwrap.indent(text, " " * 11).replace(" " * 11, f"{field + ':':11}", 1))


def main(flags, overrides) -> int:
  run(flags.name)
  return 0
