"""The `simclr` command: flags, what must be set before JAX starts, dispatch, and one-line errors."""

import argparse
import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from simclr_jax import __version__
from simclr_jax.programs import flags as flags_of
from simclr_jax.runtime import errors
from simclr_jax.runtime.errors import UserError


class Command(NamedTuple):
  """A program of the command line.

  Attributes:
    module: a module of programs/, imported when the command runs; its `main(flags, overrides)` returns the exit code.
    add_flags: adds its flags to the parser.
    text: what it does, for --help.
    prepare: flags -> None; what has to happen before JAX is imported.
    recipes: programs whose recipes --config may name; main gets the typed config as flags.config and the recipe's name as
      flags.recipe.
    overrides: whether it takes --config.KEY=VALUE.
  """

  module: str
  add_flags: Callable
  text: str
  prepare: Callable
  recipes: tuple[str, ...] = ()
  overrides: bool = False


def nothing(flags):
  """Programs that need no JAX."""


def for_a_pod(flags):
  from simclr_jax.runtime import aot, tensorflow

  aot.prepare()
  tensorflow.quieten()


def for_this_machine(flags):
  import logging

  from simclr_jax.runtime import cpu, limits, tensorflow

  # Orbax warns about metadata that is not needed, and logs pages of errors that it also raises.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  limits.check()
  note = cpu.prepare()
  tensorflow.quieten()
  from simclr_jax.runtime import mesh, processes

  if "coordinator" in flags:
    processes.start(flags.coordinator, flags.num_processes, flags.process_id)
    if processes.is_multiprocess():
      processes.agree(_facts(flags))
  elif "resume" in flags:
    processes.check_alone(flags.command)
  mesh.check_devices()
  if note and not processes.process_index():
    print(note)


def _facts(flags) -> dict:
  """What the processes of a run have to agree on: flags, values of the config, code."""
  from simclr_jax.programs import config as config_lib
  from simclr_jax.runtime import processes

  own = ("coordinator", "num_processes", "process_id", "config")
  facts = {f"--{name}": value for name, value in vars(flags).items() if name not in own}
  if "config" in flags:
    facts |= {f"config.{name}": value for name, value in config_lib.flatten(flags.config).items()}
  return facts | processes.of_this_program()


def for_training(flags):
  from simclr_jax.runtime import compiled

  compiled.prepare()
  for_this_machine(flags)


def _trains(name, text, add_flags=flags_of.training_on_several):
  return Command(name, add_flags, text, for_training, (name,), overrides=True)


