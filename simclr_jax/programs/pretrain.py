"""SimCLR pretraining: two views of each image, encode, project, contrast over the global batch, update (Algorithm 1).

`train_step` is the algorithm; `run` is the program around it: it reads a config, trains through the one loop, compares
what was learned with raw pixels and with an untrained encoder, exports f and writes a page to look at.
"""

import functools
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from simclr_jax import (
  accumulate,
  augment,
  augment_extra,
  augment_on_device,
  contrast,
  data,
  diagnostics,
  exporting,
  optimizer,
  report,
)
from simclr_jax import model as model_lib
from simclr_jax.evaluation import embed, knn, linear
from simclr_jax.methods import memory
from simclr_jax.model import TrainState
from simclr_jax.programs import map as map_lib
from simclr_jax.runtime import checkpoint, files, loop, processes
from simclr_jax.runtime import config as config_lib
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib


def init_state(key, *, model, tx, image_size: int) -> TrainState:
  """The state before the first update; `key` is a jax PRNG key."""
  variables = model.init(key, jnp.zeros((1, 2, image_size, image_size, 3)), train=False)
  params, batch_stats = variables["params"], variables.get("batch_stats", {})
  return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params))


def train_step(
  state: TrainState,
  batch,
  *,
  model,
  tx,
  schedule,
  loss,
  weight_decay: float = 0.0,
  microbatches: int = 1,
  batch_norm: str = "microbatch",
  devices: int = 1,
  views: Callable = lambda batch: batch["views"],
):
  """One update.

  Args:
    batch: `views`, what the host made of the images; `label` int32 [n], -1 where unknown, n the global batch; `seed`
      int32 [n, 2].
    loss: (z [n, 2, d]) -> (scalar, metrics), such as `contrast.nt_xent` with its temperature bound.
    weight_decay: on the online classifier's kernel, which LARS leaves alone.
    microbatches, batch_norm: above 1, the batch is worked off in so many parts, with all its negatives, and
      `batch_norm` says what BatchNorm ranges over: see accumulate.py.
    devices: over which the batch is split.
    views: batch -> float32 [n, 2, h, w, 3] in [0, 1], the device's half of the augmentation, see `augmentation`.

  Returns:
    (next state, metrics as float32 scalars).

  BatchNorm statistics and negatives range over the global batch, whatever the number of devices.
  """
  known = batch["label"] >= 0
  count = jnp.maximum(known.sum(), 1)

  def forward(params, batch_stats, part, train):
    (_, z, logits), updated = model.apply(
      {"params": params, "batch_stats": batch_stats}, views(part), train=train, mutable=["batch_stats"]
    )
    if logits is None:
      return (z, {"online_loss": jnp.zeros(())}), updated.get("batch_stats", {})
    y = jnp.maximum(part["label"], 0)[:, None]  # both views of an image have its label
    weight = (part["label"] >= 0)[:, None] / (2 * count)
    xent = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(y, logits.shape[:2]))
    side = {"online_loss": jnp.sum(weight * xent), "online_accuracy": jnp.sum(weight * (logits.argmax(-1) == y))}
    return (z, side), updated["batch_stats"]

  def whole(params):
    (z, side), batch_stats = forward(params, state.batch_stats, batch, True)
    contrastive, metrics = loss(z)
    return contrastive + side["online_loss"], ({"loss": contrastive, **metrics, **side}, batch_stats)

  if microbatches == 1:
    (_, (metrics, batch_stats)), grads = jax.value_and_grad(whole, has_aux=True)(state.params)
  else:
    parts = jax.tree.map(lambda x: accumulate.split(x, microbatches, devices), batch)
    (metrics, batch_stats), grads = accumulate.value_and_grad(
      forward, loss, state.params, state.batch_stats, parts, devices=devices, batch_norm=batch_norm
    )
  if "classifier" in grads and weight_decay:
    decay = jax.grad(optimizer.classifier_l2)(state.params["classifier"], weight_decay)
    grads = {**grads, "classifier": jax.tree.map(jnp.add, grads["classifier"], decay)}
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def loss_function(config, mesh):
  """(z [n, 2, d]) -> (loss, metrics): one of contrast.LOSSES, NT-Xent unless `config.loss.name` says otherwise.

  Raises:
    ValueError: no such loss, an option that it does not take, or a value that it refuses.
  """
  options = dict(config.loss)
  name = options.pop("name", "nt_xent")
  choices = [choice for choice in contrast.LOSSES if choice != "supervised"]  # which takes labels too
  if name not in choices:
    raise ValueError(f"config.loss.name={name!r}: expected one of {', '.join(choices)}")
  if config.get("memory") and name != "nt_xent":
    raise ValueError(f"config.loss.name={name!r}: the memory bank is for nt_xent")
  accepted = {k: p for k, p in inspect.signature(contrast.LOSSES[name]).parameters.items() if k not in ("z", "mesh")}
  unknown = [key for key in options if key not in accepted]
  missing = [key for key, p in accepted.items() if p.default is p.empty and key not in options]
  if unknown or missing:
    mistake = f"{unknown[0]}: no such option" if unknown else f"{missing[0]} is missing"
    raise ValueError(f"config.loss.{mistake}; {name} takes {', '.join(accepted)}")
  mesh = {"mesh": mesh} if name == "nt_xent" else {}
  return functools.partial(contrast.LOSSES[name], **mesh, **options)


