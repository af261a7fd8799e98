"""The loop on a state of two arrays, whose update takes microseconds: what a resumed run must do as one never stopped."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import __main__ as cli
from simclr_jax import report
from simclr_jax.model import TrainState
from simclr_jax.programs import config as config_lib
from simclr_jax.runtime import checkpoint, loop, metrics, processes, progress
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

ROWS = 8


def init(key):
  return TrainState(jnp.zeros((), jnp.int32), {"w": jax.random.normal(key, (4,))}, {}, {})


def step(state, batch):
  params = {"w": 0.9 * state.params["w"] + batch["x"].mean(0)}
  loss = 2.0 + 0.1 * jnp.sin(state.step) + jnp.max(batch["leap"])
  return state.replace(step=state.step + 1, params=params), {"loss": loss}


def task(steps, leaps=(), stop_at=None, stop=KeyboardInterrupt):
  """Batches numbered from 0; those of `leaps` make the loss leap, and number `stop_at` is not reached."""

  def stream(first):
    for number in range(first, 2 * steps):
      if number == stop_at:
        raise stop
      x = np.random.default_rng(number).standard_normal((ROWS, 4), np.float32)
      yield {"x": x, "leap": np.full(ROWS, float(number in leaps), np.float32)}

  return loop.Task(
    init=init, step=step, stream=stream, evaluators={}, total_steps=steps, batch_size=ROWS, num_examples=100 * ROWS,
    exports=lambda state: {},
  )  # fmt: skip


def run(workdir, task, **options):
  config = loop.LoopConfig(**{"log_every": 5, "checkpoint_every": 65, **options})
  state, _ = loop.run(task, config, mesh=mesh_lib.make_mesh(), workdir=workdir, config_json="{}", seed=0)
  return np.asarray(state.params["w"])


def losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows}


def test_a_resumed_run_knows_the_losses_that_a_leap_is_measured_against(tmp_path):
  """Also one that has gone back before it was killed."""
  wary = {"rollback": loop.Rollback(times=3, spike=6.0), "keep": 9}
  leaps = {133, 142}  # in the updates 134 and, past the batches 130 to 134, 138
  straight = run(tmp_path / "straight", task(150, leaps), **wary)
  skipped = (tmp_path / "straight/skipped.json").read_text()
  assert json.loads(skipped) == [[130, 5], [130, 10]]
  for stop_at in (131, 137, 148):  # before the first leap, between the two, and after both
    where = tmp_path / f"{stop_at}"
    with pytest.raises(KeyboardInterrupt):
      run(where, task(150, leaps, stop_at), **wary)
    np.testing.assert_array_equal(run(where, task(150, leaps), **wary), straight)
    assert (where / "skipped.json").read_text() == skipped
    assert losses(where) == losses(tmp_path / "straight")


def test_a_signal_during_traced_steps_ends_the_trace(tmp_path, monkeypatch):
  calls, begun = [], task(30)
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

  def stream(first):
    for number, batch in enumerate(begun.stream(first), first):
      if number == 12:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with pytest.raises(loop.Interrupted):
    run(tmp_path / "run", dataclasses.replace(begun, stream=stream), profile_steps=8)
  assert calls == ["start", "stop"]


@pytest.mark.parametrize("at", [3, 4])
def test_a_signal_while_a_step_is_saved_is_not_forgotten(tmp_path, at):
  """Also where it is the last one, after which a program goes on with its report."""

  def exports(state):
    if int(state.step) == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}

  told = dataclasses.replace(task(4), exports=exports)
  with pytest.raises(loop.Interrupted, match=f"SIGTERM: stopped after step {at} and saved it") as stopped:
    run(tmp_path, told, checkpoint_every=3)
  assert stopped.value.exit_code == 42
  assert (tmp_path / f"checkpoints/{at}/manifest.json").exists()


def test_a_run_that_fails_while_a_step_is_written_leaves_it_complete(tmp_path, monkeypatch):
  """And one whose step cannot be written stops at the next step, not at the next save."""
  seal = checkpoint.seal
  monkeypatch.setattr(checkpoint, "seal", lambda *a, **k: (time.sleep(0.3), seal(*a, **k)))
  with pytest.raises(RuntimeError, match="no data"):
    run(tmp_path / "a", task(40, stop_at=3, stop=RuntimeError("no data")), checkpoint_every=3)
  assert (tmp_path / "a/checkpoints/3/manifest.json").exists()
  with pytest.raises(RuntimeError, match="no data"):  # before there is anything to finish
    run(tmp_path / "c", task(40, stop_at=1, stop=RuntimeError("no data")), checkpoint_every=3)
  monkeypatch.setattr(checkpoint, "seal", lambda *_, **__: (_ for _ in ()).throw(OSError("no such bucket")))
  slow = dataclasses.replace(task(400), stream=lambda first: (time.sleep(0.02) or x for x in task(400).stream(first)))
  with pytest.raises(checkpoint.NotSaved, match="could not save step 3: no such bucket"):
    run(tmp_path / "b", slow, checkpoint_every=3, log_every=1)
  assert len(losses(tmp_path / "b")) < 100


# ---- evaluations -------------------------------------------------------------------------------------------------------


def evaluated(steps, fault=lambda step: None, **changes):
  """A task that is evaluated every third step; `fault` is called with the step before."""

  def evaluate(state):
    fault(int(state.step))
    return {"knn": float(state.params["w"].sum()), "verdict": "fine"}

  return dataclasses.replace(task(steps), evaluators={"knn": loop.Evaluator(evaluate, 3)}, **changes)


def rows(workdir):
  found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(row["step"], row.get("loss"), row.get("knn")) for row in found]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(final weights, rows) of ten steps, with evaluations after 3, 6, 9 and 10."""
  workdir = tmp_path_factory.mktemp("loop") / "run"
  w = run(workdir, evaluated(10), log_every=1)
  return w, rows(workdir)


