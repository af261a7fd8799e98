"""A torch model, and the projection head beside it if there is one, as a function of numpy arrays."""

import pathlib

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent


def load_projector():
  """The head g as nn.Sequential, h [n, d] -> z, or None where the folder has none."""
  if not (HERE / "projector.safetensors").exists():
    return None
  tensors = load_file(HERE / "projector.safetensors")
  layers = []
  for i in range(0, 3 * len(tensors) // 6, 3):
    width, inputs = tensors[f"{i}.weight"].shape
    layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
  projector = nn.Sequential(*layers[:-1])
  projector.load_state_dict(tensors, strict=True)
  return projector.eval()


def from_numpy(model):
  """images float32 [n, h, w, 3] in [0, 1] -> h [n, d], or (h, z); `model` maps [n, 3, h, w] to h."""
  projector = load_projector()

  @torch.inference_mode()
  def encode(images):
    h = model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)))
    return (h.numpy(), projector(h).numpy()) if projector else h.numpy()

  return encode
