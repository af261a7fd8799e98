"""Fine-tuning with some or all labels, and supervised training from scratch: the same encoder, the same loop.

SimCLR fine-tunes from h, SimCLRv2 from the first layer of the projection head, which is trained with the rest
(arXiv 2002.05709, section 6 and App. B.5; arXiv 2006.10029, section 2.2).  Without a start it is the supervised
baseline.  Training sees crops and flips; BatchNorm spans the global batch.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import data, exporting, optimizer, report, views
from simclr_jax import model as model_lib
from simclr_jax.evaluation import embed
from simclr_jax.evaluation.rows import check_finite
from simclr_jax.model import TrainState
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import same, splits, trained
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.projector import Projector
from simclr_jax.runtime import checkpoint, errors, files, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime.errors import UserError


def resolve(config, begun=None):
  """(config, Start or None): where `start` names networks, `encoder` and `projector` become theirs.

  Args:
    begun: the workdir of the run if it is resumed, which then names the networks; the start is not opened.

  Raises:
    ValueError: no such start, or no projection head for the tap.
  """
  start = trained.open_start(config.start) if config.start and not begun else None
  if begun:
    keys = ("encoder", "projector", *(() if config.augment.resize else ("augment.resize",)))
    config = trained.as_begun(config, begun, keys)
  if start:
    resize = config.augment.resize or start.resize  # pixels as the weights know them
    networks = {"projector": start.projector, "augment.resize": resize}
    config = trained.with_networks(config, start.encoder, **networks)
  check_network(config, f"start={config.start or 'nothing'}")
  if start and config.tap and "projector" not in start.variables:
    raise UserError(f"config.tap={config.tap}: {config.start} holds no projection head; use tap 0")
  return config, start


def check_network(config, what: str):
  """Raises UserError if the encoder or the projection head of `config`, which `what` names, lacks a part that training uses."""
  layers = {"nonlinear": config.projector.layers, "linear": 1, "none": 0}[config.projector.kind]
  if config.tune_after >= 0 and ":" in config.encoder.name:
    raise UserError(f"config.tune_after={config.tune_after}: {config.encoder.name} has no known stages; use -1")
  if config.tap > layers:
    raise UserError(f"config.tap={config.tap}: {what} has {layers} layers in its head")


def create(config, num_classes: int) -> model_lib.Classifier:
  """The network of a resolved config, or of a trained.Start."""
  projector = Projector(**config.projector) if config.tap else None
  return model_lib.Classifier(
    encoder=model_lib.make_encoder(config.encoder.name, arrangement=config.encoder.arrangement, **config.encoder),
    projector=projector,
    num_classes=num_classes,
    tap=config.tap,
  )


def optimizer_of(config, encoder, num_examples: int):
  """(optax transformation, schedule) by `config.optimizer`, which leaves alone what `tune_after` freezes of an encoder."""
  tx, schedule = optimizer.create(config, num_examples)

  def frozen(path, _):
    top, module = (str(key.key) for key in path[:2])
    return top == "encoder" and config.tune_after >= 0 and encoder.stage(module) <= config.tune_after

  def mask(params):
    return jax.tree_util.tree_map_with_path(frozen, params)

  return optax.chain(tx, optax.masked(optax.set_to_zero(), mask)), schedule


def cross_entropy(logits, batch):
  """Mean over the examples with a label (batch.label >= 0), and their accuracy; 0 and nan for a batch without one."""
  known = batch.label >= 0
  label, count = jnp.maximum(batch.label, 0), known.sum()
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  some = jnp.maximum(count, 1)
  right = jnp.where(count, jnp.sum(known * (logits.argmax(1) == label)) / some, jnp.nan)
  return jnp.sum(known * losses) / some, {"train_accuracy": right}


def train_step(state: TrainState, batch, *, model, tx, schedule, tune_after: int, weight_decay: float, loss):
  """One update of everything that is not frozen.

  Args:
    batch: views.Batch with pixels float32 [n, h, w, 3], one view of each image.
    weight_decay: on the classifier's kernel, which LARS leaves alone.
    loss: (logits [n, classes], batch) -> (scalar, metrics).
  """

  def objective(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updated = model.apply(variables, batch.pixels, train=True, tune_after=tune_after, mutable=["batch_stats"])
    value, metrics = loss(logits, batch)
    batch_stats = updated.get("batch_stats", {})  # none of a Vision Transformer without a head
    return value + optimizer.classifier_l2(params["classifier"], weight_decay), (value, metrics, batch_stats)

  (_, (value, metrics, batch_stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  metrics = {"loss": value, **metrics, "learning_rate": schedule(state.step)}
  return state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  ), metrics


def view(config):
  """(image, seed) -> a training view: crop and flip, or a whole view of pretraining where colors are given."""
  from simclr_jax import augment, augment_extra  # TensorFlow, which planning and timing do without

  options = dict(config.augment)
  if config.augment.color_strength is not None:  # the supervised baselines of arXiv 2002.05709, Table B.3
    return lambda image, seed: augment_extra.two_views(image, seed, **options)[0]
  return functools.partial(augment.one_view, **{key: options[key] for key in views.CROP if key in options})


def choose(source, labels, test=None) -> np.ndarray:
  """Sorted indices of the images whose labels may be used: a file of names, or a class-balanced fraction of them.

  The file has one name per line: a file name, or enough of its path to be unique, such as class/name.

  Args:
    test: the images to score, if they are held out of the set that `source` is of, for a message that says so.

  Raises:
    ValueError: the source has no labels, or a name in the list matches no image or several.
  """
  if not source.num_classes:
    raise UserError("data.train has no labels: name a labeled set with --config.data.train=...")
  if not labels.list:
    return data.class_balanced(source.labels, labels.fraction, labels.seed)
  wanted = listed(labels)
  chosen, missing = [], []
  for name, found in _named(source, wanted).items():
    if len(found) > 1:
      raise UserError(
        f"labels.list={labels.list}: {name} is {source.name(found[0])} and {source.name(found[1])}; write which one, as"
        " class/name"
      )
    chosen += found
    missing += [] if found else [name]
  held_out = [name for name, found in _named(test, missing).items() if found] if test and missing else []
  if held_out:
    raise UserError(
      f"labels.list={labels.list}: {len(held_out)} of {len(wanted)} names are held out of data.train to be scored, such as "
      f"{held_out[0]}; remove them, or name other images to score with --config.data.test=..."
    )
  if missing or not wanted:
    raise UserError(
      f"labels.list={labels.list}: {len(missing)} of {len(wanted)} names are not in data.train"
      + (f", such as {missing[0]}" if missing else "; write one per line")
    )
  return np.unique(chosen)


def listed(labels) -> list[str]:
  """The names in the file labels.list, each once.

  Raises:
    ValueError: there is no such file.
  """
  if not files.absolute(labels.list).is_file():
    raise UserError(f"labels.list={labels.list}: no such file; give one with one image name per line")
  names = [line.strip("\r") for line in files.read_text(labels.list).split("\n")]
  return list(dict.fromkeys(name for name in names if name.strip()))


def _named(source, names) -> dict[str, list[int]]:
  """{name: the images of a source that it may mean}."""
  places = {}
  for i in range(len(source)):
    places.setdefault(_last(source.name(i)), []).append(i)

  def means(name, i):
    return re.search("(^|[/:])" + re.escape(name) + "$", source.name(i))

  return {name: [i for i in places.get(_last(name), ()) if means(name, i)] for name in names}


def _last(name: str) -> str:
  """The last part of a path, or of a name such as set:index."""
  return re.split("[/:]", name)[-1]


@errors.of_the_user()
def make_task(config, start, source, *, mesh, loss=cross_entropy, evaluators=None, bad_file=None) -> loop.Task:
  """A resolved config and the labeled images as the loop wants them; `bad_file` gets the names of unreadable images."""
  if config.batch_size > len(source):
    left = f" that labels.fraction={config.labels.fraction:g} leaves" if config.labels.fraction < 1 else ""
    most = len(source) // mesh.size * mesh.size
    cure = f"set --config.batch_size={most}" if most else f"give at least {mesh.size} images, one a device"
    raise UserError(
      f"batch_size={config.batch_size} exceeds the {len(source)} training images{left}: {cure}"
      + (", or raise labels.fraction" if left else "")
    )
  model = create(config, source.num_classes)
  tx, schedule = optimizer_of(config, model.encoder, len(source))

  def init(key):
    variables = model.init(key, jnp.zeros((1, config.augment.size, config.augment.size, 3)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params))

  def warm_start(state):
    """The trained encoder and head in place of the random ones; the classifier is always new."""
    found = start or resolve(config)[1]
    return found.put_into(state, ("encoder", "projector") if config.tap else ("encoder",)) if found else state

  return loop.Task(
    init=init,
    step=functools.partial(
      train_step,
      model=model,
      tx=tx,
      schedule=schedule,
      tune_after=config.tune_after,
      weight_decay=optimizer.classifier_decay(config),
      loss=loss,
    ),
    stream=lambda first: views.batches(
      data.train_stream(
        source,
        view(config),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=config.data.max_bad_fraction,
        bad_file=bad_file,
      )
    ),
    evaluators=evaluators or {},
    total_steps=optimizer.train_steps(config, len(source)),
    batch_size=config.batch_size,
    num_examples=len(source),
    exports=lambda state: {"encoder": model_lib.keep_encoder(state)},
    warm_start=warm_start,
    advice=config_lib.IF_IT_DIVERGES,
    check_batch=same.batch_check(source, config.batch_size, config.seed),
  )


@errors.of_the_user()
def check(config, task: loop.Task):
  """Raises UserError for impossible views and sizes of networks, before the workdir is touched."""
  view(config)(np.zeros((8, 8, 3), np.uint8), (0, 0))
  jax.eval_shape(task.init, jax.random.key(0))


@errors.of_the_user()
def abstract_step(config, mesh, source, make=make_task, teacher=None):
  """As pretrain.abstract_step; without a start, of the network that the recipe names.  `teacher` is that of the batch."""
  config, start = resolve(config)
  b, size = config.batch_size, config.augment.size
  number = jax.ShapeDtypeStruct((b,), np.int32)
  pixels, seed = jax.ShapeDtypeStruct((b, size, size, 3), np.float32), jax.ShapeDtypeStruct((b, 2), np.int32)
  batch = views.Batch(pixels=pixels, label=number, index=number, seed=seed, teacher=teacher)
  return loop.abstract_step(make(config, start, source, mesh=mesh), mesh, batch)


class ClassifierEvaluation:
  """Top-1 and top-5 of a state on the test images, center-cropped, BatchNorm in inference mode."""

  def __init__(self, config, num_classes, test_source, mesh):
    self._images = embed.eval_set(test_source, config, mesh, labeled=True)
    self._apply = jax.jit(functools.partial(create(config, num_classes).apply, train=False))
    self._mesh = mesh

  def logits(self, state):
    """(logits float32 [n, classes], labels [n])."""
    return embed.embed(self._apply, state.variables, self._images, self._mesh), self._images.labels()

  def run(self, state) -> dict:
    return self.scores(*self.logits(state))

  def scores(self, logits, labels) -> dict:
    """{"accuracy", "top_5"}: fractions."""
    own = np.take_along_axis(check_finite(logits, "logits"), labels[:, None], 1)
    before = np.arange(logits.shape[1]) < labels[:, None]  # of equal ones argmax takes the first
    rank = np.sum((logits > own) | ((logits == own) & before), 1)
    return {"accuracy": float(np.mean(rank < 1)), "top_5": float(np.mean(rank < 5))}


def train(config, start, source, test_source, workdir, *, mesh, loss=cross_entropy, make=make_task) -> dict:
  """Trains, saves `scores.json` and exports encoder and heads; the folder must already be claimed.

  Returns:
    dict(state, scores, logits, labels, workdir, config); logits [n, classes] and labels [n] are of the test images.
  """
  every = config_lib.every(config.evaluate, len(source), config.batch_size)
  evaluation = ClassifierEvaluation(config, source.num_classes, test_source, mesh)
  task = make(
    config,
    start,
    source,
    mesh=mesh,
    loss=loss,
    evaluators={"test": loop.Evaluator(evaluation.run, every)},
    bad_file=workdir_lib.unreadable(workdir),
  )
  checkpoint.write_config(workdir, config_lib.to_json(config))
  state, clock = loop.run(
    dataclasses.replace(task, data=same.for_other_processes(source)),
    loop.LoopConfig.from_config(config, len(source)),
    mesh=mesh,
    workdir=workdir,
    config_json=config_lib.to_json(config),
    seed=config.seed,
  )
  logits, labels = evaluation.logits(state)
  scores = evaluation.scores(logits, labels)
  step = int(state.step)
  if not jax.process_index():
    heads = {name: model_lib.variables_of(state, name) for name in ("projector", "classifier") if name in state.params}
    exporting.write(
      workdir / "encoder",
      model_lib.keep_encoder(state),
      config,
      scores={"test": scores},
      step=step,
      heads=heads,
      held_out=same.held_out_of_training(workdir, config),
      overwrite=True,
    )
    files.write_sealed(workdir / "scores.json", json.dumps({"step": step, "scores": scores}, indent=2))
    print(f"time {clock.text()}")
    _page(workdir, config, source, test_source, scores, (logits, labels), clock)
  checkpoint.mark_complete(workdir, step)
  return dict(state=state, scores=scores, logits=logits, labels=labels, workdir=workdir, config=config)


def _page(workdir, config, source, test_source, scores, predictions, clock):
  """report.html: scores, curves, classes and confusion of a classifier."""
  logits, labels = predictions
  confusion = np.zeros((source.num_classes,) * 2, int)
  np.add.at(confusion, (labels, logits.argmax(1)), 1)
  what = "Distillation" if isinstance(config, config_lib.Distill) else "Fine-tuning"
  begun = config.start or "scratch"
  report.write_report(
    workdir / "report.html",
    title=f"{what} on {splits.title(config.data.train)}",
    summary=f"{splits.describe(config.data, test_source)}: top-1 {100 * scores['accuracy']:.1f} %, top-5 "
    f"{100 * scores['top_5']:.1f} %, from {begun} with {len(source):,} training images.",
    history=metrics_lib.read(workdir),
    confusion=confusion,
    predicted_by="the classifier",
    class_names=source.class_names,
    seconds=clock.budget(),
    config=config_lib.to_dict(config),
    files={
      workdir / "encoder": "the encoder f, and the heads on it",
      workdir / "checkpoints": "to resume from",
      workdir / "metrics.jsonl": "every logged number; TensorBoard files are beside it",
    },
  )
  print(f"  {workdir / 'report.html'}  the page to look at", flush=True)


def run(config, workdir, *, resume: bool = False, overwrite: bool = False) -> dict:
  """The program `simclr finetune`: prints and returns what `train` returns.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  mesh = mesh_lib.make_mesh()
  mesh_lib.check_divisible(config.batch_size, mesh)
  config, start = resolve(config, same.begun(workdir, resume))
  source, test = splits.check_labeled(config.data, *splits.open_data(config.data))
  if start:
    trained.check_unseen(config.data, test, config.start, start.config)
  chosen = choose(source, config.labels, None if config.data.test else test)
  source = data.Selection(source, chosen) if len(chosen) < len(source) else source
  task = make_task(config, start, source, mesh=mesh)
  check(config, task)
  starts = (config.start,)
  config, workdir = same.claim(config, workdir, source, test, resume=resume, overwrite=overwrite, starts=starts)
  result = train(config, start, source, test, workdir, mesh=mesh)
  s = result["scores"]
  if not jax.process_index():
    print(
      f"{splits.describe(config.data, test)}: top-1 {100 * s['accuracy']:.2f} %, top-5 {100 * s['top_5']:.2f} %, from "
      f"{config.start or 'scratch'} with {len(source):,} labels; {result['workdir']}"
    )
  return result


def main(flags, overrides) -> int:
  run(flags.config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite)
  return 0
