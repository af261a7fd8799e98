"""Every program end to end on a tiny network, and the command line as a user meets it."""

import dataclasses
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import simclr_jax
from simclr_jax import __main__ as cli
from simclr_jax import data, exporting, model
from simclr_jax.evaluation import embed
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import export, knn, pretrain, probe, runs, scores, trained, transforms
from simclr_jax.programs import map as map_lib
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run: (workdir, what pretrain.run returned)."""
  folder = tmp_path_factory.mktemp("run")
  spec = tiny.npz(folder / "tiny.npz")
  config = tiny.config(
    **{"data.train": spec, "data.test": f"{spec}:test", "evaluate.every_steps": 2, "checkpoint.every_steps": 2}
  )
  return folder / "work", pretrain.run(config, folder / "work", recipe="smoke")


def test_pretrain_leaves_everything(finished):
  workdir, result = finished
  for name in ("config.json", "metrics.jsonl", "views.png", "report.html", "scores.json", "encoder/card.json"):
    assert (workdir / name).stat().st_size > 0, name
  assert list(workdir.glob("events.out.tfevents*"))
  rows = metrics_lib.read(workdir)
  assert {"loss", "chance_loss", "contrastive_accuracy", "images_per_second", "data_wait"} <= set(rows[0])
  assert [r["step"] for r in rows if "knn" in r] == [2, 4]
  assert [r["representation"] for r in result["scores"]][:4] == [
    "raw pixels",
    "untrained encoder",
    "z",
    "h",
  ]
  html.parser.HTMLParser().feed((workdir / "report.html").read_text())


def test_the_page_has_map_accuracies_changes_and_the_folder_is_marked(finished):
  workdir, _ = finished
  page = (workdir / "report.html").read_text()
  for heading in ("Map", "Accuracy per class", "Time budget", "Config", "Load the encoder"):
    assert f"<h2>{heading}</h2>" in page
  assert '<th scope="col">recipe</th>' in page and "<code>batch_size</code>" in page
  assert (workdir / "COMPLETE").read_text() == "step 4\n"
  rows = metrics_lib.read(workdir)
  verdicts = [row["verdict"] for row in rows if "verdict" in row]
  assert len(verdicts) == 2 and verdicts[-1] == json.loads((workdir / "scores.json").read_text())["verdict"]
  assert [row["seconds"] for row in rows if "seconds" in row] == sorted(
    row["seconds"] for row in rows if "seconds" in row
  )
  (found,) = runs.find(workdir.parent)
  assert found.complete and found.recipe == "smoke" and (found.step, found.total) == (4, 4)


def test_map_of_a_run(finished, capsys):
  workdir, _ = finished
  found = map_lib.run(workdir, images=20, output=workdir.parent / "map")
  assert len(found["names"]) == 20 and (workdir.parent / "map/map.html").exists()


def test_knn_program_agrees_with_the_run(finished, capsys, monkeypatch):
  workdir, result = finished
  monkeypatch.chdir(workdir.parent)
  value = knn.run(workdir.name)  # a relative path, as people type it
  assert value == pytest.approx(result["scores"][3]["knn"])
  assert f"{100 * value:.2f} %" in capsys.readouterr().out


def test_chance_is_that_of_the_classes_that_are_scored():
  """A set may have names of classes without images."""
  images, names = np.zeros((8, 16, 16), np.uint8), list("abcdefghij")
  train, test = (data.ArraySource(images, labels, class_names=names) for labels in ([0, 1, 2, 4] * 2, [4, 1, 4, 2] * 2))
  assert scores.PretrainEvaluation(tiny.config(), train, test, mesh_lib.make_mesh()).chance() == pytest.approx(1 / 3)


def test_an_encoder_is_scored_as_its_run_and_stays_as_it_was(finished, tmp_path, monkeypatch, capsys):
  workdir, result = finished
  encoder = tmp_path / "encoder"
  shutil.copytree(workdir / "encoder", encoder)
  before = {path: path.stat().st_mtime for path in encoder.rglob("*")}
  assert cli.main(["knn", f"--encoder={encoder}"]) == 0
  assert f"of step 4: {100 * result['scores'][3]['knn']:.2f} %" in capsys.readouterr().out
  assert cli.main(["map", f"--workdir={encoder}", "--images=20"]) == 0
  assert (tmp_path / "encoder.map/map.html").exists()
  assert {path: path.stat().st_mtime for path in encoder.rglob("*")} == before
  assert cli.main(["knn", f"--encoder={encoder}", "--step=4"]) == 1
  assert "holds one encoder" in capsys.readouterr().err
  assert simclr_jax.load_encoder(workdir).card == simclr_jax.load_encoder(encoder).card


def test_an_encoder_of_another_program_is_scored_by_the_data_that_are_named(finished, tmp_path):
  """As of simclr import, which has seen no data."""
  workdir, result = finished
  trained_by, c = simclr_jax.load_encoder(workdir), tiny.config()
  imported = config_lib.from_dict(
    {
      "source": {}, "encoder": config_lib.to_dict(c.encoder), "augment": {"size": 16},
      "evaluate": {"crop": c.evaluate.crop}, "projector": {"kind": "none"},
    }
  )  # fmt: skip
  exporting.write(tmp_path / "official", trained_by.variables, imported, scores={}, step=0)
  with pytest.raises(ValueError, match="config.data.train is missing"):
    knn.run(tmp_path / "official")
  spec = json.loads((workdir / "config.json").read_text())["data"]["train"]
  keys = [
    f"--config.data.train={spec}",
    f"--config.data.test={spec}:test",
    f"--config.evaluate.knn_k={c.evaluate.knn_k}",
  ]
  assert knn.run(tmp_path / "official", overrides=keys) == pytest.approx(result["scores"][3]["knn"])


def test_probe_by_lbfgs_agrees_with_the_run(finished, capsys):
  workdir, result = finished
  assert probe.run(workdir) == pytest.approx(result["scores"][3]["linear"])
  assert "(96 training images, 32 test images of npz:" in capsys.readouterr().out


@pytest.mark.slow
def test_transforms_are_read_from_a_run_and_from_its_export(finished, capsys, tmp_path):
  """A run has h and z, an export has h alone: the same h, so the same scores."""
  workdir, _ = finished
  flags = cli.parser().parse_args(
    ["probe", f"--workdir={workdir}", "--of=transforms", f"--json={tmp_path / 'kept.json'}"]
  )
  assert probe.main(flags, []) == 0
  text = capsys.readouterr().out
  assert "turned by 0, 90, 180 or 270 degrees" in text and "–" in text  # gray images have no hue
  scores = json.loads((tmp_path / "kept.json").read_text())["scores"]
  assert set(scores["rotation"]) == {"h", "z", "chance"} and scores["hue"]["h"] is None
  exported = transforms.run(workdir / "encoder")
  assert set(exported["rotation"]) == {"h"}
  assert exported["rotation"]["h"] == pytest.approx(scores["rotation"]["h"], abs=0.02)


def test_probe_by_sgd_trains_the_classifier_and_nothing_else(finished):
  workdir, _ = finished
  overrides = ["--config.probe.method=sgd", "--config.probe.train_epochs=20.0", "--config.probe.batch_size=32"]
  opened = trained.TrainedRun(workdir, overrides=overrides)
  task = probe.make_task(opened, opened.train_source)
  state = task.init(jax.random.key(0))
  before = jax.device_get(state)
  batch = next(iter(task.stream(0)))
  losses = []
  step = jax.jit(task.step)
  for _ in range(5):
    state, metrics = step(state, batch, *task.constants)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  (frozen,) = task.constants
  jax.tree.map(np.testing.assert_array_equal, frozen, opened.variables)
  assert {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(state)} == {"step", "params", "opt_state"}
  assert not np.array_equal(state.params["kernel"], before.params["kernel"])
  assert 0 <= probe.run(workdir, overrides=overrides) <= 1


def test_export_loads_with_nothing_but_the_folder(finished, tmp_path, capsys):
  workdir, result = finished
  out = tmp_path / "encoder"
  export.run(workdir, out)
  code = capsys.readouterr().out
  assert "load_encoder" in code
  images = np.random.default_rng(0).random((5, 16, 16, 3), np.float32)
  os.rename(out, tmp_path / "moved")
  apply, variables, card = simclr_jax.load_encoder(tmp_path / "moved")
  state = result["state"]
  net = model.create(tiny.config(), 10)
  h, _, _ = net.apply(state.variables, images[:, None], train=False)
  np.testing.assert_allclose(apply(images), h[:, 0], rtol=1e-5, atol=1e-6)
  assert card["feature_dimension"] == apply(images).shape[1]
  assert card["scores"]["h"]["knn"] == pytest.approx(result["scores"][3]["knn"])
  assert {"size", "range", "center_crop", "resize"} <= set(card["preprocessing"])
  names = " ".join(jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables))
  assert "projector" not in names and "classifier" not in names
  with pytest.raises(ValueError, match="is not empty: add --overwrite"):
    export.run(workdir, tmp_path / "moved")


def test_the_printed_snippet_runs(finished):
  code = exporting.snippet(finished[0] / "encoder", 16)
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert re.search(r"\(4, \d+\)", done.stdout)


@pytest.mark.release
def test_profile_tensorboard_and_wandb(tmp_path, monkeypatch):
  """Opt-in: a trace of some steps, pictures in TensorBoard, numbers to a wandb that is made for the occasion."""
  (tmp_path / "wandb.py").write_text(
    "rows, calls = [], []\n"
    "class Run:\n  def log(self, row): rows.append((row['step'], row))\n  def finish(self): calls.append('finish')\n"
    "  def define_metric(self, name, step_metric): calls.append((name, step_metric))\n"
    "def init(**options):\n  calls.append(options)\n  return Run()\n"
  )
  options = ["--config.log.wandb=mine", "--config.log.profile_steps=2"]
  config = config_lib.override(tiny.config(**{"train_steps": 14, "optimizer.warmup_epochs": 0.0}), options)
  with pytest.raises(ValueError, match="config.log.wandb=mine: the package is not installed: pip install wandb"):
    pretrain.run(config, tmp_path / "without")
  monkeypatch.syspath_prepend(tmp_path)
  pretrain.run(config, tmp_path / "run")
  import wandb

  assert wandb.calls[0]["project"] == "mine" and wandb.calls[0]["config"]["train_steps"] == 14
  assert wandb.calls[-1] == "finish" and [step for step, row in wandb.rows if "loss" in row] == list(range(1, 15))
  assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(tmp_path / "run")).Reload()
  assert {"views", "neighbors"} <= {tag.partition("/")[0] for tag in board.Tags()["images"] + board.Tags()["tensors"]}
  assert (tmp_path / "run/neighbors.png").exists()
  from google.protobuf import text_format
  from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

  (h,) = text_format.Parse((tmp_path / "run/projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings
  points = np.loadtxt(tmp_path / "run" / h.tensor_path, delimiter="\t")
  assert points.ndim == 2 and len(points) == len((tmp_path / "run" / h.metadata_path).read_text().split())


@pytest.mark.slow
def test_unlabeled_images(tmp_path):
  """No labels: no classifier and no scores, but a verdict, neighbors, an export and a page."""
  images = np.stack([tiny.source().read(i) for i in range(48)])
  np.savez(tmp_path / "plain.npz", images=images)
  config = tiny.config(**{"data.train": f"npz:{tmp_path / 'plain.npz'}", "data.test": "", "train_steps": 2})
  result = pretrain.run(config, tmp_path / "run")
  assert result["scores"] == [] and "classifier" not in result["state"].params
  verdict = json.loads((tmp_path / "run/scores.json").read_text())["verdict"]
  assert "score" not in verdict and "kNN" not in verdict
  assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/encoder/card.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
  config = tiny.config(**{"train_steps": 6, "checkpoint.every_steps": 2})
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())

  def stream(start):
    for step, batch in enumerate(task.stream(start), start + 1):
      yield batch.replace(pixels=batch.pixels * np.nan) if step == 4 else batch

  with pytest.raises(loop.Diverged, match="loss became nan within steps 4 to 4; step 2 is saved"):
    loop.run(
      loop.Task(**{**vars(task), "stream": stream}),
      loop.LoopConfig(log_every=1, checkpoint_every=2, keep=3),
      mesh=mesh_lib.make_mesh(),
      workdir=tmp_path,
      config_json=config_lib.to_json(config),
      seed=0,
    )
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_a_step_copies_nothing_between_host_and_device(tmp_path, monkeypatch):
  """Under JAX's transfer guard, which refuses the numpy batch that the loop places explicitly before the step."""
  config = tiny.config(train_steps=3)
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())
  update, refused = loop.Loop.update, []

  def guarded(self, batch):
    if self.compiled is None:
      return update(self, batch)
    with jax.transfer_guard("disallow"):
      with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        jax.jit(lambda x: x + 1)(np.ones(3))
      refused.append(self.step)
      return update(self, batch)

  monkeypatch.setattr(loop.Loop, "update", guarded)
  options = dict(mesh=mesh_lib.make_mesh(), config_json=config_lib.to_json(config), seed=0)
  loop.run(task, loop.LoopConfig(log_every=1), workdir=tmp_path, **options)
  assert refused == [2, 3]