def chance_loss(config) -> float | None:
  """NT-Xent of embeddings that know nothing: ln(2n - 1), twice that for the official sum; None for other losses."""
  if config.loss.get("name", "nt_xent") != "nt_xent":
    return None
  return contrast.REDUCTIONS[config.loss.get("reduction", "mean")] * math.log(2 * config.batch_size - 1)


ON_THE_MAP = 2000  # images of the page's map, at most
WHERE = ("host", "device", "device_crop", "resident")
CROP = ("size", "crop_sampler", "crop_area", "flip", "resize")


def augmentation(config):
  """`config.augment` as two halves: what the host does to one image, and what the step does to a batch.

  where="host"         the host does everything: float32 views.
  where="device"       the host crops and flips: uint8 views; the step distorts colours and blurs.
  where="device_crop"  the host decodes: uint8 images on canvases of side `canvas`; the step does everything else.
  where="resident"     the images live on the devices; the host sends their numbers.

  Returns:
    (host, device, canvas): host (image uint8 [h, w, 3], seed [2]) -> tensor, or None for images as they are;
    device (batch with `views` and `seed`) -> [n, 2, size, size, 3] float32 in [0, 1].

  Raises:
    ValueError: an option is out of range.
  """
  options = dict(config.augment)
  where, canvas = options.pop("where", "host"), options.pop("canvas", 512)
  if where not in WHERE:
    raise ValueError(f"augment.where={where!r}: expected one of {', '.join(WHERE)}")
  if not isinstance(canvas, int) or canvas < 1:
    raise ValueError(f"augment.canvas={canvas!r}: expected the side of the canvas in pixels")
  if where == "host":
    return functools.partial(augment_extra.two_views, **options), lambda batch: batch["views"], canvas
  for name in ("extra", "one_sided"):
    if options.pop(name, ()):
      raise ValueError(f"augment.where={where!r}: augment.{name} is done by the host, with augment.where=host")
  crop = {key: options.pop(key) for key in CROP if key in options}
  # A network that computes in bfloat16 sees no difference; one in float32 is fed float32.
  options["precision"] = "default" if config.encoder.dtype == "bfloat16" else "highest"
  if where == "device":
    device = functools.partial(augment_on_device.color_and_blur, **options)
    return functools.partial(augment.two_crops, **crop), lambda batch: device(batch["views"], batch["seed"]), canvas
  device = functools.partial(augment_on_device.two_views, **crop, **options)
  return None, lambda batch: device(batch["views"]["image"], batch["views"]["extent"], batch["seed"]), canvas


