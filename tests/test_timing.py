"""simclr time: real steps on what is here, and what is advised of any measurement."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from simclr_jax import __main__ as cli
from simclr_jax import contrast
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import plan, pretrain, timing
from simclr_jax.runtime import aot, errors
from simclr_jax.runtime import mesh as mesh_lib

VIT = {"encoder.depth": None, "encoder.width": 1.0, "encoder.stem": "imagenet", "encoder.name": "vit", "encoder.size": "Ti", "encoder.patch": 4}  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def brief(monkeypatch):
  one = mesh_lib.make_mesh(jax.devices()[:1])
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda: one)
  monkeypatch.setattr(timing, "STEPS", 3)
  monkeypatch.setattr(timing, "SECONDS", 0.2)


def test_it_times_the_steps_that_pretrain_makes(tmp_path, brief, capsys):
  changes = {
    "augment.extra": (("sobel", 0.1),),
    "loss.name": "decoupled",
  }  # no forms of NT-Xent: one program to compile
  changes |= {"loss.normalize": None, "loss.reduction": None, "loss.precision": None}
  config = tiny.config(**{"data.train": tiny.npz(tmp_path / "tiny.npz")}, **changes)
  result = timing.run(config, json_file=str(tmp_path / "time.json"))
  said = capsys.readouterr().out
  assert json.loads((tmp_path / "time.json").read_text()) == result
  recipe, device = result["rows"]  # on a CPU the packed arrangement is timed when it is asked for
  assert recipe["what"] == "the recipe as it is" and not recipe["changes"]
  # Further operators are made on the host alone.
  assert device["changes"] == {"augment.where": "device"} and "host" in device["refused"]
  assert recipe["fastest"] <= recipe["step_seconds"] <= recipe["slowest"] and recipe["steps"] == 3
  assert recipe["images_per_second"] == pytest.approx(tiny.BATCH / recipe["step_seconds"])
  assert recipe["run_images_per_second"] < min(recipe["images_per_second"], recipe["pipeline_images_per_second"])
  assert recipe["estimated_seconds"] is None and recipe["program_bytes"] > 0
  for text in ("devices     1 x cpu", "not possible, ", "estimate    none", "noise ", "advice      "):
    assert text in said
  assert "measured/estimate" not in said


def test_which_settings_are_timed():
  mesh = mesh_lib.make_mesh(jax.devices()[:1])
  texts = lambda config, **flags: [plan.changes_text(c) or form for c, form in timing.cases(config, mesh, **flags)]  # noqa: E731
  assert texts(tiny.config()) == ["", "--config.augment.where=device", "tiled"]
  assert texts(tiny.config(), packed=True)[1] == "--config.encoder.arrangement=packed"
  packed = tiny.config(**{"encoder.arrangement": "packed", "augment.where": "resident", "batch_size": 1024})
  assert texts(packed, packed=True) == [
    *(
      "",
      "--config.encoder.arrangement=plain",
      "--config.augment.where=host",
      "--config.augment.where=device",
      "dense",
    ),
  ]
  assert texts(tiny.config(**{"loss.name": "decoupled"}))[-1] == "--config.augment.where=device"


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_a_form_is_forced_whatever_the_size_of_the_batch(form):
  """Both have the loss that the recipe has."""
  config, mesh = tiny.config(), mesh_lib.make_mesh(jax.devices()[:1])
  task = pretrain.make_task(config, tiny.source(), mesh=mesh)
  forced = timing._with_form(task, config, mesh, form)
  z = np.random.default_rng(0).normal(size=(16, 2, 8)).astype(np.float32)
  method = forced.step.keywords["method"]
  assert method.contrastive.func is {"dense": contrast.nt_xent, "tiled": contrast.nt_xent_tiled}[form]
  expected, _ = jax.jit(task.step.keywords["method"].contrastive)(z)
  np.testing.assert_allclose(jax.jit(method.contrastive)(z)[0], expected, rtol=1e-6)


def row(what, rate, pipeline=1e6, spread=0.0, form="", **more):
  changes = {} if form or what == "the recipe as it is" else {what: 1}
  base = {"what": what, "changes": changes, "form": form, "spread": spread, "images_per_second": rate}
  return base | {"pipeline_images_per_second": pipeline, "run_images_per_second": min(rate, pipeline)} | more


def test_settings_that_do_not_fit_are_named_and_the_others_are_timed(tmp_path, monkeypatch, capsys):
  measured = dict(step_seconds=0.1, fastest=0.1, slowest=0.1, spread=0.0, images_per_second=160.0, steps=3)
  measured |= dict(
    pipeline_images_per_second=1000.0, run_images_per_second=150.0, program_bytes=1, estimated_seconds=None
  )

  class Step:
    def __init__(self, config, source, mesh, form=""):
      if config.augment.where == "device":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes")

    def measure(self):
      return measured

    def seconds(self):
      return np.asarray([0.1])

  monkeypatch.setattr(timing, "Step", Step)
  rows = timing.run(tiny.config(**{"data.train": tiny.npz(tmp_path / "tiny.npz")}))["rows"]
  assert [row["refused"] for row in rows if "refused" in row] == ["out of memory"] and len(rows) > 2
  assert "not possible, out of memory" in capsys.readouterr().out


def test_what_is_advised():
  recipe = row("the recipe as it is", 1000)
  assert timing.advice([recipe, row("A", 1020)]).startswith("Keep the recipe's settings")
  assert (
    timing.advice([recipe, row("A", 1100), row("B", 1300)]) == "Set B: 30% more images/s than with the recipe as it is."
  )
  # Neither noise within the recipe's steps nor between its first and its last ones is an advantage.
  assert "Keep" in timing.advice([row("the recipe as it is", 1000, spread=0.5), row("A", 1300)])
  assert "Keep" in timing.advice([recipe, row("A", 1300)], drift=0.4)
  # The pipeline counts: a faster step gains nothing where images do not come.
  starved = row("the recipe as it is", 1000, pipeline=500)
  text = timing.advice([starved, row("A", 2000, pipeline=500), row("B", 900, pipeline=800)])
  assert text.startswith("Set B: 60% more") and "it waits 11% of the time" in text
  text = timing.advice([recipe, row("NT-Xent tiled", 1500, form="tiled"), {"what": "C", "refused": "no"}])
  assert text.startswith("Keep") and "the tiled one is 50% faster here" in text


def test_estimates_stand_beside_what_was_measured_on_a_tpu():
  assert aot.chip_of("TPU v4") is aot.CHIPS["v4"] and aot.chip_of("TPU v5 lite") is aot.CHIPS["v5e"]
  assert aot.chip_of("cpu") is None and aot.chip_of("NVIDIA H100") is None
  times = {"step_seconds": 0.03, "fastest": 0.029, "slowest": 0.04, "program_bytes": 2**30}
  text = timing.table([row("the recipe as it is", 1000, **times, estimated_seconds=0.02)])
  assert "measured/estimate" in text and " 1.5" in text and "30 (29-40)" in text
  resident = row("A", 1000, **times, estimated_seconds=None) | {"pipeline_images_per_second": None}
  assert "estimate" not in timing.table([resident]) and " - " in timing.table([resident])


@pytest.mark.release
def test_several_processes_time_together(tmp_path):
  """As the workers of a pod: both make the same steps, and the first one speaks."""
  values = {"data.train": tiny.npz(tmp_path / "tiny.npz"), "data.test": "", "batch_size": 16, "augment.size": 16}
  values |= {"encoder.width": 0.0625, "projector.out_dim": 16}
  values["augment.extra"] = (("sobel", 0.1),)  # not on the device: one program less to compile
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "simclr_jax", "time", "--config=smoke", f"--json={tmp_path / 'time.json'}"]
  command += [*(f"--config.{key}={value}" for key, value in values.items()), f"--coordinator=localhost:{port}"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  both = [
    subprocess.Popen([*command, "--num_processes=2", f"--process_id={i}"], env=environment, cwd=tmp_path, **pipes)
    for i in range(2)
  ]
  said = [process.communicate(timeout=600) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert "advice      " in said[0][0] and "advice" not in said[1][0]
  assert len(json.loads((tmp_path / "time.json").read_text())["rows"]) == 3


def test_mistakes_are_one_line(tmp_path, capsys):
  assert cli.main(["time", "--config=finetune"]) == 1
  assert "is a recipe for simclr finetune" in capsys.readouterr().err
  config = config_lib.replace(tiny.config(), {"data.train": tiny.npz(tmp_path / "tiny.npz"), "batch_size": 12})
  for changes, words in (
    ({}, "batch_size=12"),
    ({"batch_size": 16, "augment.where": "device", "augment.one_sided": True}, "one_sided"),
    ({"batch_size": 16, **VIT, "augment.size": 18}, "18"),
  ):
    with pytest.raises(errors.UserError, match=words) as refused:
      timing.run(config_lib.replace(config, changes))
    assert "\n" not in str(refused.value)