def poisoned(task, numbers):
  """The task with batches of these numbers (from 0) turned to NaN."""

  def stream(start):
    for number, batch in enumerate(task.stream(start), start):
      yield batch.replace(pixels=batch.pixels * np.nan) if number in numbers else batch

  return loop.Task(**{**vars(task), "stream": stream})


@pytest.mark.slow
def test_a_run_goes_back_and_past_the_batches_it_fell_over(tmp_path, capsys):
  """With `rollback` it ends as one that never saw the batches since its last checkpoint; also when it is resumed."""
  config = tiny.config(**{"train_steps": 8, "checkpoint.every_steps": 2})
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())
  options = dict(mesh=mesh_lib.make_mesh(), config_json=config_lib.to_json(config), seed=0)
  never = loop.LoopConfig(log_every=2, checkpoint_every=2, keep=9)
  twice = dataclasses.replace(never, rollback=loop.Rollback(times=2))
  # Batches 2 and 3, after step 2, are gone past; then batch 6 is in the update after step 4, at place 4 + 2.
  state, _ = loop.run(poisoned(task, {3, 6}), twice, workdir=tmp_path / "back", **options)
  said = capsys.readouterr().out
  assert (
    "within steps 3 to 4; step 2 is saved" in said and "returning to step 2 and skipping the next 2 batches" in said
  )
  assert json.loads((tmp_path / "back/skipped.json").read_text()) == [[2, 2], [4, 2]]

  def without(start):
    kept = [0, 1, 4, 5, 8, 9, 10, 11]
    for step in range(start, 8):
      yield next(iter(task.stream(kept[step])))

  expected, _ = loop.run(loop.Task(**{**vars(task), "stream": without}), never, workdir=tmp_path / "without", **options)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
  rows = [json.loads(line)["step"] for line in (tmp_path / "back/metrics.jsonl").read_text().splitlines()]
  assert rows == [2, 4, 6, 8]
  # A resumed run leaps at the same place: from step 2, before the second leap.
  shutil.copytree(tmp_path / "back", tmp_path / "again")
  for step in (4, 6, 8):
    shutil.rmtree(tmp_path / f"again/checkpoints/{step}")
  resumed, _ = loop.run(poisoned(task, {3, 6}), twice, workdir=tmp_path / "again", **options)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(expected))
  with pytest.raises(loop.Diverged, match="step 8 is saved|step 6 is saved|step 4 is saved"):
    loop.run(poisoned(task, {3, 6, 8}), twice, workdir=tmp_path / "thrice", **options)


