"""All downstream tasks in one command: pretrain, linear evaluation, few labels, distillation, transfer.

For several seeds it runs SimCLR with one recipe; a linear classifier on h; fine-tuning with fractions of the labels, compared
with training from scratch on the same images with the same recipe; a smaller student of the fine-tuned network, compared with
that student trained from scratch on the teacher's labels; and a linear classifier on the h of another data set.  It prints
means and spreads and draws accuracy against the fraction of labels (as Figure 1 of arXiv 2006.10029).
"""

import json

import numpy as np

from simclr_jax import data, report
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import distill, finetune, pretrain, same, splits, transfer
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


def part(run, config, folder) -> dict:
  """scores.json of a program's run in `folder`, made if the run is not complete; an interrupted one resumes."""
  if not (folder / "COMPLETE").exists():
    run(config, folder, resume=folder.exists(), overwrite=False)
  return json.loads(files.read_sealed(folder / "scores.json"))["scores"]


def changed(recipe: str, changes: dict):
  """A recipe's config with values replaced; sections may be given whole."""
  return config_lib.replace(config_lib.load(recipe), changes)


def pretraining(config, seed: int):
  """The config of pretraining with a seed: as long as `config` says, whatever the recipe counts its length in."""
  epochs = config.pretrain_epochs
  length = {"train_epochs": epochs, "train_steps": 0, "optimizer.warmup_epochs": min(1.0, epochs / 10)}
  return changed(config.pretrain, {"seed": seed, **length})


def one_seed(config, seed: int, folder) -> dict:
  """{(what, fraction of labels): accuracy} of one seed; fraction 1 where all labels or none are meant."""
  recipe = config_lib.load(config.pretrain)
  scores = part(pretrain.run, pretraining(config, seed), folder / "pretrain")
  names = {"raw pixels": "raw pixels", "untrained encoder": "an untrained h", "h": "h"}
  out = {(f"linear on {name}", 1.0): scores[key]["linear"] for key, name in names.items()}
  shared = {
    "seed": seed,
    "labels.seed": seed,
    "data": recipe.data,
    "encoder": recipe.encoder,
    "augment.size": recipe.augment.size,
    "augment.resize": recipe.augment.resize,
  }
  for fraction in config.fractions:
    for name, start in (("fine-tuned", str(folder / "pretrain")), ("from scratch", "")):
      tuning = changed(config.finetune, {**shared, "labels.fraction": fraction, "start": start})
      where = folder / f"{name.replace(' ', '_')}_{fraction:g}"
      out[name, fraction] = part(finetune.run, tuning, where)["accuracy"]
  fraction = config.distill_fraction
  teacher = folder / f"fine-tuned_{fraction:g}"
  student_shared = {key: value for key, value in shared.items() if key != "encoder"}
  student = changed(config.distill, {**student_shared, "teacher": str(teacher)})
  out["student", fraction] = part(distill.run, student, folder / "student")["accuracy"]
  alone = changed(config.finetune, {**shared, "encoder": student.encoder, "labels.fraction": fraction})
  out["student from scratch", fraction] = part(finetune.run, alone, folder / "student_from_scratch")["accuracy"]
  moved = changed(
    config.transfer,
    {
      "start": str(folder / "pretrain"),
      "supervised": str(folder / f"from_scratch_{max(config.fractions):g}"),
      "seed": seed,
      "augment.size": recipe.augment.size,
    },
  )
  for row in transfer.run(moved, folder / "transfer", resume=(folder / "transfer").exists())["rows"]:
    for name, value in row["scores"].items():
      out[f"transfer to {row['name']}, {name}", 1.0] = value
  return out


def table(results: list[dict]) -> str:
  """Mean and spread (lowest to highest) of every score over the seeds, in percent."""
  lines = [f"{'':44} labels   mean   lowest to highest of {len(results)} seeds"]
  for name, fraction in results[0]:
    values = 100 * np.array([result[name, fraction] for result in results])
    labels = f"{100 * fraction:g} %"
    lines.append(f"{name:44} {labels:>6}  {values.mean():5.1f}   {values.min():.1f} to {values.max():.1f}")
  return "\n".join(lines)


def check_batches(config, tuning, distilling, train):
  """Raises UserError for batches that would end the run after pretraining, of the recipes of fine-tuning and distillation.

  Args:
    train: the training images; their number with a fraction of the labels does not depend on the seed.
  """
  for key, recipe in (("finetune", tuning), ("distill", distilling)):
    mesh_lib.check_divisible(recipe.batch_size, mesh_lib.make_mesh(), f"config.{key}={config[key]}: batch_size")
  for fraction in config.fractions:
    images = len(data.class_balanced(train.labels, fraction, 0))
    if tuning.batch_size > images:
      raise UserError(
        f"config.fractions={config.fractions}: {fraction:g} of the labels leaves {images} training images, fewer than "
        f"batch_size={tuning.batch_size} of config.finetune={config.finetune}: raise it, or name a recipe with a smaller batch"
      )
  if distilling.batch_size > len(train):
    raise UserError(
      f"config.distill={config.distill}: its batch_size={distilling.batch_size} exceeds the {len(train)} training images: "
      "name a recipe with a smaller batch"
    )


def run(config, workdir, *, resume: bool = False, overwrite: bool = False) -> dict:
  """The program `simclr downstream`; with --resume, finished parts are kept.

  Returns:
    dict(results, workdir): one {(what, fraction of labels): accuracy} per seed.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  recipe, tuning, distilling, moving = (
    config_lib.load_part(name, config[name], name) for name in ("pretrain", "finetune", "distill", "transfer")
  )
  train, test = splits.check_labeled(recipe.data, *splits.open_data(recipe.data))
  check_batches(config, tuning, distilling, train)
  transfer.open_rows(moving, mesh_lib.make_mesh())
  fingerprints = same.check_data(workdir, resume, "refuse", {"data.train": train, "data.test": test})
  specs = (recipe.data.train, recipe.data.test, *transfer.specs(moving))
  if resume and (files.absolute(workdir) / "config.json").exists():  # before the folder is touched
    config_lib.check_same(config_lib.from_json(checkpoint.read_config(workdir)), config)
  workdir = workdir_lib.claim(workdir, resume=resume, overwrite=overwrite, specs=specs)
  same.keep_data(workdir, fingerprints)
  checkpoint.write_config(workdir, config_lib.to_json(config))
  results = [one_seed(config, seed, workdir / f"seed{seed}") for seed in config.seeds]
  rows = [
    {"seed": seed, "what": name, "fraction": fraction, "accuracy": value}
    for seed, result in zip(config.seeds, results, strict=True)
    for (name, fraction), value in result.items()
  ]
  files.write_text(workdir / "downstream.json", json.dumps(rows, indent=2))
  text = table(results)
  files.write_text(workdir / "downstream.txt", text + "\n")
  curves = {
    name: {fraction: [result[name, fraction] for result in results] for fraction in config.fractions}
    for name in ("fine-tuned", "from scratch")
  }
  curves["student"] = {config.distill_fraction: [result["student", config.distill_fraction] for result in results]}
  curves["linear on h"] = {1.0: [result["linear on h", 1.0] for result in results]}
  report.accuracy_against_labels_svg(workdir / "downstream.svg", curves)
  checkpoint.mark_complete(workdir)
  print(f"\n{text}\n\n{workdir / 'downstream.txt'}\n{workdir / 'downstream.svg'}  accuracy against labels", flush=True)
  return {"results": results, "workdir": workdir}


def main(flags, overrides) -> int:
  run(flags.config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite)
  return 0
