"""The flags of every program, separate from the programs: importing JAX takes seconds, and reporting a typo should not."""

import argparse

# augment.RESIZES, whose module imports TensorFlow.
RESIZES = ("bicubic", "bicubic_tf1", "bilinear", "bicubic_antialias")
MOST_ON_A_MAP = 10_000  # images, unless told otherwise: as pictures and names they make a page of about 2 MB
ENCODER = "a run, or a folder written by simclr import, or by simclr export as orbax or safetensors"


def training(parser):
  """For programs that take a recipe and write to a folder."""
  parser.add_argument(
    "--config", metavar="RECIPE", help="a recipe, such as configs/smoke.py or smoke; not needed with --resume"
  )
  parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
  _again(parser)
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=512"


def training_on_several(parser):
  training(parser)
  _several(parser)


def of_a_run(parser):
  """For programs that score an encoder."""
  parser.add_argument("--workdir", "--encoder", required=True, metavar="DIR", help=ENCODER)
  parser.add_argument("--step", type=int, help="checkpoint of a run to use (default: the newest)")
  _several(parser)
  parser.epilog = "--config.KEY=VALUE changes a value of the run's config, e.g. --config.evaluate.knn_k=200"


def probe(parser):
  of_a_run(parser)
  parser.add_argument(
    "--of", choices=("classes", "transforms"), default="classes",
    help="what to predict: the class, from h (default); or color, rotation, noise, edges, hue and position of the crop, from "
    "h and z",
  )  # fmt: skip
  parser.add_argument("--json", default="", metavar="FILE", help="with --of=transforms: write the scores to FILE")


def claims(parser):
  add = parser.add_argument
  add(
    "--data", action="append", default=[], metavar="SET",
    help="a data set with SET:train and SET:test, such as textures or npz:FILE, or a folder:PATH or shards with PATH/train and PATH/test; may be repeated (default: the budget's)",
  )  # fmt: skip
  add(
    "--budget",
    choices=("quick", "full", "methods"),
    default="quick",
    help="quick: about an hour per data set (default); full: a night; methods: SimCLR beside the methods it is compared with",
  )
  add("--workdir", default="runs/claims", metavar="DIR", help="folder of the results; an earlier run there is resumed")
  add("--plan", action="store_true", help="list the runs and how long they will take, and run nothing")


def quickstart(parser):
  parser.add_argument(
    "folder",
    nargs="?",
    metavar="DIR",
    help="folder with image files at any depth; no labels needed; may be left out with --resume",
  )
  parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
  parser.add_argument("--minutes", type=float, help="approximate time for everything (default: 6)")
  parser.add_argument("--start", default="", metavar="DIR", help=f"{ENCODER}, to start from (default: random weights)")
  _again(parser)


def plan(parser):
  parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/v1.py:1x")
  add = parser.add_argument
  add("--topology", required=True, action="append", help="a TPU pod, such as v4:4x4x8 or v5e:16x16; may be repeated")
  add(
    "--batch_size",
    type=_at_least(1),
    action="append",
    default=[],
    metavar="N",
    help="replaces the recipe's; may be repeated",
  )
  add(
    "--num_examples", type=_at_least(0), default=0, help="number of images of the data set, if it is not available here"
  )
  add("--num_classes", type=_at_least(0), default=0, help="number of classes, if the data set is not available here")
  add("--json", action="store_true", help="print JSON")
  add("--picture", default="", metavar="SVG", help="draw where the time of the step goes")
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=8192"


def time(parser):
  parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/v1.py:1x")
  parser.add_argument("--packed", action="store_true", help="time the packed arrangement even without a TPU")
  parser.add_argument("--json", default="", metavar="FILE", help="write all measurements to FILE")
  _several(parser)
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=8192"


def import_official(parser):
  parser.add_argument(
    "source", metavar="SRC", help="TF1 bundle or TF2 checkpoint (the path without .index), or SavedModel"
  )
  parser.add_argument("--output", required=True, metavar="DIR", help="folder to write the encoder to")
  parser.add_argument("--overwrite", action="store_true", help="replace the export in DIR")
  parser.add_argument("--ema", action="store_true", help="use the moving averages under ema_model/")


