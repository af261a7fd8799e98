"""Folders for torchvision, timm and Hugging Face transformers: safetensors under their names, configs, model card.

Where the library has the network, its own class loads the weights with strict=True.  Its max-pool pads on all sides; an
encoder with pool_padding="official" gets pooling.py, whose module takes the place of that pool and makes h exact.  Where
the library has no such network (ResNet-18 and -34 of the official code, widths, selective kernels, squeeze-excite, the
CIFAR stem), the folder has modeling_simclr.py, which needs torch alone.
"""

import json
import re

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
    export.copy(folder, preprocessing="preprocessing.py", image_processing_simclr="image_processing_simclr.py")
    _write_json(folder / "preprocessor_config.json", _preprocessor(export))
    (folder / "README.md").write_text(_readme(export, agrees))
  if library == "timm":
    _write_json(folder / "config.json", _timm_config(export, agrees))
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
  return {
    "image_processor_type": "SimCLRImageProcessor",
    "auto_map": {"AutoImageProcessor": "image_processing_simclr.SimCLRImageProcessor"},
    "side": export.size,
    "proportion": export.card["preprocessing"]["center_crop"],
    "interpolation": export.card["pretraining"]["augment"]["resize"] or "bicubic",
  }


def _timm_config(export, agrees) -> dict:
  """For a network that timm has not, an architecture that timm refuses by its name; modeling_simclr.py has it."""
  preprocessing, depth = export.card["preprocessing"], export.architecture["depth"]
  return {
    "architecture": f"resnet{depth}" if agrees else f"simclr_resnet{depth}",
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


def _readme(export, agrees) -> str:
  """The model card, with the front matter that the Hugging Face hub reads."""
  card, architecture = export.card, export.architecture
  preprocessing = card["preprocessing"]
  before, after = [], []
  if agrees and architecture["pool_padding"] == "official":
    before = ["import sys", "", "sys.path.insert(0, folder)", "from pooling import EndPaddedMaxPool", ""]
    after = ["model.embedder.pooler = EndPaddedMaxPool()  # pads as in training"]
  trust = "" if agrees else ", trust_remote_code=True"
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
      "tags: [simclr, self-supervised, resnet]",
      "---",
      "",
      f"# SimCLR encoder: ResNet-{architecture['depth']}, width {architecture['width']:g}",
      "",
      f"Maps images to features h of {card['feature_dimension']} dimensions. The projection head is "
      + ("in projector.safetensors." if export.projector else "not included."),
      f"Trained on {card['data']} for {card['step']} steps. License of the weights: {card['license']}.",
      "card.json holds the recipe, the scores, the versions and the checksum.",
      "",
      "## Usage",
      "",
      "The image processor and, where transformers has no such network, the model are the Python files of this folder:",
      "`trust_remote_code=True` runs them. Read them first.",
      "",
      "```python",
      'folder = "."  # or huggingface_hub.snapshot_download("NAME/REPOSITORY")',
      *before,
      "import torch",
      "from PIL import Image",
      "from transformers import AutoImageProcessor, AutoModel",
      "",
      "processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)",
      f"model = AutoModel.from_pretrained(folder{trust}).eval()",
      *after,
      'image = Image.new("RGB", (640, 480))  # yours: Image.open(FILE)',
      "with torch.inference_mode():",
      '  h = model(**processor(image, return_tensors="pt")).pooler_output.flatten(1)',
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
