"""Transfer to other data sets (arXiv 2002.05709, App. B.8): a linear classifier on h, or fine-tuning, on each of a list.

For the linear score L2 is one of 45 values, for fine-tuning learning rate and weight decay are of a grid; either is chosen
on a validation split, then training and validation images train together, and the test split is scored once.  Baselines
are the same encoder untrained, and one trained with labels; a permutation test says which differences mean something.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import data, exporting, report
from simclr_jax.evaluation import embed, linear
from simclr_jax.model import make_encoder
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, same, trained
from simclr_jax.programs import splits as splits_lib
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, errors, files, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

ROWS = "food101 cifar10 cifar100 birdsnap sun397 cars aircraft voc2007 dtd pets caltech101 flowers".split()
# arXiv 2002.05709, Table 8 (ResNet-50 4x) and App. B.8 (1x), in percent, in the order of ROWS.
PAPER = {
  name: dict(zip(ROWS, map(float, scores.split()), strict=True))
  for name, scores in {
    "4x linear SimCLR": "76.9 95.3 80.2 48.4 65.9 60.0 61.2 84.2 78.9 89.2 93.9 95.0",
    "4x linear supervised": "75.2 95.7 81.2 56.4 64.9 68.8 63.8 83.8 78.7 92.3 94.1 94.2",
    "4x fine-tuned SimCLR": "89.4 98.6 89.0 78.2 68.1 92.1 87.0 86.6 77.8 92.1 94.1 97.6",
    "4x fine-tuned supervised": "88.7 98.3 88.7 77.8 67.0 91.4 88.0 86.5 78.8 93.2 94.2 98.0",
    "4x fine-tuned random": "88.3 96.0 81.9 77.0 53.7 91.3 84.8 69.4 64.1 82.7 72.5 92.5",
    "1x linear SimCLR": "68.4 90.6 71.6 37.4 58.8 50.3 50.3 80.5 74.5 83.6 90.3 91.2",
    "1x linear supervised": "72.3 93.6 78.3 53.7 61.9 66.7 61.0 82.8 74.9 91.5 94.5 94.7",
    "1x fine-tuned SimCLR": "88.2 97.7 85.9 75.9 63.5 91.3 88.1 84.1 73.2 89.2 92.1 97.0",
    "1x fine-tuned supervised": "88.3 97.5 86.4 75.8 64.3 92.1 86.0 85.0 74.6 92.1 93.3 97.6",
    "1x fine-tuned random": "86.9 95.9 80.2 76.1 53.6 91.4 85.9 67.3 64.8 81.5 72.6 92.0",
  }.items()
}
HELD_OUT_SEED = 0
# Steps between two checkpoints of fine-tuning: an interval in epochs, as in its recipe, may be a few steps of a small set.
SAVE_EVERY = 1000


@dataclasses.dataclass(frozen=True)
class Split:
  """Labeled images: a source, which `spec` names; `targets` are its labels [n], or [n, classes] of 1, 0 and -1 where images
  have several.  `validation` names the set of the images at its end that choose settings; empty: they are of `spec` too."""

  source: data.Source
  targets: np.ndarray
  num_classes: int
  spec: str
  validation: str = ""


def open_split(spec: str, data_dir=None) -> Split:
  """Raises ValueError if the set has no labels."""
  source = data.open_source(spec, data_dir=data_dir)
  several = source.several_labels()
  if several is not None:
    return Split(source, several, several.shape[1], spec)
  if source.labels is None:
    raise UserError(f"{spec}: has no labels, so nothing can be scored on it: leave it out of config.rows")
  source = data.labeled(source)
  return Split(source, source.labels, source.num_classes, spec)


def align(train: Split, other: Split, spec: str) -> Split:
  """The other split with its classes numbered as in the training split."""
  if train.targets.ndim == 1 == other.targets.ndim:
    source = data.align(train.source, other.source, what=spec)
    return Split(source, source.labels, source.num_classes, spec)
  if train.targets.shape[1:] != other.targets.shape[1:]:
    raise UserError(
      f"{spec} has {other.num_classes} classes, the training images {train.num_classes}: name two splits of a set"
    )
  return other


def permutation_test(a, b, *, weight=None, samples: int = 100_000, seed: int = 0) -> float:
  """Two-sided p of the null hypothesis that two models are exchangeable, image by image.

  Args:
    a, b: [n], whether each test image was classified correctly by either.
    weight: [n], the weight of each image; for the mean per class, 1 / the size of its class.  By default all are equal.
    samples: number of random exchanges.

  Source: arXiv 2002.05709, App. B.8.3 (Kornblith et al., arXiv 1805.08974, App. A.3), with 100,000 samples.
  """
  difference = (np.asarray(a, float) - np.asarray(b, float)) * (1.0 if weight is None else np.asarray(weight))
  difference = difference[difference != 0]  # exchanging equal answers changes nothing
  rng, extreme, observed = np.random.default_rng(seed), 0, abs(difference.sum())
  for first in range(0, samples, 1000):
    signs = rng.integers(0, 2, (min(1000, samples - first), len(difference)), np.int8) * 2 - 1
    extreme += int(np.sum(np.abs(signs @ difference) >= observed - 1e-9))
  return (1 + extreme) / (1 + samples)


class FrozenEncoder:
  """An encoder to transfer: `features(split)` -> h float32 [n, d], center-cropped as the row's config says."""

  @errors.of_the_user()
  def __init__(self, start: trained.Start, config, mesh, *, untrained: bool = False):
    self.start, self._config, self._mesh = start, config, mesh
    self.resize = config.augment.resize or start.resize
    net = make_encoder(start.encoder.name, **start.encoder)
    image = jnp.zeros((1, config.augment.size, config.augment.size, 3))
    if not untrained:
      self._variables = start.variables["encoder"]
      jax.eval_shape(functools.partial(net.apply, train=False), self._variables, image)
    else:
      self._variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(config.seed), image)
    self._apply = jax.jit(functools.partial(net.apply, train=False))

  def features(self, source):
    """Raises ValueError if an image cannot be read: labels and features would not match."""
    # 1.0: all of them are met and named, not only those up to the first that is one too many.
    images = embed.eval_set(source, self._config, self._mesh, resize=self.resize, max_bad_fraction=1.0)
    h = embed.embed(self._apply, self._variables, images, self._mesh)
    if len(h) != len(source):
      raise UserError(f"{len(source) - len(h)} of {len(source)} images are unreadable: remove or repair them")
    return h


