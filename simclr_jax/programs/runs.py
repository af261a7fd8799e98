"""`simclr runs DIR`: a comparison of the runs below a folder."""

import contextlib
import dataclasses
import json
import os
import urllib.parse

from simclr_jax import report
from simclr_jax.programs import config as config_lib
from simclr_jax.report.tables import is_finite, is_number
from simclr_jax.runtime import files
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime.errors import UserError

INSIDE_A_RUN = ("checkpoints", "encoder", "map")  # folders of a run that are not searched
NUMBERS = {  # column: (key, factor)
  "loss": ("loss", 1.0),
  "contrastive acc, %": ("contrastive_accuracy", 100.0),
  "kNN, %": ("knn", 100.0),
  "linear, %": ("linear", 100.0),
  "test, %": ("accuracy", 100.0),
}


@dataclasses.dataclass(frozen=True)
class RunSummary:
  """What the folder of a run says about it.

  `numbers` are the latest of each key that was logged, and the scores of h; `total` is 0 where the folder has none.
  """

  name: str
  program: str
  recipe: str
  config: dict
  step: int
  total: int
  complete: bool
  hours: float
  numbers: dict
  verdict: str
  history: list
  damaged: tuple[str, ...] = ()  # files that are not what was written


def find(folder) -> list[RunSummary]:
  """Every run in or below a folder, sorted by name."""
  folder, found = files.absolute(folder), []

  def look(path):
    has_config = (path / "config.json").exists()
    if has_config and not (path / "card.json").exists():  # of an export for timm or Hugging Face
      name = "." if path == folder else str(path.relative_to(folder))
      try:
        found.append(open_run(path, name))
      except Exception as error:  # whatever a damaged file leads to: the other runs are shown
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found.append(RunSummary(name, "", "", {}, 0, 0, False, 0.0, {}, "", [], damaged=(why,)))
    with contextlib.suppress(PermissionError):
      for below in sorted(path.iterdir()):
        if not (has_config and below.name in INSIDE_A_RUN) and not below.name.startswith(".") and _is_folder(below):
          look(below)

  look(folder)
  return found


def _is_folder(path) -> bool:
  """Links are not followed, for they may lead back."""
  return path.is_dir() and (files.is_remote(path) or not os.path.islink(path))


def _json(path, damaged: list) -> dict:
  """A JSON object; {} if there is none, and its name in `damaged` if there is something else."""
  if not path.exists():
    return {}
  try:
    found = json.loads(files.read_sealed(path))
  except (OSError, ValueError):
    found = None
  if not isinstance(found, dict):
    damaged.append(f"{path.name} is damaged")
    return {}
  return found


def open_run(path, name: str) -> RunSummary:
  """What the folder of a run says about it; whatever is missing or truncated is left out."""
  damaged = []
  config, about, scores = (_json(path / f"{file}.json", damaged) for file in ("config", "run", "scores"))
  history = [_known(row, "metrics.jsonl", damaged) for row in metrics_lib.read(path)]
  of_h = scores.get("scores", {})
  if isinstance(of_h, dict):
    of_h = of_h.get("h", of_h.get("SimCLR h", of_h))  # the latter before 0.2
  numbers = {}
  for row in (*history, _known(of_h, "scores.json", damaged)):
    numbers.update(row)
  return RunSummary(
    name=name,
    program=_text(config.get("program", "pretrain"), "config.json", damaged),
    recipe=_text(about.get("recipe", ""), "run.json", damaged),
    config=config_lib.flatten(config),
    step=int(numbers.get("step", 0)),
    total=int(about.get("total_steps") or config.get("train_steps") or 0),
    complete=(path / "COMPLETE").exists(),
    hours=numbers.get("seconds", 0.0) / 3600,
    numbers=numbers,
    verdict=str(numbers.get("verdict", "")),
    history=history,
    damaged=tuple(dict.fromkeys(damaged)),
  )


def _known(row, file: str, damaged: list) -> dict:
  """The finite numbers and the verdict of a row; its file is named in `damaged` if it has no row, or no number, there."""
  if not isinstance(row, dict):
    damaged.append(f"{file} is damaged")
    return {}
  known = {key: value for key, value in row.items() if is_finite(value)}
  if isinstance(row.get("verdict"), str):
    known["verdict"] = row["verdict"]
  if not all(row.get(key) is None or is_number(row[key]) for key in ("seconds", *(key for key, _ in NUMBERS.values()))):
    damaged.append(f"{file} is damaged")
  return known


