"""Processes that cannot become one run, or are not of one mind: each ends with one line and the exit code that fits."""

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
from simclr_jax.runtime import processes


def in_slurm(monkeypatch, tasks):
  """Makes this process task 0 of a job."""
  job = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": str(tasks), "PROCID": "0", "LOCALID": "0"}
  for name, value in job.items():
    monkeypatch.setenv(f"SLURM_{name}", value)


def knn_in_slurm(monkeypatch, tmp_path, tasks, error, *flags):
  """The exit code of `simclr knn` as task 0 of a job in which JAX cannot join the others."""
  in_slurm(monkeypatch, tasks)

  def initialize(*args, **options):
    raise error

  monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
  return cli.main(["knn", f"--workdir={tmp_path}", *flags])


TAKEN = jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server")  # another program has the port


@pytest.mark.parametrize(
  "flags, said",
  [
    ((), "a cluster was found but cannot be joined: UNKNOWN: Failed"),
    (
      ("--coordinator=localhost:1", "--num_processes=2", "--process_id=0"),
      "--coordinator=localhost:1 cannot be joined: UNKNOWN: Failed",
    ),
  ],
)
def test_a_process_that_cannot_join_the_others_does_not_go_on_alone(tmp_path, monkeypatch, capsys, flags, said):
  """It ends with the code after which the launch scripts start it again."""
  monkeypatch.setattr(processes._xla_bridge, "backends_are_initialized", lambda: False)
  assert knn_in_slurm(monkeypatch, tmp_path, 2, TAKEN, *flags) == 142
  assert capsys.readouterr().err.startswith(f"simclr: {said}")


@pytest.mark.parametrize("tasks, used", [(1, False), (2, True)])
def test_a_process_that_has_used_its_devices_or_is_a_whole_job_runs_alone(tmp_path, monkeypatch, capsys, tasks, used):
  """Two commands in a job of one task want the same port, and need none."""
  monkeypatch.setattr(processes._xla_bridge, "backends_are_initialized", lambda: used)
  assert knn_in_slurm(monkeypatch, tmp_path, tasks, TAKEN) == 1
  assert "no run here" in capsys.readouterr().err


@pytest.mark.parametrize(
  "command",
  [
    ("transfer", "--config=transfer"),
    ("downstream", "--config=downstream"),
    ("quickstart", "/photos"),
  ],
)
def test_a_command_that_runs_in_one_process_is_refused_in_a_cluster_of_several(tmp_path, monkeypatch, capsys, command):
  """Each would believe itself alone, and all but one would find the workdir locked."""
  in_slurm(monkeypatch, 2)
  assert cli.main([*command, f"--workdir={tmp_path}/run"]) == 1
  said = capsys.readouterr().err
  assert said.startswith(f"simclr: {command[0]} runs in one process, and 2 have been started here")
  assert len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
  in_slurm(monkeypatch, 1)
  processes.check_alone(command[0])


@pytest.mark.parametrize("name, value", [("STEP_ID", "4294967290"), ("STEP_NUM_TASKS", "1")])
def test_the_shell_of_salloc_is_one_process_whatever_it_may_start(monkeypatch, name, value):
  in_slurm(monkeypatch, 4)
  monkeypatch.setenv(f"SLURM_{name}", value)
  processes.check_alone("quickstart")


ONE = """
import sys
from simclr_jax.runtime import lock
lock.SHARED = 2.0
from simclr_jax import __main__ as cli
sys.exit(cli.main(sys.argv[1:]))
"""


def in_two_folders(tmp_path, *flags):
  """Exit codes and messages of `simclr pretrain` in two processes that start in the folders 0 and 1, as on two hosts."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    several = [f"--coordinator=localhost:{s.getsockname()[1]}", "--num_processes=2"]
  values = {"data.train": "npz:images.npz", "data.test": "npz:images.npz:test", "batch_size": 16, "augment.size": 16}
  flags = ["pretrain", "--config=smoke", *flags, *(f"--config.{key}={value}" for key, value in values.items())]
  both = [
    subprocess.Popen(
      [sys.executable, "-c", ONE, *flags, *several, f"--process_id={i}"],
      cwd=tmp_path / f"{i}", env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    said = [process.communicate(timeout=240)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  return [p.returncode for p in both], [[x for x in s.splitlines() if x.startswith("simclr:")] for s in said]


def images_for_two(tmp_path, test_images):
  for i in range(2):
    (tmp_path / f"{i}").mkdir()
    tiny.npz(tmp_path / f"{i}/images.npz")
    arrays = dict(np.load(tmp_path / f"{i}/images.npz"))
    keys = [key for key in arrays if key.startswith("test")]
    assert keys
    np.savez(tmp_path / f"{i}/images.npz", **arrays | {key: arrays[key][: test_images[i]] for key in keys})


@pytest.mark.slow
def test_processes_that_would_score_different_images_stop_before_they_train(tmp_path):
  images_for_two(tmp_path, (32, 31))
  codes, said = in_two_folders(tmp_path, f"--workdir={tmp_path}/run")
  assert codes == [1, 1], said
  for lines in said:
    assert "process 1 has data.test='31 images, fingerprint " in lines[0] and "process 0 has '32 images" in lines[0]
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_the_hosts_do_not_share_is_refused(tmp_path):
  images_for_two(tmp_path, (32, 32))
  codes, said = in_two_folders(tmp_path, "--workdir=run")
  assert codes == [1, 1], said
  host = socket.gethostname()
  for lines in said:
    assert f"--workdir=run: {host} does not see there what {host} has written: name a folder or bucket" in lines[0]
