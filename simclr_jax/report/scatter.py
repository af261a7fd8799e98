"""A map of images: points in the plane as a PNG, and as a piece of a page with thumbnails under the pointer.

Knows nothing of networks; takes numpy arrays, and pictures all of one size.  The piece of a page loads nothing: the
pictures are one sheet inside it, and the script is below.
"""

import base64
import colorsys
import html
import io
import json

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEN = ("#2b6cb0", "#e08a2c", "#2f9e6e", "#c9413f", "#8e63b8", "#8c6239", "#d671ae", "#70777f", "#a9a62b", "#2bb1c4")
SHEET_PIXELS = 6e6  # of the sheet of thumbnails inside a page: about 2 MB as JPEG


def colours(count: int) -> list[str]:
  """`count` colours as #rrggbb, told apart as well as so many can be."""
  if count <= len(TEN):
    return list(TEN[: max(count, 1)])
  # Hues a golden angle apart, so that classes with neighbouring numbers differ, in three brightnesses.
  hues = [(0.6 + 0.381966 * i) % 1.0 for i in range(count)]
  rgb = [colorsys.hls_to_rgb(hue, (0.42, 0.56, 0.34)[i % 3], 0.6) for i, hue in enumerate(hues)]
  return ["#" + "".join(f"{round(255 * v):02x}" for v in one) for one in rgb]


def thumbnail_side(count: int) -> int:
  """Side in pixels at which the thumbnails of `count` images fit on one sheet: 64 for 1,000, 24 for 10,000."""
  return int(np.clip((SHEET_PIXELS / max(count, 1)) ** 0.5, 16, 64))


def unit_square(xy):
  """xy float [n, 2] into [0, 1], the longer side filled, the shorter one centred, up being up."""
  low, high = xy.min(0), xy.max(0)
  out = (xy - (low + high) / 2) / max(float((high - low).max()), 1e-12) + 0.5
  return np.stack([out[:, 0], 1.0 - out[:, 1]], 1)


# ---- the picture -----------------------------------------------------------------------------------------------