def _text(value, file: str, damaged: list) -> str:
  """The value if it is a text; else nothing, and the name of its file in `damaged`."""
  if isinstance(value, str):
    return value
  damaged.append(f"{file} is damaged")
  return ""


def differences(runs) -> dict[str, list]:
  """{key: its value in every run, or None} for the keys of the configs in which runs of one program differ."""
  keys = dict.fromkeys(key for run in runs for key in run.config)
  values = {key: [run.config.get(key) for run in runs] for key in keys}
  out = {}
  for key, row in values.items():
    by_program = {}
    for run, value in zip(runs, row, strict=True):
      by_program.setdefault(run.program, set()).add(json.dumps(value))
    if any(len(different) > 1 for different in by_program.values()):
      out[key] = row
  return out


def table(runs) -> tuple[list[str], list[list[str]]]:
  """(headings, a row of cells for each run); a number that no run has gets no column."""
  known = {name: what for name, what in NUMBERS.items() if any(what[0] in run.numbers for run in runs)}
  head = ["run", "recipe", "steps", "state", *known, "hours", "verdict"]
  rows = []
  for run in runs:
    cells = [run.name, run.recipe or run.program, f"{run.step:,}" + (f" of {run.total:,}" if run.total else "")]
    cells.append("damaged" if run.damaged else "complete" if run.complete else "not complete")
    for key, factor in known.values():
      value = run.numbers.get(key)
      cells.append("–" if value is None else f"{factor * value:.3f}" if factor == 1 else f"{factor * value:.1f}")
    cells += [f"{run.hours:.2f}" if run.hours else "–", run.verdict.partition(":")[0] or "–"]
    rows.append(cells)
  return head, rows


def run(folder, output=None) -> list[RunSummary]:
  """The program `simclr runs`: prints the table and the differences of the configs, writes runs.html.

  Raises:
    ValueError: no run in or below the folder.
  """
  if not files.absolute(folder).is_dir():
    raise UserError(f"{folder} is not a folder: name one with runs in it")
  runs = find(folder)
  if not runs:
    raise UserError(f"{folder}: no run in or below it (a run has a config.json); `simclr pretrain` makes one")
  head, rows = table(runs)
  print(report.aligned([head, *rows]))
  for one in runs:
    for why in one.damaged:
      print(f"{one.name}: {why}")
  different = differences(runs)
  if len(runs) > 1 and different:
    print(f"\nconfigs, where they differ from {runs[0].name}")
    print("\n".join(f"{one.name}  {_against(different, i)}" for i, one in enumerate(runs) if i))
  page = files.absolute(output or os.path.join(folder, "runs.html"))
  histories = {one.name: one.history for one in runs}
  report.write_runs(
    page,
    title=f"Runs in {files.absolute(folder).name}",
    summary=f"{len(runs):,} runs, {sum(one.complete for one in runs):,} of them complete.",
    runs=(head, [[_linked(name, folder, page), *cells] for name, *cells in rows]),
    numeric=(2, *range(4, len(head) - 1)),
    histories=histories,
    keys=("loss", "contrastive_accuracy", "knn", "rank"),
    differences=different
    and (["", *(one.name for one in runs)], [[key, *map(_shown, row)] for key, row in different.items()]),
  )
  print(f"\n{page}")
  return runs


def _against(different, i) -> str:
  """key=value of the keys in which run i differs from run 0."""
  return "  ".join(f"{key}={_shown(row[i])}" for key, row in different.items() if row[i] != row[0]) or "the same"


def _shown(value):
  return "–" if value is None else str(value)


def _linked(name, folder, page):
  """The name of a run as a cell of the table: a link to its page, if it has one."""
  path = files.absolute(folder) / name / "report.html"
  if not path.exists():
    return name
  if files.is_remote(path) != files.is_remote(page):  # there is no way from the one to the other
    return name
  return report.Link(name, urllib.parse.quote(os.fsencode(os.path.relpath(path, page.parent))))


def main(flags, overrides) -> int:
  run(flags.folder, flags.output)
  return 0
