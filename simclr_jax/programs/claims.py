"""`simclr claims`: claims about SimCLR, measured by small runs on this machine, each with an interval and a verdict.

The runs are the cells of programs/cells.py; the claims are those of programs/experiments.py.  Every finished cell is written
to claims.json at once, so a command that is killed and started again loses at most one cell.  Within a cell, SIGTERM and
Ctrl-C save the state.  Several commands at once, on one machine or on many that share the folder, divide the cells among
themselves.
"""

import collections
import dataclasses
import functools
import json
import re
import shutil

import numpy as np

from simclr_jax import report
from simclr_jax.evaluation import intervals
from simclr_jax.programs import cells, experiments
from simclr_jax.runtime import files, lock
from simclr_jax.runtime.errors import UserError
from simclr_jax.runtime.progress import duration

FILE, PAGE = "claims.json", "claims.html"


@dataclasses.dataclass(frozen=True)
class Budget:
  """How large the runs are.

  Attributes:
    seeds: at least three, because an interval from two runs is useless.
    epochs: training epochs of most settings.
    train, test: the largest number of images of a data set to use.
    data: the data sets to use if none are named.
    changes: values that are set in every cell's config.
    groups: of the claims to measure.
    pairs: whether to measure every pair of the heat map, also those that no claim needs.
  """

  seeds: tuple[int, ...]
  epochs: float
  train: int
  test: int
  data: tuple[str, ...]
  groups: tuple[str, ...] = ("quick",)
  changes: tuple[tuple[str, object], ...] = ()
  pairs: bool = False


BUDGETS = {
  "quick": Budget(seeds=(0, 1, 2), epochs=8.0, train=5000, test=5000, data=("textures",)),
  "full": Budget(
    seeds=(0, 1, 2),
    epochs=8.0,
    train=10_000,
    test=5000,
    data=("textures", "fashion"),
    groups=("quick", "full"),
    pairs=True,
  ),
  "methods": Budget(
    seeds=(0, 1, 2), epochs=8.0, train=20_000, test=10_000, data=("textures", "fashion"), groups=("methods",)
  ),
}
# What a cell takes on two idle CPU cores, for --plan before anything was measured: seconds per pair of 16-pixel views
# in the small-scale network, the same where TensorFlow makes the views, and seconds for everything except training.
SECONDS_A_PAIR, SECONDS_A_PAIR_ON_HOST, SECONDS_BESIDE = 0.8e-3, 1.6e-3, 5.0
SECONDS_TO_COMPILE = 8.0  # once for the seeds of a setting


@dataclasses.dataclass(frozen=True)
class Cell:
  """One small run: the name of its setting, and its config."""

  setting: str
  images: cells.Images
  config: object
  key: str

  @property
  def seed(self) -> int:
    return self.config.seed


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of a claim on a data set.

  Attributes:
    interval: of the difference, in the claim's unit; None where cells are missing.
    verdict: a verdict of `intervals`, "diverged", or "not measured".
    values: the scores in the formula, by their names in it, as means over the seeds.
  """

  claim: experiments.Claim
  data: str
  interval: intervals.Interval | None
  verdict: str
  values: dict[str, float]


def terms(formula: str) -> list[tuple[int, str, str]]:
  """[(sign, setting or best(setting,setting), score)] of a claim's formula."""
  found = re.findall(r"([+-]?)\s*((?:(?:best|each)\([^)]*\)|[\w.]+?))\.([a-z]\w*)(?=\s|$)", formula)
  return [(-1 if sign == "-" else 1, setting, score) for sign, setting, score in found]


def settings_of(claim) -> list[str]:
  """The names of the settings that a claim compares."""
  return [name for _, setting, _ in terms(claim.formula) for name in alternatives(setting)]


def alternatives(setting: str) -> list[str]:
  """The settings that `setting` in a formula stands for: itself, or those in its best(...) or each(...)."""
  return setting.removeprefix("best(").removeprefix("each(").removesuffix(")").split(",")


def claims_of(budget: Budget, images: cells.Images):
  """The claims that the budget measures on a data set: those whose batches it fills."""
  return [c for c in _claims_of(budget, images) if all(_fills(name, budget, images) for name in settings_of(c))]


def _claims_of(budget, images):
  return [c for c in experiments.CLAIMS if set(c.groups) & set(budget.groups) and (images.has_color or not c.color)]


