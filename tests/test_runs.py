"""`simclr runs` tells complete runs from others and where their configs differ; `simclr recipes` reads every header."""

import json
import re
import subprocess
import sys

import pytest

from simclr_jax import __main__ as cli
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import recipes, runs


def make(folder, *, steps=4, complete=True, **changes):
  folder.mkdir(parents=True)
  config = json.loads(config_lib.to_json(config_lib.load("smoke")))
  config.update(changes)
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "run.json").write_text(json.dumps({"recipe": "configs/smoke.py", "total_steps": 4}))
  rows = [
    {"step": s, "loss": 5.0 - s, "contrastive_accuracy": s / 10, "seconds": 900.0 * s} for s in range(1, steps + 1)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  if complete:
    scores = {"h": {"knn": 0.8, "linear": 0.861}}
    (folder / "scores.json").write_text(json.dumps({"step": 4, "scores": scores}))
    (folder / "report.html").write_text("a page")
    (folder / "COMPLETE").write_text("step 4\n")


@pytest.fixture
def folder(tmp_path):
  make(tmp_path / "a")
  make(tmp_path / "deeper/b", seed=1, batch_size=256)
  make(tmp_path / "c", steps=2, complete=False)
  (tmp_path / "a/checkpoints/config.json").parent.mkdir()
  (tmp_path / "a/checkpoints/config.json").write_text("{}")
  return tmp_path


def test_every_run_is_found_and_read(folder):
  found = {run.name: run for run in runs.find(folder)}
  assert sorted(found) == ["a", "c", "deeper/b"]
  a, c = found["a"], found["c"]
  assert a.complete and (a.step, a.total, a.hours) == (4, 4, 1.0) and a.numbers["linear"] == 0.861
  assert not c.complete and (c.step, c.total) == (2, 4) and c.recipe == "configs/smoke.py"
  assert runs.differences([found[name] for name in sorted(found)]) == {
    "batch_size": [128, 128, 256],
    "seed": [0, 0, 1],
  }


def test_a_run_may_have_the_name_of_a_folder_inside_runs(folder):
  for name in ("encoder", "deeper/map", "checkpoints/one"):
    make(folder / name)
  assert sorted(run.name for run in runs.find(folder)) == [
    *("a", "c", "checkpoints/one", "deeper/b", "deeper/map", "encoder"),
  ]


def test_exports_are_no_runs(folder):
  """Those for timm and Hugging Face have a config.json of their own."""
  export = folder / "a/encoder_torch"
  export.mkdir()
  (export / "config.json").write_text("{}")
  (export / "card.json").write_text("{}")
  assert sorted(run.name for run in runs.find(folder)) == ["a", "c", "deeper/b"]


def test_no_device_is_touched(folder, monkeypatch):
  """It may be training."""
  monkeypatch.setattr("jax.devices", lambda *_: pytest.fail("a device was asked for"))
  assert cli.main(["runs", str(folder)]) == 0


def test_the_program_prints_and_writes_a_page(folder, capsys):
  assert cli.main(["runs", str(folder)]) == 0
  out = capsys.readouterr().out
  assert re.search(r"a +configs/smoke.py +4 of 4 +complete +1.000 +40.0 +80.0 +86.1 +1.00", out)
  assert re.search(r"c +configs/smoke.py +2 of 4 +not complete", out)
  assert "deeper/b  batch_size=256  seed=1" in out and "c  the same" in out
  page = (folder / "runs.html").read_text()
  assert '<a href="a/report.html">a</a>' in page and "2 of them complete" in page and page.count("<svg") == 2
  assert not re.search(r"https?:|url\(", page)


def test_damaged_files_do_not_stop_it(folder, capsys):
  (folder / "a/config.json").write_text("{")
  (folder / "c/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  found = {run.name: run for run in runs.find(folder)}
  assert found["a"].config == {} and found["c"].step == 1
  assert found["a"].damaged == ("config.json is damaged",) and not found["c"].damaged
  (folder / "deeper/b/run.json").write_text('{"total_steps": "four"}')
  assert cli.main(["runs", str(folder)]) == 0
  out = capsys.readouterr().out
  assert "a: config.json is damaged" in out and "deeper/b: ValueError: invalid literal for int()" in out
  assert re.search(r"c +configs/smoke.py +1 of 4 +not complete", out)
  assert cli.main(["runs", str(folder / "none")]) == 1
  assert cli.main(["runs", str(folder / "a/checkpoints/..")]) == 0
  (folder / "empty").mkdir()
  assert cli.main(["runs", str(folder / "empty")]) == 1
  assert "no run in or below it" in capsys.readouterr().err


@pytest.mark.parametrize(
  "file, content, why",
  [
    ("metrics.jsonl", '{"step": 1, "loss": "0.5", "verdict": 3}', "metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"step": 1, "loss": true, "seconds": [1]}', "metrics.jsonl is damaged"),
    ("metrics.jsonl", f'{{"step": 1, "rank": 1{"0" * 400}}}', "OverflowError: int too large to convert to float"),
    ("scores.json", '{"scores": {"h": {"knn": "x"}}}', "scores.json is damaged"),
    ("scores.json", '{"scores": [1]}', "scores.json is damaged"),
    ("run.json", '{"recipe": 5}', "run.json is damaged"),
    ("run.json", '{"total_steps": [1]}', "TypeError: int() argument must be"),
    ("config.json", '{"program": ["x"]}', "config.json is damaged"),
    ("config.json", '{"train_steps": {"x": NaN}, "hidden": [NaN], "id2label": {"0": "a"}}', "TypeError: int()"),
  ],
)
def test_an_odd_file_is_named_and_the_good_runs_are_shown(folder, capsys, file, content, why):
  make(folder / "odd")
  (folder / "odd/run.json").write_text("{}")
  (folder / "odd" / file).write_text(content)
  assert cli.main(["runs", str(folder)]) == 0
  out = capsys.readouterr().out
  assert f"odd: {why}" in out and re.search(r"a +configs/smoke.py +4 of 4 +complete +1.000", out)
  assert re.search(r"odd .* damaged", out) and (folder / "runs.html").exists()


def test_every_recipe_states_its_contract():
  for name, fields in recipes.all_headers().items():
    assert {"title", "Command", "Hardware", "Expected", "Source"} <= set(fields), name
    assert all(fields.values()), name
    assert f"configs/{name}.py" in fields["Command"]


def test_recipes_program(capsys):
  assert cli.main(["recipes"]) == 0
  table = capsys.readouterr().out
  assert all(re.search(rf"^{name} ", table, re.MULTILINE) for name in recipes.all_headers())
  assert cli.main(["recipes", "smoke"]) == 0
  out = capsys.readouterr().out
  assert "Expected:  kNN (k=20)" in out and "\n           h 82.3" in out
  assert cli.main(["recipes", "smoek"]) == 1
  assert "did you mean 'smoke'?" in capsys.readouterr().err
  narrow = recipes.table(recipes.all_headers(), 80)
  assert max(map(len, narrow.splitlines())) <= 80


def test_a_closed_pipe_is_no_error():
  done = subprocess.run(
    f"{sys.executable} -m simclr_jax recipes | true", shell=True, executable="/bin/bash", capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stderr == ""