COMMANDS = {
  "quickstart": Command(
    "quickstart", flags_of.quickstart,
    "from a folder of images without labels: picks settings, pretrains, embeds, draws a map, writes one page", for_training,
  ),
  "pretrain": _trains(
    "pretrain", "SimCLR pretraining with NT-Xent over the global batch; ends with scores, an export and a report page"
  ),
  "probe": Command(
    "probe", flags_of.probe, "linear evaluation on the frozen h of a run or an exported encoder: predicts classes or transformations", for_this_machine, overrides=True
  ),
  "finetune": _trains(
    "finetune", "training with some or all labels, from a run, from an exported encoder, or from scratch"
  ),
  "knn": Command(
    "knn", flags_of.of_a_run, "k-nearest-neighbor accuracy of the h of a run or an exported encoder", for_this_machine, overrides=True
  ),
  "distill": _trains(
    "distill",
    "distills a fine-tuned teacher into a student of smaller or equal size, with or without labels",
  ),
  "embed": Command(
    "embed", flags_of.embed,
    "writes h of every image of a folder or data set to one file: npz, parquet or safetensors", for_this_machine,
  ),
  "map": Command(
    "map", flags_of.map_of_images,
    "draws a map of the features of a run, an encoder or a file, and lists near-duplicates and outliers: page, picture, tables",
    for_this_machine, overrides=True,
  ),
  "export": Command(
    "export", flags_of.export,
    "writes the encoder of a run, without the head, to folders that other libraries can open; each is verified",
    for_this_machine,
  ),
  "plan": Command(
    "plan", flags_of.plan,
    "estimates memory, time, collectives and chip-hours of a recipe on a TPU pod by compiling it here, without a TPU", for_a_pod,
    ("pretrain", "finetune", "distill"), overrides=True,
  ),
  "time": Command(
    "timing", flags_of.time,
    "times a train step and the input pipeline on this machine, with several settings, next to the estimate of plan",
    for_this_machine, ("pretrain",), overrides=True,
  ),
  "transfer": _trains(
    "transfer", "evaluates an encoder on a list of other data sets, linear and fine-tuned, next to the paper's numbers",
    flags_of.training,
  ),
  "downstream": _trains(
    "downstream", "pretraining and all downstream tasks with several seeds: a table, and a figure of accuracy against labels",
    flags_of.training,
  ),
  "claims": Command(
    "claims", flags_of.claims,
    "tests claims about SimCLR with small runs: effects with intervals and verdicts, on one page; resumes automatically",
    for_training,
  ),
  "import": Command(
    "import_official", flags_of.import_official,
    "converts an official checkpoint of SimCLR v1 or v2 to a folder like those of `simclr export`", for_this_machine,
  ),
  "data": Command(
    "data", flags_of.data, "inspects a data set, converts it to sharded records, or measures how fast it can be read",
    for_this_machine,
  ),
  "recipes": Command(
    "recipes", flags_of.recipes,
    "lists the recipes of the package: what each costs and should score; with NAME, prints its full header", nothing,
  ),
  "config": Command(
    "resolved", flags_of.config, "prints every value of a recipe: where it comes from, and what it means",
    nothing, overrides=True,
  ),
  "completion": Command(
    "completion", flags_of.completion, "prints a script that completes commands, flags, recipes and keys", nothing
  ),
  "runs": Command("runs", flags_of.runs, "compares the runs below a folder: a table, and a page", nothing),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
  """The help of a program with its own recipes ends with the keys of its config; for a misspelled word the nearest name is
  suggested.

  Attributes:
    program: the program whose keys the help lists, or None.
    takes: the program whose keys it takes as --config.KEY=VALUE, or None.
  """

  program = takes = None

  def format_help(self):
    if not self.program:
      return super().format_help()
    from simclr_jax.programs import config as config_lib

    return f"{super().format_help()}\n{config_lib.help_text(config_lib.PROGRAMS[self.program])}\n"

  def error(self, message):
    words = re.match(r"argument \w+: invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if words:
      message += _near(words[1], re.findall(r"[\w.-]+", words[2]))
    super().error(message)

  def parse_known_args(self, args=None, namespace=None):
    found, unknown = super().parse_known_args(args, namespace)
    if unknown:
      self._refuse(unknown)
    return found, unknown

  def _refuse(self, words):
    known = [flag for action in self._actions for flag in action.option_strings]
    if self.takes:
      from simclr_jax.programs import config as config_lib

      known += [f"--config.{row.key}" for row in config_lib.describe(config_lib.PROGRAMS[self.takes])]
    name = words[0].partition("=")[0]
    key = f"--config.{name.lstrip('-')}"
    self.error(f"unrecognized arguments: {' '.join(words)}{_near(key if key in known else name, known)}")


def _near(name, known) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]}?" if near else ""


def parser() -> argparse.ArgumentParser:
  """The command line; `--config.key=value` overrides are parsed by the config itself."""
  top = _Parser(
    prog="simclr", description="SimCLR v1 and v2 pretraining in JAX.", allow_abbrev=False,
    epilog="simclr COMMAND --help shows a command's flags.",
  )  # fmt: skip
  top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
  subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
  parsers = {}
  for name, command in COMMANDS.items():
    sub = parsers[name] = subparsers.add_parser(name, help=command.text, description=command.text, allow_abbrev=False)
    command.add_flags(sub)
    sub.program = name if command.recipes == (name,) else None
    sub.takes = (command.recipes or ("pretrain",))[0] if command.overrides else None
  parsers["completion"].set_defaults(parsers=parsers)
  return top


def split(argv) -> tuple[list[str], list[str]]:
  """(flags, overrides `--config.key=value`); `--config.key value` is joined to that form."""
  flags, overrides, words = [], [], list(argv)
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      flags.append(word)
    elif "=" not in word and words and not words[0].startswith("--"):
      overrides.append(f"{word}={words.pop(0)}")
    else:
      overrides.append(word)
  return flags, overrides


def main(argv=None) -> int:
  """Runs a command and returns the exit code: 0 done, 1 error, 2 wrong flags, 42 stopped by SIGTERM or SIGHUP and saved, 130
  stopped by SIGINT.

  If standard output is lost, training continues; any other command fails, unless its reader (such as `head`) closed the pipe.
  """
  from simclr_jax.runtime import output

  output.open_standard_files()
  if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show must not end a run
    sys.stdout.reconfigure(errors="backslashreplace")
  words, overrides = split(sys.argv[1:] if argv is None else argv)
  top = parser()
  flags = top.parse_args(words)
  command = COMMANDS[flags.command]
  if command.recipes and not flags.config and not getattr(flags, "resume", False):
    top.error("--config is missing: name a recipe, or resume the run in --workdir with --resume")
  if overrides and not command.overrides:
    top.error(f"{overrides[0]}: simclr {flags.command} takes no config values")
  trains = command.prepare is for_training
  errors.to_resume = "resume with --resume" if "resume" in flags else "run the same command again"

  def announce(error):
    if trains:
      print(f"simclr: standard output is lost ({error}); the run continues without it", file=sys.stderr)

  with output.kept_going(announce) as out:
    code = _outcome(command, flags, overrides, heard=trains)
  if code == 0 and not trains and out.failure and not isinstance(out.failure, BrokenPipeError):
    print(f"simclr: cannot write to standard output ({out.failure})", file=sys.stderr)
    code = 1
  return code


