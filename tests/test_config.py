"""Recipes load, overrides apply, and every mistake is one line with the value, what was expected and what to do."""

import ml_collections
import numpy as np
import pytest

from simclr_jax import contrast, optimizer
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain


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
  pretrain._check_augmentation(c)
  with pytest.raises(TypeError, match="unexpected keyword argument 'colour_order'"):
    pretrain._check_augmentation(config_lib.load("smoke", ["--config.augment.colour_order=fixed"]))


def test_recipe_by_name_or_path():
  assert config_lib.load("smoke").to_dict() == config_lib.load("configs/smoke.py").to_dict()


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
    ("--config.batch_size=1.5", "1.5"),
    ("--config.batch_size=-8", "config.batch_size=-8: expected a number above 0"),
    ("--config.optimizer.base_lr=nan", "config.optimizer.base_lr=nan: expected a finite number"),
    ("--config.loss.reduction=sum", "expected mean or official_sum"),
    ("--config.data.max_bad_fraction=2.0", "expected a share between 0 and 1"),
    ("--config.train_epochs=0.0", "set one of them"),
    ("--config.encoder.depth.blocks=3", "no such key; did you mean config.encoder.depth?"),
  ],
)
def test_mistakes(override, message):
  with pytest.raises(ValueError) as error:
    config_lib.load("smoke", [override])
  assert message in one_line(error)


def test_unknown_recipe_names_the_nearest():
  with pytest.raises(ValueError) as error:
    config_lib.load("configs/smok.py")
  assert "did you mean 'smoke'?" in one_line(error)


def test_a_recipe_with_an_unknown_or_missing_key_is_refused():
  c = ml_collections.ConfigDict(config_lib.load("smoke").to_dict())
  c.optimizer.momentun = 0.9
  with pytest.raises(
    ValueError, match="config.optimizer.momentun: no such key; did you mean config.optimizer.momentum?"
  ):
    config_lib.check(c)
  del c.optimizer.momentun, c.optimizer.momentum
  with pytest.raises(ValueError, match="config.optimizer.momentum is missing"):
    config_lib.check(c)


def test_every():
  section = ml_collections.ConfigDict(dict(every_steps=0, every_epochs=0.5))
  assert config_lib.every(section, num_examples=1000, batch_size=100) == 5
  assert config_lib.every(ml_collections.ConfigDict(dict(every_steps=7, every_epochs=0.0)), 1000, 100) == 7
  assert config_lib.every(ml_collections.ConfigDict(dict(every_steps=0, every_epochs=0.0)), 1000, 100) == 0
  section.every_steps = 3
  with pytest.raises(ValueError, match="set one"):
    config_lib.every(section, 1000, 100)


def test_every_ablation_of_the_paper_is_a_recipe():
  from configs import ablations

  assert len(ablations.TOP_1) == 65
  for row in ablations.TOP_1:
    c = config_lib.load(f"configs/ablations.py:{row}")
    pretrain.loss_function(c, None)
    batch, epochs = (4096, 100) if not row.startswith("batch") else map(int, row.replace("ep", "").split("-")[1:3])
    assert (c.batch_size, c.train_epochs) == (batch, epochs)
    images = 1_281_167
    peak = float(optimizer.learning_rate(c, images)(10 * images // batch))
    assert peak == pytest.approx(0.075 * batch**0.5 if row.endswith("sqrt") else 0.3 * batch / 256)
  assert config_lib.load("configs/ablations.py:no_l2-10").loss.normalize is False
  assert config_lib.load("configs/ablations.py:head-linear-64").projector.to_dict() == {"kind": "linear", "out_dim": 64}


def test_fine_tuning_rows():
  c = config_lib.load("configs/finetune.py:supervised-4x-500ep-color")
  assert (c.encoder.width, c.train_epochs, c.augment.color_strength, c.augment.blur) == (4, 500.0, 1.0, False)
  assert config_lib.load("configs/finetune.py:v2_1pct-wide").optimizer.base_lr == 0.002
  assert "color_strength" not in config_lib.load("configs/finetune.py:supervised").augment
  assert config_lib.load("configs/finetune.py:supervised-1pct").data.train == "tfds:imagenet2012_subset/1pct:train"


def test_distillation_rows():
  """SimCLR v2, Table 2: which images, which labels."""
  rows = {
    "": ("imagenet2012", 1.0, 1.0),
    "-self": ("imagenet2012", 1.0, 1.0),
    "-labels_1pct": ("imagenet2012", 0.5, 0.01),
    "-only_10pct": ("imagenet2012_subset/10pct", 0.5, 1.0),
  }
  for variant, (images, alpha, share) in rows.items():
    c = config_lib.load(f"configs/distill.py:r50_1x_sk0{variant}")
    assert (c.data.train, c.alpha, c.labels.fraction) == (f"tfds:{images}:train", alpha, share)
    assert c.temperature == (0.1 if variant == "-self" else 1.0)


def test_figure_5_composes_two_transformations_on_one_branch():
  c = config_lib.load("configs/ablations.py:compose-crop-sobel").augment
  assert (c.where, c.one_sided, c.color_strength, c.blur) == ("host", True, 0.0, False)
  assert [name for name, _ in c.extra] == ["crop", "sobel"]
  assert len(config_lib.load("configs/ablations.py:compose-color-color").augment.extra) == 1


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
  ours, _ = pretrain.loss_function(c, None)(z)
  assert float(ours) == pytest.approx(float(contrast.margin_triplet(z, margin=0.8, semi_hard=True)[0]))
  assert pretrain.chance_loss(c) is None
  for loss, message in (
    ({"name": "ntxent"}, "config.loss.name='ntxent': expected one of nt_xent, decoupled"),
    ({"temprature": 0.1}, "config.loss.temprature: no such option; nt_xent takes temperature"),
    ({}, "config.loss.temperature is missing; nt_xent takes temperature"),
  ):
    with pytest.raises(ValueError) as error:
      pretrain.loss_function(ml_collections.ConfigDict({"loss": loss}), None)
    assert message in one_line(error)
