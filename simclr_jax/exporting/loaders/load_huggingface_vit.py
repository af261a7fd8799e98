"""h of this folder with transformers: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import torch
import transformers
from card_check import checked, read_card
from from_numpy import from_numpy

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "safetensors")


def load_model() -> torch.nn.Module:
  """A ViTModel without pooling layer, in evaluation mode."""
  return transformers.AutoModel.from_pretrained(HERE, add_pooling_layer=False).eval()


def load():
  card, model = read_card(), load_model()

  def encode(images):
    tokens = model(images).last_hidden_state
    return tokens[:, 0] if card["architecture"]["pool"] == "token" else tokens[:, 1:].mean(1)

  return checked(from_numpy(encode), card)
