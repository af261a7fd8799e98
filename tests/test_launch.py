"""The launch scripts, without a cloud: what they would run, byte for byte, and what a linter says of them."""

import argparse
import inspect
import io
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import jax
import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import setuptools
import yaml
from PIL import Image

from simclr_jax import __main__ as cli
from simclr_jax import data
from simclr_jax.programs import config

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden" / "launch"
POD = {"NAME": "my-run", "ZONE": "us-central2-b", "TYPE": "v4-256"}
GKE = {
  "NAME": "my-run",
  "IMAGE": "europe-docker.pkg.dev/project/images/simclr:1",
  "CONFIG": "configs/v1.py:1x",
  "WORKDIR": "gs://bucket/my-run",
  "HOSTS": "32",
  "ACCELERATOR": "tpu-v4-podslice",
  "TOPOLOGY": "4x4x8",
  "CHIPS_PER_HOST": "4",
}
PRETRAIN = ("pretrain", "--config=configs/v1.py:1x", "--workdir=gs://bucket/a b", "--resume")
CASES = {
  "multiprocess": ("multiprocess.sh", ("--dry-run", "2", *PRETRAIN), {"CUDA_VISIBLE_DEVICES": ""}),
  "slurm": ("slurm.sbatch", ("--config.seed=1",), {"DRY_RUN": "1", "CONFIG": "smoke", "WORKDIR": "/shared/a b"}),
  "tpu_create": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"SPOT": "1"}),
  "tpu_create_v5e": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"TYPE": "v5litepod-256"}),
  "tpu_setup": ("tpu_pod.sh", ("--dry-run", "setup"), POD | {"REPOSITORY": "https://example.org/simclr_jax.git"}),
  "tpu_run": ("tpu_pod.sh", ("--dry-run", "run", *PRETRAIN), POD),
  "tpu_logs": ("tpu_pod.sh", ("--dry-run", "logs"), POD),
  "tpu_create_reserved": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"RESERVED": "1"}),
  "tpu_create_flex": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"TYPE": "v6e-64", "FLEX_START": "4h"}),
  "tpu_stop": ("tpu_pod.sh", ("--dry-run", "stop"), POD),
  "tpu_delete": ("tpu_pod.sh", ("--dry-run", "delete"), POD),
  "tpu_train": (
    "tpu_train.sh",
    ("--dry-run", *PRETRAIN[:-1]),
    POD | {"SPOT": "1", "REPOSITORY": "https://example.org/x"},
  ),
  "gke": ("gke.sh", ("--dry-run",), GKE),
  "gke_logs": ("gke.sh", ("--dry-run", "logs"), {"NAME": "my-run"}),
  "gke_status": ("gke.sh", ("--dry-run", "status"), {"NAME": "my-run"}),
  "gke_stop": ("gke.sh", ("--dry-run", "stop"), {"NAME": "my-run"}),
}


def bash(script, arguments, environment):
  """Runs a script with nothing but coreutils and bash on the path: no gcloud, kubectl, srun or simclr."""
  return subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments],
    env={"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **environment},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("name", CASES)
def test_dry_run(name):
  done = bash(*CASES[name])
  assert done.returncode == 0, done.stderr
  assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize(
  "script, arguments, environment, says",
  [
    ("tpu_pod.sh", ("--dry-run", "create"), POD | {"NAME": "my run; rm"}, "NAME=my run; rm: expected"),
    ("tpu_pod.sh", ("--dry-run", "explode"), POD, "explode: expected create"),
    ("tpu_pod.sh", ("--dry-run", "create"), {"NAME": "a"}, "ZONE: zone"),
    ("tpu_pod.sh", ("--dry-run", "create"), {"NAME": "a", "ZONE": "b"}, "TYPE: accelerator type such as v4-256"),
    (
      "tpu_pod.sh",
      ("--dry-run", "create"),
      POD | {"SPOT": "1", "RESERVED": "1"},
      "SPOT, RESERVED, FLEX_START: give one",
    ),
    ("tpu_pod.sh", ("--dry-run", "create"), POD | {"SPOT": "0"}, "SPOT=0: expected 1"),
    ("tpu_pod.sh", ("--dry-run", "create"), POD | {"RESERVED": "false"}, "RESERVED=false: expected 1"),
    ("tpu_pod.sh", ("--dry-run", "run"), POD, "command of simclr"),
    ("tpu_train.sh", ("--dry-run", "--config=smoke"), POD, "--config=smoke: expected a command of simclr"),
    ("tpu_train.sh", ("--dry-run", "time", "--config=smoke"), POD, "time: expected a command of simclr that resumes"),
    ("tpu_train.sh", ("--dry-run", "pretrain", "--overwrite"), POD, "--overwrite: a pod resumes"),
    ("tpu_train.sh", ("transfer", "--workdir=x"), POD, "transfer runs in one process: TYPE=v4-256 has several hosts"),
    (
      "tpu_train.sh",
      ("quickstart",),
      POD | {"TYPE": "v5litepod-16"},
      "quickstart runs in one process: TYPE=v5litepod-16",
    ),
    ("tpu_train.sh", ("downstream",), POD | {"TYPE": "v6e-8"}, "REPOSITORY: git address of the code"),
    ("tpu_train.sh", ("pretrain",), POD, "REPOSITORY: git address of the code"),
    ("tpu_train.sh", ("pretrain",), POD | {"NAME": "My_Run", "REPOSITORY": "x"}, "NAME=My_Run: expected"),
    (
      "tpu_train.sh",
      ("pretrain",),
      {"NAME": "a", "ZONE": "b", "REPOSITORY": "x"},
      "TYPE: accelerator type such as v4-256",
    ),
    ("restart.sh", ("begin",), {}, "begin: expected start, status, log or stop"),
    ("setup.sh", (), {"ACCELERATOR": "gpu"}, "ACCELERATOR=gpu: expected cpu, cuda12, cuda13 or tpu"),
    ("gke.sh", ("--dry-run",), GKE | {"IMAGE": 'a"b'}, "IMAGE: no quotes"),
    ("gke.sh", ("--dry-run",), GKE | {"NAME": "My_Run"}, "NAME=My_Run: expected"),
    ("gke.sh", ("--dry-run", "halt"), GKE, "halt: expected status, logs, stop, or flags"),
    ("gke.sh", ("--dry-run", '--config.x="'), GKE, "no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), GKE | {"IMAGE": "a\\b"}, "IMAGE: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), GKE | {"WORKDIR": "gs://b/${HOSTS}"}, "WORKDIR: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), GKE | {"NAME": "a\nb"}, "NAME: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), {k: v for k, v in GKE.items() if k != "HOSTS"}, "HOSTS: is not set"),
    ("gke.sh", ("--dry-run", "--overwrite"), GKE, "--overwrite: a JobSet resumes"),
    ("slurm.sbatch", (), {"DRY_RUN": "1", "WORKDIR": "/x"}, "CONFIG: recipe"),
    ("slurm.sbatch", ("--overwrite",), CASES["slurm"][2], "--overwrite: a job resumes"),
    ("multiprocess.sh", ("--dry-run",), {}, "number of processes"),
    ("multiprocess.sh", ("--dry-run", "0", "pretrain"), {}, "0: expected the number of processes"),
    ("multiprocess.sh", ("--dry-run", "pretrain"), {}, "pretrain: expected the number of processes"),
  ],
)
def test_mistakes(script, arguments, environment, says):
  done = bash(script, arguments, environment)
  assert done.returncode != 0 and says in done.stderr and len(done.stderr.splitlines()) == 1


