"""The `simclr` command: flags, what must be set before JAX starts, dispatch, and one-line errors."""

import argparse
import importlib
import logging
import os
import sys
import tempfile
import traceback

COMMANDS = {
  "quickstart": "a folder of images without labels: picks a recipe, pretrains, embeds, maps, writes one page",
  "pretrain": "SimCLR pretraining: views, NT-Xent over the global batch, LARS; ends with scores, an export and a page",
  "probe": "linear evaluation on the frozen h of a run",
  "finetune": "training on few or all labels: from a run or an exported encoder, or from scratch",
  "knn": "k-nearest-neighbour accuracy of the h of a run",
  "distill": "a fine-tuned teacher's knowledge into a smaller student, or one of its own size, without labels or with",
  "embed": "h of every image of a folder or data set, into one file: npz, parquet or safetensors",
  "map": "a map of a run's or a file's features, with near-duplicates and outliers: a page, a picture, tables",
  "export": "the encoder of a run, without the head, into folders that other libraries open; each is verified",
  "plan": "memory, time, collectives and chip-hours of a recipe on a TPU pod, compiled here without one",
  "transfer": "an encoder on a list of other data sets, linear and fine-tuned, beside the paper's table",
  "downstream": "all of it in a row over several seeds, a table and a figure of accuracy against labels",
  "import": "an official checkpoint of SimCLR v1 or v2 into a folder as `simclr export` writes it",
  "data": "looks at a data set, turns it into sharded records, or measures how fast it can be read",
  "recipes": "the recipes that ship with the package: what each costs and should score; with a NAME, all of its header",
  "runs": "the runs below a folder beside each other: a table, and a page",
}
TRAINING = ("pretrain", "finetune", "distill", "transfer", "downstream")  # take a recipe and fill a folder


def parser() -> argparse.ArgumentParser:
  """The command line; `--config.key=value` overrides are parsed by the config itself."""
  top = argparse.ArgumentParser(
    prog="simclr", description="SimCLR v1 and v2 pretraining in JAX.", allow_abbrev=False,
    epilog="simclr COMMAND --help shows a command's flags.",
  )  # fmt: skip
  subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name, text in COMMANDS.items():
    sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
    if name in TRAINING:
      sub.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/smoke.py or smoke")
      sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
      sub.epilog = "--config.key=value changes one value of the recipe, e.g. --config.batch_size=512"
    elif name == "quickstart":
      sub.add_argument("folder", metavar="DIR", help="image files at any depth; labels are not needed")
      sub.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
      sub.add_argument("--minutes", type=float, default=6.0, help="for everything, roughly (default: 6)")
    elif name == "data":
      _data_flags(sub)
    elif name == "plan":
      sub.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/v1.py:1x")
      sub.add_argument(
        "--topology", required=True, action="append", help="such as v4:4x4x8 or v5e:16x16; may be repeated"
      )
      sub.add_argument(
        "--batch_size",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="instead of the recipe's; may be repeated",
      )
      sub.add_argument("--num_examples", type=int, default=0, help="images, where the data set is not at hand")
      sub.add_argument("--num_classes", type=int, default=0, help="of those images")
      sub.add_argument("--json", action="store_true", help="print JSON")
      sub.add_argument("--picture", default="", metavar="SVG", help="draw what the time of the step goes to")
      sub.epilog = "--config.key=value changes one value of the recipe, e.g. --config.batch_size=8192"
    elif name == "import":
      sub.add_argument(
        "source", metavar="SRC", help="TF1 bundle or TF2 checkpoint (the part before .index), or SavedModel"
      )
      sub.add_argument("--output", required=True, metavar="DIR", help="folder to write the encoder to")
      sub.add_argument("--overwrite", action="store_true", help="replace the export in DIR")
      sub.add_argument("--ema", action="store_true", help="take the moving averages ema_model/...")
    elif name == "export":
      _export_flags(sub)
    elif name == "embed":
      sub.add_argument("--encoder", required=True, metavar="DIR", help="a run, or a folder `simclr export` wrote")
      sub.add_argument("--data", required=True, metavar="DATA", help="a data set such as folder:/my/images")
      sub.add_argument("--output", required=True, metavar="FILE", help="ends in .npz, .parquet or .safetensors")
      sub.add_argument("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets lie")
      sub.add_argument("--images_per_part", type=int, default=2048, help="after so many the work is saved")
      sub.add_argument("--overwrite", action="store_true", help="replace FILE")
    elif name == "map":
      what = sub.add_mutually_exclusive_group(required=True)
      what.add_argument("--workdir", metavar="DIR", help="a run: its test images, or training images if it has none")
      what.add_argument("--features", metavar="FILE", help="a file `simclr embed` wrote")
      sub.add_argument("--step", type=int, help="checkpoint of the run to use (default: the newest)")
      sub.add_argument("--output", metavar="DIR", help="folder to write to (default: map, in DIR or beside FILE)")
      sub.add_argument("--images", type=int, default=10_000, help="at most so many, drawn by --seed (default: 10000)")
      sub.add_argument("--seed", type=int, default=0)
    elif name == "recipes":
      sub.add_argument("name", nargs="?", default="", metavar="NAME", help="one recipe, such as smoke")
    elif name == "runs":
      sub.add_argument("folder", metavar="DIR", help="folder with runs in it")
      sub.add_argument("--output", metavar="HTML", help="the page (default: DIR/runs.html)")
    else:
      sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
      sub.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
      sub.epilog = "--config.key=value changes a value of the run's config, e.g. --config.evaluate.knn_k=200"
    if name in (*TRAINING, "quickstart"):
      again = sub.add_mutually_exclusive_group()
      again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there")
      again.add_argument("--overwrite", action="store_true", help="delete the run there and start again")
    if name in ("pretrain", "finetune", "distill", "probe", "knn", "embed"):
      several = sub.add_argument_group("several processes", "found by themselves on Cloud TPU, GKE, SLURM and Open MPI")
      several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
      several.add_argument("--num_processes", type=int, metavar="N")
      several.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
  return top


