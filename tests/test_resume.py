"""A run that is killed and resumed ends exactly, to the bit, where one that was never stopped does."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

CHILD = """
import hashlib, json, os, signal, sys, time
sys.path.insert(0, {tests!r})
import tiny
import jax
from simclr_jax.programs import config, pretrain
from simclr_jax.runtime import loop, mesh

workdir, kill_at = sys.argv[1], int(sys.argv[2])
c = tiny.config(**{{"train_steps": 20, "checkpoint.every_steps": 10, "data.train": "fashion:test"}})
original = pretrain.make_task(c, tiny.source(), mesh=mesh.make_mesh())

def stream(start):
  for step, batch in enumerate(original.stream(start), start + 1):
    if step == kill_at:
      while not os.path.exists(workdir + "/checkpoints/10/manifest.json"):  # which is written in the background
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()
    print("batch", step, digest, flush=True)
    yield batch

task = loop.Task(**{{**vars(original), "stream": stream}})
state, _ = loop.run(task, loop.LoopConfig(log_every=5, checkpoint_every=10, keep=3), mesh=mesh.make_mesh(), workdir=workdir,
                    config_json=config.to_json(c), seed=c.seed)
for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
  print("leaf", jax.tree_util.keystr(path), hashlib.sha256(leaf.tobytes()).hexdigest())
"""


def child(tmp_path, workdir, kill_at=0):
  """Runs 20 steps in a process of its own; returns (exit code, {step: batch hash}, {leaf: hash})."""
  script = tmp_path / "child.py"
  script.write_text(CHILD.format(tests=str(pathlib.Path(__file__).parent)))
  # One compilation serves all three processes.
  env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": one_device_flags()}
  done = subprocess.run(
    [sys.executable, str(script), str(workdir), str(kill_at)], env=env, capture_output=True, text=True
  )
  lines = [line.split() for line in done.stdout.splitlines()]
  batches = {int(line[1]): line[2] for line in lines if line[0] == "batch"}
  leaves = {line[1]: line[2] for line in lines if line[0] == "leaf"}
  return done, batches, leaves


def one_device_flags():
  return os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")


def test_a_killed_run_resumes_to_the_bit(tmp_path):
  done, straight_batches, straight = child(tmp_path, tmp_path / "straight")
  assert done.returncode == 0, done.stderr
  assert len(straight) > 100 and sorted(straight_batches) == list(range(1, 21))

  killed, before, _ = child(tmp_path, tmp_path / "killed", kill_at=13)
  assert killed.returncode == -signal.SIGKILL
  resumed, after, leaves = child(tmp_path, tmp_path / "killed")
  assert resumed.returncode == 0, resumed.stderr
  assert "resuming from step 10" in resumed.stdout
  assert sorted(after) == list(range(11, 21))
  assert before | after == straight_batches
  assert leaves == straight
  steps = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
  assert steps == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_damaged_compiled_program_is_compiled_again(tmp_path):
  done, _, straight = child(tmp_path, tmp_path / "first")
  assert done.returncode == 0, done.stderr
  programs = list((tmp_path / "cache").glob("jit_train_step*-cache"))
  assert programs
  for program in programs:
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
  done, _, leaves = child(tmp_path, tmp_path / "second")
  assert done.returncode == 0, done.stderr
  assert "Error reading persistent compilation cache entry" in done.stderr
  assert leaves == straight