def png(path, xy, *, pictures=None, labels=None, class_names=(), side: int = 900):
  """Writes the map as a PNG: coloured points with a legend where there are labels, else the pictures themselves.

  xy: float [n, 2]; pictures: uint8 [n, s, s, 3]; labels: int [n], -1 where there is none.
  """
  scale = 1 if labels is None and pictures is not None else 2  # points are drawn at twice the size: smooth edges
  canvas, margin = scale * side, scale * 28
  place = margin + unit_square(np.asarray(xy, float)) * (canvas - 2 * margin)
  place[:, 1] -= place[:, 1].min() - margin
  height = int(place[:, 1].max()) + margin
  image = Image.new("RGB", (canvas, height), "white")
  if scale == 1:
    _paste_pictures(image, place, pictures)
  else:
    radius = scale * float(np.clip(110 / len(xy) ** 0.5, 1.3, 4.5))
    draw = ImageDraw.Draw(image)
    palette = colours(len(class_names)) if labels is not None else [TEN[0]]
    for i in np.random.default_rng(0).permutation(len(xy)):  # or the last class would cover the others
      colour = palette[0] if labels is None else "#c8ccd0" if labels[i] < 0 else palette[labels[i]]
      x, y = place[i]
      draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    image = image.resize((side, height // scale), Image.Resampling.LANCZOS)
  if labels is not None and 0 < len(class_names) <= 24:
    image = _with_legend(image, class_names)
  image.convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(path, "PNG", optimize=True)


def _paste_pictures(image, place, pictures):
  """Every picture that finds its cell empty: the map stays readable where it is dense."""
  size = int(np.clip(image.width / len(place) ** 0.5 * 0.8, 20, 64))
  taken = set()
  for (x, y), pixels in zip(place, pictures, strict=True):
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
  for i, (name, colour) in enumerate(zip(class_names, colours(len(class_names)), strict=True)):
    x, y = 28 + i % columns * (image.width - 40) // columns, image.height + i // columns * step
    draw.ellipse((x, y + 4, x + 11, y + 15), fill=colour)
    draw.text((x + 18, y), str(name)[:20], fill="#333", font=font)
  return out


# ---- the piece of a page ---------------------------------------------------------------------------------------


def piece(views, *, pictures, names, labels=None, class_names=()) -> str:
  """HTML of a map to point at: hover or tap shows the image and its name; a click on a class leaves it alone.

  Args:
    views: {heading: float [n, 2]}, the first shown first.
    pictures: uint8 [n, s, s, 3]; they are shrunk until all fit on a sheet of SHEET_PIXELS.
    names: n strings; labels: int [n], -1 where there is none; class_names: of the labels.

  A page has one map at most.
  """
  n = len(names)
  side = min(thumbnail_side(n), pictures.shape[1])
  columns = int(np.ceil(n**0.5))
  sheet = np.full((-(-n // columns) * side, columns * side, 3), 255, np.uint8)
  for i, pixels in enumerate(pictures):
    if pixels.shape[0] != side:
      pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
    y, x = i // columns * side, i % columns * side
    sheet[y : y + side, x : x + side] = pixels
  buffer = io.BytesIO()
  Image.fromarray(sheet).save(buffer, "JPEG", quality=78)
  known = labels is not None and len(class_names) > 0
  content = {
    "side": side,
    "columns": columns,
    "names": [str(name) for name in names],
    "labels": [int(label) for label in labels] if known else None,
    "classes": [str(name) for name in class_names] if known else [],
    "colours": colours(len(class_names)) if known else [TEN[0]],
    "views": [np.rint(1e4 * unit_square(np.asarray(xy, float))).astype(int).ravel().tolist() for xy in views.values()],
  }
  # A name may hold "</script>".
  content = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
  buttons = "".join(
    f'<button type="button" data-view="{i}">{html.escape(str(v))}</button>' for i, v in enumerate(views)
  )
  legend = ""
  if known and len(class_names) <= 40:
    legend = '<div class="legend">' + "".join(
      f'<button type="button" data-class="{i}"><i style="background:{colour}"></i>{html.escape(str(name))}</button>'
      for i, (name, colour) in enumerate(zip(class_names, colours(len(class_names)), strict=True))
    )
    legend += "</div>\n"
  return (
    f'<div class="map" id="map-of-images">\n<div class="bar">{buttons}<button type="button" data-pictures="1">pictures</button>'
    '<button type="button" data-zoom="1.6" aria-label="zoom in">+</button>'
    '<button type="button" data-zoom="0.625" aria-label="zoom out">−</button></div>\n'
    '<div class="stage"><canvas></canvas><div class="card" hidden><canvas width="192" height="192"></canvas><b></b><span></span></div>'
    f'</div>\n{legend}<img alt="" hidden src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">\n'
    f'<script type="application/json" id="map-data">{content}</script>\n<script>{SCRIPT}</script>\n</div>'
  )


SCRIPT = """
(() => {
  const root = document.getElementById("map-of-images"), stage = root.querySelector(".stage");
  const canvas = stage.querySelector("canvas"), card = root.querySelector(".card"), sheet = root.querySelector("img");
  const { side, columns, names, labels, classes, colours, views } = JSON.parse(document.getElementById("map-data").textContent);
  const pen = canvas.getContext("2d"), n = names.length;
  let view = 0, pictures = !labels, only = -1, zoom = 1, cx = 0.5, cy = 0.5, size = 0, hovered = -1, grip = null;

  const margin = 24;
  const place = (i) => [
    size / 2 + (views[view][2 * i] / 1e4 - cx) * zoom * (size - 2 * margin),
    size / 2 + (views[view][2 * i + 1] / 1e4 - cy) * zoom * (size - 2 * margin),
  ];
  const shown = (i) => only < 0 || labels[i] === only;
  const stamp = (to, i, x, y, w) =>
    to.drawImage(sheet, (i % columns) * side, Math.floor(i / columns) * side, side, side, x, y, w, w);

  function draw() {
    size = stage.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(size * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const picture = Math.max(18, Math.min(56, size / Math.sqrt(n) * 0.9 * Math.sqrt(zoom)));
    const radius = Math.max(1.6, Math.min(5, 110 / Math.sqrt(n))) * Math.sqrt(zoom) * (size < 500 ? 0.8 : 1);
    const taken = new Set();
    for (let k = 0; k < n; k++) {
      const i = labels ? (k * 7919) % n : k;  // mixed, or the last class would cover the others
      const [x, y] = place(i);
      if (x < -40 || y < -40 || x > size + 40 || y > size + 40) continue;
      pen.globalAlpha = shown(i) ? 0.85 : 0.08;
      pen.fillStyle = labels ? (labels[i] < 0 ? "#9aa2aa" : colours[labels[i]]) : colours[0];
      if (pictures && shown(i)) {
        const cell = Math.floor(x / picture) + "," + Math.floor(y / picture);
        if (taken.has(cell)) continue;
        taken.add(cell);
        pen.globalAlpha = 1;
        if (labels) pen.fillRect(x - picture / 2, y - picture / 2, picture - 1, picture - 1);
        const edge = labels ? 2 : 0;
        stamp(pen, i, x - picture / 2 + edge, y - picture / 2 + edge, picture - 2 - 2 * edge + (labels ? 1 : 0));
      } else {
        pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill();
      }
    }
    pen.globalAlpha = 1;
    if (hovered >= 0) {
      const [x, y] = place(hovered);
      pen.strokeStyle = getComputedStyle(root).color; pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, radius + 4, 0, 7); pen.stroke();
    }
    for (const b of root.querySelectorAll("[data-view]")) b.classList.toggle("on", +b.dataset.view === view);
    for (const b of root.querySelectorAll("[data-class]")) b.classList.toggle("on", +b.dataset.class === only);
    root.querySelector("[data-pictures]").classList.toggle("on", pictures);
  }

  function point(event) {
    const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    if (grip && event.buttons) {
      cx = grip[2] - (px - grip[0]) / zoom / (size - 2 * margin);
      cy = grip[3] - (py - grip[1]) / zoom / (size - 2 * margin);
      card.hidden = true;
      return draw();
    }
    let best = -1, least = 22 * 22;
    for (let i = 0; i < n; i++) {
      if (!shown(i)) continue;
      const [x, y] = place(i), d = (x - px) ** 2 + (y - py) ** 2;
      if (d < least) { least = d; best = i; }
    }
    if (best === hovered) return;
    hovered = best;
    draw();
    card.hidden = best < 0;
    if (best < 0) return;
    const inner = card.querySelector("canvas").getContext("2d"), [x, y] = place(best);
    inner.imageSmoothingEnabled = side >= 48;
    stamp(inner, best, 0, 0, 192);
    card.querySelector("b").textContent = labels && labels[best] >= 0 ? classes[labels[best]] : "";
    card.querySelector("span").textContent = names[best].split("/").slice(-2).join("/");
    card.style.left = Math.max(0, Math.min(size - 124, x < size / 2 ? x + 14 : x - 138)) + "px";
    card.style.top = Math.max(0, Math.min(size - 176, y - 80)) + "px";
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", (event) => {
    const box = canvas.getBoundingClientRect();
    grip = event.pointerType === "mouse" ? [event.clientX - box.left, event.clientY - box.top, cx, cy] : null;
    if (!grip) point(event);
  });
  canvas.addEventListener("pointerup", () => { grip = null; });
  canvas.addEventListener("pointerleave", () => { hovered = -1; grip = null; card.hidden = true; draw(); });
  root.addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    if (b.dataset.view) { view = +b.dataset.view; zoom = 1; cx = cy = 0.5; }
    if (b.dataset.zoom) { zoom = Math.max(1, Math.min(40, zoom * b.dataset.zoom)); if (zoom === 1) cx = cy = 0.5; }
    if (b.dataset.pictures) pictures = !pictures;
    if (b.dataset.class) only = only === +b.dataset.class ? -1 : +b.dataset.class;
    card.hidden = true;
    draw();
  });
  new ResizeObserver(draw).observe(stage);
  sheet.complete ? draw() : sheet.addEventListener("load", draw);
})();
"""

STYLE = """
.map { max-width: 760px; }
.map .bar, .map .legend { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 10px; }
.map .legend { margin: 10px 0 0; }
.map button {
  padding: 4px 11px; cursor: pointer; font: inherit; font-size: 13px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px;
}
.map button.on { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.map button i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.map .stage { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.map .stage > canvas { display: block; width: 100%; aspect-ratio: 1; touch-action: pan-y; cursor: crosshair; }
.map .card {
  position: absolute; width: 124px; padding: 6px; pointer-events: none; font-size: 12px; line-height: 1.3;
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px; box-shadow: 0 2px 10px rgb(0 0 0 / .2);
}
.map .card canvas { display: block; width: 110px; height: 110px; margin-bottom: 4px; border-radius: 4px; }
.map .card b, .map .card span { display: block; overflow-wrap: anywhere; }
.map .card span { color: var(--quiet); }
.map [hidden] { display: none; }
"""