@pytest.mark.slow
def test_a_run_that_diverged_goes_on_with_rollback_given_on_resume(tmp_path, monkeypatch):
  """Without it, it falls over the same batch again; config.json, run.json and the page say what was given."""
  spec, workdir, make_task = tiny.npz(tmp_path / "tiny.npz"), tmp_path / "run", pretrain.make_task
  monkeypatch.setattr(pretrain, "make_task", lambda *args, **options: poisoned(make_task(*args, **options), {3}))
  recipe = config_lib.load("smoke")
  config = tiny.config(**{"data.train": spec, "data.test": f"{spec}:test", "checkpoint.every_steps": 2})
  given = config_lib.replace(config, {"rollback.times": 1})
  with pytest.raises(loop.Diverged, match="within steps 4 to 4; step 2 is saved; resume with rollback.times=3, or"):
    pretrain.run(config, workdir, recipe="smoke")
  with pytest.raises(loop.Diverged, match="step 2 is saved"):
    pretrain.run(config, workdir, resume=True)
  assert int(pretrain.run(given, workdir, resume=True)["state"].step) == 4
  assert json.loads((workdir / "skipped.json").read_text()) == [[2, 2]] and (workdir / "COMPLETE").exists()
  assert config_lib.from_json(checkpoint.read_config(workdir)) == given
  changes = json.loads((workdir / "run.json").read_text())["changes"]
  assert sorted(changes) == sorted(map(list, config_lib.difference(recipe, given)))
  assert "<code>rollback.times</code>" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_a_leap_of_the_loss_counts_as_divergence(tmp_path):
  config = tiny.config(**{"train_steps": 140})

  def step(state, batch):
    loss = 2.0 + 0.1 * jnp.sin(state.step) + jnp.where(state.step == 135, 1.0, 0.0)
    return state.replace(step=state.step + 1), {"loss": loss}

  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())
  task = loop.Task(**{**vars(task), "step": step, "total_steps": 140})
  options = dict(mesh=mesh_lib.make_mesh(), config_json=config_lib.to_json(config), seed=0)
  loop.run(task, loop.LoopConfig(log_every=10), workdir=tmp_path / "off", **options)
  with pytest.raises(loop.Diverged, match="became 3.* within steps 131 to 140, 6 standard deviations above"):
    wary = loop.LoopConfig(log_every=10, rollback=loop.Rollback(spike=6.0))
    loop.run(task, wary, workdir=tmp_path / "on", **options)


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "argv, message",
  [
    (["pretrain", "--config=configs/smoke.py", "--config.optimizer.nmae=x"], "did you mean config.optimizer.name?"),
    (["pretrain", "--config=nowhere"], "no such recipe"),
    (["pretrain", "--config=smoke", "--config.batch_size=12"], "cannot be split over 8 devices: use 8 or 16"),
    (["pretrain", "--config=smoke", "--config.data.train=folder:/no/such"], "/no/such"),
    (["pretrain", "--config=smoke", "--config.encoder.depth=51"], "config.encoder.depth=51: expected one of 18"),
    (["pretrain", "--config=smoke", "--config.augment.color_strength=9.0"], "color_strength=9.0"),
    (["pretrain", "--config=smoke", "--config.optimizer.name=lasr"], "expected one of lars"),
    (["knn"], "no run here"),
  ],
)
def test_mistakes_are_one_line_and_touch_nothing(argv, message, tmp_path, capfd):
  workdir = tmp_path / "run"
  assert cli.main([*argv, f"--workdir={workdir}"]) == 1
  error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("simclr: ")]
  assert len(error) == 1 and message in error[0]
  assert not workdir.exists()


