"""Tables as text for a terminal, and the table of scores, which a page shows too."""

import math
from typing import NamedTuple

import numpy as np

SCORE_NAMES = {  # key: (heading on the page, heading in the terminal)
  "knn": ("kNN", "kNN"),
  "linear": ("linear, all labels", "linear"),
  "linear_10": ("linear, 10 labels a class", "linear 10/class"),
}


class Link(NamedTuple):
  """A cell of a table on a page whose text leads to `target`, a URL."""

  text: str
  target: str


class Score(NamedTuple):
  value: float | None  # None: not measured
  best: bool  # of its column


class ScoreRow(NamedTuple):
  name: str
  is_chance: bool
  scores: list[Score]  # one for each column


def aligned(rows) -> str:
  """Rows of texts as lines with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def score_table(rows) -> str:
  """The scores as aligned text, in percent; `*` marks the best of a column, `–` what was not measured.

  rows: dicts with "representation" (a name) and any of knn, linear, linear_10 or further scores, fractions in [0, 1] or
  None. A row whose representation is "chance" comes last and is never the best.
  """
  columns, ranked = rank(rows)
  # Each cell ends in its marker or a space, so that the numbers are aligned and not the markers.
  lines = [["", *(SCORE_NAMES.get(c, (c, c))[1] + " " for c in columns)]]
  lines += [[row.name, *(percent(score.value) + " *"[score.best] for score in row.scores)] for row in ranked]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
  return "\n".join("  ".join(line).rstrip() for line in lines)


def rank(rows) -> tuple[list[str], list[ScoreRow]]:
  """(score keys in order of appearance, the rows with chance last) of rows as for `score_table`."""
  rows = sorted(rows, key=_is_chance)
  columns = list(dict.fromkeys(key for row in rows for key in row if key != "representation"))
  best = {}
  for column in columns:
    rivals = [row[column] for row in rows if not _is_chance(row) and is_finite(row.get(column))]
    if len(rivals) > 1:
      best[column] = max(rivals)
  ranked = []
  for row in rows:
    values = [(c, row[c] if is_finite(row.get(c)) else None) for c in columns]
    chance = _is_chance(row)
    scores = [Score(value, not chance and value is not None and value == best.get(c)) for c, value in values]
    ranked.append(ScoreRow(str(row["representation"]), chance, scores))
  return columns, ranked


def _is_chance(row):
  return str(row["representation"]).lower() == "chance"


def is_number(value) -> bool:
  return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def is_finite(value) -> bool:
  return is_number(value) and math.isfinite(value)


def percent(value) -> str:
  """A fraction in percent, or a dash for what was not measured."""
  return f"{100 * value:.1f}" if is_finite(value) else "–"
