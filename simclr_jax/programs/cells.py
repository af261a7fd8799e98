"""Cells: the small runs with which claims are measured; each is a setting, a seed and a data set, and runs once.

A cell trains a row of configs/ablations.py, measures what its claims need on the trained network, and keeps only
those numbers.  Cells that differ only in their seed share their compiled programs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence

import jax
import numpy as np

from simclr_jax import data, diagnostics, optimizer
from simclr_jax import model as model_lib
from simclr_jax.data.sources import spread
from simclr_jax.evaluation import embed, invariance, knn, linear
from simclr_jax.evaluation.maps import color_histogram
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain, scores, splits
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime.errors import UserError
from simclr_jax.views import Batch

VERSION = 2  # of what a cell does; a change of it makes every cell anew
GRAY = 2.0  # largest mean difference between the color channels of a gray image, of 255
LABELS = {"linear_10pct": 0.1, "linear_1pct": 0.01}
# Of the recipe that a set has, whose settings were compared on held-out images of it.
FOR_DATA = {"textures": {"augment.grayscale_prob": 0.5}}
UNTRAINED = "untrained"  # kinds of cells beside "train"
PIXELS = "pixels"
HISTOGRAM = "histogram"
RUN = "run"  # the folder of a cell's training, in the cell's own


@dataclasses.dataclass(frozen=True)
class Setting:
  """A cell without its seed and data.

  Attributes:
    row: a row of configs/ablations.py, without small-.
    changes: values of its config by dotted keys.
    kind: "train"; or, without training, "untrained", "pixels" or "histogram" (of 64 colors).
    epochs: training epochs, as a multiple of the budget's.
    labels: fraction of the labeled images that it trains on.
    measures: what to measure in addition to the accuracy of linear evaluation on h: keys of MEASURES.
  """

  row: str = "temperature-0.1"
  changes: tuple[tuple[str, object], ...] = ()
  kind: str = "train"
  epochs: float = 1.0
  labels: float = 1.0
  measures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Images:
  """A data set, ready for cells.

  Attributes:
    name: as --data names it.
    train, validation, test: labeled sources; validation images are held out of train, and settings are chosen on them.
    has_color: whether any of a sample of the training images is not gray.
    digest: of the fingerprints of the three.
  """

  name: str
  train: data.Source
  validation: data.Source
  test: data.Source
  has_color: bool
  digest: str


def open_images(name: str, *, most_train: int, most_test: int) -> Images:
  """The sets NAME:train and NAME:test, of folders and shards NAME/train and NAME/test, at most `most_train` and `most_test`
  images, a tenth of the former held out.

  Raises:
    UserError: there is no such set, or it has no labels, or too few classes or images.
  """
  section = config_lib.Data(train=_part(name, "train"), test=_part(name, "test"))
  train, test = splits.check_labeled(section, *splits.open_data(section))
  train, test = (data.Subset(part, most if most < len(part) else 0, splits.SEED) for part, most in ((train, most_train), (test, most_test)))  # fmt: skip
  held_out = splits.hold_out(train.labels, 0.1)
  if train.num_classes < 2 or not len(held_out):
    raise UserError(
      f"--data={name}: {len(train):,} training images of {train.num_classes} classes; claims need two classes, and a tenth of "
      "the images of a class held out"
    )
  parts = {
    "train": data.Selection(train, np.setdiff1d(np.arange(len(train)), held_out)),
    "validation": data.Selection(train, held_out),
    "test": test,
  }
  prints = json.dumps({key: part.fingerprint() for key, part in parts.items()}, sort_keys=True)
  return Images(name, **parts, has_color=_has_color(train), digest=hashlib.sha256(prints.encode()).hexdigest()[:12])


def _part(name: str, part: str) -> str:
  """The spec of "train" or "test" of a data set."""
  kind, _, rest = name.partition(":")
  if not rest and kind not in data.EMBEDDED:
    data.open_source(name)  # raises an error that says what may be meant
  if rest.endswith((":train", ":test")) or rest and kind in data.EMBEDDED:
    whole = name.rpartition(":")[0]
    raise UserError(f"--data={name}: name the set without a split, {whole}; {whole}:train and {whole}:test are used")
  is_folder = kind in data.KINDS and data.KINDS[kind].is_path and kind != "npz"
  return f"{name.rstrip('/')}/{part}" if is_folder else f"{name}:{part}"


def _has_color(source) -> bool:
  """Whether some of 64 images of a source have color: more than the noise that JPEG adds to gray ones."""
  for i in spread(len(source), 64):
    with contextlib.suppress(data.BadImage):
      if np.ptp(source.read(int(i)).astype(int), axis=-1).mean() > GRAY:
        return True
  return False


def config_of(setting: Setting, seed: int, epochs: float, changes: dict, data_name: str = ""):
  """The config of a cell; `epochs` and `changes` are the budget's."""
  recipe = config_lib.load(f"configs/ablations.py:small-{setting.row}")
  warmup = min(1.0, epochs * setting.epochs / 10)
  own = {"seed": seed, "train_epochs": epochs * setting.epochs, "optimizer.warmup_epochs": warmup}
  of_data = FOR_DATA.get(data_name.partition(":")[0], {})
  return config_lib.replace(recipe, own | of_data | changes | dict(setting.changes))


