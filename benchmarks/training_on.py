"""What training on from given weights gains: few images of one domain, from an encoder trained elsewhere and from scratch.

  python -m benchmarks.training_on --data=cifar10.npz --output=benchmarks/training_on.json [--folder=DIR]

The domain is the six animals of CIFAR-10, of which 300 and 5,000 training images are taken; elsewhere is its four vehicles:
18,000 of their 20,000 images, because a tenth of every class is held out and scored (data.held_out).  Both runs of a pair make
the same number of the same steps.  A linear classifier is fitted on the labels of the 300 or 5,000 images and scored on the
6,000 test images of animals, which chose nothing.  Runs that are in the output, or whose folder is complete, are not made again.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

import numpy as np

ANIMALS = (2, 3, 4, 5, 6, 7)  # bird, cat, deer, dog, frog, horse
SEEDS = (0, 1, 2)
STARTS = ("as it is", "scratch", "trained on")
STEPS = {300: 200, 5000: 500}  # images: updates, of 128 images each


def write_sets(data: pathlib.Path, folder: pathlib.Path):
  """vehicles.npz, animals_300.npz and animals_5000.npz, the first two parts of one fixed order."""
  arrays = dict(np.load(data))
  images, labels = (arrays.get(f"train_{k}", arrays.get(k)) for k in ("images", "labels"))
  animal, test_animal = np.isin(labels, ANIMALS), np.isin(arrays["test_labels"], ANIMALS)
  classes = np.searchsorted(ANIMALS, labels)
  test = {"test_images": arrays["test_images"][test_animal], "test_labels": np.searchsorted(ANIMALS, arrays["test_labels"][test_animal])}  # fmt: skip
  np.savez(folder / "vehicles.npz", train_images=images[~animal], train_labels=labels[~animal])
  order = np.random.default_rng(0).permutation(np.flatnonzero(animal))
  for size in STEPS:
    np.savez(
      folder / f"animals_{size}.npz", train_images=images[order[:size]], train_labels=classes[order[:size]], **test
    )


def train(workdir: pathlib.Path, **changes) -> dict:
  """The scores of h after a run of cifar10_cpu with changes; their keys have __ for the dots."""
  from simclr_jax.programs import config as config_lib
  from simclr_jax.programs import pretrain

  if not (workdir / "scores.json").exists():
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config = config_lib.replace(config_lib.load("cifar10_cpu"), {"evaluate.every_epochs": 0.0, **flat})
    pretrain.run(config, workdir, resume=workdir.exists())
  return json.loads((workdir / "scores.json").read_text())["scores"].get("h", {})


def table(results: dict) -> str:
  """Accuracy of each start and size: mean and range of the seeds."""
  rows = ["| images | encoder | linear | kNN |", "|---|---|---|---|"]
  for size in STEPS:
    for start in STARTS:
      found = [results.get(f"{size} {start} {seed}") for seed in SEEDS]
      found = [scores for scores in found if scores]
      cells = []
      for name in ("linear", "knn"):
        values = [100 * scores[name] for scores in found]
        cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "–")
      rows.append(f"| {size:,} | {start} | {' | '.join(cells)} |")
  return "\n".join(rows)


def main():
  from simclr_jax.runtime import cpu

  cpu.prepare()
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, type=pathlib.Path)
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "training_on"))
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  write_sets(args.data, args.folder)
  elsewhere = args.folder / "elsewhere"
  train(elsewhere, data__train=f"npz:{args.folder}/vehicles.npz:train", data__test="", train_epochs=6.0)
  for seed in SEEDS:
    for size, steps in STEPS.items():
      data = f"npz:{args.folder}/animals_{size}.npz"
      for start in STARTS if seed == SEEDS[0] else STARTS[1:]:  # the encoder as it is has no seed
        results = json.loads(args.output.read_text()) if args.output.exists() else {}
        name = f"{size} {start} {seed}"
        if name in results:
          continue
        untouched = {"train_steps": 1, "optimizer__base_lr": 1e-12, "optimizer__warmup_epochs": 0.0}
        epochs = steps * 128 / size
        trained = {
          "train_steps": steps,
          "optimizer__warmup_epochs": epochs / 20,
          "checkpoint__every_epochs": epochs / 2,
        }
        results[name] = train(
          args.folder / name.replace(" ", "_"), data__train=f"{data}:train", data__test=f"{data}:test", seed=seed,
          train_epochs=0.0, batch_size=128, start="" if start == "scratch" else str(elsewhere),
          **(untouched if start == "as it is" else trained),
        )  # fmt: skip
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name], flush=True)
  print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
  main()
