"""Scores of the encoder of a pretraining run: kNN, collapse diagnostics and linear evaluation, and a table of them."""

import functools
import json

import jax
import numpy as np

from simclr_jax import data, diagnostics, exporting
from simclr_jax import model as model_lib
from simclr_jax.evaluation import embed, knn, linear
from simclr_jax.programs import map as map_lib
from simclr_jax.programs import same as same_lib
from simclr_jax.runtime import files
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib

ON_THE_MAP = 2000  # images of the page's map, at most


@functools.lru_cache
def representations(model):
  """Jitted (variables, images [m, h, w, 3]) -> {"h", "z"}, BatchNorm in inference mode."""

  @jax.jit
  def apply(variables, images):
    outputs = model.apply(variables, images[:, None], train=False)
    return {"h": outputs.h[:, 0], "z": outputs.z[:, 0]}

  return apply


class PretrainEvaluation:
  """kNN, collapse diagnostics and linear evaluation of a state, on the labeled train and test images.

  If the test images are the training images, or have no labels, there are diagnostics and neighbors but no scores.
  """

  def __init__(self, config, train_source, test_source, mesh):
    model = model_lib.create(config, train_source.num_classes)
    self._apply, self._mesh, self._config = representations(model), mesh, config
    self.nothing_held_out = test_source is train_source  # then there is nothing to score
    self.num_classes = 0 if self.nothing_held_out else train_source.num_classes
    make = functools.partial(embed.eval_set, config=config, mesh=mesh, labeled=True)
    train = embed.train_examples(train_source, config)
    self.train, self.test = make(train), make(test_source)
    native = min(data.first_readable(test_source).shape[:2])  # raw pixels compete at their own size where that is small
    self.raw = [
      make(part, size=native, crop=1.0) if native <= 64 else made
      for part, made in ((train, self.train), (test_source, self.test))
    ]

  def embed(self, state):
    """({"h", "z"} of the training images, the same of the test images), numpy."""
    return tuple(embed.embed(self._apply, state.variables, part, self._mesh) for part in (self.train, self.test))

  def knn(self, train_x, test_x) -> float:
    c = self._config.evaluate
    return knn.accuracy(
      train_x,
      self.train.labels(),
      test_x,
      self.test.labels(),
      k=c.knn_k,
      temperature=c.knn_temperature,
      num_classes=self.num_classes,
    )

  def chance(self) -> float:
    """The accuracy of a guess among the classes that the test images have; others cannot be right."""
    return 1 / len(np.unique(self.test.labels()))

  def quick(self, state) -> dict:
    """What the loop shows now and then."""
    scores = {}
    if self.num_classes:
      train, test = self.embed(state)
      scores["knn"] = self.knn(train["h"], test["h"])
    else:
      test = embed.embed(self._apply, state.variables, self.test, self._mesh)
    numbers = diagnostics.summary(test["h"], test["z"])
    collapsed, verdict = diagnostics.verdict(numbers, scored=bool(self.num_classes))
    return {**scores, **numbers, "collapsed": float(collapsed), "verdict": verdict}

  def scores(self, name: str, train_x, test_x) -> dict:
    """One row of the table: kNN, linear evaluation with all labels, and with 10 labels per class."""
    y, test_y = self.train.labels(), self.test.labels()
    return {
      "representation": name,
      "knn": self.knn(train_x, test_x),
      "linear": linear.linear_evaluation(train_x, y, test_x, test_y, num_classes=self.num_classes, mesh=self._mesh),
      "linear_10": linear.few_label_evaluation(train_x, y, test_x, test_y, num_classes=self.num_classes),
    }


def conclude(config, workdir, task, evaluation, state, mesh) -> dict:
  """Scores, neighbors and confusion at the end of a run; the encoder is exported here."""
  train, test = evaluation.embed(state)
  numbers = diagnostics.summary(test["h"], test["z"])
  collapsed, verdict = diagnostics.verdict(numbers, scored=bool(evaluation.num_classes))
  out = {"verdict": verdict, "collapsed": collapsed, "scores": [], "confusion": None}
  labels = test_labels = None
  if evaluation.num_classes:
    labels, test_labels = evaluation.train.labels(), evaluation.test.labels()
    untrained = jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(config.seed))
    before = evaluation.embed(untrained)
    chance = evaluation.chance()
    out["scores"] = [
      evaluation.scores("raw pixels", *(part.pixels() for part in evaluation.raw)),
      evaluation.scores("untrained encoder", before[0]["h"], before[1]["h"]),
      evaluation.scores("z", train["z"], test["z"]),
      evaluation.scores("h", train["h"], test["h"]),
      {"representation": "chance", "knn": chance, "linear": chance, "linear_10": chance},
    ]
    predicted = knn.predict(
      train["h"],
      labels,
      test["h"],
      k=config.evaluate.knn_k,
      temperature=config.evaluate.knn_temperature,
      num_classes=evaluation.num_classes,
    )
    out["confusion"] = np.zeros((evaluation.num_classes,) * 2, int)
    np.add.at(out["confusion"], (test_labels, predicted), 1)
    out["class_names"] = list(evaluation.train.source.class_names)
  queries = np.random.default_rng(config.seed).permutation(len(test["h"]))[:8]
  _, nearest = knn.nearest(train["h"], test["h"][queries], k=8)
  if evaluation.nothing_held_out:
    nearest = _others(evaluation, queries, nearest)
  neighbors = np.stack([evaluation.train.images(row) for row in nearest])
  same = None
  if labels is not None:
    same = (labels[nearest] == test_labels[queries][:, None]) & (labels[nearest] >= 0)
  out["neighbors"] = (evaluation.test.images(queries), neighbors, same)
  scores = {row["representation"]: {k: v for k, v in row.items() if k != "representation"} for row in out["scores"]}
  step = out["step"] = int(state.step)
  if not jax.process_index():
    kept = model_lib.keep_encoder(state)
    numbers |= {"collapsed": collapsed, "verdict": verdict}
    files.write_sealed(workdir / "scores.json", json.dumps({"step": step, "scores": scores, **numbers}, indent=2))
    out["map"] = _map(evaluation.test, test["h"], config.seed)
    metrics_lib.projector(workdir, test["h"][:ON_THE_MAP], None if labels is None else test_labels[:ON_THE_MAP])
    held_out = same_lib.held_out_of_training(workdir, config)
    exporting.write(workdir / "encoder", kept, config, scores=scores, step=step, held_out=held_out, overwrite=True)
  return out


def _others(evaluation, queries, nearest):
  """[q, k - 1] of nearest [q, k] without the query itself, which may or may not be among the training images."""

  def name(part, row):
    return part.source.name(int(part.rows()[row]))

  rows = [[j for j in row if name(evaluation.train, j) != name(evaluation.test, i)] for i, row in zip(queries, nearest, strict=True)]  # fmt: skip
  return np.asarray([row[: nearest.shape[1] - 1] for row in rows])


def _map(images: embed.EvalSet, h, seed: int) -> dict | None:
  """What the page shows of h [n, d] in the plane."""
  if len(h) < 4:
    return None
  rows = np.sort(data.permutation(seed, 0, len(h))[:ON_THE_MAP])
  source, index = images.source, images.rows()[rows]
  names = [source.name(int(i)) for i in index]
  labels = images.labels()[rows] if source.num_classes else None
  return map_lib.chart(h[rows], map_lib.thumbnails(source, index), names, labels, source.class_names, seed=seed)