def test_an_evaluation_that_fails_costs_no_step(tmp_path, undisturbed):
  """Not even where only the last step is saved; the resumed run evaluates and makes no update."""
  straight, expected = undisturbed

  def unreadable(step):
    if step == 10:
      assert (tmp_path / "checkpoints/10/manifest.json").exists()  # a process that is killed here has it
      raise UserError("no test image can be read")

  with pytest.raises(UserError, match="no test image can be read"):
    run(tmp_path, evaluated(10, unreadable), log_every=1, checkpoint_every=0)
  assert rows(tmp_path) == expected[:-1]
  idle = dataclasses.replace(evaluated(10), step=pytest.fail)
  np.testing.assert_array_equal(run(tmp_path, idle, log_every=1, checkpoint_every=0), straight)
  assert rows(tmp_path) == expected
  done = dataclasses.replace(evaluated(10, pytest.fail), step=pytest.fail)
  run(tmp_path, done, log_every=1, checkpoint_every=0)  # which is not evaluated again
  assert rows(tmp_path) == expected


@pytest.mark.parametrize(
  "where, fault, at, saved",
  [
    ("evaluate", "killed", 3, 2),
    ("evaluate", "killed", 6, 6),
    ("evaluate", "told", 3, 3),
    ("evaluate", "told", 10, 10),
    ("save", "killed", 6, 4),
    ("save", "told", 6, 6),
    ("data", "told", 9, 9),
  ],
)
def test_a_run_that_is_stopped_around_an_evaluation_has_the_same_rows(tmp_path, undisturbed, where, fault, at, saved):
  """Evaluated after 3, 6, 9 and 10 steps, saved after every second one."""
  straight, expected = undisturbed

  def happen(place, step):
    if (place, step, fault) == (where, at, "killed"):
      raise KeyboardInterrupt
    if (place, step) == (where, at):
      os.kill(os.getpid(), signal.SIGTERM)

  def stream(first):
    for step, batch in enumerate(task(10).stream(first), first + 1):
      happen("data", step)
      yield batch

  def exports(state):
    happen("save", int(state.step))
    return {}

  broken = evaluated(10, lambda step: happen("evaluate", step), stream=stream, exports=exports)
  with pytest.raises(loop.Interrupted if fault == "told" else KeyboardInterrupt):
    run(tmp_path, broken, log_every=1, checkpoint_every=2)
  assert checkpoint.Checkpoints(tmp_path).latest_step() == saved
  np.testing.assert_array_equal(run(tmp_path, evaluated(10), log_every=1, checkpoint_every=2), straight)
  assert rows(tmp_path) == expected


