"""Recipes load, overrides apply, and every mistake is one line with the value, what was expected and what to do."""

import dataclasses
import functools
import inspect
import json
import os
import pathlib
import pty
import resource
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from simclr_jax import (
  augment,
  augment_extra,
  augment_on_device,
  contrast,
  encoder,
  model,
  optimizer,
  projector,
  views,
  vit,
)
from simclr_jax.evaluation import linear
from simclr_jax.methods import simclr
from simclr_jax.programs import completion, flags, pretrain, resolved
from simclr_jax.programs import config as config_lib
from simclr_jax.runtime import loop
from simclr_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/recipes.json").read_text())


def one_line(error):
  assert "\n" not in str(error.value)
  return str(error.value)


def test_override_and_freeze():
  c = config_lib.load("configs/smoke.py", ["--config.batch_size=64", "--config.augment.crop_area=(0.5, 1.0)"])
  assert c.batch_size == 64 and tuple(c.augment.crop_area) == (0.5, 1.0)
  with pytest.raises(AttributeError):
    c.batch_size = 3


def test_an_option_that_the_recipe_leaves_at_its_default():
  values = ["--config.augment.color_order=fixed", "--config.augment.extra=(('sobel', 0.1),)", "--config.batch_size=64"]
  c = config_lib.load("smoke", values)
  assert c.augment.color_order == "fixed" and c.augment.extra == (("sobel", 0.1),) and c.batch_size == 64
  pretrain.view_pipeline(c).check()


@pytest.mark.parametrize(
  "override, key, value",
  [
    ("zero1=True", "zero1", True),
    ("zero1=false", "zero1", False),
    ("zero1=1", "zero1", True),
    ("train_epochs=3", "train_epochs", 3.0),
    ("train_epochs=1e2", "train_epochs", 100.0),
    ("augment.crop_area=[0.5, 1]", "augment.crop_area", (0.5, 1.0)),
    ("loss.temperature=None", "loss.temperature", None),
    ("loss.normalize=False", "loss.normalize", False),
    ("data.data_dir=None", "data.data_dir", "None"),
    ("data.test=", "data.test", ""),
    ("memory={'size': 64}", "memory.size", 64),
    ("log.wandb=3", "log.wandb", "3"),
  ],
)
def test_values_as_they_are_typed(override, key, value):
  found = config_lib.flatten(config_lib.load("smoke", [f"--config.{override}"]))[key]
  assert found == value and type(found) is type(value)


def test_tuples_of_one_element_as_they_are_typed():
  assert config_lib.load("downstream", ["--config.seeds=3"]).seeds == (3,)
  assert config_lib.load("transfer", ["--config.methods=linear"]).methods == ("linear",)


def test_recipe_by_name_or_path():
  assert config_lib.load("smoke") == config_lib.load("configs/smoke.py")


@pytest.mark.parametrize("recipe", GOLDEN)
def test_recipes_say_what_they_said_before_they_had_defaults(recipe):
  """Each variant is compared with what it was when it named every key; a run from then can be resumed."""
  for variant, changes in GOLDEN[recipe]["variants"].items():
    flat = {key: value for key, value in {**GOLDEN[recipe]["base"], **changes}.items() if value is not None}
    c = config_lib.load(f"{recipe}:{variant}" if variant else recipe)
    now = json.loads(json.dumps(config_lib.flatten(c)))
    # Color in a pair was always distorted in one way, which such a run keeps; now it is as the recipe says.
    fixed = (
      {"augment.color_strength": 1.0, "augment.brightness": "v2"}
      if ["color", 1.0] in now.get("augment.extra", [])
      else {}
    )
    assert not fixed or flat["augment.color_strength"] == 0.0 and now["augment.color_strength"] == 1.0
    now |= {key: flat[key] for key in fixed}
    assert {key: now[config_lib.RENAMED.get(key, key)] for key in flat} == flat, variant
    nested = {}
    for key, value in flat.items():
      *sections, leaf = key.split(".")
      functools.reduce(lambda place, name: place.setdefault(name, {}), sections, nested)[leaf] = value
    # What has changed since, and what such a run resumes with: all labeled images were trained on, without antialiasing.
    then = {"data.held_out": 0.0, "augment.resize": "bicubic"} if recipe == "folder" else fixed
    config_lib.check_same(config_lib.from_json(json.dumps(nested)), config_lib.replace(c, then))


