"""h of this folder with timm: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import timm
import torch
from card_check import checked, read_card
from from_numpy import from_numpy

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "timm", "safetensors")


def load_model() -> torch.nn.Module:
  """images [n, 3, h, w] -> h [n, d], in evaluation mode; timm.data.resolve_model_data_config(model) has its images."""
  model = timm.create_model(f"local-dir:{HERE}", pretrained=True)
  if (HERE / "pooling.py").exists():
    from pooling import EndPaddedMaxPool

    model.maxpool = EndPaddedMaxPool()
  return model.eval()


def load():
  return checked(from_numpy(load_model()), read_card())
