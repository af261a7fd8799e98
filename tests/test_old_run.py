"""A run that an earlier version of the package wrote (golden/old_run, version 0.1.0 before its folders were split) resumes.

It had made 4 steps on 8 devices; the checkpoint of step 2 is kept, and the rows of all steps.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
import tiny

from simclr_jax import __main__ as command
from simclr_jax import load_encoder
from simclr_jax.programs import pretrain
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib

VALUES = {
  "data.train": "npz:tiny.npz",
  "data.test": "npz:tiny.npz",
  "batch_size": 16,
  "train_epochs": 0.0,
  "train_steps": 4,
  "augment.size": 16,
  "encoder.width": 0.015625,
  "projector.out_dim": 8,
  "optimizer.base_lr": 2e-3,
  "optimizer.warmup_epochs": 0.2,
  "evaluate.batch_size": 32,
  "evaluate.every_epochs": 0.0,
  "checkpoint.every_epochs": 0.0,
  "checkpoint.every_steps": 2,
  "log.every_steps": 1,
}


@pytest.fixture
def workdir(tmp_path):
  with tarfile.open(pathlib.Path(__file__).parent / "golden" / "old_run" / "run.tar.xz") as tar:
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    tar.extractall(tmp_path / "run", **safely)
  return tmp_path / "run"


def losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_its_state_is_that_of_the_present_code(workdir):
  mesh = mesh_lib.make_mesh()
  task = pretrain.make_task(tiny.config(**VALUES), tiny.source(), mesh=mesh)
  step, state = checkpoint.Checkpoints(workdir).restore_newest(loop.abstract_state(task, mesh))
  assert step == state.step == 2


@pytest.mark.slow
def test_it_resumes_where_it_was(workdir, tmp_path, monkeypatch, capsys):
  before = losses(workdir)
  assert sorted(before) == [1, 2, 3, 4]
  monkeypatch.chdir(tmp_path)
  tiny.npz("tiny.npz")
  overrides = [f"--config.{key}={value}" for key, value in VALUES.items()]
  code = command.main(["pretrain", "--config=smoke", f"--workdir={workdir}", "--resume", *overrides])
  out, err = capsys.readouterr()
  assert code == 0, err
  assert "resuming from step 2 of 4" in out
  after = losses(workdir)
  assert [after[step] for step in (1, 2)] == [before[step] for step in (1, 2)]
  np.testing.assert_allclose([after[3], after[4]], [before[3], before[4]], rtol=1e-4)
  assert (workdir / "checkpoints/4/manifest.json").exists()


def test_its_encoder_opens(workdir):
  apply, variables, card = load_encoder(workdir / "encoder")
  assert apply(np.zeros((2, 16, 16, 3))).shape == (2, card["feature_dimension"])
  step, state = checkpoint.read_run_state(workdir)
  assert step == 2 and set(state["params"]["encoder"]) == set(variables["params"])
  step, again = checkpoint.read_run_export(workdir, "encoder", variables)
  assert step == 2 and set(again) == {"params", "batch_stats"}
