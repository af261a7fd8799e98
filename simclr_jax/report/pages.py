"""The pages: a run's report, a map, and a comparison of runs. This module brings data into the form that templates/ shows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from simclr_jax.report import charts, pictures, render, tables
from simclr_jax.report.map import map_data
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What the page of a run shows. A section without data is left out."""

  title: str
  summary: str  # one sentence
  verdict: str | None = None  # one line on the health of the representation
  healthy: bool | None = None  # colors the verdict
  choices: Sequence[tuple] = ()  # (what, value, why)
  scores: Sequence[dict] = ()  # rows as for `score_table`
  map_of_images: dict | None = None  # the arguments of `map_data`
  duplicates: tuple | None = None  # (a sentence, [(caption, [first picture, second picture])]), uint8 [h, w, 3]
  outliers: tuple | None = None  # (a sentence, [(caption, [picture])])
  unreadable: Sequence[tuple] = ()  # (file, reason)
  # Dicts as in metrics.jsonl: "step", any of charts.CURVES, and chance_loss, which is drawn dashed. Other numbers are
  # drawn too, folded away. Rows may lack keys; of a step that was logged twice (after a resume) the later row counts.
  history: Sequence[dict] = ()
  views: np.ndarray | None = None  # [n, 2, h, w, 3], uint8 or float in [0, 1]; the first 24 pairs are shown
  # The arguments of `neighbors_png`, with or without same_label; the first 12 queries and 8 neighbors are shown.
  neighbors: tuple | None = None
  confusion: np.ndarray | None = None  # counts [c, c], rows the true class, columns the predicted one
  predicted_by: str = "a vote of the nearest neighbors in h"
  class_names: Sequence[str] | None = None  # c names; without them classes are numbered
  seconds: dict[str, float] | None = None  # {phase: seconds}, the time budget
  snippet: str = ""  # Python text that loads the encoder
  torch_snippet: str = ""  # the same in PyTorch
  files: dict | None = None  # {path: what it is}; sizes are read from disk, those of folders summed
  changes: Sequence[tuple] | None = None  # (key, value in the recipe, value in this run)
  config: dict | None = None  # the resolved config, nested


def write_report(path, **page):
  """Writes the page of a run to `path`, replacing it in one move; `page` has the fields of `Report`.

  Raises:
    ValueError: the shapes of views, neighbors, confusion and class_names don't fit.
  """
  page = Report(**page)
  known_curves, further_curves = charts.curves(page.history)
  seconds = {phase: float(s) for phase, s in (page.seconds or {}).items() if tables.is_finite(s) and s > 0}
  shown = dict(
    scores=_scores(page.scores),
    map=page.map_of_images and map_data(**page.map_of_images),
    known_curves=known_curves,
    further_curves=further_curves,
    views=None if page.views is None or not len(page.views) else list(pictures.checked_views(page.views[:24])),
    neighbors=_neighbors(page.neighbors),
    confusion=_confusion(page.confusion, page.class_names),
    seconds=seconds,
    total=sum(seconds.values()),
    files=_files(page.files or {}, files.absolute(path)),
    folder=files.absolute(path).parent,
  )
  render.write_page(path, "report.html", **vars(page) | shown)


def write_map(path, *, title, summary, map_of_images, duplicates=None, outliers=None):
  """Writes a page with a map and what stands out in it; the arguments are fields of `Report`."""
  page = dict(title=title, summary=summary, duplicates=duplicates, outliers=outliers)
  render.write_page(path, "map.html", map=map_data(**map_of_images), **page)


def write_runs(path, *, histories, keys, **page):
  """Writes a page that compares runs.

  Args:
    histories: {name of a run: rows as in metrics.jsonl}.
    keys: the numbers whose curves are drawn.
    page: title, summary; `runs` (headings, rows of cells), a cell being a text or a Link; `numeric`, the indices of its
      columns of numbers; and `differences`, the same as `runs`, or None.
  """
  legend, figures = charts.overlays(histories, keys)
  render.write_page(path, "runs.html", computed=False, legend=legend, figures=figures, **page)


SPECTRUM = "Spectrum, log10"  # of the rows of courses: heading and key


