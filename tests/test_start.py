"""Pretraining from given weights: what is taken over, what is held, what is refused, and that resuming is exact."""

import contextlib
import shutil
import time

import jax
import numpy as np
import pytest
import tiny

from simclr_jax import encoder, load_encoder, vit
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import export, pretrain, quickstart, same, trained
from simclr_jax.runtime import checkpoint
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def first(tmp_path_factory, one_device):
  """(the folder of a run of four steps, its config)."""
  here = tmp_path_factory.mktemp("first")
  spec = tiny.npz(here / "tiny.npz")
  config = tiny.config(**{"data.train": spec, "data.test": f"{spec}:test"})
  pretrain.run(config, here / "run")
  return here / "run", config


def started(first, **changes):
  """(state at step 0, the task) of a run that starts from the first one."""
  run, config = first
  config, start = pretrain.open_start(config_lib.replace(config, {"start": str(run), **changes}))
  mesh = mesh_lib.make_mesh()
  task = pretrain.make_task(config, tiny.source(), mesh=mesh, start=start)
  return task.warm_start(jax.jit(task.init)(jax.random.key(5))), task


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("method", ["simclr", "memory", "byol"])
@pytest.mark.parametrize("keep_head", [False, True])
def test_what_is_taken_over(first, method, keep_head):
  state, _ = started(first, keep_head=keep_head, method=method, **({"memory.size": 64} if method == "memory" else {}))
  found = trained.open_start(first[0]).variables
  assert equal(state.params["encoder"], found["encoder"]["params"])
  assert equal(state.batch_stats["encoder"], found["encoder"]["batch_stats"])
  assert equal(state.params["projector"], found["projector"]["params"]) == keep_head
  if method != "simclr":  # moving averages begin at the weights that training begins at
    assert equal(state.extra["average"]["params"]["encoder"], state.params["encoder"])
  assert state.step == 0


def test_a_plan_is_of_the_network_of_the_start(first):
  run, config = first
  changes = {"start": str(run), "encoder.width": 1.0, "encoder.depth": 50, "keep_head": True}
  found = pretrain.from_random_weights(config_lib.replace(config, changes))
  assert (found.encoder.depth, found.encoder.width, found.start, found.keep_head) == (18, 0.0625, "", False)
  with pytest.raises(UserError, match="nowhere"):
    pretrain.from_random_weights(config_lib.replace(config, {"start": "nowhere"}))


def test_a_head_is_kept_in_safetensors_too(first, tmp_path):
  run, _ = first
  export.run(output=tmp_path / "out", workdir=run, formats=["safetensors"], head=True)
  found, expected = (trained.open_start(path).variables["projector"] for path in (tmp_path / "out", run))
  assert equal(found, expected)


def test_the_architecture_is_that_of_the_start_but_not_how_it_computes(first):
  run, config = first
  changes = {"start": str(run / "encoder"), "encoder.width": 1.0, "encoder.depth": 50, "encoder.dtype": "bfloat16"}
  changes |= {"encoder.arrangement": "packed"}
  config, _ = pretrain.open_start(config_lib.replace(config, changes))
  assert (config.encoder.depth, config.encoder.width, config.encoder.dtype) == (18, 0.0625, "bfloat16")
  assert config.encoder.arrangement == "packed"


@pytest.mark.slow
def test_the_encoder_waits_for_the_head(first):
  state, task = started(first, head_epochs=1 / 3, **{"optimizer.warmup_epochs": 0.0})  # two steps of 16 of 96 images
  step = jax.jit(task.step)
  moved = []
  for batch in (next(iter(task.stream(i))) for i in range(3)):
    after, _ = step(state, batch)
    moved.append([not equal(after.params[name], state.params[name]) for name in ("encoder", "projector")])
    state = after
  assert moved == [[False, True], [False, True], [True, True]]


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"start": "", "keep_head": True}, "config.keep_head=True: there is nothing to start from"),
    ({"start": "", "head_epochs": 1.0}, "config.head_epochs=1.0: there is nothing to start from"),
    ({"start": "nowhere"}, "nowhere"),
  ],
)
def test_mistakes(first, changes, words):
  with pytest.raises(UserError, match=words):
    pretrain.run(config_lib.replace(first[1], changes), "unused")