def export(parser):
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", metavar="DIR", help=ENCODER)
  source.add_argument("--encoder", metavar="DIR", help="the same as --workdir")
  add = parser.add_argument
  add("--output", required=True, metavar="DIR", help="folder to write to; several formats get one subfolder each")
  add(
    "--format", action="append", metavar="NAME",
    help="orbax (default), safetensors, torchvision, timm, huggingface, stablehlo, onnx, savedmodel, several separated by "
    "commas, or all",
  )  # fmt: skip
  add("--head", action="store_true", help="include the projection head: z in addition to h")
  add("--step", type=int, help="checkpoint of the run (default: the newest)")
  add(
    "--license",
    "--licence",
    default="",
    metavar="NAME",
    help="license of the weights, for card.json, such as Apache-2.0",
  )
  add("--python", default="", metavar="PATH", help="a Python with the libraries of the formats, to verify with")
  add("--overwrite", action="store_true", help="replace existing exports")


def embed(parser):
  add = parser.add_argument
  add("--encoder", "--workdir", required=True, metavar="DIR", help=ENCODER)
  add("--data", required=True, metavar="DATA", help="a data set such as folder:/my/images")
  add("--output", required=True, metavar="FILE", help="ends in .npz, .parquet or .safetensors")
  add("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets are")
  add("--images_per_part", type=_at_least(1), default=2048, help="save after this many images (default: 2048)")
  add("--overwrite", action="store_true", help="replace FILE")
  _several(parser)


def map_of_images(parser):
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    "--workdir",
    "--encoder",
    metavar="DIR",
    help=f"{ENCODER}; draws its test images, or its training images if it has no test images",
  )
  what.add_argument("--features", metavar="FILE", help="a file written by `simclr embed`")
  add = parser.add_argument
  add(
    "--method", default="infonc-tsne", choices=("infonc-tsne", "tsimcne"),
    help="how to place the images: InfoNC-t-SNE on h (default), or the network of a run of configs/tsimcne.py",
  )  # fmt: skip
  add("--step", type=int, help="checkpoint of the run to use (default: the newest)")
  add("--output", metavar="DIR", help="folder to write to (default: map, in DIR or next to FILE)")
  add(
    "--images", type=_at_least(2), default=MOST_ON_A_MAP,
    help=f"largest number of images, drawn with --seed (default: {MOST_ON_A_MAP})",
  )  # fmt: skip
  add("--seed", type=_seed, default=0)
  add("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets are, for --features")


def _at_least(least: int):
  """The type of an argument that is a number of things."""

  def number(text: str) -> int:
    if not text.isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return int(text)

  return number


def _seed(text: str) -> int:
  """An argument that is a seed, with the same range as seeds in configs."""
  if not text.isdecimal() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to {2**32 - 1}")
  return int(text)


def recipes(parser):
  parser.add_argument("name", nargs="?", default="", metavar="NAME", help="one recipe, such as smoke")


def config(parser):
  parser.add_argument("recipe", metavar="RECIPE", help="a recipe, such as smoke or configs/v1.py:1x")
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=512"


def completion(parser):
  parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")
  parser.epilog = (
    'bash: eval "$(simclr completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after compinit'
  )


def runs(parser):
  parser.add_argument("folder", metavar="DIR", help="folder with runs in it")
  parser.add_argument("--output", metavar="HTML", help="the page (default: DIR/runs.html)")


def data(parser):
  actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
  for action, text in (
    ("inspect", "counts, sizes, classes, unreadable images, a contact sheet"),
    ("prepare", "writes sharded records; resumes where it stopped"),
    ("benchmark", "images per second per core of each stage, and which augment.where is fast enough"),
  ):
    one = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
    one.add_argument("spec", metavar="DATA", help="a data set such as folder:/my/images")
    one.add_argument("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets are")
    if action == "inspect":
      one.add_argument(
        "--limit", type=_at_least(0), default=0, help="number of images to read, drawn at random (default: all)"
      )
      one.add_argument("--output", metavar="PNG", help="a contact sheet of 64 images")
    elif action == "prepare":
      one.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
      one.add_argument("--images_per_shard", type=_at_least(1), default=1000)
      one.add_argument(
        "--short_side", type=_at_least(0), default=0, help="re-encode larger images at this shorter side"
      )
    else:
      one.add_argument("--size", type=_at_least(1), default=224, help="side of the views, in pixels")
      one.add_argument("--resize", default="bicubic", choices=RESIZES, help="interpolation of crops (default: bicubic)")


def _again(parser):
  again = parser.add_mutually_exclusive_group()
  again.add_argument("--resume", action="store_true", help="resume from the newest checkpoint there")
  again.add_argument("--overwrite", action="store_true", help="delete the run there and start again")


def _several(parser):
  several = parser.add_argument_group(
    "several processes",
    "not needed on Cloud TPU, GKE, SLURM and Open MPI, where processes find each other automatically",
  )
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--num_processes", type=int, metavar="N")
  several.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
