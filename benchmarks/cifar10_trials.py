"""What helps on CIFAR-10 in little training: trials at small size on a CPU, scored on training images that were held out.

  python -m benchmarks.cifar10_trials --data=npz:cifar10.npz --output=benchmarks/cifar10_trials.json [--epochs=3] [--only=NAME]

Each trial is the recipe cifar10_gpu at a quarter of its width, with views of 20 pixels, in float32, and changes one thing.
All see as many views; test images are never read.  Each is a process of its own, in the file as soon as it ends; those in the
file are not run again.  The standard error of an accuracy on 5,000 images is 0.7 points.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

BASE = {
  "data.test": "", "encoder.width": 0.25, "encoder.dtype": "float32", "augment.size": 20, "augment.crop_area": (0.2, 1.0),
  "batch_size": 256, "loss.temperature": 0.2, "optimizer.name": "adamw", "optimizer.base_lr": 2e-3,
  "optimizer.lr_scaling": "none", "optimizer.warmup_epochs": 0.5, "optimizer.weight_decay": 1e-4,
  "evaluate.every_epochs": 0.0, "evaluate.train_examples": 5000, "checkpoint.every_epochs": 0.5,
}  # fmt: skip
SGD = {"optimizer.name": "sgd", "optimizer.weight_decay": 5e-4}
# name: stages, each (its part of the epochs, its changes); a later stage goes on with the weights and the head of the one before
TRIALS = {
  "base": [(1.0, {})],
  "temperature 0.1": [(1.0, {"loss.temperature": 0.1})],
  "temperature 0.5": [(1.0, {"loss.temperature": 0.5})],
  "crops from 0.08": [(1.0, {"augment.crop_area": (0.08, 1.0)})],
  "batch 128": [(1.0, {"batch_size": 128, "optimizer.base_lr": 1.4e-3})],
  "batch 512": [(1.0, {"batch_size": 512, "optimizer.base_lr": 2.8e-3})],
  "four views": [(0.5, {"augment.views": 4, "batch_size": 128})],
  "four views, rate 4e-3": [(0.5, {"augment.views": 4, "batch_size": 128, "optimizer.base_lr": 4e-3})],
  "four views, rate 4e-3, temperature 0.1": [
    (0.5, {"augment.views": 4, "batch_size": 128, "optimizer.base_lr": 4e-3, "loss.temperature": 0.1})
  ],
  "color strength 1": [(1.0, {"augment.color_strength": 1.0})],
  "SGD 0.1": [(1.0, SGD | {"optimizer.base_lr": 0.1})],
  "LARS 1": [(1.0, {"optimizer.name": "lars", "optimizer.base_lr": 1.0})],
  "Muon 0.01": [(1.0, {"optimizer.base_lr": 0.01})],
  "rate 4e-3": [(1.0, {"optimizer.base_lr": 4e-3})],
  "average of weights": [(1.0, {})],
  "views of 16, then 24": [(0.6, {"augment.size": 16}), (0.4, {"augment.size": 24})],
  "weak at the end": [(0.75, {}), (0.25, {"augment.color_strength": 0.25, "augment.crop_area": (0.4, 1.0)})],
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


def run_trial(name: str, data: str, epochs: float, folder: str) -> dict:
  """The scores of a trial; this process runs no other."""
  from simclr_jax.runtime import cpu

  cpu.prepare()
  from simclr_jax import optimizer
  from simclr_jax.programs import config as config_lib
  from simclr_jax.programs import pretrain

  began, start = time.process_time(), {}
  for i, (part, changes) in enumerate(TRIALS[name]):
    train_epochs = round(part * epochs, 3)
    changes = {**BASE, "data.train": f"{data}:train", "train_epochs": train_epochs, **changes, **start}
    if i:
      changes["optimizer.warmup_epochs"] = 0.1
    config = config_lib.replace(config_lib.load("cifar10_gpu"), changes)
    if name.startswith("Muon"):
      optimizer.OPTIMIZERS["adamw"] = muon
    if name.startswith("average"):
      optimizer.OPTIMIZERS["adamw"] = averaged(optimizer.adamw, optimizer.train_steps(config, 45_000))
    workdir = f"{folder}/{i}"
    pretrain.run(config, workdir, resume=pathlib.Path(workdir).exists())
    start = {"start": workdir, "keep_head": True}
  scores = json.loads(pathlib.Path(workdir, "scores.json").read_text())["scores"]["SimCLR h"]
  return {"knn": scores["knn"], "linear": scores["linear"], "cpu_seconds": round(time.process_time() - began)}


def table(results: dict) -> str:
  """The trials, best first."""
  base = results.get("base", {}).get("linear", 0.0)
  rows = ["| changed | linear | against base | kNN, k = 10 | minutes of CPU |", "|---|---|---|---|---|"]
  for name, r in sorted(results.items(), key=lambda item: -item[1]["linear"]):
    difference = f"{100 * (r['linear'] - base):+.1f}" if base else "–"
    rows.append(
      f"| {name} | {100 * r['linear']:.1f} | {difference} | {100 * r['knn']:.1f} | {r['cpu_seconds'] / 60:.1f} |"
    )
  return "\n".join(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True)
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--epochs", type=float, default=3.0)
  parser.add_argument("--only", action="append", choices=TRIALS, help="may be repeated")
  parser.add_argument("--folder", default=tempfile.gettempdir() + "/cifar10_trials")
  parser.add_argument("--trial", choices=TRIALS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.trial:
    folder = f"{args.folder}/{args.epochs:g}/{args.trial.replace(' ', '_')}"
    args.output.write_text(json.dumps(run_trial(args.trial, args.data, args.epochs, folder)))
    return
  key = f"{args.epochs:g} epochs"
  for name in args.only or TRIALS:
    kept = json.loads(args.output.read_text()) if args.output.exists() else {}
    if name in kept.get(key, {}):
      continue
    part = args.output.with_suffix(".part")
    command = [sys.executable, "-m", "benchmarks.cifar10_trials", f"--trial={name}", f"--data={args.data}", f"--epochs={args.epochs}", f"--folder={args.folder}", f"--output={part}"]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=sys.stderr, check=False)
    if done.returncode:
      print(f"{name}: failed with {done.returncode}", flush=True)
      continue
    kept.setdefault(key, {})[name] = json.loads(part.read_text())
    part.unlink()
    args.output.write_text(json.dumps(kept, indent=1) + "\n")
    print(name, kept[key][name], flush=True)
  print(table(json.loads(args.output.read_text())[key]))


if __name__ == "__main__":
  main()