def test_empty_folder(tmp_path, capfd):
  (tmp_path / "images").mkdir()
  argv = ["pretrain", "--config=smoke", f"--config.data.train=folder:{tmp_path / 'images'}", "--config.data.test="]
  assert cli.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 1
  assert str(tmp_path / "images") in capfd.readouterr().err


def test_resume_with_another_config_is_refused(finished, capfd):
  workdir, _ = finished
  assert cli.main(["pretrain", "--config=smoke", f"--workdir={workdir}", "--resume"]) == 1
  assert "in the run and" in capfd.readouterr().err
  assert cli.main(["pretrain", "--config=smoke", f"--workdir={workdir}"]) == 1
  assert "--resume" in capfd.readouterr().err


def test_resuming_takes_everything_from_the_folder(finished, tmp_path, capfd, monkeypatch):
  workdir, _ = finished
  with pytest.raises(SystemExit):
    cli.main(["pretrain", f"--workdir={workdir}"])
  assert "--config is missing: name a recipe, or resume" in capfd.readouterr().err
  called = []
  with monkeypatch.context() as patch:
    patch.setattr(pretrain, "run", lambda config, workdir, **options: called.append((config, options)))
    assert cli.main(["pretrain", "--resume", f"--workdir={workdir}"]) == 0
  said = capfd.readouterr().out
  assert "recipe      smoke, made for two CPU cores; 5 to 6 minutes" in said and ", batch_size=16, " in said
  ((config, options),) = called
  assert config_lib.to_json(config) == (workdir / "config.json").read_text()
  assert options == {"resume": True, "overwrite": False, "recipe": "smoke"}
  assert cli.main(["pretrain", "--resume", f"--workdir={workdir}", "--config.batch_size=8"]) == 1
  assert "--resume: config.batch_size is 16 in the run and 8 now" in capfd.readouterr().err
  assert cli.main(["finetune", "--resume", f"--workdir={workdir}"]) == 1
  assert f"--workdir={workdir} is a run of simclr pretrain" in capfd.readouterr().err
  assert cli.main(["pretrain", "--resume", f"--workdir={tmp_path / 'none'}"]) == 1
  assert "no run here" in capfd.readouterr().err


