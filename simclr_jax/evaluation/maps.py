"""Overview of a set of representations h: two maps in the plane, how far to trust them, near-duplicates, outliers.

In the PCA map all distances are meaningful; the other map, InfoNC-t-SNE (arXiv 2206.01816), keeps
neighbors together. It minimizes NT-Xent with the Cauchy kernel 1 / (1 + d^2) instead of exp(cosine / T) over free points,
where the positives of an image are its nearest neighbors in h. t-SimCNE (arXiv 2210.09879) applies the same loss to the
outputs of a network, with the second view as the positive: it is a training method, methods/tsimcne.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from simclr_jax import data
from simclr_jax.evaluation import knn

NEIGHBORS = 15
SAMPLE = 1024  # of the points that all repel at one step
# A weak veto by h: after 10 to 40 steps of training, a picture and its copy 25 % brighter had a cosine below 0.8.
ALIKE_PIXELS, ALIKE_H = 0.95, 0.5  # near-duplicates: correlation of 16-pixel thumbnails, and cosine of h, at least


def pca(h) -> np.ndarray:
  """float32 [n, 2]: h [n, d] along its two directions of most variance; the sign makes the largest entry positive."""
  x = np.asarray(h, np.float64) - np.mean(h, 0, dtype=np.float64)
  _, _, axes = np.linalg.svd(x.T @ x)
  axes = np.pad(axes, ((0, max(0, 2 - len(axes))), (0, 0)))[:2]
  axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) + 1e-30)
  return (x @ axes.T).astype(np.float32)


def neighbors(h, *, k: int = NEIGHBORS) -> np.ndarray:
  """int [n, min(k, n - 1)]: the nearest others of each row of h [n, d], by cosine, nearest first."""
  _, near = knn.nearest(h, h, k=k + 1)
  # A row is its own nearest neighbor, but need not be the first of several copies.
  others = near != np.arange(len(near))[:, None]
  others[others.all(1), -1] = False
  return near[others].reshape(len(near), -1)


def infonc_tsne(h, near, *, seed: int = 0, steps: int = 500) -> np.ndarray:
  """InfoNC-t-SNE: float32 [n, 2] in which each row of h [n, d] stays close to its neighbors `near` [n, k].

  It starts at PCA and is a function of (h, seed), with the same bits again on a CPU. 10,000 points take a quarter of a
  minute on two CPU cores, 2,000 take two seconds.
  """
  n, start = len(h), pca(h)
  if n < 4:
    return start
  start = jnp.asarray(start / max(float(start.std()), 1e-12))
  return np.asarray(_descend(start, jnp.asarray(near), jax.random.key(seed), steps, min(n, SAMPLE)))


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


def accuracy(xy, labels, *, k: int = NEIGHBORS) -> float:
  """Fraction of the points xy [n, 2] that have the majority label of their k nearest others; labels int [n], >= 0."""
  k, right = min(k, len(xy) - 1), 0
  for queries in np.array_split(np.arange(len(xy)), -(-len(xy) // 500)):
    right += int((_majority(labels[_nearest_on_map(xy, queries, k)]) == labels[queries]).sum())
  return right / len(xy)


def silhouette(xy, labels) -> float:
  """Mean over the points xy [n, 2] of (b - a) / max(a, b), a the mean distance to the other points of its class and b that
  to the points of the nearest other class; 0 for a point that is alone in its class, and nan where there is one class.

  Source: Rousseeuw 1987, as scikit-learn defines it.
  """
  xy, labels = np.asarray(xy, np.float64), np.unique(labels, return_inverse=True)[1]
  counts = np.bincount(labels)
  if len(counts) < 2:
    return float("nan")
  member, total = np.eye(len(counts))[labels], 0.0
  for rows in np.array_split(np.arange(len(xy)), -(-len(xy) // 500)):
    sums = np.sqrt(((xy[rows, None] - xy[None]) ** 2).sum(-1)) @ member
    own = labels[rows]
    a = np.take_along_axis(sums, own[:, None], 1)[:, 0] / np.maximum(counts[own] - 1, 1)
    b = np.where(member[rows] > 0, np.inf, sums / counts).min(1)
    total += np.where(counts[own] > 1, (b - a) / np.maximum(np.maximum(a, b), 1e-12), 0.0).sum()
  return float(total / len(xy))


def accuracy_of_h(near, labels) -> float:
  """As `accuracy`, in h, given its neighbors `near` [n, k]."""
  return float((_majority(labels[near]) == labels).mean())


def baselines(pictures, labels) -> dict[str, float]:
  """The same vote without a network, {name: fraction}: by raw pixels, and by a histogram of colors in 4 x 4 x 4 bins.

  pictures: uint8 [n, s, s, 3]; labels: int [n], >= 0.
  """
  features = {"raw pixels": pictures.reshape(len(pictures), -1), "color histograms": color_histogram(pictures / 255)}
  return {name: accuracy_of_h(neighbors(x.astype(np.float32)), labels) for name, x in features.items()}


def color_histogram(x) -> np.ndarray:
  """float32 [n, 64]: fractions of the pixels of x [n, h, w, 3] in [0, 1] in four levels of each channel."""
  level = np.clip((4 * np.asarray(x)).astype(int), 0, 3) @ [16, 4, 1]
  counts = np.stack([np.bincount(one.ravel(), minlength=64) for one in level])
  return (counts / level[0].size).astype(np.float32)


def _majority(labels):
  """int [m]: the most frequent label in each row of labels [m, k], the lowest of several."""
  return np.stack([(labels == c).sum(1) for c in range(labels.max() + 1)], 1).argmax(1)


def trustworthiness(h, xy, *, k: int = NEIGHBORS, queries: int = 1000, seed: int = 0) -> float:
  """Whether neighbors on the map xy [n, 2] are neighbors in h [n, d], by cosine: 1 if all are, about 0.5 by chance.

  Averaged over at most `queries` points drawn by `seed`. Source: Venna and Kaski 2001, as scikit-learn defines it.

  scikit-learn computes it for all points only: at 10,000 points this is within 0.001 of it (0.984) in 1.4 s instead of
  16 s and 2 GB. On a sample of 1,000 points scikit-learn takes 0.1 s, but neighbors among a sample are not neighbors
  among all: its number is lower by 0.013 (0.971), which is more than the difference between two maps.
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


