"""This package's variables with the names and layouts of PyTorch's ResNets."""

import re

import numpy as np
from flax import traverse_util

from simclr_jax.encoder import DEPTHS

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# As timm calls the three convolutions of a ResNet-D stem and the two of squeeze-excite.
_STEM = {
  "stem_conv": "conv1",
  "stem_norm": "bn1",
  "stem_conv1": "conv1.0",
  "stem_norm1": "conv1.1",
  "stem_conv2": "conv1.3",
  "stem_norm2": "conv1.4",
  "stem_conv3": "conv1.6",
  "stem_norm3": "bn1",
}
_BLOCK = {
  "shortcut_conv": "downsample.0",
  "shortcut_norm": "downsample.1",
  "norm1": "bn1",
  "norm2": "bn2",
  "norm3": "bn3",
  "sk/conv": "conv2.conv",
  "sk/norm": "conv2.bn",
  "sk/reduce_conv": "conv2.reduce",
  "sk/reduce_norm": "conv2.reduce_bn",
  "sk/expand_conv": "conv2.expand",
  "se/reduce_conv": "se.fc1",
  "se/expand_conv": "se.fc2",
}


def agrees(architecture: dict, library: str) -> bool:
  """Whether torchvision, timm or huggingface has this network, but for where its max-pool pads.

  Their ResNet-18 and -34 have no convolution in the first shortcut, ours, as the official code's, has; their wider
  ResNet-50s are wider inside the blocks alone, but Hugging Face's can be as ours.
  """
  _, bottleneck = DEPTHS[architecture["depth"]]
  plain = architecture["stem"] == "imagenet" and not architecture["sk_ratio"] and not architecture["se_ratio"]
  return bottleneck and plain and (architecture["width"] == 1 or library == "huggingface")


def encoder(variables: dict) -> dict:
  """f's state dict as torchvision and timm name it: numpy, convolutions OIHW, float32 but for num_batches_tracked."""
  out = {}
  for collection in ("params", "batch_stats"):
    for path, value in traverse_util.flatten_dict(variables[collection], sep="/").items():
      *modules, leaf = path.split("/")
      if modules[0] in _STEM:
        module = _STEM[modules[0]]
      else:
        group, block, name = int(modules[0][5:]), int(modules[1][5:]), "/".join(modules[2:])
        module = f"layer{group}.{block - 1}.{_BLOCK.get(name, name)}"
      out[f"{module}.{_LEAVES[leaf]}"] = np.ascontiguousarray(
        value.transpose(3, 2, 0, 1) if leaf == "kernel" else value
      )
      if leaf == "mean":
        out[f"{module}.num_batches_tracked"] = np.zeros((), np.int64)
  return dict(sorted(out.items()))


def hugging_face(state: dict) -> dict:
  """The same under the names of transformers.ResNetModel."""

  def rename(name):
    name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
    name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    name = name.replace(".downsample.0.", ".shortcut.convolution.").replace(
      ".downsample.1.", ".shortcut.normalization."
    )
    name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
    return re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)

  return {rename(name): value for name, value in state.items()}


def projector(variables: dict) -> dict:
  """g's as that of a torch.nn.Sequential of Linear without bias, BatchNorm1d and ReLU, over and over, but the last ReLU.

  Our last BatchNorm has no bias: there it is 0.
  """
  params, stats, out = variables["params"], variables["batch_stats"], {}
  for i in range(len(stats)):
    scale = params[f"norm{i}"]["scale"]
    out[f"{3 * i}.weight"] = np.ascontiguousarray(params[f"dense{i}"]["kernel"].T)
    out[f"{3 * i + 1}.weight"] = scale
    out[f"{3 * i + 1}.bias"] = params[f"norm{i}"].get("bias", np.zeros_like(scale))
    out[f"{3 * i + 1}.running_mean"] = stats[f"norm{i}"]["mean"]
    out[f"{3 * i + 1}.running_var"] = stats[f"norm{i}"]["var"]
    out[f"{3 * i + 1}.num_batches_tracked"] = np.zeros((), np.int64)
  return out