def test_runs_that_hold_no_encoder_say_what_to_give_instead(tmp_path):
  for recipe, words in (
    (("transfer", ["--config.start=runs/mine"]), "of simclr transfer: it scores the encoder of runs/mine: give that"),
    (("downstream",), "of simclr downstream: give a run that it consists of, such as /.*/seed0/pretrain$"),
  ):
    checkpoint.write_config(tmp_path, config_lib.to_json(config_lib.load(*recipe)))
    for opened in (trained.TrainedRun, lambda workdir: export.run(workdir, tmp_path / "out")):
      with pytest.raises(ValueError, match=words):
        opened(tmp_path)


@pytest.mark.parametrize("recipe", ["open({touched!r}, 'w')\n", "open({touched!r}, 'w')\nraise OSError\n", "def (\n"])
def test_resuming_does_not_run_the_recipe_that_the_folder_names(recipe, tmp_path, capfd, monkeypatch):
  """The folder may come from elsewhere; and a recipe that was edited since, or is gone, keeps nobody from resuming."""
  workdir, file, touched = tmp_path / "run", tmp_path / "recipe.py", tmp_path / "touched"
  workdir.mkdir()
  file.write_text(recipe.format(touched=str(touched)))
  config = tiny.config()
  checkpoint.write_config(workdir, config_lib.to_json(config))
  called = []
  monkeypatch.setattr(pretrain, "run", lambda config, workdir, **options: called.append((config, options)))
  for about, said in (({"changes": [["batch_size", 8, 16]]}, "changed     batch_size=16\n"), ({}, "")):
    (workdir / "run.json").write_text(json.dumps({"recipe": str(file), **about}))
    assert pretrain.changes_of(str(file), config, workdir, True) == about.get("changes")
    assert cli.main(["pretrain", "--resume", f"--workdir={workdir}"]) == 0
    assert capfd.readouterr().out.endswith(f"recipe      {file}\n{said}")
  assert not touched.exists()
  assert [options["recipe"] for _, options in called] == [str(file)] * 2
  file.unlink()
  assert cli.main(["pretrain", "--resume", f"--workdir={workdir}"]) == 0
  assert called[-1] == (config, {"resume": True, "overwrite": False, "recipe": ""})