def write_claims(path, *, title, summary, claims, matrices, standings, courses):
  """Writes a page of claims, each with its effect, and of matrices of accuracies.

  Args:
    claims: dicts with data, name, says, source, verdict, unit ("points" or ""), paper (number or None), margin (number or
      None), values {score: number}, and interval (mean, low, high), or None where nothing was measured.
    matrices: {name of a data set: (names, accuracy or None [first][second])}.
    standings: {name of a data set: rows of text, the first of which is the heading}.
    courses: {name of a data set: {name of a representation: rows as in metrics.jsonl}}.
  """
  groups = {}
  for claim in claims:
    digits = 1 if claim["unit"] else 3
    drawn = claim["interval"] and all(map(tables.is_finite, claim["interval"]))
    svg = charts.effect(claim["name"], claim["interval"], paper=claim["paper"], margin=claim["margin"], digits=digits) if drawn else None  # fmt: skip
    groups.setdefault(claim["data"], []).append(claim | {"svg": svg, "digits": digits})
  followed = {data: charts.overlays(of, ("alignment", "uniformity", "rank", SPECTRUM)) for data, of in courses.items()}
  heat = {data: (names, _shades(rows)) for data, (names, rows) in matrices.items()}
  render.write_page(
    path,
    "claims.html",
    title=title,
    summary=summary,
    groups=groups,
    matrices=heat,
    standings=standings,
    courses=followed,
  )


def _shades(rows):
  """[[(value or None, its place between the lowest and the highest of all)]]."""
  known = [value for row in rows for value in row if value is not None]
  low, span = min(known), max(max(known) - min(known), 1e-9)
  return [[(value, None if value is None else (value - low) / span) for value in row] for row in rows]


def _scores(rows):
  columns, ranked = tables.rank(rows)
  if not columns:
    return None
  headings = [tables.SCORE_NAMES.get(c, (c, c))[0] for c in columns]
  any_best = any(score.best for row in ranked for score in row.scores)
  return dict(headings=headings, rows=ranked, any_best=any_best)


def _neighbors(arguments):
  if arguments is None or not len(arguments[0]):
    return None
  queries, neighbors, same = pictures.checked_neighbors(*arguments)
  agreement, count = (None, 0) if same is None else (same.mean(), same.size)
  if same is None:
    same = np.full(neighbors.shape[:2], None)
  rows = [(q, list(zip(near[:8], s[:8], strict=True))) for q, near, s in zip(queries, neighbors, same, strict=True)]
  return dict(rows=rows[:12], agreement=agreement, count=count)


def _confusion(confusion, class_names):
  """What the two sections show: the matrix, its most frequent confusions, and the accuracy of each class, worst first.

  Of many classes the ten worst and the ten best are kept.
  """
  if confusion is None or not np.size(confusion):
    return None
  confusion = np.asarray(confusion)
  c = len(confusion)
  names = [str(name) for name in (range(c) if class_names is None else class_names)]
  if confusion.shape != (c, c) or len(names) != c:
    raise UserError(
      f"confusion has shape {list(confusion.shape)} and there are {len(names)} class names, expected [c, c] "
      "and c: pass counts, rows the true class, and one name a class"
    )
  counts, images = confusion.astype(int).tolist(), confusion.sum(1)
  fractions = confusion / np.maximum(images, 1)[:, None]
  order = [i for i in np.argsort(np.diag(fractions), kind="stable") if images[i]]
  if len(order) > 32:
    order = order[:10] + order[-10:]
  wrong = np.where(np.eye(c, dtype=bool), 0, confusion)
  worst = (divmod(int(flat), c) for flat in np.argsort(-wrong, axis=None, kind="stable")[:16])
  return dict(
    names=names,
    images=int(images.sum()),
    right=np.trace(confusion) / max(images.sum(), 1),
    rows=[list(zip(*row, strict=True)) for row in zip(counts, fractions.tolist(), strict=True)],
    worst=[(names[i], names[j], counts[i][j], fractions[i, j]) for i, j in worst if wrong[i, j]],
    classes=[(names[i], fractions[i, i], int(images[i])) for i in order],
  )


def _files(descriptions, page):
  """[(name as seen from the folder of the page, size, description)]."""
  rows = []
  for file, description in descriptions.items():
    file = files.absolute(file)
    name = file.relative_to(page.parent) if file.is_relative_to(page.parent) else file
    rows.append((name, "this page" if file == page else _size(file), description))
  return rows


def _size(path):
  if not path.exists():
    return "–"
  size = _bytes(path)
  for unit in ("B", "kB", "MB"):
    if size < 1000:
      return f"{size:.3g} {unit}"
    size /= 1000
  return f"{size:.3g} GB"


def _bytes(path) -> int:
  return sum(map(_bytes, path.iterdir())) if path.is_dir() else files.size(path)
