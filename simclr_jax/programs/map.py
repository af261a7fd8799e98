"""`simclr map`: a map of a set of images by h, with near-duplicates and outliers. The science is in evaluation/maps.py."""

import concurrent.futures
import csv
import io
import os
import time

import numpy as np
from etils import epath
from PIL import Image

from simclr_jax import data, report
from simclr_jax.evaluation import embed, features, maps
from simclr_jax.programs import trained
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.programs.flags import MOST_ON_A_MAP
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

MOST_OF_A_GROUP = 6  # near-duplicates that a page shows of each group


def thumbnails(source, index) -> np.ndarray:
  """uint8 [n, s, s, 3]: the central squares of the images `index` [n] of a source, as large as a page can carry.

  What can no longer be read is gray: a file that was removed since its h was computed costs its picture, not the page.
  """

  def read(i):
    try:
      return source.read(int(i))
    except data.BadImage:
      return np.full((1, 1, 3), 128, np.uint8)

  sides = [min(read(i).shape[:2]) for i in index[:: -(-len(index) // 32)]]
  side = min(report.thumbnail_side(len(index)), max(16, int(np.median(sides))))

  def small(i):
    pixels = read(i)
    height, width = pixels.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    image = Image.fromarray(pixels[top : top + square, left : left + square])
    # BOX averages when it shrinks and repeats pixels when it enlarges.
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, reducing_gap=3.0))

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return np.stack(list(pool.map(small, index)))


def chart(h, pictures, names, labels=None, class_names=(), *, seed: int = 0, xy=None) -> dict:
  """Everything about n images that the map shows.

  Args:
    xy: float [n, 2], where t-SimCNE places them; by default InfoNC-t-SNE on h does.

  Returns:
    the arguments of `map_data` (report/map.py): dict(views {heading: [n, 2]}, note, and what was given); `note` says in
    a sentence how far the map can be trusted.
  """
  near = maps.neighbors(h)
  first = {"InfoNC-t-SNE": maps.infonc_tsne(h, near, seed=seed)} if xy is None else {"t-SimCNE": xy}
  views = {**first, "PCA": maps.pca(h)}
  # Where all are of one class, every vote is right and there is no silhouette.
  known = labels is not None and len(class_names) and bool((labels >= 0).all()) and len(np.unique(labels)) > 1
  if known:
    map_xy, pca_xy = views.values()
    a, b = (100 * maps.accuracy(xy, labels) for xy in (map_xy, pca_xy))
    pixels, colors = (100 * fraction for fraction in maps.baselines(pictures, labels).values())
    note = (
      f"{len(h):,} images. A vote of the {near.shape[1]} nearest neighbors names the right class for "
      f"{100 * maps.accuracy_of_h(near, labels):.1f} % in h, {pixels:.1f} % in raw pixels of the thumbnails, "
      f"{colors:.1f} % in their color histograms; {a:.1f} % on the map and {b:.1f} % on PCA of h. Silhouette of the "
      f"classes {maps.silhouette(map_xy, labels):.2f}, on PCA {maps.silhouette(pca_xy, labels):.2f}."
    )
  else:
    a, b = (maps.trustworthiness(h, xy, seed=seed) for xy in views.values())
    note = (
      f"{len(h):,} images; trustworthiness {a:.3f}, of PCA {b:.3f} (1: neighbors on the map are neighbors in h; 0.5: "
      "by chance)."
    )
  return dict(views=views, note=note, pictures=pictures, names=names, labels=labels, class_names=class_names)


def anomalies(h, pictures) -> dict:
  """dict(duplicates, outliers) of h [n, d] and pictures uint8 [n, s, s, 3]."""
  return dict(duplicates=maps.near_duplicates(h, pictures), outliers=maps.outliers(h))


def findings(chart: dict, found: dict, *, most: int = 24) -> dict:
  """What a page shows of near-duplicates and outliers: dict(duplicates, outliers), arguments of `report.write_map`."""
  pictures = chart["pictures"]
  names = ["/".join(str(name).split(os.sep)[-2:]) for name in chart["names"]]  # with the folder of the class
  groups = group(found["duplicates"])
  alike = [
    (_caption(names, members, found["duplicates"]), [pictures[i] for i in members[:MOST_OF_A_GROUP]])
    for members in groups[:most]
  ]
  alone = [(f"{names[i]}\n{far:.2f} times", [pictures[i]]) for i, far in found["outliers"][: most // 2]]
  count = len(found["duplicates"])
  text = (
    f"{count:,} pair{'' if count == 1 else 's'} in {len(groups):,} group{'' if len(groups) == 1 else 's'}, whose thumbnails "
    f"correlate by at least {maps.ALIKE_PIXELS} and whose h have a cosine of at least {maps.ALIKE_H}"
    + (f"; the {most} groups with the most alike." if len(groups) > most else ".")
  )
  far = "Distance to the five nearest neighbors in h, relative to that of the median image."
  return dict(duplicates=(text, alike), outliers=(far, alone))


def group(pairs) -> list[list[int]]:
  """Images that pairs (i, j, ...) connect, in the order of the first pair of each group."""
  of = {}
  for i, j, *_ in pairs:
    one, other = of.setdefault(i, [i]), of.setdefault(j, [j])
    if one is not other:
      one += other
      of.update(dict.fromkeys(other, one))
  return list({id(members): members for members in of.values()}.values())


def _caption(names, members, pairs) -> str:
  """The names of a group, and how alike its least alike pair is."""
  inside = [pair for pair in pairs if pair[0] in members]
  deep, pixels = min(pair[2] for pair in inside), min(pair[3] for pair in inside)
  least = "" if len(inside) == 1 else "at least "
  more = [f"and {len(members) - MOST_OF_A_GROUP} more"] if len(members) > MOST_OF_A_GROUP else []
  return "\n".join(
    [*(names[i] for i in members[:MOST_OF_A_GROUP]), *more, f"pixels {least}{pixels:.3f}, h {least}{deep:.3f}"]
  )


def write(folder, chart: dict, found: dict):
  """Writes map.npz, map.csv, map.png, duplicates.csv and outliers.csv to a local folder."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names, labels, (xy, components) = chart["names"], chart["labels"], chart["views"].values()
  labels = np.full(len(names), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
  buffer = io.BytesIO()
  np.savez(buffer, name=np.asarray(names), xy=xy, pca=components, label=labels)
  files.write_bytes(folder / "map.npz", buffer.getvalue())
  columns = (*xy.T.astype(float).round(4), *components.T.astype(float).round(6), labels)
  points = zip(names, *(column.tolist() for column in columns), strict=True)
  _csv(folder / "map.csv", ("name", "x", "y", "pca_1", "pca_2", "label"), points)
  pairs = ((names[i], names[j], round(deep, 5), round(pixels, 5)) for i, j, deep, pixels in found["duplicates"])
  _csv(folder / "duplicates.csv", ("first", "second", "cosine_of_h", "correlation_of_pixels"), pairs)
  alone = ((names[i], round(far, 5)) for i, far in found["outliers"])
  _csv(folder / "outliers.csv", ("name", "distance_to_neighbors"), alone)
  labels = chart["labels"] if len(chart["class_names"]) else None
  report.map_png(folder / "map.png", xy, thumbnails=chart["pictures"], labels=labels, class_names=chart["class_names"])


def _csv(path, head, rows):
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
  files.write_bytes(path, buffer.getvalue().encode("utf-8", "surrogateescape"))


def run(
  workdir=None,
  table=None,
  *,
  method="infonc-tsne",
  step=None,
  output=None,
  images: int = MOST_ON_A_MAP,
  seed: int = 0,
  data_dir: str | None = None,
  overrides=(),
) -> dict:
  """The program `simclr map`: a map of the test images of a run or an export (training images if it has none), or
  of a file that `simclr embed` wrote.

  Args:
    method: "infonc-tsne", of h; or "tsimcne", which places the images by the network of a run of configs/tsimcne.py.
    output: folder to write to; by default `map` in the run's folder or next to the file.
    images: the largest number of images, which `seed` draws.
    data_dir: where prepared TensorFlow Datasets are, for the images of the file.

  Returns:
    what `chart` and `anomalies` return.
  """
  began = time.monotonic()
  if bool(workdir) == bool(table):
    raise UserError("give one of --workdir=RUN and --features=FILE")
  if table and method == "tsimcne":
    raise UserError(
      f"--method=tsimcne: the network of the map is in the run, not in --features={table}: give --workdir=RUN"
    )
  if table and (step is not None or overrides):
    given = f"--step={step}" if step is not None else overrides[0]
    raise UserError(f"{given}: --features={table} are computed already; embed the run again, or give --workdir=RUN")
  if workdir and data_dir:
    raise UserError(f"--data_dir={data_dir} is for --features; with --workdir give --config.data.data_dir={data_dir}")
  if workdir:
    opened = trained.TrainedRun(workdir, step=step, overrides=overrides)
    source = opened.test_source
    spec = opened.config.data.test or opened.config.data.train
    chosen = np.sort(data.permutation(seed, 0, len(source))[:images])
    part = embed.eval_set(data.Selection(source, chosen), opened.config, opened.mesh)
    h, labels = opened.encode(part), part.labels()
    xy = opened.on_the_map(h) if method == "tsimcne" else None
    index, class_names = chosen[part.rows()], source.class_names
    title, folder = f"Map of {spec}", opened.results("map")
  else:
    made = features.load(table)
    spec = made.data
    source = data.open_source(spec, data_dir=data_dir)
    _check_same_images(table, made, source)
    rows = np.sort(data.permutation(seed, 0, len(made.h))[:images])
    xy, h, labels, index, class_names = None, made.h[rows], made.label[rows], made.index[rows], source.class_names
    title, folder = f"Map of {spec}", epath.Path(table).parent / "map"
  if len(h) < 2:
    raise UserError(f"{len(h)} image: a map needs at least two")
  folder = files.absolute(output) if output else folder
  workdir_lib.check_outside("--output", folder, spec)
  names = [source.name(int(i)) for i in index]
  pictures = thumbnails(source, index)
  shown = chart(h, pictures, names, labels if class_names else None, class_names, seed=seed, xy=xy)
  found = anomalies(h, pictures)
  write(folder, shown, found)
  report.write_map(
    folder / "map.html",
    title=title,
    summary=shown["note"],
    map_of_images={**shown, "note": "Hover or tap for the image; drag when zoomed in."},
    **findings(shown, found),
  )
  print(shown["note"])
  print_findings(names, found)
  print(f"time        {time.monotonic() - began:.0f} s")
  for name, what in (
    ("map.html", "the map to point at"), ("map.png", "the map as a picture"), ("map.npz", "the points; map.csv too"),
    ("duplicates.csv", "all near-duplicates"), ("outliers.csv", "all images, the farthest from others first"),
  ):  # fmt: skip
    print(f"  {folder / name}  {what}")
  return {**shown, **found}


def _check_same_images(table, made: features.Features, source):
  """Raises UserError if a row of the file is of another image than the one that is at its place now."""
  for name, index in zip(made.name, made.index.tolist(), strict=True):
    now = source.name(index) if index < len(source) else "nothing"
    if features.utf8(now) != features.utf8(str(name)):
      raise UserError(
        f"--features={table}: image {index} of {made.data} was {name} and is {now}: run simclr embed again"
      )


def print_findings(names, found: dict, most: int = 5):
  """Prints the first near-duplicates and outliers."""
  print(f"duplicates  {len(found['duplicates'])} pairs of near-duplicates")
  for i, j, deep, pixels in found["duplicates"][:most]:
    print(f"            {names[i]} and {names[j]} (pixels {pixels:.3f}, h {deep:.3f})")
  print("outliers    farthest from their neighbors, relative to the median image's distance")
  for i, far in found["outliers"][:most]:
    print(f"            {names[i]} ({far:.2f})")


def main(flags, overrides) -> int:
  options = {name: getattr(flags, name) for name in ("method", "step", "output", "images", "seed", "data_dir")}
  run(flags.workdir, flags.features, **options, overrides=overrides)
  return 0