def _outcome(command, flags, overrides, heard: bool) -> int:
  """The exit code of a command, after printing its error, if any; `heard`: whether to handle signals, see runtime/signals.py."""
  stopped, at_once = (), False
  try:
    with contextlib.ExitStack() as stack:
      if heard:
        from simclr_jax.runtime import signals

        stopped = signals.Stopped
        stack.enter_context(signals.heard())
      code, message = _run(command, flags, overrides), ""
  except KeyboardInterrupt:
    code, message = 130, "interrupted"
  except stopped as error:
    code, message = error.exit_code, str(error)
  except Exception as error:
    code, message = getattr(error, "exit_code", 1), str(error)
    at_once = getattr(error, "exit_at_once", False)
    # An OSError without a number was raised on purpose, with words for the user.
    of_user = isinstance(error, UserError) or isinstance(error, OSError) and (error.filename or error.errno is None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # whatever was being written
      of_user, message = True, f"the disk is full ({error}); free space and run the same command again"
      message += " with --resume" if "resume" in flags else ""
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("tensorflow"):
      of_user = True
      message = "this needs TensorFlow, which is not installed: pip install tensorflow tensorflow-datasets; arrays and exports work without it"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "Out of memory" in message:
      of_user, message = True, _out_of_memory(error, getattr(flags, "config", None))
    if code == 1 and (not of_user or os.environ.get("SIMCLR_TRACEBACK")):
      of_program = ("INVALID_ARGUMENT", "UNIMPLEMENTED")  # found by every process when it compiles
      if type(error).__name__ == "JaxRuntimeError" and not message.startswith(of_program):
        code = sys.modules["simclr_jax.runtime.watchdog"].await_verdict() if _has_watchdog() else code
      import traceback

      traceback.print_exc()
      message = "" if of_user else f"this should not happen; please report it with the lines above ({_versions()})"
  if message:
    print(f"simclr: {message}", file=sys.stderr)
  if _has_watchdog():
    sys.modules["simclr_jax.runtime.watchdog"].leave(code, message)
  if at_once:
    sys.modules["simclr_jax.runtime.lock"].release_all()
    sys.stdout.flush()
    os._exit(code)
  return code


def _run(command, flags, overrides) -> int:
  if command.recipes:  # a wrong value is reported before the seconds that importing JAX takes
    from simclr_jax.programs import config as config_lib

    if flags.config:
      flags.recipe, flags.config = flags.config, config_lib.load(flags.config, overrides)
      if flags.config.program not in command.recipes:
        raise UserError(f"--config={flags.recipe} is a recipe for simclr {flags.config.program}")
    else:
      flags.recipe, flags.config = config_lib.of_run(flags.workdir, overrides)
      if flags.config.program not in command.recipes:
        raise UserError(f"--workdir={flags.workdir} is a run of simclr {flags.config.program}")
  command.prepare(flags)
  return importlib.import_module(f"simclr_jax.programs.{command.module}").main(flags, overrides)


def _has_watchdog() -> bool:
  """Whether the command has imported it, and JAX."""
  return "simclr_jax.runtime.watchdog" in sys.modules


def _out_of_memory(error, config) -> str:
  """One line for what XLA says on many, and Python on none; it names keys that this config has."""
  first = next(iter(str(error).splitlines()), "").strip().rstrip(".")
  reason = f" ({first[:200]})" if first else ""
  cures = ["more --config.microbatches"] if hasattr(config, "microbatches") else []
  cures += ["--config.encoder.remat=block"] if hasattr(config, "encoder") else []
  if not cures:
    batch_size = "finetune.batch_size" if hasattr(getattr(config, "finetune", None), "batch_size") else "batch_size"
    return f"out of memory{reason}: lower {batch_size}, or evaluate.batch_size where images are only scored"
  return (
    f"out of memory{reason}: lower batch_size, or with the same batch_size use {' or '.join(cures)} (`simclr plan` and "
    "docs/scaling.md say what they save); in evaluation lower evaluate.batch_size, also with --resume"
  )


def _versions() -> str:
  import importlib.metadata  # 30 ms, which only a report of an error has to spend

  packages = ("simclr_jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorflow")
  found = []
  for name in packages:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      found.append(f"{name} not installed")
  return ", ".join((*found, f"Python {sys.version.split()[0]}"))


if __name__ == "__main__":
  sys.exit(main())