def _fills(name: str, budget, images) -> bool:
  """Whether a batch of a setting has no image twice, which would be a negative of itself."""
  setting = experiments.SETTINGS[name]
  return setting.kind in (cells.PIXELS, cells.HISTOGRAM, cells.UNTRAINED) or _batch(name, budget) <= len(images.train)


@functools.cache
def _batch(name: str, budget: Budget) -> int:
  setting = experiments.SETTINGS[name]
  return cells.config_of(setting, 0, budget.epochs, dict(budget.changes)).batch_size


def left_out(budget: Budget, images: cells.Images) -> str:
  """The claims that are not measured because the data set is smaller than their batches, in a sentence; or nothing."""
  measured = claims_of(budget, images)
  names = [claim.name for claim in _claims_of(budget, images) if claim not in measured]
  if not names:
    return ""
  return (
    f"{images.name} has {len(images.train):,} images to train on, fewer than a batch of: {', '.join(names)}; left out"
  )


def cells_of(budget: Budget, sets) -> list[Cell]:
  """All cells that the claims need, in the order in which they run; settings without a seed have one cell."""
  out = []
  for images in sets:
    needed = {name for claim in claims_of(budget, images) for name in settings_of(claim)}
    if budget.pairs and images.has_color:
      needed |= {name for name in experiments.SETTINGS if name.startswith("compose_") and _fills(name, budget, images)}
    for name, setting in experiments.SETTINGS.items():
      for seed in budget.seeds if name in needed else ():
        if seed != budget.seeds[0] and setting.kind in (cells.PIXELS, cells.HISTOGRAM):
          continue
        config = cells.config_of(setting, seed, budget.epochs, dict(budget.changes), images.name)
        out.append(Cell(name, images, config, cells.key(setting, config, images)))
  return out


class Results:
  """The numbers of the cells that have ended, in a file that is replaced as a whole after each.

  Raises:
    UserError: the file was not written by this class, or is damaged.
  """

  def __init__(self, folder):
    self._folder, self._file = folder, folder / FILE
    self.cells = {}
    self.read()

  def read(self):
    """Looks at the file again, to which others may have added."""
    if self._file.exists():
      try:
        self.cells = json.loads(files.read_text(self._file))["cells"]
      except (ValueError, KeyError, TypeError):
        raise UserError(f"{self._file} is damaged: move it away to measure everything again") from None

  def add(self, cell: Cell, numbers: dict):
    about = {"setting": cell.setting, "seed": cell.seed, "data": cell.images.name}
    self._write({cell.key: about | {"numbers": numbers}}, {})

  def conclude(self, end: dict):
    """Saves what was concluded from the cells, next to them."""
    self._write({}, end)

  def _write(self, cells: dict, end: dict):
    with lock.held(self._folder):
      self.read()
      self.cells |= cells
      files.write_text(self._file, json.dumps({**end, "cells": self.cells}, indent=1))

  def scores(self, todo) -> dict[tuple[str, str], dict[int, dict]]:
    """{(data set, setting): {seed: numbers}} of those cells in `todo` that have ended."""
    out = {}
    for cell in todo:
      if cell.key in self.cells:
        out.setdefault((cell.images.name, cell.setting), {})[cell.seed] = self.cells[cell.key]["numbers"]
    return out


def judge(claim, data: str, scores, seeds, confidence: float = 0.95) -> Finding:
  """What the cells of a data set say about a claim; `scores` is what `Results.scores` returns."""
  if every := re.search(r"each\([^)]*\)", claim.formula):
    return _judge_each(claim, every[0], data, scores, seeds)
  factor = 100.0 if claim.unit == "points" else 1.0
  total, values = np.zeros(len(seeds)), {}
  for sign, setting, score in terms(claim.formula):
    names = alternatives(setting)
    of = {name: scores.get((data, name), {}) for name in names}
    seeded = {name: [by_seed.get(seed, by_seed.get(seeds[0]) if len(by_seed) == 1 and _has_no_seed(name) else None) for seed in seeds] for name, by_seed in of.items()}  # fmt: skip
    if any(cell is None for row in seeded.values() for cell in row):
      return Finding(claim, data, None, "not measured", {})
    whole = {name: row for name, row in seeded.items() if not any("diverged" in cell for cell in row)}
    if not whole:
      return Finding(claim, data, None, "diverged", {})
    found = [cell.get(score, np.nan) for row in whole.values() for cell in row]
    if not np.isfinite(found).all():  # such as what needs colors, of gray images
      return Finding(claim, data, None, "not measured", {})
    chosen = max(whole, key=lambda name: np.mean([cell.get("validation", 0.0) for cell in whole[name]]))
    found = factor * np.array([cell[score] for cell in whole[chosen]])
    values[f"{chosen}.{score}"] = float(found.mean())
    total += sign * found
  interval = intervals.interval(total, confidence)
  return Finding(claim, data, interval, intervals.verdict(interval, claim.direction, claim.margin), values)


