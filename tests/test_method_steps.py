"""What each method remembers, on a network of two layers: against a NumPy simulation, on 1 and 8 devices, resumed, and in
microbatches.
"""

import functools
import itertools
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import data, methods, model, optimizer, train_step
from simclr_jax.methods import autoencoder
from simclr_jax.programs import pretrain
from simclr_jax.projector import BatchNorm, Projector
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch

N, SIZE, IMAGES = 16, 4, 40
CHANGES = {
  "moco": {"moco.size": 48, "moco.decay": 0.9},
  "moco_v3": {"moco_v3.decay": 0.9, "moco_v3.hidden": 6},
  "byol": {"byol.decay": 0.9, "byol.hidden": 6},
  "instdisc": {"instdisc.negatives": 8, "instdisc.proximal": 0.1},
  "supcon": {},
  "alignment": {},
  "autoencoder": {},
  "tsimcne": {
    "tsimcne.stages": (1.0, 1.0, 2.0),
    "tsimcne.last_lr": 0.5,
    "optimizer.name": "sgd",
    "optimizer.base_lr": 0.01,
  },
}


QUICK = ("moco", "byol", "instdisc")  # with all that is special: a queue, a predictor, a bank
EVERY_METHOD = pytest.mark.parametrize(
  "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)


class Toy(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, name="conv")(x.reshape(len(x), -1))
    return nn.relu(BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))


class Pixels(nn.Module):
  """In place of autoencoder.Decoder, which takes longer to compile."""

  @nn.compact
  def __call__(self, z, views, train=False):
    return jnp.mean(jnp.square(nn.Dense(views[0].size)(z).reshape(views.shape) - views), (1, 2, 3))


def batch_of(step):
  rng = np.random.default_rng(step)
  index = rng.permutation(IMAGES)[:N].astype(np.int32)
  pixels = rng.random((N, 2, SIZE, SIZE, 3), np.float32)
  return Batch(pixels=pixels, label=index % 3, index=index, seed=rng.integers(0, 1000, (N, 2), np.int32))


def make_task(name, mesh, microbatches=1, *, groups=1, zero1=False):
  """(loop.Task, model) of a method on the toy network, by the same steps as pretrain.make_task; groups are those of BatchNorm."""
  config = tiny.config(method=name, train_steps=4, **{"projector.out_dim": 4}, **CHANGES[name])
  method = methods.create(config, mesh, tiny.source(IMAGES))
  predictor = getattr(method, "predictor", None)
  if isinstance(predictor, autoencoder.Decoder):
    predictor = Pixels()
  parts = dict(encoder=Toy(), projector=Projector(2, 4), num_classes=3)
  net = model.WithPredictor(**parts, predictor=predictor) if predictor else model.SimCLR(**parts)
  tx = optimizer.sgd_nesterov(0.01)
  if hasattr(method, "optimizer"):
    tx, _ = method.optimizer(config, IMAGES)
  device = lambda batch: batch.pixels  # noqa: E731
  if microbatches == 1:
    views, network = train_step.unsplit(net, device)
  else:
    options = dict(microbatches=microbatches, devices=mesh.size, batch_norm="exact")
    views, network = train_step.in_microbatches(net, device, **options)
  network = network if groups == 1 else train_step.of_devices(network, groups)
  parts = dict(views=views, network=network, method=method, tx=tx, schedule=lambda step: 0.01)
  return loop.Task(
    init=functools.partial(pretrain.init_state, model=net, method=method, tx=tx, image_size=SIZE),
    step=functools.partial(train_step.train_step, **parts),
    stream=lambda start: map(batch_of, itertools.count(start)),
    evaluators={},
    total_steps=4,
    batch_size=N,
    num_examples=IMAGES,
    exports=lambda state: {"encoder": model.keep_encoder(state)},
    zero1=zero1,
    split=getattr(method, "split", ()),
  ), net


@functools.cache
def train(name, devices=1, microbatches=1, **options):
  """The states after 0, 1, 2 and 3 updates, and the task's network."""
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  task, net = make_task(name, mesh, microbatches, **options)
  like = loop.abstract_state(task, mesh)
  placed = jax.tree.map(lambda x: x.sharding, like)
  state = jax.jit(task.init, out_shardings=placed)(jax.random.key(0))
  step = jax.jit(task.step, out_shardings=(placed, mesh_lib.replicated(mesh)))
  states = [state]
  for k in range(3):
    states.append(step(states[-1], mesh_lib.global_batch(mesh, batch_of(k)))[0])
  return states, net