def _check_augmentation(config):
  """Tries both halves on an image of 8 pixels: impossible values fail here, before the workdir is touched."""
  host, device, _ = augmentation(config)
  image = np.zeros((8, 8, 3), np.uint8)
  views = {"image": image[None], "extent": np.full((1, 2), 8, np.int32)} if host is None else host(image, (0, 0))[None]
  views = jax.tree.map(np.asarray, views)
  jax.eval_shape(device, {"views": views, "seed": np.zeros((1, 2), np.int32)})


def _resident(drawn, labels, images, mesh):
  """Batches whose images are on every device from the start, and are picked there by their numbers."""
  images = dict(zip(("image", "extent"), images, strict=True))
  images = jax.tree.map(lambda x: jax.device_put(x, mesh_lib.replicated(mesh)), images)
  pick = jax.jit(
    lambda images, index: jax.tree.map(lambda x: x[index], images), out_shardings=mesh_lib.batch_sharding(mesh)
  )
  for index, seed in drawn:
    label = np.full(len(index), -1, np.int32) if labels is None else labels[index]
    batch = mesh_lib.global_batch(mesh, {"index": index.astype(np.int32), "label": label, "seed": seed})
    yield {**batch, "views": pick(images, batch["index"])}


def make_task(config, source, *, mesh, evaluators=None, bad_file=None) -> loop.Task:
  """The config and the training images as the loop wants them; `bad_file` gets the names of unreadable images."""
  model = model_lib.create(config, source.num_classes, tpu=mesh_lib.on_tpu(mesh))
  tx, schedule = optimizer.create(config, len(source))
  host, device, canvas = augmentation(config)

  bad = dict(max_bad_fraction=config.data.max_bad_fraction, bad_file=bad_file)
  order = dict(
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  images = functools.cache(lambda: data.in_memory(source, canvas=canvas, **bad))

  def stream(start):
    if config.augment.get("where") == "resident":
      return _resident(map(data.draws(source, **order), itertools.count(start)), source.labels, images(), mesh)
    return data.train_stream(source, host, start_step=start, canvas=canvas, **order, **bad)

  task = loop.Task(
    init=functools.partial(init_state, model=model, tx=tx, image_size=config.augment.size),
    step=functools.partial(
      train_step,
      model=model,
      tx=tx,
      schedule=schedule,
      loss=loss_function(config, mesh),
      weight_decay=config.optimizer.weight_decay if config.optimizer.name == "lars" else 0.0,
      microbatches=config.microbatches,
      batch_norm=config.microbatch_norm,
      devices=mesh.size,
      views=device,
    ),
    stream=stream,
    evaluators=evaluators or {},
    total_steps=optimizer.train_steps(config, len(source)),
    batch_size=config.batch_size,
    num_examples=len(source),
    exports=model_lib.keep_encoder,
    zero1=config.zero1,
  )
  if "memory" in config:
    options = {key: value for key, value in config.loss.items() if key != "name"}
    task = memory.remember(task, model, loss=options, views=device, **config.memory)
  return task


def abstract_step(config, mesh, source):
  """(jitted update, its arguments as shapes with shardings), of a run on `mesh`, which may be devices nobody has."""
  task = make_task(config, source, mesh=mesh)
  b, size = config.batch_size, config.augment.size
  where, canvas = config.augment.get("where", "host"), config.augment.get("canvas", 512)
  if where in ("host", "device"):
    views = jax.ShapeDtypeStruct((b, 2, size, size, 3), np.float32 if where == "host" else np.uint8)
  else:
    image = jax.ShapeDtypeStruct((b, canvas, canvas, 3), np.uint8)
    views = {"image": image, "extent": jax.ShapeDtypeStruct((b, 2), np.int32)}
  number = jax.ShapeDtypeStruct((b,), np.int32)
  batch = {"views": views, "label": number, "index": number, "seed": jax.ShapeDtypeStruct((b, 2), np.int32)}
  return loop.abstract_step(task, mesh, batch)


@functools.lru_cache
def _representations(model):
  """Jitted (variables, images [m, h, w, 3]) -> {"h", "z"}, BatchNorm in inference mode."""

  @jax.jit
  def apply(variables, images):
    h, z, _ = model.apply(variables, images[:, None], train=False)
    return {"h": h[:, 0], "z": z[:, 0]}

  return apply


def _variables(state):
  return {"params": state.params, "batch_stats": state.batch_stats}


class Evaluation:
  """kNN, collapse diagnostics and linear evaluation of a state, on the labelled train and test images."""

  def __init__(self, config, model, train_source, test_source, mesh):
    self._apply, self._mesh, self._config = _representations(model), mesh, config
    self.num_classes = train_source.num_classes
    make = functools.partial(embed.eval_set, config=config, mesh=mesh)
    bank = embed.bank(train_source, config)
    self.train, self.test = make(bank), make(test_source)
    native = min(test_source.read(0).shape[:2])  # raw pixels compete at their own size where that is small
    self.raw = [
      make(part, size=native, crop=1.0) if native <= 64 else made
      for part, made in ((bank, self.train), (test_source, self.test))
    ]

  def embed(self, state):
    """({"h", "z"} of the training images, the same of the test images), numpy."""
    return tuple(embed.embed(self._apply, _variables(state), part, self._mesh) for part in (self.train, self.test))

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

  def quick(self, state) -> dict:
    """What the loop shows now and then."""
    scores = {}
    if self.num_classes:
      train, test = self.embed(state)
      scores["knn"] = self.knn(train["h"], test["h"])
    else:
      test = embed.embed(self._apply, _variables(state), self.test, self._mesh)
    numbers = diagnostics.summary(test["h"], test["z"])
    collapsed, verdict = diagnostics.verdict(numbers)
    return {**scores, **numbers, "collapsed": float(collapsed), "verdict": verdict}

  def scores(self, name: str, train_x, test_x) -> dict:
    """One row of the table: kNN, linear evaluation with all labels, and with 10 labels a class."""
    y, test_y = self.train.labels(), self.test.labels()
    return {
      "representation": name,
      "knn": self.knn(train_x, test_x),
      "linear": linear.linear_evaluation(train_x, y, test_x, test_y, num_classes=self.num_classes),
      "linear_10": linear.few_label_evaluation(train_x, y, test_x, test_y, num_classes=self.num_classes),
    }


def run(config, workdir, *, resume: bool = False, overwrite: bool = False, recipe: str = "") -> dict:
  """Pretrains by `config` (see configs/) into `workdir`; `recipe` is the name of the file that it came from, if any.

  Returns:
    dict(state, scores, workdir, page): the trained state, the rows of the final table, the folder, and the arguments of
    `report.write_report` that made its page.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  began = time.monotonic()
  mesh = mesh_lib.make_mesh()
  mesh_lib.check_divisible(config.batch_size, mesh)
  if config.batch_size % (config.microbatches * mesh.size):
    raise ValueError(
      f"microbatches={config.microbatches}: batch_size={config.batch_size} on {mesh.size} devices has "
      f"{config.batch_size // mesh.size} images a device, which is no multiple"
    )
  if resume and (checkpoint.folder(workdir)).exists():
    config = _same_config(config, workdir)
  train_source = data.open_source(config.data.train, data_dir=config.data.data_dir or None)
  test_source = data.open_source(config.data.test or config.data.train, data_dir=config.data.data_dir or None)
  if config.data.test and test_source.num_classes != train_source.num_classes:
    raise ValueError(
      f"data.train={config.data.train} has {train_source.num_classes} classes and data.test={config.data.test} "
      f"{test_source.num_classes}: name two splits of one data set, or set data.test=''"
    )
  model = model_lib.create(config, train_source.num_classes)
  evaluation = Evaluation(config, model, train_source, test_source, mesh)
  every = config_lib.every(config.evaluate, len(train_source), config.batch_size)
  evaluators = {"knn": loop.Evaluator(evaluation.quick, every)}
  name = f"unreadable_{jax.process_index()}.txt" if jax.process_count() > 1 else "unreadable.txt"
  bad_file = str(epath.Path(workdir) / name)
  task = make_task(config, train_source, mesh=mesh, evaluators=evaluators, bad_file=bad_file)
  checkpoint_every = config_lib.every(config.checkpoint, len(train_source), config.batch_size)
  _check_augmentation(config)
  abstract = jax.eval_shape(task.init, jax.random.key(0))  # impossible values fail here, before the workdir is touched

  workdir = checkpoint.claim_workdir(str(workdir), resume=resume, overwrite=overwrite)
  config_json = config_lib.to_json(config)
  first = jax.tree.map(
    lambda x: processes.gather(x)[:16] if isinstance(x, jax.Array) else x[:16], next(iter(task.stream(0)))
  )
  views = np.asarray(jax.jit(augmentation(config)[1])(first))
  if not jax.process_index():
    files.write_text(workdir / "config.json", config_json)
    changes = config_lib.difference(config_lib.load(recipe), config) if recipe else None
    about = {
      "program": "pretrain",
      "recipe": recipe,
      "changes": changes,
      "total_steps": task.total_steps,
      "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }
    files.write_text(workdir / "run.json", json.dumps(about, indent=2))
    report.view_pairs_png(workdir / "views.png", views)
  _greet(config, config_json, workdir, mesh, train_source, abstract, task)

  state, clock = loop.run(
    task,
    mesh=mesh,
    workdir=workdir,
    config_json=config_json,
    seed=config.seed,
    log_every=config.log.every_steps,
    checkpoint_every=checkpoint_every,
    keep=config.checkpoint.keep,
    rollback=loop.Rollback(**config.get("rollback", {})),
    wandb=config.log.get("wandb", ""),
    profile_steps=config.log.get("profile_steps", 0),
    constants={"chance_loss": chance} if (chance := chance_loss(config)) else {},
  )
  clock.seconds["start"] += clock.started - began
  clock.started = began
  with clock.phase("evaluate"):
    result = _conclude(config, workdir, task, evaluation, state, mesh)
  page = {} if jax.process_index() else _farewell(config, workdir, result, views, clock, changes)
  checkpoint.mark_complete(workdir, int(state.step))
  return {"state": state, "scores": result["scores"], "workdir": workdir, "page": page}


def _same_config(config, workdir):
  """Resuming goes on with the config that the run began with; a different one is refused."""
  kept = config_lib.from_json(checkpoint.read_config(workdir))
  config_lib.check_same(kept, config)
  return kept


def _greet(config, config_json, workdir, mesh, source, abstract, task):
  if jax.process_index():
    return
  parts = {name: model_lib.count(tree) for name, tree in abstract.params.items()}
  device = mesh.devices.flat[0]
  print(config_json)
  print(f"images      {len(source):,} from {config.data.train}, {source.num_classes or 'no'} classes")
  print("parameters  " + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
  print(
    f"devices     {mesh.size} x {device.device_kind}, {jax.process_count()} process(es); BatchNorm and negatives range over all {config.batch_size} images"
  )
  chance = chance_loss(config)
  at_chance = f"; loss at chance {chance:.3f}" if chance else ""
  print(f"training    {task.total_steps:,} steps of {config.batch_size} images{at_chance}")
  print(f"view pairs  {workdir / 'views.png'}", flush=True)


def _conclude(config, workdir, task, evaluation, state, mesh) -> dict:
  """Scores, neighbours and confusion at the end of a run; the encoder is exported here."""
  train, test = evaluation.embed(state)
  numbers = diagnostics.summary(test["h"], test["z"])
  collapsed, verdict = diagnostics.verdict(numbers)
  out = {"verdict": verdict, "collapsed": collapsed, "scores": [], "confusion": None}
  labels = test_labels = None
  if evaluation.num_classes:
    labels, test_labels = evaluation.train.labels(), evaluation.test.labels()
    untrained = jax.jit(task.init, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(config.seed))
    before = evaluation.embed(untrained)
    chance = 1 / evaluation.num_classes
    out["scores"] = [
      evaluation.scores("raw pixels", *(part.pixels() for part in evaluation.raw)),
      evaluation.scores("untrained encoder", before[0]["h"], before[1]["h"]),
      evaluation.scores("SimCLR z", train["z"], test["z"]),
      evaluation.scores("SimCLR h", train["h"], test["h"]),
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
    out["class_names"] = list(evaluation.test.source.class_names)
  queries = np.random.default_rng(config.seed).permutation(len(test["h"]))[:8]
  _, nearest = knn.nearest(train["h"], test["h"][queries], k=8)
  if not config.data.test:
    nearest = nearest[:, 1:]  # the query itself
  neighbours = np.stack([evaluation.train.images(row) for row in nearest])
  same = labels[nearest] == test_labels[queries][:, None] if labels is not None else None
  out["neighbours"] = (evaluation.test.images(queries), neighbours, same)
  scores = {row["representation"]: {k: v for k, v in row.items() if k != "representation"} for row in out["scores"]}
  step = out["step"] = int(state.step)
  if not jax.process_index():
    kept = model_lib.keep_encoder(state)
    numbers |= {"collapsed": collapsed, "verdict": verdict}
    files.write_text(workdir / "scores.json", json.dumps({"step": step, "scores": scores, **numbers}, indent=2))
    out["map"] = _map(evaluation.test, test["h"], config.seed)
    metrics_lib.projector(workdir, test["h"][:ON_THE_MAP], None if labels is None else test_labels[:ON_THE_MAP])
    exporting.write(workdir / "encoder", kept, config, scores=scores, step=step, overwrite=True)
  return out


def _map(images: embed.EvalSet, h, seed: int) -> dict | None:
  """What the page shows of h [n, d] in the plane."""
  if len(h) < 4:
    return None
  rows = np.sort(data.permutation(seed, 0, len(h))[:ON_THE_MAP])
  source, index = images.source, images.rows()[rows]
  names = [source.name(int(i)) for i in index]
  labels = images.labels()[rows] if source.num_classes else None
  return map_lib.chart(h[rows], map_lib.thumbnails(source, index), names, labels, source.class_names, seed=seed)


def _farewell(config, workdir, result, views, clock, changes) -> dict:
  files = {
    str(workdir / "encoder"): "the encoder f, ready to load; the head is not in it",
    str(workdir / "checkpoints"): "to resume from",
    str(workdir / "metrics.jsonl"): "every logged number; TensorBoard files are beside it",
    str(workdir / "views.png"): "augmented view pairs",
    str(workdir / "config.json"): "the resolved config",
  }
  pictures = {"views": workdir / "views.png"}
  if len(result["neighbours"][0]):
    pictures["neighbours"] = workdir / "neighbours.png"
    report.neighbours_png(pictures["neighbours"], *result["neighbours"])
    files[str(pictures["neighbours"])] = "nearest neighbours in h"
  metrics_lib.show(workdir, result["step"], pictures)
  snippet = exporting.snippet(workdir / "encoder", config.augment.size)
  best = {row["representation"]: row for row in result["scores"]}
  summary = f"{config.data.train}, {config.train_epochs or config.train_steps} {'epochs' if config.train_epochs else 'steps'} at batch {config.batch_size}."
  if best:
    h, raw = best["SimCLR h"], best["raw pixels"]
    summary += f" kNN on h {100 * h['knn']:.1f} % (raw pixels {100 * raw['knn']:.1f} %), linear {100 * h['linear']:.1f} % ({100 * raw['linear']:.1f} %)."
  page = dict(
    title=f"SimCLR on {config.data.train.partition(':')[0]}",
    summary=summary,
    scores=result["scores"],
    history=metrics_lib.read(workdir),
    config=config.to_dict(),
    files=files,
    snippet=snippet,
    views=views,
    neighbours=result["neighbours"],
    confusion=result["confusion"],
    class_names=result.get("class_names"),
    verdict=result["verdict"],
    healthy=not result["collapsed"],
    seconds=dict(clock.seconds),
    map_of_images=result["map"],
    changes=changes,
  )
  report.write_report(workdir / "report.html", **page)
  print()
  if best:
    print(report.score_table(result["scores"]))
    print()
  print(result["verdict"])
  print(f"time        {clock.text()}")
  for path, what in files.items():
    print(f"  {path}  {what}")
  print(f"  {workdir / 'report.html'}  the page to look at\n\nLoad the encoder:\n\n{snippet}", flush=True)
  return page
