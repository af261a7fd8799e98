"""What a run tells: metrics.jsonl and TensorBoard for later, one progress line for now, and where the time went."""

import collections
import contextlib
import hashlib
import importlib.util
import json
import math
import sys
import time

import jax
import numpy as np
from etils import epath
from PIL import Image

from simclr_jax.runtime import processes


class Clock:
  """Seconds spent per phase: start (until training begins), compile, data (waiting for it), step, evaluate, save."""

  def __init__(self):
    self.started = time.monotonic()
    self.seconds = collections.Counter()

  @contextlib.contextmanager
  def phase(self, name: str):
    start = time.monotonic()
    processes.moving(name)
    try:
      yield
    finally:
      self.seconds[name] += time.monotonic() - start
      processes.moving("between")

  def goodput(self) -> float:
    """The share of the time since the start in which training steps were made or waited for."""
    return self.seconds["step"] / max(time.monotonic() - self.started, 1e-9)

  def text(self) -> str:
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
    return f"{phases}; {100 * self.goodput():.0f} % of it training steps"


class Writer:
  """Appends rows to metrics.jsonl and TensorBoard; process 0 writes, the others stay silent.

  Args:
    resume_step: rows past it are dropped.
    wandb: a project of Weights & Biases to send the numbers to as well; empty: none.

  Raises:
    ValueError: the package wandb is not installed.
  """

  def __init__(self, workdir, *, resume_step: int = 0, wandb: str = ""):
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._active = jax.process_index() == 0
    self._board = self._wandb = None
    self.seconds_before = 0.0  # that the rows before this start had taken
    if self._active:
      from clu.metric_writers import SummaryWriter  # imports TensorFlow, and wants the tensorboard package

      self._board = SummaryWriter(str(workdir))
      self.rewind(resume_step)
      self._wandb = _wandb_run(workdir, wandb) if wandb else None
      self.seconds_before = max((row.get("seconds", 0.0) for row in read(workdir)), default=0.0)

  def rewind(self, step: int):
    """Drops the rows past a step: they belong to updates that are about to be made again."""
    if self._active:
      rows = [row for row in read(self._path.parent) if row["step"] <= step] if step else []
      self._path.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def scalars(self, step: int, row: dict):
    """One row of numbers and lines of text; a number that is not finite is written as null."""
    if not self._active:
      return
    text = {k: v for k, v in row.items() if isinstance(v, str)}
    clean = {k: (float(v) if math.isfinite(v) else None) for k, v in row.items() if k not in text}
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **clean, **text}) + "\n")
    known = {k: v for k, v in clean.items() if v is not None}
    self._board.write_scalars(step, known)
    if self._wandb:
      self._wandb.log(known, step=step)

  def close(self):
    if self._board:
      self._board.close()
    if self._wandb:
      self._wandb.finish()


def _wandb_run(workdir, project: str):
  """The run of this folder at Weights & Biases, taken up again if it is there."""
  if importlib.util.find_spec("wandb") is None:
    raise ValueError(f"config.log.wandb={project}: the package is not installed: pip install wandb")
  import wandb

  workdir = epath.Path(workdir)
  name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
  config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
  return wandb.init(project=project, id=name, name=workdir.name, resume="allow", dir=str(workdir), config=config)


def projector(workdir, h, labels=None):
  """Leaves h [n, d], with labels [n] if there are any, where TensorBoard's projector finds it: three files of text."""
  workdir = epath.Path(workdir)
  (workdir / "h.tsv").write_text("".join("\t".join(f"{x:.6g}" for x in row) + "\n" for row in h))
  config = 'embeddings {\n  tensor_name: "h"\n  tensor_path: "h.tsv"\n'
  if labels is not None:
    (workdir / "labels.tsv").write_text("".join(f"{label}\n" for label in labels))
    config += '  metadata_path: "labels.tsv"\n'
  (workdir / "projector_config.pbtxt").write_text(config + "}\n")


def show(workdir, step: int, pictures: dict):
  """Puts pictures {name: path of a PNG} into TensorBoard, on process 0."""
  if jax.process_index():
    return
  from clu.metric_writers import SummaryWriter

  board = SummaryWriter(str(workdir))
  board.write_images(step, {name: np.asarray(Image.open(path).convert("RGB"))[None] for name, path in pictures.items()})
  board.close()


def read(workdir) -> list[dict]:
  """Rows of metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
  path = epath.Path(workdir) / "metrics.jsonl"
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(json.JSONDecodeError):
      rows.append(json.loads(line))
  return rows


def duration(seconds: float) -> str:
  """75 -> '1:15', 4000 -> '1:06:40'."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
  """One line that a person watches: rewritten in place on a terminal, printed now and then into a log file."""

  def __init__(self, total_steps: int, steps_per_epoch: float, *, seconds_between_lines: float = 10.0):
    self._total, self._per_epoch = total_steps, steps_per_epoch
    self._live = sys.stdout.isatty()
    self._active = jax.process_index() == 0
    self._between, self._last = seconds_between_lines, -math.inf
    self._latest = {}

  def update(self, step: int, row: dict, eta: float):
    """Shows the newest value of everything seen so far; `eta` in seconds."""
    self._latest.update(row)
    if not self._active:
      return
    last_step = step >= self._total
    if not self._live and not last_step and time.monotonic() - self._last < self._between:
      return
    self._last = time.monotonic()
    line = self._line(step, eta)
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

  def _line(self, step, eta):
    r = self._latest
    parts = [f"step {step}/{self._total} ({step / self._per_epoch:.1f} epochs)"]
    if "loss" in r:
      chance = f" (chance {r['chance_loss']:.2f})" if "chance_loss" in r else ""
      parts.append(f"loss {r['loss']:.3f}{chance}")
    for key, label in (
      ("contrastive_accuracy", "contrastive acc"),
      ("online_accuracy", "online"),
      ("knn", "kNN"),
    ):
      if key in r:
        parts.append(f"{label} {100 * r[key]:.1f} %")
    if "images_per_second" in r:
      parts.append(f"{r['images_per_second']:,.0f} images/s, waiting for data {100 * r['data_wait']:.0f} %")
    parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)
