"""Trials that settings are chosen by: each changes one thing of a recipe and is scored on training images that were held out.

  python -m benchmarks.trials cifar10 --data=npz:cifar10.npz --output=benchmarks/trials.json [--only=NAME]
  python -m benchmarks.trials methods --data=npz:cifar10.npz --output=benchmarks/trials.json
  python -m benchmarks.trials smoke --output=benchmarks/trials.json      # and textures, and cells, those of simclr claims

Test images are never read.  Each trial is a process of its own, in the file as soon as it ends; those in the file are not run
again.  The trials of cifar10 are the recipe cifar10_gpu at a quarter of its width, with views of 20 pixels, in float32, and 3
epochs, and all see as many views.  The trials of methods are the cells of `simclr claims`, each method at several learning
rates, with 5 epochs of 9,000 images.  The standard error of an accuracy on 5,000 images is 0.7 points, on 1,000 images 1.5.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

EPOCHS = 3.0
SMALL = {
  "encoder.width": 0.25, "encoder.dtype": "float32", "augment.size": 20, "augment.crop_area": (0.2, 1.0), "batch_size": 256,
  "loss.temperature": 0.2, "optimizer.name": "adamw", "optimizer.base_lr": 2e-3, "optimizer.lr_scaling": "none",
  "optimizer.warmup_epochs": 0.5, "optimizer.weight_decay": 1e-4, "evaluate.train_examples": 5000, "checkpoint.every_epochs": 0.5,
}  # fmt: skip
FOUR_VIEWS = {"augment.views": 4, "batch_size": 128}
LARS = {"optimizer.name": "lars", "optimizer.base_lr": 1.0}
# recipe: {name: stages}, a stage being (its epochs, its changes); it goes on with the weights and the head of the one before
CIFAR10 = {
  "base": [(1.0, {})],
  "temperature 0.1": [(1.0, {"loss.temperature": 0.1})],
  "temperature 0.5": [(1.0, {"loss.temperature": 0.5})],
  "crops from 0.08": [(1.0, {"augment.crop_area": (0.08, 1.0)})],
  "batch 128": [(1.0, {"batch_size": 128, "optimizer.base_lr": 1.4e-3})],
  "batch 512": [(1.0, {"batch_size": 512, "optimizer.base_lr": 2.8e-3})],
  "four views": [(0.5, FOUR_VIEWS)],
  "LARS 1": [(1.0, LARS)],
  "LARS 2": [(1.0, LARS | {"optimizer.base_lr": 2.0})],
  "LARS 4": [(1.0, LARS | {"optimizer.base_lr": 4.0})],
  "LARS 1, four views": [(0.5, FOUR_VIEWS | LARS)],
  "Muon 0.01": [(1.0, {"optimizer.base_lr": 0.01})],
  "rate 4e-3": [(1.0, {"optimizer.base_lr": 4e-3})],
  "rate 8e-3": [(1.0, {"optimizer.base_lr": 8e-3})],
  "rate 16e-3": [(1.0, {"optimizer.base_lr": 16e-3})],
  "rate 8e-3, four views": [(0.5, FOUR_VIEWS | {"optimizer.base_lr": 8e-3})],
  "average of weights": [(1.0, {})],
  "views of 16, then 24": [(0.6, {"augment.size": 16}), (0.4, {"augment.size": 24})],
  "weak at the end": [(0.75, {}), (0.25, {"augment.color_strength": 0.25, "augment.crop_area": (0.4, 1.0)})],
}
SMOKE = {
  "as it is": {},
  "rate 2e-3": {"optimizer.base_lr": 2e-3},
  "rate 8e-3": {"optimizer.base_lr": 8e-3},
  "temperature 0.1": {"loss.temperature": 0.1},
  "temperature 0.5": {"loss.temperature": 0.5},
  "crops from 0.2": {"augment.crop_area": (0.2, 1.0)},
  "crops from 0.6": {"augment.crop_area": (0.6, 1.0)},
  "color strength 0.4": {"augment.color_strength": 0.4},
  "four views": {"augment.views": 4, "train_epochs": 8.0},
}
TEXTURES = {
  "as it is": {},
  "rate 4e-3": {"optimizer.base_lr": 4e-3},
  "rate 16e-3": {"optimizer.base_lr": 16e-3},
  "temperature 0.1": {"loss.temperature": 0.1},
  "temperature 0.5": {"loss.temperature": 0.5},
  "crops from 0.2": {"augment.crop_area": (0.2, 1.0)},
  "crops from 0.6": {"augment.crop_area": (0.6, 1.0)},
  "grayscale 0.2": {"augment.grayscale_prob": 0.2},
  "four views": {"augment.views": 4, "train_steps": 200},
}
CELLS = {  # of simclr claims
  "as it is": {},
  "rate 8e-3": {"optimizer.base_lr": 8e-3},
  "rate 32e-3": {"optimizer.base_lr": 32e-3},
  "grayscale 0.5": {"augment.grayscale_prob": 0.5},
  "crops from 0.35": {"augment.crop_area": (0.35, 1.0)},
  "temperature 0.2": {"loss.temperature": 0.2},
  **{f"LARS {rate:g}": {"optimizer.name": "lars", "optimizer.base_lr": rate} for rate in (1.0, 2.0, 4.0, 8.0)},
}
METHODS = ("simclr", "moco", "moco_v3", "byol", "instdisc", "autoencoder", "supervised")
RATES = (2e-3, 6e-3, 16e-3)  # base_lr, of which AdamW gets half at the cells' batch size of 128
# As the budgets quick and full: 8 epochs of 4,500 images, or as many steps as of 9,000.
CELL = {"train_epochs": 8.0, "optimizer.warmup_epochs": 0.8, "evaluate.train_examples": 5000}
CELL_CIFAR10 = {
  "train_epochs": 0.0,
  "train_steps": 562,
  "optimizer.warmup_epochs": 0.15,
  "evaluate.train_examples": 5000,
}
RECIPES = {  # name: (recipe, changes to it, trials)
  "cifar10": ("cifar10_gpu", SMALL, {name: [(round(part * EPOCHS, 3), changes) for part, changes in stages] for name, stages in CIFAR10.items()}),
  "smoke": ("smoke", {}, {name: [(None, changes)] for name, changes in SMOKE.items()}),
  "textures": ("textures", {}, {name: [(None, changes)] for name, changes in TEXTURES.items()}),
  "cells": ("ablations:small-temperature-0.1", CELL, {name: [(None, changes)] for name, changes in CELLS.items()}),
  "methods": ("", {}, {
    **{f"{method}, rate {rate:g}": (method, {"optimizer.base_lr": rate}) for method in METHODS for rate in RATES},
    **{f"supcon, temperature 0.1, rate {rate:g}": ("supcon", {"optimizer.base_lr": rate, "loss.temperature": 0.1}) for rate in RATES},
    **{f"supcon, temperature {t:g}": ("supcon", {"loss.temperature": t}) for t in (0.2, 0.5)},
  }),
  "cells_cifar10": ("ablations:small-temperature-0.1", CELL_CIFAR10, {name: [(None, changes)] for name, changes in CELLS.items()}),
}  # fmt: skip


def muon(learning_rate, *, momentum, weight_decay):
  """Muon on the kernels, each as a matrix whose columns are its outputs; AdamW on the rest."""
  import jax
  import optax

  def matrices(params):
    return jax.tree.map(
      lambda w: optax.contrib.MuonDimensionNumbers(tuple(range(w.ndim - 1)), w.ndim - 1) if w.ndim > 1 else None, params
    )

  del momentum
  return optax.contrib.muon(
    learning_rate, weight_decay=weight_decay, adam_learning_rate=lambda step: 0.2 * learning_rate(step),
    muon_weight_dimension_numbers=matrices,
  )  # fmt: skip


def averaged(make, total: int, decay: float = 0.995):
  """`make`'s update rule, whose last step goes to the moving average of the weights."""
  import jax
  import jax.numpy as jnp
  import optax

  def wrapped(*args, **options):
    tx = make(*args, **options)

    def init(params):
      return tx.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32)

    def update(updates, state, params):
      inner, mean, step = state
      updates, inner = tx.update(updates, inner, params)
      weight = jnp.minimum(decay, (1 + step) / (10 + step))
      mean = jax.tree.map(lambda m, p, u: weight * m + (1 - weight) * (p + u), mean, params, updates)
      updates = jax.tree.map(lambda u, m, p: jnp.where(step == total - 1, m - p, u), updates, mean, params)
      return updates, (inner, mean, step + 1)

    return optax.GradientTransformation(init, update)

  return wrapped