def test_the_page_says_how_long_the_run_was():
  assert pretrain.length(tiny.config(train_epochs=16.0, train_steps=0)) == "16 epochs"
  assert pretrain.length(tiny.config(train_epochs=16.0, train_steps=5000)) == "5,000 steps"


def test_transforms_are_predicted_from_the_images_of_all_processes(monkeypatch):
  """Each of two processes has half of the rows of a batch."""
  mesh, config = mesh_lib.make_mesh(), tiny.config(**{"evaluate.batch_size": 8})
  alone = transforms._images(tiny.source(16), 16, config, mesh)
  halves = []
  for i in range(2):
    with monkeypatch.context() as patch:
      patch.setattr(jax, "process_index", lambda i=i: i)
      patch.setattr(jax, "process_count", lambda: 2)
      halves.append(list(embed.eval_set(tiny.source(16), config, mesh).batches()))
  rows = {key: iter([np.concatenate(pair) for pair in zip(*([b[key] for b in half] for half in halves), strict=True)]) for key in ("image", "mask")}  # fmt: skip
  with monkeypatch.context() as patch:
    patch.setattr(jax, "process_index", lambda: 0)
    patch.setattr(jax, "process_count", lambda: 2)
    patch.setattr(transforms.processes, "gather_rows", lambda x: next(rows["image" if x.ndim == 4 else "mask"]))
    np.testing.assert_array_equal(transforms._images(tiny.source(16), 16, config, mesh), alone)


