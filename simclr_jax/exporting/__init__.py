"""Taking the encoder away: a folder with f's variables (Orbax) and a card that says how to use them."""

import datetime
import importlib.metadata
import json

import jax
import jax.numpy as jnp
from etils import epath

from simclr_jax import embed
from simclr_jax.encoder import resnet
from simclr_jax.runtime import checkpoint

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow", "simclr_jax")


_RESIZES = {
  "bicubic": "bicubic, half-pixel centres, no antialiasing",
  "bilinear": "bilinear, half-pixel centres, no antialiasing",
  "bicubic_tf1": "bicubic_tf1: a = -0.75, no half-pixel centres, no antialiasing, as TF1 resizes",
}


def write(path, variables, config, *, scores: dict, step: int, heads=None, overwrite: bool = False) -> epath.Path:
  """Writes the encoder's variables {"params", "batch_stats"} and card.json to the folder `path`.

  `heads` are variables of what sits on h, by name, kept beside it for fine-tuning: "projector", "classifier".

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set.
  """
  encoder = dict(config.encoder)
  shapes = jax.eval_shape(resnet(**encoder).apply, variables, _images(config.augment.size))
  card = {
    "architecture": {"name": "resnet", **encoder},
    "feature_dimension": shapes.shape[-1],
    "preprocessing": {
      "range": "[0, 1], no mean or std is subtracted or divided",
      "size": config.augment.size,
      "center_crop": config.evaluate.crop,
      "resize": _RESIZES[config.augment.get("resize", "bicubic")],
      "layout": "NHWC, RGB",
    },
    "pretraining": config.to_dict(),
    "step": step,
    "scores": scores,
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  return checkpoint.save_encoder(path, variables, card, heads=heads, overwrite=overwrite)


def run(workdir, output, *, step: int | None = None, overwrite: bool = False) -> epath.Path:
  """The program `simclr export`: writes the encoder of a run's checkpoint to `output` and says how to load it."""
  opened = embed.Run(workdir, step=step)
  scores_file = checkpoint.absolute(workdir) / "scores.json"
  scores = json.loads(scores_file.read_text()) if scores_file.exists() else {}
  scores = scores if scores.get("step") == opened.step else {}
  path = write(
    output, opened.variables, opened.config, scores=scores.get("scores", {}), step=opened.step, overwrite=overwrite
  )
  print(f"encoder of step {opened.step}: {path}\n\n{snippet(path, opened.config.augment.size)}")
  return path


def load_encoder(path):
  """Opens a folder that `simclr export` or a finished run wrote; nothing else is needed.

  Returns:
    (apply, variables, card): `apply(images)` maps float images [n, h, w, 3] in [0, 1] to h float32 [n, d], jitted,
    BatchNorm in inference mode; `variables` is {"params", "batch_stats"} as numpy, for `resnet(...).apply`; `card`
    is card.json.

  Raises:
    ValueError: the folder is no export, or does not match its card.
  """

  def encoder_of(card):
    return resnet(**{k: v for k, v in card["architecture"].items() if k != "name"})

  def shapes_of(card):
    return jax.eval_shape(encoder_of(card).init, jax.random.key(0), _images(card["preprocessing"]["size"]))

  variables, card = checkpoint.read_encoder(path, shapes_of)
  encoder = encoder_of(card)
  apply = jax.jit(lambda images: encoder.apply(variables, jnp.asarray(images, jnp.float32), train=False))
  return apply, variables, card


def _images(size):
  return jnp.zeros((1, size, size, 3))


def snippet(path, size: int) -> str:
  """Python that loads an export and uses it."""
  return "\n".join(
    (
      "import numpy as np",
      "from simclr_jax import load_encoder",
      "",
      f'encode, variables, card = load_encoder("{path}")',
      f"images = np.random.rand(4, {size}, {size}, 3)  # yours: floats in [0, 1], RGB, not standardised",
      "h = encode(images)",
      "print(h.shape)",
    )
  )
