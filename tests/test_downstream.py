"""The command that runs everything: what it keeps, what it tells; and, slowly, all of it."""

import json
import xml.etree.ElementTree

import pytest
import tiny

from simclr_jax import report
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import downstream
from simclr_jax.runtime import checkpoint
from simclr_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


def test_finished_parts_are_kept_and_unfinished_ones_go_on(tmp_path):
  calls = []

  def program(config, folder, *, resume, overwrite):
    calls.append(resume)
    folder.mkdir(exist_ok=True)
    if len(calls) > 1:  # the first is killed after its scores are written and before its encoder is
      (folder / "scores.json").write_text(json.dumps({"scores": {"accuracy": 0.5}}))
    if len(calls) < 3:
      raise KeyboardInterrupt
    (folder / "COMPLETE").write_text("")

  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      downstream.part(program, None, tmp_path / "run")
  for _ in range(2):
    assert downstream.part(program, None, tmp_path / "run") == {"accuracy": 0.5}
  assert calls == [False, True, True]


def test_changed_values_are_checked():
  config = downstream.changed("finetune:small", {"labels.fraction": 0.1, "encoder": {"depth": 34}, "start": "x"})
  assert (config.labels.fraction, config.encoder.depth, config.start) == (0.1, 34, "x")
  with pytest.raises(ValueError, match="labels.fraction=2.0"):
    downstream.changed("finetune:small", {"labels.fraction": 2.0})
  config = config_lib.load("downstream")
  for recipe in (config.pretrain, config.finetune, config.distill, config.transfer):
    config_lib.load(recipe)
  assert config.distill_fraction in config.fractions


