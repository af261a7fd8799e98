"""What a folder for torchvision, timm or Hugging Face says of a ResNet; see torch_folders.py.

torch's max-pool pads on all sides; an encoder with pool_padding="official" gets pooling.py, whose module takes the place of
that pool and makes h exact.  Where the library has no such network (ResNet-18 and -34 of the official code, widths,
selective kernels, squeeze-excite, the CIFAR stem), the folder has modeling_simclr.py, which needs torch alone.
"""

from simclr_jax.encoder import DEPTHS
from simclr_jax.exporting import torch_names


def state(export) -> dict:
  """Tensors under the names of the library, or below the attribute of modeling_huggingface.py that holds the network."""
  found = torch_names.encoder(export.variables)
  if export.format != "huggingface":
    return found
  return torch_names.hugging_face(found) if _agrees(export) else {f"resnet.{name}": x for name, x in found.items()}


def files(export) -> dict:
  """{name: file of loaders/}."""
  agrees, library = _agrees(export), export.format
  own = {} if agrees else {"modeling_simclr": "modeling_simclr.py"}
  if library == "huggingface" and not agrees:
    own |= {"modeling_huggingface": "modeling_huggingface.py"}
  if agrees and _pads_at_end(export):
    own |= {"pooling": "pooling.py"}
  return own | {"load": f"load_{library if agrees or library == 'huggingface' else 'modeling'}.py"}


def hugging_face_config(export) -> dict:
  architecture = export.architecture
  if not _agrees(export):
    return {
      "model_type": "simclr",
      "architectures": ["SimCLRModel"],
      "auto_map": {
        "AutoConfig": "modeling_huggingface.SimCLRConfig",
        "AutoModel": "modeling_huggingface.SimCLRModel",
      },
      "network": {  # keyword arguments of modeling_simclr.ResNet
        key: architecture[key] for key in ("depth", "width", "sk_ratio", "se_ratio", "stem", "pool_padding")
      },
      "hidden_size": export.card["feature_dimension"],
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
  }


def timm_config(export) -> tuple[dict, dict]:
  """(config.json's own entries, those of its pretrained_cfg); for a network that timm has not, an architecture that timm
  refuses by its name, which modeling_simclr.py has."""
  name = f"resnet{export.architecture['depth']}"
  return (
    {"architecture": name if _agrees(export) else f"simclr_{name}"},
    {"fixed_input_size": False, "pool_size": None, "first_conv": "conv1", "classifier": "fc"},
  )


def title(export) -> str:
  return f"ResNet-{export.architecture['depth']}, width {export.architecture['width']:g}"


def usage(export) -> dict:
  """Python of the model card: lines `before` and `after` the model is loaded, `arguments` of from_pretrained, and what
  makes h of the model's outputs."""
  before, after = [], []
  if _agrees(export) and _pads_at_end(export):
    before = ["import sys", "", "sys.path.insert(0, folder)", "from pooling import EndPaddedMaxPool", ""]
    after = ["model.embedder.pooler = EndPaddedMaxPool()  # pads as in training"]
  arguments = "" if _agrees(export) else ", trust_remote_code=True"
  return {"before": before, "after": after, "arguments": arguments, "h": ".pooler_output.flatten(1)"}


def _agrees(export) -> bool:
  return torch_names.agrees(export.architecture, export.format)


def _pads_at_end(export) -> bool:
  return export.architecture["pool_padding"] == "official"
