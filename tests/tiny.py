"""The smallest real run: a ResNet-18 a sixteenth as wide, on 96 Fashion-MNIST images."""

import jax
import numpy as np

from simclr_jax import data, exporting
from simclr_jax.encoder import resnet
from simclr_jax.programs import config as config_lib

BATCH = 16


def config(**changes):
  """The smoke recipe, shrunk; `changes` are dotted keys, e.g. **{"loss.temperature": 0.5}."""
  return config_lib.replace(
    config_lib.load("configs/smoke.py"),
    {
      "batch_size": BATCH,
      "train_epochs": 0.0,
      "train_steps": 4,
      "augment.size": 16,
      "encoder.width": 0.0625,
      "projector.out_dim": 16,
      "optimizer.base_lr": 2e-3,
      "optimizer.warmup_epochs": 0.2,
      "evaluate.batch_size": 32,
      "evaluate.every_epochs": 0.0,
      "checkpoint.every_epochs": 0.0,
      "log.every_steps": 1,
      **changes,
    },
  )


def source(count=96, labeled=True):
  """The first images of the embedded test set."""
  full = data.open_source("fashion:test")
  images = np.stack([full.read(i) for i in range(count)])
  labels = full.labels[:count] if labeled else None
  return data.ArraySource(images, labels, class_names=full.class_names if labeled else (), title="tiny")


def export(path, held_out=None, **changes):
  """The export of an encoder with random weights, made without compiling anything; returns the folder."""
  c, rng = config(**changes), np.random.default_rng(0)
  shapes = jax.eval_shape(resnet(**c.encoder).init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))

  def draw(path, leaf):
    name = path[-1].key
    if name == "kernel":
      return rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
    return np.full(leaf.shape, float(name in ("scale", "var")), np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  return exporting.write(path, variables, c, scores={}, step=0, held_out=held_out)


def npz(path, count=96):
  """The same images as a file that data.train can name, labels included; returns its spec.

  The 32 images after them are its split `test`: `f"{spec}:test"`.
  """
  s = source(count + 32)
  images = np.stack([s.read(i) for i in range(len(s))])
  parts = {"": slice(count), "test_": slice(count, None)}
  np.savez(
    path, **{f"{p}{k}": a[part] for p, part in parts.items() for k, a in (("images", images), ("labels", s.labels))}
  )
  return f"npz:{path}"
