"""Ends this process when another process of the run is gone, or when its own main thread hangs.

JAX alone lets the other processes wait for minutes when one raises, and forever when one hangs.  Here every
process of a run with several processes has a guard: a thread that says "alive" to the others through JAX's coordination
service, and that ends its own process, with one line, when another has stopped or fallen silent, or when the main
thread has not moved for too long.  It learns this time limit from the steps, evaluations and saves that went well.
"""

import collections
import contextlib
import faulthandler
import itertools
import math
import os
import socket
import sys
import threading
import time

from simclr_jax.runtime import errors
from simclr_jax.runtime.errors import EXIT_LOST, UserError

RECUR = (1, 2)  # exit codes of errors that would come again after a restart: the other processes end with them too
BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as gone
STEP = ("data", "step", "between")  # phases of one training step
UNLIKE = ("start", "save wait", "trace")  # phases whose time says nothing about the next: restoring, waiting for a disk
FIRST = 3600.0  # seconds these may take, and a phase of which nothing is known yet: compiling, the first evaluation
EARLY, ENOUGH = 40.0, 20  # seconds a phase of a step may take until ENOUGH were seen
LEAST, MOST = 20.0, 60.0  # seconds between which lies the limit of a phase of a step after that
TIMES = 5  # as long as the longest may one take
OF_A_BUCKET = 60.0  # seconds that any phase may take in a process that uses a bucket, whose client asks six times

_guard = None
_least = 0.0  # seconds that any phase may take


class Limits:
  """How long each phase may take, learned from how long it took.

  A step may take five times the longest, within LEAST and MOST, but always twice the longest.  The very first step, in which
  a pipeline fills its buffers, is not counted once ENOUGH were seen.  Other phases may take five times the longest, and at
  least LEAST.  In a process that uses a bucket, each may take OF_A_BUCKET: while one process waits for an answer, the others
  wait for it in their step.  SIMCLR_HANG_SECONDS replaces the learned limit for steps.

  Raises:
    UserError: SIMCLR_HANG_SECONDS is not a number of seconds.
  """

  def __init__(self):
    self._given = _given()
    self._first, self._longest, self._count = {}, {}, collections.Counter()

  def note(self, phase: str, seconds: float):
    """A phase went well."""
    if phase in UNLIKE:
      return
    if self._count[phase]:
      self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)
    else:
      self._first[phase] = seconds
    self._count[phase] += 1

  def of(self, phase: str) -> float:
    """Seconds after which a phase counts as hung."""
    return self._given if phase in STEP and self._given else max(self._learned(phase), _least)

  def _learned(self, phase: str) -> float:
    if not self._count[phase]:
      return FIRST
    first, longest = self._first[phase], self._longest.get(phase, 0.0)
    if phase not in STEP:
      return max(TIMES * max(first, longest), LEAST)
    if self._count[phase] < ENOUGH:
      return max(EARLY, 2 * max(first, longest))
    return max(min(max(TIMES * longest, LEAST), MOST), 2 * longest)


def _given() -> float:
  """SIMCLR_HANG_SECONDS; 0.0 if it is not set."""
  text = os.environ.get("SIMCLR_HANG_SECONDS", "")
  try:
    if not text or 0 < float(text) < math.inf:
      return float(text or 0)
  except ValueError:
    pass
  raise UserError(f"SIMCLR_HANG_SECONDS={text}: expected a number of seconds, such as 600")


def start(client, index: int, count: int):
  """Starts the guard of process `index` of `count`; `client` is that of JAX's coordination service.

  Raises:
    UserError: SIMCLR_HANG_SECONDS is not a number of seconds.
  """
  global _guard
  _given()
  _guard = _Guard(client, index, count)


def set_phase(phase: str):
  """Tells the guard that the main thread has entered this phase (one of progress.Clock), and that the previous one went
  well."""
  if _guard:
    _guard.set_phase(phase)


@contextlib.contextmanager
def training():
  """Within it the guard learns how long phases take; outside, any phase may take FIRST."""
  if _guard:
    _guard.limits = Limits()
  try:
    yield
  finally:
    if _guard:
      _guard.limits = None


def use_bucket():
  """Every phase of this process may take OF_A_BUCKET from now on."""
  global _least
  _least = OF_A_BUCKET


def await_verdict() -> int:
  """After an operation between processes has failed: waits until the guard knows who is gone, and ends this process.

  Returns:
    the exit code of this process where nobody is gone: that of a lost process where there are others, because a device or
    the network has failed.
  """
  if not _guard:
    return 1
  time.sleep(SILENCE + 3 * BEAT)
  return EXIT_LOST


def leave(code: int, message: str = ""):
  """Signs off from the others.  If this process failed, it ends at once and they are told why; otherwise it returns."""
  if _guard and code not in (0, 42):
    _guard.stop(message or f"it stopped with exit code {code}", code)
  if _guard:
    _guard.leave()


