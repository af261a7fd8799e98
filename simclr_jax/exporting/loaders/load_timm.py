"""h of this folder with timm: images float32 [n, h, w, 3] in [0, 1] -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import json
import pathlib

import timm
import torch
from from_numpy import from_numpy

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "timm", "safetensors")


def load_model() -> torch.nn.Module:
  """images [n, 3, h, w] -> h [n, d], in evaluation mode; timm.data.resolve_model_data_config(model) has its images."""
  model = timm.create_model(f"local-dir:{HERE}", pretrained=True)
  if json.loads((HERE / "card.json").read_text())["architecture"]["pool_padding"] == "official":
    from pooling import EndPaddedMaxPool

    model.maxpool = EndPaddedMaxPool()
  return model.eval()


def load():
  return from_numpy(load_model())
