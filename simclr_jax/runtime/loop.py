"""The shared training loop: restore, step, log, save, evaluate.  Programs pass it a Task and get back a trained state.

Resuming relies on this order: the state of step s is saved after s updates, and batch s is a pure function of (seed, s).
So a run that stops anywhere and restores step s next sees the same batch as one that never stopped.  A step is saved before
it is evaluated, so that a fault in an evaluation costs no updates; a resumed run makes up for the evaluation.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from simclr_jax.runtime import aot, checkpoint, cpu, errors, files, lock, processes, replicas, signals, watchdog
from simclr_jax.runtime import config as config_lib
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib
from simclr_jax.runtime import progress as progress_lib
from simclr_jax.runtime.errors import UserError

AGREE_EVERY = 100  # steps between two comparisons of what the devices hold; there is one before each checkpoint too
TIMED_STEPS, WORTH_SAYING = 8, 60.0  # after 8 steps the time left is printed once, if it is more than 60 seconds
# A flax.struct dataclass, which has `replace`, with an int32 `step` and an `opt_state`; with Task.split also a dict `extra`.
State = Any
Batch = Any  # a pytree of arrays, split over the devices along their first axis


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
  # (state, batch, *constants) -> (state, {metric: number; nan if the batch has none}): one update; jitted here, state donated
  step: Callable[..., tuple[State, dict]]
  stream: Callable[[int], Iterator[Batch]]  # start step -> this process's numpy batches
  evaluators: Mapping[str, Evaluator]
  total_steps: int
  batch_size: int  # global
  num_examples: int
  exports: Callable[[State], dict]  # state -> {name: tree}, items of a checkpoint beside the state
  zero1: bool = False  # whether state.opt_state is split over the devices
  split: tuple[str, ...] = ()  # entries of state.extra whose rows are split over the devices
  warm_start: Callable[[State], State] = lambda state: state  # puts given weights into the state at step 0, not jitted
  constants: tuple = ()  # trees of arrays that every step reads and none changes, such as a teacher; in no checkpoint
  show: Mapping[str, str] = dataclasses.field(default_factory=dict)  # metric -> what the progress line calls it
  log_with_every_row: Mapping[str, float] = dataclasses.field(default_factory=dict)  # such as the loss at chance
  advice: str = ""  # for a run that diverges
  data: str = ""  # what tells the training data from other data, which has to be the same in every process
  # (global batch, its number) -> what is wrong with it, or nothing; every process calls it
  check_batch: Callable[[Batch, int], str] = lambda batch, number: ""


@dataclasses.dataclass(frozen=True)
class Rollback:
  """What to do when training diverges: the section `rollback` of a config.

  Attributes:
    times: how often a run may return to its newest checkpoint and skip the batches on which it diverged; with 0 it stops.
    spike: standard deviations above the mean of the last 128 losses at which a finite loss counts as diverged; 0: none.
  """

  times: int = 0
  spike: float = 0.0


class Diverged(UserError):
  """The loss is no longer finite, or has jumped."""


class Disagreement(UserError):
  """The devices or processes of a run no longer agree; nothing from it is saved."""


class Interrupted(Exception):
  """SIGINT, SIGTERM or SIGHUP arrived and the state was saved."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class _Signals:
  """Turns SIGINT, SIGTERM and SIGHUP into a flag that is read between steps; a second one acts at once.

  Of several processes one may get the signal: JAX's preemption service, which listens to SIGTERM, then finds a step
  after which all of them stop, so SIGTERM is left to it and SIGINT is made one.
  """

  def __enter__(self):
    self.received = 0  # number of the signal
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for number in signals.STOPPING:
        # JAX listens to SIGTERM in a run with several processes; under nohup SIGHUP is ignored.
        left_alone = processes.is_multiprocess() and number == signal.SIGTERM
        if not left_alone and signal.getsignal(number) != signal.SIG_IGN:
          self._old[number] = signal.signal(number, self._note)
      signals.during_steps = True
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
    signals.during_steps = False
    for number, handler in self._old.items():
      signal.signal(number, handler)