def test_a_run_from_before_keys_were_renamed_still_loads():
  c = config_lib.load("downstream")
  text = config_lib.to_json(c).replace('"fractions"', '"shares"').replace('"distill_fraction"', '"distill_share"')
  assert not {"fractions", "distill_fraction"} & set(json.loads(text))
  config_lib.check_same(config_lib.from_json(text), c)
  with pytest.raises(ValueError, match="config.shares"):  # a recipe is written anew
    config_lib.load("downstream", ["--config.shares=(0.1,)"])


def test_a_rollback_needs_checkpoints_to_return_to():
  never = ["--config.checkpoint.every_epochs=0", "--config.rollback.times=3"]
  for recipe in ("smoke", "finetune"):
    with pytest.raises(UserError) as error:
      config_lib.load(recipe, never)
    assert "config.rollback.times=3: there is no checkpoint to return to" in one_line(error)
    assert config_lib.load(recipe, [*never, "--config.checkpoint.every_steps=10"]).rollback.times == 3
    c = config_lib.load(recipe, [never[0], "--config.rollback.spike=6"])  # which stops the run
    kept = config_lib.to_dict(c) | {"rollback": {"times": 3, "spike": 6.0}}  # of a run from when it was not refused
    assert config_lib.from_json(json.dumps(kept)) == c


