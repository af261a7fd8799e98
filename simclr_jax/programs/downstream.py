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
from simclr_jax.programs import distill, finetune, pretrain, same, splits, trained, transfer
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


def part(run, config, folder) -> dict:
  """scores.json of a program's run in `folder`, made if the run is not complete; an interrupted one resumes.

  Raises:
    UserError: the complete run is of another config.
  """
  check_finished(config, folder)
  if not (folder / "COMPLETE").exists():
    run(config, folder, resume=folder.exists(), overwrite=False)
  return json.loads(files.read_sealed(folder / "scores.json"))["scores"]


def check_finished(config, folder):
  """Raises UserError if the run in `folder` is complete and of another config than `config`, such as a recipe before it was
  edited."""
  if not (folder / "COMPLETE").exists() or not (folder / "config.json").exists():
    return
  kept = config_lib.from_json(checkpoint.read_config(folder))
  before, now = config_lib.flatten(kept), config_lib.flatten(config)
  # What the run found in its start and teacher, or counted, stands in its config alone; and the whole folder may be moved.
  found = [key for key in ("augment.resize", "norm_devices") if not now.get(key)]
  found += ["start", "teacher"] if isinstance(config, config_lib.Finetune) else []
  config = config_lib.replace(config, {key: before[key] for key in found if key in before.keys() & now})
  keys = ("encoder", "projector") if getattr(config, "keep_head", True) else ("encoder",)
  try:
    same.same_config(trained.as_begun(config, folder, keys), folder)
  except UserError as error:
    raise UserError(f"{folder} is finished: {error}, or delete it and what was made from it") from None


def changed(recipe: str, changes: dict):
  """A recipe's config with values replaced; sections may be given whole."""
  return config_lib.replace(config_lib.load(recipe), changes)


def pretraining(config, seed: int):
  """The config of pretraining with a seed: as long as `config` says, whatever the recipe counts its length in."""
  epochs = config.pretrain_epochs
  length = {"train_epochs": epochs, "train_steps": 0, "optimizer.warmup_epochs": min(1.0, epochs / 10)}
  return changed(config.pretrain, {"seed": seed, **length})


def parts_of(config, seed: int, folder) -> dict:
  """{name: (program, config)} of what is trained with a seed, in order; each has the folder of its name in `folder`.

  Raises:
    UserError: a recipe that does not fit the others.
  """
  recipe, begin, fraction = config_lib.load(config.pretrain), str(folder / "pretrain"), config.distill_fraction
  shared = {
    "seed": seed,
    "labels.seed": seed,
    "data": recipe.data,
    "augment.size": recipe.augment.size,
    "augment.resize": recipe.augment.resize,
  }
  from_scratch = {**shared, "start": "", "tap": 0}  # there is no trained head to tap
  parts = {"pretrain": (pretrain, pretraining(config, seed))}
  for part_of in config.fractions:
    fine_tuned = changed(
      config.finetune, {**shared, "encoder": recipe.encoder, "labels.fraction": part_of, "start": begin}
    )
    alone = changed(config.finetune, {**from_scratch, "encoder": recipe.encoder, "labels.fraction": part_of})
    head = config_lib.replace(fine_tuned, {"projector": recipe.projector})
    finetune.check_network(head, f"config.pretrain={config.pretrain}")
    parts[f"fine-tuned_{part_of:g}"], parts[f"from_scratch_{part_of:g}"] = (finetune, fine_tuned), (finetune, alone)
  student = changed(config.distill, {**shared, "teacher": str(folder / f"fine-tuned_{fraction:g}")})
  if student.alpha < 1:  # or no labels are used
    student = config_lib.replace(student, {"labels.fraction": fraction})
  alone = changed(config.finetune, {**from_scratch, "encoder": student.encoder, "labels.fraction": fraction})
  parts |= {"student": (distill, student), "student_from_scratch": (finetune, alone)}
  for name, (_, one) in parts.items():
    begun = (folder / name / "checkpoints").exists()  # a run that has begun does without its start
    if isinstance(one, config_lib.Finetune) and one.start != begin and not begun:
      finetune.resolve(one)
  return parts


def one_seed(config, seed: int, folder) -> dict:
  """{(what, fraction of labels): accuracy} of one seed; fraction 1 where all labels or none are meant."""
  fraction = config.distill_fraction
  parts = parts_of(config, seed, folder)
  scores = {name: part(program.run, one, folder / name) for name, (program, one) in parts.items()}
  names = {"raw pixels": "raw pixels", "untrained encoder": "an untrained h", "h": "h"}
  out = {(f"linear on {name}", 1.0): scores["pretrain"][key]["linear"] for key, name in names.items()}
  for part_of in config.fractions:
    for name in ("fine-tuned", "from scratch"):
      out[name, part_of] = scores[f"{name.replace(' ', '_')}_{part_of:g}"]["accuracy"]
  out["student", fraction] = scores["student"]["accuracy"]
  out["student from scratch", fraction] = scores["student_from_scratch"]["accuracy"]
  moved = changed(
    config.transfer,
    {
      "start": str(folder / "pretrain"),
      "supervised": str(folder / f"from_scratch_{max(config.fractions):g}"),
      "seed": seed,
      "augment.size": parts["pretrain"][1].augment.size,
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
  for name, (_, _, scored) in transfer.open_rows(moving, mesh_lib.make_mesh()).items():
    splits.check_apart(train, f"data.train={recipe.data.train}", scored.source, f"rows.{name}.test={scored.spec}")
  fingerprints = same.check_data(workdir, resume, "refuse", {"data.train": train, "data.test": test})
  specs = (recipe.data.train, recipe.data.test, *transfer.specs(moving))
  if resume and (files.absolute(workdir) / "config.json").exists():  # before the folder is touched
    config_lib.check_same(config_lib.from_json(checkpoint.read_config(workdir)), config)
  for seed in config.seeds:
    folder = files.absolute(workdir) / f"seed{seed}"
    for name, (_, one) in parts_of(config, seed, folder).items():
      if resume:
        check_finished(one, folder / name)
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
