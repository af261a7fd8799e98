"""One run at a time in a workdir: a file LOCK says who has it, and shows every BEAT seconds that its owner is alive."""

import atexit
import contextlib
import json
import os
import socket
import threading
import time

from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

NAME = "LOCK"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 10.0  # seconds in which a lock that is taken for moments must come free
SILENCE = 60.0  # seconds without one, after which an owner on another machine counts as dead
SHARED = 90.0  # seconds until a new lock is seen on other machines: NFS keeps what it knew of a folder for up to 60

_held = {}  # path of a lock of this process -> the text it was taken with
_lost = {}  # path of a lock that was taken over -> who has it
_renewing = False  # whether the thread that shows signs of life has been started
_guard = threading.Lock()


def take(workdir):
  """Takes the lock of a workdir; a lock of this process is kept.

  The lock of a process that is gone is taken over: at once if it was a process on this machine, otherwise after SILENCE
  seconds without renewal.

  Raises:
    UserError: another run has it; one line with its host, process id and start time.
  """
  path = _of(workdir)
  with _guard:
    if str(path) in _held:
      return
  global _renewing
  text = json.dumps(_me() | {"beat": 0})
  while not files.create_text(path, text):
    _wait_for_the_end(path)
  with _guard:
    if not _renewing:
      _renewing = True
      atexit.register(release_all)
      threading.Thread(target=_renew, daemon=True, name="locks of workdirs").start()
    _held[str(path)] = text
    _lost.pop(str(path), None)


def release(workdir):
  """Gives the lock back; nothing happens if this process does not have it."""
  path = _of(workdir)
  with _guard:
    text = _held.pop(str(path), None)
    if text is not None and _is_same_owner(_read(path), text):
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(workdir):
  """The lock of a folder that others take for moments only, and are waited for: PATIENCE at most.

  Raises:
    UserError: as `take`.
  """
  end = time.monotonic() + PATIENCE
  while True:
    try:
      take(workdir)
      break
    except UserError:
      if time.monotonic() > end:
        raise
      time.sleep(0.1)
  try:
    yield
  finally:
    release(workdir)


def check(workdir):
  """Raises UserError if this process had the lock of a workdir and another run has taken it over since."""
  if owner := _lost.get(str(_of(workdir))):
    raise UserError(
      f"--workdir={workdir}: this run was silent for over {SILENCE:.0f} s and {owner} has taken over; nothing was saved"
    )


def text_of(workdir) -> str:
  """What this process has written into the lock that it has taken."""
  with _guard:
    return _held[str(_of(workdir))]


def check_shared(workdir, text: str):
  """Raises UserError unless the lock of a workdir, which process 0 has taken with this text, is seen by this process too."""
  path, end = _of(workdir), time.monotonic() + SHARED
  while not _is_same_owner(_read(path), text):
    if time.monotonic() > end:
      raise UserError(
        f"--workdir={workdir}: {socket.gethostname()} does not see there what {json.loads(text)['host']} has written: name "
        "a folder or bucket that all hosts of the run share"
      )
    time.sleep(0.5)


def _of(workdir):
  return files.absolute(workdir if files.is_remote(workdir) else os.path.realpath(workdir)) / NAME


def _me() -> dict:
  return {
    "host": socket.gethostname(),
    "machine": _machine(),
    "process": os.getpid(),
    "ticks": _ticks(os.getpid()),
    "started": time.strftime("%Y-%m-%d %H:%M:%S"),
  }


def _machine() -> str:
  """Tells apart machines, their starts, and containers whose process ids mean different processes; empty: unknown."""
  try:
    with open("/proc/sys/kernel/random/boot_id") as file:
      return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _ticks(process: int) -> str:
  """When a process of this machine started, in ticks since the machine did; empty: there is no such process."""
  try:
    with open(f"/proc/{process}/stat") as file:
      fields = file.read().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in "ZX" else fields[19]


def _read(path) -> str:
  try:
    return files.read_text(path)
  except OSError:
    return ""


def _wait_for_the_end(path):
  """Removes the lock of an owner that is gone, which may take up to SILENCE; raises UserError if it is alive."""
  first = _read(path)
  if not first:  # just made or given back; one that stays empty is of a process that was killed while it made it
    time.sleep(1.0)
    if not _read(path):
      files.remove_text(path, "")
    return
  try:
    owner = json.loads(first)
    host, process, started = owner["host"], owner["process"], owner["started"]
    here = bool(owner["machine"]) and owner["machine"] == _machine()
    gone = here and _ticks(process) != owner["ticks"]
  except (ValueError, KeyError, TypeError):  # damaged
    host, process, started, here, gone = "an unknown host", "unknown", "at an unknown time", False, False
  if not here:
    print(
      f"{path} belongs to process {process} on {host}: waiting up to {SILENCE:.0f} s for a sign of life", flush=True
    )
    end = time.monotonic() + SILENCE
    while time.monotonic() < end and _read(path) == first:
      time.sleep(min(1.0, SILENCE / 10))
    gone = _read(path) in (first, "")
  if not gone:
    raise UserError(
      f"{os.path.dirname(path)} is in use by process {process} on {host}, started {started}: wait for that run, stop it, "
      "or name another folder"
    )
  files.remove_text(path, first)


def _renew():
  beat = 0
  while True:
    time.sleep(BEAT)
    beat += 1
    with _guard:
      for path, text in list(_held.items()):
        found = _read(files.absolute(path))
        if _is_same_owner(found, text):
          with contextlib.suppress(OSError):  # a full disk, or a file system or bucket that is away for a moment
            files.write_text(path, json.dumps({**json.loads(text), "beat": beat}))
        elif found:
          _lost[path] = _owner(found)
          del _held[path]


def _is_same_owner(found: str, text: str) -> bool:
  """Whether two texts of a lock differ in the sign of life at most: one may be there whose writing seemed to fail."""
  try:
    one, other = ({**json.loads(one), "beat": None} for one in (found, text))
  except (ValueError, TypeError):  # damaged
    return False
  return one == other


def _owner(text) -> str:
  try:
    owner = json.loads(text)
    return f"process {owner['process']} on {owner['host']}"
  except (ValueError, KeyError, TypeError):
    return "another run"


def release_all():
  """Gives back every lock of this process, which is about to end."""
  for path in list(_held):
    with contextlib.suppress(Exception):  # a disk that is gone
      release(os.path.dirname(path))
