"""`simclr pretrain`: trains with Algorithm 1 (train_step.py) in the shared loop, compares the learned features with raw pixels
and with an untrained encoder (scores.py), exports f and writes a report page.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters

from simclr_jax import accumulate, data, exporting, methods, optimizer, report, train_step, views
from simclr_jax import model as model_lib
from simclr_jax.model import TrainState
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import recipes, same, scores, splits, trained
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, errors, files, loop, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime.errors import UserError

SHOW = {"contrastive_accuracy": "contrastive acc %", "online_accuracy": "online %", "knn": "kNN %"}


def init_state(key, *, model, method, tx, image_size: int) -> TrainState:
  """The state before the first update; `key` is a jax PRNG key."""
  images = jnp.zeros((1, 2, image_size, image_size, 3))
  variables = model.init(key, images, train=False)
  variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  outputs = jax.eval_shape(functools.partial(model.apply, train=False), variables, images)
  return TrainState(
    jnp.zeros((), jnp.int32),
    variables["params"],
    variables["batch_stats"],
    tx.init(variables["params"]),
    method.init(variables, outputs),
  )


def open_start(config):
  """(config with the architecture of `config.start`, trained.Start), or the config as it is and None.

  Raises:
    ValueError: no such start, no head to keep, or keys of a start without one.
  """
  if not config.start:
    for name, value in (("keep_head", config.keep_head), ("head_epochs", config.head_epochs)):
      if value:
        raise UserError(f"config.{name}={value}: there is nothing to start from; set config.start")
    return config, None
  start = trained.open_start(config.start)
  if config.keep_head and "projector" not in start.variables:
    raise UserError(f"config.keep_head=True: {config.start} holds no projection head; start with a new one")
  head = {"projector": start.projector} if config.keep_head else {}
  return trained.with_networks(config, start.encoder, **head), start


def from_random_weights(config):
  """The config of the same network without a start, for what asks how large or how fast it is.

  Raises:
    ValueError: as `open_start`.
  """
  config, _ = open_start(config)
  return config_lib.replace(config, {"start": "", "keep_head": False, "head_epochs": 0.0})


def view_pipeline(config) -> views.ViewPipeline:
  """The two halves of `config.augment`."""
  # A network that computes in bfloat16 sees no difference; one in float32 is fed float32.
  precision = "default" if config.encoder.dtype == "bfloat16" else "highest"
  own = {name: config.augment[name] for name in ("where", "canvas", "views")}
  return views.pipeline(**own, precision=precision, **config.augment)


def _resident(drawn, labels, images, mesh):
  """Batches whose images are on every device from the start, and are picked there by their numbers."""
  *images, numbers = images
  images = dict(zip(("image", "extent"), images, strict=True))
  images = jax.tree.map(lambda x: jax.device_put(x, mesh_lib.replicated(mesh)), images)
  pick = jax.jit(
    lambda images, index: jax.tree.map(lambda x: x[index], images), out_shardings=mesh_lib.batch_sharding(mesh)
  )
  for index, seed in drawn:
    label = np.full(len(index), -1, np.int32) if labels is None else labels[numbers[index]]
    batch = views.Batch(pixels=None, label=label, index=index.astype(np.int32), seed=seed)
    batch = mesh_lib.global_batch(mesh, batch)
    yield batch.replace(pixels=pick(images, batch.index))


def _optimizer(config, method, num_examples: int):
  """(optax transformation, schedule): those of the method, or of `config.optimizer`; with `head_epochs`, first for the head
  alone."""
  tx, schedule = getattr(method, "optimizer", optimizer.create)(config, num_examples)
  if not config.head_epochs:
    return tx, schedule
  if config.projector.kind == "none" and getattr(method, "predictor", None) is None:
    raise UserError(
      f"config.head_epochs={config.head_epochs:g}: with config.projector.kind=none there is no head to train; set it to 0"
    )
  alone = int(config.head_epochs * num_examples // config.batch_size)
  total = optimizer.train_steps(config, num_examples)
  if alone >= total:
    raise UserError(
      f"config.head_epochs={config.head_epochs:g} is {alone} steps and the run has {total}, so the encoder would never "
      "be trained: lower it or train longer"
    )
  return optimizer.staged(tx, {"encoder": lambda updates: updates >= alone}), schedule


def _network(config, model, pipeline, mesh):
  """(views, network) of train_step.train_step."""
  if config.microbatches > 1 and config.microbatch_norm == "exact":
    _check_moments(config, model)
  if config.microbatches > 1:
    return train_step.in_microbatches(
      model,
      pipeline.device,
      microbatches=config.microbatches,
      devices=mesh.size,
      batch_norm=config.microbatch_norm,
    )
  augmented, network = train_step.unsplit(model, pipeline.device)
  if config.norm_scope == "device":
    network = train_step.of_devices(network, norm_devices(config, mesh))
  return augmented, network


def _check_moments(config, model):
  """Statistics of the whole batch come from the moments of what each BatchNorm is given, which some encoders do not write."""
  images = jnp.zeros((1, 2, config.augment.size, config.augment.size, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  collections = [accumulate.MOMENTS]
  _, seen = jax.eval_shape(lambda variables: model.apply(variables, images, mutable=collections), variables)
  expected, found = (
    {path[:-1] for path in flax.traverse_util.flatten_dict(tree)}
    for tree in (variables.get("batch_stats", {}), seen.get(accumulate.MOMENTS, {}))
  )
  if missing := expected - found:
    raise UserError(
      f"config.microbatch_norm=exact: the BatchNorm {'/'.join(min(missing))} does not write its moments (the contract is at the "
      "top of simclr_jax/encoder.py); write them or use config.microbatch_norm=microbatch"
    )


@errors.of_the_user()
def make_task(config, source, *, mesh, evaluators=None, bad_file=None, start=None) -> loop.Task:
  """The config and the training images as the loop wants them.

  Args:
    bad_file: gets the names of unreadable images.
    start: the networks that `open_start` found; without them, a run that needs config.start opens it when it begins.
  """
  method = methods.create(config, mesh, source)
  model = model_lib.create(config, source.num_classes, getattr(method, "predictor", None))
  tx, schedule = _optimizer(config, method, len(source))
  pipeline = view_pipeline(config)
  augmented, network = _network(config, model, pipeline, mesh)
  bad = dict(max_bad_fraction=config.data.max_bad_fraction, bad_file=bad_file)
  order = dict(
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  images = functools.cache(lambda: data.in_memory(source, canvas=pipeline.canvas, **bad))

  def warm_start(state):
    """The trained networks in place of the random ones, and what the method makes of them, such as a moving average."""
    if not config.start:
      return state
    found = start or open_start(config)[1]
    state = found.put_into(state, ("encoder", "projector") if config.keep_head else ("encoder",))
    images = jnp.zeros((1, 2, config.augment.size, config.augment.size, 3))
    outputs = jax.eval_shape(functools.partial(model.apply, train=False), state.variables, images)
    return state.replace(extra=trained.placed_like(state.extra, method.init(state.variables, outputs)))

  def stream(first):
    if pipeline.resident:
      return _resident(map(data.draws(source, **order), itertools.count(first)), source.labels, images(), mesh)
    rows = data.train_stream(source, pipeline.host, start_step=first, canvas=pipeline.canvas, **order, **bad)
    return views.batches(rows)

  return loop.Task(
    init=functools.partial(init_state, model=model, method=method, tx=tx, image_size=config.augment.size),
    step=functools.partial(
      train_step.train_step,
      views=augmented,
      network=network,
      method=method,
      tx=tx,
      schedule=schedule,
      weight_decay=optimizer.classifier_decay(config),
    ),
    stream=stream,
    warm_start=warm_start,
    evaluators=evaluators or {},
    total_steps=optimizer.train_steps(config, len(source)),
    batch_size=config.batch_size,
    num_examples=len(source),
    exports=lambda state: {"encoder": model_lib.keep_encoder(state)},
    zero1=config.zero1,
    split=getattr(method, "split", ()),
    show=SHOW,
    log_with_every_row={} if method.chance_loss is None else {"chance_loss": method.chance_loss},
    advice=config_lib.IF_IT_DIVERGES,
    check_batch=same.batch_check(source, config.batch_size, config.seed),
  )


@errors.of_the_user()
def abstract_step(config, mesh, source):
  """(jitted update, its arguments as shapes with shardings) of a run on `mesh`, whose devices need not exist."""
  return loop.abstract_step(make_task(config, source, mesh=mesh), mesh, view_pipeline(config).spec(config.batch_size))


def changes_of(recipe: str, config, workdir, resume: bool):
  """[(key, value in the recipe, value in the config)] where they differ; None if there is no recipe.

  Of a resumed run they are those that its folder names, or None, and what it is resumed with.  The folder may come from
  elsewhere, and the recipe may have changed since: it is not run.
  """
  if resume and (about := config_lib.about_run(workdir)):
    if (changes := about.get("changes")) is None:
      return None
    found = {key: [before, now] for key, before, now in changes}
    for key, before, now in config_lib.difference(config_lib.from_json(checkpoint.read_config(workdir)), config):
      if key.startswith(same.MAY_CHANGE):
        found[key] = [found.get(key, [before])[0], now]
    return [[key, *values] for key, values in found.items() if values[0] != values[1]]
  return config_lib.difference(config_lib.load(recipe), config) if recipe else None


def run(
  config,
  workdir,
  *,
  resume: bool = False,
  overwrite: bool = False,
  recipe: str = "",
  source=None,
  keep=None,
  complete: bool = True,
) -> dict:
  """Pretrains with `config` (see configs/) and writes to `workdir`; `recipe` is the name of the config's file, if any.

  Args:
    source: the training images, where config.data.train does not hold them yet; `keep()`, which is called after all checks,
      saves them there.
    complete: whether the run is complete at the end; a program that has more to write marks it and unlocks it itself.
  Returns:
    dict(state, scores, workdir, page): the trained state, the rows of the final table, the folder, and the arguments of
    `report.write_report` that made its page.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  began = time.monotonic()
  mesh = mesh_lib.make_mesh()
  check_batch(config, mesh)
  if config.norm_scope == "device":  # kept, so that the groups of a resumed run are the same
    config = config_lib.replace(config, {"norm_devices": norm_devices(config, mesh)})
  begun = same.begun(workdir, resume)
  with errors.of_the_user():
    keys = ("encoder", *(("projector",) if config.keep_head else ()))
    config, start = (trained.as_begun(config, workdir, keys), None) if begun else open_start(config)
  if begun:
    config = same.same_config(config, workdir)
  train_source, test_source = splits.open_data(config.data, source)
  if start and test_source is not train_source:
    trained.check_unseen(config.data, test_source, config.start, start.config)
  with errors.of_the_user():
    evaluation = scores.PretrainEvaluation(config, train_source, test_source, mesh)
  every = config_lib.every(config.evaluate, len(train_source), config.batch_size)
  task = make_task(
    config,
    train_source,
    mesh=mesh,
    evaluators={"knn": loop.Evaluator(evaluation.quick, every)},
    bad_file=workdir_lib.unreadable(workdir),
    start=start,
  )
  pipeline = view_pipeline(config)
  with errors.of_the_user():
    pipeline.check()
    if pipeline.resident:
      data.check_fits(train_source, canvas=pipeline.canvas)
    abstract = jax.eval_shape(task.init, jax.random.key(0))  # impossible sizes fail before the workdir is touched
  starts = (config.start,) if config.start else ()
  again = {"resume": resume, "overwrite": overwrite}
  config, workdir = same.claim(config, workdir, train_source, test_source, **again, starts=starts)
  if keep:
    keep()
  pairs = _first_views(task, pipeline)
  changes = None if jax.process_index() else changes_of(recipe, config, workdir, resume)  # which reads config.json
  if not jax.process_index():
    _write_about(workdir, config, task, mesh, recipe, changes)
    report.view_pairs_png(workdir / "views.png", pairs)
    _greet(config, workdir, mesh, train_source, test_source, abstract, task)

  state, clock = loop.run(
    dataclasses.replace(task, data=same.for_other_processes(train_source)),
    loop.LoopConfig.from_config(config, len(train_source)),
    mesh=mesh,
    workdir=workdir,
    config_json=config_lib.to_json(config),
    seed=config.seed,
  )
  clock.seconds["start"] += clock.started - began
  clock.started = began
  with clock.phase("evaluate"):
    result = scores.conclude(config, workdir, task, evaluation, state, mesh)
  page = {} if jax.process_index() else _farewell(config, workdir, result, pairs, clock, changes)
  if complete:
    checkpoint.mark_complete(workdir, int(state.step))
  return {"state": state, "scores": result["scores"], "workdir": workdir, "page": page}


