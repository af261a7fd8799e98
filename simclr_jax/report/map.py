"""A map of images: points in the plane as a PNG, and the data of the map on a page, which map.js draws.

It takes numpy arrays and pictures that all have one size.
"""

import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simclr_jax.report import pictures
from simclr_jax.report.colors import marks
from simclr_jax.runtime import files

SHEET_PIXELS = 6e6  # of the sheet of thumbnails inside a page: about 2 MB as JPEG
LEGEND_OF_PNG, LEGEND_OF_PAGE = 24, 40  # with more classes than this there is no legend
GRAY = "#c8ccd0"  # points without a label


def thumbnail_side(count: int) -> int:
  """Side in pixels at which the thumbnails of `count` images fit on one sheet: 64 for 1,000, 24 for 10,000."""
  return int(np.clip((SHEET_PIXELS / max(count, 1)) ** 0.5, 16, 64))


def unit_square(xy):
  """xy float [n, 2] scaled into [0, 1]: the longer side is filled, the shorter one is centered, and up is up."""
  low, high = xy.min(0), xy.max(0)
  out = (xy - (low + high) / 2) / max(float((high - low).max()), 1e-12) + 0.5
  return np.stack([out[:, 0], 1.0 - out[:, 1]], 1)


# ---- the picture --------------------------------------------------------------------------------------------------


def map_png(path, xy, *, thumbnails=None, labels=None, class_names=(), side: int = 900):
  """Writes the map as a PNG: colored points with a legend where there are labels, else the thumbnails themselves.

  xy: float [n, 2]; thumbnails: uint8 [n, s, s, 3]; labels: int [n], -1 where there is none.
  """
  scale = 1 if labels is None and thumbnails is not None else 2  # points are drawn at twice the size: smooth edges
  canvas, margin = scale * side, scale * 28
  place = margin + unit_square(np.asarray(xy, float)) * (canvas - 2 * margin)
  place[:, 1] -= place[:, 1].min() - margin
  height = int(place[:, 1].max()) + margin
  image = Image.new("RGB", (canvas, height), "white")
  if scale == 1:
    _paste_thumbnails(image, place, thumbnails)
  else:
    _draw_points(image, place, labels, class_names, radius=scale * float(np.clip(110 / len(xy) ** 0.5, 1.3, 4.5)))
    image = image.resize((side, height // scale), Image.Resampling.LANCZOS)
  if labels is not None and 0 < len(class_names) <= LEGEND_OF_PNG:
    image = _with_legend(image, class_names)
  image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=255)
  files.write_bytes(path, pictures.encode(image, "PNG", optimize=True))


def _draw_points(image, place, labels, class_names, radius):
  draw, kinds = ImageDraw.Draw(image), marks(len(class_names))
  for i in np.random.default_rng(0).permutation(len(place)):  # or the last class would cover the others
    color, shape = kinds[0] if labels is None else (GRAY, ()) if labels[i] < 0 else kinds[labels[i]]
    _draw_mark(draw, *place[i], radius, color, shape)


def _draw_mark(draw, x, y, radius, color, shape):
  if shape:
    draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in shape], fill=color)
  else:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _paste_thumbnails(image, place, thumbnails):
  """Draws every thumbnail whose cell is still empty, which keeps the map readable where it is dense."""
  size = int(np.clip(image.width / len(place) ** 0.5 * 0.8, 20, 64))
  taken = set()
  for (x, y), pixels in zip(place, thumbnails, strict=True):
    cell = (int(x // size), int(y // size))
    if cell not in taken:
      taken.add(cell)
      image.paste(Image.fromarray(pixels).resize((size - 2, size - 2)), (int(x - size / 2), int(y - size / 2)))


def _with_legend(image, class_names):
  font, step, columns = ImageFont.load_default(15), 24, 5
  rows = -(-len(class_names) // columns)
  out = Image.new("RGB", (image.width, image.height + step * rows + 16), "white")
  out.paste(image)
  draw = ImageDraw.Draw(out)
  for i, (name, (color, shape)) in enumerate(zip(class_names, marks(len(class_names)), strict=True)):
    x, y = 28 + i % columns * (image.width - 40) // columns, image.height + i // columns * step
    _draw_mark(draw, x + 5.5, y + 9.5, 5.5, color, shape)
    draw.text((x + 18, y), _drawable(str(name), font) or f"class {i}", fill="#333", font=font)
  return out


def _drawable(name: str, font) -> str:
  """A name in at most 18 characters, without the accents, which the font lacks, and with ? for what else it lacks; empty if
  that is half of them."""
  plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
  missing = bytes(font.getmask("\U0010ffff"))  # a character that is none: the box for all that the font lacks
  lacks = [bytes(font.getmask(c)) == missing for c in plain]
  if 2 * sum(lacks) >= len(plain):
    return ""
  plain = "".join("?" if lack else c for c, lack in zip(plain, lacks, strict=True))
  return plain if len(plain) <= 18 else f"{plain[:9]}…{plain[-8:]}"


# ---- on a page ----------------------------------------------------------------------------------------------------


def map_data(*, views, pictures, names, note, labels=None, class_names=()) -> dict:
  """What the template `image_map` shows: dict(note, headings, legend [(name, color, shape)], sheet, data for
  map.js).

  Args:
    views: {heading: float [n, 2]}; the first is shown first.
    pictures: uint8 [n, s, s, 3]; they are shrunk until all fit on a sheet of SHEET_PIXELS.
    names: n texts.
    note: a sentence above the map.
    labels: int [n], -1 where there is none.
    class_names: the names of the labels.
  """
  known = labels is not None and len(class_names) > 0
  classes = [str(name) for name in class_names] if known else []
  palette, shapes = zip(*marks(len(classes)), strict=True)
  sheet, side, columns = _contact_sheet(pictures)
  data = {
    "side": side,
    "columns": columns,
    "names": [str(name) for name in names],
    "labels": [int(label) for label in labels] if known else None,
    "classes": classes,
    "colors": palette,
    "shapes": shapes,
    "views": [np.rint(1e4 * unit_square(np.asarray(xy, float))).astype(int).ravel().tolist() for xy in views.values()],
  }
  legend = list(zip(classes, palette, shapes, strict=True)) if 0 < len(classes) <= LEGEND_OF_PAGE else []
  return dict(note=note, headings=list(views), legend=legend, sheet=sheet, data=data)


def _contact_sheet(thumbnails) -> tuple[str, int, int]:
  """(data: URL of all thumbnails on one sheet, the side of each in pixels, their number in a row)."""
  n = len(thumbnails)
  side, columns = min(thumbnail_side(n), thumbnails.shape[1]), int(np.ceil(n**0.5))
  sheet = np.full((-(-n // columns) * side, columns * side, 3), 255, np.uint8)
  for i, pixels in enumerate(thumbnails):
    y, x = i // columns * side, i % columns * side
    sheet[y : y + side, x : x + side] = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
  return pictures.jpeg_url(sheet, quality=78), side, columns
