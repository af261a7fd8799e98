"""The launch scripts, without a cloud: what they would run, byte for byte, and what a linter says of them."""

import os
import pathlib
import re
import shlex
import subprocess
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

from simclr_jax import __main__ as cli
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
  "multiprocess": ("multiprocess.sh", ("--dry-run", "2", *PRETRAIN), {}),
  "slurm": ("slurm.sbatch", ("--config.seed=1",), {"DRY_RUN": "1", "CONFIG": "smoke", "WORKDIR": "/shared/a b"}),
  "tpu_create": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"SPOT": "1"}),
  "tpu_create_v5e": ("tpu_pod.sh", ("--dry-run", "create"), POD | {"TYPE": "v5litepod-256"}),
  "tpu_setup": ("tpu_pod.sh", ("--dry-run", "setup"), POD | {"REPOSITORY": "https://example.org/simclr_jax.git"}),
  "tpu_run": ("tpu_pod.sh", ("--dry-run", "run", *PRETRAIN), POD),
  "tpu_logs": ("tpu_pod.sh", ("--dry-run", "logs"), POD),
  "tpu_stop": ("tpu_pod.sh", ("--dry-run", "stop"), POD),
  "tpu_delete": ("tpu_pod.sh", ("--dry-run", "delete"), POD),
  "gke": ("gke.sh", ("--dry-run",), GKE),
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
    ("gke.sh", ("--dry-run",), GKE | {"IMAGE": 'a"b'}, "IMAGE: no quotes"),
    ("gke.sh", ("--dry-run",), GKE | {"IMAGE": "a\\b"}, "IMAGE: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), GKE | {"WORKDIR": "gs://b/${HOSTS}"}, "WORKDIR: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), GKE | {"NAME": "a\nb"}, "NAME: no quotes, backslashes"),
    ("gke.sh", ("--dry-run",), {k: v for k, v in GKE.items() if k != "HOSTS"}, "HOSTS: is not set"),
    ("slurm.sbatch", (), {"DRY_RUN": "1", "WORKDIR": "/x"}, "CONFIG: recipe"),
    ("multiprocess.sh", ("--dry-run",), {}, "number of processes"),
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


def test_arguments_reach_the_workers_of_a_pod_as_they_were_given(tmp_path):
  simclr = tmp_path / "simclr_jax/.venv/bin/simclr"
  simclr.parent.mkdir(parents=True)
  simclr.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" > got.partial\nmv got.partial got\nexit 1\n")
  simclr.chmod(0o755)
  arguments = ["pretrain", "--config.a=it's", 'say "x"', "two\nlines", "$(touch pwned)", "a & b; c", "back\\slash", ""]
  subprocess.run(["bash", "-c", on_the_worker("run", *arguments)], cwd=tmp_path, check=True)
  got, end = tmp_path / "simclr_jax/got", time.monotonic() + 20
  while not got.exists() and time.monotonic() < end:
    time.sleep(0.01)
  assert got.read_text().split("\0")[:-1] == arguments
  assert not list(tmp_path.rglob("pwned"))


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


def test_scripts_are_clean():
  scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
  done = subprocess.run(
    ["shellcheck", "--exclude=SC1091", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
  assert all(len(s.read_text().splitlines()) <= 60 for s in scripts)
