"""A map of a set of images: h in the plane, and what stands out there: near-duplicates and outliers.

Two views: PCA, in which distances mean something everywhere, and one that keeps neighbours.  The second minimises the
loss of t-SimCNE (arXiv 2210.09879, eq. 2), NT-Xent with the Cauchy kernel 1 / (1 + d^2) in place of exp(cosine / T),
over free points instead of a network's outputs; the partner of an image is not a second view of it but its nearest
neighbours in h, which makes it a relative of t-SNE (InfoNC-t-SNE, arXiv 2206.01816).
"""

import concurrent.futures
import csv
import functools
import io
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from simclr_jax import data, report
from simclr_jax.evaluation import embed, features, knn
from simclr_jax.programs import trained
from simclr_jax.report import scatter

NEIGHBOURS = 15
SAMPLE = 1024  # of the points that all repel at one step
ALIKE_PIXELS, ALIKE_H = 0.95, 0.8  # near-duplicates: correlation of 16-pixel thumbnails, and cosine of h, at least


def pca(h) -> np.ndarray:
  """float32 [n, 2]: h [n, d] along its two directions of most variance; the sign makes the larger entry positive."""
  x = np.asarray(h, np.float64) - np.mean(h, 0, dtype=np.float64)
  _, _, axes = np.linalg.svd(x.T @ x)
  axes = np.pad(axes, ((0, max(0, 2 - len(axes))), (0, 0)))[:2]
  axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) + 1e-30)
  return (x @ axes.T).astype(np.float32)


def keep_neighbours(h, *, seed: int = 0, steps: int = 500) -> np.ndarray:
  """float32 [n, 2] in which the nearest neighbours of h [n, d], by cosine, stay near.

  Starts at PCA.  A function of (h, seed): the same bits again on a CPU.  10,000 points take a quarter of a minute on
  two CPU cores, 2,000 two seconds.
  """
  n, start = len(h), pca(h)
  if n < 4:
    return start
  _, near = knn.nearest(h, h, k=NEIGHBOURS + 1)
  start = jnp.asarray(start / max(float(start.std()), 1e-12))
  return np.asarray(_descend(start, jnp.asarray(near[:, 1:]), jax.random.key(seed), steps, min(n, SAMPLE)))


@functools.partial(jax.jit, static_argnames=("steps", "sample"))
def _descend(start, near, key, steps, sample):
  n = len(start)

  def loss(y, key, pull):
    attract = jnp.log1p(jnp.sum((y[:, None] - y[near]) ** 2, -1)).mean(1)  # - log of the kernel
    others = jax.random.choice(key, n, (sample,), replace=False) if sample < n else jnp.arange(n)
    squared = (y[:, :1] - y[others, 0]) ** 2 + (y[:, 1:] - y[others, 1]) ** 2
    kernel = jnp.where(jnp.arange(n)[:, None] == others, 0.0, 1.0 / (1.0 + squared))
    return jnp.sum(pull * attract + jnp.log(kernel.sum(1) + 1e-9))

  def step(i, carry):
    y, velocity = carry
    done = i / steps
    pull = jnp.where(done < 0.3, 4.0, 1.0)  # t-SNE's early exaggeration: clusters find each other first
    rate = 0.3 * jnp.minimum(1.0, 4.0 * (1.0 - done))
    velocity = 0.8 * velocity - rate * jax.grad(loss)(y, jax.random.fold_in(key, i), pull)
    return y + velocity, velocity

  return jax.lax.fori_loop(0, steps, step, (start, jnp.zeros_like(start)))[0]


def _nearest_on_map(xy, queries, k):
  """Indices [m, k] of the points of xy [n, 2] nearest to those numbered `queries` [m], themselves left out."""
  squared = ((xy[queries, None] - xy[None]) ** 2).sum(-1)
  squared[np.arange(len(queries)), queries] = np.inf
  return np.argpartition(squared, k - 1, 1)[:, :k]


