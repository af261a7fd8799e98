"""Several processes are one run: the same numbers as in one process, and none outlives a fault of another for long."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = 8
STEPS, SAVE_EVERY = 12, 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  images = tiny.source()
  np.savez(folder / "images.npz", images=np.stack([images.read(i) for i in range(len(images))]))
  return folder


class Group:
  """`simclr pretrain` (or `flags` of another program) in so many processes, with eight devices among them."""

  def __init__(self, shared, workdir, processes, *, steps=STEPS, environment=(), flags=(), last=(), **changes):
    values = {
      "data.train": f"npz:{shared / 'images.npz'}",
      "data.test": "",
      "batch_size": 16,
      "train_epochs": 0.0,
      "train_steps": steps,
      "augment.size": 16,
      "encoder.width": 0.0625,
      "projector.out_dim": 16,
      "optimizer.base_lr": 1e-3,  # a rate at which rounding errors do not grow
      "evaluate.batch_size": 40,
      "evaluate.every_epochs": 0.0,
      "checkpoint.every_epochs": 0.0,
      "checkpoint.every_steps": SAVE_EVERY,
      "checkpoint.keep": STEPS // SAVE_EVERY,
      "log.every_steps": 1,
      **changes,
    }
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    flags = list(flags) or ["pretrain", "--config=smoke", *(f"--config.{key}={value}" for key, value in values.items())]
    self.processes, self.logs = [], []
    for i in range(processes):
      several = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
      command = [sys.executable, "-m", "simclr_jax", *flags, f"--workdir={workdir}", "--resume"]
      self.logs.append(workdir.with_name(f"{workdir.name}.{processes}.{i}.log"))
      self.processes.append(
        subprocess.Popen(
          command + (several if processes > 1 else []) + (list(last) if i == processes - 1 else []),
          cwd=ROOT,
          env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} --xla_backend_optimization_level=1",
            "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **dict(environment),
          },
          stdout=self.logs[-1].open("w"),
          stderr=subprocess.STDOUT,
        )
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for p in self.processes:
      p.kill()
      p.wait()

  def wait(self, timeout=400):
    """Exit codes; and what the processes printed goes into an assertion that fails."""
    end = time.monotonic() + timeout
    codes = [p.wait(timeout=max(1, end - time.monotonic())) for p in self.processes]
    print(self.text())
    return codes

  def text(self):
    return "\n".join(log.read_text() for log in self.logs)

  def wait_for_step(self, workdir, step, timeout=400):
    end = time.monotonic() + timeout
    while time.monotonic() < end and all(p.poll() is None for p in self.processes):
      if rows(workdir) and rows(workdir)[-1]["step"] >= step:
        return
      time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached:\n{self.text()}")


def rows(workdir):
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parameters(workdir, step):
  from simclr_jax.runtime import checkpoint

  path = checkpoint.folder(workdir) / str(step) / "encoder"
  import jax
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)
    return jax.tree.map(np.asarray, checkpointer.restore(path, like))


@pytest.fixture(scope="module")
def one_process(shared):
  with Group(shared, shared / "one", 1) as group:
    assert group.wait() == [0]
  return shared / "one"


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_does_not_matter(shared, one_process, processes):
  workdir = shared / f"of{processes}"
  with Group(shared, workdir, processes) as group:
    assert group.wait() == [0] * processes
  for row, expected in zip(rows(workdir), rows(one_process), strict=True):
    assert row.keys() == expected.keys()
    for key in ("loss", "contrastive_accuracy", "grad_norm", "embedding_std", "alignment"):
      if key in row:
        np.testing.assert_allclose(row[key], expected[key], rtol=1e-4, err_msg=key)  # the order of sums
  close(parameters(workdir, STEPS), parameters(one_process, STEPS))
  assert (workdir / "report.html").exists() and (workdir / "encoder" / "card.json").exists()


def close(tree, expected):
  import jax

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), tree, expected)


def same_losses(workdir, expected):
  for row, wanted in zip(rows(workdir), rows(expected), strict=True):
    assert row["step"] == wanted["step"]
    if "loss" in row:
      np.testing.assert_allclose(row["loss"], wanted["loss"], rtol=1e-4)


def test_fine_tuning_and_distillation_in_two_processes(shared, one_process):
  """The same test scores, whatever the number of processes."""
  spec = tiny.npz(shared / "labeled.npz")
  values = {"data.train": spec, "data.test": f"{spec}:test", "batch_size": 16, "train_steps": 4}
  values |= {"augment.size": 16, "evaluate.batch_size": 40, "encoder.width": 0.0625, "labels.fraction": 1.0}
  scores = {}
  for processes in (1, 2):
    tuned, student = shared / f"tuned{processes}", shared / f"student{processes}"
    own = {**values, "start": one_process}
    flags = ["finetune", "--config=finetune:small", *(f"--config.{key}={value}" for key, value in own.items())]
    with Group(shared, tuned, processes, flags=flags) as group:
      assert group.wait() == [0] * processes
    own = {**values, "teacher": tuned}
    flags = ["distill", "--config=distill:small", *(f"--config.{key}={value}" for key, value in own.items())]
    with Group(shared, student, processes, flags=flags) as group:
      assert group.wait() == [0] * processes
    scores[processes] = [json.loads((run / "scores.json").read_text())["scores"] for run in (tuned, student)]
    assert (student / "encoder" / "card.json").exists()
  losses = [
    [row["loss"] for row in rows(shared / f"{name}{n}") if "loss" in row]
    for name in ("tuned", "student")
    for n in (1, 2)
  ]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
  np.testing.assert_allclose(losses[2], losses[3], rtol=1e-3)
  for one, two in zip(scores[1], scores[2], strict=True):
    assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.03)  # a tie may fall to either side


def test_one_that_is_told_to_go_takes_the_others_along(shared, one_process):
  """And the run goes on in one process."""
  workdir = shared / "told"
  with Group(shared, workdir, 2) as group:
    group.wait_for_step(workdir, 2)
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [42, 42]
  with Group(shared, workdir, 1) as group:
    assert group.wait() == [0]
    assert "resuming from step" in group.text()
  same_losses(workdir, one_process)


def test_processes_that_stop_before_an_evaluation_make_up_for_it(shared):
  workdir = shared / "evaluated"
  with Group(shared, workdir, 2, **{"evaluate.every_steps": 1}) as group:
    group.wait_for_step(workdir, 2)
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [42, 42]
  assert "loss" in rows(workdir)[-1]
  with Group(shared, workdir, 2, **{"evaluate.every_steps": 1}) as group:
    assert group.wait() == [0, 0]
  assert [row["step"] for row in rows(workdir) if "loss" in row] == list(range(1, STEPS + 1))
  assert [row["step"] for row in rows(workdir) if "loss" not in row] == list(range(1, STEPS + 1))


def test_resume_on_another_number_of_processes(shared, one_process):
  """Steps 1 to 4 on 1 x 8 devices, 5 to 8 on 4 x 2, 9 to 12 on 2 x 4."""
  workdir = shared / "moved"
  shutil.copytree(one_process, workdir)
  for processes, last in ((4, 4), (2, 8)):
    for step in range(last + SAVE_EVERY, STEPS + 1, SAVE_EVERY):
      shutil.rmtree(workdir / "checkpoints" / str(step))
    with Group(shared, workdir, processes) as group:
      assert group.wait() == [0] * processes
      assert f"resuming from step {last} of {STEPS}" in group.text()
    same_losses(workdir, one_process)
  close(parameters(workdir, STEPS), parameters(one_process, STEPS))


def kill(process):
  process.kill()


def stop(process):
  process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("inject, victim", [(kill, 1), (stop, 1), (stop, 0)])
def test_the_others_do_not_wait_for_one_that_is_gone(shared, inject, victim):
  """Process 0, when it is stopped, takes the service along through which they know of each other."""
  workdir = shared / f"{inject.__name__}{victim}"
  with Group(shared, workdir, 2, steps=100000, **{"checkpoint.every_steps": 5}) as group:
    group.wait_for_step(workdir, 6)
    inject(group.processes[victim])
    began = time.monotonic()
    code = group.processes[1 - victim].wait(timeout=90)
    assert time.monotonic() - began < 45
    text = group.logs[1 - victim].read_text()
    assert code == 142, text
    assert sum(f"process {victim} of 2" in line and "is gone" in line for line in text.splitlines()) == 1
  with Group(shared, workdir, 1, steps=8, **{"checkpoint.every_steps": 5}) as group:  # what was saved is good
    assert group.wait() == [1] and "train_steps is 100000 in the run" in group.text()


HANG = """
import time
from simclr_jax import data
original = data.Stream.__next__
calls = 0
def hang(self):
  global calls
  calls += 1
  if calls == 8 and {process} == __import__("jax").process_index():
    {what}
  return original(self)
