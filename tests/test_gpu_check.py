"""The command that measures everything on a GPU, rehearsed on a CPU at a size that proves nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_whole_check_runs(tmp_path):
  command = [sys.executable, "-m", "benchmarks.gpu.check", "--tiny", "--minutes=30", f"--output={tmp_path / 'a.json'}"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=1"}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  found = json.loads((tmp_path / "a.json").read_text())
  errors = {stage: value["error"] for stage, value in found.items() if isinstance(value, dict) and "error" in value}
  errors.pop("torch_resnet50", None)  # which this environment may not have
  assert not errors, done.stdout
  assert found["numbers"]["relative_differences"]["float32"]["gradients"] == 0  # the CPU against itself
  assert found["losses"]["value"] < 1e-5 and found["losses"]["gradient"] < 1e-5
  assert found["cifar_speed"]["seconds_an_epoch"] > 0 and found["cifar_training"]["scores"]
  assert set(found["flags"]["of_none"]) == {"none", "--xla_gpu_enable_latency_hiding_scheduler=true"}
