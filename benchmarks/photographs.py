"""What classifiers read from the runs of a recipe, beside what needs no training: kNN, linear, 10 % and 1 % of the labels.

  python -m benchmarks.photographs --output=benchmarks/photographs.json RUN [RUN ...]

The runs have ended and differ in nothing but their seeds and their methods, such as those of configs/cifar10_cpu.py.  The linear classifiers are
multinomial regressions whose L2 penalty is chosen on held-out training images; the labeled images of 10 % and 1 % are drawn by
the run's seed, equally many of each class.  What is in the output is not measured again.
"""

import argparse
import hashlib
import json
import pathlib
import statistics

import numpy as np

COLUMNS = {"knn_20": "kNN, k = 20", "knn_200": "kNN, k = 200", "linear": "linear", "linear_10pct": "10 %", "linear_1pct": "1 %"}  # fmt: skip


def read(x, y, test_x, test_y, num_classes: int, seed: int) -> dict:
  """Test accuracies of what reads x [n, d] with labels y [n]."""
  from simclr_jax.evaluation import linear
  from simclr_jax.programs import cells

  found = cells.of_few_labels(x, y, test_x, test_y, num_classes=num_classes, seed=seed)
  found["linear"] = linear.linear_evaluation(x, y, test_x, test_y, num_classes=num_classes)
  return {name: round(float(value), 4) for name, value in found.items()}


def representations(run: pathlib.Path):
  """(config, evaluation, {name: function that makes (features of the training images, of the test images)}) of a run."""
  import jax

  from simclr_jax import model
  from simclr_jax.evaluation import embed
  from simclr_jax.evaluation.maps import color_histogram
  from simclr_jax.programs import config as config_lib
  from simclr_jax.programs import pretrain, scores, splits
  from simclr_jax.runtime import checkpoint
  from simclr_jax.runtime import mesh as mesh_lib

  config = config_lib.from_json(checkpoint.read_config(run))
  train, test = splits.open_data(config.data)
  mesh = mesh_lib.make_mesh()
  evaluation = scores.PretrainEvaluation(config, train, test, mesh)
  apply = scores.representations(model.create(config, train.num_classes))
  _, trained = checkpoint.read_run_state(run)

  def features(state, name):
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    return [embed.embed(apply, variables, part, mesh)[name] for part in (evaluation.train, evaluation.test)]

  def untrained():
    state = jax.jit(pretrain.make_task(config, train, mesh=mesh).init)(jax.random.key(config.seed))
    return features(state.variables, "h")

  def histograms():
    return [np.concatenate([color_histogram(b["image"][b["mask"]]) for b in part.batches()]) for part in evaluation.raw]

  found = {f"{config.method} h": lambda: features(trained, "h")}
  if config.method == "simclr":
    found |= {"simclr z": lambda: features(trained, "z"), "untrained": untrained}
    found |= {"raw pixels": lambda: [part.pixels() for part in evaluation.raw], "histogram of 64 colors": histograms}
  return config, evaluation, found


def table(results: dict) -> str:
  """Mean and range of the seeds, in percent."""
  rows = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
  for name, row in results.items():
    cells = []
    for column in COLUMNS:
      values = [100 * scores[column] for scores in row["seeds"].values()]
      spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
      cells.append(f"{statistics.mean(values):.1f}{spread}")
    rows.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(rows)


def main():
  from simclr_jax.runtime import cpu

  cpu.prepare()
  from simclr_jax.programs import config as config_lib

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+", type=pathlib.Path)
  parser.add_argument("--output", required=True, type=pathlib.Path)
  args = parser.parse_args()
  for run in args.runs:
    if not (run / "COMPLETE").exists():
      raise SystemExit(f"{run} has not ended")
    config, evaluation, found = representations(run)
    settings = config_lib.to_json(config_lib.replace(config, {"seed": 0}))
    settings = hashlib.sha256(settings.encode()).hexdigest()[:12]
    labels, test_labels = evaluation.train.labels(), evaluation.test.labels()
    for name, make in found.items():
      results = json.loads(args.output.read_text()) if args.output.exists() else {}
      row = results.setdefault(name, {"settings": settings, "seeds": {}})
      if row["settings"] != settings:
        raise SystemExit(f"{run}: {args.output} has {name} of other settings or data; name another output")
      seed = str(config.seed)
      if seed in row["seeds"]:
        continue
      x, test_x = make()
      row["seeds"][seed] = read(x, labels, test_x, test_labels, evaluation.num_classes, config.seed)
      args.output.write_text(json.dumps(results, indent=1) + "\n")
      print(name, seed, row["seeds"][seed], flush=True)
  print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
  main()