def accuracy(xy, labels, *, k: int = NEIGHBOURS) -> float:
  """Share of the points of xy [n, 2] whose k nearest others, by a majority, have their label; labels int [n], >= 0."""
  k, right = min(k, len(xy) - 1), 0
  for queries in np.array_split(np.arange(len(xy)), -(-len(xy) // 500)):
    right += int((_majority(labels[_nearest_on_map(xy, queries, k)]) == labels[queries]).sum())
  return right / len(xy)


def _majority(near):
  """int [m]: the most frequent label in each row of near [m, k], the lowest of several."""
  return np.stack([(near == c).sum(1) for c in range(near.max() + 1)], 1).argmax(1)


def trustworthiness(h, xy, *, k: int = NEIGHBOURS, queries: int = 1000, seed: int = 0) -> float:
  """Whether neighbours on the map xy [n, 2] are neighbours in h [n, d], by cosine: 1 all of them, about 0.5 by chance.

  Averaged over at most `queries` points drawn by `seed`.  Source: Venna and Kaski 2001, as scikit-learn defines it.
  """
  n = len(h)
  k = min(k, (n - 1) // 2)
  if k < 1:
    return 1.0
  unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  chosen, lost = data.permutation(seed, 0, n)[:queries], 0
  for part in np.array_split(chosen, -(-len(chosen) // 500)):
    similarity = unit[part] @ unit.T
    similarity[np.arange(len(part)), part] = np.inf
    rank = similarity.argsort(1)[:, ::-1].argsort(1)  # 0: itself
    lost += np.maximum(np.take_along_axis(rank, _nearest_on_map(xy, part, k), 1) - k, 0).sum()
  return float(1 - 2 * lost / (len(chosen) * k * (2 * n - 3 * k - 1)))


def centred(h) -> np.ndarray:
  """h [n, d] less its mean, of unit length: outputs of a ReLU all point one way, and cosines would all be near 1."""
  x = np.asarray(h, np.float32) - np.mean(h, 0)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def near_duplicates(h, pictures) -> list[tuple[int, int, float, float]]:
  """[(i, j, cosine of h, correlation of the tiny pictures)], i < j, most alike first.

  h: [n, d]; pictures: uint8 [n, s, s, 3].  A pair is one of which either is among the 10 nearest of the other, by h or
  by pixels, and that both find alike: the network alone would call two photos of one scene the same, pixels alone two
  flat images.
  """
  tiny = np.stack([np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX), np.float32) for p in pictures])
  tiny = tiny.reshape(len(tiny), -1)
  tiny = centred(tiny - tiny.mean(1, keepdims=True))  # brighter or darker is the same picture
  deep, pairs = centred(h), set()
  for x in (deep, tiny):
    _, near = knn.nearest(x, x, k=11)
    pairs |= {(min(i, int(j)), max(i, int(j))) for i, row in enumerate(near) for j in row if i != j}
  found = [(i, j, float(deep[i] @ deep[j]), float(tiny[i] @ tiny[j])) for i, j in pairs]
  found = [row for row in found if row[2] >= ALIKE_H and row[3] >= ALIKE_PIXELS]
  return sorted(found, key=lambda row: (-round(row[3], 4), -row[2], row[:2]))


def outliers(h, *, k: int = 5) -> list[tuple[int, float]]:
  """[(i, mean distance of image i to its k nearest others, in units of the median image's)], farthest first.

  Distances are between square roots of h [n, d], which is not negative: the few largest activations would decide
  otherwise, and what is odd in a channel that others hardly use would go unseen.  Source of the score: arXiv 2204.06507.
  """
  x = np.sqrt(np.maximum(h, 0)).astype(np.float32)
  k, squared = min(k, len(x) - 1), (x * x).sum(1)
  mean = np.empty(len(x))
  for rows in np.array_split(np.arange(len(x)), -(-len(x) // 500)):
    distance = np.sqrt(np.maximum(squared[rows, None] + squared - 2 * x[rows] @ x.T, 0))
    distance[np.arange(len(rows)), rows] = np.inf
    mean[rows] = np.partition(distance, k - 1, 1)[:, :k].mean(1)
  mean /= max(float(np.median(mean)), 1e-12)
  return [(int(i), float(mean[i])) for i in np.argsort(-mean, kind="stable")]


def thumbnails(source, index) -> np.ndarray:
  """uint8 [n, s, s, 3]: the central squares of the images `index` [n] of a source, as large as a page can carry."""
  side = min(scatter.thumbnail_side(len(index)), *source.read(int(index[0])).shape[:2])

  def small(i):
    pixels = source.read(int(i))
    height, width = pixels.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    image = Image.fromarray(pixels[top : top + square, left : left + square])
    # BOX averages when it shrinks and repeats pixels when it enlarges.
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, reducing_gap=3.0))

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return np.stack(list(pool.map(small, index)))


def chart(h, pictures, names, labels=None, class_names=(), *, seed: int = 0) -> dict:
  """Everything about n images that the map shows.

  Returns:
    the arguments of `report.write_report`'s map: dict(views {heading: [n, 2]}, note, and what was given); `note` says in
    a sentence how far the map can be trusted.
  """
  views = {"neighbours": keep_neighbours(h, seed=seed), "PCA": pca(h)}
  known = labels is not None and len(class_names) and bool((labels >= 0).all())
  if known:
    (a, b), full = (accuracy(xy, labels) for xy in views.values()), accuracy_of_h(h, labels)
    note = (
      f"{len(h):,} images. By a vote of the {min(NEIGHBOURS, len(h) - 1)} nearest neighbours the class is right for "
      f"{100 * a:.1f} % on the map, {100 * b:.1f} % on PCA, {100 * full:.1f} % in h."
    )
  else:
    a, b = (trustworthiness(h, xy, seed=seed) for xy in views.values())
    note = (
      f"{len(h):,} images; trustworthiness {a:.3f}, of PCA {b:.3f} (1: neighbours on the map are neighbours in h; 0.5: "
      "by chance)."
    )
  return dict(
    views=views,
    note=note,
    pictures=pictures,
    names=names,
    labels=labels,
    class_names=class_names,
  )


def odd(h, pictures) -> dict:
  """dict(duplicates, outliers) of h [n, d] and pictures uint8 [n, s, s, 3]."""
  return dict(duplicates=near_duplicates(h, pictures), outliers=outliers(h))


def accuracy_of_h(h, labels) -> float:
  """As `accuracy`, in h [n, d] by cosine."""
  _, near = knn.nearest(h, h, k=NEIGHBOURS + 1)
  return float((_majority(labels[near[:, 1:]]) == labels).mean())


def findings(chart: dict, found: dict, *, most: int = 24) -> list[tuple[str, str, str]]:
  """The sections of a page about near-duplicates and outliers."""
  pictures, names = chart["pictures"], [os.path.basename(str(name)) for name in chart["names"]]
  pairs = [
    (pictures[i], pictures[j], f"{names[i]}\n{names[j]}\npixels {pixels:.3f}, h {deep:.3f}")
    for i, j, deep, pixels in found["duplicates"][:most]
  ]
  alone = [(pictures[i], f"{names[i]}\n{far:.2f} times") for i, far in found["outliers"][: most // 2]]
  count = len(found["duplicates"])
  text = f"{count:,} pairs" if count != 1 else "1 pair"
  text += f" whose thumbnails correlate by at least {ALIKE_PIXELS} and whose h have a cosine of at least {ALIKE_H}"
  text += f"; the {most} most alike." if count > most else "."
  return [
    ("duplicates", "Near-duplicates", report.pairs(pairs, text) if pairs else report.note(text)),
    (
      "outliers",
      "Outliers",
      report.gallery(alone, "How far from their five nearest neighbours in h, against the middle image's distance."),
    ),
  ]


def write(folder, chart: dict, found: dict):
  """Writes map.npz, map.csv, map.png, duplicates.csv and outliers.csv to a local folder."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names, labels, (xy, components) = chart["names"], chart["labels"], chart["views"].values()
  labels = np.full(len(names), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
  buffer = io.BytesIO()
  np.savez(buffer, name=np.asarray(names), xy=xy, pca=components, label=labels)
  report.write_file(folder / "map.npz", buffer.getvalue())
  points = zip(names, *xy.T.round(4).tolist(), *components.T.round(6).tolist(), labels.tolist(), strict=True)
  _csv(folder / "map.csv", ("name", "x", "y", "pca_1", "pca_2", "label"), points)
  pairs = ((names[i], names[j], round(deep, 5), round(pixels, 5)) for i, j, deep, pixels in found["duplicates"])
  _csv(folder / "duplicates.csv", ("first", "second", "cosine_of_h", "correlation_of_pixels"), pairs)
  alone = ((names[i], round(far, 5)) for i, far in found["outliers"])
  _csv(folder / "outliers.csv", ("name", "distance_to_neighbours"), alone)
  labels = chart["labels"] if len(chart["class_names"]) else None
  scatter.png(folder / "map.png", xy, pictures=chart["pictures"], labels=labels, class_names=chart["class_names"])


def _csv(path, head, rows):
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
  report.write_file(path, buffer.getvalue().encode("utf-8", "surrogateescape"))


def run(workdir=None, table=None, *, step=None, output=None, images: int = 10_000, seed: int = 0, overrides=()) -> dict:
  """The program `simclr map`: of a run's h of its test images (training images if it has none), or of a file that
  `simclr embed` wrote.

  Args:
    output: folder to write to; by default `map` in the run's folder or beside the file.
    images: at most so many, drawn by `seed`.

  Returns:
    what `chart` and `odd` return.
  """
  began = time.monotonic()
  if bool(workdir) == bool(table):
    raise ValueError("give one of --workdir=RUN and --features=FILE")
  if workdir:
    opened = trained.TrainedRun(workdir, step=step, overrides=overrides)
    spec = opened.config.data.test or opened.config.data.train
    source = data.open_source(spec, data_dir=opened.config.data.data_dir or None)
    chosen = np.sort(data.permutation(seed, 0, len(source))[:images])
    part = embed.eval_set(data.Selection(source, chosen), opened.config, opened.mesh)
    h, labels = opened.encode(part), part.labels()
    index, class_names = chosen[part.rows()], source.class_names
    title, folder = f"Map of {spec}", epath.Path(workdir) / "map"
  else:
    made = features.load(table)
    source = data.open_source(made.data)
    rows = np.sort(data.permutation(seed, 0, len(made.h))[:images])
    h, labels, index, class_names = made.h[rows], made.label[rows], made.index[rows], source.class_names
    title, folder = f"Map of {made.data}", epath.Path(table).parent / "map"
  if len(h) < 2:
    raise ValueError(f"{len(h)} image: a map needs at least two")
  folder = epath.Path(os.path.abspath(output)) if output else folder
  names = [source.name(int(i)) for i in index]
  pictures = thumbnails(source, index)
  shown = chart(h, pictures, names, labels if class_names else None, class_names, seed=seed)
  found = odd(h, pictures)
  write(folder, shown, found)
  report.write_report(
    folder / "map.html",
    title=title,
    summary=shown["note"],
    scores=[],
    history=[],
    config={},
    files={},
    snippet="",
    map_of_images={**shown, "note": "Hover or tap for the image; drag when zoomed in."},
    findings=findings(shown, found),
  )
  print(shown["note"])
  tell(names, found)
  print(f"time        {time.monotonic() - began:.0f} s")
  for name, what in (
    ("map.html", "the map to point at"), ("map.png", "the map as a picture"), ("map.npz", "the points; map.csv too"),
    ("duplicates.csv", "all near-duplicates"), ("outliers.csv", "all images, the farthest from others first"),
  ):  # fmt: skip
    print(f"  {folder / name}  {what}")
  return {**shown, **found}


def tell(names, found: dict, most: int = 5):
  """Prints the first near-duplicates and outliers."""
  print(f"duplicates  {len(found['duplicates'])} pairs of near-duplicates")
  for i, j, deep, pixels in found["duplicates"][:most]:
    print(f"            {names[i]} and {names[j]} (pixels {pixels:.3f}, h {deep:.3f})")
  print("outliers    farthest from their neighbours, in times the middle image's distance")
  for i, far in found["outliers"][:most]:
    print(f"            {names[i]} ({far:.2f})")
