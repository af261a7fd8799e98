"""Folders for torchvision, timm and Hugging Face transformers: safetensors under their names, configs, model card.

Where the library has the network, its own class loads the weights with strict=True.  Its max-pool pads on all sides; an
encoder with pool_padding="official" gets pooling.py, whose module takes the place of that pool and makes h exact.  Where
the library has no such network (ResNet-18 and -34 of the official code, widths, selective kernels, squeeze-excite, the
CIFAR stem), the folder has modeling_simclr.py, which needs torch alone.
"""

import json

from safetensors.numpy import save_file

from simclr_jax.encoder import DEPTHS
from simclr_jax.exporting import torch_names

WEIGHTS = "model.safetensors"


def write(folder, export):
  library, architecture = export.format, export.architecture
  state, agrees = torch_names.encoder(export.variables), torch_names.agrees(architecture, library)
  if library == "huggingface":
    # Below the attribute of modeling_huggingface.py that holds the network.
    state = torch_names.hugging_face(state) if agrees else {f"resnet.{name}": value for name, value in state.items()}
  save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
  if export.projector:
    save_file(torch_names.projector(export.projector), folder / "projector.safetensors", metadata={"format": "pt"})
  export.copy(folder, from_numpy="from_numpy.py")
  if not agrees:
    export.copy(folder, modeling_simclr="modeling_simclr.py")
  elif architecture["pool_padding"] == "official":
    export.copy(folder, pooling="pooling.py")
  if library == "huggingface":
    if not agrees:
      export.copy(folder, modeling_huggingface="modeling_huggingface.py")
    _write_json(folder / "config.json", _hugging_face_config(export, agrees))
    _write_json(folder / "preprocessor_config.json", _preprocessor(export))
    (folder / "README.md").write_text(_readme(export, agrees))
  if library == "timm":
    _write_json(folder / "config.json", _timm_config(export))
  export.copy(folder, load=f"load_{library if agrees or library == 'huggingface' else 'modeling'}.py")


def _write_json(path, content):
  path.write_text(json.dumps(content, indent=2) + "\n")


def network(architecture: dict) -> dict:
  """Keyword arguments of modeling_simclr.ResNet."""
  return {key: architecture[key] for key in ("depth", "width", "sk_ratio", "se_ratio", "stem", "pool_padding")}


def _hugging_face_config(export, agrees) -> dict:
  architecture = export.architecture
  if not agrees:
    return {
      "model_type": "simclr",
      "architectures": ["SimCLRModel"],
      "auto_map": {
        "AutoConfig": "modeling_huggingface.SimCLRConfig",
        "AutoModel": "modeling_huggingface.SimCLRModel",
      },
      "network": network(architecture),
      "hidden_size": export.card["feature_dimension"],
      "dtype": "float32",
    }
  blocks, _ = DEPTHS[architecture["depth"]]
  return {
    "model_type": "resnet",
    "architectures": ["ResNetModel"],
    "num_channels": 3,
    "embedding_size": int(64 * architecture["width"]),
    "hidden_sizes": [4 * int(64 * 2**i * architecture["width"]) for i in range(4)],
    "depths": list(blocks),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "dtype": "float32",
  }


def _preprocessor(export) -> dict:
  preprocessing = export.card["preprocessing"]
  return {
    "image_processor_type": "ConvNextImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": export.size},
    "crop_pct": preprocessing["center_crop"],
    "resample": 2 if preprocessing["resize"].startswith("bilinear") else 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
  }


def _timm_config(export) -> dict:
  preprocessing, depth = export.card["preprocessing"], export.architecture["depth"]
  return {
    "architecture": f"resnet{depth}",
    "num_classes": 0,
    "num_features": export.card["feature_dimension"],
    "pretrained_cfg": {
      "tag": "simclr",
      "input_size": [3, export.size, export.size],
      "fixed_input_size": False,
      "interpolation": "bilinear" if preprocessing["resize"].startswith("bilinear") else "bicubic",
      "crop_pct": preprocessing["center_crop"],
      "crop_mode": "center",
      "mean": [0.0, 0.0, 0.0],
      "std": [1.0, 1.0, 1.0],
      "num_classes": 0,
      "pool_size": None,
      "first_conv": "conv1",
      "classifier": "fc",
      "license": export.card["license"],
    },
  }


def _readme(export, agrees) -> str:
  """The model card, with the front matter that the Hugging Face hub reads."""
  card, architecture = export.card, export.architecture
  preprocessing = card["preprocessing"]
  license = card["license"].lower() if card["license"] != "not stated" else "other"
  load = ["import transformers", "", 'model = transformers.AutoModel.from_pretrained("FOLDER")']
  if not agrees:
    load[-1] = 'model = transformers.AutoModel.from_pretrained("FOLDER", trust_remote_code=True)  # runs FOLDER/*.py'
  elif architecture["pool_padding"] == "official":
    load.insert(1, "from pooling import EndPaddedMaxPool  # FOLDER/pooling.py")
    load.append("model.embedder.pooler = EndPaddedMaxPool()  # pads as in training")
  scores = [
    f"| {name} | {key} | {value:.4g} |"
    for name, row in card["scores"].items()
    if isinstance(row, dict)
    for key, value in row.items()
    if isinstance(value, float)
  ]
  return "\n".join(
    [
      "---",
      f"license: {license}",
      "library_name: transformers",
      "pipeline_tag: image-feature-extraction",
      "tags: [simclr, self-supervised, resnet]",
      "---",
      "",
      f"# SimCLR encoder: ResNet-{architecture['depth']} {architecture['width']}x",
      "",
      f"Maps images to h, {card['feature_dimension']} numbers; the projection head is "
      + ("in projector.safetensors." if export.projector else "thrown away."),
      f"Trained on {card['data']}, {card['step']} steps. License of the weights: {card['license']}.",
      "card.json holds the recipe, the scores, the versions and the checksum.",
      "",
      "## Images",
      "",
      f"- RGB, float32 in {preprocessing['range']}",
      f"- the central square of {preprocessing['center_crop']} of the shorter side, resized to {export.size} pixels",
      f"- resize: {preprocessing['resize']}",
      "",
      "preprocessor_config.json comes as near as an image processor can: it resizes first, in whole pixels, and always with",
      "antialiasing. For the numbers of card.json crop first and resize as above.",
      "",
      "## Load",
      "",
      "```python",
      *load,
      "h = model.eval()(pixel_values).pooler_output.flatten(1)  # float32 [n, 3, h, w] -> [n, d]",
      "```",
      "",
      "`python verify.py` compares with 16 images whose h is in example.npz.",
      *(["", "## Scores", "", "| representation | score | value |", "|---|---|---|", *scores] if scores else []),
      "",
    ]
  )
