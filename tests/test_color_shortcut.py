"""The paper's section 3.1 in miniature: crops alone are told apart by color and teach nothing; crop and color do."""

import pytest

from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain


@pytest.mark.slow
def test_crop_only_takes_the_color_shortcut(tmp_path):
  linear = {}
  for recipe in ("textures", "textures:crop_only"):
    config = config_lib.load(
      f"configs/{recipe.replace('textures', 'textures.py')}",
      ["--config.encoder.width=0.125", "--config.evaluate.every_steps=0"],
    )
    scores = pretrain.run(config, tmp_path / recipe.replace(":", "_"))["scores"]
    linear[recipe] = next(row["linear"] for row in scores if row["representation"] == "SimCLR h")
  assert linear["textures"] >= 0.70
  assert linear["textures:crop_only"] <= 0.35
  assert linear["textures"] - linear["textures:crop_only"] >= 0.35