def abstract_state(task: Task, mesh):
  """The state's shapes and shardings, without making it."""
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  shardings = jax.tree.map(lambda _: mesh_lib.replicated(mesh), shapes)
  if task.zero1:
    shardings = shardings.replace(opt_state=mesh_lib.zero1(mesh, shapes.opt_state))
  if task.split:
    rows = {name: mesh_lib.by_rows(mesh, shapes.extra[name]) for name in task.split}
    shardings = shardings.replace(extra=shardings.extra | rows)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def compile_step(task: Task, mesh, like):
  """The jitted update: state placed as `like`, see `abstract_state`, batch split over `data`, the old state's memory
  reused."""
  placed = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(task.step, donate_argnums=0, out_shardings=(placed, mesh_lib.replicated(mesh)))


def abstract_step(task: Task, mesh, batch):
  """(jitted update, its arguments): `batch` is shapes and dtypes of the global batch; nothing is allocated."""
  split, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
  constants = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), task.constants)
  state = abstract_state(task, mesh)
  return compile_step(task, mesh, state), (state, batch, *constants)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How often the loop saves, logs and traces; intervals are in steps.

  Attributes:
    checkpoint_every: 0 saves at the end only.
    keep: newest checkpoints that are kept.
    wandb: see metrics.Writer.
    profile_steps: number of steps, from the tenth on, that are traced by JAX's profiler into workdir/profile.
  """

  log_every: int
  checkpoint_every: int = 0
  keep: int = 1
  rollback: Rollback = Rollback()
  wandb: str = ""
  profile_steps: int = 0

  @classmethod
  def from_config(cls, config, num_examples: int) -> "LoopConfig":
    """From the sections `log`, `checkpoint` and `rollback` of a config."""
    return cls(
      log_every=config.log.every_steps,
      checkpoint_every=config_lib.every(config.checkpoint, num_examples, config.batch_size),
      keep=config.checkpoint.keep,
      rollback=Rollback(config.rollback.times, config.rollback.spike),
      wandb=config.log.wandb,
      profile_steps=config.log.profile_steps,
    )


def run(
  task: Task, config: LoopConfig, *, mesh, workdir, config_json: str, seed: int
) -> tuple[State, progress_lib.Clock]:
  """Trains to `task.total_steps`, from the newest checkpoint in workdir if there is one.

  Returns:
    (final state, seconds per phase).

  Raises:
    Diverged: the loss became nan or infinite, or jumped, once too often for `config.rollback`; nothing from it is saved.
    Interrupted: SIGINT, SIGTERM or SIGHUP; the state was saved first.
    OSError: a checkpoint could not be written; the message names the one that is good.
  """
  return Loop(task, config, mesh=mesh, workdir=workdir, config_json=config_json, seed=seed).run()


class Loop:
  """One run of `run`, phase by phase.

  Attributes:
    step: number of the current update, or of the last one.
    updates: number of updates that this process made, those that a rollback made void included.
    state: after `step` updates.
    window: metrics on the devices that have not been fetched yet, one entry per step.
  """

  state: State

  def __init__(self, task: Task, config: LoopConfig, *, mesh, workdir, config_json: str, seed: int):
    self.task, self.config, self.mesh, self.workdir = task, config, mesh, epath.Path(workdir)
    self.config_json = config_json
    self.clock = progress_lib.Clock()
    # A process that makes other steps than the rest would leave them waiting in a collective.
    due = {name: evaluator.every for name, evaluator in task.evaluators.items()}
    facts = {"steps": task.total_steps, "images": task.num_examples, "data": task.data, "seed": seed, "evaluators": due}
    digest = hashlib.sha256(config_json.encode()).hexdigest()[:16]
    processes.agree(facts | dataclasses.asdict(config) | {"config (SHA-256)": digest})
    self.checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep)
    self.like = abstract_state(task, mesh)
    self.skipped = _Skipped(workdir)
    self.window, self.in_flight, self.updates = [], collections.deque(), 0
    self.tracing = False
    self.restore(seed)
    self.writer = metrics_lib.Writer(workdir, resume_step=self.first, wandb=config.wandb)
    self.clock.before = self.writer.seconds_before
    self.progress = progress_lib.Progress(task.total_steps, task.num_examples / task.batch_size, show=task.show)
    self.last_logged, self.mark = self.first, dict(self.clock.seconds)

  def run(self) -> tuple[State, progress_lib.Clock]:
    if self.first:
      self.progress.note(f"resuming from step {self.first} of {self.task.total_steps}")
    try:
      self.train()
    except BaseException:
      self.checkpoints.settle()
      lock.release(self.workdir)  # whoever goes on may be another process
      raise
    return self.state, self.clock

  def train(self):
    with _Signals() as self.signals, watchdog.training():
      self.make_up()
      self.open_stream(self.first)
      while self.step < self.task.total_steps:
        self.step += 1
        try:
          stop = self.one_step()
        except Diverged as error:
          self.roll_back(error)
          continue
        if stop:
          self.interrupted()
      if self.signals.received:  # after the last step
        self.interrupted()
    self.close()

  def one_step(self) -> bool:
    """One update and what is due after it; returns whether a signal asks the run to stop."""
    self.trace_when_due()
    batch = self.next_batch()
    if self.step == self.first + 1 or self.step % AGREE_EVERY == 0:
      with self.clock.phase("step", "compare"):  # the first of which compiles
        self.compare(batch)
    self.update(batch)
    if self.updates == TIMED_STEPS and (left := self.seconds_left()) > WORTH_SAYING:
      steps = self.task.total_steps - self.step
      self.progress.note(f"expected: {progress_lib.duration(left)} for {steps:,} more steps at this speed")
    last = self.step == self.task.total_steps
    if last or self.step % self.config.log_every == 0:
      self.log()
    self.checkpoints.check()
    stop, every = self.signals.stop_after(self.step), self.config.checkpoint_every
    saved = last or stop or bool(every and self.step % every == 0)
    if saved:  # before it is evaluated, where a run may fail or be killed
      self.save()
    self.evaluate()
    if self.signals.received and not saved:  # while evaluating
      self.save()
    return bool(self.signals.received)

  # ---- start, and start again ----------------------------------------------------------------------------------

  def restore(self, seed: int):
    """Sets the newest checkpoint's state, or a new one, and the constants and compiled update that depend on it."""
    with self.clock.phase("start"):
      self.first, self.state = self.checkpoints.restore_newest(self.like)
      if self.state is None:
        placed = jax.tree.map(lambda x: x.sharding, self.like)
        self.state = self.task.warm_start(jax.jit(self.task.init, out_shardings=placed)(jax.random.key(seed)))
      self.restore_losses()
      self.constants = jax.device_put(self.task.constants, mesh_lib.replicated(self.mesh))
    self.step = self.first
    self.compiled = None

  def restore_losses(self):
    """The losses before the restored step, with which the next ones are compared."""
    kept = self.checkpoints.loop().get("recent_losses", [])
    self.recent_losses = collections.deque(map(np.float32, kept), maxlen=128)

  def open_stream(self, after: int):
    """Opens the batches that follow the state of step `after`."""
    with self.clock.phase("start"):
      self.stream, self.opened_at = self.task.stream(self.skipped.position(after)), after

  def roll_back(self, error: "Diverged"):
    """Restores the latest checkpoint and skips the batches that followed it; raises `error` if that is used up."""
    good = self.checkpoints.latest_step()
    if good is None or self.skipped.times >= self.config.rollback.times:
      raise error
    self.state = None  # its memory is needed
    with self.clock.phase("start"):
      good, self.state = self.checkpoints.restore_newest(self.like)
    self.skipped.add(good, self.step - good)
    self.progress.note(f"{error}; returning to step {good} and skipping the next {self.step - good} batches")
    self.window, self.last_logged, self.mark = [], good, dict(self.clock.seconds)
    self.in_flight.clear()
    self.restore_losses()
    self.writer.rewind(good)
    self.step = good
    self.open_stream(good)

  # ---- one step ------------------------------------------------------------------------------------------------

  def next_batch(self) -> Batch:
    before = self.step - 1
    if before in self.skipped and before != self.opened_at:
      self.open_stream(before)
    with self.clock.phase("data"):
      return mesh_lib.global_batch(self.mesh, next(self.stream))

  def update(self, batch: Batch):
    compiled, first_time = self.compiled, self.compiled is None
    if compiled is None:
      with self.clock.phase("compile"), self.progress.doing("compiling the step"):
        step = compile_step(self.task, self.mesh, self.like)
        self.compiled = compiled = step.lower(self.state, batch, *self.constants).compile()
        if (size := aot.peak_bytes(compiled)) and cpu.make_room(size):
          self.progress.note(f"memory      the step needs {size / aot.GIB:.1f} GiB: malloc gives freed memory back")
        processes.barrier("compiled")
    with self.clock.phase("step"):
      self.state, metrics = compiled(self.state, batch, *self.constants)
      self.updates += 1
      self.window.append(metrics)
      self.in_flight.append(metrics)
      if first_time or len(self.in_flight) > 2:  # two steps ahead of the device at most: bounds memory
        jax.block_until_ready(self.in_flight.popleft())

  def compare(self, batch: Batch | None = None):
    """Raises Disagreement unless all devices hold the same state and, of a batch, the rows that they should."""
    if self.mesh.size == 1:
      return
    done, before = self.step - (batch is not None), self.checkpoints.newest_sealed
    wrong = self.task.check_batch(batch, self.skipped.position(done)) if batch is not None else ""
    # Between checkpoints without the optimizer's state, which is most of it: it shows in the parameters a step later.
    state = self.state if batch is None else self.state.replace(opt_state=())
    wrong = wrong or replicas.difference(self.mesh, (state, self.constants))
    if wrong:
      kept = f"step {before} was saved before" if before is not None else "nothing was saved before"
      raise Disagreement(f"after step {done}, {wrong}; {kept}")

  def log(self):
    """Fetches the window's metrics (this waits for the device), checks their losses and writes their mean."""
    if not self.window:
      return
    with self.clock.phase("step"):
      rows = jax.device_get(self.window)
    self.window = []
    for row in rows:
      self.check_loss(row["loss"])
    mean = {key: _mean([row[key] for row in rows]) for key in rows[0]}
    row = {**mean, **self.speed(), **self.task.log_with_every_row}
    self.writer.scalars(self.step, row)
    self.progress.update(self.step, row, self.seconds_left())
    self.last_logged = self.step

  def check_loss(self, loss):
    """Raises Diverged unless the loss is finite and, where `rollback.spike` is set, near the last 128."""
    recent, spike = self.recent_losses, self.config.rollback.spike
    limit = np.mean(recent) + spike * np.std(recent) if spike and len(recent) == recent.maxlen else np.inf
    if np.isfinite(loss) and loss <= limit:
      recent.append(loss)
      return
    good = self.checkpoints.latest_step()
    kept = f"step {good} is saved" if good is not None else "nothing was saved yet"
    leapt = f", {spike:g} standard deviations above the last {recent.maxlen}" if np.isfinite(loss) else ""
    advice = f"; {self.task.advice}" if self.task.advice else ""
    raise Diverged(
      f"the loss became {loss:.6g} within steps {self.last_logged + 1} to {self.step}{leapt}; {kept}{advice}"
    )

  def speed(self) -> dict:
    """Rates since the last row was logged, and totals."""
    seconds, task, row = self.clock.seconds, self.task, {}
    spent = {key: value - self.mark.get(key, 0.0) for key, value in seconds.items()}
    self.mark = dict(seconds)
    busy = sum(spent.get(key, 0.0) for key in ("data", "step"))
    if busy:
      row["images_per_second"] = (self.step - self.last_logged) * task.batch_size / busy
      row["data_wait"] = spent.get("data", 0.0) / busy
    row["epoch"] = self.step * task.batch_size / task.num_examples
    row["goodput"] = self.clock.goodput()
    row["seconds"] = self.clock.before + time.monotonic() - self.clock.started
    return row

  def seconds_left(self) -> float:
    """nan before the first update of this process."""
    working = sum(self.clock.seconds[key] for key in ("data", "step", "evaluate", "save"))
    return (self.task.total_steps - self.step) * working / self.updates if self.updates else math.nan

  # ---- now and then --------------------------------------------------------------------------------------------

  def evaluate(self):
    """Runs the evaluators that are due: all of them after the last step, none if the run is about to stop."""
    row, last = {}, self.step == self.task.total_steps
    stopping = bool(self.signals.received)  # once, for all evaluators
    for name, evaluator in self.task.evaluators.items():
      if not stopping and (last or (evaluator.every and self.step % evaluator.every == 0)):
        self.log()
        with self.clock.phase("evaluate", name):
          row.update(evaluator.run(self.state))
    if row:
      self.writer.scalars(self.step, row)
      for text in (value for value in row.values() if isinstance(value, str)):
        self.progress.note(text)
      self.progress.update(self.step, row, self.seconds_left())

  def make_up(self):
    """Evaluates the restored step if the run that saved it was stopped before it had."""
    # Process 0 decides, which writes the rows.  Those of updates have a loss.
    if self.first and not processes.run_on_primary(
      lambda: any(row["step"] == self.first and "loss" not in row for row in metrics_lib.read(self.workdir))
    ):
      self.evaluate()

  def save(self):
    self.log()
    with self.clock.phase("save", "wait"):
      self.checkpoints.wait()
    with self.clock.phase("save"):
      self.compare()
      losses = {"recent_losses": [float(loss) for loss in self.recent_losses]}
      self.checkpoints.save(self.step, self.state, self.task.exports(self.state), self.config_json, losses)
    if self.step == self.task.total_steps:  # sealed before it is evaluated: no later save makes up for it
      with self.clock.phase("save", "wait"):
        self.checkpoints.wait()

  def trace_when_due(self):
    begin = self.first + 10
    if self.config.profile_steps:
      self.trace(begin <= self.step < begin + self.config.profile_steps)

  def trace(self, wanted: bool):
    """Starts or ends the profiler's trace when it is due."""
    if wanted != self.tracing:
      with self.clock.phase("trace"):
        jax.block_until_ready(self.state)
        jax.profiler.start_trace(str(self.workdir / "profile")) if wanted else jax.profiler.stop_trace()
        self.tracing = wanted

  def interrupted(self):
    """Ends the run after a signal; the state was saved."""
    self.close()
    name = signal.Signals(self.signals.received).name
    raise Interrupted(
      f"{name}: stopped after step {self.step} and saved it; {errors.to_resume}",
      signals.exit_code(self.signals.received),
    )

  def close(self):
    self.trace(False)
    self.writer.close()
    with self.clock.phase("save", "wait"):
      self.checkpoints.close()


def _mean(values) -> float:
  """Of those that are not nan, which a step says of what its batch does not have; nan if there are none."""
  values = np.asarray(values)
  known = values[~np.isnan(values)]
  return float(np.mean(known)) if len(known) else math.nan


class _Skipped:
  """The batches that a run went past after it had diverged, in skipped.json: [[after step, batches], ...].

  With it the batch of every step stays a function of the seed, the step and this file.

  Raises:
    UserError: the file is damaged.
  """

  def __init__(self, workdir):
    self._path = epath.Path(workdir) / "skipped.json"
    try:
      self._rows = [[int(after), int(count)] for after, count in json.loads(files.read_sealed(self._path))]
    except FileNotFoundError:
      self._rows = []
    except (ValueError, TypeError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(f"{self._path} is damaged: it is not what was written; restore it from a copy") from None

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
      files.write_sealed(self._path, json.dumps(self._rows))
