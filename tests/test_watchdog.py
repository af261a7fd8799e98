"""How long a phase of a run may take before it counts as hung."""

import asyncio
import os
import random
import threading
import time

import pytest

from simclr_jax.runtime import files, watchdog
from simclr_jax.runtime.errors import UserError


@pytest.fixture(autouse=True)
def without_a_bucket(monkeypatch):
  """Another test of this process may have used one."""
  monkeypatch.setattr(watchdog, "_least", 0.0)


def learned(phase, *seconds):
  limits = watchdog.Limits()
  for taken in seconds:
    limits.note(phase, taken)
  return limits.of(phase)


def test_the_limit_of_a_step():
  assert learned("step") == watchdog.FIRST == 3600
  assert learned("step", 0.1) == 40
  assert learned("step", 30, *[0.1] * 10) == 60  # the first fills buffers
  assert learned("step", 300, *[0.1] * 19) == 20  # and says nothing once others were seen
  assert learned("step", *[6.0] * 20) == 30
  assert learned("step", *[0.1] * 19, 10.0) == 50
  assert learned("step", *[20.0] * 20) == 60
  assert learned("step", *[50.0] * 20) == 100  # an honest step is never too long
  for phase in ("data", "between"):
    assert learned(phase, *[0.1] * 20) == 20


def test_the_limit_of_other_phases():
  assert learned("evaluate knn") == learned("compile") == 3600
  assert learned("evaluate knn", 30.0) == 150
  assert learned("save", 0.1) == 20
  assert learned("save wait", *[0.1] * 50) == 3600  # the disk takes what it takes


def test_a_number_of_ones_own(monkeypatch):
  monkeypatch.setenv("SIMCLR_HANG_SECONDS", "600")
  assert learned("step", *[0.1] * 20) == learned("data") == 600
  assert learned("evaluate knn", 30.0) == 150


@pytest.mark.parametrize("text", ["10m", "nan", "inf", "0", "-3"])
def test_a_number_of_ones_own_is_read_before_the_guard_starts(monkeypatch, text):
  monkeypatch.setenv("SIMCLR_HANG_SECONDS", text)
  monkeypatch.setattr(watchdog, "_guard", None)
  with pytest.raises(UserError, match=f"SIMCLR_HANG_SECONDS={text}: expected a number of seconds, such as 600"):
    watchdog.start(Service(), 0, 1)
  assert watchdog._guard is None


def test_a_request_to_a_bucket_may_be_sent_six_times_within_a_phase(monkeypatch):
  """The first is never answered, the next four fail: the pauses are those that gcsfs makes."""
  gcs = pytest.importorskip("simclr_jax.runtime.gcs")
  from gcsfs import retry

  pauses = []

  async def sleep(seconds):
    pauses.append(seconds)

  async def fail():
    raise retry.HttpError({"code": 503})

  monkeypatch.setattr(retry.asyncio, "sleep", sleep)
  monkeypatch.setattr(retry.random, "random", lambda: 1.0)
  with pytest.raises(retry.HttpError):
    asyncio.run(retry.retry_request(retries=gcs.FileSystem.retries)(fail)())
  assert len(pauses) == 5
  gcs.FileSystem(token="anon", skip_instance_cache=True)
  for phase in ("data", "step", "between", "step compare", "save", "evaluate knn"):
    for times in (1, 20):
      assert learned(phase, *[0.1] * times) > gcs.SILENCE + sum(pauses)
  assert float(os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"]) == gcs.SILENCE, files


@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_steps_with_stalls_of_ten_seconds_give_no_alarm(seed):
  """Steps that busy cores make three times as long now and then, one in fifty with a stall, from the first on."""
  rng = random.Random(seed)
  limits = watchdog.Limits()
  for _ in range(1000):
    for phase, typical in (("data", 0.01), ("step", rng.choice((0.2, 3.0))), ("between", 0.001)):
      taken = typical * rng.uniform(1, 3) + (rng.random() < 0.02) * rng.uniform(0, 10)
      assert taken < limits.of(phase)
      limits.note(phase, taken)


class Service:
  """The coordination service's key-value store, for one process."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, **_):
    self.values[key] = value

  def key_value_dir_get(self, prefix):
    return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def guard(monkeypatch):
  """A guard at a hundredth of the time, which does not end this process but says that it would; (guard, what it said)."""
  for name in ("BEAT", "SILENCE", "FIRST", "EARLY", "LEAST", "MOST"):
    monkeypatch.setattr(watchdog, name, getattr(watchdog, name) / 100)
  said, ended = [], threading.Event()
  monkeypatch.setattr(watchdog._Guard, "_exit", lambda self, code: (ended.set(), self.done.set()))
  monkeypatch.setattr(watchdog._Guard, "_say", lambda self, why: said.append(why))
  guard = watchdog._Guard(Service(), 0, 1)
  guard.limits = watchdog.Limits()
  monkeypatch.setattr(watchdog, "_guard", guard)
  yield guard, said, ended
  guard.done.set()


def test_a_phase_that_hangs_ends_the_process(guard, capfd):
  guard, said, ended = guard
  for _ in range(25):
    watchdog.set_phase("data")
    time.sleep(0.001)
    watchdog.set_phase("between")
  time.sleep(0.1)
  assert not said
  watchdog.set_phase("data")
  began = time.monotonic()
  assert ended.wait(5) and time.monotonic() - began > 0.15
  assert "process 0 of 1 has been in phase 'data' for over" in said[0]
  assert "Thread" in capfd.readouterr().err


@pytest.mark.parametrize("code, expected", [(1, 1), (2, 2), (142, 142), (130, 142), (134, 142)])
def test_the_others_end_with_the_code_of_an_error_that_would_recur(monkeypatch, code, expected):
  """Or launch scripts, which see the highest code, would start the run again and again."""
  monkeypatch.setattr(watchdog, "BEAT", 0.01)
  service, codes, said = Service(), {}, []

  def leave(self, code):
    codes[self._index] = code
    self.done.set()

  monkeypatch.setattr(watchdog._Guard, "_exit", leave)
  monkeypatch.setattr(watchdog._Guard, "_say", lambda self, why: said.append(why))
  guards = [watchdog._Guard(service, index, 3) for index in range(3)]
  guards[1].stop("no such recipe", code)
  for guard in guards:
    guard.join(10)
  assert codes == {0: expected, 1: code, 2: expected}
  assert all("of 3" in why and "is gone: " in why and "no such recipe" in why for why in said) and len(said) == 2


def test_a_process_that_was_stopped_itself_is_not_hung(guard, monkeypatch):
  """A machine that is moved, or SIGSTOP: nothing of the time counts in which the guard itself did not run."""
  guard, said, ended = guard
  for _ in range(25):
    watchdog.set_phase("data")
  clock = time.monotonic
  away = clock() + 0.05
  monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock() + (100.0 if clock() > away else 0.0))
  assert not ended.wait(0.12) and not said
  assert ended.wait(5)  # and then it hangs