def _judge_each(claim, every: str, data: str, scores, seeds) -> Finding:
  """The finding against the rival of each(...) that speaks most against the claim; one that diverged is beaten.

  The claim is supported if every rival is beaten.  It is contrary if one of the k rivals beats it in an interval of confidence
  1 - 0.05 / k (Bonferroni), because among many rivals one beats it by chance.
  """
  rivals = [dataclasses.replace(claim, formula=claim.formula.replace(every, name)) for name in alternatives(every)]
  of = [judge(rival, data, scores, seeds) for rival in rivals]
  sure = [judge(rival, data, scores, seeds, 1 - 0.05 / len(rivals)).verdict for rival in rivals]
  for i, found in enumerate(of):
    if found.verdict == intervals.CONTRARY != sure[i]:
      of[i] = dataclasses.replace(found, verdict=intervals.NOT_SUPPORTED)
  order = ("not measured", intervals.CONTRARY, intervals.NOT_SUPPORTED, intervals.SUPPORTED, "diverged")
  worst = min(of, key=lambda found: (order.index(found.verdict), found.interval.mean if found.interval else 0.0))
  return dataclasses.replace(worst, claim=claim)


def _has_no_seed(name: str) -> bool:
  return experiments.SETTINGS[name].kind in (cells.PIXELS, cells.HISTOGRAM)


def seconds_of(cell: Cell, todo: list[Cell], results: Results) -> float | None:
  """The median of what the cells of its setting took that have ended; None if none has.

  One that was stopped or paused says too little or too much.
  """
  like = [c for c in todo if (c.setting, c.images.name) == (cell.setting, cell.images.name) and c.key in results.cells]
  numbers = [results.cells[c.key]["numbers"] for c in like]
  took = [found["seconds"] for found in numbers if "diverged" not in found]
  return float(np.median(took)) if took else None


def estimate(cell: Cell, first_of_setting: bool, todo: list[Cell], results: Results) -> float:
  """Seconds that a cell will take: what its setting took with other seeds, or what two idle CPU cores would need."""
  if took := seconds_of(cell, todo, results):
    return took
  setting, config = experiments.SETTINGS[cell.setting], cell.config
  if setting.kind != "train":
    return SECONDS_BESIDE
  pair = SECONDS_A_PAIR if config.augment.where == "resident" else SECONDS_A_PAIR_ON_HOST
  pair *= 2.0 if config.method == "autoencoder" else 1.0
  return config.train_epochs * len(cell.images.train) * pair + SECONDS_BESIDE + first_of_setting * SECONDS_TO_COMPILE


def plan(todo: list[Cell], results: Results) -> str:
  """The cells as a table: how many there are of each setting, how many are done, and how long the rest will take."""
  rows = [["data", "setting", "cells", "done", "seconds each", "left"]]
  left_in_all, groups = 0.0, {}
  for cell in todo:
    groups.setdefault((cell.images.name, cell.setting), []).append(cell)
  for (data, name), group in groups.items():
    missing = [cell for cell in group if cell.key not in results.cells]
    seconds = [estimate(cell, i == 0, todo, results) for i, cell in enumerate(missing)]
    left_in_all += sum(seconds)
    each = f"{np.mean(seconds):.0f}" if seconds else "–"
    rows.append([data, name, str(len(group)), str(len(group) - len(missing)), each, duration(sum(seconds))])
  done = sum(cell.key in results.cells for cell in todo)
  return f"{report.aligned(rows)}\n\n{len(todo)} cells, {done} of them done; about {duration(left_in_all)} left on two idle CPU cores"


def table(findings: list[Finding]) -> str:
  """The findings as aligned text, contrary ones in capitals."""
  rows = [["data", "claim", "paper", "ours", "95 % interval", "verdict", "source"]]
  for f in findings:
    unit = " points" if f.claim.unit == "points" else ""
    digits = 1 if unit else 3
    ours, interval = "–", "–"
    if f.interval:
      ours, interval = (
        f"{f.interval.mean:+.{digits}f}{unit}",
        f"{f.interval.low:+.{digits}f} to {f.interval.high:+.{digits}f}",
      )
    paper = "–" if f.claim.paper is None else f"{f.claim.paper:+.1f}"
    verdict = f.verdict.upper() if f.verdict == intervals.CONTRARY else f.verdict
    rows.append([f.data, f.claim.name, paper, ours, interval, verdict, f.claim.source])
  return report.aligned(rows)


