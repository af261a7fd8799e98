"""Runs load.py on the 16 images of example.npz and compares with the encoder's own h, which is stored beside them."""

import importlib.metadata
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
TOLERANCE = 1e-5  # max |a - b| / max |b|


def main() -> int:
  from load import LIBRARIES, load

  example = np.load(HERE / "example.npz")
  card = json.loads((HERE / "card.json").read_text())
  outputs = load()(example["images"].astype(np.float32) / 255)
  names = ("h", "z") if "projector" in card else ("h",)
  worst = 0.0
  for name, found in zip(names, outputs if len(names) > 1 else (outputs,), strict=True):
    found, expected = np.asarray(found), example[name]
    assert found.shape == expected.shape and found.dtype == np.float32, (name, found.shape, found.dtype)
    worst = float(np.maximum(worst, np.abs(found - expected).max() / np.abs(expected).max()))  # a NaN stays one
  versions = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
  line = f"largest relative difference {worst:.2g} on {len(example['images'])} images ({versions})"
  rounding = float(example["rounding"])
  reason = f"h moves by {rounding:.2g} when the images change by 1e-07"
  if worst <= TOLERANCE:
    print(line)
  elif worst <= 10 * rounding:
    print(f"{line}: this is float32 rounding, since {reason}")
  else:
    print(f"{line}: more than {TOLERANCE} and than rounding explains, since {reason}")
    return 1
  return 0


def _version(name: str) -> str:
  """Of a library, which may be installed under another name, such as onnxruntime-gpu."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    others = importlib.metadata.packages_distributions().get(name)
    return importlib.metadata.version(others[0]) if others else "of unknown version"


if __name__ == "__main__":
  sys.exit(main())