def splits(row, data_dir):
  """(training images with the validation ones at the end, bool [n] of the latter, test images) of a row's config."""
  if splits_lib.are_one(row.train, row.test):
    raise UserError(f"{row.test} is the training set too: a set that is scored against itself looks better than it is")
  for other, what in ((row.train, "training"), (row.test, "test")):
    if row.validation and splits_lib.are_one(row.validation, other):
      raise UserError(
        f"validation={row.validation} is the {what} set too: name other images, or none to hold out a tenth"
      )
  train = open_split(row.train, data_dir)
  if (train.targets.ndim > 1) != (row.metric == "mean_average_precision"):
    several = "several labels" if train.targets.ndim > 1 else "one label"
    right = "mean_average_precision" if train.targets.ndim > 1 else "top_1 or mean_per_class"
    raise UserError(f"metric={row.metric}: images of {row.train} have {several} each; expected {right}")
  test = align(train, open_split(row.test, data_dir), row.test)
  splits_lib.check_apart(train.source, row.train, test.source, row.test)
  if not row.validation:
    held_out = linear.held_out_parts(train.targets, 1, np.random.default_rng(HELD_OUT_SEED))[0]
    return train, held_out, test
  more = align(train, open_split(row.validation, data_dir), row.validation)
  for other, spec in ((train, row.train), (test, row.test)):
    splits_lib.check_apart(other.source, spec, more.source, f"validation={row.validation}")
  both = data.Joined([train.source, more.source])
  joined = Split(both, np.concatenate([train.targets, more.targets]), train.num_classes, row.train, row.validation)
  return joined, np.arange(len(joined.source)) >= len(train.source), test