def run_trial(recipe: str, name: str, data: str, folder: str) -> dict:
  """The scores of a trial; this process runs no other."""
  from simclr_jax.runtime import cpu

  cpu.prepare()
  from simclr_jax import optimizer
  from simclr_jax.programs import config as config_lib
  from simclr_jax.programs import pretrain

  if recipe == "methods":
    return run_cell(*RECIPES[recipe][2][name], data, folder)
  began, start = time.process_time(), {}
  base, changes_to_all, trials = RECIPES[recipe]
  for i, (epochs, changes) in enumerate(trials[name]):
    changes = {"data.test": "", "evaluate.every_epochs": 0.0, **changes_to_all, **changes, **start}
    changes |= {"data.train": f"{data}:train"} if data else {}
    changes |= {"train_epochs": epochs} if epochs else {}
    if i:
      changes["optimizer.warmup_epochs"] = 0.1
    config = config_lib.replace(config_lib.load(base), changes)
    if name.startswith("Muon"):
      optimizer.OPTIMIZERS["adamw"] = muon
    if name.startswith("average"):
      optimizer.OPTIMIZERS["adamw"] = averaged(optimizer.adamw, optimizer.train_steps(config, 45_000))
    workdir = f"{folder}/{i}"
    pretrain.run(config, workdir, resume=pathlib.Path(workdir).exists())
    start = {"start": workdir, "keep_head": True}
  scores = json.loads(pathlib.Path(workdir, "scores.json").read_text())["scores"]["h"]
  return {"knn": scores["knn"], "linear": scores["linear"], "cpu_seconds": round(time.process_time() - began)}


