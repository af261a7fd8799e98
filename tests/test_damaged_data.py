"""Damaged files in every form we know: named, counted, replaced."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from images import encoded, gradient, png, save
from PIL import Image
from test_stream import take

from simclr_jax import augment, data


def jpeg(**options):
  return encoded(gradient(64, 96), "JPEG", **{"quality": 90, **options})


def frames(kind):
  moving = [Image.fromarray(np.roll(gradient(), 5 * i, 1)) for i in range(3)]
  return encoded(moving[0], kind, save_all=True, append_images=moving[1:])


def lying_jpeg():
  body = bytearray(jpeg())
  frame = body.index(b"\xff\xc0")
  body[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
  return bytes(body)


def flipped_byte():
  body = bytearray(jpeg())
  body[len(body) // 2] ^= 0x08
  return bytes(body)


def rotated():
  exif = Image.Exif()
  exif[0x0112] = 6
  return jpeg(exif=exif)


gray = gradient()[..., 0]
rgba = np.dstack([gradient(), gray])
# name: (bytes, shape, or the words of the reason for refusing it)
CASES = {
  "plain jpeg": (jpeg, (64, 96)),
  "progressive jpeg": (lambda: jpeg(progressive=True), (64, 96)),
  "gray jpeg": (lambda: encoded(gray, "JPEG"), (24, 40)),
  "cmyk jpeg": (lambda: encoded(Image.fromarray(np.dstack([rgba]), "CMYK"), "JPEG"), (24, 40)),
  "rotated by exif": (rotated, (96, 64)),
  "trailing bytes": (lambda: jpeg() + b"junk" * 9, (64, 96)),
  "flipped byte": (flipped_byte, (64, 96)),  # libjpeg decodes it: nothing in the file says otherwise
  "png": (lambda: encoded(gradient(), "PNG"), (24, 40)),
  "bmp": (lambda: encoded(gradient(), "BMP"), (24, 40)),
  "gif": (lambda: encoded(gradient(), "GIF"), (24, 40)),
  "webp": (lambda: encoded(gradient(), "WEBP"), (24, 40)),
  "palette png": (lambda: encoded(Image.fromarray(gradient()).quantize(64), "PNG"), (24, 40)),
  "16-bit gray png": (lambda: encoded(gray.astype(np.uint16) * 257, "PNG"), (24, 40)),
  "rgba png": (lambda: encoded(rgba, "PNG"), (24, 40)),
  "one pixel": (lambda: encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), (1, 1)),
  "empty": (lambda: b"", "empty"),
  "garbage": (lambda: bytes(range(256)) * 20, "not a jpeg"),
  "html": (lambda: b"<html><body>404</body></html>", "not a jpeg"),
  "tiff": (lambda: encoded(gradient(), "TIFF"), (24, 40)),
  "half a jpeg": (lambda: jpeg()[: len(jpeg()) // 2], "broken jpeg"),
  "jpeg without its end": (lambda: jpeg()[:-2], "broken jpeg"),
  "jpeg header alone": (lambda: jpeg()[:4], "broken jpeg"),
  "half a png": (lambda: encoded(gradient(200, 200), "PNG")[:400], "broken png"),
  "animated gif": (lambda: frames("GIF"), "animated gif"),
  "animated webp": (lambda: frames("WEBP"), "animated webp"),
  "png bomb": (lambda: png(20000, 20000, 8, 2, zlib.compress(b"\0" * 10**6)), "above the limit"),
  "jpeg header that lies": (lying_jpeg, "above the limit"),
}


def test_every_kind_of_file_under_a_wrong_name(tmp_path):
  """All 27 in one folder, all named .jpg: an epoch has its length, and exactly the bad ones are counted and named."""
  assert len(CASES) == 27
  files = {name: make() for name, (make, _) in CASES.items()}
  for name, body in files.items():
    (tmp_path / f"{name}.jpg").write_bytes(body)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=8)  # noqa: E731
  stream = data.train_stream(source, transform, batch_size=27, seed=0, max_bad_fraction=1.0)
  batch = next(stream)
  assert batch["views"].shape == (27, 2, 8, 8, 3)
  bad = {name.rpartition("/")[2].removesuffix(".jpg"): reason for name, reason in stream.bad.items()}
  for name, (_, expected) in CASES.items():
    if isinstance(expected, str):
      assert expected in bad.pop(name), name
    else:
      assert data.decode(files[name]).shape == (*expected, 3), name
  assert not bad
  whole = next(data.train_stream(source, None, batch_size=27, seed=0, max_bad_fraction=1.0, canvas=64))
  assert whole["views"]["image"].shape == (27, 64, 64, 3)
  for image, (height, width), i in zip(*whole["views"].values(), whole["index"], strict=True):
    expected = data.decode(files[source.name(i).rpartition("/")[2].removesuffix(".jpg")])
    if max(expected.shape) <= 64:
      np.testing.assert_array_equal(image[:height, :width], expected)
    else:
      assert (height, width) == tuple(-(-side // 2) for side in expected.shape[:2])
    assert not image[height:].any() and not image[:, width:].any()


def test_good_images_of_a_call_with_a_bad_one_are_what_they_are_without(tmp_path):
  """A call of TensorFlow fails as a whole; what its good images become must not show it."""
  for i in range(20):
    save(tmp_path / f"{i:02}.jpg", np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8), quality=90)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=16)  # noqa: E731
  good = next(data.train_stream(source, transform, batch_size=20, seed=0))
  whole = (tmp_path / "07.jpg").read_bytes()
  (tmp_path / "07.jpg").write_bytes(whole[:-40])
  stream = data.train_stream(source, transform, batch_size=20, seed=0, max_bad_fraction=0.1)
  mixed = next(stream)
  same = good["index"] != 7
  assert len(stream.bad) == 1 and same.sum() == 19
  np.testing.assert_array_equal(mixed["views"][same], good["views"][same])


WAYS = (
  lambda b: b"",
  lambda b: b[: len(b) // 2],
  lambda b: b[:-2],
  lambda b: b[:20],
  lambda b: b"<html>" + b,
  lambda b: bytes(len(b)),
  lambda b: frames("GIF"),
  lambda b: encoded(gradient(), "TIFF")[:300],
  lambda b: png(20000, 20000, 8, 2, b"\0"),
  lambda b: encoded(gradient(200, 200), "PNG")[:300],
)


@pytest.mark.slow
def test_ten_thousand_files_of_which_three_in_a_hundred_are_damaged(tmp_path):
  """One epoch: as many examples as files, exactly 300 counted and named, in the log file too."""
  rng = np.random.default_rng(0)
  good = [encoded(rng.integers(0, 256, (32, 40, 3), np.uint8), "JPEG", quality=90) for _ in range(20)]
  damaged = {}
  for k, i in enumerate(rng.permutation(10_000)[:300]):
    damaged[int(i)] = k % 10
  for i in range(10_000):
    body = good[i % 20]
    (tmp_path / f"{i:05}.jpg").write_bytes(WAYS[damaged[i]](body) if i in damaged else body)
  source = data.FolderSource(str(tmp_path))
  transform = lambda image, seed: augment.two_crops(image, seed, size=16)  # noqa: E731
  bad_file = tmp_path / "unreadable.txt"
  stream = data.train_stream(
    source, transform, batch_size=100, seed=0, max_bad_fraction=0.03, bad_file=str(bad_file)
  )  # fmt: skip
  rows = sum(len(batch["index"]) for batch in take(stream, 100))
  named = {int(name[-9:-4]) for name in stream.bad}
  assert rows == 10_000 and len(stream.bad) == 300 and named == set(damaged)
  assert len(bad_file.read_text().splitlines()) == 300
  with pytest.raises(ValueError, match="200 allowed"):
    take(data.train_stream(source, transform, batch_size=100, seed=0, max_bad_fraction=0.02), 100)


@pytest.mark.slow
def test_resume_at_step_1000(tmp_path):
  """A fresh process at step 1,000 has its first batch, the same bytes, within 10 seconds; hosts 4 against 1 too."""
  rng = np.random.default_rng(0)
  for i in range(4096):
    save(tmp_path / f"{i:04}.jpg", rng.integers(0, 256, (32, 40, 3), np.uint8), quality=90)
  code = (
    "import sys, time, hashlib; start = time.time()\n"
    "from simclr_jax import augment, data\n"
    "s = data.FolderSource(sys.argv[1]); step, hosts = int(sys.argv[2]), int(sys.argv[3])\n"
    "t = lambda image, seed: augment.two_crops(image, seed, size=32)\n"
    "for h in range(hosts):\n"
    "  stream = data.train_stream(s, t, batch_size=64, seed=5, start_step=step, process_index=h, process_count=hosts)\n"
    "  for _ in range(int(sys.argv[4])): batch = next(stream)\n"
    "  for row, seed in zip(batch['views'], batch['seed']):\n"
    "    print(hashlib.sha256(row.tobytes() + seed.tobytes()).hexdigest())\n"
    "print(time.time() - start)"
  )

  def child(*arguments):
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, seconds = done.stdout.split()
    return rows, float(seconds)

  straight, _ = child("900", "1", "101")  # a run that gets to step 1,000 from step 900
  resumed, seconds = child("1000", "1", "1")
  split, _ = child("1000", "4", "1")
  assert len(straight) == 64 and resumed == straight and split == straight
  assert seconds < 10, seconds
