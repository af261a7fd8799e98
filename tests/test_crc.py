"""The checksum of TFRecord."""

import time

import numpy as np
import pytest
from images import encoded

from simclr_jax import data
from simclr_jax.data import crc, shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def by_bits(body):
  register = 0xFFFFFFFF
  for byte in body:
    register ^= byte
    for _ in range(8):
      register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
  value = register ^ 0xFFFFFFFF
  return ((value >> 15 | value << 17) + 0xA282EAD8) % 2**32


def test_it_is_that_of_the_definition():
  check = by_bits(b"123456789")
  assert check == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32  # RFC 3720, B.4
  rng = np.random.default_rng(0)
  for length in (*range(70), 96, 127, 128, 129, 1000, 4099):
    body = rng.bytes(length)
    assert crc.masked_crc(body) == by_bits(body), length
  rows = rng.integers(0, 256, (5, 8), np.uint8)
  assert crc.masked_crcs(rows).tolist() == [by_bits(row.tobytes()) for row in rows]


def test_no_flipped_bit_is_read_as_another_image_or_label(tmp_path):
  """Bits all over a file in turn: the set is refused, or the record is named as damaged, or it is what it was."""
  path = tmp_path / "a.tfrecord"
  rows = [(encoded(np.full((2, 2, 3), i, np.uint8), "PNG"), i, f"{i}") for i in range(2)]
  shards.write_tfrecord(str(path), rows)
  whole = path.read_bytes()
  good = data.open_source(f"tfrecord:{path}")
  expected = [good.read_labeled(i) for i in range(2)]
  refused = damaged = 0
  flips = [*range(14), *range(14, len(whole), 7)]
  for at in flips:
    body = bytearray(whole)
    body[at] ^= 1 << at % 8
    path.write_bytes(body)
    try:
      source = data.open_source(f"tfrecord:{path}")
      assert len(source) == 2
    except ValueError as error:
      assert "cut off or damaged after" in str(error)
      refused += 1
      continue
    for i in range(2):
      try:
        image, label = source.read_labeled(i)
      except data.BadImage as reason:
        assert "checksum" in str(reason)
        damaged += 1
        continue
      np.testing.assert_array_equal(image, expected[i][0])
      assert label == expected[i][1]
  second = int.from_bytes(whole[:8], "little") + 16
  headers = [at for at in flips if at < 12 or second <= at < second + 12]  # the lengths with their checksums
  assert refused == len(headers) > 12 and damaged == len(flips) - len(headers)


@pytest.mark.slow
def test_what_it_costs(capsys):
  """Processor time of the checksum of a record beside that of decoding it, in one run."""
  from PIL import Image

  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (50, 66, 3), np.uint8)).resize((500, 375))
  body = encoded(picture, "JPEG", quality=96)
  times = []
  for work in (crc.masked_crc, data.decode):
    work(body)
    start = time.process_time()
    for _ in range(100):
      work(body)
    times.append((time.process_time() - start) / 100)
  with capsys.disabled():
    print(f"\n{len(body):,} bytes: checksum {1000 * times[0]:.2f} ms, decoding {1000 * times[1]:.2f} ms")
  assert times[0] < times[1]