def run_cell(method: str, changes: dict, data_name: str, folder: str) -> dict:
  """The scores of a cell of `simclr claims` with changes; its test images are training images that it has not seen."""
  from simclr_jax import data
  from simclr_jax.programs import cells, config, experiments, splits

  began = time.process_time()
  train = data.open_source(f"{data_name}:train")
  order = data.permutation(splits.SEED, 0, len(train))
  seen, held_out = data.Selection(train, order[:9000]), data.Selection(train, order[9000:14_000])
  digest = hashlib.sha256(json.dumps([part.fingerprint() for part in (seen, held_out)]).encode()).hexdigest()
  images = cells.Images(data_name, seen, held_out, held_out, has_color=True, digest=digest)
  setting = experiments.SETTINGS[method]
  settings = config.replace(cells.config_of(setting, 0, 5.0, {}, data_name), changes)
  numbers = cells.Runner(pathlib.Path(folder)).run(setting, settings, images)
  return {
    "knn": numbers.get("knn_20", 0.0),
    "linear": numbers.get("linear", 0.0),
    "cpu_seconds": round(time.process_time() - began),
  }


def table(results: dict) -> str:
  """The trials of a recipe, best first; differences are from the first."""
  first = next(iter(results.values()))["linear"]
  rows = ["| changed | linear | difference | kNN | minutes of CPU |", "|---|---|---|---|---|"]
  for name, r in sorted(results.items(), key=lambda item: -item[1]["linear"]):
    difference = f"{100 * (r['linear'] - first):+.1f}"
    rows.append(
      f"| {name} | {100 * r['linear']:.1f} | {difference} | {100 * r['knn']:.1f} | {r['cpu_seconds'] / 60:.1f} |"
    )
  return "\n".join(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("recipe", choices=RECIPES)
  parser.add_argument(
    "--data", default="", help="cifar10, cells_cifar10: where the images are, such as npz:cifar10.npz"
  )
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--only", action="append", help="a trial; may be repeated")
  parser.add_argument("--folder", default=tempfile.gettempdir() + "/trials")
  parser.add_argument("--trial", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.trial:
    folder = f"{args.folder}/{args.recipe}/{args.trial.replace(' ', '_')}"
    args.output.write_text(json.dumps(run_trial(args.recipe, args.trial, args.data, folder)))
    return
  for name in args.only or RECIPES[args.recipe][2]:
    kept = json.loads(args.output.read_text()) if args.output.exists() else {}
    if name in kept.get(args.recipe, {}):
      continue
    part = args.output.with_suffix(".part")
    command = [sys.executable, "-m", "benchmarks.trials", args.recipe, f"--trial={name}", f"--data={args.data}", f"--folder={args.folder}", f"--output={part}"]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=sys.stderr, check=False)
    if done.returncode:
      print(f"{name}: failed with {done.returncode}", flush=True)
      continue
    kept.setdefault(args.recipe, {})[name] = json.loads(part.read_text())
    part.unlink()
    args.output.write_text(json.dumps(kept, indent=1) + "\n")
    print(name, kept[args.recipe][name], flush=True)
  print(table(json.loads(args.output.read_text())[args.recipe]))


if __name__ == "__main__":
  main()
