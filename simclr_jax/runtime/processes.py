"""The processes of one run: they start together, and share what one of them found out."""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# The key-value store of the coordination service has no public name, nor do the clusters that JAX finds; this is the only
# module that touches them.
from jax._src import clusters as _clusters
from jax._src import distributed as _distributed
from jax._src import xla_bridge as _xla_bridge
from jax.experimental import multihost_utils

from simclr_jax.runtime import files, mesh, watchdog
from simclr_jax.runtime.errors import Unavailable, UserError

JOIN = (
  300.0  # seconds until every process has to be there: nodes of a pod pull images and read Python at their own pace
)
JOIN_HERE = 60.0  # the same where all of them are on this machine


_client: Any = None  # of the coordination service, in a run with several processes
_calls = itertools.count()  # names what the processes agree on: they all call the same functions in the same order


class NotJoined(UserError):
  """The other processes cannot be joined now: started again, they may find each other."""

  exit_code = watchdog.EXIT_LOST


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None):
  """Joins the other processes of the run, if there are any; call it before anything asks JAX for its devices.

  With arguments, the processes find each other at `coordinator` (host:port of process 0).  Without, JAX looks for a
  cluster (Cloud TPU, GKE, SLURM, Open MPI), and this process runs alone if there is none.

  Raises:
    ValueError: only some of the three arguments are given, or they contradict each other.
    NotJoined: JAX cannot join the others, for instance because another program has the port of process 0.
  """
  initialize = functools.partial(
    jax.distributed.initialize,
    heartbeat_timeout_seconds=60,
    shutdown_timeout_seconds=30,
    initialization_timeout=int(2 * JOIN),  # never reached: JAX would abort the process with a page of text
  )
  if coordinator is not None and num_processes is not None and process_id is not None:
    host, colon, port = coordinator.rpartition(":")
    if not colon:
      raise UserError(f"--coordinator={coordinator}: expected host:port of process 0, such as 10.0.0.2:8476")
    if not 0 <= process_id < num_processes:
      raise UserError(f"--process_id={process_id}: expected 0 to {num_processes - 1}, below --num_processes")
    # The service answers anybody who can reach it: on one machine it listens to that machine only.
    here = host in ("localhost", "127.0.0.1")
    bind = f"{host}:{port}" if here else None
    try:
      with _limited(JOIN_HERE if here else JOIN, f"process {process_id} of {num_processes}", f" at {coordinator}"):
        initialize(coordinator, num_processes, process_id, coordinator_bind_address=bind)
    except RuntimeError as error:
      raise NotJoined(f"--coordinator={coordinator} cannot be joined: {error}") from None
  else:
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) < 3:
      raise UserError(f"{', '.join(missing)} missing: give all of --coordinator --num_processes --process_id, or none")
    if _xla_bridge.backends_are_initialized():  # this process runs alone, in a notebook for instance
      return
    try:
      with _limited(JOIN, "this process", ""):
        initialize()
    except RuntimeError as error:
      if _size_of_cluster() == 1:  # two commands in one job want the same port, and need none
        return
      raise NotJoined(f"a cluster was found but cannot be joined: {error}") from None
    except ValueError as error:
      if "coordinator_address should be defined" in str(error):  # no cluster was found
        return
      raise UserError(f"a cluster was found but cannot be joined: {error}") from None
  mesh.check_devices()
  global _client
  if jax.process_count() > 1:
    _client = _distributed.global_state.client
    watchdog.start(_client, jax.process_index(), jax.process_count())


def _size_of_cluster() -> int | None:
  """Number of processes of the cluster that JAX finds, or None if there is none."""
  kinds = _clusters.ClusterEnv._cluster_types
  found = next((kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present()), None)
  return found and found.get_process_count()


def check_alone(command: str):
  """Checks that this process is no part of a cluster, for a command whose processes would not join each other.

  Raises:
    UserError: it is one of several.
  """
  # The shell of `salloc` is a step of one process, although SLURM_NTASKS counts those that it may start.
  if os.environ.get("SLURM_STEP_ID") == "4294967290" or os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
    return
  try:
    with warnings.catch_warnings(action="ignore"):  # of a package that is missing in a pod of Kubernetes
      count = _size_of_cluster() or 1
  # Whatever a cluster's own interface raises where it does not say, as for a single pod in Kubernetes.
  except Exception:
    return
  if count > 1:
    raise UserError(
      f"{command} runs in one process, and {count} have been started here: start it once, on a machine or TPU of one host"
    )


