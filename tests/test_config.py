"""Recipes load, overrides apply, and every mistake is one line with the value, what was expected and what to do."""

import ml_collections
import pytest

from simclr_jax.runtime import config as config_lib


def one_line(error):
  assert "\n" not in str(error.value)
  return str(error.value)


def test_override_and_freeze():
  c = config_lib.load("configs/smoke.py", ["--config.batch_size=64", "--config.augment.crop_area=(0.5, 1.0)"])
  assert c.batch_size == 64 and tuple(c.augment.crop_area) == (0.5, 1.0)
  with pytest.raises(AttributeError):
    c.batch_size = 3


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