def outputs_of(net, variables, step, groups=1):
  """(z, updated batch_stats) of the network, whose BatchNorm sees a group of the images at a time.

  In both networks each BatchNorm has momentum 0.9.
  """
  parts = np.split(batch_of(step).pixels, groups)
  found = [jax.device_get(net.apply(variables, part, train=True, mutable=["batch_stats"])) for part in parts]
  stats = {}
  old = flax.traverse_util.flatten_dict(jax.device_get(variables["batch_stats"]))
  of_each = [flax.traverse_util.flatten_dict(updated["batch_stats"]) for _, updated in found]
  batch = {path: np.stack([(each[path] - 0.9 * old[path]) / 0.1 for each in of_each]) for path in old}
  for path, values in batch.items():
    spread = batch[(*path[:-1], "mean")].var(0) if path[-1] == "var" else 0.0
    stats[path] = 0.9 * old[path] + 0.1 * (values.mean(0) + spread)
  return np.concatenate([outputs.z for outputs, _ in found]), {"batch_stats": flax.traverse_util.unflatten_dict(stats)}


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name, start", [("moco", None), ("moco_v3", 0.9), ("byol", 0.9)])
def test_the_averaged_network_and_the_queue_are_those_of_a_simulation(name, start, groups):
  states, net = train(name, **({"groups": groups} if groups > 1 else {}))  # else as in other tests, which share it
  states = jax.device_get(states)
  average, queue = states[0].extra["average"], []
  jax.tree.map(np.testing.assert_array_equal, average["params"], states[0].params)
  for k, state in enumerate(states[1:]):
    z, updated = outputs_of(net, average, k, groups)
    queue = [*unit(z.reshape(2 * N, 4)), *queue]
    decay = 0.9 if start is None else 1 - (1 - start) * (np.cos(np.pi * k / 4) + 1) / 2
    params = jax.tree.map(lambda a, w, d=decay: d * a + (1 - d) * w, average["params"], state.params)
    average = {"params": params, **updated}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.extra["average"], average)
    if name == "moco":
      np.testing.assert_allclose(state.extra["queue"][: len(queue)], queue[:48], atol=1e-5)
      assert state.extra["queued"] == min(32 * (k + 1), 48) and not state.extra["queue"][len(queue) :].any()


def test_the_bank_is_that_of_a_simulation():
  states, net = train("instdisc")
  states = jax.device_get(states)
  bank = states[0].extra["bank"].copy()
  assert bank.shape == (1024, 4) and states[0].extra["normalizer"] == 0
  np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)
  for k, (before, state) in enumerate(itertools.pairwise(states)):
    z, index = outputs_of(net, before.variables, k)[0], batch_of(k).index
    bank[index] = unit(0.5 * bank[index] + 0.5 * unit(z).mean(1))
    np.testing.assert_allclose(state.extra["bank"], bank, atol=1e-5)
    assert state.extra["normalizer"] == states[1].extra["normalizer"] > 0


@EVERY_METHOD
def test_eight_devices_equal_one(name):
  one, eight = (train(name, devices)[0] for devices in (1, 8))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *jax.device_get([(s[-1].params, s[-1].extra) for s in (one, eight)])
  )  # fmt: skip
  for entry in ("queue", "bank"):
    if entry in eight[-1].extra:
      shards = eight[-1].extra[entry].addressable_shards
      assert {len(shard.data) for shard in shards} == {len(eight[-1].extra[entry]) // 8}


@pytest.mark.parametrize("name", ["byol", "tsimcne"])
def test_a_sharded_optimizer_state_changes_nothing(name):
  """Beside an averaged network, and where parts of the network wait for their stage."""
  plain, sharded = train(name)[0][-1], train(name, 8, zero1=True)[0][-1]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *jax.device_get([(s.params, s.opt_state, s.extra) for s in (plain, sharded)])
  )  # fmt: skip
  assert any(len(x.sharding.spec) and not x.is_fully_replicated for x in jax.tree.leaves(sharded.opt_state))


@pytest.mark.parametrize("name", QUICK)
def test_a_run_resumes_to_the_bit(name, tmp_path):
  """On 8 devices, from a checkpoint after 2 of 4 steps."""
  mesh, states = mesh_lib.make_mesh(), []
  for workdir in (tmp_path / "straight", tmp_path / "resumed"):
    config = loop.LoopConfig(log_every=1, checkpoint_every=2, keep=3)
    task, _ = make_task(name, mesh)
    states.append(loop.run(task, config, mesh=mesh, workdir=workdir, config_json="{}", seed=0)[0])
    if workdir.name == "straight":
      shutil.copytree(workdir, tmp_path / "resumed")
      shutil.rmtree(tmp_path / "resumed/checkpoints/4")
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
  assert int(states[1].step) == 4


