"""h of this folder with torchvision: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import torch
from card_check import checked, read_card
from from_numpy import from_numpy
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "torchvision", "safetensors")
HEADS = {192: 3, 384: 6, 768: 12}  # of attention, by width


def load_model() -> torch.nn.Module:
  """images [n, 3, size, size] -> h [n, d], in evaluation mode."""
  card = read_card()
  d = card["feature_dimension"]
  model = VisionTransformer(
    image_size=card["preprocessing"]["size"],
    patch_size=card["architecture"]["patch"],
    num_layers=12,
    num_heads=HEADS[d],
    hidden_dim=d,
    mlp_dim=4 * d,
  )
  model.heads = torch.nn.Identity()
  model.load_state_dict(load_file(HERE / "model.safetensors"), strict=True)
  return model.eval()


def load():
  return checked(from_numpy(load_model()), read_card())
