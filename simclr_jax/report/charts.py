"""Charts as SVG: the curves of a run, the curves of several runs, and two figures that are files of their own.

Everything that is drawn is an `element`, which escapes its text and its attributes.
"""

import math
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from simclr_jax.report.colors import colors
from simclr_jax.report.tables import is_finite, is_number
from simclr_jax.runtime import files

CURVES = {  # key: (heading, unit, whether the axis starts at zero)
  "loss": ("Loss", "number", False),
  "contrastive_accuracy": ("Contrastive accuracy", "percent", False),
  "knn": ("kNN accuracy of h", "percent", False),
  "online_accuracy": ("Online linear classifier", "percent", False),
  "learning_rate": ("Learning rate", "number", True),
  "images_per_second": ("Images per second", "count", True),
  "data_wait": ("Share of time waiting for data", "percent", True),
  "embedding_std": ("Embedding standard deviation", "number", True),
  "rank": ("Effective rank", "number", True),
  "alignment": ("Alignment", "number", False),
  "uniformity": ("Uniformity", "number", False),
  "entropy": ("Entropy", "number", False),
}
NOT_DRAWN = ("step", "epoch", "chance_loss", "seconds")  # numbers of a history that get no curve of their own
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 50, 10, 8, 20  # of a curve and its margins, in SVG units
METHOD_COLORS = ("#1f5fa8", "#c2571a", "#2e7d32", "#7b3fa0", "#555555")
STEP_COLORS = ("#1f5fa8", "#5b93cf", "#c2571a", "#e39a6c", "#8a8a8a")


class Figure(NamedTuple):
  """A chart of a page: its heading, the SVG, the last value as text, and remarks."""

  heading: str
  svg: Markup
  value: str = ""
  notes: tuple[str, ...] = ()


