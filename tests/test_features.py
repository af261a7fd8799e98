"""`simclr embed`: the same numbers in three formats, and the same bytes however the work was interrupted."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors
import tiny

from simclr_jax import augment, data, load_encoder
from simclr_jax.evaluation import features
from simclr_jax.programs import embed
from simclr_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")

GOLDEN = pathlib.Path(__file__).parent / "golden" / "old_run"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  return tiny.export(tmp_path_factory.mktemp("export") / "encoder")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
  return tiny.npz(tmp_path_factory.mktemp("data") / "tiny.npz", 70)


def test_three_formats_hold_the_same(encoder, spec, tmp_path):
  pytest.importorskip("pyarrow")
  made = [features.load(embed.run(encoder, spec, tmp_path / f"h{ending}")) for ending in features.FORMATS]
  source, (apply, _, card) = data.open_source(spec), load_encoder(encoder)
  assert made[0].h.shape == (70, card["feature_dimension"]) and made[0].h.dtype == np.float32
  np.testing.assert_array_equal(made[0].label, source.labels)
  assert made[0].name.tolist() == [source.name(i) for i in range(70)] and made[0].data == spec
  images = np.stack([np.asarray(augment.center_crop(source.read(i), size=16, proportion=1.0)) for i in range(70)])
  np.testing.assert_allclose(made[0].h, apply(images), rtol=1e-4, atol=1e-5)
  for other in made[1:]:
    for key in ("h", "name", "label", "index"):
      np.testing.assert_array_equal(getattr(made[0], key), getattr(other, key))
    assert (other.data, other.encoder) == (made[0].data, made[0].encoder)


def test_the_safetensors_package_reads_it(encoder, spec, tmp_path):
  path = embed.run(encoder, spec, tmp_path / "h.safetensors")
  with safetensors.safe_open(path, "numpy") as file:
    assert file.get_tensor("h").shape[0] == 70 and set(file.keys()) == {"h", "name", "label", "index"}
    assert "name" not in file.metadata()  # of which the format allows 100 MB
    assert json.loads(file.get_tensor("name").tobytes()) == features.load(path).name.tolist()


def test_a_file_of_the_first_version_still_loads():
  made = features.load(GOLDEN / "h.safetensors")
  assert made.h.shape == (96, 8) and made.h.dtype == np.float32 and np.isfinite(made.h).all()
  assert made.name[5] == "npz:tiny.npz:5" and made.index.tolist() == list(range(96)) and made.data == "npz:tiny.npz"


def test_stopped_and_gone_on_with_are_the_same_bytes(encoder, spec, tmp_path, monkeypatch, capsys):
  whole = embed.run(encoder, spec, tmp_path / "whole.npz", images_per_part=16).read_bytes()
  save, saved = embed._save, []

  def stop_after_two(path, arrays):
    save(path, arrays)
    saved.append(path)
    if len(saved) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(embed, "_save", stop_after_two)
  with pytest.raises(KeyboardInterrupt):
    embed.run(encoder, spec, tmp_path / "h.npz", images_per_part=16)
  assert not (tmp_path / "h.npz").exists() and len(list((tmp_path / "h.npz.parts").glob("part-*"))) == 2
  monkeypatch.setattr(embed, "_save", save)
  capsys.readouterr()
  assert embed.run(encoder, spec, tmp_path / "h.npz", images_per_part=16).read_bytes() == whole
  assert "2 of 5 parts are already there" in capsys.readouterr().out
  assert not (tmp_path / "h.npz.parts").exists()


def test_unreadable_images_are_named_and_left_out(encoder, tmp_path):
  from PIL import Image

  folder = tmp_path / "images"
  folder.mkdir()
  source = tiny.source(6)
  for i in range(6):
    Image.fromarray(source.read(i)).save(folder / f"{i}.png")
  (folder / "2.png").write_bytes(b"no image")
  (folder / "7.png").write_bytes((folder / "1.png").read_bytes()[:60])  # in a part of its own
  made = features.load(embed.run(encoder, f"files:{folder}", tmp_path / "h.npz", images_per_part=3))
  assert [name[-5] for name in made.name] == list("01345") and made.index.tolist() == [0, 1, 3, 4, 5]
  lines = (tmp_path / "h.npz.unreadable.txt").read_text().splitlines()
  assert [line.partition("\t")[0][-5:] for line in lines] == ["2.png", "7.png"]
  assert (made.label == -1).all()


def test_mistakes(encoder, spec, tmp_path):
  with pytest.raises(UserError, match="expected a file ending in .npz, .parquet, .safetensors"):
    embed.run(encoder, spec, tmp_path / "h.csv")
  with pytest.raises(ValueError, match="neither a run .config.json. nor an export"):
    embed.run(tmp_path, spec, tmp_path / "h.npz")
  (tmp_path / "h.npz").write_bytes(b"")
  with pytest.raises(ValueError, match="exists: add --overwrite"):
    embed.run(encoder, spec, tmp_path / "h.npz")
  with pytest.raises(ValueError, match="not a file of simclr embed"):
    features.load(tmp_path / "h.npz")
  parts = tmp_path / "x.npz.parts"
  parts.mkdir()
  (parts / "embed.json").write_text("{}")
  with pytest.raises(ValueError, match="holds parts of other settings"):
    embed.run(encoder, spec, tmp_path / "x.npz")


def command(encoder, spec, output, *more):
  flags = [f"--encoder={encoder}", f"--data={spec}", f"--output={output}", "--images_per_part=8", *more]
  return subprocess.Popen(
    [sys.executable, "-m", "simclr_jax", "embed", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


@pytest.mark.slow
def test_killed_and_resumed_through_the_command(encoder, tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz", 240)
  whole = command(encoder, spec, tmp_path / "whole.npz")
  assert whole.wait(300) == 0, whole.stdout.read()
  killed = command(encoder, spec, tmp_path / "h.npz")
  deadline = time.monotonic() + 120
  while len(list((tmp_path / "h.npz.parts").glob("part-*"))) < 5 and time.monotonic() < deadline:
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.wait(60)
  assert not (tmp_path / "h.npz").exists()
  resumed = command(encoder, spec, tmp_path / "h.npz")
  assert resumed.wait(300) == 0, resumed.stdout.read()
  assert "parts are already there" in resumed.stdout.read()
  assert (tmp_path / "h.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(encoder, spec, tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  one = command(encoder, spec, tmp_path / "one.npz")
  assert one.wait(300) == 0, one.stdout.read()
  several = [f"--coordinator=localhost:{port}", "--num_processes=2"]
  both = [command(encoder, spec, tmp_path / "two.npz", *several, f"--process_id={i}") for i in range(2)]
  assert [p.wait(300) for p in both] == [0, 0], [p.stdout.read() for p in both]
  assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_a_flipped_bit_is_found(tmp_path):
  """Anywhere, in every format; the npz files of the first version had checksums already."""
  rng = np.random.default_rng(0)
  names = np.asarray([f"images/{i}.png" for i in range(8)])
  made = features.Features(
    rng.normal(size=(8, 4)).astype(np.float32), names, np.arange(8, dtype=np.int32), np.arange(8), "files:x", "e", "w"
  )
  for ending in features.FORMATS:
    if ending == ".parquet":
      pytest.importorskip("pyarrow")
    path = tmp_path / f"h{ending}"
    features.write(path, made)
    content = path.read_bytes()
    assert features.load(path).about == made.about
    silent = 0
    for bit in rng.permutation(8 * len(content))[:200]:
      damaged = bytearray(content)
      damaged[bit // 8] ^= 1 << bit % 8
      path.write_bytes(damaged)
      try:
        found = features.load(path)
      except ValueError:
        continue
      same = all(np.array_equal(getattr(found, key), getattr(made, key)) for key in features.ARRAYS)
      silent += not same or found.about != made.about
    assert silent == 0, ending


def test_damaged_parts_are_made_again(encoder, spec, tmp_path, monkeypatch, capsys):
  whole = embed.run(encoder, spec, tmp_path / "whole.npz", images_per_part=10).read_bytes()
  join = embed._join
  monkeypatch.setattr(embed, "_join", lambda *_: None)
  embed.run(encoder, spec, tmp_path / "h.npz", images_per_part=10)
  parts = sorted((tmp_path / "h.npz.parts").glob("part-*"))
  content = [part.read_bytes() for part in parts]
  middle = len(content[4]) // 2
  parts[1].write_bytes(content[2])  # exchanged
  parts[2].write_bytes(content[1])
  parts[3].write_bytes(content[3][:middle])
  parts[4].write_bytes(content[4][:middle] + bytes([content[4][middle] ^ 4]) + content[4][middle + 1 :])
  parts[5].write_bytes(b"")
  (tmp_path / "h.npz.parts/embed.json").write_bytes(b"{")
  monkeypatch.setattr(embed, "_join", join)
  capsys.readouterr()
  assert embed.run(encoder, spec, tmp_path / "h.npz", images_per_part=10).read_bytes() == whole
  assert "2 of 7 parts are already there" in capsys.readouterr().out
