"""Folders for torchvision, timm and Hugging Face transformers: safetensors under their names, configs, model card.

Where the library has the network, its own class loads the weights with strict=True.  What a folder says of its network,
names among them, is in torch_resnets.py and torch_vits.py, which have the same functions.
"""

import json
import re

from safetensors.numpy import save_file

from simclr_jax.exporting import torch_names, torch_resnets, torch_vits

WEIGHTS = "model.safetensors"
NETWORKS = {"resnet": torch_resnets, "vit": torch_vits}


def write(folder, export):
  library, network = export.format, NETWORKS[export.card["architecture"]["name"]]
  save_file(network.state(export), folder / WEIGHTS, metadata={"format": "pt"})
  if export.projector:
    save_file(torch_names.projector(export.projector), folder / "projector.safetensors", metadata={"format": "pt"})
  export.copy(folder, from_numpy="from_numpy.py", **network.files(export))
  if library == "huggingface":
    _write_json(folder / "config.json", network.hugging_face_config(export) | {"dtype": "float32"})
    export.copy(folder, preprocessing="preprocessing.py", image_processing_simclr="image_processing_simclr.py")
    _write_json(folder / "preprocessor_config.json", _preprocessor(export))
    (folder / "README.md").write_text(_readme(export, network))
  if library == "timm":
    _write_json(folder / "config.json", _timm_config(export, network))


def _write_json(path, content):
  path.write_text(json.dumps(content, indent=2) + "\n")


def _preprocessor(export) -> dict:
  return {
    "image_processor_type": "SimCLRImageProcessor",
    "auto_map": {"AutoImageProcessor": "image_processing_simclr.SimCLRImageProcessor"},
    "side": export.size,
    "proportion": export.card["preprocessing"]["center_crop"],
    "interpolation": export.card["pretraining"]["augment"]["resize"] or "bicubic",
  }


def _timm_config(export, network) -> dict:
  preprocessing = export.card["preprocessing"]
  entries, of_weights = network.timm_config(export)
  return {
    **entries,
    "num_classes": 0,
    "num_features": export.card["feature_dimension"],
    "pretrained_cfg": {
      "tag": "simclr",
      "input_size": [3, export.size, export.size],
      "interpolation": "bilinear" if preprocessing["resize"].startswith("bilinear") else "bicubic",
      "crop_pct": preprocessing["center_crop"],
      "crop_mode": "center",
      "mean": [0.0, 0.0, 0.0],
      "std": [1.0, 1.0, 1.0],
      "num_classes": 0,
      "license": export.card["license"],
      **of_weights,
    },
  }


# As the hub calls licenses: https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENSES = {
  "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
  "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc", "unlicense",
}  # fmt: skip


def _license(card) -> list:
  """The lines of the front matter."""
  name = card["license"]
  if name == "not stated":
    return ["license: unknown"]
  if name.lower() in _HUB_LICENSES:
    return [f"license: {name.lower()}"]
  return ["license: other", f"license_name: {re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}"]


def _method(training: dict) -> str:
  """The method, or the program, that a card says made the weights."""
  program = training.get("program", "pretrain")
  return training.get("method", "simclr") if program in ("pretrain", "import") else program


def _readme(export, network) -> str:
  """The model card, with the front matter that the Hugging Face hub reads."""
  card, usage = export.card, network.usage(export)
  preprocessing, method = card["preprocessing"], _method(card["pretraining"])
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
      *_license(card),
      "library_name: transformers",
      "pipeline_tag: image-feature-extraction",
      f"tags: [{method}, {card['architecture']['name']}]",
      "---",
      "",
      f"# Image encoder: {network.title(export)}",
      "",
      f"Maps images to features h of {card['feature_dimension']} dimensions. The projection head is "
      + ("in projector.safetensors." if export.projector else "not included."),
      f"Training: {method} on {card['data']}, {card['step']} steps. License of the weights: {card['license']}.",
      "card.json holds the recipe, the scores, the versions and the checksum.",
      "",
      "## Usage",
      "",
      "The image processor and, where transformers has no such network, the model are the Python files of this folder:",
      "`trust_remote_code=True` runs them. Read them first.",
      "",
      "```python",
      'folder = "."  # or huggingface_hub.snapshot_download("NAME/REPOSITORY")',
      *usage["before"],
      "import torch",
      "from PIL import Image",
      "from transformers import AutoImageProcessor, AutoModel",
      "",
      "processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)",
      f"model = AutoModel.from_pretrained(folder{usage['arguments']}).eval()",
      *usage["after"],
      'image = Image.new("RGB", (640, 480))  # yours: Image.open(FILE)',
      "with torch.inference_mode():",
      f'  h = model(**processor(image, return_tensors="pt")){usage["h"]}',
      f"print(h.shape)  # [1, {card['feature_dimension']}]",
      "```",
      "",
      "`python verify.py` compares h of 16 images with the values in example.npz.",
      "",
      "## Images",
      "",
      "The processor does what the evaluation of this encoder does:",
      "",
      f"- RGB, float32 in {preprocessing['range']}",
      f"- the central square of {preprocessing['center_crop']} of the shorter side, resized to {export.size} pixels",
      f"- resize: {preprocessing['resize']}",
      *(["", "## Scores", "", "| representation | score | value |", "|---|---|---|", *scores] if scores else []),
      "",
    ]
  )