data.Stream.__next__ = hang
"""


def injected(folder, what):
  """The environment of processes in which HANG is injected, without a hook in the program.

  `sitecustomize` is imported by every Python that finds it.
  """
  folder.mkdir()
  (folder / "sitecustomize.py").write_text(
    "import sys, importlib.abc\n"
    "class Late(importlib.abc.MetaPathFinder):\n"
    "  def find_spec(self, name, path, target=None):\n"
    "    if name == 'simclr_jax.programs.pretrain':\n"
    "      sys.meta_path.remove(self)\n"
    f"      exec({HANG.format(process=1, what=what)!r}, {{}})\n"
    "sys.meta_path.insert(0, Late())\n"
  )
  return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize(
  "what, expected", [("time.sleep(10000)", [142, 142]), ("raise OSError('no such disk')", [1, 1])]
)
def test_one_that_hangs_or_raises_ends_them_all(shared, what, expected):
  name = "hangs" if "sleep" in what else "raises"
  workdir = shared / name
  environment = injected(shared / f"site_{name}", what)
  with Group(shared, workdir, 2, steps=100000, environment=environment) as group:
    group.wait_for_step(workdir, 5)
    began = time.monotonic()
    codes = group.wait(timeout=120)
    assert time.monotonic() - began < 60
    assert codes == expected, group.text()
  if name == "raises":
    assert "process 1 of 2" in group.logs[0].read_text() and "no such disk" in group.logs[0].read_text()


@pytest.mark.parametrize(
  "override", ["seed=1", "optimizer.base_lr=0.5", "loss.temperature=0.9", "train_steps=8", "checkpoint.every_steps=3"]
)
def test_processes_with_different_configs_stop_before_they_train(shared, tmp_path, override):
  with Group(shared, tmp_path / "run", 2, last=(f"--config.{override}",)) as group:
    assert group.wait() == [1, 1]
    name, _, value = override.partition("=")
    for log in group.logs:
      said = [line for line in log.read_text().splitlines() if line.startswith("simclr: process 1 has")]
      assert said[0].startswith(f"simclr: process 1 has config.{name}={value} and process 0 has")
  assert not (tmp_path / "run").exists()
