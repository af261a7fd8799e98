"""`simclr probe`: linear evaluation on the frozen h of a run or an exported encoder.

Two protocols: a multinomial regression by L-BFGS on features computed once (evaluation/linear.py), and the paper's
ImageNet protocol, SGD-Nesterov on crop+flip views without warm-up and weight decay, BatchNorm in inference mode (v1
paper, App. B.6).
"""

import functools
import hashlib
import json

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from simclr_jax import data, exporting, optimizer, views
from simclr_jax.evaluation import embed, linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, same, splits, trained, transforms
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


@flax.struct.dataclass
class ProbeState:
  """A linear classifier in training."""

  step: jax.Array
  params: dict
  opt_state: tuple


def train_step(state: ProbeState, batch, frozen, *, encoder, classifier, tx, schedule):
  """One update of the classifier; the encoder, with its variables `frozen`, runs in inference mode, BatchNorm included."""
  h = jax.lax.stop_gradient(encoder.apply(frozen, batch.pixels, train=False))

  def objective(params):
    return finetune.cross_entropy(classifier.apply({"params": params}, h), batch)

  (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  metrics = {"loss": loss, **metrics, "learning_rate": schedule(state.step)}
  params = optax.apply_updates(state.params, updates)
  return ProbeState(state.step + 1, params, opt_state), metrics


def make_task(opened: trained.TrainedRun, source) -> loop.Task:
  """SGD-Nesterov, momentum 0.9, base_lr * batch / 256 with cosine decay and no warm-up, crop+flip (App. B.6),
  with the interpolation of pretraining, and without flips where it had none."""
  from simclr_jax import augment  # TensorFlow, which the other protocols do without

  c = opened.config
  if c.probe.batch_size > len(source):
    raise UserError(f"probe.batch_size={c.probe.batch_size} exceeds the {len(source)} training images: lower it")
  rule = config_lib.replace(
    c,
    {
      **{"batch_size": c.probe.batch_size, "train_epochs": c.probe.train_epochs, "train_steps": 0},
      "optimizer": {"name": "sgd", "base_lr": c.probe.base_lr},
    },
  )
  tx, schedule = optimizer.create(rule, len(source))
  classifier = nn.Dense(source.num_classes, kernel_init=nn.initializers.normal(0.01))
  options = dict(c.augment)
  crop = {key: options[key] for key in views.CROP if key in options}

  def init(key):
    width = jax.eval_shape(
      functools.partial(opened.encoder.apply, train=False), opened.variables, _image(c.augment.size)
    ).shape[1]
    params = classifier.init(key, jnp.zeros((1, width)))["params"]
    return ProbeState(jnp.zeros((), jnp.int32), params, tx.init(params))

  return loop.Task(
    init=init,
    step=functools.partial(train_step, encoder=opened.encoder, classifier=classifier, tx=tx, schedule=schedule),
    stream=lambda start: views.batches(
      data.train_stream(
        source,
        functools.partial(augment.one_view, **crop),
        batch_size=c.probe.batch_size,
        seed=c.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=c.data.max_bad_fraction,
      )
    ),
    constants=(opened.variables,),
    evaluators={},
    total_steps=optimizer.train_steps(rule, len(source)),
    batch_size=c.probe.batch_size,
    num_examples=len(source),
    exports=lambda state: {},  # the encoder is that of the run
    check_batch=same.batch_check(source, c.probe.batch_size, c.seed),
  )


def _image(size):
  return jnp.zeros((1, size, size, 3))


def run(workdir, *, step: int | None = None, overrides=()) -> float:
  """The program `simclr probe`: prints and returns the test accuracy of linear evaluation by `config.probe.method`."""
  opened = trained.TrainedRun(workdir, step=step, overrides=overrides)
  c = opened.config
  source, test = splits.check_labeled(c.data, opened.train_source, opened.test_source)
  test_h, test_y = opened.h(test)
  if c.probe.method != "sgd":
    h, y = opened.h(embed.train_examples(source, c))
    l2s = linear.L2_GRID_45 if c.probe.method == "lbfgs_45" else linear.L2_GRID
    classifier = linear.logistic_regression(h, y, num_classes=source.num_classes, l2s=l2s, mesh=opened.mesh)
    how, count = f"L-BFGS, l2 {classifier['l2']:.0e} chosen on held-out training images", len(y)
  else:
    mesh_lib.check_divisible(c.probe.batch_size, opened.mesh, "probe.batch_size")
    source = data.labeled(source)
    # One folder for each encoder, data and settings: a probe never resumes from the classifier of another one.
    made_by = [exporting.checksum(opened.variables), source.fingerprint(), config_lib.to_dict(c)]
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    folder = f"step{opened.step}-{c.probe.train_epochs:g}ep-b{c.probe.batch_size}-lr{c.probe.base_lr:g}-{digest}"
    state, _ = loop.run(
      make_task(opened, source),
      loop.LoopConfig(log_every=c.log.every_steps),
      mesh=opened.mesh,
      workdir=checkpoint.claim_workdir(str(opened.results("probe") / folder), resume=True, overwrite=False),
      config_json=config_lib.to_json(c),
      seed=c.seed,
    )
    classifier = jax.device_get(state.params)
    how, count = f"SGD-Nesterov, {c.probe.train_epochs:g} epochs", len(source)
  value = linear.accuracy(classifier, test_h, test_y)
  print(
    f"linear evaluation ({how}) on h of step {opened.step}: {100 * value:.2f} %  "
    f"({count:,} training images, {len(test_y):,} test images of {splits.describe(c.data, test)})"
  )
  return value


def main(flags, overrides) -> int:
  if flags.of == "transforms":
    transforms.run(flags.workdir, step=flags.step, overrides=overrides, json_file=flags.json)
    return 0
  if flags.json:
    raise UserError("--json needs --of=transforms; linear evaluation prints a single number")
  run(flags.workdir, step=flags.step, overrides=overrides)
  return 0