def config_of_few_labels(config, count: int, few: int):
  """The config for `few` of `count` images: as many steps, and of them as many for the warm-up."""
  batch = min(config.batch_size, few)
  epochs = config.optimizer.warmup_epochs * (count / config.batch_size) / (few / batch)
  steps = optimizer.train_steps(config, count)
  return config_lib.replace(
    config, {"train_epochs": 0.0, "train_steps": steps, "batch_size": batch, "optimizer.warmup_epochs": epochs}
  )


def key(setting: Setting, config, images: Images) -> str:
  """The key under which a cell is saved: everything that its numbers depend on."""
  what = dataclasses.asdict(setting) | {"changes": [], "row": "", "measures": sorted(setting.measures)}
  text = json.dumps([VERSION, what, config_lib.to_dict(config), images.digest], sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Runner:
  """Runs cells in one process.

  Args:
    folder: where a running cell keeps its checkpoint, under its key.
  """

  def __init__(self, folder):
    self._folder, self._mesh = folder, mesh_lib.make_mesh()
    self._shared = ("", None)  # what cells of other seeds have in common, and their task
    self._sets = {}

  def run(self, setting: Setting, config, images: Images) -> dict:
    """The numbers of one cell: "linear", the accuracy of linear evaluation on test images; "validation", on held-out
    training images; "own", of supervised training, that of the classifier it trained; those that `setting.measures` names; and
    the "seconds" that it took.  A cell that diverged has "diverged" alone.

    Raises:
      Interrupted: the state is saved, and `run` resumes from it.
    """
    began = time.monotonic()
    if setting.kind in (PIXELS, HISTOGRAM):
      numbers = self._of_pixels(setting, config, images)
    else:
      numbers = self._of_network(setting, config, images)
    return {name: float(value) for name, value in numbers.items()} | {"seconds": time.monotonic() - began}

  def _of_network(self, setting, config, images):
    train, workdir = images.train, self._folder / key(setting, config, images) / RUN  # whose lock is the run's own
    if setting.labels < 1:
      train = data.Selection(train, _labeled_part(train.labels, setting.labels, config.seed))
      config = config_of_few_labels(config, len(images.train), len(train))
    task = self._task(setting, config, train, images)
    model = scores.representations(model_lib.create(config, images.train.num_classes))
    if "course" in setting.measures:
      course = loop.Evaluator(Course(config, images, model), every=-(-task.total_steps // 16))
      task = dataclasses.replace(task, evaluators={"course": course})
    if setting.kind == UNTRAINED:
      state, rows = jax.jit(task.init)(jax.random.key(config.seed)), []
    else:
      try:
        state, _ = loop.run(
          task, loop.LoopConfig(log_every=_quarter(task.total_steps)), mesh=self._mesh, workdir=workdir,
          config_json=config_lib.to_json(config), seed=config.seed,
        )  # fmt: skip
      except loop.Diverged as error:
        print(f"diverged: {error}")
        return {"diverged": 1.0}
      rows = metrics_lib.read(workdir)
    parts = [embed.embed(model, state.variables, part, self._mesh) for part in self._eval_sets(config, images)]
    if not all(np.isfinite(part[name]).all() for part in parts for name in "hz"):  # the last update
      print("diverged: the features are not finite")
      return {"diverged": 1.0}
    labels = [part.labels() for part in self._eval_sets(config, images)]
    numbers = dict(zip(("linear", "validation"), _linear([part["h"] for part in parts], labels, images), strict=True))
    found = Found(config, images, parts, labels, state.variables, model, rows)
    for name in setting.measures:
      numbers |= MEASURES[name](found)
    if config.method == "supervised":
      numbers |= _classifier(state.variables, parts, labels)
    return numbers

  def _task(self, setting, config, train, images):
    """The task of a cell; of one that differs from the last in its seed alone, with the functions that are compiled."""
    task = pretrain.make_task(config, train, mesh=self._mesh)
    digest = key(setting, config_lib.replace(config, {"seed": 0}), images)
    if digest == self._shared[0]:
      shared = self._shared[1]
      return dataclasses.replace(task, init=shared.init, step=shared.step)
    self._shared = (digest, task)
    return task

  def _eval_sets(self, config, images):
    """Train, test and validation images as the config evaluates them, kept."""
    how = (images.digest, config.augment.size, config.evaluate.crop)
    if how not in self._sets:
      self._sets[how] = [
        embed.eval_set(part, config, self._mesh, labeled=True)
        for part in (images.train, images.test, images.validation)
      ]
    return self._sets[how]

  def _of_pixels(self, setting, config, images):
    native = [
      embed.eval_set(part, config, self._mesh, size=32, crop=1.0, labeled=True)
      for part in (images.train, images.test, images.validation)
    ]
    labels = [part.labels() for part in native]
    if setting.kind == PIXELS:
      parts = [part.pixels() for part in native]
    else:
      parts = [np.concatenate([color_histogram(b["image"][b["mask"]]) for b in part.batches()]) for part in native]
    numbers = dict(zip(("linear", "validation"), _linear(parts, labels, images), strict=True))
    found = Found(config, images, [{"h": x} for x in parts], labels, None, None, [])
    for name in setting.measures:
      numbers |= MEASURES[name](found)
    return numbers


@dataclasses.dataclass(frozen=True)
class Found:
  """What a measure may look at: features {"h", "z"} and labels of the train, test and validation images, the network, and the
  rows of metrics.jsonl."""

  config: config_lib.Section
  images: Images
  parts: Sequence[dict]
  labels: Sequence[np.ndarray]
  variables: dict | None
  model: object
  rows: Sequence[dict]


def _linear(parts, labels, images) -> tuple[float, float]:
  """Accuracy of one linear classifier on the test and on the validation images."""
  classifier = linear.logistic_regression(parts[0], labels[0], num_classes=images.train.num_classes)
  return tuple(linear.accuracy(classifier, x, y) for x, y in zip(parts[1:], labels[1:], strict=True))


def _classifier(variables, parts, labels):
  """Test accuracy of the classifier that a supervised network was trained with."""
  head = variables["params"]["predictor"]["Dense_0"]
  return {"own": linear.top_1(parts[1]["z"] @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), labels[1])}


def _of_z(found: Found):
  return {"linear_z": _linear([part["z"] for part in found.parts], found.labels, found.images)[0]}


def _few_labels(found: Found, name: str = "h", suffix: str = ""):
  (x, y), (test_x, test_y) = ((part[name], y) for part, y in zip(found.parts[:2], found.labels[:2], strict=True))
  numbers = of_few_labels(x, y, test_x, test_y, num_classes=found.images.train.num_classes, seed=found.config.seed)
  return {key + suffix: value for key, value in numbers.items()}


def of_few_labels(x, y, test_x, test_y, *, num_classes: int, seed: int) -> dict:
  """Test accuracies of x [n, d] with labels y [n]: of linear evaluation with a tenth and a hundredth of the labels, drawn by the
  seed, and of kNN with k = 20 and 200."""
  numbers = {}
  for name, fraction in LABELS.items():
    chosen = _labeled_part(y, fraction, seed)
    folds = min(linear.FOLDS, int(np.unique(y[chosen], return_counts=True)[1].min()))
    few = linear.logistic_regression(x[chosen], y[chosen], num_classes=num_classes, folds=folds)
    numbers[name] = linear.accuracy(few, test_x, test_y)
  for k in (20, 200):
    numbers[f"knn_{k}"] = knn.accuracy(x, y, test_x, test_y, k=k, num_classes=num_classes)
  return numbers


def _labeled_part(labels, fraction: float, seed: int):
  """Indices of a fraction of every class, and of two images of each at least, where it has them: one to choose L2 on."""
  return data.class_balanced(labels, fraction, seed, at_least=2)


def _contrastive(found: Found):
  """Mean contrastive accuracy of the last quarter of training; a row has the mean of the steps since the row before it."""
  rows = [row for row in found.rows if "contrastive_accuracy" in row]
  steps = np.array([0, *(row["step"] for row in rows)])
  count = np.diff(steps) * (steps[1:] > min(3 * _quarter(steps[-1]), steps[-1] - 1))
  return {"contrastive": np.average([row["contrastive_accuracy"] for row in rows], weights=count)}


def _quarter(steps: int) -> int:
  """A quarter of the steps, after each of which a row is logged."""
  return -(-steps // 4)


def _geometry(found: Found):
  """Spread of z, and effective ranks of centered h and z as fractions of what there could be (diagnostics.py).

  The head's hidden layer is as wide as h, so z cannot have a higher rank than that.
  """
  h, z = (found.parts[1][name] for name in ("h", "z"))
  return {
    "spread_z": diagnostics.embedding_std(z) * z.shape[1] ** 0.5,
    "rank_h": diagnostics.rank(h - h.mean(0)) / h.shape[1],
    "rank_z": diagnostics.rank(z - z.mean(0)) / min(z.shape[1], h.shape[1]),
  }


class Course:
  """Alignment, uniformity and effective rank of h and z of a state, for two views each of at most 512 test images."""

  KEYS = tuple(f"{what}_{name}" for name in ("h", "z") for what in ("alignment", "uniformity", "rank"))

  def __init__(self, config, images, model):
    self._views, self._model = _views(config, images.test, 512, config.seed), model

  def __call__(self, state):
    row = {}
    both = [self._model(state.variables, self._views[:, k]) for k in (0, 1)]
    for name in ("h", "z"):
      pairs = np.stack([np.asarray(outputs[name]) for outputs in both], axis=1)
      first = pairs[:, 0]
      values = diagnostics.alignment(pairs), diagnostics.uniformity(first), diagnostics.rank(first - first.mean(0))
      row |= dict(zip((key for key in self.KEYS if key.endswith(name)), values, strict=True))
    return row


def _course(found: Found):
  """What Course found, as "rank_z/STEP", and the spectra of the covariances of h and z in the end, as "spectrum_z/1" and so
  on."""
  numbers = {f"{key}/{row['step']}": row[key] for row in found.rows for key in Course.KEYS if row.get(key) is not None}
  for name in ("h", "z"):
    for i, fraction in enumerate(diagnostics.spectrum(found.parts[1][name]), 1):
      numbers[f"spectrum_{name}/{i}"] = fraction
  return numbers


def _transforms(found: Found):
  """What can be read from h and z (invariance.py), as "color_h", "color_z" and so on."""

  def encode(images):
    return found.model(found.variables, images)

  few = [np.concatenate([b["image"][b["mask"]] for b in part.batches()]) for part in _some(found, (1000, 500))]
  read = invariance.predictions(encode, *few, seed=found.config.seed)
  return {f"{what}_{name}": value for what, of in read.items() for name, value in of.items() if value is not None}


def _some(found: Found, counts):
  sources = (found.images.train, found.images.test)
  return [
    embed.eval_set(data.Subset(source, min(count, len(source)), 0), found.config, mesh_lib.make_mesh())
    for source, count in zip(sources, counts, strict=True)
  ]


def _histogram_matching(found: Found):
  """How often the color histogram of one view of an image is nearer to that of its other view than to those of 255 other
  images, without any network."""
  views = _views(found.config, found.images.train, 256, found.config.seed)
  first, second = (np.sqrt(color_histogram(views[:, k])) for k in (0, 1))
  likeness = first @ second.T
  return {"matched": float(np.mean(likeness.argmax(1) == np.arange(len(likeness))))}


def _views(config, source, most: int, seed: int):
  """Two views of at most `most` images of a source, float32 [n, 2, s, s, 3]."""
  view_pipeline = pretrain.view_pipeline(config)
  count = min(most, len(source))
  images, extent, _ = data.in_memory(data.Subset(source, count, seed), canvas=view_pipeline.canvas)
  seeds = np.random.default_rng(seed).integers(0, 2**31, (count, 2)).astype(np.int32)
  number = np.zeros(count, np.int32)
  batch = Batch(pixels={"image": images, "extent": extent}, label=number, index=number, seed=seeds)
  return np.asarray(jax.jit(view_pipeline.device)(batch))


MEASURES = {
  "z": _of_z,
  "few": _few_labels,
  "few_z": functools.partial(_few_labels, name="z", suffix="_z"),
  "contrastive": _contrastive,
  "geometry": _geometry,
  "course": _course,
  "transforms": _transforms,
  "matching": _histogram_matching,
}