@EVERY_METHOD
def test_microbatches_change_nothing(name):
  """With BatchNorm over the whole batch, encoding in two parts leaves every method's update as it is."""
  whole, parts = (train(name, microbatches=count)[0][-1] for count in (1, 2))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *jax.device_get([(s.params, s.extra) for s in (whole, parts)])
  )  # fmt: skip


def test_tsimcne_trains_in_three_stages():
  """Of the four updates, 1 is of z, 1 of the output layer alone, and 2 are of everything at half the rate."""
  states, net = train("tsimcne")
  states = jax.device_get(states)

  def moved(before, after, name):
    return max(
      np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(s.params[name]) for s in (before, after)), strict=True)
    )

  first, second, third = itertools.pairwise(states)
  assert moved(*first, "encoder") > 0 and moved(*first, "projector") > 0 and moved(*first, "predictor") == 0
  assert moved(*second, "encoder") == 0 and moved(*second, "projector") == 0 and moved(*second, "predictor") > 0
  assert all(moved(*third, name) > 0 for name in ("encoder", "projector", "predictor", "classifier"))
  assert moved(*second, "classifier") > 0
  outputs = net.apply(states[0].variables, batch_of(0).pixels)
  assert outputs.prediction.shape == (N, 2, 2, 2)
  np.testing.assert_array_equal(outputs.prediction[:, :, 0], outputs.prediction[:, :, 1])


def test_the_schedule_of_tsimcne_starts_again_in_each_stage():
  changes = {"tsimcne.stages": (5.0, 1.0, 4.0), "tsimcne.last_lr": 0.01, "optimizer.warmup_epochs": 1.0}
  config = tiny.config(method="tsimcne", train_steps=100, **changes)
  method = methods.create(config, None, tiny.source(IMAGES))
  assert method.ends == (50, 60)
  _, schedule = method.optimizer(config, IMAGES)
  rates = np.array([schedule(step) for step in (0, 2, 50, 60)]) / config.optimizer.base_lr
  np.testing.assert_allclose(rates, [0, 1, 1, 0.01], atol=1e-6)
  assert schedule(49) < 0.01 * schedule(2) and schedule(59) < 0.03 * schedule(50) and schedule(99) < 0.01 * schedule(60)
  with pytest.raises(ValueError, match="expected at least one step in each stage"):
    methods.create(tiny.config(method="tsimcne", train_steps=4), None, tiny.source(IMAGES))
  with pytest.raises(ValueError, match="config.rollback.spike=6.0: .*the loss jumps where a stage begins"):
    methods.create(tiny.config(method="tsimcne", train_steps=100, **{"rollback.spike": 6.0}), None, tiny.source(IMAGES))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_output_layer_of_tsimcne_begins_at_the_rate_of_its_stage(name):
  """After a first stage in which its gradients are zero, Adam's first step of every weight is as long as the rate."""
  changes = {"tsimcne.stages": (40.0, 5.0, 5.0), "optimizer.warmup_epochs": 0.0, "optimizer.name": name}
  config = tiny.config(method="tsimcne", train_steps=50, **changes)
  method = methods.create(config, None, tiny.source(IMAGES))
  tx, schedule = method.optimizer(config, IMAGES)
  params = {part: {"kernel": jnp.zeros((2, 2))} for part in ("encoder", "projector", "predictor")}
  zeros, ones = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)
  state = tx.init(params)
  for _ in range(method.ends[0]):
    _, state = tx.update({**ones, "predictor": zeros["predictor"]}, state, params)
  updates, _ = tx.update({**zeros, "predictor": ones["predictor"]}, state, params)
  assert method.ends[0] == 40 and schedule(40) > 0
  np.testing.assert_allclose(updates["predictor"]["kernel"], -schedule(40), rtol=1e-5)
  np.testing.assert_array_equal(updates["encoder"]["kernel"], 0)


@pytest.mark.parametrize("name, entry, rows", [("moco", "queue", 64), ("instdisc", "bank", 2048)])
def test_plan_counts_queue_and_bank_as_split(name, entry, rows):
  changes = {"optimizer.warmup_epochs": 0.0} | ({"moco.size": 64} if name == "moco" else {})
  config = tiny.config(method=name, **changes)
  mesh = mesh_lib.make_mesh()
  _, (state, _) = pretrain.abstract_step(config, mesh, data.AbstractSource(2000, 10))
  memory = state.extra[entry]
  assert memory.shape == (rows, 16) and memory.sharding.shard_shape(memory.shape) == (rows // 8, 16)
