"""launch/slurm.sbatch under a real SLURM: two tasks, a SIGTERM, the requeue, and the end of the run."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
import tiny

ROOT = pathlib.Path(__file__).parent.parent
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue")
missing = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(missing), reason=f"SLURM is not installed: no {', '.join(missing)}"),
  pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of SLURM have to be started"),
  pytest.mark.skipif(not (ROOT / ".venv/bin/simclr").exists(), reason="launch/setup.sh has not made .venv"),
]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
  sockets = [socket.socket() for _ in range(count)]
  for s in sockets:
    s.bind(("localhost", 0))
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  return ports


@pytest.fixture
def slurm(tmp_path):
  """A cluster of this machine; `run(*command)` -> what it printed."""
  folder = tmp_path / "slurm"
  for name in ("state", "spool"):
    (folder / name).mkdir(parents=True)
  for parent in (tmp_path, *tmp_path.parents):  # munged wants a path that others cannot replace its files in
    if parent.owner() == "root" and parent != pathlib.Path("/tmp") and parent != pathlib.Path("/"):
      parent.chmod(0o755)
  (folder / "munge.key").write_bytes(os.urandom(1024))
  (folder / "munge.key").chmod(0o600)
  host = socket.gethostname().partition(".")[0]
  (folder / "slurm.conf").write_text(CONF.format(host=host, ports=free_ports(2), folder=folder))
  env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
  munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
  munge += [f"--{name}={folder}/munge.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
  munge += [f"--seed-file={folder}/munge.seed", "--force", "--foreground"]
  daemons = []
  for command in (["munged", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
    out = (folder / f"{command[0]}.out").open("w")
    daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
    time.sleep(2)

  def run(*command):
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    logs = "\n".join(f.read_text()[-800:] for f in sorted(folder.glob("*.out")) + sorted(folder.glob("*.log")))
    assert done.returncode == 0, f"{command}: {done.stderr}\n{logs}"
    return done.stdout

  run.env = env
  yield run
  subprocess.run(["scancel", "--user=root"], env=env, capture_output=True)
  time.sleep(2)
  for daemon in reversed(daemons):
    daemon.terminate()
    daemon.wait(20)


def rows(workdir):
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what, seconds, log):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if what():
      return
    time.sleep(0.5)
  raise AssertionError(log.read_text() if log.exists() else "the job wrote nothing")


def test_a_job_that_is_told_to_go_is_requeued_and_ends(slurm, tmp_path):
  source = tiny.source()
  np.savez(tmp_path / "images.npz", images=np.stack([source.read(i) for i in range(len(source))]))
  values = {
    "data.train": f"npz:{tmp_path / 'images.npz'}",
    "data.test": "",
    "batch_size": 16,
    "train_epochs": 0.0,
    "train_steps": 150,
    "augment.size": 16,
    "encoder.width": 0.0625,
    "evaluate.every_epochs": 0.0,
    "checkpoint.every_epochs": 0.0,
    "checkpoint.every_steps": 50,
    "log.every_steps": 1,
  }
  workdir, log = tmp_path / "run", tmp_path / "job.log"
  slurm.env |= {"CONFIG": "smoke", "WORKDIR": str(workdir), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  # The only thing of the script that this machine does not have.
  script = tmp_path / "slurm.sbatch"
  script.write_text((ROOT / "launch/slurm.sbatch").read_text().replace("#SBATCH --gpus-per-node=8\n", ""))
  job = slurm(
    *("sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}", "--export=ALL"),
    *(str(script), *(f"--config.{key}={value}" for key, value in values.items())),
  ).strip()
  wait_for(lambda: rows(workdir) and rows(workdir)[-1]["step"] >= 8, 300, log)
  slurm("scancel", "--signal=TERM", job)
  wait_for(lambda: "exit code 42: requeued" in log.read_text(), 60, log)
  stopped = rows(workdir)[-1]["step"]
  assert 8 <= stopped < 150
  wait_for(lambda: "resuming from step" in log.read_text(), 300, log)
  assert f"resuming from step {stopped} of 150" in log.read_text()
  wait_for(lambda: job not in slurm("squeue", "--noheader", "--format=%i"), 300, log)
  assert rows(workdir)[-1]["step"] == 150 and (workdir / "encoder/card.json").exists()
  assert "devices" in log.read_text()
