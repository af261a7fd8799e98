"""Pictures: contact sheets as PNG files, and pictures inside a page."""

import base64
import io

import numpy as np
from PIL import Image

from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

SMALLEST_SIDE = 84  # a view is enlarged by a whole factor to at least this many pixels: 28 → 84, 32 → 96
GUTTER = 14  # between one pair (or row) and the next, and around the sheet
FRAME = 3
PAPER, INK = (246, 245, 242), (52, 56, 61)
SAME, OTHER = (0, 158, 115), (213, 60, 30)  # a green and a red that color-blind readers can tell apart


def view_pairs_png(path, views, *, columns=8, zoom=None):
  """Writes a contact sheet with the two views of each image side by side in one frame.

  Args:
    views: [n, 2, h, w, 3], float in [0, 1] or uint8.
    zoom: whole factor of nearest-neighbor enlargement, by default the smallest that makes each side 84 pixels.

  Pair i stands in row i // columns, column i % columns. With W = w·zoom and H = h·zoom, the first view of a pair begins
  17 + column·(2W + 23) pixels from the left and 17 + row·(H + 20) from the top, the second W + 3 to the right of it.

  Raises:
    ValueError: another shape.
  """
  views = _enlarge(checked_views(views), zoom)
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
  files.write_bytes(path, encode(sheet, "PNG"))


def neighbors_png(path, queries, neighbors, same_label=None):
  """Writes one row for each image: the query, a gap, then its nearest neighbors, nearest first.

  Args:
    queries: [m, h, w, 3], uint8 or float in [0, 1].
    neighbors: [m, k, h, w, 3], the same.
    same_label: optional bool [m, k], drawn as a green (same class as the query) or a red frame.

  Images are enlarged as in `view_pairs_png`, to W × H: those of row i begin 17 + i·(H + 20) from the top, the query 17
  from the left and neighbor j 31 + (j + 1)·(W + 20).

  Raises:
    ValueError: other shapes.
  """
  queries, neighbors, same_label = checked_neighbors(queries, neighbors, same_label)
  queries, neighbors = _enlarge(queries, None), _enlarge(neighbors, None)
  m, k, h, w, _ = neighbors.shape
  cell_h, cell_w = h + 2 * FRAME, w + 2 * FRAME
  sheet = _sheet(m, k + 1, cell_h, cell_w, extra_width=GUTTER)
  for i in range(m):
    y = GUTTER + i * (cell_h + GUTTER)
    for j in range(k + 1):
      x = GUTTER + j * (cell_w + GUTTER) + (GUTTER if j else 0)
      unknown = j == 0 or same_label is None
      sheet[y : y + cell_h, x : x + cell_w] = INK if unknown else SAME if same_label[i, j - 1] else OTHER
      sheet[y + FRAME :, x + FRAME :][:h, :w] = neighbors[i, j - 1] if j else queries[i]
  files.write_bytes(path, encode(sheet, "PNG"))


def data_url(pixels) -> str:
  """uint8 [h, w, 3] as a data: URL: exact if it is small, which a page enlarges, else a JPEG of at most 128 pixels."""
  if max(pixels.shape[:2]) <= 64:
    return f"data:image/png;base64,{base64.b64encode(encode(pixels, 'PNG')).decode()}"
  image = Image.fromarray(pixels)
  image.thumbnail((128, 128), Image.Resampling.LANCZOS)
  return jpeg_url(image, quality=88)


def jpeg_url(image, quality) -> str:
  return f"data:image/jpeg;base64,{base64.b64encode(encode(image, 'JPEG', quality=quality)).decode()}"


def encode(image, kind, **options) -> bytes:
  """An image, or pixels uint8 [h, w, 3], as a file of this kind."""
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
  return buffer.getvalue()


def checked_views(views):
  """Views [n, 2, h, w, 3] as uint8."""
  views = _pixels(views)
  if views.ndim != 5 or views.shape[1] != 2 or views.shape[-1] != 3 or not views.size:
    raise UserError(f"views have shape {list(views.shape)}, expected [n, 2, h, w, 3]: pass pairs of images")
  return views


def checked_neighbors(queries, neighbors, same_label=None):
  """(queries [m, h, w, 3] as uint8, neighbors [m, k, h, w, 3] as uint8, same_label [m, k] as bool or None)."""
  queries, neighbors = _pixels(queries), _pixels(neighbors)
  if neighbors.ndim != 5 or queries.shape != neighbors.shape[:1] + neighbors.shape[2:] or not neighbors.size:
    raise UserError(
      f"queries {list(queries.shape)} and neighbors {list(neighbors.shape)} don't fit, "
      "expected [m, h, w, 3] and [m, k, h, w, 3]: pass k neighbor images for each query"
    )
  if same_label is not None:
    same_label = np.asarray(same_label, bool)
    if same_label.shape != neighbors.shape[:2]:
      raise UserError(
        f"same_label has shape {list(same_label.shape)}, expected {list(neighbors.shape[:2])}: "
        "pass one bool for each neighbor"
      )
  return queries, neighbors, same_label


def _pixels(images):
  """uint8 images as they are; float images in [0, 1] rounded to the nearest of 256 levels."""
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def _enlarge(images, zoom):
  zoom = zoom or max(1, -(-SMALLEST_SIDE // min(images.shape[-3:-1])))
  return images.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def _sheet(rows, columns, cell_h, cell_w, extra_width=0):
  sheet = np.empty((rows * (cell_h + GUTTER) + GUTTER, columns * (cell_w + GUTTER) + GUTTER + extra_width, 3), np.uint8)
  sheet[:] = PAPER
  return sheet
