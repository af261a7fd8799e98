"""The numbers of a run: rows, TensorBoard without TensorFlow, and the line of progress."""

import itertools
import json
import math
import os
import subprocess
import sys
import types

import bucket
import pytest
from PIL import Image

from simclr_jax.runtime import checkpoint, errors, files, lock, metrics
from simclr_jax.runtime.progress import Progress

CHILD = """
import sys
sys.modules["tensorflow"] = None  # importing it fails
from simclr_jax.runtime import metrics

writer = metrics.Writer(sys.argv[1])
writer.scalars(1, {"loss": 2.5, "bad": float("nan"), "verdict": "fine"})
writer.scalars(2, {"loss": 1.5})
writer.close()
metrics.show(sys.argv[1], 2, {"views": sys.argv[2]})
"""


def test_tensorboard_without_tensorflow(tmp_path):
  picture = tmp_path / "a.png"
  Image.new("RGB", (20, 10), (255, 0, 0)).save(picture)
  subprocess.run([sys.executable, "-c", CHILD, tmp_path / "run", picture], check=True)
  assert metrics.read(tmp_path / "run") == [
    {"step": 1, "loss": 2.5, "bad": None, "verdict": "fine"}, {"step": 2, "loss": 1.5}
  ]  # fmt: skip
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(tmp_path / "run")).Reload()
  assert [(e.step, e.tensor_proto.float_val[0]) for e in board.Tensors("loss")] == [(1, 2.5), (2, 1.5)]
  assert board.SummaryMetadata("loss").plugin_data.plugin_name == "scalars"
  (shown,) = board.Tensors("views")
  assert list(shown.tensor_proto.string_val) == [b"20", b"10", picture.read_bytes()]
  assert board.SummaryMetadata("views").plugin_data.plugin_name == "images"


def test_damaged_rows_are_left_out_and_repaired_when_a_run_resumes(tmp_path):
  good = [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.5}]
  lines = [json.dumps(good[0]).encode(), b'{"step": 2, "lo\xff": 2.0}', b"[2]", b'{"loss": 2.0}', b'{"step": "4"}']
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, json.dumps(good[1]).encode(), b'{"step": 4, "lo']))
  assert metrics.read(tmp_path) == good
  writer = metrics.Writer(tmp_path, resume_step=3)
  writer.scalars(4, {"loss": 1.0})
  writer.close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert rows == [*good, {"step": 4, "loss": 1.0}]


def test_rows_that_a_bucket_did_not_take_are_written_with_the_next(tmp_path, monkeypatch, capsys):
  with bucket.buckets(tmp_path):
    writer = metrics.Writer("gs://mine/run")
    writer.scalars(1, {"loss": 3.0})
    write = files.write_bytes

    def away(path, content):
      raise errors.Unavailable("b/mine/o: injected, 503")

    monkeypatch.setattr(files, "write_bytes", away)
    for step in (2, 3):
      writer.scalars(step, {"loss": 1.0})
    assert capsys.readouterr().out.count("metrics are not written yet: b/mine/o: injected, 503\n") == 2
    with pytest.raises(errors.Unavailable):  # a run that goes back needs to know what is there
      writer.rewind(2)
    monkeypatch.setattr(files, "write_bytes", write)
    writer.scalars(4, {"loss": 0.5})
    assert [row["step"] for row in metrics.read("gs://mine/run")] == [1, 2, 3, 4]
    monkeypatch.setattr(files, "write_bytes", away)
    writer.scalars(5, {"loss": 0.5})
    monkeypatch.setattr(files, "write_bytes", write)
    writer.close()
    assert [row["step"] for row in metrics.read("gs://mine/run")] == [1, 2, 3, 4, 5]
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(tmp_path / "mine/run")).Reload()
  assert [event.step for event in board.Tensors("loss")] == [1, 2, 3, 4, 5]


def test_tensorboard_shows_no_step_twice(tmp_path, monkeypatch):
  # The one behind TensorBoard's pages.
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

  monkeypatch.setattr(metrics._Board, "_count", itertools.count(8))  # the files are read in the order of their names
  for resume, last in ((0, 6), (4, 7), (4, 9)):  # killed twice, after steps that were not saved
    writer = metrics.Writer(tmp_path, resume_step=resume)
    for step in range(resume + 1, last + 1):
      writer.scalars(step, {"loss": last + step / 100})
    writer.close()
  writer = metrics.Writer(tmp_path, resume_step=9)
  writer.scalars(10, {"loss": 1.0})
  writer.rewind(8)  # as a run does that diverges
  writer.scalars(9, {"loss": 0.5})
  writer.close()
  board = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
  shown = [(e.step, round(float(e.tensor_proto.float_val[0]), 2)) for e in board.Tensors("loss")]
  assert shown == [(s, 6 + s / 100) for s in range(1, 5)] + [(s, 9 + s / 100) for s in range(5, 9)] + [(9, 0.5)]


