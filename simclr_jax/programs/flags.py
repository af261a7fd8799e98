"""The flags of every program, which the command needs before it imports one: JAX takes seconds, an answer to a typo should not."""

import argparse

ENCODER = "a run, or a folder that simclr export, import or a finished run wrote"


def training(parser):
  """Of programs that take a recipe and fill a folder."""
  parser.add_argument(
    "--config", metavar="RECIPE", help="a recipe, such as configs/smoke.py or smoke; with --resume that of the run"
  )
  parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
  _again(parser)
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=512"


def training_on_several(parser):
  training(parser)
  _several(parser)


def of_a_run(parser):
  """Of programs that score an encoder."""
  parser.add_argument("--workdir", "--encoder", required=True, metavar="DIR", help=ENCODER)
  parser.add_argument("--step", type=int, help="checkpoint of a run to use (default: the newest)")
  _several(parser)
  parser.epilog = "--config.KEY=VALUE changes a value of the run's config, e.g. --config.evaluate.knn_k=200"


def probe(parser):
  of_a_run(parser)
  parser.add_argument(
    "--of", choices=("classes", "transforms"), default="classes",
    help="what is predicted from h: the class (default); or color, rotation, noise, edges, hue and place of the crop, "
    "from z too, for which --workdir may be an exported encoder",
  )  # fmt: skip
  parser.add_argument("--json", default="", metavar="FILE", help="--of=transforms: write the scores")


def claims(parser):
  add = parser.add_argument
  add(
    "--data", action="append", default=[], metavar="SET",
    help="SET:train and SET:test are a data set, such as textures or npz:FILE; may be repeated (default: the budget's)",
  )  # fmt: skip
  add(
    "--budget",
    choices=("quick", "full", "methods"),
    default="quick",
    help="quick: about an hour a set (default); full: a night; methods: SimCLR beside the methods it is compared with",
  )
  add("--workdir", default="runs/claims", metavar="DIR", help="folder of the results, from which it resumes")
  add("--plan", action="store_true", help="list the runs and what they will take, and run nothing")


def quickstart(parser):
  parser.add_argument(
    "folder",
    nargs="?",
    metavar="DIR",
    help="image files at any depth; labels are not needed; with --resume that of the run",
  )
  parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
  parser.add_argument("--minutes", type=float, default=6.0, help="for everything, roughly (default: 6)")
  parser.add_argument(
    "--start", default="", metavar="DIR", help=f"{ENCODER}, to train on from; default: random weights"
  )
  _again(parser)


def plan(parser):
  parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/v1.py:1x")
  add = parser.add_argument
  add("--topology", required=True, action="append", help="such as v4:4x4x8 or v5e:16x16; may be repeated")
  add(
    "--batch_size", type=int, action="append", default=[], metavar="N", help="instead of the recipe's; may be repeated"
  )
  add("--num_examples", type=int, default=0, help="images, where the data set is not at hand")
  add("--num_classes", type=int, default=0, help="of those images")
  add("--json", action="store_true", help="print JSON")
  add("--picture", default="", metavar="SVG", help="draw what the time of the step goes to")
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=8192"


def time(parser):
  parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, such as configs/v1.py:1x")
  parser.add_argument("--packed", action="store_true", help="time the packed arrangement where there is no TPU, too")
  parser.add_argument("--json", default="", metavar="FILE", help="write all that was measured")
  _several(parser)
  parser.epilog = "--config.KEY=VALUE changes one value of the recipe, e.g. --config.batch_size=8192"


def import_official(parser):
  parser.add_argument(
    "source", metavar="SRC", help="TF1 bundle or TF2 checkpoint (the part before .index), or SavedModel"
  )
  parser.add_argument("--output", required=True, metavar="DIR", help="folder to write the encoder to")
  parser.add_argument("--overwrite", action="store_true", help="replace the export in DIR")
  parser.add_argument("--ema", action="store_true", help="take the moving averages ema_model/...")


def export(parser):
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", metavar="DIR", help=ENCODER)
  source.add_argument("--encoder", metavar="DIR", help="the same")
  add = parser.add_argument
  add("--output", required=True, metavar="DIR", help="one format: this folder; several: one each below it")
  add(
    "--format", action="append", metavar="NAME",
    help="orbax (default), safetensors, torchvision, timm, huggingface, stablehlo, onnx, savedmodel, several with "
    "commas, or all",
  )  # fmt: skip
  add("--head", action="store_true", help="take the projection head along: z beside h")
  add("--step", type=int, help="checkpoint of the run (default: the newest)")
  add("--license", "--licence", default="", metavar="NAME", help="of the weights, for card.json, such as Apache-2.0")
  add("--python", default="", metavar="PATH", help="the Python that verifies, with the formats' libraries")
  add("--overwrite", action="store_true", help="replace the exports that are there")


def embed(parser):
  add = parser.add_argument
  add("--encoder", "--workdir", required=True, metavar="DIR", help=ENCODER)
  add("--data", required=True, metavar="DATA", help="a data set such as folder:/my/images")
  add("--output", required=True, metavar="FILE", help="ends in .npz, .parquet or .safetensors")
  add("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets are")
  add("--images_per_part", type=int, default=2048, help="images after which the work is saved (default: 2048)")
  add("--overwrite", action="store_true", help="replace FILE")
  _several(parser)


def map_of_images(parser):
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    "--workdir", "--encoder", metavar="DIR", help=f"{ENCODER}: its test images, or training images if it has none"
  )
  what.add_argument("--features", metavar="FILE", help="a file `simclr embed` wrote")
  add = parser.add_argument
  add(
    "--method", default="infonc-tsne", choices=("infonc-tsne", "tsimcne"),
    help="how images get their places: InfoNC-t-SNE on h (the default), or the network of a run of configs/tsimcne.py",
  )  # fmt: skip
  add("--step", type=int, help="checkpoint of the run to use (default: the newest)")
  add("--output", metavar="DIR", help="folder to write to (default: map, in DIR or beside FILE)")
  add("--images", type=int, default=10_000, help="most images, drawn by --seed (default: 10000)")
  add("--seed", type=_seed, default=0)


def _seed(text: str) -> int:
  """An argument that is a seed, in the range of those of the configs."""
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
    ("benchmark", "images a second and core of each stage, and which augment.where suffices"),
  ):
    one = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
    one.add_argument("spec", metavar="DATA", help="a data set such as folder:/my/images")
    one.add_argument("--data_dir", metavar="DIR", help="where prepared TensorFlow Datasets are")
    if action == "inspect":
      one.add_argument("--limit", type=int, default=0, help="number of images to read, drawn at random (default: all)")
      one.add_argument("--output", metavar="PNG", help="a contact sheet of 64 images")
    elif action == "prepare":
      one.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
      one.add_argument("--images_per_shard", type=int, default=1000)
      one.add_argument("--short_side", type=int, default=0, help="re-encode larger images at this shorter side")
    else:
      one.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
      one.add_argument("--resize", default="bicubic", help="bicubic or bilinear")


def _again(parser):
  again = parser.add_mutually_exclusive_group()
  again.add_argument("--resume", action="store_true", help="resume from the newest checkpoint there")
  again.add_argument("--overwrite", action="store_true", help="delete the run there and start again")


def _several(parser):
  several = parser.add_argument_group(
    "several processes", "which find each other by themselves on Cloud TPU, GKE, SLURM and Open MPI"
  )
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--num_processes", type=int, metavar="N")
  several.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