class Scale(NamedTuple):
  """Maps values between `low` and `high` linearly to coordinates between `start` and `end`."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value):
    return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def element(tag, *content, **attributes) -> Markup:
  """An SVG element. A float is rounded to a tenth; class_ becomes class, stroke_width stroke-width."""
  values = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
  texts = (Markup(' {}="{}"').format(n, f"{v:.1f}" if isinstance(v, float) else v) for n, v in values.items())
  return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(texts), Markup("").join(map(escape, content)))


def polyline(x, y, *content, **attributes) -> Markup:
  """A line through the points (x[i], y[i])."""
  points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
  return element("polyline", *content, points=points, **attributes)


# ---- the curves of a run ------------------------------------------------------------------------------------------


def curves(history) -> tuple[list[Figure], list[Figure]]:
  """(the figures of known numbers, those of all other numbers) of a history, dicts as in metrics.jsonl."""
  rows = [row for row in history or [] if is_finite(row.get("step"))]
  epochs = {row["step"]: row["epoch"] for row in rows if is_finite(row.get("epoch"))}
  chance = next((row["chance_loss"] for row in reversed(rows) if is_finite(row.get("chance_loss"))), None)
  span = (min(row["step"] for row in rows), max(row["step"] for row in rows)) if rows else None
  known, further = [], []
  for key in dict.fromkeys(CURVES) | dict.fromkeys(key for row in rows for key in row):
    logged = {row["step"]: row[key] for row in rows if is_number(row.get(key))}  # of a step logged twice the later row
    points = sorted((step, value) for step, value in logged.items() if is_finite(value))
    if points and key not in NOT_DRAWN:
      reference = chance if key == "loss" else None
      figure = _curve(key, points, span=span, epochs=epochs, reference=reference, lost=len(logged) - len(points))
      (known if key in CURVES else further).append(figure)
  return known, further


def _curve(key, points, *, span, epochs, reference, lost) -> Figure:
  """One small curve. points: [(step, value)], sorted and finite; span: first and last step of the axis."""
  heading, unit, from_zero = CURVES.get(key, (key, "number", False))
  steps, values = (np.array(axis, float) for axis in zip(*points, strict=True))
  low, high = _limits(values if reference is None else np.append(values, reference), unit, from_zero)
  first, last = span
  x, y, parts = _axes(unit, low, high, first, last)
  notes = []
  if reference is not None:
    parts.append(element("path", class_="reference", d=f"M{LEFT} {y(reference):.1f}H{WIDTH - RIGHT}"))
    notes.append(f"dashed: chance, {value_text(reference, unit)}")
  if lost:
    notes.append(f"{lost:,} not finite, left out")
  if len(values) > 64:
    dense_steps, dense_values = downsample(steps, values)
    parts.append(polyline(x(dense_steps), y(dense_values), class_="pale"))
  parts += _means(steps, values, x, y, unit, epochs)
  return Figure(heading, _small_svg(heading, parts), value_text(values[-1], unit), tuple(notes))


def _means(steps, values, x, y, unit, epochs) -> list[Markup]:
  """The curve, and strips with a tooltip each: of one point, or of a dense curve the mean and range of a stretch."""
  n = len(values)
  stretches = np.array_split(np.arange(n), 48 if n > 64 else n)
  centers = np.array([steps[i].mean() for i in stretches])
  means = np.array([values[i].mean() for i in stretches])
  edges = [LEFT, *x((centers[1:] + centers[:-1]) / 2), WIDTH - RIGHT]
  strips = []
  for k, i in enumerate(stretches):
    hint = f"step {steps[i[0]]:,.0f}" + (f" to {steps[i[-1]]:,.0f}" if len(i) > 1 else "")
    if steps[i[-1]] in epochs:
      hint += f" (epoch {epochs[steps[i[-1]]]:.3g})"
    hint += f": {value_text(means[k], unit)}"
    if len(i) > 1:
      hint += f", from {value_text(values[i].min(), unit)} to {value_text(values[i].max(), unit)}"
    box = f"M{edges[k]:.1f} {TOP}H{edges[k + 1]:.1f}V{HEIGHT - BOTTOM}H{edges[k]:.1f}z"
    dot = element("circle", cx=x(centers[k]), cy=y(means[k]), r=2.5)
    strips.append(element("g", element("title", hint), element("path", d=box), dot))
  group = element("g", *strips, class_="points dots" if n <= 30 else "points")
  return [polyline(x(centers), y(means), class_="curve"), group]


# ---- the curves of several runs -----------------------------------------------------------------------------------


def overlays(histories, keys) -> tuple[list[tuple[str, str]], list[Figure]]:
  """([(name, color)], a figure for each key) with the curves of several runs.

  histories: {name: rows as in metrics.jsonl}. A key that no run logged has no figure.
  """
  palette = dict(zip(histories, colors(len(histories)), strict=True))
  figures = []
  for key in keys:
    lines = {}
    for name, history in histories.items():
      points = sorted(
        (row["step"], row[key]) for row in history if is_finite(row.get("step")) and is_finite(row.get(key))
      )
      if points:
        lines[name] = tuple(np.array(axis, float) for axis in zip(*points, strict=True))
    if lines:
      figures.append(_overlay(key, lines, palette))
  return list(palette.items()), figures


def _overlay(key, lines, palette) -> Figure:
  """lines: {name: (steps [n], values [n])}, sorted and finite."""
  heading, unit, _ = CURVES.get(key, (key, "number", False))
  low, high = _limits(np.concatenate([values for _, values in lines.values()]), unit)
  last = max(steps[-1] for steps, _ in lines.values())
  x, y, parts = _axes(unit, low, high, 0, last)
  for name, (steps, values) in lines.items():
    hint = element("title", f"{name}: {value_text(values[-1], unit)}")
    steps, values = downsample(steps, values, 200)
    parts.append(polyline(x(steps), y(values), hint, class_="curve", style=f"stroke:{palette[name]}"))
  return Figure(heading, _small_svg(heading, parts))


# ---- effects ------------------------------------------------------------------------------------------------------


def effect(name, interval, *, paper=None, margin=None, digits=1) -> Markup:
  """A difference and its interval beside zero, as a small SVG.

  interval: (mean, low, high), all finite. paper: the difference that a paper measured, drawn as a diamond. margin: what
  counts as no difference, drawn as a band about zero.
  """
  height, middle = 58, 20
  mean, low, high = interval
  shown = [0.0, low, high, *([] if paper is None else [paper]), *([] if margin is None else [-margin, margin])]
  least, most = min(shown), max(shown)
  if least == most:
    least, most = -1.0, 1.0
  room = 0.06 * (most - least)
  x = Scale(least - room, most + room, RIGHT, WIDTH - RIGHT)
  parts = []
  if margin is not None:
    parts.append(
      element("path", class_="margin", d=f"M{x(-margin):.1f} {TOP}H{x(margin):.1f}V{height - BOTTOM}H{x(-margin):.1f}z")
    )
  for tick in _ticks(least, most):
    parts.append(
      element("path", class_="zero" if abs(tick) < 1e-9 else "grid", d=f"M{x(tick):.1f} {TOP}V{height - BOTTOM}")
    )
    parts.append(element("text", _short(tick), style="text-anchor:middle", x=x(tick), y=height - 6))
  hint = element("title", f"{name}: {mean:+.{digits}f}, from {low:+.{digits}f} to {high:+.{digits}f}")
  parts.append(element("path", hint, class_="interval", d=f"M{x(low):.1f} {middle}H{x(high):.1f}"))
  parts.append(element("circle", class_="mean", cx=x(mean), cy=middle, r=4))
  if paper is not None:
    diamond = f"M{x(paper):.1f} {middle - 6}l6 6l-6 6l-6 -6z"
    parts.append(element("path", element("title", f"paper: {paper:+.{digits}f}"), class_="paper", d=diamond))
  return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=name)


# ---- what both have in common -------------------------------------------------------------------------------------


def downsample(steps, values, limit=400):
  """At most `limit` points: the first, the last, and the lowest and highest of each of limit/2 − 1 stretches."""
  n = len(values)
  if n <= limit:
    return steps, values
  keep = {0, n - 1}
  for stretch in np.array_split(np.arange(n), limit // 2 - 1):
    keep |= {stretch[np.argmin(values[stretch])], stretch[np.argmax(values[stretch])]}
  keep = sorted(keep)
  return steps[keep], values[keep]


def _limits(values, unit, from_zero=False):
  """The range of an axis that shows `values`."""
  low, high = values.min(), values.max()
  if from_zero:
    low = min(low, 0.0)
  # What varies by less than a percent is drawn flat, which also keeps the four digits of the ticks distinct.
  missing = (0.01 * (1.0 if unit == "percent" else max(abs(low), abs(high))) or 1.0) - (high - low)
  if missing > 0:
    low, high = (low, high + missing) if from_zero else (low - missing / 2, high + missing / 2)
  return low, high


def _axes(unit, low, high, first, last):
  """(step → x, value → y, what is drawn): a line at every round value, and round steps below."""
  ticks = _ticks(low, high)
  x = Scale(first, max(last, first + 1), LEFT, WIDTH - RIGHT)
  y = Scale(min(low, ticks[0]), max(high, ticks[-1]), HEIGHT - BOTTOM, TOP)
  parts = []
  for tick in ticks:
    text = f"{100 * tick:.4g}%" if unit == "percent" else _short(tick)
    parts.append(element("path", class_="grid", d=f"M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"))
    parts.append(element("text", text, class_="y", x=LEFT - 6, y=y(tick) + 3.5))
  for step in _step_ticks(first, last):
    near_edge = {x(step) < LEFT + 12: "start", x(step) > WIDTH - RIGHT - 12: "end"}
    anchor = near_edge.get(True, "middle")
    parts.append(element("text", _short(step), style=f"text-anchor:{anchor}", x=x(step), y=HEIGHT - 5))
  return x, y, parts


def _small_svg(heading, parts) -> Markup:
  return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{heading} against steps")


def _ticks(low, high):
  """Three to eight round numbers, 1, 2 or 5 times a power of ten apart, within [low, high]."""
  rough = (high - low) / 3
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * m for m in (10, 5, 2, 1) if power * m <= rough * 1.0001)
  return [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _step_ticks(first, last) -> list[int]:
  """Round whole numbers within [first, last], or both ends where there are not two."""
  ticks = [round(tick) for tick in _ticks(first, last) if tick == round(tick)] if last > first else []
  return ticks if len(ticks) > 1 else sorted({first, last})


def value_text(value, unit) -> str:
  if unit == "percent":
    return f"{100 * value:.1f} %"
  return f"{value:,.0f}" if unit == "count" and abs(value) >= 10 else f"{value:.4g}"


def _short(value):
  """Four digits in at most eight characters and a sign, for which LEFT has room: 12.35M, 0.0425, 1.225e-5."""
  if 0 < abs(value) < 1e-3:
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.4g}{letter}"
  return f"{value:.4g}"


# ---- figures that are files ---------------------------------------------------------------------------------------


def _write_svg(path, width, height, parts):
  paper = element("rect", width="100%", height="100%", fill="white")
  svg = element(
    "svg", paper, *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}",
    font_family="sans-serif", font_size="12",
  )  # fmt: skip
  files.write_bytes(path, svg.encode())


def accuracy_against_labels_svg(path, curves):
  """Accuracy over the fraction of labels, a line for each method: means, with bars from the lowest to the highest seed.

  curves: {method: {fraction of labels in (0, 1]: [accuracy in [0, 1] of each seed]}}; the axis of fractions is
  logarithmic.
  """
  fractions = sorted({fraction for points in curves.values() for fraction in points})
  percents = [100 * value for points in curves.values() for values in points.values() for value in values]
  low = math.floor(min(percents) / 10) * 10
  high = max(math.ceil(max(percents) / 10) * 10, low + 10)
  left, top, right, bottom = 56, 16, 476, 276
  logarithms = Scale(math.log(fractions[0]), math.log(fractions[-1]), left, right)
  y = Scale(low, high, bottom, top)

  def x(fraction):
    return logarithms(math.log(fraction)) if len(fractions) > 1 else (left + right) / 2

  parts = []
  for tick in range(low, high + 1, 10):
    parts.append(element("path", d=f"M{left} {y(tick):.1f}H{right}", stroke="#ddd"))
    parts.append(element("text", tick, x=left - 8, y=y(tick) + 4, text_anchor="end"))
  for fraction in fractions:
    parts.append(element("text", f"{100 * fraction:g} %", x=x(fraction), y=bottom + 18, text_anchor="middle"))
  parts.append(element("text", "labels", x=(left + right) / 2, y=bottom + 38, text_anchor="middle"))
  turned = f"translate(14 {(top + bottom) / 2}) rotate(-90)"
  parts.append(element("text", "test accuracy, %", transform=turned, text_anchor="middle"))
  for i, (name, points) in enumerate(curves.items()):
    color, row = METHOD_COLORS[i % len(METHOD_COLORS)], top + 14 + 20 * i
    means = [(x(fraction), y(100 * np.mean(values)), values) for fraction, values in sorted(points.items())]
    parts.append(polyline(*list(zip(*means, strict=True))[:2], fill="none", stroke=color, stroke_width=2))
    for a, b, values in means:
      bar = f"M{a:.1f} {y(100 * max(values)):.1f}V{y(100 * min(values)):.1f}"
      parts.append(element("path", d=bar, stroke=color, stroke_width=5, stroke_opacity="0.35"))
      parts.append(element("circle", cx=a, cy=b, r=3.5, fill=color))
    parts.append(element("circle", cx=right + 22, cy=row, r=3.5, fill=color))
    parts.append(element("text", name, x=right + 32, y=row + 4))
  _write_svg(path, right + 150, bottom + 48, parts)


def step_times_svg(path, rows):
  """What bounds a training step on each pod: the estimate by parts, and what traffic and arithmetic alone would take.

  rows: dicts with topology, batch_size, step_seconds, parts_seconds {part: seconds}, memory_seconds and matmul_seconds;
  the parts are the same in every row.
  """
  left, width, pitch = 150, 560, 56
  longest = max(max(row["step_seconds"], row["memory_seconds"]) for row in rows)
  scale = Scale(0.0, longest, 0, width)
  parts_of_step = dict(zip(rows[0]["parts_seconds"], STEP_COLORS, strict=True))
  bounds = {
    "memory_seconds": ("HBM traffic at full bandwidth", {}),
    "matmul_seconds": ("all FLOPs at the peak", {"stroke_dasharray": "4 3"}),
  }
  bound = {"stroke": "black", "stroke_width": 2}
  parts = []
  for i, row in enumerate(rows):
    x, y = left, 16 + pitch * i
    parts.append(element("text", row["topology"], x=left - 8, y=y + 12, text_anchor="end"))
    parts.append(element("text", f"batch {row['batch_size']:,}", x=left - 8, y=y + 27, text_anchor="end", fill="#666"))
    for name, color in parts_of_step.items():
      w = scale(row["parts_seconds"][name])
      parts.append(element("rect", x=x, y=y, width=w, height=28, fill=color))
      x += w
    parts.append(element("text", f"est. {1e3 * row['step_seconds']:.1f} ms", x=x + 6, y=y + 19))
    for key, (_, dashes) in bounds.items():
      parts.append(element("path", d=f"M{left + scale(row[key]):.1f} {y - 5}v38", **bound, **dashes))
  y = 16 + pitch * len(rows)
  for i, (name, color) in enumerate(parts_of_step.items()):
    parts.append(element("rect", x=left, y=y + 22 * i, width=14, height=14, fill=color))
    parts.append(element("text", name, x=left + 22, y=y + 22 * i + 12))
  for i, (text, dashes) in enumerate(bounds.values()):
    parts.append(element("path", d=f"M{left + 307} {y + 22 * i - 2}v18", **bound, **dashes))
    parts.append(element("text", text, x=left + 318, y=y + 22 * i + 12))
  _write_svg(path, left + width + 90, y + 24 * len(parts_of_step) + 28, parts)
