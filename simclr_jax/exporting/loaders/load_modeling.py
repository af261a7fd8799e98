"""h of this folder with torch and modeling_simclr.py: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import torch
from card_check import checked, read_card
from from_numpy import from_numpy
from modeling_simclr import ResNet
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "safetensors")


def load_model() -> torch.nn.Module:
  """images [n, 3, h, w] -> h [n, d], in evaluation mode."""
  architecture = read_card()["architecture"]
  names = ("depth", "width", "sk_ratio", "se_ratio", "stem", "pool_padding")
  model = ResNet(**{name: architecture[name] for name in names})
  model.load_state_dict(load_file(HERE / "model.safetensors"), strict=True)
  return model.eval()


def load():
  return checked(from_numpy(load_model()), read_card())