def _centered(h) -> np.ndarray:
  """h [n, d] less its mean, of unit length: outputs of a ReLU all point one way, and cosines would all be near 1."""
  x = np.asarray(h, np.float32) - np.mean(h, 0)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def near_duplicates(h, pictures) -> list[tuple[int, int, float, float]]:
  """[(i, j, cosine of h, correlation of the tiny pictures)], i < j, most alike first.

  h: [n, d]; pictures: uint8 [n, s, s, 3]. In a pair, one is among the 10 nearest of the other, by h or by pixels, and
  both measures find them similar: the network alone would match two photos of one scene, and pixels alone two flat
  images.
  """
  tiny = np.stack([np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX), np.float32) for p in pictures])
  tiny = tiny.reshape(len(tiny), -1)
  tiny = _centered(tiny - tiny.mean(1, keepdims=True))  # brighter or darker is the same picture
  deep, pairs = _centered(h), set()
  for x in (deep, tiny):
    pairs |= {(min(i, int(j)), max(i, int(j))) for i, row in enumerate(neighbors(x, k=10)) for j in row}
  found = [(i, j, float(deep[i] @ deep[j]), float(tiny[i] @ tiny[j])) for i, j in pairs]
  found = [row for row in found if row[2] >= ALIKE_H and row[3] >= ALIKE_PIXELS]
  return sorted(found, key=lambda row: (-round(row[3], 4), -row[2], row[:2]))


def outliers(h, *, k: int = 5) -> list[tuple[int, float]]:
  """[(i, mean distance of image i to its k nearest others, divided by that of the median image)], farthest first.

  Distances are between square roots of h [n, d], with its signs. Otherwise the few largest activations would decide, and an
  unusual value in a channel that others hardly use would go unnoticed. Source of the score: arXiv 2204.06507.
  """
  x = (np.sign(h) * np.sqrt(np.abs(h))).astype(np.float32)
  k, squared = min(k, len(x) - 1), (x * x).sum(1)
  mean = np.empty(len(x))
  for rows in np.array_split(np.arange(len(x)), -(-len(x) // 500)):
    distance = np.sqrt(np.maximum(squared[rows, None] + squared - 2 * x[rows] @ x.T, 0))
    distance[np.arange(len(rows)), rows] = np.inf
    mean[rows] = np.partition(distance, k - 1, 1)[:, :k].mean(1)
  mean /= max(float(np.median(mean)), 1e-12)
  return [(int(i), float(mean[i])) for i in np.argsort(-mean, kind="stable")]
