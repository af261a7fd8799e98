"""`simclr probe --of=transforms`: what h, and z if the head is available, keep of the transformations of an image.

The classifiers are fitted on images that training saw and scored on others; labels are not needed.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import data, report
from simclr_jax.data.sources import spread
from simclr_jax.evaluation import embed, invariance
from simclr_jax.model import make_encoder
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import trained
from simclr_jax.projector import Projector
from simclr_jax.runtime import errors, files, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

TRAIN, TEST = 2000, 1000  # images, at most
MEANING = {
  "color": "color or grayscale",
  "rotation": "turned by 0, 90, 180 or 270 degrees",
  "noise": "original or with noise",
  "sobel": "original or its edges",
  "hue": "mean hue, R²",
  "position": "place of the crop, R²",
}


def run(workdir, *, step: int | None = None, overrides=(), json_file: str = "") -> dict:
  """Prints how well each transformation can be predicted from h and z of a run, or from h of an exported encoder.

  Args:
    workdir: a run of pretraining, or a folder that `simclr export` or `simclr import` wrote.
    json_file: where to also write the scores, if anywhere.

  Returns:
    What `invariance.predictions` does.

  Raises:
    UserError: `workdir` is neither of the two, names no data, or has too few images.
  """
  start = trained.open_start(workdir, step)
  if not isinstance(start.config, config_lib.Pretrain | config_lib.Finetune):
    raise UserError(f"--workdir={workdir}: its card names no data; give a run, or the export of one")
  config = config_lib.override(start.config, overrides)
  train, test = trained.open_data(config, workdir, start.config)
  if test is train:  # nothing is held out of images without labels: halves of them
    if len(train) < 4:
      raise UserError(f"data.train={config.data.train}: {len(train)} images; expected at least 4")
    middle = len(train) // 2
    train, test = (data.Selection(train, part) for part in (np.arange(middle), np.arange(middle, len(train))))
  mesh = mesh_lib.make_mesh()
  train, test = (_images(source, count, config, mesh) for source, count in ((train, TRAIN), (test, TEST)))
  if min(len(train), len(test)) < 2:
    raise UserError(
      f"--workdir={workdir}: {len(train)} images to train and {len(test)} to test; expected at least 2 of each"
    )
  scores = invariance.predictions(_encode(start, config.augment.size), train, test, seed=config.seed)
  if jax.process_index():
    return scores
  print(table(scores))
  print(f"\npredicted by a linear classifier or regression on {len(train):,} images, scored on {len(test):,} others")
  if json_file:
    rows = {name: {**of, "chance": invariance.CHANCE[name]} for name, of in scores.items()}
    about = {"workdir": str(workdir), "train_images": len(train), "test_images": len(test), "seed": config.seed}
    files.write_text(files.absolute(json_file), json.dumps({**about, "scores": rows}, indent=2))
  return scores


def table(scores) -> str:
  """The scores as aligned text: accuracies in percent, R² as they are, – where there is nothing to predict."""
  names = list(next(iter(scores.values())))
  rows = [["", *names, "chance"]]
  for prediction, of in scores.items():
    chance = invariance.CHANCE[prediction]
    values = [*(of[name] for name in names), chance]
    rows.append([MEANING[prediction], *("–" if v is None else f"{100 * v:.1f} %" if chance else f"{v:.3f}" for v in values)])  # fmt: skip
  return report.aligned(rows)


def _images(source, count, config, mesh):
  """At most `count` readable images from all over a source, float32, as evaluation sees them."""
  few = data.Selection(source, spread(len(source), count))
  parts = [
    [processes.gather_rows(batch[key]) for key in ("image", "mask")]
    for batch in embed.eval_set(few, config, mesh).batches()
  ]
  return np.concatenate([images[mask] for images, mask in parts])


@errors.of_the_user()
def _encode(start: trained.Start, size: int):
  """For images of `size`: images [m, s, s, 3] -> {"h"} or {"h", "z"}, float32, BatchNorm in inference mode."""
  encoder, head = make_encoder(start.encoder.name, **start.encoder), Projector(**start.projector)
  apply = functools.partial(encoder.apply, train=False)
  jax.eval_shape(apply, start.variables["encoder"], jnp.zeros((1, size, size, 3)))  # which sizes it takes

  @jax.jit
  def encode(variables, images):
    h = apply(variables["encoder"], images)
    return {"h": h} | ({"z": head.apply(variables["projector"], h, train=False)} if "projector" in variables else {})

  return functools.partial(encode, {name: start.variables[name] for name in ("encoder", "projector") if name in start.variables})  # fmt: skip