def longest_wait() -> float:
  """Seconds that a process may spend in its slowest phase, after which there is no point in waiting for it."""
  return 2 * FIRST


class _Guard(threading.Thread):
  """Ends this process when another has no sign of life, or when its own main thread has not moved for too long.

  A second thread exchanges the signs with the coordination service, which lives in process 0: where that is stopped the
  exchange never returns, and it is by this that process 0 counts as gone.
  """

  def __init__(self, client, index: int, count: int):
    super().__init__(daemon=True, name="guard")
    self.done = threading.Event()
    self._client, self._index, self._count = client, index, count
    self._phase, self._since = "start", time.monotonic()
    self.limits: Limits | None = None  # while training: how long a phase may take
    # process -> (its last word, when that was new here); one may be gone before its first
    self._heard = dict.fromkeys(range(count), ("", self._since))
    self._gone, self._left = {}, {}  # process -> its exit code and why
    self._answered = self._since  # when the service last did
    threading.Thread(target=self._exchange, daemon=True, name="signs of life").start()
    self.start()

  def set_phase(self, phase):
    now = time.monotonic()
    if self.limits:
      self.limits.note(self._phase, now - self._since)
    self._phase, self._since = phase, now

  def leave(self):
    self._set("left", "")
    self.done.set()

  def stop(self, why: str, code: int):
    """Says why, and ends the process without waiting for anybody."""
    self._set("gone", f"{code}|{why}")
    self._exit(code)

  def _exit(self, code):
    sys.stdout.flush()
    sys.stderr.flush()
    if self._index == 0:
      time.sleep(3 * BEAT)  # the service lives in this process: the others read the reason before it ends
    os._exit(code)

  def _set(self, key, value):
    try:
      self._client.key_value_set(f"simclr/{key}/{self._index}", value, allow_overwrite=True)
    except Exception:  # the service itself is gone, and JAX ends the process
      pass

  def _words(self, key):
    return {int(k.rpartition("/")[2]): v for k, v in self._client.key_value_dir_get(f"simclr/{key}")}

  def _exchange(self):
    host = socket.gethostname()
    for beat in itertools.count():
      phase, since = self._phase, self._since
      self._set("alive", f"{beat}|{host}|{phase}|{time.monotonic() - since:.0f}")
      try:
        alive, self._gone, self._left = (self._words(key) for key in ("alive", "gone", "left"))
        now = time.monotonic()
        self._heard |= {p: (word, now) for p, word in alive.items() if self._heard[p][0] != word}
        self._answered = now  # last, for silence is counted up to here
      except Exception:  # see _set
        pass
      if self.done.wait(BEAT):
        return

  def run(self):
    awake = paused = time.monotonic()
    while not self.done.wait(BEAT):
      now = time.monotonic()
      if now - awake > 3 * BEAT:  # this process was stopped itself, and has neither worked nor listened meanwhile
        paused, self._since = now, self._since + now - awake
      awake = now
      gone = {p: word for p, word in self._gone.items() if p != self._index}
      for process, (_, since) in self._heard.items():
        if process not in gone and process not in self._left and self._answered - since > SILENCE:
          gone[process] = f"{EXIT_LOST}|no sign of life for {self._answered - since:.0f} s"
      if gone:
        process, word = min(gone.items())
        code, _, why = word.partition("|")
        self._end(self._named(process, why), int(code) if int(code) in RECUR else EXIT_LOST)
      silent = now - max(self._answered, paused)
      if self._index and silent > SILENCE:
        self._say(self._named(0, f"no answer from it for {silent:.0f} s"))
        self._exit(EXIT_LOST)  # there is nobody to tell why
      phase, limits = self._phase, self.limits
      limit = limits.of(phase) if limits else FIRST
      if now - self._since > limit and self._phase is phase:
        if phase.startswith("step") and (waited_for := self._waited_for(limit)):
          self._end(waited_for)
        faulthandler.dump_traceback(file=sys.stderr)
        self._end(f"process {self._index} of {self._count} has been in phase {phase!r} for over {limit:.0f} s")

  def _waited_for(self, limit):
    """Of the processes that have not come to the step for about as long as this one waits in it, the first; in words."""
    for process, (word, _) in self._heard.items():
      _, _, phase, seconds = word.split("|") if word else ("", "", "start", "0")
      elsewhere = process != self._index and process not in self._left and not phase.startswith("step")
      if elsewhere and float(seconds) > limit / 2:
        return self._named(process, f"in phase {phase!r} for {seconds} s")

  def _named(self, process, why):
    word, _ = self._heard[process]
    host = word.split("|")[1] if word else ""
    return f"process {process} of {self._count}{f' (on {host})' if host else ''} is gone: {why}"

  def _say(self, why):
    print(f"simclr: {why}; the last checkpoint is complete; {errors.to_resume}", file=sys.stderr)

  def _end(self, why, code=EXIT_LOST):
    self._say(why)
    self.stop(why, code)