class Wandb:
  """Stands in for the package wandb, and for a run of it."""

  def __init__(self):
    self.ids, self.rows, self.steps = [], [], {}

  def init(self, *, id, resume, **_):
    assert resume == "allow"
    self.ids.append(id)
    return self

  def define_metric(self, name, *, step_metric):
    self.steps[name] = step_metric

  def log(self, row):
    self.rows.append(row)

  def finish(self):
    pass


def test_a_run_is_one_run_at_wandb_until_it_is_overwritten(tmp_path, monkeypatch):
  wandb = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  monkeypatch.setattr(metrics, "check_wandb", lambda project: None)
  for workdir, again in (
    (tmp_path / "a", {}),
    (tmp_path / "a", {"resume": True}),
    (tmp_path / "a", {"overwrite": True}),
    (tmp_path / "b", {}),
  ):
    path = checkpoint.claim_workdir(str(workdir), **{"resume": False, "overwrite": False, **again})
    checkpoint.write_config(path, "{}")
    metrics.Writer(path, wandb="mine").close()
    lock.release(path)
  begun, resumed, overwritten, other = wandb.ids
  assert begun and begun == resumed and len({begun, overwritten, other}) == 3


def test_rows_that_are_made_again_are_sent_to_wandb_again(tmp_path, monkeypatch):
  """It drops what is logged with a step= before its own."""
  wandb = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  monkeypatch.setattr(metrics, "check_wandb", lambda project: None)
  writer = metrics.Writer(tmp_path, wandb="mine")
  for step, loss in ((1, 3.0), (2, 9.0)):
    writer.scalars(step, {"loss": loss, "verdict": "fine"})
  writer.rewind(1)
  writer.scalars(2, {"loss": 2.0})
  writer.close()
  assert wandb.steps == {"*": "step"}
  assert wandb.rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}]


def test_the_line_of_progress(capsys):
  progress = Progress(10, 4.0, show={"accuracy": "acc %", "rank": "rank"}, seconds_between_lines=0.0)
  progress.update(1, {"loss": 2.0, "accuracy": 0.532}, 75.0)
  progress.update(2, {"loss": 1.5, "chance_loss": 3.4, "rank": 7.25, "other": 1.0}, 70.0)
  progress.update(2, {"accuracy": 0.54}, math.nan)  # before the first update of a resumed run
  assert capsys.readouterr().out.splitlines() == [
    "step 1/10 (0.2 epochs)  loss 2.000  acc 53.2 %  ETA 1:15",
    "step 2/10 (0.5 epochs)  loss 1.500 (chance 3.40)  acc 53.2 %  rank 7.250  ETA 1:10",
    "step 2/10 (0.5 epochs)  loss 1.500 (chance 3.40)  acc 54.0 %  rank 7.250",
  ]


@pytest.mark.parametrize("columns", [200, 116, 110, 80, 60, 40, 20])
def test_the_progress_line_fits_the_terminal(columns, monkeypatch, capsys):
  """Or every step would leave a line behind; the step, the loss and the time left go last."""
  monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
  progress = Progress(12345, 78.1, show={"contrastive_accuracy": "contrastive acc %", "knn": "kNN %"})
  progress._live = True
  row = {"loss": 2.264, "chance_loss": 5.54, "contrastive_accuracy": 0.69, "knn": 0.82}
  progress.update(10251, row | {"images_per_second": 1412.0, "data_wait": 0.03}, 12.0)
  said = capsys.readouterr().out.removeprefix("\r\033[K")
  assert "\n" not in said and len(said) < columns and said.startswith("step 10251/12345")
  assert ("loss 2.264" in said) == ("ETA 0:12" in said) == (columns >= 40)
  assert ("kNN 82.0 %" in said) == (columns >= 110) and ("waiting for data 3 %" in said) == (columns >= 200)


def test_progress_in_a_notebook_takes_the_place_of_the_line_before(monkeypatch, capsys):
  """A stand-in for IPython in a kernel, some of which say that their output is a terminal."""
  shown = []

  def display(content, raw, display_id):
    assert raw and display_id
    shown.append(content["text/plain"])
    return types.SimpleNamespace(update=lambda content, raw: shown.__setitem__(-1, content["text/plain"]))

  notebook = types.SimpleNamespace(
    get_ipython=lambda: types.SimpleNamespace(kernel=1), display=types.SimpleNamespace(display=display)
  )
  monkeypatch.setitem(sys.modules, "IPython", notebook)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  progress = Progress(10, 4.0)
  for step in range(1, 11):
    progress.update(step, {"loss": 2.0}, 10.0 - step)
  with progress.doing("compiling"):
    pass
  assert shown == ["step 10/10 (2.5 epochs)  loss 2.000  ETA 0:00"]
  assert capsys.readouterr().out == "compiling: 0:00\n"
