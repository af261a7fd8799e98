"""What a person sees while a program runs: one line of progress, and where the time goes."""

import collections
import contextlib
import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from simclr_jax.runtime import watchdog

BEFORE = "before it was resumed"  # of the time of a run


class Clock:
  """Seconds spent per phase: start (until training begins, or begins again after a rollback), compile, data (waiting for
  it), step, evaluate, save, trace (where the profiler runs)."""

  def __init__(self):
    self.started = time.monotonic()
    self.before = 0.0  # seconds that the earlier starts of a resumed run have taken, up to its checkpoint
    self.seconds: Any = collections.Counter()  # of float

  @contextlib.contextmanager
  def phase(self, name: str, part: str = ""):
    """Adds the time spent within to the seconds of `name`; a `part` that takes longer than others has its own name for
    the watchdog."""
    start = time.monotonic()
    watchdog.set_phase(f"{name} {part}".rstrip())
    try:
      yield
    finally:
      self.seconds[name] += time.monotonic() - start
      watchdog.set_phase("between")

  def goodput(self) -> float:
    """The fraction of the time since the start in which training steps were made or waited for."""
    return self.seconds["step"] / max(time.monotonic() - self.started, 1e-9)

  def budget(self) -> dict[str, float]:
    """{phase: seconds} of all starts of the run; those before the last are one phase."""
    return ({BEFORE: self.before} if self.before else {}) | dict(self.seconds)

  def text(self) -> str:
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
    before = f"; {duration(self.before)} {BEFORE}" if self.before else ""
    return f"{phases}; {100 * self.goodput():.0f} % of it training steps{before}"


def duration(seconds: float) -> str:
  """75 -> '1:15', 4000 -> '1:06:40'."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _notebook():
  """A function that shows a text in the output of the notebook's cell in the place of the one before; None elsewhere."""
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  if not hasattr(shell, "kernel"):
    return None
  handles = []

  def show(text):
    content = {"text/plain": text}
    if handles:
      handles[0].update(content, raw=True)
    else:
      handles.append(sys.modules["IPython"].display.display(content, raw=True, display_id=True))

  return show


class Progress:
  """One line that a person watches: rewritten in place on a terminal and in a notebook, printed now and then into a log
  file.

  Args:
    show: the numbers shown after the loss, {key: label}; a label that ends in " %" shows a fraction
      in percent: {"accuracy": "acc %"} becomes "acc 53.2 %".
  """

  def __init__(
    self,
    total_steps: int,
    steps_per_epoch: float,
    *,
    show: Mapping[str, str] | None = None,
    seconds_between_lines: float = 10.0,
  ):
    self._total, self._per_epoch, self._show = total_steps, steps_per_epoch, show or {}
    self._notebook = _notebook()
    self._live = not self._notebook and sys.stdout.isatty()  # some notebooks call themselves a terminal
    self._active = jax.process_index() == 0
    self._between, self._last = seconds_between_lines, -math.inf
    self._latest = {}

  def update(self, step: int, row: dict, eta: float):
    """Shows the newest value of everything seen so far; `eta` in seconds, nan where it is not known yet."""
    self._latest.update(row)
    if not self._active:
      return
    last_step = step >= self._total
    if self._notebook:
      self._notebook(self._line(step, eta))
      return
    if not self._live and not last_step and time.monotonic() - self._last < self._between:
      return
    self._last = time.monotonic()
    line = self._fitting(step, eta)
    if self._live:
      sys.stdout.write(f"\r\033[K{line}" + ("\n" if last_step else ""))
    else:
      sys.stdout.write(line + "\n")
    sys.stdout.flush()

  def note(self, text: str):
    """A line of its own, above the progress line."""
    if self._active:
      sys.stdout.write(("\r\033[K" if self._live else "") + text + "\n")
      sys.stdout.flush()

  @contextlib.contextmanager
  def doing(self, what: str):
    """Announces what takes long, and then how long it took."""
    began = time.monotonic()
    if self._active and self._live:
      sys.stdout.write(f"\r\033[K{what} ...")
      sys.stdout.flush()
    yield
    self.note(f"{what}: {duration(time.monotonic() - began)}")

  def _fitting(self, step, eta) -> str:
    """The progress line; on a terminal as much of it as fits into one row, or the next one would not replace it."""
    width = shutil.get_terminal_size().columns if self._live else math.inf
    lines = (self._line(step, eta, left_out) for left_out in range(5))
    return next((line for line in lines if len(line) < width), f"step {step}/{self._total}")

  def _line(self, step, eta, left_out=0):
    """The more is left out, the less one can do without what is left."""
    r = self._latest
    parts = [f"step {step}/{self._total}" + (f" ({step / self._per_epoch:.1f} epochs)" if left_out < 2 else "")]
    if "loss" in r:
      chance = f" (chance {r['chance_loss']:.2f})" if "chance_loss" in r and left_out < 4 else ""
      parts.append(f"loss {r['loss']:.3f}{chance}")
    for key, label in self._show.items():
      if key in r and left_out < 3:
        name, percent, _ = label.partition(" %")
        parts.append(f"{name} {100 * r[key]:.1f} %" if percent else f"{name} {r[key]:.3f}")
    if "images_per_second" in r and left_out < 4:
      waiting = f", waiting for data {100 * r['data_wait']:.0f} %" if left_out < 1 else ""
      parts.append(f"{r['images_per_second']:,.0f} images/s{waiting}")
    parts += [] if math.isnan(eta) else [f"ETA {duration(eta)}"]
    return "  ".join(parts)