def summary(findings: list[Finding]) -> str:
  """One sentence that counts the verdicts."""
  counts = collections.Counter(found.verdict for found in findings)
  always = (intervals.SUPPORTED, intervals.NOT_SUPPORTED, intervals.CONTRARY)
  sure = sum(f.interval is not None and f.interval.excludes_zero for f in findings)
  text = ", ".join(f"{counts.pop(verdict, 0)} {verdict}" for verdict in always)
  text += "".join(f", {count} {verdict}" for verdict, count in counts.items())
  return f"{len(findings)} claims: {text}; {sure} of the intervals exclude zero."


STANDINGS = {"knn_20": "kNN", "knn_200": "kNN, k = 200", "linear": "linear", "linear_10pct": "10 %", "linear_1pct": "1 %"}  # fmt: skip


def standings(scores, data: str) -> list[dict]:
  """The representations that were read with few labels too, on a data set, best first by linear evaluation.

  Returns:
    dicts with the name of the representation, and for each key of STANDINGS (mean, lowest, highest) over the seeds.
  """
  rows = []
  for (name, setting), by_seed in scores.items():
    for suffix, what in (("", setting), ("_z", f"{setting}, z")):
      cells_of_it = [cell for cell in by_seed.values() if f"knn_20{suffix}" in cell]
      if name != data or not cells_of_it:
        continue
      values = {key: [cell[key + suffix] for cell in cells_of_it] for key in STANDINGS}
      rows.append({"name": what} | {key: (float(np.mean(v)), min(v), max(v)) for key, v in values.items()})
  return sorted(rows, key=lambda row: -row["linear"][0])


def standings_table(rows: list[dict]) -> list[list[str]]:
  """Rows of text, in percent, with the range of the seeds behind each mean; the first is the heading."""
  cell = lambda mean, low, high: f"{100 * mean:.1f}" + (f" ({100 * low:.1f} to {100 * high:.1f})" if low < high else "")  # noqa: E731
  return [["", *STANDINGS.values()], *([row["name"], *(cell(*row[key]) for key in STANDINGS)] for row in rows)]


def rows_of(findings: list[Finding]) -> list[dict]:
  """The findings as plain data, for the page and for claims.json."""
  return [
    dict(
      data=f.data, name=f.claim.name, says=f.claim.says, source=f.claim.source, verdict=f.verdict, paper=f.claim.paper,
      unit=f.claim.unit, margin=f.claim.margin if f.claim.direction == 0 else None, values=f.values,
      interval=f.interval and dataclasses.astuple(f.interval),
    )
    for f in findings
  ]  # fmt: skip


def matrix(scores, data: str):
  """(names, accuracy [first][second], None where not measured) of Figure 5 on a data set; or None.

  A pair that was measured in only one order has its number in both places.
  """
  measured = {}
  for (name, setting), by_seed in scores.items():
    found = [cell["linear"] for cell in by_seed.values() if "linear" in cell]
    if name == data and setting.startswith("compose_") and found:
      measured[tuple(setting.split("_")[1:])] = float(np.mean(found))
  names = [name for name in experiments.FIGURE_5 if any(name in pair for pair in measured)]
  return (names, [[measured.get((a, b), measured.get((b, a))) for b in names] for a in names]) if names else None


def courses(scores, data: str) -> dict[str, list[dict]]:
  """{"SETTING, h" and "SETTING, z": rows as in metrics.jsonl} of the settings that were followed through training, as means over
  the seeds.  Under report.SPECTRUM is the log10 of eigenvalue number "step" of the covariance in the end, as a fraction of
  the sum of all.
  """
  found = {}
  for (name, setting), by_seed in scores.items():
    for cell in by_seed.values() if name == data else ():
      for key, value in cell.items():
        name_of_it, _, step = key.partition("/")
        if step:
          what, x = name_of_it.split("_")
          found.setdefault(f"{setting}, {x}", {}).setdefault((int(step), what), []).append(value)
  return {name: [_point(*place, values) for place, values in of.items()] for name, of in found.items()}


def _point(step: int, what: str, values) -> dict:
  mean = float(np.mean(values))
  shown = {report.SPECTRUM: float(np.log10(max(mean, 1e-9)))} if what == "spectrum" else {what: mean}
  return {"step": step} | shown


