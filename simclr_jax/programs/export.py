"""`simclr export`: the encoder of a run, or of an exported folder, in one or several formats."""

import difflib
import importlib.util
import json
import sys

import jax
import numpy as np

from simclr_jax import exporting
from simclr_jax.exporting.folder import check_vacant
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import same, trained
from simclr_jax.runtime import checkpoint, errors, files
from simclr_jax.runtime.errors import UserError


def run(
  workdir=None,
  output=None,
  *,
  encoder=None,
  formats=("orbax",),
  head: bool = False,
  step: int | None = None,
  license: str = "",
  python: str = "",
  overwrite: bool = False,
) -> list:
  """The program `simclr export`: the encoder of a run, or of an exported folder, in one or several formats.

  Args:
    workdir: folder of a run, or one that `simclr export`, `simclr import` or a finished run wrote.
    encoder: the same as workdir.
    output: the folder for one format; several formats get one subfolder each.
    formats: keys of exporting.FORMATS, or "all".
    head: include the projection head.
    step: checkpoint of the run, by default the newest.
    license: license of the weights, for the card.
    python: the interpreter to verify with, which has the libraries of the formats; by default this one.
    overwrite: replace existing exports.
  Returns:
    the folders.
  Raises:
    ValueError: an unknown format, no such run or folder, no head, a folder that is not empty, a package that is missing,
      or an export whose h differs.
  """
  everything, formats = list(formats) == ["all"], _checked(formats)
  several = len(formats) > 1
  targets = {name: files.absolute(output) / name if several else files.absolute(output) for name in formats}
  for name, path in targets.items():
    check_vacant(path, overwrite=overwrite)
    if exporting.FORMATS[name][1] and not importlib.util.find_spec(exporting.FORMATS[name][1]):
      raise UserError(f"--format={name} needs {exporting.FORMATS[name][1]}: pip install 'simclr_jax[export]'")
    if name == "savedmodel" and not importlib.util.find_spec("tensorflow"):
      raise UserError("--format=savedmodel needs TensorFlow: pip install tensorflow, or choose onnx")
    if name == "savedmodel" and not exporting.tensorflow_reads_jax():
      raise UserError(
        "--format=savedmodel: TensorFlow up to 2.21 does not read the programs of JAX 0.11 and later; export with JAX 0.10"
        " (Python 3.11), or choose onnx"
      )
  source = workdir or encoder
  folder = trained.exported(source)
  if encoder and not (files.absolute(encoder) / "config.json").exists():
    folder = encoder
  if folder and step is not None:
    raise UserError(f"--step={step} is only for --workdir; an exported folder holds one encoder")
  read = files.absolute(folder) if folder else files.absolute(source) / "encoder"
  for path in targets.values():
    if read.exists() and files.is_within(read, path):
      raise UserError(f"--output={path} --overwrite would delete the encoder that this reads: name another folder")
  flag = "--workdir=" if workdir else "--encoder="
  variables, projector, config, facts = _of_folder(folder) if folder else _of_run(source, step, head, flag)
  facts |= {"license": license} if license else {}
  if head and not projector:
    raise UserError(f"{source} has no projection head: leave --head out")
  variables, projector = (jax.tree.map(np.asarray, tree) for tree in (variables, projector if head else None))
  exports, example = {}, None
  for name in list(targets):
    card = exporting.make_card(variables, config, format=name, **facts)
    card |= {"projector": dict(config.projector)} if head else {}
    reason = exporting.why_not(name, card["architecture"])
    if reason and not everything:
      raise UserError(reason)
    if reason:
      print(f"left out: {reason}", flush=True)
      del targets[name]
    else:
      exports[name] = exporting.Export(name, variables, card, projector)
  for name, export in exports.items():
    example = example or exporting.make_example(export)
    exporting.write_format(targets[name], export, example, python or sys.executable, overwrite)
  if "orbax" in targets:
    print(
      f"\nencoder of step {facts['step']}: {targets['orbax']}\n\n{exporting.snippet(targets['orbax'], config.augment.size)}"
    )
  return list(targets.values())


def _checked(formats) -> list:
  formats = [name for text in formats for name in text.split(",") if name]
  if formats == ["all"]:
    formats = [name for name in exporting.FORMATS if name != "savedmodel" or exporting.tensorflow_reads_jax()]
  else:
    formats = list(dict.fromkeys(formats))
  for name in formats:
    if name not in exporting.FORMATS:
      near = difflib.get_close_matches(name, exporting.FORMATS, n=1)
      hint = f"did you mean {near[0]}? Known are" if near else "expected"
      raise UserError(f"--format={name}: {hint} {', '.join(exporting.FORMATS)}, or all")
  if not formats:
    raise UserError(f"--format is empty: expected {', '.join(exporting.FORMATS)}, or all")
  return formats


@errors.of_the_user()
def _of_run(workdir, step, head, flag):
  """(f's variables, g's where `head` asks for it and it exists, config, what the card says) of a run's checkpoint."""
  config = config_lib.from_json(checkpoint.read_config(workdir, flag))
  made_by = config.program
  if made_by != "pretrain":
    raise UserError(f"{flag}{workdir} is a run of simclr {made_by}: {trained.where_encoder_is(workdir, config)}")
  step, variables = trained.read_encoder(workdir, config, step, flag)
  projector = None
  if head:
    _, state = checkpoint.read_run_state(workdir, step)
    trees = {"params": state["params"], "batch_stats": state["batch_stats"]}
    projector = {name: tree.get("projector", {}) for name, tree in trees.items()}
    projector = projector if projector["params"] else None
  scores_file = files.absolute(workdir) / "scores.json"
  scores = json.loads(files.read_sealed(scores_file)) if scores_file.exists() else {}
  scores = scores.get("scores", {}) if scores.get("step") == step else {}
  held_out = same.held_out_of_training(workdir, config)
  return variables, projector, config, {"scores": scores, "step": step, "held_out": held_out}


def _of_folder(path):
  """The same of an exported folder."""
  _, variables, card = exporting.load_encoder(path)
  if "licence" in card:  # the spelling of cards before 0.2 # codespell:ignore
    card["license"] = card["licence"]  # codespell:ignore
  config = config_lib.from_saved(card["pretraining"])
  if card.get("format") == "safetensors":
    projector = exporting.read_safetensors(path).get("projector")
  else:
    projector = checkpoint.read_tree(files.absolute(path) / "projector")
  return (
    variables,
    projector,
    config,
    {key: card[key] for key in ("scores", "step", "license", "held_out") if key in card},
  )


def main(flags, overrides) -> int:
  options = {name: value for name, value in vars(flags).items() if name not in ("command", "format")}
  run(formats=flags.format or ("orbax",), **options)
  return 0