def on_the_worker(*arguments, **environment) -> str:
  """The command that tpu_pod.sh gives to a worker's shell."""
  done = bash("tpu_pod.sh", ("--dry-run", *arguments), POD | environment)
  assert done.returncode == 0, done.stderr
  last = subprocess.run(
    ["bash", "-c", f'set -- {done.stdout.rstrip()}; printf %s "${{@: -1}}"'], capture_output=True, text=True
  )
  assert last.stdout.startswith("--command=")
  return last.stdout.removeprefix("--command=")


def worker(folder, simclr):
  """A checkout on a worker, whose simclr is a script."""
  (folder / ".venv/bin").mkdir(parents=True)
  (folder / "launch").mkdir()
  shutil.copy(ROOT / "launch/restart.sh", folder / "launch")
  program = folder / ".venv/bin/simclr"
  program.write_text(f"#!/bin/bash\n{simclr}")
  program.chmod(0o755)


def test_arguments_reach_the_workers_of_a_pod_as_they_were_given(tmp_path):
  worker(tmp_path / "simclr_jax", "printf '%s\\0' \"$@\" > got.partial\nmv got.partial got\nexit 1\n")
  arguments = ["pretrain", "--config.a=it's", 'say "x"', "two\nlines", "$(touch pwned)", "a & b; c", "back\\slash", ""]
  subprocess.run(["bash", "-c", on_the_worker("run", *arguments)], cwd=tmp_path, check=True)
  assert wait_for(tmp_path / "simclr_jax/got").split("\0")[:-1] == arguments
  assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("action", ["run", "revive"])
def test_what_simclr_reads_from_the_environment_reaches_the_workers(action, tmp_path):
  """A preempted pod has lost its home, where compiled programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise."""
  program = 'printf \'%s|%s\' "$JAX_COMPILATION_CACHE_DIR" "${SIMCLR_HANG_SECONDS-unset}" > got.partial\nmv got.partial got\nexit 1\n'
  worker(tmp_path / "simclr_jax", program)
  place = "gs://bucket/it's a $(touch pwned)"
  subprocess.run(
    ["bash", "-c", on_the_worker(action, "pretrain", JAX_COMPILATION_CACHE_DIR=place)], cwd=tmp_path, check=True
  )
  assert wait_for(tmp_path / "simclr_jax/got") == f"{place}|unset" and not list(tmp_path.rglob("pwned"))
  assert "SIMCLR_HANG_SECONDS=600 bash" in on_the_worker(action, "pretrain", SIMCLR_HANG_SECONDS="600")
  assert "CACHE_DIR" not in on_the_worker(action, "pretrain", JAX_COMPILATION_CACHE_DIR="/home/me/.cache")  # of here


def test_the_address_of_the_repository_runs_nothing(tmp_path):
  git = tmp_path / "bin/git"
  git.parent.mkdir()
  git.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" > arguments\nexit 1\n")
  git.chmod(0o755)
  address = "https://x.org/a b; touch pwned #'"
  command = on_the_worker("setup", REPOSITORY=address)
  subprocess.run(
    ["bash", "-c", command], cwd=tmp_path, env={"PATH": f"{git.parent}:/usr/bin:/bin"}, capture_output=True
  )
  assert not (tmp_path / "pwned").exists()
  assert f"clone\0--\0{address}\0simclr_jax" in subprocess.run(
    ["bash", "-c", command.partition(" 2>")[0] + "; cat arguments"],
    cwd=tmp_path, env={"PATH": f"{git.parent}:/usr/bin:/bin"}, capture_output=True, text=True,
  ).stdout  # fmt: skip


def test_the_jobset_takes_values_as_they_are():
  manifest = yaml.safe_load(bash("gke.sh", ("--dry-run",), GKE | {"WORKDIR": "gs://b/a&b/it's/{x}"}).stdout)
  (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
  assert "--workdir=gs://b/a&b/it's/{x}" in container["command"]


@pytest.mark.parametrize(
  "state, asked",
  [("", ["get", "apply"]), ("Completed", ["get", "delete", "apply"]), ("Failed", ["get", "delete", "apply"])],
)
def test_a_jobset_that_has_ended_makes_room_for_its_next_start(state, asked, tmp_path):
  """Its terminalState is empty until then: JobSet's api/jobset/v1alpha2/jobset_types.go, read 2026-11-30."""
  kubectl = tmp_path / "kubectl"
  kubectl.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n[ "$1" != get ] || printf "{state}"\n')
  kubectl.chmod(0o755)
  done = bash("gke.sh", (), GKE | {"PATH": f"{tmp_path}:/usr/bin:/bin"})
  lines = (tmp_path / "asked").read_text().splitlines()
  assert done.returncode == 0 and [line.split()[0] for line in lines] == asked
  assert all("jobset/my-run" in line for line in lines[:-1])


def test_no_jobset_is_applied_where_the_cluster_does_not_answer(tmp_path):
  kubectl = tmp_path / "kubectl"
  kubectl.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\nexit 1\n')
  kubectl.chmod(0o755)
  assert bash("gke.sh", (), GKE | {"PATH": f"{tmp_path}:/usr/bin:/bin"}).returncode == 1
  assert (tmp_path / "asked").read_text().startswith("get ") and "apply" not in (tmp_path / "asked").read_text()


def test_the_jobset_restarts_what_was_preempted_and_nothing_that_failed():
  manifest = yaml.safe_load(bash(*CASES["gke"]).stdout)
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 32 and job["completionMode"] == "Indexed"
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]  # not 42, not 128 and above
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
  (container,) = pod["containers"]
  assert container["command"][:2] == ["simclr", "pretrain"]  # process 1, which gets the SIGTERM
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


