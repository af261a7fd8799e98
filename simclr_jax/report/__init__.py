"""The end of a run on one page: what the representation scores, how the loss went, what f sees as near.

`write_report` makes a single HTML file that loads nothing from anywhere: tables and curves are hand-written
HTML and SVG, pictures are embedded. `view_pairs_png` draws the two augmented views of each image (what the
contrastive task asks f to match), `neighbours_png` the nearest neighbours in a representation, `score_table` the
scores for a terminal. All take numpy arrays and plain Python data and know nothing of networks or losses.

Scores and shares (`knn`, `contrastive_accuracy`, `data_wait`, …) are fractions in [0, 1], shown in percent.
Paths are local; a file appears whole or not at all.
"""

import base64
import html
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_jax.report import scatter

# --------------------------------------------------------------------------------------------------- pictures

SMALLEST_SIDE = 84  # a view is enlarged by a whole factor to at least this many pixels: 28 → 84, 32 → 96
GUTTER = 14  # between one pair (or row) and the next, and around the sheet
FRAME = 3
PAPER, INK = (246, 245, 242), (52, 56, 61)
SAME, OTHER = (0, 158, 115), (213, 60, 30)  # green and red that colour-blind readers can tell apart


def view_pairs_png(path, views, *, columns=8, zoom=None):
  """Writes a contact sheet on which the two views of each image stand side by side in one frame.

  views: [n, 2, h, w, 3], float in [0, 1] or uint8. zoom: whole factor of nearest-neighbour enlargement, by
  default the least that makes each side 84 pixels. Pair i lies in row i // columns, column i % columns. With
  W = w·zoom and H = h·zoom, the first view of a pair begins 17 + column·(2W + 23) pixels from the left and
  17 + row·(H + 20) from the top, the second W + 3 to the right of the first.
  Raises ValueError for another shape.
  """
  views = _enlarge(_checked_views(views), zoom)
  n, _, h, w, _ = views.shape
  columns = max(1, min(columns, n))
  cell_w, cell_h = 2 * w + 3 * FRAME, h + 2 * FRAME
  sheet = _sheet(-(-n // columns), columns, cell_h, cell_w)
  for i, (first, second) in enumerate(views):
    x = GUTTER + i % columns * (cell_w + GUTTER)
    y = GUTTER + i // columns * (cell_h + GUTTER)
    sheet[y : y + cell_h, x : x + cell_w] = INK
    sheet[y + FRAME :, x + FRAME :][:h, :w] = first
    sheet[y + FRAME :, x + w + 2 * FRAME :][:h, :w] = second
  write_file(path, _encode(sheet, "PNG"))


def neighbours_png(path, queries, neighbours, same_label=None):
  """Writes one row an image: the query, a gap, then its nearest neighbours, nearest first.

  queries: [m, h, w, 3], neighbours: [m, k, h, w, 3], uint8 or float in [0, 1]. same_label: optional bool [m, k],
  drawn as a green (same class as the query) or red frame. Images are enlarged as in `view_pairs_png`, to W × H:
  those of row i begin 17 + i·(H + 20) from the top, the query 17 from the left and neighbour j
  31 + (j + 1)·(W + 20). Raises ValueError for other shapes.
  """
  queries, neighbours, same_label = _checked_neighbours(queries, neighbours, same_label)
  queries, neighbours = _enlarge(queries, None), _enlarge(neighbours, None)
  m, k, h, w, _ = neighbours.shape
  cell_h, cell_w = h + 2 * FRAME, w + 2 * FRAME
  sheet = _sheet(m, k + 1, cell_h, cell_w, extra_width=GUTTER)
  for i in range(m):
    y = GUTTER + i * (cell_h + GUTTER)
    for j in range(k + 1):
      x = GUTTER + j * (cell_w + GUTTER) + (GUTTER if j else 0)
      unknown = j == 0 or same_label is None
      sheet[y : y + cell_h, x : x + cell_w] = INK if unknown else SAME if same_label[i, j - 1] else OTHER
      sheet[y + FRAME :, x + FRAME :][:h, :w] = neighbours[i, j - 1] if j else queries[i]
  write_file(path, _encode(sheet, "PNG"))


def _pixels(images):
  """uint8 as it is; float in [0, 1] to the nearest of 256 levels."""
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def _checked_views(views):
  views = _pixels(views)
  if views.ndim != 5 or views.shape[1] != 2 or views.shape[-1] != 3 or not views.size:
    raise ValueError(f"views have shape {list(views.shape)}, expected [n, 2, h, w, 3]: pass pairs of images")
  return views


def _checked_neighbours(queries, neighbours, same_label=None):
  queries, neighbours = _pixels(queries), _pixels(neighbours)
  if neighbours.ndim != 5 or queries.shape != neighbours.shape[:1] + neighbours.shape[2:] or not neighbours.size:
    raise ValueError(
      f"queries {list(queries.shape)} and neighbours {list(neighbours.shape)} don't fit, "
      "expected [m, h, w, 3] and [m, k, h, w, 3]: pass k neighbour images for each query"
    )
  if same_label is not None:
    same_label = np.asarray(same_label, bool)
    if same_label.shape != neighbours.shape[:2]:
      raise ValueError(
        f"same_label has shape {list(same_label.shape)}, expected {list(neighbours.shape[:2])}: "
        "pass one bool for each neighbour"
      )
  return queries, neighbours, same_label


def _enlarge(images, zoom):
  zoom = zoom or max(1, -(-SMALLEST_SIDE // min(images.shape[-3:-1])))
  return images.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def _sheet(rows, columns, cell_h, cell_w, extra_width=0):
  sheet = np.empty((rows * (cell_h + GUTTER) + GUTTER, columns * (cell_w + GUTTER) + GUTTER + extra_width, 3), np.uint8)
  sheet[:] = PAPER
  return sheet


def _encode(image, kind):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind, quality=88)
  return buffer.getvalue()


def write_file(path, data):
  """All of the file or none of it: a reader, or a run that is killed, never meets half a page."""
  path = Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    partial.write_bytes(data)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def aligned(rows):
  """Rows of texts as lines with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ----------------------------------------------------------------------------------------------------- scores

SCORE_NAMES = {  # key: heading on the page, heading in the terminal
  "knn": ("kNN", "kNN"),
  "linear": ("linear, all labels", "linear"),
  "linear_10": ("linear, 10 labels a class", "linear 10/class"),
}


def score_table(rows):
  """The scores as aligned text, in percent; `*` marks the best of a column, `–` what was not measured.

  rows: dicts with "representation" (a name) and any of knn, linear, linear_10 or further scores, fractions in
  [0, 1] or None. A row whose representation is "chance" stands last and is never the best.
  """
  rows, columns, best = _scores(rows)
  # Each cell ends in its marker or a space, so that the numbers are what is aligned.
  lines = [["", *(SCORE_NAMES.get(c, (c, c))[1] + " " for c in columns)]]
  for row in rows:
    cells = [_percent(row.get(c)) + ("*" if (id(row), c) in best else " ") for c in columns]
    lines.append([str(row["representation"]), *cells])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = []
  for name, *cells in lines:
    cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
    text.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
  return "\n".join(text)


def _scores(rows):
  """The rows with chance last; the score keys in order of appearance; the best cells as {(id(row), key)}."""
  rows = sorted(rows, key=_is_chance)
  columns = list(dict.fromkeys(key for row in rows for key in row if key != "representation"))
  best = set()
  for column in columns:
    rivals = [row for row in rows if not _is_chance(row) and _finite(row.get(column))]
    if len(rivals) > 1:
      top = max(row[column] for row in rivals)
      best |= {(id(row), column) for row in rivals if row[column] == top}
  return rows, columns, best


def _is_chance(row):
  return str(row["representation"]).lower() == "chance"


def _number(value):
  return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _finite(value):
  return _number(value) and math.isfinite(value)


def _percent(value):
  return f"{100 * value:.1f}" if _finite(value) else "–"


# ------------------------------------------------------------------------------------------------------- page


def write_report(
  path,
  *,
  title,
  summary,
  scores,
  history,
  config,
  files,
  snippet,
  views=None,
  neighbours=None,
  confusion=None,
  class_names=None,
  verdict=None,
  healthy=None,
  seconds=None,
  map_of_images=None,
  changes=None,
  intro=(),
  findings=(),
):
  """Writes the page to `path`, replacing it in one move. A section whose data is empty or None is left out.

  title, summary:  text of the headline; summary is one sentence.
  scores:          rows as for `score_table`.
  history:         dicts as in metrics.jsonl: "step" and any of loss, chance_loss (drawn dashed),
                   contrastive_accuracy, knn, online_accuracy, learning_rate, images_per_second, data_wait,
                   embedding_std, rank, alignment, uniformity, entropy; other numbers are drawn too, folded away.
                   Rows may lack keys; of a step logged twice (after a resume) the later row counts.
  config:          the resolved config, nested dicts.
  files:           {path: what it is}; sizes are read from disk, folders summed.
  snippet:         Python text that loads the encoder.
  views:           [n, 2, h, w, 3], uint8 or float in [0, 1]; the first 24 pairs are shown.
  neighbours:      the arguments of `neighbours_png`, (queries, neighbours) or (queries, neighbours, same_label);
                   the first 12 queries and 8 neighbours are shown.
  confusion:       counts [c, c], rows the true class, columns the predicted one.
  class_names:     c names; without them classes are numbered.
  verdict:         one line on the health of the representation; healthy: True or False colours it.
  seconds:         {phase: seconds}, the time budget.
  map_of_images:   dict(note, and the arguments of `scatter.piece`).
  changes:         [(key, value in the recipe, value in this run)].
  intro, findings: further sections, at the top and after the map: (id, heading, HTML), such as `facts`, `pairs` and
                   `gallery` make.
  Raises ValueError where the shapes of views, neighbours, confusion and class_names don't fit.
  """
  sections = [  # id, heading, body ("" = left out)
    *intro,
    ("scores", "Scores", _scores_html(scores)),
    ("map", "Map", _map_html(map_of_images)),
    *findings,
    ("curves", "Curves", _curves_html(history)),
    ("views", "View pairs", _views_html(views)),
    ("neighbours", "Nearest neighbours", _neighbours_html(neighbours)),
    ("classes", "Accuracy per class", _classes_html(confusion, class_names)),
    ("confusion", "Confusion matrix", _confusion_html(confusion, class_names)),
    ("time", "Time budget", _seconds_html(seconds)),
    ("load", "Load the encoder", _snippet_html(snippet)),
    ("files", "Files", _files_html(files, Path(path))),
    ("config", "Config", _changes_html(changes) + _config_html(config)),
  ]
  write_page(path, title=title, summary=summary, sections=sections, verdict=verdict, healthy=healthy)


def write_page(path, *, title, summary, sections, verdict=None, healthy=None):
  """Writes a page of `sections`, (id, heading, HTML), to `path` in one move; one without HTML is left out."""
  sections = [section for section in sections if section[2]]
  mood = {True: "good", False: "bad"}.get(healthy, "plain")
  page = [
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    '<link rel="icon" href="data:,">',  # or a browser asks the server for /favicon.ico
    f"<title>{_text(title)}</title>\n<style>{STYLE}{scatter.STYLE}</style>\n</head>\n<body>\n<header>",
    f"<h1>{_text(title)}</h1>",
    f'<p class="summary">{_text(summary)}</p>' if summary else "",
    f'<p class="verdict {mood}">{_text(verdict)}</p>' if verdict else "",
    "<nav>" + "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections) + "</nav>",
    "</header>\n<main>",
    *(f'<section id="{name}">\n<h2>{heading}</h2>\n{body}\n</section>' for name, heading, body in sections),
    "</main>\n</body>\n</html>\n",
  ]
  write_file(Path(path), "\n".join(part for part in page if part).encode("utf-8", "replace"))


def _text(value):
  return html.escape(str(value))


def _table(rows, head="", kind=""):
  """rows: <tr> elements; head: <th> elements. It scrolls sideways by itself where the screen is narrow."""
  head = f"<thead><tr>{head}</tr></thead>" if head else ""
  body = "\n".join(rows)
  return f'<div class="scroll"><table class="{kind}">{head}<tbody>\n{body}\n</tbody></table></div>\n'


def _note(text):
  return f'<p class="note">{text}</p>\n'


def _scores_html(rows):
  rows, columns, best = _scores(rows or [])
  if not columns:
    return ""
  head = "".join(f'<th scope="col">{_text(SCORE_NAMES.get(c, (c, c))[0])}</th>' for c in columns)
  body = []
  for row in rows:
    cells = []
    for c in columns:
      value = row.get(c)
      if not _finite(value):
        cells.append('<td class="none">–</td>')
        continue
      mark = ' class="best" title="best in this column"' if (id(row), c) in best else ""
      length = min(100.0, max(0.0, 100 * value))
      cells.append(f'<td{mark}>{_percent(value)}<i style="width:{length:.1f}%"></i></td>')
    kind = ' class="chance"' if _is_chance(row) else ""
    body.append(f'<tr{kind}><th scope="row">{_text(row["representation"])}</th>{"".join(cells)}</tr>')
  head = f'<th scope="col">representation</th>{head}'
  note = _note("Accuracy in percent" + ("; the best of each column is bold." if best else "."))
  return note + _table(body, head, "scores")


def _views_html(views):
  if views is None or not len(views):
    return ""
  views = _checked_views(views[:24])
  pairs = "\n".join(
    f'<span class="pair">{_img(first, f"image {i}, view 1")}{_img(second, f"image {i}, view 2")}</span>'
    for i, (first, second) in enumerate(views)
  )
  note = _note("Two augmentations of one image share a frame: the task is to find the partner.")
  return f'{note}<div class="pairs">\n{pairs}\n</div>'


def _neighbours_html(arguments):
  if arguments is None or not len(arguments[0]):
    return ""
  queries, neighbours, same_label = _checked_neighbours(*arguments)
  rows = []
  for i in range(min(len(queries), 12)):
    cells = [f'<span class="query">{_img(queries[i], f"query {i}")}</span>']
    for j in range(min(neighbours.shape[1], 8)):
      kind, name = "", f"neighbour {j + 1}"
      if same_label is not None:
        kind, suffix = (' class="same"', "same class") if same_label[i, j] else (' class="other"', "other class")
        name += f", {suffix}"
      cells.append(f"<span{kind}>{_img(neighbours[i, j], name)}</span>")
    rows.append(f'<div class="row">{"".join(cells)}</div>')
  note = "Each row: an image, then its nearest neighbours, nearest first."
  if same_label is not None:
    note += (
      f" Green: the same class as the query, red and dashed: another; {_percent(same_label.mean())} % "
      f"of {same_label.size:,} neighbours agree."
    )
  return _note(note) + '<div class="neighbours">\n' + "\n".join(rows) + "\n</div>"


def _map_html(arguments):
  if not arguments:
    return ""
  arguments = dict(arguments)
  return _note(_text(arguments.pop("note"))) + scatter.piece(**arguments)


def pairs(rows, note):
  """HTML of pairs of pictures that belong together; rows: (uint8 [h, w, 3], uint8 [h, w, 3], caption)."""
  cells = [
    f'<figure><span class="pair">{_img(a, "first")}{_img(b, "second")}</span><figcaption>{_lines(caption)}</figcaption></figure>'
    for a, b, caption in rows
  ]
  return _note(_text(note)) + '<div class="gallery wide">\n' + "\n".join(cells) + "\n</div>"


def gallery(rows, note):
  """HTML of pictures with captions; rows: (uint8 [h, w, 3], caption)."""
  cells = [f"<figure>{_img(a, 'image')}<figcaption>{_lines(caption)}</figcaption></figure>" for a, caption in rows]
  return _note(_text(note)) + '<div class="gallery">\n' + "\n".join(cells) + "\n</div>"


def facts(rows):
  """HTML of a table; rows: (what, value), or (what, value, why)."""
  body = []
  for what, value, *why in rows:
    small = f"<small>{_text(why[0])}</small>" if why else ""
    body.append(f'<tr><th scope="row">{_text(what)}</th><td>{_text(value)}{small}</td></tr>')
  return _table(body, kind="facts")


def grid(head, rows, numeric=()):
  """HTML of a table; head: texts, rows: lists of texts; columns of these numbers are set as numbers."""
  cells = [
    f'<tr><th scope="row">{_text(row[0])}</th>'
    + "".join(f"<td{_number_class(j, numeric)}>{_text(cell)}</td>" for j, cell in enumerate(row[1:], 1))
    + "</tr>"
    for row in rows
  ]
  heads = "".join(f'<th scope="col"{_number_class(j, numeric)}>{_text(text)}</th>' for j, text in enumerate(head))
  return _table(cells, heads, "grid")


def _number_class(column, numeric):
  return ' class="number"' if column in numeric else ""


def note(text):
  """HTML of a paragraph in small print."""
  return _note(_text(text))


def _lines(caption):
  return "<br>".join(_text(line) for line in str(caption).splitlines())


def _img(pixels, name):
  """An image element with its picture inside: exact if small (the page enlarges it), else a JPEG of ≤ 128 px."""
  if max(pixels.shape[:2]) <= 64:
    data, kind, pixelated = _encode(pixels, "PNG"), "png", ' class="px"'
  else:
    image = Image.fromarray(pixels)
    image.thumbnail((128, 128), Image.Resampling.LANCZOS)
    data, kind, pixelated = _encode(np.asarray(image), "JPEG"), "jpeg", ""
  name = _text(name)
  source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
  return f'<img{pixelated} alt="{name}" title="{name}" src="{source}">'


def _checked_confusion(confusion, class_names):
  confusion = np.asarray(confusion)
  c = len(confusion)
  names = [str(name) for name in (range(c) if class_names is None else class_names)]
  if confusion.shape != (c, c) or len(names) != c:
    raise ValueError(
      f"confusion has shape {list(confusion.shape)} and there are {len(names)} class names, expected [c, c] "
      "and c: pass counts, rows the true class, and one name a class"
    )
  return confusion, names


def _confusion_html(confusion, class_names):
  if confusion is None or not np.size(confusion):
    return ""
  confusion, names = _checked_confusion(confusion, class_names)
  c, images = len(confusion), confusion.sum()
  share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  note = f"{_percent(np.trace(confusion) / max(images, 1))} % of {int(images):,} images are right. "
  if c > 32:
    note += f"The most frequent confusions of {c} classes:"
    return _note(note) + _worst_confusions(confusion, share, names)
  note += "Rows: the true class; columns: the predicted one, in percent of the row. Hover for counts."
  head = "<td></td>" + "".join(f'<th scope="col"><span>{_text(name)}</span></th>' for name in names)
  rows = []
  for i in range(c):
    cells = []
    for j in range(c):
      count = f"{int(confusion[i, j]):,}"
      hint = _text(f"{names[i]}: {count} right" if i == j else f"{names[i]} taken for {names[j]}: {count}")
      shade, shown = "", ""
      if confusion[i, j]:
        # The power lifts small shares, which are what one looks for; 0.7 keeps the text readable on the darkest.
        shade = f' class="{"hit" if i == j else "miss"}" style="--a:{0.7 * share[i, j] ** 0.7:.2f}"'
        shown = f"{100 * share[i, j]:.0f}"
      cells.append(f'<td title="{hint}"{shade}>{shown}</td>')
    rows.append(f'<tr><th scope="row">{_text(names[i])}</th>{"".join(cells)}</tr>')
  return _note(note) + _table(rows, head, "confusion")


def _classes_html(confusion, class_names):
  """Share of each class that is right, worst first; of many classes the ten worst and the ten best."""
  if confusion is None or not np.size(confusion):
    return ""
  confusion, names = _checked_confusion(confusion, class_names)
  images = confusion.sum(1)
  share = np.diag(confusion) / np.maximum(images, 1)
  order = [i for i in np.argsort(share, kind="stable") if images[i]]
  if len(order) > 32:
    order = order[:10] + order[-10:]
  rows = [
    f'<tr><th scope="row">{_text(names[i])}</th><td class="number">{_percent(share[i])}</td>'
    f'<td class="number">{int(images[i]):,}</td><td class="meter"><i style="width:{100 * share[i]:.1f}%"></i></td></tr>'
    for i in order
  ]
  many = f"The ten worst and the ten best of {len(images)} classes. " if len(images) > 32 else "Worst first. "
  head = "".join(f'<th scope="col">{name}</th>' for name in ("class", "right, %", "images", ""))
  return _note(f"{many}By a vote of the nearest neighbours in h.") + _table(rows, head, "classes")


def _changes_html(changes):
  if changes is None:
    return ""
  if not changes:
    return _note("Every value is the recipe's.")
  rows = [
    f'<tr><th scope="row"><code>{_text(key)}</code></th><td><code>{_text(repr(before))}</code></td>'
    f"<td><code>{_text(repr(now))}</code></td></tr>"
    for key, before, now in changes
  ]
  head = "".join(f'<th scope="col">{name}</th>' for name in ("changed", "recipe", "this run"))
  return _table(rows, head, "changes")


def _worst_confusions(confusion, share, names):
  wrong = np.where(np.eye(len(names), dtype=bool), 0, confusion)
  rows = []
  for flat in np.argsort(-wrong, axis=None, kind="stable")[:16]:
    i, j = divmod(int(flat), len(names))
    if wrong[i, j]:
      rows.append(
        f"<tr><td>{_text(names[i])}</td><td>{_text(names[j])}</td>"
        f'<td class="number">{int(wrong[i, j]):,}</td><td class="number">{_percent(share[i, j])} %</td></tr>'
      )
  head = "".join(f'<th scope="col">{name}</th>' for name in ("true", "taken for", "images", "of the class"))
  return _table(rows, head)


def _seconds_html(seconds):
  seconds = {phase: float(s) for phase, s in (seconds or {}).items() if _finite(s) and s > 0}
  total = sum(seconds.values())
  if not total:
    return ""
  bar, rows = [], []
  for i, (phase, s) in enumerate(seconds.items()):
    hint = _text(f"{phase}: {_duration(s)}")
    bar.append(f'<span class="c{i % 6}" style="flex-grow:{s / total:.5f}" title="{hint}"></span>')
    rows.append(
      f'<tr><th scope="row"><span class="key c{i % 6}"></span>{_text(phase)}</th>'
      f'<td class="number">{_duration(s)}</td><td class="number">{_percent(s / total)} %</td></tr>'
    )
  return _note(f"{_duration(total)} in all.") + f'<div class="budget">{"".join(bar)}</div>\n' + _table(rows)


def _duration(seconds):
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _snippet_html(snippet):
  if not snippet:
    return ""
  return (
    f'<div class="snippet"><button id="copy" type="button" hidden>Copy</button>\n'
    f'<pre id="snippet"><code>{_text(snippet.strip())}</code></pre></div>\n<script>{COPY}</script>'
  )


def _files_html(files, report):
  folder = Path(os.path.abspath(report)).parent
  rows = []
  for file, description in (files or {}).items():
    file = Path(os.path.abspath(file))
    name = file.relative_to(folder) if file.is_relative_to(folder) else file
    size = "this page" if file == folder / report.name else _size(file)
    rows.append(
      f'<tr><td><code>{_text(name)}</code></td><td class="number">{size}</td><td>{_text(description)}</td></tr>'
    )
  return _note(f"In <code>{_text(folder)}</code>:") + _table(rows) if rows else ""


def _size(path):
  if not path.exists():
    return "–"
  size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
  for unit in ("B", "kB", "MB"):
    if size < 1000:
      return f"{size:.3g} {unit}"
    size /= 1000
  return f"{size:.3g} GB"


def _config_html(config):
  if not config:
    return ""
  return f"<details><summary>The resolved config, every default filled in</summary>\n{_tree(config)}</details>"


def _tree(config):
  rows, branches = [], []
  for key, value in config.items():
    if hasattr(value, "items"):
      branches.append(f"<details open><summary>{_text(key)}</summary>\n{_tree(value)}</details>\n")
    else:
      rows.append(f'<tr><th scope="row">{_text(key)}</th><td><code>{_text(repr(value))}</code></td></tr>')
  return (_table(rows, kind="config") if rows else "") + "".join(branches)


# ----------------------------------------------------------------------------------------------------- curves

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
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 42, 10, 8, 20  # of a panel and its margins, SVG units


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


def _curves_html(history):
  rows = [row for row in history or [] if _finite(row.get("step"))]
  epochs = {row["step"]: row["epoch"] for row in rows if _finite(row.get("epoch"))}
  reference = next((row["chance_loss"] for row in reversed(rows) if _finite(row.get("chance_loss"))), None)
  span = (min(row["step"] for row in rows), max(row["step"] for row in rows)) if rows else None
  keys = dict.fromkeys(CURVES) | dict.fromkeys(key for row in rows for key in row)
  known, further = [], []
  for key in keys:
    if key in ("step", "epoch", "chance_loss", "seconds"):
      continue
    logged = {row["step"]: row[key] for row in rows if _number(row.get(key))}
    points = sorted((step, value) for step, value in logged.items() if _finite(value))
    if points:
      heading, unit, from_zero = CURVES.get(key, (key, "number", False))
      panel = _panel(
        heading,
        *(np.array(axis, float) for axis in zip(*points, strict=True)),
        unit=unit,
        from_zero=from_zero,
        reference=reference if key == "loss" else None,
        lost=len(logged) - len(points),
        epochs=epochs,
        span=span,
      )
      (known if key in CURVES else further).append(panel)
  body = ""
  if known:
    body += _note("Against steps. Hover for values; where a curve is dense, pale is every value and dark their mean.")
    body += '<div class="panels">\n' + "\n".join(known) + "\n</div>"
  if further:
    body += "<details><summary>Everything else that was logged</summary>\n"
    body += '<div class="panels">\n' + "\n".join(further) + "\n</div></details>"
  return body


def overlays(histories, keys):
  """HTML of a panel a key with the curves of several runs; histories: {name: rows as of metrics.jsonl}."""
  colours = dict(zip(histories, scatter.colours(len(histories)), strict=True))
  panels = []
  for key in keys:
    heading, unit, _ = CURVES.get(key, (key, "number", False))
    curves = {}
    for name, history in histories.items():
      points = sorted((row["step"], row[key]) for row in history if _finite(row.get("step")) and _finite(row.get(key)))
      if points:
        curves[name] = tuple(np.array(axis, float) for axis in zip(*points, strict=True))
    if curves:
      panels.append(_overlay(heading, unit, curves, colours))
  if not panels:
    return ""
  legend = "".join(f'<span><i style="background:{colour}"></i>{_text(name)}</span>' for name, colour in colours.items())
  return f'<div class="names">{legend}</div>\n<div class="panels">\n' + "\n".join(panels) + "\n</div>"


def _overlay(heading, unit, curves, colours):
  """curves: {name: (steps [n], values [n])}, sorted, finite."""
  values = np.concatenate([v for _, v in curves.values()])
  low, high = float(values.min()), float(values.max())
  if high - low < 0.01 * (max(abs(low), abs(high)) or 1.0):
    low, high = low - 0.005 * (abs(low) or 1.0), high + 0.005 * (abs(high) or 1.0)
  svg, y = _frame(heading, unit, low, high)
  last = max(float(steps[-1]) for steps, _ in curves.values()) or 1.0
  for step, anchor in ((0, "start"), (last, "end")):
    x = LEFT + step / last * (WIDTH - LEFT - RIGHT)
    svg.append(f'<text style="text-anchor:{anchor}" x="{x:.1f}" y="{HEIGHT - 5}">{_short(step)}</text>')
  for name, (steps, values) in curves.items():
    steps, values = downsample(steps, values, 200)
    points = " ".join(
      f"{LEFT + a / last * (WIDTH - LEFT - RIGHT):.1f},{y(b):.1f}" for a, b in zip(steps, values, strict=True)
    )
    hint = f"<title>{_text(name)}: {_value_text(values[-1], unit)}</title>"
    svg.append(f'<polyline class="curve" style="stroke:{colours[name]}" points="{points}">{hint}</polyline>')
  return f"<figure><figcaption><span>{_text(heading)}</span></figcaption>\n{''.join(svg)}</svg></figure>"


def _frame(heading, unit, low, high):
  """The beginning of the SVG of a curve, a line at every round value from low to high; and the function value → y."""
  ticks = _ticks(low, high)
  low, high = min(low, ticks[0]), max(high, ticks[-1])

  def y(value):
    return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

  svg = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(heading)} against steps">']
  for tick in ticks:
    svg.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
    svg.append(f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{_tick_text(tick, unit)}</text>')
  return svg, y


def _panel(heading, steps, values, *, unit, from_zero, reference, lost, epochs, span):
  """One small curve. steps, values: float [n], n ≥ 1, sorted, finite; span: first and last step of the axis."""
  low, high = values.min(), values.max()
  if reference is not None:
    low, high = min(low, reference), max(high, reference)
  if from_zero:
    low = min(low, 0.0)
  # What moves by less than a percent is drawn flat, which also keeps the four digits of the ticks distinct.
  missing = (0.01 * (1.0 if unit == "percent" else max(abs(low), abs(high))) or 1.0) - (high - low)
  if missing > 0:
    low, high = (low, high + missing) if from_zero else (low - missing / 2, high + missing / 2)
  svg, y = _frame(heading, unit, low, high)
  first, last = span

  def x(step):
    return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

  def line(kind, steps, values):
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(steps), y(values), strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'

  labels = {round((first + last) / 2): "middle", last: "end", first: "start"}  # one each, however few the steps
  for step, anchor in labels.items():
    svg.append(f'<text style="text-anchor:{anchor}" x="{x(step):.1f}" y="{HEIGHT - 5}">{_short(step)}</text>')
  if reference is not None:
    svg.append(f'<path class="reference" d="M{LEFT} {y(reference):.1f}H{WIDTH - RIGHT}"/>')

  # Each strip of the panel has a tooltip; it tells one point, or of a dense curve the mean and range of a stretch.
  n = len(values)
  stretches = np.array_split(np.arange(n), 48 if n > 64 else n)
  if n > 64:
    svg.append(line("pale", *downsample(steps, values)))
  centres = np.array([steps[i].mean() for i in stretches])
  means = np.array([values[i].mean() for i in stretches])
  svg.append(line("curve", centres, means))
  edges = [LEFT, *x((centres[1:] + centres[:-1]) / 2), WIDTH - RIGHT]
  svg.append(f'<g class="{"points dots" if n <= 30 else "points"}">')
  for k, i in enumerate(stretches):
    hint = f"step {steps[i[0]]:,.0f}" + (f" to {steps[i[-1]]:,.0f}" if len(i) > 1 else "")
    if steps[i[-1]] in epochs:
      hint += f" (epoch {epochs[steps[i[-1]]]:.3g})"
    hint += f": {_value_text(means[k], unit)}"
    if len(i) > 1:
      hint += f", from {_value_text(values[i].min(), unit)} to {_value_text(values[i].max(), unit)}"
    svg.append(
      f'<g><title>{hint}</title><path d="M{edges[k]:.1f} {TOP}H{edges[k + 1]:.1f}V{HEIGHT - BOTTOM}H{edges[k]:.1f}z"/>'
      f'<circle cx="{x(centres[k]):.1f}" cy="{y(means[k]):.1f}" r="2.5"/></g>'
    )
  svg.append("</g></svg>")
  notes = []
  if reference is not None:
    notes.append(f"dashed: chance, {_value_text(reference, unit)}")
  if lost:
    notes.append(f"{lost:,} not finite, left out")
  small = f"<small>{'; '.join(notes)}</small>" if notes else ""
  caption = f"<span>{_text(heading)}</span><b>{_value_text(values[-1], unit)}</b>{small}"
  return f"<figure><figcaption>{caption}</figcaption>\n{''.join(svg)}</figure>"


def _ticks(low, high):
  """Three to eight round numbers, 1, 2 or 5 times a power of ten apart, within [low, high]."""
  rough = (high - low) / 3
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * m for m in (10, 5, 2, 1) if power * m <= rough * 1.0001)
  return [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _tick_text(value, unit):
  return f"{100 * value:.4g}%" if unit == "percent" else _short(value)


def _value_text(value, unit):
  if unit == "percent":
    return f"{100 * value:.1f} %"
  return f"{value:,.0f}" if unit == "count" and abs(value) >= 10 else f"{value:.4g}"


def _short(value):
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.4g}{letter}"
  return f"{value:.4g}"


# ------------------------------------------------------------------------------------------------------ style

# The page may show its own pictures, style and script, and fetch nothing: a browser enforces what the docstring says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

# Without a clipboard, or without scripts, the button stays hidden and the text can still be selected.
COPY = """
const button = document.getElementById("copy"), text = document.getElementById("snippet").textContent;
button.hidden = !navigator.clipboard;
button.onclick = () => navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; });
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1f2429; --quiet: #656c74; --line: #e5e2dc; --frame: #34383d;
  --accent: #2b6cb0; --good: 21 134 92; --bad: 200 72 38;
  --c0: #2b6cb0; --c1: #d98324; --c2: #3a9278; --c3: #9a5ba6; --c4: #b8475a; --c5: #7d8590;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e3e6e9; --quiet: #9aa2aa; --line: #2d3339; --frame: #454b52;
    --accent: #6fb1f2; --good: 64 176 128; --bad: 232 112 78;
    --c0: #5c9fe0; --c1: #e0a052; --c2: #5fb89c; --c3: #b884c4; --c4: #d6707f; --c5: #8b949e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 8px; font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; }
h1, .summary, .verdict { overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 20px; font-weight: 620; letter-spacing: -0.005em; }
section { margin-top: 48px; }
.summary { margin: 0; max-width: 46em; font-size: 18px; }
.verdict {
  display: inline-block; margin: 16px 0 0; padding: 7px 14px;
  border: 1px solid var(--line); border-radius: 8px; background: var(--card);
}
.verdict.good, .verdict.bad { background: rgb(var(--tone) / .1); border-color: rgb(var(--tone) / .4); }
.verdict.good { --tone: var(--good); }
.verdict.good::before { content: "✓ "; }
.verdict.bad { --tone: var(--bad); }
.verdict.bad::before { content: "✗ "; }
nav {
  display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 20px; padding-top: 12px;
  border-top: 1px solid var(--line); font-size: 14px;
}
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.note { margin: 0 0 14px; max-width: 60em; color: var(--quiet); font-size: 14px; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px 7px 0; text-align: left; font-weight: 400; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-size: 14px; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
.scores { width: 100%; max-width: 820px; }
.scores th + th, .scores td { width: 22%; text-align: right; padding: 9px 0 9px 20px; }
.scores th[scope=row] { white-space: nowrap; }
.scores tbody th, .scores td { border-bottom: 0; }
.scores i { display: block; height: 3px; margin: 2px 0 0 auto; border-radius: 2px; }
.scores i { background: var(--quiet); opacity: .3; }
.scores .best { font-weight: 700; color: var(--accent); }
.scores .best i { background: var(--accent); opacity: 1; }
.scores .chance, .scores .none { color: var(--quiet); }
.scores .chance { font-style: italic; }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
figure {
  display: flex; flex-direction: column; justify-content: space-between; gap: 6px; margin: 0;
  padding: 12px 12px 6px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; }
figcaption { font-size: 14px; line-height: 1.4; overflow-wrap: anywhere; }
figcaption b { font-weight: 650; font-variant-numeric: tabular-nums; }
figcaption small { width: 100%; color: var(--quiet); font-size: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; }
.grid { stroke: var(--line); fill: none; }
.reference { stroke: var(--quiet); stroke-dasharray: 4 3; fill: none; }
polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
.curve { stroke-width: 1.7; }
.pale { stroke-width: .8; opacity: .35; }
.points path { fill: transparent; }
.points circle { fill: var(--accent); opacity: 0; }
.points.dots circle, .points g:hover circle { opacity: 1; }
.points g:hover circle { r: 4px; }

img { display: block; width: 100%; height: auto; }
.px { image-rendering: pixelated; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; padding: 3px; border-radius: 4px; }
.pair { max-width: 280px; background: var(--frame); }
.neighbours { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); }
.neighbours { gap: 12px 32px; }
.row { display: flex; gap: 5px; }
.row span { flex: 1 1 0; min-width: 0; max-width: 96px; padding: 2px; border-radius: 3px; }
.row span { border: 2px solid var(--line); }
.row .query { border-color: var(--frame); background: var(--frame); margin-right: 10px; }
.row .same { border-color: rgb(var(--good)); }
.row .other { border-color: rgb(var(--bad)); border-style: dashed; }

.confusion { font-size: 13px; border-collapse: separate; border-spacing: 2px; }
.confusion th, .confusion td { padding: 0; border: 0; }
.confusion tbody td { min-width: 36px; height: 32px; text-align: center; border-radius: 3px; }
.confusion tbody td { background: rgb(127 127 127 / .06); }
.confusion tbody .hit { background: rgb(var(--good) / var(--a)); }
.confusion tbody .miss { background: rgb(var(--bad) / var(--a)); }
.confusion thead span { display: block; margin: 0 auto 4px; white-space: nowrap; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion th[scope=row] { position: sticky; left: 0; padding-right: 10px; white-space: nowrap; }
.confusion th[scope=row] { background: var(--paper); }

.classes { width: 100%; max-width: 620px; }
.classes td, .classes th, .facts td, .facts th { padding-top: 4px; padding-bottom: 4px; border-bottom: 0; }
.classes .meter { width: 55%; padding-right: 0; }
.meter i { display: block; height: 9px; border-radius: 3px; background: var(--accent); }
.facts th, .facts td { vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.facts th { white-space: nowrap; }
.facts th, .facts small { color: var(--quiet); }
.facts small { display: block; }
.changes { margin-bottom: 14px; }
.grid th, .grid td { white-space: nowrap; }
table.grid { stroke: none; }
.names { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; font-size: 14px; }
.names i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin: 0 7px 3px 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; }
.gallery.wide { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.gallery figure { justify-content: flex-start; padding: 8px; }
.gallery figcaption { display: block; font-size: 12px; line-height: 1.35; color: var(--quiet); }

.budget { display: flex; height: 20px; margin-bottom: 10px; border-radius: 5px; overflow: hidden; gap: 1px; }
.budget span { min-width: 2px; flex-basis: 0; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 10px; }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.c3 { background: var(--c3); } .c4 { background: var(--c4); } .c5 { background: var(--c5); }

code, pre { font: 13.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { margin: 0; padding: 16px; overflow-x: auto; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.snippet { position: relative; margin-top: 10px; }
.snippet button { position: absolute; top: 8px; right: 8px; padding: 4px 12px; cursor: pointer; }
.snippet button { font: inherit; font-size: 13px; color: var(--ink); background: var(--paper); }
.snippet button { border: 1px solid var(--line); border-radius: 6px; }
details { margin-top: 8px; }
details details { margin-left: 1.2em; }
details .panels { margin-top: 10px; }
summary { cursor: pointer; padding: 3px 0; }
.config th { color: var(--quiet); }
.config th, .config td { padding-top: 3px; padding-bottom: 3px; }

@media (max-width: 600px) {
  body { padding: 24px 16px 56px; }
  h1 { font-size: 25px; }
  section { margin-top: 38px; }
  .summary { font-size: 17px; }
  .scores th + th, .scores td { padding-left: 12px; }
  .row { gap: 3px; }
  .row span { padding: 1px; border-width: 1.5px; }
  .row .query { margin-right: 5px; }
}
"""


# ------------------------------------------------------------------------------------------- accuracy against labels


def accuracy_against_labels_svg(path, curves):
  """Accuracy over the share of labels, one line a method: means, and bars from the lowest to the highest seed.

  curves: {method: {share of labels in (0, 1]: [accuracy in [0, 1] of each seed]}}; the axis of shares is logarithmic.
  """
  shares = sorted({share for points in curves.values() for share in points})
  every = [100 * value for points in curves.values() for values in points.values() for value in values]
  low, high = math.floor(min(every) / 10) * 10, math.ceil(max(every) / 10) * 10
  left, top, width, height = 56, 16, 420, 260
  span = math.log(shares[-1] / shares[0]) or 1.0

  def x(share):
    return left + width * (math.log(share / shares[0]) / span if len(shares) > 1 else 0.5)

  def y(percent):
    return top + height * (high - percent) / (high - low)

  colours = ("#1f5fa8", "#c2571a", "#2e7d32", "#7b3fa0", "#555555")
  out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 150} {top + height + 48}" font-family="sans-serif"'
    ' font-size="12"><rect width="100%" height="100%" fill="white"/>'
  ]
  for tick in range(low, high + 1, 10):
    out.append(f'<path d="M{left} {y(tick):.1f}h{width}" stroke="#ddd"/>')
    out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
  for share in shares:
    out.append(f'<text x="{x(share):.1f}" y="{top + height + 18}" text-anchor="middle">{100 * share:g} %</text>')
  out.append(f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">labels</text>')
  out.append(
    f'<text transform="translate(14 {top + height / 2}) rotate(-90)" text-anchor="middle">test accuracy, %</text>'
  )
  for i, (name, points) in enumerate(curves.items()):
    colour = colours[i % len(colours)]
    means = [(x(share), y(100 * float(np.mean(points[share])))) for share in sorted(points)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in means)
    out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for (a, b), share in zip(means, sorted(points), strict=True):
      ends = y(100 * max(points[share])), y(100 * min(points[share]))
      out.append(
        f'<path d="M{a:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}" stroke-width="5" stroke-opacity=".35"/>'
      )
      out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>')
    out.append(f'<circle cx="{left + width + 22}" cy="{top + 14 + 20 * i}" r="3.5" fill="{colour}"/>')
    out.append(f'<text x="{left + width + 32}" y="{top + 18 + 20 * i}">{html.escape(name)}</text>')
  write_file(path, ("".join(out) + "</svg>").encode())