def test_what_a_batch_does_not_have_is_in_no_mean(tmp_path):
  """A step says nan of it; where no batch of the window has it, the row says nothing."""

  def some(state, batch):
    state, found = step(state, batch)
    known = {"odd": state.step % 2 == 1, "first": state.step < 3}
    return state, {**found, **{name: jnp.where(here, 1.0 * state.step, jnp.nan) for name, here in known.items()}}

  run(tmp_path, dataclasses.replace(task(6), step=some), log_every=3)
  found = [row for row in metrics.read(tmp_path) if "odd" in row]
  assert [(row["odd"], row["first"]) for row in found] == [(2.0, 1.5), (5.0, None)]


# ---- several processes that disagree -----------------------------------------------------------------------------------


class Store:
  """The coordination service's key-value store, for threads that play the processes of a run."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()

  def key_value_set(self, key, value, **_):
    with self.changed:
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, timeout_ms):
    with self.changed:
      assert self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000)
      return self.values[key]


def agree(monkeypatch, *facts):
  """What processes.agree raises, or None, in one process for each of `facts`."""
  local = threading.local()
  monkeypatch.setattr(processes, "_client", Store())
  monkeypatch.setattr(processes.jax, "process_count", lambda: len(facts))
  monkeypatch.setattr(processes.jax, "process_index", lambda: local.index)

  class Calls:
    def __next__(self):
      local.calls += 1
      return local.calls

  monkeypatch.setattr(processes, "_calls", Calls())

  def process(index):
    local.index, local.calls = index, 0
    try:
      processes.agree(facts[index])
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(facts)) as pool:
    return list(pool.map(process, range(len(facts))))


def test_processes_that_agree_go_on(monkeypatch):
  facts = {"config.seed": 0, "config.augment.crop_area": (0.08, 1.0), "data": "abc"}
  assert agree(monkeypatch, facts, facts, facts) == [None] * 3


@pytest.mark.parametrize("name", ["config.seed", "config.loss.temperature", "code", "data", "steps"])
def test_all_processes_stop_where_one_has_another_value(monkeypatch, name):
  facts = {"config.seed": 0, "config.loss.temperature": 0.1, "code": "a", "data": "b", "steps": 9}
  said = agree(monkeypatch, facts, facts, {**facts, name: 7})
  assert len(set(said)) == 1 and "\n" not in said[0]
  assert said[0].startswith(
    f"process 2 has {name}=7 and process 0 has {facts[name]!r}: start all processes with the same"
  )


def test_the_facts_of_a_process_are_its_flags_its_config_and_its_code():
  flags = cli.parser().parse_args(["pretrain", "--config=smoke", "--workdir=w", "--process_id=1"])
  flags.recipe, flags.config = flags.config, config_lib.load("smoke", ["--config.seed=3"])
  facts = cli._facts(flags)
  assert facts["config.seed"] == 3 and facts["--workdir"] == "w" and facts["--resume"] is False
  assert len(facts["code of simclr_jax (SHA-256)"]) == 16 and "jaxlib" in facts and "--process_id" not in facts
  json.dumps(facts)


def test_a_process_whose_others_never_come_says_so(monkeypatch, capsys):
  left = threading.Event()
  monkeypatch.setattr(processes.os, "_exit", lambda code: left.set() or None)
  with processes._limited(0.01, "process 0 of 2", " at localhost:1"):
    assert left.wait(10)
  assert capsys.readouterr().err.startswith("simclr: process 0 of 2 has waited 0 s at localhost:1 for all processes of")


@pytest.mark.parametrize(
  "error, said",
  [
    (
      RuntimeError("Unable to initialize backend 'foo': not\nknown (set JAX_PLATFORMS='' to automatically)"),
      "'foo': not known",
    ),
    (AssertionError(), "this JAX has no such backend"),
  ],
)
def test_a_wrong_platform_is_one_line(monkeypatch, error, said):
  def devices():
    raise error

  monkeypatch.setattr(mesh_lib.jax, "devices", devices)
  monkeypatch.setenv("JAX_PLATFORMS", "foo")
  with pytest.raises(UserError) as told:
    mesh_lib.check_devices()
  assert str(told.value).startswith("JAX_PLATFORMS=foo: no devices (") and said in str(told.value)
  assert "\n" not in str(told.value) and "(set" not in str(told.value)


def test_the_expected_time_is_said_once_where_it_is_long(tmp_path, monkeypatch, capsys):
  run(tmp_path / "short", task(12))
  assert "expected" not in capsys.readouterr().out
  monkeypatch.setattr(loop, "WORTH_SAYING", -1.0)
  run(tmp_path / "long", task(12))
  said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected")]
  assert len(said) == 1 and said[0].endswith("for 4 more steps at this speed")


def test_times_after_a_rollback_are_those_of_the_updates_that_were_made(tmp_path, monkeypatch, capsys):
  """Each of which takes a second here: ten until the ninth diverges, and fifteen more from step 5 on."""

  @contextlib.contextmanager
  def phase(self, name, part=""):
    yield
    self.seconds[name] += float(name == "data")

  def stream(first):
    for number, batch in enumerate(task(20).stream(first), first):
      yield {**batch, "leap": np.full(ROWS, np.inf if number == 8 else 0.0, np.float32)}

  shown = []
  monkeypatch.setattr(progress.Clock, "phase", phase)
  monkeypatch.setattr(
    progress.Progress, "update", lambda self, step, row, eta: shown.append((step, row["images_per_second"], eta))
  )
  monkeypatch.setattr(loop, "WORTH_SAYING", -1.0)
  again = dataclasses.replace(task(20), stream=stream)
  run(tmp_path, again, checkpoint_every=5, rollback=loop.Rollback(times=1))
  assert shown == [(5, ROWS, 15.0), (10, ROWS, 10.0), (15, ROWS, 5.0), (20, ROWS, 0.0)]
  said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected")]
  assert said == ["expected: 0:12 for 12 more steps at this speed"]


def test_the_times_of_a_resumed_run_include_those_before(tmp_path):
  options = dict(mesh=mesh_lib.make_mesh(), workdir=tmp_path / "run", config_json="{}", seed=0)
  with pytest.raises(KeyboardInterrupt):
    loop.run(task(12, stop_at=6), loop.LoopConfig(log_every=2, checkpoint_every=4), **options)
  seconds = {row["step"]: row["seconds"] for row in metrics.read(tmp_path / "run")}
  _, clock = loop.run(task(12), loop.LoopConfig(log_every=2, checkpoint_every=4), **options)
  budget = clock.budget()
  assert budget.pop("before it was resumed") == seconds[4] and budget == clock.seconds
  assert clock.text().endswith(" before it was resumed")
  report.write_report(tmp_path / "report.html", title="", summary="", seconds=clock.budget())
  assert "before it was resumed" in (tmp_path / "report.html").read_text()
  _, fresh = loop.run(task(2), loop.LoopConfig(log_every=2), **options | {"workdir": tmp_path / "fresh"})
  assert fresh.budget() == fresh.seconds and "before" not in fresh.text()