# What the JobSet resource, v1alpha2, says of itself above the Jobs that it makes: what this project uses of it.
JOBSET = {
  "type": "object",
  "additionalProperties": False,
  "required": ["apiVersion", "kind", "metadata", "spec"],
  "properties": {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": {"type": "object", "required": ["name"]},
    "spec": {
      "type": "object",
      "additionalProperties": False,
      "properties": {
        "failurePolicy": {
          "type": "object",
          "additionalProperties": False,
          "properties": {
            "maxRestarts": {"type": "integer"},
            "rules": {
              "type": "array",
              "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "action"],
                "properties": {
                  "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                  "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                  "onJobFailureReasons": {"type": "array", "items": {"const": "PodFailurePolicy"}},
                },
              },
            },
          },
        },
        "replicatedJobs": {
          "type": "array",
          "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name", "template"],
            "properties": {
              "name": {"type": "string"},
              "replicas": {"type": "integer"},
              "template": {"type": "object", "required": ["spec"]},
            },
          },
        },
      },
    },
  },
}


def test_the_jobset_is_one_that_kubernetes_takes():
  """The Job in it against Kubernetes's own schema, in which an unknown key is a mistake."""
  manifest = yaml.safe_load(bash(*CASES["gke"]).stdout)
  jsonschema.validate(manifest, JOBSET)
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, **replicated["template"]}
  kubernetes_validate.validate(job, "1.33", strict=True)
  job["spec"]["template"]["spec"]["containers"][0]["imge"] = "a misspelt key"
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job, "1.33", strict=True)


def test_several_processes_end_with_the_highest_exit_code(tmp_path):
  """And a signal to the script reaches all of them."""
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "setup.sh").write_text(f"export PATH={tmp_path}:$PATH\n")
  script = tmp_path / "launch" / "multiprocess.sh"
  script.write_text((ROOT / "launch" / "multiprocess.sh").read_text())
  simclr = tmp_path / "simclr"
  simclr.write_text('#!/bin/bash\nfor a in "$@"; do case $a in --process_id=*) exit "$((40 + ${a#*=}))";; esac; done\n')
  simclr.chmod(0o755)
  assert subprocess.run(["bash", script, "3", "pretrain"]).returncode == 42
  simclr.write_text("#!/bin/bash\ntrap 'exit 42' TERM\ntouch started.$$\nwhile :; do sleep 0.05; done\n")
  with subprocess.Popen(["bash", script, "2", "pretrain"], cwd=tmp_path) as group:
    while len(list(tmp_path.glob("started.*"))) < 2:
      pass
    group.terminate()
    assert group.wait(timeout=20) == 42


@pytest.mark.parametrize(
  "count, environment, devices",
  [
    (2, {}, ["0", "1"]),
    (4, {}, ["0", "1", "2", "3"]),
    (1, {}, []),  # which takes all of them
    (5, {}, []),  # more processes than GPUs: only to try what a cluster does
    (2, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["0", "1"]),  # of those that are visible
    (2, {"CUDA_VISIBLE_DEVICES": "2"}, []),
  ],
)
def test_every_process_of_a_machine_with_gpus_has_its_own(count, environment, devices, tmp_path):
  """By the variable that jax.distributed.initialize reads (jax/_src/distributed.py)."""
  smi = tmp_path / "nvidia-smi"
  smi.write_text(
    "#!/bin/bash\nfor i in 0 1 2 3; do echo \"GPU $i: NVIDIA H200 (UUID: GPU-$i)\"; done\necho '  MIG 1g'\n"
  )
  smi.chmod(0o755)
  path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
  done = bash("multiprocess.sh", ("--dry-run", str(count), "pretrain"), path | environment)
  assert done.returncode == 0 and len(done.stdout.splitlines()) == count
  assert re.findall(r"^env JAX_LOCAL_DEVICE_IDS=(\d+) simclr pretrain ", done.stdout, re.M) == devices
  assert "'JAX_LOCAL_DEVICE_IDS'" in pathlib.Path(inspect.getfile(jax.distributed.initialize)).read_text()


def wait_for(path, seconds=20):
  end = time.monotonic() + seconds
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.01)
  return path.read_text()


def test_stop_ends_its_own_run_and_it_stays_ended(tmp_path):
  """simclr saves and ends with 42 on SIGTERM, which restart.sh would otherwise take for a preemption; another run of the
  same user goes on."""
  simclr = "trap 'exit 42' TERM\necho x >> started\nwhile :; do sleep 0.02; done\n"
  for name in ("mine", "other"):
    worker(tmp_path / name, simclr)

  def restart(name, *arguments):
    command = ["bash", "launch/restart.sh", *arguments]
    environment = {**os.environ, "PAUSE": "0.05"}
    done = subprocess.run(command, cwd=tmp_path / name, env=environment, capture_output=True, text=True, check=True)
    return done.stdout

  try:
    assert restart("mine", "status") == "none\n"
    for name in ("mine", "other"):
      restart(name, "start", "pretrain")
      wait_for(tmp_path / name / "started")
    assert restart("mine", "start", "pretrain") == "a run is already active\n"
    restart("mine", "stop")
    assert wait_for(tmp_path / "mine/run.exit") == "42\n"
    assert restart("mine", "status") == "ended 42\n" and restart("other", "status") == "running\n"
    assert (tmp_path / "mine/started").read_text() == "x\n"
  finally:
    restart("other", "stop")


@pytest.mark.parametrize("codes, starts", [((42, 137, 0), 3), ((1,), 1), ((2,), 1), ((142, 1), 2), ((139,) * 51, 51)])
def test_a_run_is_started_again_after_a_preemption_and_after_no_error(codes, starts, tmp_path):
  codes = "\n".join(map(str, codes))
  (tmp_path / "codes").write_text(f"{codes}\n")
  worker(tmp_path, "code=$(head -n 1 codes)\nsed -i 1d codes\necho x >> started\nexit $code\n")
  environment = {**os.environ, "PAUSE": "0"}
  subprocess.run(["bash", "launch/restart.sh", "keep", "pretrain"], cwd=tmp_path, env=environment, check=True)
  assert (tmp_path / "run.exit").read_text() == codes.split()[-1] + "\n"
  assert len((tmp_path / "started").read_text().split()) == starts