def norm_devices(config, mesh) -> int:
  """Number of parts of the batch that BatchNorm looks at separately."""
  return config.norm_devices or mesh.size if config.norm_scope == "device" else 1


def check_batch(config, mesh):
  """Raises UserError unless every device gets the same number of images, of each microbatch too, and BatchNorm has parts
  that are those of the devices or lie within them."""
  mesh_lib.check_divisible(config.batch_size, mesh)
  if config.norm_scope == "device":
    groups = norm_devices(config, mesh)
    if groups == 1 or groups % mesh.size or config.batch_size % groups:
      raise UserError(
        f"norm_scope=device with norm_devices={groups}: expected a number above 1 that is a multiple of the {mesh.size} "
        f"devices and divides batch_size={config.batch_size}"
      )
  if config.batch_size % (config.microbatches * mesh.size):
    raise UserError(
      f"microbatches={config.microbatches}: batch_size={config.batch_size} on {mesh.size} devices has "
      f"{config.batch_size // mesh.size} images a device, which is not a multiple of microbatches"
    )


def _first_views(task, pipeline):
  """float32 [16, 2, size, size, 3] or fewer: the first view pairs of the first batch."""
  batch = next(iter(task.stream(0)))
  few = jax.tree.map(lambda x: processes.gather(x)[:16] if isinstance(x, jax.Array) else x[:16], batch)
  return np.asarray(jax.jit(pipeline.device)(few)[:, :2])


