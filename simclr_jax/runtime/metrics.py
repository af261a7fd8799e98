"""Logs of a run's numbers: metrics.jsonl, TensorBoard, and Weights & Biases if requested."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import socket
import time

import jax
from PIL import Image

from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.errors import Unavailable, UserError


class Writer:
  """Appends rows to metrics.jsonl and TensorBoard; process 0 writes, the others stay silent.

  Args:
    resume_step: rows past it are dropped.
    wandb: a project of Weights & Biases to send the numbers to as well; empty: none.

  Raises:
    ValueError: the package wandb is not installed.
  """

  def __init__(self, workdir, *, resume_step: int = 0, wandb: str = ""):
    self._path = files.absolute(workdir) / "metrics.jsonl"
    self._board = None
    self._wandb = None
    self._unwritten = ""  # rows that could not be added to metrics.jsonl yet
    self.seconds_before = 0.0  # that the rows before this start had taken
    if not jax.process_index():
      self._board = _Board(workdir)
      self.rewind(resume_step)
      self._wandb = _wandb_run(workdir, wandb) if wandb else None
      self.seconds_before = max((row.get("seconds", 0.0) for row in read(workdir)), default=0.0)

  def rewind(self, step: int):
    """Drops the rows past a step: they belong to updates that are about to be made again."""
    if self._board:
      if self._unwritten:
        files.append_text(self._path, self._unwritten)
      self._unwritten = ""
      rows = [row for row in read(self._path.parent) if row["step"] <= step] if step else []
      files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
      self._board.start_after(step)
      self._board.upload()

  def scalars(self, step: int, row: dict):
    """One row of numbers and lines of text; a number that is not finite is written as null."""
    if not self._board:  # not the primary process
      return
    text = {k: v for k, v in row.items() if isinstance(v, str)}
    clean = {k: (float(v) if math.isfinite(v) else None) for k, v in row.items() if k not in text}
    self._unwritten += json.dumps({"step": step, **clean, **text}) + "\n"
    known = {k: v for k, v in clean.items() if v is not None}
    self._board.add(step, *({"tag": k, "simple_value": v} for k, v in known.items()))
    self._write(self._board)
    if self._wandb:
      self._wandb.log({"step": step, **known})  # given as step=, a row that is made again would be dropped

  def _write(self, board):
    """Writes what is left to write; where a bucket is away for the moment, that waits for the next row."""
    try:
      if self._unwritten:
        files.append_text(self._path, self._unwritten)
      self._unwritten = ""
      board.upload()
    except Unavailable as error:
      print(f"metrics are not written yet: {error}", flush=True)

  def close(self):
    if self._board:
      self._write(self._board)
      self._board.close()
    if self._wandb:
      self._wandb.finish()


class _Board:
  """A TensorBoard event file, of tensorboard's own records: its EventFileWriter imports TensorFlow where it is there."""

  _count = itertools.count()

  def __init__(self, workdir):
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = files.absolute(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names.
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(self._count):05}.v2"
    self._path = folder / name
    self._file = io.BytesIO() if files.is_remote(folder) else open(self._path, "wb")  # objects cannot grow
    self._records = RecordWriter(self._file)
    self._write(file_version="brain.Event:2")

  def _write(self, **event):
    from tensorboard import data_compat
    from tensorboard.compat.proto import event_pb2

    event = data_compat.migrate_event(event_pb2.Event(wall_time=time.time(), **event))  # pyright: ignore
    self._records.write(event.SerializeToString())
    self._records.flush()

  def upload(self):
    """Writes all records so far to a bucket; on a disk they are in their file already."""
    if isinstance(self._file, io.BytesIO):
      files.write_bytes(self._path, self._file.getvalue())

  def add(self, step: int, *values: dict):
    """`values` are the fields of a Summary.Value each."""
    self._write(step=step, summary={"value": values})

  def start_after(self, step: int):
    """What earlier records, in other files too, say of later steps is void: TensorBoard shows no step twice."""
    self._write(step=step + 1, session_log={"status": 1})  # SessionLog.START

  def close(self):
    self._file.close()


def check_wandb(project: str):
  """Raises UserError if numbers are to be sent to `project` and the package is not installed."""
  if project and importlib.util.find_spec("wandb") is None:
    raise UserError(f"config.log.wandb={project}: the package is not installed: pip install wandb")


def _wandb_run(workdir, project: str):
  """The run in this folder at Weights & Biases, taken up again if it is there; --overwrite makes another."""
  check_wandb(project)
  import wandb  # pyright: ignore[reportMissingImports]

  workdir = files.absolute(workdir)
  config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
  local = {} if files.is_remote(workdir) else {"dir": str(workdir)}
  known = checkpoint.run_id(workdir)
  run = wandb.init(project=project, id=known, name=workdir.name, resume="allow", config=config, **local)
  run.define_metric("*", step_metric="step")
  return run


def projector(workdir, h, labels=None):
  """Writes h [n, d], with labels [n] if there are any, for TensorBoard's projector: three text files."""
  workdir = files.absolute(workdir)
  files.write_text(workdir / "h.tsv", "".join("\t".join(f"{x:.6g}" for x in row) + "\n" for row in h))
  config = 'embeddings {\n  tensor_name: "h"\n  tensor_path: "h.tsv"\n'
  if labels is not None:
    files.write_text(workdir / "labels.tsv", "".join(f"{label}\n" for label in labels))
    config += '  metadata_path: "labels.tsv"\n'
  files.write_text(workdir / "projector_config.pbtxt", config + "}\n")


def show(workdir, step: int, pictures: dict):
  """Puts pictures {name: path of a PNG} into TensorBoard, on process 0."""
  if jax.process_index():
    return
  board = _Board(workdir)
  for name, path in pictures.items():
    content = files.absolute(path).read_bytes()
    width, height = Image.open(io.BytesIO(content)).size
    board.add(step, {"tag": name, "image": {"width": width, "height": height, "encoded_image_string": content}})
  board.upload()
  board.close()


def read(workdir) -> list[dict]:
  """Rows of metrics.jsonl, oldest first; lines cut short by a crash or otherwise damaged are left out."""
  path = files.absolute(workdir) / "metrics.jsonl"
  rows = []
  for line in path.read_bytes().splitlines() if path.exists() else []:
    with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get("step"), int):
        rows.append(row)
  return rows