@pytest.mark.parametrize(
  "command, again",
  [
    (
      ("pretrain", "--overwrite", "--workdir=/x--overwrite"),
      ("pretrain", "--resume", "--workdir=/x--overwrite", "--resume"),
    ),
    (("finetune", "--workdir=/a b"), ("finetune", "--workdir=/a b", "--resume")),
    (("time", "--config=smoke"), ("time", "--config=smoke")),
  ],
)
def test_a_run_that_is_started_again_resumes_what_it_saved(command, again, tmp_path):
  """With --overwrite every preemption would delete the checkpoint that was just saved."""
  (tmp_path / "codes").write_text("42\n137\n0\n")
  worker(tmp_path, "printf '%s|' \"$@\" >> got\necho >> got\ncode=$(head -n 1 codes)\nsed -i 1d codes\nexit $code\n")
  environment = {**os.environ, "PAUSE": "0"}
  subprocess.run(["bash", "launch/restart.sh", "keep", *command], cwd=tmp_path, env=environment, check=True)
  assert [tuple(line.split("|")[:-1]) for line in (tmp_path / "got").read_text().splitlines()] == [
    command,
    again,
    again,
  ]


@pytest.mark.parametrize("script", ["restart.sh", "tpu_train.sh"])
def test_the_scripts_know_which_commands_resume(script):
  (commands,) = re.findall(r"^ *(distill(?: \| \w+)+)\)", (ROOT / "launch" / script).read_text(), re.M)
  (programs,) = (a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
  resume = {name for name, parser in programs.items() if "--resume" in parser._option_string_actions}
  assert set(commands.split(" | ")) == resume


def test_a_worker_that_was_rebooted_gets_its_run_back_and_one_that_was_stopped_does_not(tmp_path):
  """A machine that is shut down sends SIGTERM to all processes, restart.sh among them."""
  worker(tmp_path, "trap 'exit 42' TERM\necho x >> started\nwhile :; do sleep 0.02; done\n")

  def restart(*arguments):
    done = subprocess.run(
      ["bash", "launch/restart.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return done.stdout

  def wait_until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
      time.sleep(0.01)
    assert condition()

  def starts():
    return len((tmp_path / "started").read_text().split()) if (tmp_path / "started").exists() else 0

  try:
    restart("revive", "pretrain")  # a worker that is new has lost the run, too
    wait_until(lambda: starts() == 1)
    assert restart("revive", "pretrain") == "" and restart("status") == "running\n"
    os.kill(int((tmp_path / "run.pid").read_text()), signal.SIGTERM)
    wait_until(lambda: restart("status") == "none\n")
    restart("revive", "pretrain")
    wait_until(lambda: starts() == 2)
    restart("stop")
    wait_until(lambda: restart("status") == "ended 42\n")
    restart("revive", "pretrain")
    assert restart("status") == "ended 42\n" and starts() == 2
    restart("start", "pretrain")
    wait_until(lambda: starts() == 3)
  finally:
    restart("stop")


@pytest.mark.parametrize("given", [(), ("--overwrite",), ("--resume",)])
def test_a_worker_that_gets_its_run_back_resumes_like_the_others(given, tmp_path):
  """They have been started again with --resume; processes of which one is to overwrite end for good."""
  worker(tmp_path, "printf '%s|' \"$@\" > got.partial\nmv got.partial got\nexit 1\n")
  command = ["bash", "launch/restart.sh", "revive", "pretrain", *given, "--workdir=/a b"]
  subprocess.run(command, cwd=tmp_path, check=True)
  got = wait_for(tmp_path / "got").split("|")[:-1]
  assert got[0] == "pretrain" and "--workdir=/a b" in got and "--resume" in got and "--overwrite" not in got


def test_the_answer_how_a_run_is_has_a_line_of_its_own(tmp_path):
  worker(tmp_path, "")
  (tmp_path / "run.log").write_text("step 7 of 9, killed in the mid")
  (tmp_path / "run.exit").write_text("137\n")
  done = subprocess.run(
    ["bash", "launch/restart.sh", "status"], cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert done.stdout.splitlines() == ["step 7 of 9, killed in the mid", "ended 137"]


def pod_life(tmp_path, answers, *arguments, fails=()):
  """tpu_train.sh against a gcloud that gives these answers to `describe` and to the question how the run is; the exit code,
  and the steps that it asked gcloud for.  `fails`: a step's name for each time that it fails, at first."""
  gcloud = tmp_path / "gcloud"
  (tmp_path / "fails").write_text("".join(f"{step}\n" for step in fails))
  (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in answers))
  gcloud.write_text(
    f"""#!/bin/bash
cd {tmp_path}
answer() {{ text=$(head -n 1 answers); sed -i 1d answers; }}
step() {{ echo "$*" >> steps; if grep -qx "$1" fails; then sed -i "0,/^$1$/{{//d}}" fails; exit 1; fi; }}
case "$*" in
  *" describe "*) answer; case ${{text:=NOT_FOUND}} in NOT_FOUND*|offline*) echo "ERROR: $text" >&2; exit 1;; *) echo "$text";; esac ;;
  *"restart.sh status") answer; echo "step 7 of 9"; [ "$text" != offline ] && echo "$text" ;;
  *" create "*) step create ;;
  *" delete "*) step delete ;;
  *setup.sh) step setup ;;
  *"restart.sh start"*) step run "${{@: -1}}" ;;
  *"restart.sh revive"*) echo "${{@: -2:1}} ${{@: -1}}" >> revived ;;
esac
"""
  )
  gcloud.chmod(0o755)
  done = subprocess.run(
    ["bash", str(ROOT / "launch/tpu_train.sh"), *arguments],
    env={"PATH": f"{tmp_path}:/usr/bin:/bin", "POLL": "0", **POD, "SPOT": "1", "REPOSITORY": "https://example.org/x"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  steps = [line.split()[0] for line in (tmp_path / "steps").read_text().splitlines()] if answers else []
  assert not (tmp_path / "answers").read_text(), done.stdout + done.stderr
  return done, steps


def test_a_preempted_pod_is_asked_for_again_and_the_run_resumed(tmp_path):
  """A suspended request gets no resources any more: https://cloud.google.com/tpu/docs/queued-resources, read 2026-11-28."""
  answers = ["NOT_FOUND: no such resource", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "none"]
  answers += ["ACTIVE", "running", "offline", "ACTIVE", "offline", "SUSPENDING", "SUSPENDED"]
  answers += ["NOT_FOUND: no such resource", "ACTIVE", "none", "ACTIVE", "running", "ACTIVE", "ended 0"]
  done, steps = pod_life(tmp_path, answers, "pretrain", "--config=smoke", "--workdir=gs://bucket/a b")
  assert done.returncode == 0, done.stdout + done.stderr
  assert steps == ["create", "setup", "run", "delete", "create", "setup", "run", "delete"]
  assert (tmp_path / "steps").read_text().count("--workdir=gs://bucket/a\\ b --resume") == 2
  assert "the pod was preempted: asking for another" in done.stdout and "step 7 of 9" in done.stdout


def test_a_run_that_ends_with_an_error_gives_the_pod_back(tmp_path):
  done, steps = pod_life(tmp_path, ["ACTIVE", "running", "ACTIVE", "ended 1"], "pretrain", "--resume")
  assert done.returncode == 1 and steps == ["delete"]  # the script was started again while the run went on


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_ended_while_the_script_was_away_is_started_again(code, tmp_path):
  """What ended may have been another command, such as `simclr time`: its exit code is not that of this run."""
  answers = ["ACTIVE", f"ended {code}", "ACTIVE", "running", "ACTIVE", "ended 0"]
  done, steps = pod_life(tmp_path, answers, "pretrain")
  assert done.returncode == 0 and steps == ["setup", "run", "delete"]


def test_a_request_that_fails_is_not_made_again(tmp_path):
  done, steps = pod_life(tmp_path, ["NOT_FOUND: no such resource", "FAILED"], "pretrain")
  assert done.returncode == 1 and steps == ["create"] and "the request failed" in done.stdout


def test_a_worker_that_was_rebooted_is_asked_to_start_its_part_again(tmp_path):
  """The first worker only says that it is running, while it waits for the others."""
  answers = ["ACTIVE", "none", "ACTIVE", "running", "ACTIVE", "running", "ACTIVE", "ended 0"]
  done, steps = pod_life(tmp_path, answers, "pretrain", "--workdir=gs://bucket/a b")
  assert done.returncode == 0 and steps == ["setup", "run", "delete"]
  command = "--worker=all --command=cd simclr_jax && bash launch/restart.sh revive pretrain --workdir=gs://bucket/a\\ b --resume"
  assert (tmp_path / "revived").read_text().splitlines() == [command] * 2


def test_the_first_worker_rebooted_is_no_end(tmp_path):
  answers = ["ACTIVE", "running", "ACTIVE", "offline", "ACTIVE", "none", "ACTIVE", "running", "ACTIVE", "ended 0"]
  done, steps = pod_life(tmp_path, answers, "pretrain")
  assert done.returncode == 0 and steps == ["setup", "run", "delete"]


def test_a_pod_on_which_nothing_can_be_installed_is_given_back(tmp_path):
  answers = ["NOT_FOUND: no such resource", *["ACTIVE", "none"] * 5]
  done, steps = pod_life(tmp_path, answers, "pretrain", fails=["setup"] * 5)
  assert done.returncode == 1 and steps == ["create", *["setup"] * 5, "delete"]


def test_a_pod_that_installs_at_the_fifth_try_is_kept(tmp_path):
  answers = ["NOT_FOUND: no such resource", *["ACTIVE", "none"] * 5, "ACTIVE", "running", "ACTIVE", "ended 0"]
  done, steps = pod_life(tmp_path, answers, "pretrain", fails=["setup"] * 4)
  assert done.returncode == 0 and steps == ["create", *["setup"] * 5, "run", "delete"]


def test_a_pod_that_was_there_and_does_not_answer_may_have_a_run_and_is_kept(tmp_path):
  done, steps = pod_life(tmp_path, ["ACTIVE", "offline"] * 5, "pretrain", fails=["setup"] * 5)
  assert done.returncode == 1 and steps == ["setup"] * 5 and "IT IS STILL BILLED" in done.stdout


@pytest.mark.parametrize("code, ends", [("0", 0), ("1", 1)])
def test_a_pod_is_deleted_until_it_is_gone(code, ends, tmp_path):
  answers = ["ACTIVE", "running", "ACTIVE", f"ended {code}", "offline: no network here", "ACTIVE", "DELETING"]
  done, steps = pod_life(tmp_path, answers, "pretrain", fails=["delete"] * 2)
  assert done.returncode == ends and steps == ["delete"] * 4


def test_a_pod_that_cannot_be_deleted_is_named_and_is_no_success(tmp_path):
  answers = ["ACTIVE", "running", "ACTIVE", "ended 0", *["ACTIVE"] * 60]
  done, steps = pod_life(tmp_path, answers, "pretrain", fails=["delete"] * 60)
  assert done.returncode == 1 and len(steps) == 60 and "THE POD IS STILL BILLED" in done.stdout.splitlines()[-1]


def test_a_pod_that_was_there_is_asked_for_until_there_is_another(tmp_path):
  """Its first request was no mistake, whoever made it: now there is only no capacity."""
  answers = ["ACTIVE", "running", "SUSPENDED", *["NOT_FOUND: no such resource"] * 3, "ACTIVE", "none"]
  done, steps = pod_life(
    tmp_path, [*answers, "ACTIVE", "running", "ACTIVE", "ended 0"], "pretrain", fails=["create"] * 2
  )
  assert done.returncode == 0 and steps == ["delete", "create", "create", "create", "setup", "run", "delete"]


def test_images_without_labels_get_all_that_needs_none(tmp_path):
  """`simclr knn` refuses them, which ends launch/local.sh."""
  (tmp_path / "launch").mkdir()
  shutil.copy(ROOT / "launch/local.sh", tmp_path / "launch")
  (tmp_path / "launch/setup.sh").write_text(f"export PATH={tmp_path}:$PATH\n")
  simclr = tmp_path / "simclr"
  simclr.write_text('#!/bin/bash\necho "$1" >> asked\n[ "$1" != knn ]\n')
  simclr.chmod(0o755)
  done = subprocess.run(["bash", "launch/local.sh"], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 1 and "report.html" in done.stdout
  assert (tmp_path / "asked").read_text().split() == ["pretrain", "export", "knn"]


# ---- setup.sh, with interpreters that only write down what they are asked -----------------------------------------------

PYTHON = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in
  -c*) exit "${TOO_OLD:-0}" ;;
  -V) echo "Python 3.11.9" ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *--target*) mkdir -p "${@: -2:1}/bin"; printf '#!/bin/bash\nmkdir -p .venv/bin; cp "%s" .venv/bin/python\n' "$0" > "${@: -2:1}/bin/uv"
    chmod +x "${@: -2:1}/bin/uv" ;;
  *"-r requirements-lock.txt") exit "${BROKEN:-0}" ;;
esac
"""
DEVICES = {  # vendor and device, as the PCI bus shows them
  "network card": ("0x1ae0", "0x0042"),
  "v4": ("0x1ae0", "0x005e"),
  "v6e": ("0x1ae0", "0x006f"),
  "other vendor": ("0x8086", "0x005e"),
}


@pytest.fixture
def checkout(tmp_path):
  """Runs a script that sources setup.sh, in a checkout of it alone -> (what it asked Python for, what it said)."""
  (tmp_path / "launch").mkdir()
  (tmp_path / "bin").mkdir()
  shutil.copy(ROOT / "launch/setup.sh", tmp_path / "launch")
  (tmp_path / "requirements-lock.txt").write_text("jax==1\n")
  for tool in ("bash", "cat", "chmod", "cmp", "cp", "dirname", "head", "mkdir", "mktemp", "rm", "sed", "tr"):
    (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

  def program(name, text):
    (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / name).chmod(0o755)

  program("python3", PYTHON)

  def run(*, driver="", device="", code=0, **environment):
    (tmp_path / "log").write_text("")
    shutil.rmtree(tmp_path / "pci", ignore_errors=True)
    (tmp_path / "pci/0").mkdir(parents=True)
    for file, value in zip(("vendor", "device"), DEVICES.get(device, ()), strict=False):
      (tmp_path / "pci/0" / file).write_text(f"{value}\n")
    program("nvidia-smi", f"#!/bin/bash\necho '{driver}'\n[ -n '{driver}' ]\n")
    environment = {
      "PATH": str(tmp_path / "bin"),
      "LOG": str(tmp_path / "log"),
      "PCI_DEVICES": str(tmp_path / "pci"),
      **environment,
    }
    script = "set -euo pipefail; . launch/setup.sh; echo done"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return (tmp_path / "log").read_text().splitlines(), done.stdout + done.stderr

  run.folder = tmp_path
  return run


@pytest.mark.parametrize(
  "machine, accelerator",
  [
    ({}, "cpu"),
    # The oldest drivers: 525.60 for CUDA 12, 580 for CUDA 13: https://docs.jax.dev/en/latest/installation.html, 2026-11-28.
    (dict(driver="525.60.13"), "cuda12"),
    (dict(driver="579.99"), "cuda12"),
    (dict(driver="580.65.06"), "cuda13"),
    (dict(device="v4"), "tpu"),
    (dict(device="v6e"), "tpu"),
    (dict(device="network card"), "cpu"),
    (dict(device="other vendor"), "cpu"),
    (dict(driver="580.65.06", ACCELERATOR="cuda12"), "cuda12"),
    (dict(device="v4", ACCELERATOR="cpu"), "cpu"),
  ],
)
def test_setup_installs_what_the_machine_can_use(checkout, machine, accelerator):
  asked, said = checkout(**machine)
  assert said.endswith("done\n") and f"setting up .venv for {accelerator} " in said
  pip = "-m pip install --quiet --disable-pip-version-check"
  last = f"{pip} --no-deps --editable ." if accelerator == "cpu" else f"{pip} --constraint requirements-lock.txt --editable .[{accelerator}]"  # fmt: skip
  assert asked[1:] == ["-m venv .venv", f"{pip} -r requirements-lock.txt", last]
  if accelerator == "cpu":
    assert (checkout.folder / ".venv/installed.txt").read_text() == "jax==1\n"
  asked, said = checkout(**machine)  # nothing is done twice
  assert asked == [] and said == "done\n"


def test_setup_makes_the_environment_anew_for_another_accelerator(checkout):
  checkout()
  (checkout.folder / ".venv/old").touch()
  assert "for cuda12" in checkout(driver="550.54")[1] and not (checkout.folder / ".venv/old").exists()
  (checkout.folder / ".venv/old").touch()
  # The login node of that cluster takes it as it is, and may ask for another one.
  assert checkout() == ([], "done\n") and (checkout.folder / ".venv/old").exists()
  assert checkout(driver="580.65") == ([], "done\n")  # a newer driver runs CUDA 12 too
  assert "for cpu" in checkout(ACCELERATOR="cpu")[1] and not (checkout.folder / ".venv/old").exists()


def test_an_installation_that_broke_off_is_made_again(checkout):
  asked, said = checkout(BROKEN="1", code=1)
  assert ".venv could not be made" in said and "done" not in said
  assert "done" in checkout()[1]


@pytest.mark.parametrize(
  "made, machine, stops",
  [
    (None, {}, "cpu"),
    (dict(driver="580.65"), dict(driver="550.54"), "cuda12"),  # an older node, whose driver does not run CUDA 13
    (dict(driver="550.54"), dict(driver="580.65"), ""),
    (dict(driver="550.54"), {}, ""),
    ({}, dict(driver="550.54"), "cuda12"),
  ],
)
def test_a_job_uses_the_environment_and_never_makes_it(made, machine, stops, checkout):
  """Other jobs run in it."""
  if made is not None:
    checkout(**made)
    (checkout.folder / ".venv/old").touch()
  asked, said = checkout(**machine, KEEP_VENV="1", code=1 if stops else 0)
  assert asked == [] and (checkout.folder / ".venv/old").exists() == (made is not None)
  assert said == (f".venv is missing, old, or not for {stops}: ACCELERATOR={stops} bash launch/setup.sh, while no job runs\n" if stops else "done\n")  # fmt: skip
  assert "\nKEEP_VENV=1 . launch/setup.sh\n" in (ROOT / "launch/slurm.sbatch").read_text()


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_two_scripts_make_one_environment(checkout):
  folder = checkout.folder
  for tool in ("flock", "sleep"):
    (folder / "bin" / tool).symlink_to(shutil.which(tool))
  (folder / "bin/python3").write_text(PYTHON.replace("mkdir -p .venv/bin;", "sleep 0.5; mkdir -p .venv/bin;", 1))
  both = [
    subprocess.Popen(
      ["bash", "-c", "set -euo pipefail; . launch/setup.sh; echo done"],
      cwd=folder,
      env={"PATH": str(folder / "bin"), "LOG": str(folder / "log"), "ACCELERATOR": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  said = sorted(one.communicate(timeout=60)[0] for one in both)
  assert said == ["done\n", "setting up .venv for cpu (a few minutes, once)\ndone\n"]


def test_a_machine_with_an_old_python_gets_a_new_one_without_root(checkout):
  """As images of Cloud TPU with Ubuntu 22.04, whose python3 is 3.10: github.com/pytorch/xla/pull/5294."""
  asked, said = checkout(TOO_OLD="1", device="v4")
  assert said.endswith("done\n") and "-m venv .venv" not in asked
  assert any(line.startswith("-m pip install --quiet --target ") and line.endswith(" uv") for line in asked)
  assert (checkout.folder / ".venv/installed.txt").read_text() == "jax==1\n# accelerator: tpu\n"


# ---- what the vendors say, and what follows from it here ----------------------------------------------------------------

TPU, GCLOUD = "https://cloud.google.com/tpu/docs", "https://cloud.google.com/sdk/gcloud/reference"
FACTS = [  # page (all read on 2026-11-28), what it says, the file and the text that rest on it
  (f"{TPU}/runtimes", "runtime versions: v6e, v5p, v5e, and v4 and older", "launch/tpu_pod.sh", "v6e-*) echo v2-alpha-tpuv6e"),
  (f"{TPU}/runtimes", "", "launch/tpu_pod.sh", "v5p-*) echo v2-alpha-tpuv5 "),
  (f"{TPU}/runtimes", "", "launch/tpu_pod.sh", "v5litepod-*) echo v2-alpha-tpuv5-lite"),
  (f"{TPU}/runtimes", "", "launch/tpu_pod.sh", "*) echo tpu-ubuntu2204-base"),
  ("https://docs.cloud.google.com/tpu/docs/runtimes.md.txt", "the API is no longer developed", "docs/pods.md", "Cloud TPU API"),
  (f"{TPU}/queued-resources", "a SUSPENDED request is not eligible any more", "launch/tpu_train.sh", "SUSPENDED)"),
  (f"{TPU}/spot", "spot TPUs cannot be restarted and have to be created again", "launch/tpu_train.sh", "asking for another"),
  (f"{GCLOUD}/compute/tpus/queued-resources/create", "--spot, --reserved, --service-account", "launch/tpu_pod.sh", "--reserved"),
  (f"{GCLOUD}/alpha/compute/tpus/queued-resources/create", "--provisioning-model, --max-run-duration: alpha alone",
   "launch/tpu_pod.sh", "gcloud ${FLEX_START:+alpha} compute"),
  (f"{TPU}/request-using-flex-start", "v5e and v6e, at most 7 days", "launch/tpu_pod.sh", "v5e and v6e, 7 days at most"),
  (f"{TPU}/quota", "reserved, on demand and preemptible are counted apart", "docs/pods.md", "preemptible (which spot"),
  ("https://github.com/kubernetes-sigs/jobset/releases", "its controller is one file to apply", "docs/pods.md", "jobset/releases/download/"),
  ("https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus", "v4: ct4p-hightpu-4t, tpu-v4-podslice",
   "docs/pods.md", "--machine-type=ct4p-hightpu-4t"),
  ("https://docs.cloud.google.com/kubernetes-engine/docs/concepts/tpus", "from GKE 1.28 on no privileged mode or capabilities",
   "launch/gke_jobset.yaml", "No securityContext: from GKE 1.28 on"),
]  # fmt: skip


@pytest.mark.parametrize("page, says, file, text", FACTS)
def test_a_fact_of_a_vendor_stands_where_it_is_used(page, says, file, text):
  assert text in (ROOT / file).read_text()


def test_no_page_sources_a_script_that_may_end_the_shell():
  """`. launch/setup.sh` closes the terminal of whoever gives it, when something is missing."""
  for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
    assert not re.search(r"(\.|source) launch/", page.read_text()), page


def launch_commands():
  """(page, script, words) of every `bash launch/...` that a page shows, continued lines joined."""
  for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
    for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():
      if found := re.match(r" {4,}bash launch/(\w+\.sh) ?(.*)", line):
        yield page.name, found[1], shlex.split(found[2], comments=True)


@pytest.mark.parametrize("page, script, words", list(launch_commands()), ids=lambda value: "-".join(value) if isinstance(value, list) else value)  # fmt: skip
def test_every_launch_command_of_a_page_can_be_given(page, script, words):
  """The script takes it, and simclr takes what it passes on."""
  if script in ("local.sh", "setup.sh", "test.sh"):
    return
  environment = GKE if script == "gke.sh" else POD | {"REPOSITORY": "https://example.org/x"}
  words = [word for word in words if word != "--dry-run"]
  done = bash(script, ("--dry-run", *words), environment)
  assert done.returncode == 0, done.stderr
  flags = (
    words
    if words and words[0].startswith("--")
    else words[words.index("pretrain") + 1 :]
    if "pretrain" in words
    else []
  )
  if script == "gke.sh" and flags:
    flags += ["--config=configs/v1.py:1x", "--workdir=x"]
  if flags:
    given = cli.parser().parse_args(["pretrain", *(flag for flag in flags if not flag.startswith("--config."))])
    config.load(given.config, [flag for flag in flags if flag.startswith("--config.")])


def test_imagenet_is_made_of_its_two_archives_by_the_command_of_the_page(tmp_path, monkeypatch):
  """On archives of a few images: `simclr` opens the result by the name that the recipes have."""

  def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))

  jpeg = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(jpeg, "JPEG")
  (tmp_path / "manual").mkdir()
  with tarfile.open(tmp_path / "manual/ILSVRC2012_img_train.tar", "w") as train:
    for name in ("n01440764", "n01443537"):
      images = io.BytesIO()
      with tarfile.open(fileobj=images, mode="w") as archive:
        for i in range(3):
          add(archive, f"{name}_{i}.JPEG", jpeg.getvalue())
      add(train, f"{name}.tar", images.getvalue())
  with tarfile.open(tmp_path / "manual/ILSVRC2012_img_val.tar", "w") as validation:
    for i in range(1, 5):
      add(validation, f"ILSVRC2012_val_{i:08}.JPEG", jpeg.getvalue())
  (command,) = re.findall(r'^    python -c "(.*?)"$', (ROOT / "docs/pods.md").read_text(), re.M | re.S)
  monkeypatch.chdir(tmp_path)
  exec(textwrap.dedent(f"    {command}"), {})
  source = data.open_source("tfds:imagenet2012:train", data_dir=str(tmp_path / "tfds"))
  assert len(source) == 6 and source.num_classes == 1000 and source.read(0).shape == (40, 60, 3)
  assert len(data.open_source("tfds:imagenet2012:validation", data_dir=str(tmp_path / "tfds"))) == 4


# ---- SLURM, GKE, the image ---------------------------------------------------------------------------------------------


def test_slurm_gives_every_process_a_gpu_and_its_cores():
  """A task sees all GPUs of its node, of which JAX gives the i-th the i-th: with --gpus-per-task JAX asks for one that is not
  visible (https://github.com/jax-ml/jax/issues/28194).  srun does not inherit --cpus-per-task since 22.05
  (https://slurm.schedmd.com/sbatch.html#OPT_cpus-per-task).  Read 2026-11-28."""
  script = (ROOT / "launch/slurm.sbatch").read_text()
  asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M))
  assert asked["gpus-per-node"] == asked["ntasks-per-node"] and "gpus-per-task" not in asked
  done = bash(*CASES["slurm"][:2], CASES["slurm"][2] | {"SLURM_CPUS_PER_TASK": "7"})
  assert "--cpus-per-task=7 " in done.stdout
  assert "--cpus-per-task=" + asked["cpus-per-task"] in bash(*CASES["slurm"]).stdout
  assert "#SBATCH --requeue\n" in script and ". launch/setup.sh" in script


def test_gke_passes_flags_through_to_simclr():
  flags = ("--config.encoder.arrangement=packed", "--config.data.data_dir=gs://b/a & b")
  manifest = yaml.safe_load(bash("gke.sh", ("--dry-run", *flags), GKE | {"SERVICE_ACCOUNT": "trainer"}).stdout)
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["command"][-3:] == ["--resume", *flags]
  assert pod["serviceAccountName"] == "trainer"


DOCKERFILE = (ROOT / "launch/Dockerfile").read_text()


def test_the_image_holds_the_package_and_runs_it_without_root(tmp_path):
  """As far as this can be seen without building it: the paths it copies are all that the package is built from."""
  lines = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
  verbs = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
  (accelerator,) = (rest for verb, rest in verbs if verb == "ARG")
  assert accelerator == "ACCELERATOR=cpu"
  assert [rest for verb, rest in verbs if verb == "USER"][-1] == "1000" and ("ENTRYPOINT", '["simclr"]') in map(
    tuple, verbs
  )
  (install,) = (rest for verb, rest in verbs if verb == "RUN")
  assert '--constraint requirements-lock.txt ".[${ACCELERATOR},gcs]"' in install
  for verb, rest in verbs:
    if verb == "COPY":
      *sources, target = rest.split()
      for source in sources:
        if (ROOT / source).is_dir():
          shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
          shutil.copy(ROOT / source, tmp_path / target)
  build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "lib"]
  subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
  shipped = {
    p.relative_to(tmp_path / "lib/simclr_jax") for p in (tmp_path / "lib/simclr_jax").rglob("*") if p.is_file()
  }
  package = subprocess.run(
    ["git", "ls-files", "."], cwd=ROOT / "simclr_jax", capture_output=True, text=True
  ).stdout.split()
  assert {pathlib.Path(p) for p in package} <= shipped
  assert {pathlib.Path("configs") / p.name for p in (ROOT / "configs").glob("*.py")} <= shipped


def test_extras_install_jax_for_each_accelerator_in_the_tested_version(tmp_path):
  """And the image's Python is the one that the versions were tested on."""
  extras = run_setup("extras_require")
  pins = re.findall(r"^jax==(\S+)( ;.*)?$", (ROOT / "requirements-lock.txt").read_text(), re.M)
  assert len(pins) == 2 and extras["cpu"] == []
  for name in ("cuda12", "cuda13", "tpu"):
    assert extras[name] == [f"jax[{name}]=={version}{condition}" for version, condition in pins]
  assert "FROM python:3.11-" in DOCKERFILE and "on Python 3.11" in (ROOT / "requirements-lock.txt").read_text()


def run_setup(argument):
  """An argument of setup() in setup.py."""
  given = {}
  code = compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    patch.chdir(ROOT)
    exec(code, {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
  return given[argument]


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_the_image_is_clean():
  done = subprocess.run(["hadolint", "launch/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and not done.stdout, done.stdout


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "local.sh"]
HEADERS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("page", [*PAGES, *HEADERS], ids=lambda page: page.name)
def test_every_command_that_is_written_down_can_be_given(page):
  """The flags exist and so do the recipes; running them is for other tests."""
  text = page.read_text().replace("\\\n", " ")
  for line in text.splitlines():
    found = re.match(r"(?:Command:)? *(simclr [a-z].*)", line.split("#")[0].split("      (")[0])
    if not found or "|" in found[1]:
      continue
    words = shlex.split(found[1])[1:]
    flags = cli.parser().parse_args([w for w in words if not w.startswith("--config.") and w not in ("...", "$@")])
    if "config" in flags and "$" not in flags.config:
      overrides = [w for w in words if w.startswith("--config.") and "=" in w]
      config.load(flags.config, overrides)


SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_an_array_may_be_empty_in_the_bash_of_a_mac(script):
  """Before bash 4.4, "${a[@]}" of an empty array is an unset variable, which `set -u` refuses; 3.2 has no ${a@Q} either."""
  text = script.read_text()
  for name in re.findall(r"\b(\w+)=\((?:\)|\$\{\w+:\+)", text):  # arrays that begin empty, or may
    guarded = f'${{{name}[@]+"${{{name}[@]}}"}}'
    assert f"{name}[@]" not in text.replace(guarded, "").replace(f"${{#{name}[@]}}", "")
  assert not re.search(r"\$\{[^}]*@[A-Z]\}", text)


def test_scripts_are_clean():
  scripts = SCRIPTS
  done = subprocess.run(
    ["shellcheck", "--exclude=SC1091", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
  assert all(len(s.read_text().splitlines()) <= 60 for s in scripts)