def test_a_head_that_is_trained_alone_for_the_whole_run_is_refused():
  for epochs, fits in ((0.5, True), (2 / 3, False), (9.0, False)):  # 3, 4 and 54 of 4 steps
    config = tiny.config(start="x", head_epochs=epochs)
    with (
      contextlib.nullcontext() if fits else pytest.raises(UserError, match="the run has 4, so the encoder would never")
    ):
      pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())


def test_there_is_a_head_to_train_alone():
  for changes, fits in (
    ({}, True),
    ({"projector.kind": "none"}, False),
    ({"projector.kind": "none", "method": "byol"}, True),
    ({"projector.kind": "none", "method": "oracle"}, False),
  ):
    config = tiny.config(start="x", head_epochs=0.5, **changes)
    words = "head_epochs=0.5: with config.projector.kind=none there is no head to train"
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match=words):
      pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())


@pytest.mark.parametrize("keep_head", [False, True])
def test_a_begun_run_does_not_need_its_start(tmp_path, keep_head):
  """Its config names the networks; only where no checkpoint can be loaded, the start is opened after all."""
  export_of = tiny.export(tmp_path / "start")
  given = tiny.config(
    start=str(export_of), **{"encoder.width": 1.0, "encoder.dtype": "bfloat16", "projector.out_dim": 8}
  )
  (tmp_path / "run/checkpoints").mkdir(parents=True)
  begun, _ = pretrain.open_start(given)
  checkpoint.write_config(tmp_path / "run", config_lib.to_json(begun))
  shutil.rmtree(export_of)
  for config in (given, begun):
    found = trained.as_begun(config, tmp_path / "run", ("encoder",))
    assert found == begun and found.encoder.width == 0.0625 and found.encoder.dtype == "bfloat16"
  other = trained.as_begun(config_lib.replace(begun, {"encoder.dtype": "float32"}), tmp_path / "run", ("encoder",))
  with pytest.raises(UserError, match="encoder.dtype is 'bfloat16' in the run and 'float32' now"):
    same.same_config(other, tmp_path / "run")
  task = pretrain.make_task(begun, tiny.source(), mesh=mesh_lib.make_mesh())
  with pytest.raises(UserError, match="no run here"):
    task.warm_start(None)


@pytest.mark.slow
def test_a_run_from_an_export_resumes_without_its_start_and_does_not_replace_it(first, tmp_path):
  run, config = first
  start = shutil.copytree(run / "encoder", tmp_path / "start")
  config = config_lib.replace(config, {"start": str(start), "checkpoint.every_steps": 2, "checkpoint.keep": 3})
  straight = pretrain.run(config, tmp_path / "straight")["state"]
  pretrain.run(config, tmp_path / "resumed")
  for folder in (tmp_path / "resumed/checkpoints").glob("4*"):
    shutil.rmtree(folder)
  (tmp_path / "resumed/COMPLETE").unlink()
  assert not equal(load_encoder(start)[1]["params"], straight.params["encoder"])
  shutil.rmtree(start)
  assert equal(pretrain.run(config, tmp_path / "resumed", resume=True)["state"].params, straight.params)
  assert not equal(load_encoder(run / "encoder")[1]["params"], straight.params["encoder"])
  with pytest.raises(UserError):
    pretrain.run(config_lib.replace(config, {"start": str(run)}), run, overwrite=True)


def test_stages_of_encoders():
  stage = encoder.resnet(18).stage
  assert [stage(name) for name in ("stem_conv", "stem_norm1", "group1", "group4")] == [0, 0, 1, 4]
  names = ("patch_embed", "class_token", "block1", "block3", "block4", "block12", "norm")
  assert [vit.vit("Ti", patch=8).stage(name) for name in names] == [0, 0, 1, 1, 2, 4, float("inf")]


def test_quickstart_trains_on(first, monkeypatch):
  run, _ = first
  monkeypatch.setattr(quickstart, "seconds_a_step", lambda *_: 0.01)
  config, why = quickstart.choose(tiny.source(), "files:x", mesh_lib.make_mesh(), 2.0, time.monotonic(), str(run))
  assert (config.start, config.augment.size) == (str(run), 16) and config.head_epochs > 0
  assert ("network", f"the encoder of {run} on views of 16 pixels", "training resumes from it") in why
  assert pretrain.open_start(config)[0].encoder.width == 0.0625