def _export_flags(sub):
  source = sub.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", metavar="DIR", help="folder of the run")
  source.add_argument("--encoder", metavar="DIR", help="or a folder that simclr export, import or a finished run wrote")
  sub.add_argument("--output", required=True, metavar="DIR", help="one format: this folder; several: one each below it")
  sub.add_argument(
    "--format", action="append", metavar="NAME",
    help="orbax (default), safetensors, torchvision, timm, huggingface, stablehlo, onnx, savedmodel, several with "
    "commas, or all",
  )  # fmt: skip
  sub.add_argument("--head", action="store_true", help="take the projection head along: z beside h")
  sub.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
  sub.add_argument("--licence", default="", metavar="NAME", help="of the weights, for card.json, such as Apache-2.0")
  sub.add_argument("--python", default="", metavar="PATH", help="the Python that verifies, with the formats' libraries")
  sub.add_argument("--overwrite", action="store_true", help="replace the exports that are there")


def _data_flags(sub):
  actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
  for action, text in (
    ("inspect", "counts, sizes, classes, unreadable images, a contact sheet"),
    ("prepare", "writes sharded records; goes on where it stopped"),
    ("benchmark", "images a second and core of each stage, and which augment.where suffices"),
  ):
    one = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
    one.add_argument("spec", metavar="DATA", help="a data set such as folder:/my/images")
    one.add_argument("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets lie")
    if action == "inspect":
      one.add_argument("--limit", type=int, default=0, help="read so many images, drawn at random (default: all)")
      one.add_argument("--output", metavar="PNG", help="a contact sheet of 64 images")
    elif action == "prepare":
      one.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
      one.add_argument("--images_per_shard", type=int, default=1000)
      one.add_argument("--short_side", type=int, default=0, help="re-encode larger images at this shorter side")
    else:
      one.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
      one.add_argument("--resize", default="bicubic", help="bicubic or bilinear")


def main(argv=None) -> int:
  """Runs a command; returns the exit code: 0 done, 1 error, 2 wrong flags, 42 stopped by SIGTERM and saved, 130 by SIGINT."""
  argv = sys.argv[1:] if argv is None else argv
  overrides = [a for a in argv if a.startswith("--config.")]
  top = parser()
  flags = top.parse_args([a for a in argv if not a.startswith("--config.")])
  if flags.command in ("export", "import", "recipes", "data", "embed", "quickstart", "runs") and overrides:
    top.error(f"{overrides[0]}: {flags.command} takes no config values")
  try:
    code, message = _dispatch(flags, overrides), ""
    sys.stdout.flush()
  except BrokenPipeError:  # whoever read the output, `head` for instance, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code, message = 0, ""
  except KeyboardInterrupt:
    code, message = 130, "interrupted"
  except Exception as error:
    code, message = getattr(error, "exit_code", 1), str(error)
    if code == 1 and (not _is_ours(error) or os.environ.get("SIMCLR_TRACEBACK")):
      if type(error).__name__ == "JaxRuntimeError" and "simclr_jax.runtime.watchdog" in sys.modules:
        sys.modules["simclr_jax.runtime.watchdog"].await_verdict()
      traceback.print_exc()
      message = ""
  if message:
    print(f"simclr: {message}", file=sys.stderr)
  if "simclr_jax.runtime.watchdog" in sys.modules:
    sys.modules["simclr_jax.runtime.watchdog"].leave(code, message)
  return code