def run(names, workdir, *, budget: Budget, plan_only: bool = False) -> list[Finding]:
  """The program: runs the missing cells, prints the table and writes the page.

  Args:
    names: data sets, of which NAME:train and NAME:test are used; if empty, those of the budget.

  Raises:
    UserError: a data set does not exist or has no labels.
    Interrupted: within a cell; when started again, the command resumes there.
  """
  sets = [cells.open_images(name, most_train=budget.train, most_test=budget.test) for name in names or budget.data]
  todo = cells_of(budget, sets)
  for images in sets:
    few = left_out(budget, images)
    if not claims_of(budget, images):
      raise UserError(f"{few}; nothing is left: name a larger data set with --data")
    if few:
      print(few)
  folder = files.absolute(workdir)
  results = Results(folder)
  if plan_only:
    print(plan(todo, results))
    return []
  folder.mkdir(parents=True, exist_ok=True)
  while measure(todo, results, folder):
    pass  # once more, for a cell of another command that has ended without it
  if busy := [cell for cell in todo if cell.key not in results.cells]:
    print(
      f"cells that another command is running: {len(busy)}; the last command writes the page, or this one, given again"
    )
    return []
  for cell in todo:  # what a killed command left
    shutil.rmtree(folder / "cells" / cell.key, ignore_errors=True)
  scores = results.scores(todo)
  findings = [judge(claim, images.name, scores, budget.seeds) for images in sets for claim in claims_of(budget, images)]
  hours = sum(seconds_of(cell, todo, results) or 0.0 for cell in todo) / 3600
  text = f"{summary(findings)} {len(todo)} runs on {', '.join(images.name for images in sets)}, about {hours:.1f} hours one after another."
  tables = {images.name: rows for images in sets if (rows := standings(scores, images.name))}
  pairs = {images.name: found for images in sets if (found := matrix(scores, images.name))}
  followed = {images.name: found for images in sets if (found := courses(scores, images.name))}
  end = {"summary": text, "findings": rows_of(findings), "standings": tables, "matrices": pairs, "courses": followed}
  results.conclude(end)
  write_page(folder / PAGE, end)
  for name, rows in tables.items():
    print(f"\n{name}: accuracy in %, mean (lowest to highest) of the seeds\n{report.aligned(standings_table(rows))}")
  print(f"\n{table(findings)}\n\n{text}\n{folder / PAGE}")
  return findings


def write_page(path, kept: dict):
  """The page of what claims.json holds."""
  report.write_claims(
    path, title="The claims about SimCLR, measured", summary=kept["summary"], claims=kept["findings"],
    matrices=kept["matrices"], courses=kept.get("courses", {}), standings={name: standings_table(rows) for name, rows in kept["standings"].items()},
  )  # fmt: skip


def measure(todo: list[Cell], results: Results, folder) -> int:
  """Runs the cells that are not yet in the results and that no other command is running, adds them, and returns how many."""
  runner = cells.Runner(folder / "cells")
  missing = [cell for cell in todo if cell.key not in results.cells]
  left = [
    estimate(cell, i == 0 or cell.setting != missing[i - 1].setting, todo, results) for i, cell in enumerate(missing)
  ]
  added = 0
  for i, cell in enumerate(missing):
    place = folder / "cells" / cell.key
    try:
      place.mkdir(parents=True, exist_ok=True)
      lock.take(place)
    except (UserError, FileNotFoundError):  # another command has it, or removes the folder of what it has done
      continue
    results.read()
    if cell.key in results.cells:  # another command was faster, or it is the same under another name
      lock.release(place)
      shutil.rmtree(place, ignore_errors=True)
      continue
    print(
      f"cell {len(todo) - len(missing) + i + 1} of {len(todo)}: {cell.setting}, seed {cell.seed}, {cell.images.name}; "
      f"about {duration(sum(left[i:]))} left", flush=True,
    )  # fmt: skip
    numbers = runner.run(experiments.SETTINGS[cell.setting], cell.config, cell.images)
    results.add(cell, numbers)
    added += 1
    lock.release(place)
    shutil.rmtree(place, ignore_errors=True)
    score = f"linear {100 * numbers['linear']:.1f} %" if "linear" in numbers else "diverged"
    print(f"  {score}, {numbers['seconds']:.0f} s", flush=True)
  results.read()
  return added


def main(flags, overrides) -> int:
  run(flags.data, flags.workdir, budget=BUDGETS[flags.budget], plan_only=flags.plan)
  return 0
