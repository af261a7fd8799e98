"""h of this folder with torchvision: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import torch
from card_check import checked, read_card
from from_numpy import from_numpy
from safetensors.torch import load_file
from torchvision.models.resnet import Bottleneck, ResNet

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "torchvision", "safetensors")
BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3], 200: [3, 24, 36, 3]}


def load_model() -> torch.nn.Module:
  """images [n, 3, h, w] -> h [n, d], in evaluation mode."""
  architecture = read_card()["architecture"]
  model = ResNet(Bottleneck, BLOCKS[architecture["depth"]])
  model.fc = torch.nn.Identity()
  model.load_state_dict(load_file(HERE / "model.safetensors"), strict=True)
  if architecture["pool_padding"] == "official":
    from pooling import EndPaddedMaxPool

    model.maxpool = EndPaddedMaxPool()
  return model.eval()


def load():
  return checked(from_numpy(load_model()), read_card())