def open_rows(config, mesh) -> dict:
  """{name: `splits` of the row}; raises UserError for what would end one of them after others have taken their hours."""
  g, parts = config.finetune, {}
  if "finetune" in config.methods:
    mesh_lib.check_divisible(g.batch_size, mesh, "finetune.batch_size")
    config_lib.load_part("finetune.recipe", g.recipe, "finetune")
  for name, row in config.rows.items():
    train, held_out, _ = parts[name] = splits(row, config.data_dir or None)
    most = np.count_nonzero(~held_out)
    if "finetune" in config.methods and train.targets.ndim == 1 and g.batch_size > most:
      raise UserError(
        f"finetune.batch_size={g.batch_size} exceeds the {most} training images of {train.spec}: lower it with "
        "--config.finetune.batch_size=..."
      )
  return parts


def specs(config) -> list[str]:
  """The data sets of all rows."""
  return [spec for row in config.rows.values() for spec in (row.train, row.validation, row.test) if spec]


def linear_evaluation(
  encoder: FrozenEncoder, train: Split, held_out, test: Split, metric: str, *, l2s=linear.L2_GRID_45, mesh=None
):
  """(score, logits [n, classes] of the test images, l2)."""
  classifier = linear.logistic_regression(
    encoder.features(train.source),
    train.targets,
    num_classes=train.num_classes,
    l2s=l2s,
    held_out=held_out,
    score=linear.METRICS[metric],
    mesh=mesh,
  )
  logits = linear.logits(classifier, encoder.features(test.source))
  return linear.METRICS[metric](logits, test.targets), logits, classifier["l2"]


def fine_tune(
  config, encoder: FrozenEncoder, start, train: Split, held_out, test: Split, metric: str, workdir, *, mesh
):
  """(score, logits, {base_lr, weight_decay}): every point of the grid on the training part, the best on all of it.

  Weight decay is divided by the learning rate, as the paper divides it.  `encoder` says which network it is and
  how its images are resized; `start=None` trains new weights, for as long and with the grid of `config.from_scratch`.
  Of a point of the grid only gridN.json is kept in `workdir`, its score and config; checkpoints would fill the disk.

  Raises:
    loop.Diverged: training on all images with the best point, or with the only one.  A point of the grid that diverges is
      the worst.
    UserError: a point that is kept was trained with another recipe.
  """
  g, score = config.finetune, linear.METRICS[metric]
  augment = dataclasses.replace(config.augment, resize=encoder.resize)
  tuned = g if start else config.from_scratch
  recipe = trained.with_networks(config_lib.load(g.recipe), encoder.start.encoder)

  def settings(lr, decay, test: str):
    optimizer = dict(name="sgd", base_lr=lr, lr_scaling="none", weight_decay=decay / lr)
    changes = {
      **{
        "projector": {"kind": "none"},
        "tap": 0,
        "start": start.path if start else "",
      },
      **{"data.train": train.spec, "data.test": test, "data.data_dir": config.data_dir},
      **{"labels.fraction": 1.0, "labels.list": ""},
      **{"batch_size": g.batch_size, "train_steps": tuned.train_steps, "train_epochs": 0.0, "seed": config.seed},
      **{
        "optimizer": optimizer,
        "augment": augment,
        "evaluate.batch_size": config.evaluate.batch_size,  # its crop is that of the linear score
      },
      **{"checkpoint": {"keep": 1, "every_steps": SAVE_EVERY}, "rollback.times": 0},
      **{"log": {"every_steps": min(100, tuned.train_steps)}},  # where a loss that is not finite is found
    }
    return config_lib.replace(recipe, changes)

  def fit(c, source, tested, name):
    begun = files.absolute(workdir / name)
    if (begun / "config.json").exists():
      kept = config_lib.from_json(checkpoint.read_config(begun))
      if name == "final" and kept.optimizer != c.optimizer:  # the best point is another one since
        begun.rmtree()
      else:  # how it is scored does not matter to what was trained
        same.same_as(config_lib.replace(kept, {"data.test": c.data.test, "evaluate": c.evaluate}), c)
    folder = checkpoint.claim_workdir(str(begun), resume=True, overwrite=False)

    def make(*args, **options):
      task, section = finetune.make_task(*args, **options), "finetune" if start else "from_scratch"
      advice = f"begin again with lower config.{section}.base_lrs" if name == "final" else ""  # others may diverge
      return dataclasses.replace(task, advice=advice)

    result = finetune.train(c, start, source, tested, folder, mesh=mesh, make=make)
    logits, labels = result["logits"], result["labels"]
    if len(logits) != len(tested):
      raise UserError(f"{len(tested) - len(logits)} of {len(tested)} images are unreadable: remove or repair them")
    return logits, labels

  def point(c, name):
    """The score of a point of the grid, None if it diverged; one that is kept is not trained again."""
    file, folder = files.absolute(workdir / f"{name}.json"), files.absolute(workdir / name)
    if file.exists():
      kept = json.loads(files.read_sealed(file))
      same.same_as(config_lib.from_saved(kept["config"]), c)
      value = kept["score"]
    else:
      try:
        value = float(score(*fit(c, part, held, name)))
      except loop.Diverged as error:
        value = None
        lr, decay = c.optimizer.base_lr, c.optimizer.weight_decay
        print(f"base_lr={lr:g}, weight_decay={lr * decay:g}: {error}", flush=True)
      files.write_sealed(file, json.dumps({"score": value, "config": config_lib.to_dict(c)}, indent=2))
    folder.rmtree(missing_ok=True)
    return value

  part, held = (data.Selection(train.source, np.flatnonzero(rows)) for rows in (~held_out, held_out))
  grid = list(itertools.product(tuned.base_lrs, tuned.weight_decays))
  best, kept = grid[0], -1.0
  for i, (lr, decay) in enumerate(grid) if len(grid) > 1 else ():
    value = point(settings(lr, decay, train.validation), f"grid{i}")
    best, kept = ((lr, decay), value) if value is not None and value > kept else (best, kept)
  logits, _ = fit(settings(*best, test.spec), train.source, test.source, "final")
  return score(logits, test.targets), logits, dict(base_lr=best[0], weight_decay=best[1])


