"""`simclr import`: converts an official checkpoint of SimCLR v1 or v2 to a folder like those of `simclr export`."""

import pathlib

from simclr_jax import exporting
from simclr_jax.exporting.folder import check_vacant
from simclr_jax.importing import official
from simclr_jax.programs import config as config_lib


def run(source, output, *, ema: bool = False, overwrite: bool = False) -> pathlib.Path:
  """The program `simclr import`: converts an official checkpoint to a folder that `load_encoder` opens.

  Raises:
    ValueError: as `load`, or the folder is not empty.
  """
  check_vacant(output, overwrite=overwrite)
  encoder, projector, classifier, info = official.load(source, ema=ema)
  config = config_lib.from_dict(
    {
      "program": "import",
      "source": {key: info[key] for key in ("source", "format", "step", "num_classes")} | {"ema": ema},
      "encoder": info["encoder"],
      "augment": {"size": info["size"], "resize": info["resize"]},
      "evaluate": {"crop": info["crop"]},
      **({"projector": info["projector"]} if projector else {}),
    }
  )
  heads = {name: tree for name, tree in (("projector", projector), ("classifier", classifier)) if tree}
  step = info["step"] or 0
  path = exporting.write(output, encoder, config, scores={}, step=step, heads=heads, overwrite=overwrite)
  print(f"{info['format']} {source}: {official.title(info['encoder'])}, {', '.join(heads) or 'no head'}")
  print(f"it was trained on images resized with {info['resize']!r}, as card.json states\n")
  print(f"encoder: {path}\n\n{exporting.snippet(path, info['size'])}")
  return path


def main(flags, overrides) -> int:
  run(flags.source, flags.output, ema=flags.ema, overwrite=flags.overwrite)
  return 0