@contextlib.contextmanager
def _limited(seconds: float, who: str, where: str):
  """Ends the process with one line if what is within it takes longer."""

  def give_up():
    print(
      f"simclr: {who} has waited {seconds:.0f} s{where} for all processes of the run to join: check the output of the others, "
      "and start all of them with the same flags",
      file=sys.stderr,
      flush=True,
    )
    os._exit(watchdog.EXIT_LOST)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def agree(facts: Mapping[str, Any]):
  """Checks that every process has the same facts, such as values of the config; all of them call it.

  Args:
    facts: name -> JSON value.

  Raises:
    UserError: on every process, one line with the first name that differs, its values and the process.
  """
  if not is_multiprocess():
    return
  key = f"simclr/facts/{next(_calls)}"
  _client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(facts))

  def compare():
    mine = json.loads(json.dumps(facts))
    for process in range(1, jax.process_count()):
      theirs = json.loads(_client.blocking_key_value_get(f"{key}/{process}", _timeout_ms()))
      check_agreement(mine, theirs, process)

  run_on_primary(compare)


def check_agreement(first: Mapping[str, Any], other: Mapping[str, Any], process: int):
  """Raises UserError unless the facts of process 0 and those of another one are the same."""
  different = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
  if different:
    name = different[0]
    more = f" ({len(different)} such differences)" if len(different) > 1 else ""
    raise UserError(
      f"process {process} has {name}={other.get(name)!r} and process 0 has {first.get(name)!r}{more}: start all processes "
      "with the same command, code and data"
    )


def of_this_program() -> dict[str, str]:
  """What must be the same in every process, whatever it computes: this package's code and the versions of libraries."""
  package = pathlib.Path(__file__).resolve().parents[1]
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    digest.update(f"{path.relative_to(package)} {files.sha256(path)}\n".encode())
  facts = {"code of simclr_jax (SHA-256)": digest.hexdigest()[:16], "Python": sys.version.split()[0]}
  for library in ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "tensorflow"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      facts[library] = importlib.metadata.version(library)
  return facts


def is_multiprocess() -> bool:
  return _client is not None


def process_index() -> int:
  return jax.process_index() if is_multiprocess() else 0


def run_on_primary(what):
  """`what()` run by process 0 alone: its result (of JSON values), or its ValueError or OSError, on every process."""
  if not is_multiprocess():
    return what()
  key = f"simclr/primary/{next(_calls)}"
  if jax.process_index() == 0:
    try:
      answer = {"result": what()}
    except (ValueError, OSError) as error:
      _client.key_value_set(key, json.dumps({"kind": _kind(error), "error": str(error)}))
      raise
    _client.key_value_set(key, json.dumps(answer))
    return answer["result"]
  answer = json.loads(_client.blocking_key_value_get(key, _timeout_ms()))
  if "error" in answer:
    raise _KINDS[answer["kind"]](answer["error"])
  return answer["result"]


# What an error of process 0 becomes in the others, which should end with the same exit code.
_KINDS = {"Unavailable": Unavailable, "OSError": OSError, "UserError": UserError}


def _kind(error) -> str:
  return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "UserError")


def barrier(name: str):
  """Waits until every process has arrived here, so that none is late for the collectives that follow."""
  # Not multihost_utils.sync_global_devices: that waits in a collective on the devices, and collectives are what gives up
  # (Gloo, on CPUs) or waits forever (on TPUs) when a process comes late or never.  The coordination service waits as
  # long as the watchdog lets a phase take; where a process is lost meanwhile, the watchdog ends those that wait.
  if is_multiprocess():
    _client.wait_at_barrier(f"simclr/{name}/{next(_calls)}", _timeout_ms())


def _timeout_ms() -> int:
  return int(1000 * watchdog.longest_wait())


def gather(x):
  """A global array as numpy, on every process."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True) if is_multiprocess() else x)


def gather_rows(x):
  """numpy [b, ...] of every process, one after the other: [processes * b, ...]."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True)) if is_multiprocess() else x


def preempted(step: int) -> bool:
  """Whether a SIGTERM that reached any process stops all of them after this step; call it after every step."""
  return is_multiprocess() and multihost_utils.reached_preemption_sync_point(step)