def significance(logits, other, targets, metric: str, samples: int):
  """p of `permutation_test` for two models' test logits; None for mean average precision, no sum over images."""
  if metric == "mean_average_precision":
    return None
  weight = None if metric == "top_1" else 1 / np.bincount(targets)[targets]
  right = [(x.argmax(1) == targets) for x in (logits, other)]
  return permutation_test(*right, weight=weight, samples=samples)


def table(rows: list[dict]) -> str:
  """The scores as text: one row per data set, ours next to the paper's, in percent; a p in brackets is against the first."""
  columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
  papers = [name for name in PAPER if any(row["name"] in PAPER[name] for row in rows)]
  lines = [["", "metric", *columns, *(f"paper {name}" for name in papers)]]
  for row in rows:
    cells = []
    for name in columns:
      s = row["scores"].get(name)
      p = row["p"].get(name)
      cells.append("" if s is None else f"{100 * s:.1f}" + (f" (p {p:.2g})" if p is not None else ""))
    lines.append([row["name"], row["metric"], *cells, *(str(PAPER[name].get(row["name"], "")) for name in papers)])
  return report.aligned(lines)


def run(config, workdir, *, resume: bool = False, overwrite: bool = False) -> dict:
  """The program `simclr transfer`: scores an encoder on every set of `config.rows`; prints and saves the table.

  Finished rows of an interrupted run are kept under --resume.  A set whose images have several labels gets no fine-tuned
  score.

  Returns:
    dict(rows, workdir): rows are dicts of name, metric, scores {method and encoder: share}, p, chosen.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  mesh = mesh_lib.make_mesh()
  start = trained.open_start(config.start)
  parts = open_rows(config, mesh)
  starts = {"pretrained": start} | ({"supervised": trained.open_start(config.supervised)} if config.supervised else {})
  for (name, (_, _, test)), one in itertools.product(parts.items(), starts.values()):
    what, key = f"rows.{name}.test={test.spec}", f"--config.rows.{name}.test=..."
    trained.check_apart(test.source, what, key, config.data_dir, one.path, one.config)
  encoders = {label: FrozenEncoder(one, config, mesh) for label, one in starts.items()}
  encoders["random"] = FrozenEncoder(start, config, mesh, untrained=True)
  weights = {
    f"{label} encoder": exporting.checksum(encoder.start.variables["encoder"])
    for label, encoder in encoders.items()
    if label != "random"
  }
  made_by = {
    name: {**weights, "training set": train.source.fingerprint(), "test set": test.source.fingerprint()}
    for name, (train, _, test) in parts.items()
  }
  folder = files.absolute(workdir)
  done = folder / "transfer.json"
  rows = json.loads(files.read_sealed(done)) if resume and done.exists() else []
  finished = [row["name"] for row in rows]
  if resume and (folder / "config.json").exists():  # before the folder is touched
    same.same_config(config, folder)
    for name in config.rows:
      if name in finished or (folder / name).exists():  # there is something of this row to keep
        same.check_result(folder / f"transfer.{name}.json", made_by[name], f"row {name} of {workdir}")
  again = {"resume": resume, "overwrite": overwrite}
  folders = (config.start, config.supervised)
  workdir = workdir_lib.claim(workdir, **again, specs=specs(config), starts=folders, writes=tuple(config.rows))
  checkpoint.write_config(workdir, config_lib.to_json(config))
  for name in sorted(config.rows, key=lambda name: (*ROWS, name).index(name)):  # the paper's in its order, then others
    row = config.rows[name]
    train, held_out, test = parts[name]
    if name in finished:
      continue
    files.write_sealed(workdir / f"transfer.{name}.json", json.dumps(made_by[name], indent=2))
    logits, out = {}, {"name": name, "metric": row.metric, "scores": {}, "p": {}, "chosen": {}}
    methods = config.methods
    if train.targets.ndim > 1 and "finetune" in methods:  # whose loss has one label per image
      print(f"{name}: images have several labels, so fine-tuning is left out", flush=True)
      methods = [method for method in methods if method != "finetune"]
    for method, (label, encoder) in itertools.product(methods, encoders.items()):
      key = f"{method} {label}"
      if method == "linear":
        result = linear_evaluation(encoder, train, held_out, test, row.metric, mesh=mesh)
      else:
        begin = encoder.start if label != "random" else None
        folder = workdir / name / label
        result = fine_tune(config, encoder, begin, train, held_out, test, row.metric, folder, mesh=mesh)
      out["scores"][key], logits[key], out["chosen"][key] = result
      if label != "pretrained":
        first = logits[f"{method} pretrained"]
        out["p"][key] = significance(first, logits[key], test.targets, row.metric, config.samples)
    rows.append(out)
    files.write_sealed(done, json.dumps(rows, indent=2))
    print(f"{name}: " + ", ".join(f"{key} {100 * value:.2f} %" for key, value in out["scores"].items()), flush=True)
  text = table(rows)
  files.write_text(workdir / "transfer.txt", text + "\n")
  _page(workdir, config, rows)
  checkpoint.mark_complete(workdir)
  print(f"\n{text}\n\n{workdir / 'transfer.txt'}\n{workdir / 'report.html'}  the page to look at", flush=True)
  return {"rows": rows, "workdir": workdir}


def _page(workdir, config, rows):
  """report.html: a row a method and encoder, a column a data set; what was chosen, and p against the first encoder."""
  scores, choices = {}, []
  for row in rows:
    for key, value in row["scores"].items():
      scores.setdefault(key, {"representation": key})[f"{row['name']}, {row['metric'].replace('_', ' ')}"] = value
      p, chosen = row["p"].get(key), row["chosen"][key]
      chosen = chosen if isinstance(chosen, dict) else {"l2": chosen}
      why = () if p is None else (f"differs from the pretrained encoder with p = {p:.2g} in a permutation test",)
      choices.append((f"{row['name']}, {key}", ", ".join(f"{name} {x:.3g}" for name, x in chosen.items()), *why))
  report.write_report(
    workdir / "report.html",
    title="Transfer",
    summary=f"{config.start} on {', '.join(row['name'] for row in rows)}.",
    scores=list(scores.values()),
    choices=choices,
    config=config_lib.to_dict(config),
    files={
      workdir / "transfer.txt": "the table, beside the paper's",
      workdir / "transfer.json": "the same for programs",
    },
  )


def main(flags, overrides) -> int:
  run(flags.config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite)
  return 0
