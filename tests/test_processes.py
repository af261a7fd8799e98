"""Processes that cannot become one run, or are not of one mind: each ends with one line and the exit code that fits."""

import jax
import pytest

from simclr_jax import __main__ as cli
from simclr_jax.runtime import processes


def knn_in_slurm(monkeypatch, tmp_path, tasks, error, *flags):
  """The exit code of `simclr knn` as task 0 of a job in which JAX cannot join the others."""
  job = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": str(tasks), "PROCID": "0", "LOCALID": "0"}
  for name, value in job.items():
    monkeypatch.setenv(f"SLURM_{name}", value)

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
