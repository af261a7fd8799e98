"""The first 10,000 training and 2,000 test images of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist)."""

import pathlib

import numpy as np

CLASS_NAMES = (
  "t-shirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
  """The images of "train" or "test": (uint8 [n, 28, 28], labels [n], naming CLASS_NAMES[label])."""
  with np.load(pathlib.Path(__file__).with_name("fashion_mnist_12k.npz"), allow_pickle=False) as arrays:
    return arrays[f"{name}_images"], arrays[f"{name}_labels"]
