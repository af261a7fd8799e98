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
  """A ResNetModel, or the SimCLRModel of modeling_huggingface.py, in evaluation mode; h is its pooler_output."""
  own = (HERE / "modeling_huggingface.py").exists()
  model = transformers.AutoModel.from_pretrained(HERE, trust_remote_code=own)
  if (HERE / "pooling.py").exists():
    from pooling import EndPaddedMaxPool

    model.embedder.pooler = EndPaddedMaxPool()
  return model.eval()


def load():
  card = read_card()
  model = load_model()
  return checked(from_numpy(lambda images: model(images).pooler_output.flatten(1)), card)
