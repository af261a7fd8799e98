"""The one training loop: restore, step, log, evaluate, save.  Programs hand it a Task and get a trained state back.

Order, which resuming relies on: the state of step s is saved after s updates; batch s is a pure function of (seed, s);
so a run that stops anywhere and restores step s sees the same batch next as one that never stopped.
"""

import collections
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from simclr_jax.runtime import checkpoint, files, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime import progress as progress_lib

State = Any  # a pytree dataclass with an int32 `step`
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`run(state)` -> {name: number or a line of text, which is shown}, every `every` steps (0: never) and after the last
  one."""

  run: Callable[[State], dict]
  every: int


@dataclasses.dataclass(frozen=True)
class Task:
  """Everything the loop needs to know about a program."""

  init: Callable[[jax.Array], State]  # PRNG key -> state at step 0
  step: Callable[[State, Batch], tuple[State, dict]]  # one update; jitted here, state donated
  stream: Callable[[int], Iterator[Batch]]  # start step -> this process's numpy batches
  evaluators: Mapping[str, Evaluator]
  total_steps: int
  batch_size: int  # global
  num_examples: int
  exports: Callable[[State], dict]  # state -> variables kept as the checkpoint item `encoder`
  zero1: bool = False  # whether state.opt_state is split over the devices
  warm_start: Callable[[State], State] = lambda state: state  # puts given weights into the state at step 0, not jitted


@dataclasses.dataclass(frozen=True)
class Rollback:
  """What to do when training diverges: the section `rollback` of a config.

  Attributes:
    times: how often a run may go back to its newest checkpoint and on with the batches after those that it fell over;
      0 stops it.
    spike: standard deviations above the mean of the last 128 losses at which a finite loss counts as diverged; 0: none.
  """

  times: int = 0
  spike: float = 0.0

  def __post_init__(self):
    if not (isinstance(self.times, int) and self.times >= 0):
      raise ValueError(f"config.rollback.times={self.times!r}: expected a whole number of at least 0")
    if not self.spike >= 0:
      raise ValueError(f"config.rollback.spike={self.spike!r}: expected 0 (off), or standard deviations such as 6")


class Diverged(ValueError):
  """The loss is not finite any more, or has leapt."""


class Interrupted(Exception):
  """SIGINT or SIGTERM arrived and the state was saved."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class _Signals:
  """Turns SIGINT and SIGTERM into a flag that is read between steps; a second one acts at once.

  Of several processes one may get the signal: JAX's preemption service, which listens to SIGTERM, then finds a step
  after which all of them stop, so SIGTERM is left to it and SIGINT is made one.
  """

  def __enter__(self):
    self.received = None
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT,) if processes.is_multiprocess() else (signal.SIGINT, signal.SIGTERM):
        self._old[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    signal.signal(number, self._old[number])
    if processes.is_multiprocess():
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.received = number

  def stop_after(self, step: int) -> bool:
    """Whether the run stops after this step; called after every step."""
    if processes.preempted(step):
      self.received = signal.SIGTERM
    return bool(self.received)

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


def abstract_state(task: Task, mesh):
  """The state's shapes and shardings, without making it."""
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  shardings = jax.tree.map(lambda _: mesh_lib.replicated(mesh), shapes)
  if task.zero1:
    shardings = shardings.replace(opt_state=mesh_lib.zero1(mesh, shapes.opt_state))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def compile_step(task: Task, mesh, like):
  """The jitted update: state placed as `like`, see `abstract_state`, batch split over `data`, the old state's memory
  reused."""
  placed = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(task.step, donate_argnums=0, out_shardings=(placed, mesh_lib.replicated(mesh)))


def abstract_step(task: Task, mesh, batch):
  """(jitted update, its arguments): `batch` is shapes and dtypes of the global batch; nothing is allocated."""
  split = mesh_lib.batch_sharding(mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
  state = abstract_state(task, mesh)
  return compile_step(task, mesh, state), (state, batch)


def run(
  task: Task,
  *,
  mesh,
  workdir,
  config_json: str,
  seed: int,
  log_every: int,
  checkpoint_every: int,
  keep: int,
  rollback: Rollback = Rollback(),  # noqa: B008
  constants: Mapping = {},
  wandb: str = "",
  profile_steps: int = 0,
) -> tuple[State, progress_lib.Clock]:
  """Trains to `task.total_steps`, from the newest checkpoint in workdir if there is one.

  Args:
    log_every, checkpoint_every: in steps; checkpoint_every=0 saves at the end only.
    constants: numbers that are written with every row, such as the loss at chance.
    wandb: see metrics.Writer.
    profile_steps: so many steps, from the tenth on, are traced by JAX's profiler into workdir/profile.

  Returns:
    (final state, seconds per phase).

  Raises:
    Diverged: the loss became nan or infinite, or leapt, once too often for `rollback`; nothing of it is ever saved.
    Interrupted: SIGINT or SIGTERM; the state was saved first.
    OSError: a checkpoint could not be written; names the one that is good.
  """
  clock = progress_lib.Clock()
  checkpoints = checkpoint.Checkpoints(workdir, keep=keep)
  with clock.phase("start"):
    like = abstract_state(task, mesh)
    first, state = checkpoints.restore_newest(like)
    if state is None:
      placed = jax.tree.map(lambda x: x.sharding, like)
      state = task.warm_start(jax.jit(task.init, out_shardings=placed)(jax.random.key(seed)))
  writer = metrics_lib.Writer(workdir, resume_step=first, wandb=wandb)
  progress = progress_lib.Progress(task.total_steps, task.num_examples / task.batch_size)
  if first:
    progress.note(f"resuming from step {first} of {task.total_steps}")
  step_fn = compile_step(task, mesh, like)
  window, in_flight, usual = [], collections.deque(), collections.deque(maxlen=128)
  skipped = _Skipped(workdir)
  last_logged, tracing = first, False
  stream = opened_at = None  # the batches, and the step whose state they follow
  mark = dict(clock.seconds)

  def log(step):
    """Fetches the window's metrics (this waits for the device), writes their mean, and checks they are finite."""
    nonlocal window, last_logged, mark
    if not window:
      return
    with clock.phase("step"):
      rows = jax.device_get(window)
    window = []
    row = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
    for r in rows:
      limit = np.mean(usual) + rollback.spike * np.std(usual) if rollback.spike and len(usual) == 128 else np.inf
      if not (np.isfinite(r["loss"]) and r["loss"] <= limit):
        good = checkpoints.latest_step()
        kept = f"step {good} is saved" if good is not None else "nothing was saved yet"
        raise Diverged(
          f"the loss became {r['loss']:.6g} within steps {last_logged + 1} to {step}"
          + (f", {rollback.spike:g} standard deviations above the last 128" if np.isfinite(r["loss"]) else "")
          + f"; {kept}; lower optimizer.base_lr or lengthen optimizer.warmup_epochs"
        )
      usual.append(r["loss"])
    spent = {k: v - mark.get(k, 0.0) for k, v in clock.seconds.items()}
    mark = dict(clock.seconds)
    busy = sum(spent.get(k, 0.0) for k in ("data", "step"))
    if busy:
      row["images_per_second"] = (step - last_logged) * task.batch_size / busy
      row["data_wait"] = spent.get("data", 0.0) / busy
    row["epoch"] = step * task.batch_size / task.num_examples
    row["goodput"] = clock.goodput()
    row["seconds"] = writer.seconds_before + time.monotonic() - clock.started
    row.update(constants)
    writer.scalars(step, row)
    progress.update(step, row, eta(step))
    last_logged = step

  def eta(step):
    done = step - first
    working = sum(clock.seconds[k] for k in ("data", "step", "evaluate", "save"))
    return (task.total_steps - step) * working / done if done else 0.0

  def save(step):
    log(step)
    with clock.phase("save"):
      checkpoints.save(step, state, {"encoder": task.exports(state)}, config_json)

  def open_stream(after):
    """The batches that follow the state of step `after`."""
    nonlocal stream, opened_at
    stream, opened_at = task.stream(skipped.position(after)), after

  def go_back(error):
    """Puts the newest checkpoint in the place of the state and the batches since behind; returns its step."""
    nonlocal state, window, last_logged
    good = checkpoints.latest_step()
    if good is None or skipped.times >= rollback.times:
      raise error
    state = None  # its memory is needed
    good, state = checkpoints.restore_newest(like)
    skipped.add(good, step - good)
    progress.note(f"{error}; going back to step {good} and past its next {step - good} batches")
    window, last_logged = [], good
    in_flight.clear()
    usual.clear()
    writer.rewind(good)
    open_stream(good)
    return good

  def trace(wanted):
    """Starts or ends the profiler's trace, if it is not as wanted."""
    nonlocal tracing
    if wanted != tracing:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(workdir / "profile")) if wanted else jax.profiler.stop_trace()
      tracing = wanted

  def update():
    """One step of training; returns whether it is the last for now."""
    nonlocal state, step_fn
    if profile_steps:
      trace(first + 10 <= step < first + 10 + profile_steps)
    if step - 1 in skipped and step - 1 != opened_at:
      open_stream(step - 1)
    with clock.phase("data"):
      batch = mesh_lib.global_batch(mesh, next(stream))
    first_time = not isinstance(step_fn, jax.stages.Compiled)
    if first_time:
      with clock.phase("compile"):
        step_fn = step_fn.lower(state, batch).compile()
        processes.barrier("compiled")
    with clock.phase("step"):
      state, metrics = step_fn(state, batch)
      window.append(metrics)
      in_flight.append(metrics)
      if first_time or len(in_flight) > 2:  # two steps ahead of the device at most: bounds memory
        jax.block_until_ready(in_flight.popleft())
    if step % log_every == 0 or step == task.total_steps:
      log(step)
    row, stop = {}, signals.stop_after(step)
    for evaluator in task.evaluators.values():
      if step == task.total_steps or (evaluator.every and step % evaluator.every == 0 and not stop):
        log(step)
        with clock.phase("evaluate"):
          row.update(evaluator.run(state))
    if row:
      writer.scalars(step, row)
      for text in (value for value in row.values() if isinstance(value, str)):
        progress.note(text)
      progress.update(step, row, eta(step))
    stop = stop or bool(signals.received)  # it may have come while evaluating
    if step == task.total_steps or (checkpoint_every and step % checkpoint_every == 0) or stop:
      save(step)
    return stop and step < task.total_steps

  with _Signals() as signals:
    step = first
    open_stream(first)
    while step < task.total_steps:
      step += 1
      try:
        stop = update()
      except Diverged as error:
        step = go_back(error)
        continue
      if stop:
        writer.close()
        checkpoints.close()
        name = signal.Signals(signals.received).name
        raise Interrupted(
          f"{name}: stopped after step {step} and saved it; go on with --resume",
          130 if signals.received == signal.SIGINT else 42,
        )
  trace(False)
  writer.close()
  checkpoints.close()
  return state, clock


class _Skipped:
  """The batches that a run went past after it had diverged, in skipped.json: [[after step, batches], ...].

  With it the batch of every step stays a function of the seed, the step and this file.
  """

  def __init__(self, workdir):
    self._path = epath.Path(workdir) / "skipped.json"
    self._rows = json.loads(self._path.read_text()) if self._path.exists() else []

  @property
  def times(self) -> int:
    return len(self._rows)

  def position(self, step: int) -> int:
    """Number of the batch that follows the state of `step`."""
    return step + sum(count for after, count in self._rows if after <= step)

  def __contains__(self, step: int) -> bool:
    """Whether batches were gone past after the state of `step`."""
    return any(after == step for after, _ in self._rows)

  def add(self, after: int, count: int):
    self._rows.append([after, count])
    if not jax.process_index():
      files.write_text(self._path, json.dumps(self._rows))