def test_sigterm_saves_and_exits_42(tmp_path):
  """Through the real command: stopped in the middle, saved, and resumable; although nobody reads its output any more."""
  changes = {"batch_size": 16, "train_steps": 5000, "augment.size": 16, "encoder.width": 0.0625}
  argv = [f"--config.{k}={v}" for k, v in changes.items()]
  argv += ["--config.log.every_steps=1", "--config.evaluate.every_epochs=0.0", f"--workdir={tmp_path / 'run'}"]
  process = subprocess.Popen(
    [sys.executable, "-m", "simclr_jax", "pretrain", "--config=smoke", *argv],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  rows = tmp_path / "run/metrics.jsonl"
  deadline = time.monotonic() + 240
  while not (rows.exists() and rows.read_text().count("\n") >= 3) and time.monotonic() < deadline:
    time.sleep(0.2)
  assert process.stdout and process.stderr
  process.stdout.close()
  while rows.read_text().count("\n") < 15 and time.monotonic() < deadline:
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  stderr = process.stderr.read()
  assert process.wait(timeout=60) == 42, stderr
  assert "SIGTERM: stopping after this step; a second signal stops at once" in stderr
  step = int(re.search(r"SIGTERM: stopped after step (\d+) and saved it; resume with --resume", stderr)[1])
  assert (tmp_path / f"run/checkpoints/{step}").is_dir()
  assert json.loads(rows.read_text().splitlines()[-1])["step"] == step


def test_help_is_fast_and_imports_nothing_heavy():
  code = "import sys; from simclr_jax import __main__ as m; m.parser(); print([x for x in ('jax', 'tensorflow', 'numpy') if x in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
