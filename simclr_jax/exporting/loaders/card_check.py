"""This folder: its card, read only where every file is the one that was written."""

import hashlib
import json
import pathlib

from image_check import check_images

HERE = pathlib.Path(__file__).resolve().parent


def read_card() -> dict:
  """card.json.

  Raises:
    ValueError: a file is missing, or its SHA-256 is not the one in the card.
  """
  card = json.loads((HERE / "card.json").read_text())
  for name, digest in card["files"].items():
    sha = hashlib.sha256()
    try:
      with open(HERE / name, "rb") as file:
        while chunk := file.read(1 << 20):
          sha.update(chunk)
    except FileNotFoundError:
      raise ValueError(f"{HERE / name} is missing: copy the folder again") from None
    if sha.hexdigest() != digest:
      raise ValueError(f"{HERE / name} is damaged, its SHA-256 is not the one in card.json: copy the folder again")
  return card


def checked(encode, card):
  """`encode` of images that are checked first: uint8 is scaled to [0, 1], another range or size is a ValueError."""

  def encode_checked(images):
    return encode(check_images(images, card["preprocessing"]["size"]))

  encode_checked.model = encode  # what it needs lives as long as it does
  return encode_checked