@pytest.mark.parametrize("path", sorted(config_lib.recipe_folder().glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_recipe_is_complete_and_survives_json(path):
  c = config_lib.load(str(path))
  assert config_lib.difference(c, config_lib.from_json(config_lib.to_json(c))) == []
  assert path.read_text().startswith('"""') and "Command:" in path.read_text()


@pytest.mark.parametrize(
  "override, message",
  [
    ("--config.optimizer.nmae=x", "did you mean config.optimizer.name?"),
    ("--config.batchsize=8", "did you mean config.batch_size?"),
    ("--config.batch_size", "expected --config.batch_size=VALUE"),
    ("--config.batch_size=1.5", "config.batch_size=1.5: expected a whole number of at least 2"),
    ("--config.batch_size=many", "config.batch_size=many: expected a whole number of at least 2"),
    ("--config.batch_size=-8", "config.batch_size=-8: expected a whole number of at least 2"),
    ("--config.optimizer.base_lr=nan", "config.optimizer.base_lr=nan: expected a number above 0"),
    ("--config.optimizer.momentum=1", "config.optimizer.momentum=1: expected a number of at least 0 and below 1"),
    ("--config.loss.reduction=sum", "config.loss.reduction=sum: expected one of mean, official_sum or None"),
    ("--config.loss.name=ntxent", "config.loss.name=ntxent: expected one of nt_xent, decoupled"),
    ("--config.data.max_bad_fraction=2.0", "expected a number of at least 0 and at most 1"),
    ("--config.data.train=", "config.data.train=: expected a data set such as fashion:train"),
    ("--config.train_epochs=0.0", "set one of them"),
    ("--config.evaluate.every_steps=3", "config.evaluate.every_steps=3 and every_epochs=5.0: set one"),
    ("--config.norm_devices=4", "config.norm_devices=4 is only for config.norm_scope=device"),
    ("--config.zero1=perhaps", "config.zero1=perhaps: expected True or False"),
    ("--config.augment.crop_area=(0.1, 0.5, 1)", "expected a tuple such as (0.08, 1.0) of (float, float)"),
    ("--config.augment.crop_area=(1.0, 0.1)", "expected the smaller value first"),
    ("--config.augment.crop_area=(0.02, 0.08)", "crop_sampler=official draws no crop below a tenth of the image"),
    ("--config.augment.crop_area=(0.05, 0.1)", "crop_sampler=official draws no crop below a tenth of the image"),
    ("--config.augment.crop_area=(0.5, 0.5)", "whole images where the range is narrower than about 0.01"),
    ("--config.train_epochs=1e308", "expected a number of at least 0 and at most 1000000000"),
    ("--config.augment.extra=(('sobell', 0.1),)", "config.augment.extra='sobell': expected one of sobel, solarize"),
    ("--config.augment.extra=(('sobel', 10.0),)", "config.augment.extra: sobel with probability 10.0: expected 0 to 1"),
    ("--config.augment.colour_strength=1", "did you mean config.augment.color_strength?"),
    ("--config.color_strength=1", "did you mean config.augment.color_strength?"),
    ("--config.encoder.remat=blocks", "config.encoder.remat='blocks': expected none, block or group"),
    ("--config.encodr.depth=50", "config.encodr.depth: no such key; did you mean config.encoder.depth?"),
    ("--config.encoder.depth.blocks=3", "no such key; did you mean config.encoder.depth?"),
    ("--config.encoder=50", "config.encoder=50: this is a section; give its keys, as --config.encoder.KEY=VALUE"),
    ("--config.batch_size=1", "config.batch_size=1: expected a whole number of at least 2"),
    (
      "--config.seed=18446744073709551616",
      "seed=18446744073709551616: expected a whole number of at least 0 and at most 4294967295",
    ),
    ("--config.seed=4294967296", "and at most 4294967295"),
    ("--config.rollback.times=2.5", "config.rollback.times=2.5: expected a whole number of at least 0"),
  ],
)
def test_mistakes(override, message):
  with pytest.raises(UserError) as error:
    config_lib.load("smoke", [override])
  assert message in one_line(error)


@pytest.mark.parametrize(
  "values, message",
  [
    (
      {"loss.name": "debiased", "loss.normalize": False},
      "loss.normalize=False: config.loss.name=debiased is for cosine",
    ),
    ({"loss.name": "nt_logistic_semi_hard", "loss.semi_hard": False}, "uses them; use nt_logistic"),
    ({"encoder.sk_ratio": 0.5, "encoder.stem": "imagenet", "encoder.width": 1 / 64}, "expected >= 1/32"),
  ],
)
def test_values_that_contradict_each_other(values, message):
  with pytest.raises(UserError) as error:
    config_lib.replace(config_lib.load("smoke"), values)
  assert message in one_line(error)


@pytest.mark.parametrize(
  "name, message",
  [
    ("stranger/config.json", "stranger/config.json is not a recipe, which is a Python file"),
    ("stranger/config", "no such recipe; stranger/config is not a file"),
    ("v1.5", "no such recipe; v1.5 is not a file; did you mean 'v1'?"),
    ("v1.yaml", "v1.yaml is not a file"),
    ("smoke.py", "smoke.py is not a file; did you mean 'smoke'?"),
    ("/nonexistent/smoke", "/nonexistent/smoke is not a file"),
    ("my/own/smoke.py", "my/own/smoke.py is not a file"),
    ("my/own/smoke.py:variant", "my/own/smoke.py is not a file"),
    ("", "no such recipe"),
    ("configs/../smoke.py", "is not a file"),
  ],
)
def test_nothing_runs_but_what_was_named(name, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "stranger").mkdir()
  for file in ("stranger/config.json", "stranger/config.py"):
    (tmp_path / file).write_text("raise SystemExit('executed')")
  with pytest.raises(UserError) as error:
    config_lib.load(name)
  assert message in one_line(error)


def test_a_bare_name_is_a_recipe_that_ships_and_a_path_is_a_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "smoke.py").write_text("raise SystemExit('executed')")
  for name in ("smoke", "configs/smoke.py", "configs/smoke"):
    assert config_lib.find_recipe(name) == str(config_lib.recipe_folder() / "smoke.py")
  assert config_lib.find_recipe("smoke.py") == "smoke.py" and config_lib.find_recipe("./smoke.py:2") == "./smoke.py:2"


def test_unknown_recipe_names_the_nearest():
  with pytest.raises(ValueError) as error:
    config_lib.load("configs/smok.py")
  assert "did you mean 'smoke'?" in one_line(error)


def test_a_recipe_with_an_unknown_or_missing_key_is_refused():
  values = config_lib.to_dict(config_lib.load("smoke"))
  values["optimizer"]["momentun"] = 0.9
  with pytest.raises(
    UserError, match="config.optimizer.momentun: no such key; did you mean config.optimizer.momentum?"
  ):
    config_lib.from_dict(values)
  del values["optimizer"]["momentun"], values["optimizer"]["base_lr"]
  with pytest.raises(UserError, match="config.optimizer.base_lr is missing: expected a number above 0"):
    config_lib.from_dict(values)
  values["optimizer"]["base_lr"] = 1
  del values["data"]
  with pytest.raises(UserError, match="config.data.train is missing: expected a data set"):
    config_lib.from_json(json.dumps(values))


def test_replace_checks_and_takes_whole_sections():
  c = config_lib.load("smoke")
  other = config_lib.load("v2:r152_3x_sk1")
  now = config_lib.replace(c, {"encoder": other.encoder, "optimizer": {"base_lr": 1}, "loss.temperature": 1})
  assert now.encoder == other.encoder and now.optimizer == config_lib.Optimizer(base_lr=1.0)
  assert now.loss.temperature == 1.0 and c.loss.temperature == 0.2
  with pytest.raises(UserError, match="config.encoder.width=0: expected a number of at least 0.015625"):
    config_lib.replace(c, {"encoder.width": 0})
  with pytest.raises(UserError, match="knn_k=0: expected"):
    config_lib.EvaluateFeatures(knn_k=0)


def test_options_are_the_arguments_that_are_given():
  c = config_lib.load("smoke")
  given = {"temperature": 0.2, "normalize": True, "reduction": "mean", "precision": "highest"}
  assert dict(c.loss) == given == dict(**c.loss)
  assert {"where", "canvas"}.isdisjoint(dict(c.augment))


def test_memory_is_a_method():
  assert config_lib.load("smoke").method == "simclr" and config_lib.load("smoke").memory is None
  assert config_lib.load("v2:r50_1x_sk0-memory").method == "memory"
  assert config_lib.load("smoke", ["--config.method=memory"]).memory == config_lib.Memory()


def test_a_method_is_not_replaced_by_a_section_of_the_recipe():
  with pytest.raises(UserError, match="method='moco': config.memory is only for config.method=memory"):
    config_lib.load("v2:r50_1x_sk0-memory", ["--config.method=moco"])


def test_colors_in_fine_tuning_need_a_strength():
  with pytest.raises(UserError, match="config.augment.blur=False: needs config.augment.color_strength"):
    config_lib.load("finetune", ["--config.augment.blur=False"])
  with pytest.raises(UserError, match="config.augment.where=device: expected one of host"):
    config_lib.load("finetune", ["--config.augment.where=device"])
  with pytest.raises(UserError, match="config.augment.one_sided=True: expected one of False"):
    config_lib.load("finetune", ["--config.augment.color_strength=1.0", "--config.augment.one_sided=True"])
  with pytest.raises(UserError, match="config.augment.blur=False: needs config.augment.color_strength"):
    config_lib.load(
      "transfer", ["--config.augment.blur=False"]
    )  # which fine-tunes only after hours of linear evaluation


def arguments(function):
  return {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


@pytest.mark.parametrize(
  "section, function, others",
  [
    (config_lib.Crop, augment.one_view, ()),
    (config_lib.Augment, augment.two_views, ("extra",)),
    (config_lib.Augment, augment_extra.two_views, ()),
    (config_lib.Augment, augment_on_device.two_views, ("precision",)),
    (config_lib.Augment, augment_on_device.color_and_blur, ("precision",)),
    (config_lib.Encoder, encoder.resnet, ("dtype",)),
    (config_lib.Encoder, vit.vit, ("dtype", "pool")),
    (config_lib.Projector, projector.Projector, ("parent", "name")),
    (config_lib.Optimizer, optimizer.lars, ("trust_coefficient", "exclude")),
    (config_lib.Rollback, loop.Rollback, ()),
    (config_lib.CenterCrop, augment.center_crop, ("resize",)),
  ],
)
def test_defaults_are_those_of_the_functions(section, function, others):
  """`others` are arguments that are no keys, or whose default is written in another way."""
  ours = {f.name: f.default for f in dataclasses.fields(section)}
  ours |= {"proportion": ours["crop"]} if "crop" in ours else {}
  theirs = {k: v for k, v in arguments(function).items() if k not in others}
  assert theirs == {key: ours[key] for key in theirs}


def test_every_option_is_an_argument_of_its_function():
  def options(section):
    return {f.name for f in dataclasses.fields(section) if f.metadata["option"]}

  def names(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}

  assert options(config_lib.Augment) <= names(augment.two_views)
  assert options(config_lib.Encoder) == names(encoder.resnet, vit.vit)
  assert set(config_lib.ENCODERS) == set(model.ENCODERS)
  for name, taken in config_lib.ENCODERS.items():
    assert set(taken) - {"arrangement"} == names(model.ENCODERS[name])
  assert options(config_lib.Projector) == names(projector.Projector) - {"parent", "name"}
  losses = names(*contrast.LOSSES.values())
  assert options(config_lib.Loss) == losses - {"z", "mesh"}
  assert options(config_lib.Rollback) == names(loop.Rollback)


def test_choices_are_those_of_the_functions():
  def choices(section, name):
    return section.__dataclass_fields__[name].metadata["choices"]

  assert choices(config_lib.Encoder, "arrangement") == tuple(model.ARRANGEMENTS)
  assert choices(config_lib.Augment, "where") == views.WHERE
  assert config_lib.EXTRA == tuple(augment_extra.EXTRA)
  assert choices(config_lib.Encoder, "depth") == tuple(encoder.DEPTHS)
  assert choices(config_lib.Projector, "kind") == projector.KINDS
  assert set(choices(config_lib.Loss, "name")) == set(contrast.LOSSES)
  assert set(choices(config_lib.Loss, "reduction")) == set(contrast.REDUCTIONS)
  assert set(choices(config_lib.Loss, "precision")) == set(contrast.PRECISIONS)
  assert choices(config_lib.Optimizer, "name") == tuple(optimizer.OPTIMIZERS)
  assert set(choices(config_lib.TransferRow, "metric")) == set(linear.METRICS)
  assert config_lib.Augment.__dataclass_fields__["color_strength"].metadata["at_most"] == augment_on_device.MAX_STRENGTH


def test_every():
  def every(steps, epochs):
    return config_lib.every(config_lib.Every(every_steps=steps, every_epochs=epochs), num_examples=1000, batch_size=100)

  assert (every(0, 0.5), every(7, 0.0), every(0, 0.0)) == (5, 7, 0)


def test_the_page_of_all_keys_is_current():
  """python -m simclr_jax.programs.config > docs/config.md"""
  assert (ROOT / "docs/config.md").read_text() == config_lib.page()


def test_help_lists_every_key():
  text = config_lib.help_text(config_lib.Pretrain)
  for key in config_lib.flatten(config_lib.load("v2:r50_1x_sk0-memory")):
    assert f"--config.{key} " in text


def test_every_ablation_of_the_paper_is_a_recipe():
  from configs import ablations

  assert len(ablations.TOP_1) == 65
  for row in ablations.TOP_1:
    c = config_lib.load(f"configs/ablations.py:{row}")
    simclr.loss_function(c, None)
    batch, epochs = (4096, 100) if not row.startswith("batch") else map(int, row.replace("ep", "").split("-")[1:3])
    assert (c.batch_size, c.train_epochs) == (batch, epochs)
    images = 1_281_167
    peak = float(optimizer.learning_rate(c, images)(10 * images // batch))
    assert peak == pytest.approx(0.075 * batch**0.5 if row.endswith("sqrt") else 0.3 * batch / 256)
  assert config_lib.load("configs/ablations.py:no_l2-10").loss.normalize is False
  assert config_lib.load("configs/ablations.py:head-linear-64").projector == config_lib.Projector(
    kind="linear", out_dim=64
  )


def test_every_ablation_has_a_small_scale():
  from configs import ablations

  rows = [*ablations.TOP_1, "head-none", "head-linear-32", "compose-crop-color", "compose-rotate-rotate"]
  for row in rows:
    paper, small = (config_lib.load(f"configs/ablations.py:{name}") for name in (row, f"small-{row}"))
    assert (small.batch_size, small.train_epochs) == (paper.batch_size / 32, paper.train_epochs / 16)
    assert (small.loss, small.projector, small.augment.extra) == (paper.loss, paper.projector, paper.augment.extra)
    assert small.augment.color_strength == paper.augment.color_strength / 2
    assert small.augment.where == ("host" if small.augment.extra else "resident")
    assert (small.encoder.stem, small.augment.size, small.data.train) == ("cifar", 16, "textures:train")
    at_128 = config_lib.replace(small, {"batch_size": 128, "train_epochs": 10.0})
    assert float(optimizer.learning_rate(at_128, 1280)(10)) == pytest.approx(8e-3)


def test_fine_tuning_rows():
  c = config_lib.load("configs/finetune.py:supervised-4x-500ep-color")
  assert (c.encoder.width, c.train_epochs, c.augment.color_strength, c.augment.blur) == (4, 500.0, 1.0, False)
  assert config_lib.load("configs/finetune.py:v2_1pct-wide").optimizer.base_lr == 0.002
  assert config_lib.load("configs/finetune.py:supervised").augment.color_strength is None
  assert config_lib.load("configs/finetune.py:supervised-1pct").data.train == "tfds:imagenet2012_subset/1pct:train"


def test_distillation_rows():
  """SimCLR v2, Table 2: which images, which labels."""
  rows = {
    "": ("imagenet2012", 1.0, 1.0),
    "-self": ("imagenet2012", 1.0, 1.0),
    "-labels_1pct": ("imagenet2012", 0.5, 0.01),
    "-only_10pct": ("imagenet2012_subset/10pct", 0.5, 1.0),
  }
  for variant, (images, alpha, fraction) in rows.items():
    c = config_lib.load(f"configs/distill.py:r50_1x_sk0{variant}")
    assert (c.data.train, c.alpha, c.labels.fraction) == (f"tfds:{images}:train", alpha, fraction)
    assert c.temperature == (0.1 if variant == "-self" else 1.0)


def test_figure_5_composes_two_transformations_on_one_branch():
  c = config_lib.load("configs/ablations.py:compose-crop-sobel").augment
  assert (c.where, c.one_sided, c.color_strength, c.blur) == ("host", True, 0.0, False)
  assert [name for name, _ in c.extra] == ["crop", "sobel"]
  assert len(config_lib.load("configs/ablations.py:compose-color-color").augment.extra) == 1
  assert config_lib.load("configs/ablations.py:compose-crop-color").augment.color_strength == 1.0
  small = config_lib.load("configs/ablations.py:small-compose-crop-color", ["--config.augment.grayscale_prob=0.5"])
  assert (small.augment.color_strength, small.augment.grayscale_prob) == (0.5, 0.5)
  with pytest.raises(UserError, match="extra: color is the color distortion, and needs color_strength above 0"):
    config_lib.load("smoke", ["--config.augment.extra=(('color', 1.0),)", "--config.augment.color_strength=0.0"])


def test_an_older_run_whose_crops_were_whole_images_opens():
  old = config_lib.to_dict(config_lib.load("smoke"))
  old["augment"] = {**old["augment"], "crop_area": (0.05, 0.1)}
  assert config_lib.from_saved(old).augment.crop_area == (1.0, 1.0)


@pytest.mark.parametrize("damage", [{"crop_area": [0.1]}, {"crop_area": "x"}, {"extra": 3}, {"extra": ["color"]}, None])
def test_a_damaged_section_of_a_run_is_one_line_with_its_key(damage):
  values = config_lib.to_dict(config_lib.load("smoke"))
  values["augment"] = damage and {**values["augment"], **damage}
  with pytest.raises(UserError, match=r"config\.augment"):
    config_lib.from_saved(values)


def test_an_older_run_keeps_the_color_of_its_pair():
  c = config_lib.load("configs/ablations.py:small-compose-crop-color")
  old = config_lib.to_dict(c)
  old["augment"] = {**old["augment"], "color_strength": 0.0}
  assert config_lib.from_saved(old).augment == dataclasses.replace(c.augment, color_strength=1.0)


@pytest.mark.parametrize(
  "recipe, message",
  [
    ("configs/finetune.py:v1_1pct-wide", "after v1_1pct expected nothing, not wide"),
    ("configs/v1.py:5x", "the recipe has no variant '5x'"),
    ("configs/ablations.py:batch-3", "or one of temperature-0.05, temperature-0.1"),
    ("configs/ablations.py:compose-crop-colour", "with two of crop, cutout, color, sobel, noise, blur, rotate"),
    ("configs/distill.py:r50_1x_sk0-labels_2pct", "after r50_1x_sk0 expected self, labels_1pct"),
  ],
)
def test_unknown_variants(recipe, message):
  with pytest.raises(ValueError) as error:
    config_lib.load(recipe)
  assert f"--config={recipe}: " in one_line(error) and message in str(error.value)


def test_losses_by_name():
  z = np.random.default_rng(0).standard_normal((4, 2, 8)).astype(np.float32)
  c = config_lib.load("configs/ablations.py:loss-margin_triplet_semi_hard")
  ours, _ = simclr.loss_function(c, None)(z)
  assert float(ours) == pytest.approx(float(contrast.margin_triplet(z, margin=0.8, semi_hard=True)[0]))
  assert simclr.chance_loss(c) is None
  for changes, message in (
    ({"loss.class_prior": 0.1}, "config.loss.class_prior: no such option; nt_xent takes temperature"),
    ({"loss.temperature": None}, "config.loss.temperature is missing; nt_xent takes temperature"),
  ):
    with pytest.raises(ValueError) as error:
      simclr.loss_function(config_lib.replace(config_lib.load("smoke"), changes), None)
    assert message in one_line(error)


# ---- the command answers before it imports anything that takes time --------------------------------------------------

BLOCKED = """
import sys
for name in ("jax", "flax", "tensorflow", "numpy", "orbax"):
  sys.modules[name] = None
from simclr_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
  "argv, code, message",
  [
    (["--help"], 0, "quickstart"),
    (["pretrain", "--help"], 0, "--config.augment.color_strength"),
    (["pretrain", "--config=smoke"], 2, "--workdir"),
    (["pretrain", "--config=smoke", "--workdir=x", "--config.augment.colour_strength=1"], 1, "augment.color_strength?"),
    (["pretrain", "--config=smoke", "--workdir=x", "--config.batch_size", "many"], 1, "config.batch_size=many"),
    (["plan", "--config=smoke", "--topology=v4:2x2x1", "--config.batch_size=0"], 1, "config.batch_size=0"),
    (["knn", "--config.evaluate.knn_k=3"], 2, "--workdir"),
    (["recipes"], 0, "textures"),
    (["config", "smoke", "--config.encoder.width=2"], 0, "encoder.width"),
    (["completion", "bash"], 0, "complete -o default -F _simclr simclr"),
    (["pretran"], 2, "did you mean pretrain?"),
  ],
)
def test_answers_come_before_jax_is_imported(argv, code, message):
  began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  done = subprocess.run([sys.executable, "-c", BLOCKED, *argv], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == code, done.stderr
  assert message in (done.stderr if code else done.stdout)
  assert time.monotonic() - began < 5  # a tenth of a second on an idle machine
  assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # of the processor, however busy it is
  if code == 1:
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("simclr: ")


@pytest.mark.parametrize(
  "argv, message",
  [
    (["knn", "--workdri=x"], "unrecognized arguments: --workdri=x; did you mean --workdir?"),
    (["pretrain", "--encoder.width=2"], "--encoder.width=2; did you mean --config.encoder.width?"),
    (["data", "prepare", "x", "--ouput=y"], "--ouput=y; did you mean --output?"),
    (["completion", "bsh"], "; did you mean bash?"),
  ],
)
def test_a_misspelled_flag_names_the_nearest(argv, message, capsys):
  from simclr_jax import __main__ as cli

  required = {"knn": [], "pretrain": ["--config=smoke"], "data": ["--output=z"], "completion": []}[argv[0]]
  with pytest.raises(SystemExit):
    cli.main([*argv, *required, *([] if argv[0] in ("data", "completion") else ["--workdir=y"])])
  assert message in capsys.readouterr().err


def test_the_resolved_config_says_where_values_come_from(capsys):
  text = resolved.run("v1:1x", ["--config.encoder.width=2", "--config.memory={'size': 4}"])
  found = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[2] != " "}
  assert found["encoder.width"][:4] == ["2.0", "command", "line", "multiplies"]
  assert found["batch_size"][:2] == ["4096", "recipe"] and found["encoder.sk_ratio"][:2] == ["0.0", "default"]
  assert found["memory.size"][:3] == ["4", "command", "line"] and found["method"][:2] == ["memory", "derived"]
  assert set(found) == set(config_lib.flatten(config_lib.load("v1:1x", ["--config.memory.size=4"])))
  assert "rows.textures.metric" in resolved.run("transfer:small")
  assert "memory.size" not in resolved.run("smoke")  # a section that is not used has no keys
  assert capsys.readouterr().out.startswith("v1:1x, for simclr pretrain")


def test_completion_in_bash():
  from simclr_jax import __main__ as cli

  script = completion.script(cli.parser().parse_args(["completion", "bash"]).parsers, "bash")
  lines = ["simclr pre", "simclr pretrain --res", "simclr pretrain --config=smo", "simclr recipes text"]
  lines += ["simclr plan --config.encoder.wi", "simclr data ins"]
  ask = 'COMPREPLY=(); COMP_LINE="$1" COMP_POINT=${#1} COMP_CWORD=$(($(wc -w <<< "$1") - 1)); _simclr; echo "${COMPREPLY[*]}"'
  code = f'{script}\nask() {{ {ask}; }}\nfor line in "$@"; do ask "$line"; done'
  done = subprocess.run(["bash", "-c", code, "bash", *lines], capture_output=True, text=True)
  expected = ["pretrain", "--resume", "smoke", "textures", "--config.encoder.width=", "inspect"]
  assert done.stdout.splitlines() == expected and not done.stderr.replace("\n", "").strip()


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_completion_in_zsh(tmp_path):
  from simclr_jax import __main__ as cli

  script = completion.script(cli.parser().parse_args(["completion", "zsh"]).parsers, "zsh")
  (tmp_path / "simclr.zsh").write_text(script)
  terminal, inside = pty.openpty()
  environment = os.environ | {"TERM": "dumb", "COLUMNS": "200"}
  shell = subprocess.Popen(["zsh", "-f"], stdin=inside, stdout=inside, stderr=inside, start_new_session=True, env=environment)  # fmt: skip

  def typed(keys, until):
    """What the terminal shows after these keys, until that and a second of quiet have come."""
    os.write(terminal, keys.encode())
    seen, end = "", time.monotonic() + 60
    while time.monotonic() < end and (select.select([terminal], [], [], 1.0)[0] or until not in seen):
      seen += os.read(terminal, 65536).decode() if select.select([terminal], [], [], 0.1)[0] else ""
    return seen

  setup = f"autoload -Uz compinit; compinit -u -d {tmp_path}/dump; source {tmp_path}/simclr.zsh; echo rea''dy\n"
  assert "ready" in typed(setup, until="ready")
  for line, word in [("simclr pret", "pretrain"), ("simclr pretrain --config=smo", "--config=smoke"), ("simclr knn --wor", "--workdir=")]:  # fmt: skip
    assert typed(f"\x15{line}\t", until=word).rstrip("\x07").endswith(word), line
  shell.kill()
  shell.wait()


def test_every_command_has_a_main():
  from simclr_jax import __main__ as cli

  for command in cli.COMMANDS.values():
    assert "\ndef main(flags, overrides) -> int:" in (ROOT / f"simclr_jax/programs/{command.module}.py").read_text()


def test_a_value_may_stand_after_a_space():
  from simclr_jax import __main__ as cli

  words = ["pretrain", "--config.tune_after", "-1", "--config.a.b=c d", "--workdir", "x", "--config.flag", "--resume"]
  assert cli.split(words) == (
    ["pretrain", "--workdir", "x", "--resume"],
    ["--config.tune_after=-1", "--config.a.b=c d", "--config.flag"],
  )


def test_an_unexpected_error_asks_for_a_report(monkeypatch, capsys):
  from simclr_jax import __main__ as cli
  from simclr_jax.programs import recipes

  def fail(flags, overrides):
    raise ValueError("never seen before")

  monkeypatch.setattr(recipes, "main", fail)
  assert cli.main(["recipes"]) == 1
  error = capsys.readouterr().err
  assert "Traceback" in error and "please report it" in error and "jax 0." in error.splitlines()[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_tensorflow_is_quiet_whoever_imports_it(tmp_path, fails):
  (tmp_path / "tensorflow.py").write_text(
    "import os\nos.write(2, b'chatter')\n" + ("import no_such_module\n" if fails else "")
    + "class config:\n  set_visible_devices = staticmethod(lambda devices, kind: print(devices, kind))\n"
  )  # fmt: skip
  code = (
    f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from simclr_jax.runtime import tensorflow as t; t.quieten()"
  )
  code += "; import importlib.util as u; assert u.find_spec('tensorflow'); import tensorflow"  # some only ask first
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert ("chatter" in done.stderr) == fails and (done.returncode != 0) == fails
  assert fails or done.stdout == "[] GPU\n"


def test_an_option_of_the_oracle_is_refused_elsewhere():
  assert config_lib.load("smoke", ["--config.method=oracle", "--config.removed_negatives=0.2"]).removed_negatives == 0.2
  with pytest.raises(UserError, match="config.removed_negatives is only for config.method=oracle"):
    config_lib.load("smoke", ["--config.removed_negatives=0.2"])


def test_the_flags_name_the_interpolations_that_there_are():
  assert flags.RESIZES == augment.RESIZES