def _write_about(workdir, config, task, mesh, recipe, changes):
  """config.json, and run.json for `simclr runs`."""
  checkpoint.write_config(workdir, config_lib.to_json(config))
  about = {
    "program": "pretrain",
    "recipe": recipe,
    "changes": changes,
    "total_steps": task.total_steps,
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
  }
  files.write_text(workdir / "run.json", json.dumps(about, indent=2))


def _greet(config, workdir, mesh, source, test, abstract, task):
  parts = {name: int(count_parameters(tree)) for name, tree in abstract.params.items()}
  device = mesh.devices.flat[0]
  print(f"config      {workdir / 'config.json'}")
  print(f"images      {len(source):,} from {config.data.train}, {source.num_classes or 'no'} classes")
  if test is not source and not config.data.test:
    print(f"scored      {splits.describe(config.data, test)}, which training does not see")
  elif test is source and source.num_classes:
    print(f"scored      {splits.nothing_is_scored(config.data)}")
  print("parameters  " + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
  print(f"devices     {mesh.size} x {device.device_kind}, {jax.process_count()} process(es); {_ranges(config, mesh)}")
  chance = task.log_with_every_row.get("chance_loss")
  at_chance = f"; loss at chance {chance:.3f}" if chance else ""
  print(f"training    {task.total_steps:,} steps of {config.batch_size} images{at_chance}")
  print(f"view pairs  {workdir / 'views.png'}", flush=True)


def _ranges(config, mesh) -> str:
  every = f"over all {config.batch_size} images"
  if config.norm_scope == "global":
    return f"BatchNorm and negatives range {every}"
  return f"BatchNorm ranges over {config.batch_size // norm_devices(config, mesh)} images, negatives range {every}"


def length(config) -> str:
  """How long a config trains, in words."""
  return f"{config.train_steps:,} steps" if config.train_steps else f"{config.train_epochs:g} epochs"


def _farewell(config, workdir, result, pairs, clock, changes) -> dict:
  files = {
    str(workdir / "encoder"): "the encoder f, ready to load; the head is not in it",
    str(workdir / "checkpoints"): "to resume from",
    str(workdir / "metrics.jsonl"): "every logged number; TensorBoard files are beside it",
    str(workdir / "views.png"): "augmented view pairs",
    str(workdir / "config.json"): "the resolved config",
  }
  pictures = {"views": workdir / "views.png"}
  if len(result["neighbors"][0]):
    pictures["neighbors"] = workdir / "neighbors.png"
    report.neighbors_png(pictures["neighbors"], *result["neighbors"])
    files[str(pictures["neighbors"])] = "nearest neighbors in h"
  metrics_lib.show(workdir, result["step"], pictures)
  facts = (workdir / "encoder", config.augment.size, config.encoder.name)
  snippet = exporting.snippet(*facts)
  best = {row["representation"]: row for row in result["scores"]}
  summary = f"{config.data.train}, {length(config)} at batch {config.batch_size}."
  if best:
    h, raw = best["h"], best["raw pixels"]
    summary += f" kNN on h {100 * h['knn']:.1f} % (raw pixels {100 * raw['knn']:.1f} %), linear {100 * h['linear']:.1f} % ({100 * raw['linear']:.1f} %)."
  page = dict(
    title=f"{'SimCLR' if config.method in ('simclr', 'memory') else config.method} on {splits.title(config.data.train)}",
    summary=summary,
    scores=result["scores"],
    history=metrics_lib.read(workdir),
    config=config_lib.to_dict(config),
    files=files,
    snippet=snippet,
    torch_snippet="" if ":" in config.encoder.name else exporting.torch_snippet(*facts),
    views=pairs,
    neighbors=result["neighbors"],
    confusion=result["confusion"],
    class_names=result.get("class_names"),
    verdict=result["verdict"],
    healthy=False if result["collapsed"] else None,  # never green: what has not collapsed may still be worth little
    seconds=clock.budget(),
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


def main(flags, overrides) -> int:
  changes = changes_of(flags.recipe, flags.config, flags.workdir, flags.resume)
  if flags.recipe and not jax.process_index():
    made_for = []
    with contextlib.suppress(SyntaxError, ValueError):  # of a recipe that has been edited since the run began
      made_for = recipes.header(config_lib.find_recipe(flags.recipe).partition(":")[0]).get("Hardware", "").split()
    print(f"recipe      {flags.recipe}" + f", made for {' '.join(made_for)}" * bool(made_for))
    if changes is not None:
      print(f"changed     {', '.join(f'{key}={now}' for key, _, now in changes) or 'nothing in the recipe'}")
  run(flags.config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite, recipe=flags.recipe)
  return 0