def _is_ours(error) -> bool:
  """True for an error that this package raised on purpose about the user's input: one line, thrown by our own code."""
  if isinstance(error, TypeError):  # a misspelt key of encoder, projector, augment, ... names the function it went to
    return "unexpected keyword argument" in str(error)
  if not isinstance(error, (ValueError, OSError)) or "\n" in str(error):
    return False
  last = traceback.extract_tb(error.__traceback__)[-1].filename
  return isinstance(error, OSError) or os.path.dirname(os.path.abspath(__file__)) in os.path.abspath(last)


def _import_tensorflow():
  """Imports TensorFlow without its start-up chatter, and keeps it off the accelerators, which are JAX's.

  TensorFlow 2.21 writes to file descriptor 2 before it reads TF_CPP_MIN_LOG_LEVEL; what it wrote is shown if it fails.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as chatter:
    os.dup2(chatter.fileno(), 2)
    try:
      import tensorflow as tf

      tf.config.set_visible_devices([], "GPU")
    except BaseException:
      chatter.seek(0)
      os.write(stderr, chatter.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


def _dispatch(flags, overrides) -> int:
  from simclr_jax.runtime import config as config_lib

  if flags.command == "recipes":
    from simclr_jax.programs import recipes

    recipes.run(flags.name)
    return 0
  if flags.command == "runs":
    from simclr_jax.programs import runs

    runs.run(flags.folder, flags.output)
    return 0
  # A wrong flag or value is reported before the seconds that importing JAX and TensorFlow take.
  config = config_lib.load(flags.config, overrides) if flags.command in (*TRAINING, "plan") else None
  fitting = ("pretrain", "finetune", "distill") if flags.command == "plan" else (flags.command,)
  if config and config_lib.program(config) not in fitting:
    raise ValueError(f"--config={flags.config} is a recipe for simclr {config_lib.program(config)}")
  if flags.command == "plan":
    from simclr_jax.runtime import aot

    aot.prepare()
    _import_tensorflow()
    from simclr_jax.programs import plan

    plan.run(
      config, flags.topology, batches=flags.batch_size, num_examples=flags.num_examples,
      num_classes=flags.num_classes, as_json=flags.json, picture=flags.picture,
    )  # fmt: skip
    return 0

  from simclr_jax.runtime import cpu

  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that nobody misses
  note = cpu.prepare()
  if flags.command in (*TRAINING, "quickstart") and "jax" not in sys.modules:
    # What a run has compiled it does not compile again when it goes on; JAX reads this when it is imported.
    folder = flags.workdir if "://" in flags.workdir else os.path.abspath(flags.workdir)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # XLA's own, on GPUs, know no gs://
  from simclr_jax.runtime import processes

  if "coordinator" in flags:
    processes.start(flags.coordinator, flags.num_processes, flags.process_id)
  if note and not processes.process_index():
    print(note)
  _import_tensorflow()
  if flags.command in TRAINING:
    program = importlib.import_module(f"simclr_jax.programs.{flags.command}")
    named = {"recipe": flags.config} if flags.command == "pretrain" else {}
    program.run(config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite, **named)
  elif flags.command == "data":
    from simclr_jax.programs import data as dataset

    options = {key: value for key, value in vars(flags).items() if key not in ("command", "action")}
    {"inspect": dataset.inspect, "prepare": dataset.prepare, "benchmark": dataset.benchmark}[flags.action](**options)
  elif flags.command == "export":
    from simclr_jax.programs import export

    options = {key: value for key, value in vars(flags).items() if key not in ("command", "format")}
    export.run(formats=flags.format or ("orbax",), **options)
  elif flags.command == "quickstart":
    from simclr_jax.programs import quickstart

    options = {key: getattr(flags, key) for key in ("minutes", "resume", "overwrite")}
    quickstart.run(flags.folder, flags.workdir, **options)
  elif flags.command == "embed":
    from simclr_jax.programs import embed

    options = {key: getattr(flags, key) for key in ("data_dir", "images_per_part", "overwrite")}
    embed.run(flags.encoder, flags.data, flags.output, **options)
  elif flags.command == "map":
    from simclr_jax.programs import map as map_program

    options = {key: getattr(flags, key) for key in ("step", "output", "images", "seed")}
    map_program.run(flags.workdir, flags.features, **options, overrides=overrides)
  elif flags.command == "import":
    from simclr_jax.programs import import_official

    import_official.run(flags.source, flags.output, ema=flags.ema, overwrite=flags.overwrite)
  else:
    from simclr_jax.programs import knn, probe

    program = {"knn": knn, "probe": probe}[flags.command]
    program.run(flags.workdir, step=flags.step, overrides=overrides)
  return 0


if __name__ == "__main__":
  sys.exit(main())