def test_what_would_end_it_after_pretraining_ends_it_before(tmp_path):
  with pytest.raises(ValueError, match=r"config.distill_fraction=0.5: expected one of config.fractions=\("):
    config_lib.load("downstream", ["--config.distill_fraction=0.5"])
  spec, recipe = tiny.npz(tmp_path / "tiny.npz"), tmp_path / "recipe.py"
  text = "from simclr_jax.programs import config\n\n\ndef get_config():\n  found = config.read_recipe('smoke')\n"
  for changes, words in (
    ({"train": spec, "test": "", "held_out": 0.0}, "no images are left to score"),
    ({"train": f"files:{tmp_path}", "test": ""}, "no image"),
  ):
    recipe.write_text(
      text + f"  found['data'] = {changes}\n  import ml_collections\n  return ml_collections.ConfigDict(found)\n"
    )
    with pytest.raises(ValueError, match=words) as raised:
      downstream.run(downstream.changed("downstream", {"pretrain": str(recipe)}), tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
  moved = tmp_path / "moved.py"
  moved.write_text(
    text.replace("smoke", "transfer:small")
    + "  found['rows']['textures']['train'] = 'npz:none.npz'\n  import ml_collections\n  return ml_collections.ConfigDict(found)\n"
  )
  large = tmp_path / "large.py"
  large.write_text(
    text.replace("smoke", "distill:small")
    + "  found['batch_size'] = 16384\n  import ml_collections\n  return ml_collections.ConfigDict(found)\n"
  )
  changes = {"rows.textures.train": "fashion:test", "rows.textures.test": "fashion:train"}
  seen = recipe_of(tmp_path / "seen.py", "transfer:small", **changes)
  for changes, words in (
    ({"finetune": "finetun"}, "no such recipe"),
    (
      {"fractions": (0.001, 0.1)},
      r"fractions=\(0.001, 0.1\): 0.001 of the labels leaves 10 training images, fewer than batch_size=64 of "
      "config.finetune=finetune:small: raise it",
    ),
    ({"distill": str(large)}, "its batch_size=16384 exceeds the 10000 training images"),
    ({"transfer": str(moved)}, "none.npz"),
    ({"transfer": seen}, "rows.textures.test=fashion:train has 10,000 images of data.train=fashion:train"),
    (
      {"distill": "finetune:small"},
      "config.distill=finetune:small: a recipe for simclr finetune; expected one for simclr distill",
    ),
    ({"pretrain": "transfer"}, "expected one for simclr pretrain"),
  ):
    with pytest.raises(ValueError, match=words):
      downstream.run(downstream.changed("downstream", changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def recipe_of(path, base, **changes):
  """The file of a recipe that is `base` with changed values."""
  path.write_text(
    "import ml_collections\nfrom simclr_jax.programs import config\n\n\ndef get_config():\n"
    f"  found = config.to_dict(config.replace(config.load({base!r}), {changes!r}))\n  return ml_collections.ConfigDict(found)\n"
  )
  return str(path)


def configs(tmp_path, **changes):
  parts = downstream.parts_of(downstream.changed("downstream", changes), 3, tmp_path)
  return {name: one for name, (_, one) in parts.items()}


def test_training_from_scratch_taps_no_head(tmp_path):
  changes = {"labels.fraction": 1.0, "data.train": "fashion:train", "data.test": "fashion:test"}
  tuned = recipe_of(tmp_path / "tuned.py", "finetune:v2_10pct", **changes)
  found = configs(tmp_path, finetune=tuned)
  assert {name: one.tap for name, one in found.items() if isinstance(one, config_lib.Finetune)} == {
    "fine-tuned_0.01": 1,
    "from_scratch_0.01": 0,
    "fine-tuned_0.1": 1,
    "from_scratch_0.1": 0,
    "student": 0,
    "student_from_scratch": 0,
  }
  deep = recipe_of(tmp_path / "deep.py", "finetune:small", tap=3)
  with pytest.raises(UserError, match="config.tap=3: config.pretrain=smoke has 2 layers in its head"):
    downstream.run(downstream.changed("downstream", {"finetune": deep}), tmp_path / "run")
  started = recipe_of(tmp_path / "started.py", "distill:small", start=str(tmp_path / "none"))
  with pytest.raises(UserError, match="no run here"):
    downstream.run(downstream.changed("downstream", {"distill": started}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_student_with_labels_has_those_of_its_teacher(tmp_path):
  found = configs(tmp_path, distill=recipe_of(tmp_path / "half.py", "distill:small", alpha=0.5))
  for name in ("student", "fine-tuned_0.1", "student_from_scratch"):
    assert (found[name].labels.fraction, found[name].labels.seed) == (0.1, 3)
  assert configs(tmp_path)["student"].labels.fraction == 1


def test_a_finished_part_of_another_recipe_is_refused(tmp_path):
  """Before the folder is touched; what a run found in its start is no difference, nor are a moved folder and what may change."""
  settings, run = config_lib.load("downstream"), tmp_path / "run"
  run.mkdir()
  checkpoint.write_config(run, config_lib.to_json(settings))
  (run / "COMPLETE").touch()
  found = downstream.parts_of(settings, 0, run / "seed0")
  name = "fine-tuned_0.1"
  values = {"start": "moved/pretrain", "encoder.width": 2.0, "projector.kind": "linear", "log.every_steps": 7}
  for part, changes in (("pretrain", {}), (name, values), ("student", {"augment.resize": "bicubic_tf1"})):
    (folder := run / "seed0" / part).mkdir(parents=True)
    kept = config_lib.replace(found[part][1], changes)
    checkpoint.write_config(folder, config_lib.to_json(kept))
    (folder / "scores.json").write_text(json.dumps({"scores": {"accuracy": 0.5}}))
    (folder / "COMPLETE").touch()
    if part != "student":
      assert downstream.part(None, found[part][1], folder) == {"accuracy": 0.5}
  edited = recipe_of(tmp_path / "edited.py", "finetune:small", **{"optimizer.base_lr": 9.0})
  now = config_lib.replace(settings, {"finetune": edited})
  checkpoint.write_config(run, config_lib.to_json(now))
  with pytest.raises(
    UserError, match=f"{name} is finished: .*config.optimizer.base_lr is 0.001 in the run and 9.0 now"
  ):
    downstream.run(now, run, resume=True)
  assert (run / "COMPLETE").exists()


def test_a_refused_resume_leaves_a_finished_run_complete(tmp_path):
  (tmp_path / "COMPLETE").touch()
  checkpoint.write_config(tmp_path, config_lib.to_json(config_lib.load("downstream")))
  with pytest.raises(UserError, match="config.pretrain_epochs is 8.0 in the run and 9.0 now"):
    downstream.run(downstream.changed("downstream", {"pretrain_epochs": 9.0}), tmp_path, resume=True)
  assert (tmp_path / "COMPLETE").exists()


def test_pretraining_is_as_long_as_the_config_says():
  config = downstream.changed("downstream", {"pretrain": "textures", "pretrain_epochs": 7.0})
  assert config_lib.load("textures").train_steps
  found = downstream.pretraining(config, 3)
  assert (found.train_steps, found.train_epochs, found.optimizer.warmup_epochs, found.seed) == (0, 7.0, 0.7, 3)


def test_table_and_figure(tmp_path):
  results = [
    {("fine-tuned", 0.01): 0.5, ("student", 0.1): 0.625},
    {("fine-tuned", 0.01): 0.75, ("student", 0.1): 0.625},
  ]
  lines = downstream.table(results).splitlines()
  assert "2 seeds" in lines[0] and lines[1].split() == ["fine-tuned", "1", "%", "62.5", "50.0", "to", "75.0"]
  curves = {"fine-tuned": {0.01: [0.5, 0.75], 0.1: [0.8, 0.9]}, "linear on h": {1.0: [0.8, 0.8]}}
  report.accuracy_against_labels_svg(tmp_path / "figure.svg", curves)
  tree = xml.etree.ElementTree.parse(tmp_path / "figure.svg")
  find = "{http://www.w3.org/2000/svg}"
  first, second = (line.get("points").split() for line in tree.iter(f"{find}polyline"))
  (x1, y1), (x10, y10), (x100, y100) = (map(float, point.split(",")) for point in (*first, *second))
  assert x10 - x1 == pytest.approx(x100 - x10, abs=0.2)  # fractions are on a logarithmic axis
  assert (y1 - y10) / (y100 - y10) == pytest.approx((85 - 62.5) / (85 - 80), rel=0.02)


@pytest.mark.slow
def test_the_program(tmp_path, capsys):
  """All parts, a few steps each, on 96 images; --resume keeps what is finished."""
  spec = tiny.npz(tmp_path / "tiny.npz")
  rows = {"again": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")}
  changes = {
    "smoke": {
      "data.train": spec,
      "data.test": f"{spec}:test",
      "batch_size": 16,
      "encoder.width": 0.0625,
      "augment.size": 16,
    },
    "finetune": {"train_steps": 3, "batch_size": 8, "evaluate.batch_size": 96},
    "distill": {"train_steps": 3, "batch_size": 16, "encoder.width": 0.0625},
    "transfer": {"rows": rows, "samples": 100},
  }
  recipes = {}
  for name, values in changes.items():
    variant = () if name == "smoke" else ("small",)
    recipes[name] = tmp_path / f"{name}.py"
    recipes[name].write_text(
      f"from configs.{name} import get_config as base\n\n\ndef get_config():\n  config = base(*{variant})\n"
      f"  for key, value in {values}.items():\n    section, _, leaf = key.rpartition('.')\n"
      "    (config[section] if section else config)[leaf] = value\n  return config\n"
    )
  values = {
    "seeds": "(0,)",
    "pretrain_epochs": 1.0,
    "fractions": "(0.5,)",
    "distill_fraction": 0.5,
    "pretrain": recipes["smoke"],
  }
  values |= {name: path for name, path in recipes.items() if name != "smoke"}
  config = config_lib.load("downstream", [f"--config.{key}={value}" for key, value in values.items()])
  result = downstream.run(config, tmp_path / "run")
  names = {name for name, _ in result["results"][0]}
  assert {"linear on h", "fine-tuned", "from scratch", "student", "student from scratch"} <= names
  assert {"transfer to again, linear pretrained", "transfer to again, linear supervised"} <= names
  assert "fine-tuned" in capsys.readouterr().out and (tmp_path / "run/downstream.svg").exists()
  kept = (tmp_path / "run/seed0/student/scores.json").stat().st_mtime_ns
  assert downstream.run(config, tmp_path / "run", resume=True)["results"] == result["results"]
  assert (tmp_path / "run/seed0/student/scores.json").stat().st_mtime_ns == kept
