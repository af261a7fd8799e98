"""Pictures for tests, in memory and as files."""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageEnhance

from simclr_jax import data


def gradient(height=24, width=40):
  """A smooth color picture, uint8 [height, width, 3], with no symmetry: survives JPEG within a few levels."""
  y, x = np.mgrid[:height, :width]
  return np.stack([255 * x / width, 255 * y / height, 128 + 100 * x * y / (width * height)], -1).astype(np.uint8)


def encoded(picture, kind, **options):
  picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()


def save(path, picture, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(picture).save(path, **options)


def numbered(n, size=4):
  """n images of which image i is all i."""
  return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, size, size)).copy()


def png(width, height, depth, color, raw):
  """A PNG written by hand, for headers and depths that Pillow does not write."""

  def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

  header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def folder(path, count=300, seed=0) -> dict:
  """A folder such as people have: `count` unlabeled JPEGs of several sizes, and what a look at it should find.

  Returns:
    dict(pairs {kind: (file, file)}, outlier, broken): names of files.
  """
  path, rng = pathlib.Path(path), np.random.default_rng(seed)
  path.mkdir(parents=True)
  source = data.open_source("textures64:train")
  images = []
  for i in range(count):
    image = Image.fromarray(source.read(i))
    width, height = rng.integers(120, 260, 2).tolist()
    images.append(image.resize((width, height), Image.Resampling.BICUBIC))
    images[-1].save(path / f"img_{i:04}.jpg", quality=92)
  first = path / "img_0010.jpg"
  (path / "copy_exact.jpg").write_bytes(first.read_bytes())
  images[20].resize((images[20].width * 3 // 4, images[20].height * 3 // 4)).save(path / "copy_small.jpg", quality=40)
  ImageEnhance.Brightness(images[30]).enhance(1.25).save(path / "copy_bright.jpg", quality=90)
  w, h = images[40].size
  images[40].crop((w // 30, h // 30, w - w // 30, h - h // 30)).save(path / "copy_cropped.jpg", quality=90)
  boot = Image.fromarray(data.open_source("fashion:test").read(0))
  boot.resize((224, 224), Image.Resampling.BICUBIC).save(path / "odd_one.jpg", quality=92)
  (path / "cut_off.jpg").write_bytes((path / "img_0000.jpg").read_bytes()[:2000])
  (path / "notes.txt").write_text("not an image")
  pairs = {"exact": 10, "small": 20, "bright": 30, "cropped": 40}
  return {
    "pairs": {kind: (f"copy_{kind}.jpg", f"img_{i:04}.jpg") for kind, i in pairs.items()},
    "outlier": "odd_one.jpg",
    "broken": "cut_off.jpg",
  }
