"""Exported folders that come from anybody, damaged or hostile, and images of the wrong kind: named, never computed with."""

import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny

import simclr_jax
from simclr_jax.programs import export
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.errors import UserError

SIZE = 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  return tiny.export(tmp_path_factory.mktemp("trust") / "encoder")


@pytest.fixture
def folder(encoder, tmp_path):
  shutil.copytree(encoder, tmp_path / "copy")
  return tmp_path / "copy"


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_of_bytes_are_scaled(encoder):
  apply, _, _ = simclr_jax.load_encoder(encoder)
  images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
  wanted = np.asarray(apply(images.astype(np.float32) / 255))
  np.testing.assert_allclose(apply(images), wanted, rtol=0, atol=1e-6)
  np.testing.assert_allclose(jax.jit(apply)(images), wanted, rtol=0, atol=1e-5)
  np.testing.assert_allclose(apply(images.astype(np.float64) / 255), wanted, rtol=0, atol=1e-6)
  assert apply(np.zeros((0, SIZE, SIZE, 3))).shape[0] == 0


def test_products_are_of_float32_on_every_platform(encoder):
  apply, _, _ = simclr_jax.load_encoder(encoder)
  text = str(jax.make_jaxpr(apply)(np.zeros((1, SIZE, SIZE, 3), np.float32)))
  assert "conv_general_dilated[" in text and "Precision.HIGHEST" in text and "precision=None" not in text


@pytest.mark.parametrize(
  "images, message",
  [
    (np.full((2, SIZE, SIZE, 3), 255.0), "images range from 255 to 255: expected floats in"),
    (np.full((2, SIZE, SIZE, 3), -2.0), "without mean or std"),
    (np.full((2, SIZE, SIZE, 3), np.nan), "images range from nan"),
    (np.zeros((2, SIZE, SIZE, 3), np.int32), "images are int32: expected floats in"),
    (np.zeros((2, 32, 32, 3)), "images are 32 x 32 and this encoder's card says 16 x 16"),
    (np.zeros((SIZE, SIZE, 3)), r"images are \[16, 16, 3\]: expected \[n, 16, 16, 3\]"),
    (np.zeros((2, 3, SIZE, SIZE)), r"images are \[2, 3, 16, 16\]"),
  ],
  ids=["0-255", "standardized", "nan", "integers", "size", "one", "channels first"],
)
def test_images_of_another_kind_are_refused(encoder, images, message):
  apply, _, _ = simclr_jax.load_encoder(encoder)
  with pytest.raises(ValueError, match=message):
    apply(images)
  if "range" not in message and "mean" not in message:
    with pytest.raises(ValueError, match=message):
      jax.jit(apply)(images)


# ---- files -----------------------------------------------------------------------------------------------------------


def load_py(folder):
  """What the load() of a folder's load.py returns, in this process."""
  before, names = list(sys.path), {path.stem for path in folder.glob("*.py")}
  sys.path.insert(0, str(folder))
  try:
    import load

    return load.load()
  finally:
    sys.path[:] = before
    for name in names:
      sys.modules.pop(name, None)


@pytest.mark.parametrize(
  "format, weights",
  [("safetensors", "model.safetensors"), ("onnx", "model.onnx"), ("stablehlo", "weights.npz"), ("orbax", "encoder/d")],
)
def test_load_py_refuses_what_is_damaged(encoder, tmp_path, format, weights, monkeypatch):
  monkeypatch.setattr("simclr_jax.exporting.prove", lambda *_: ("", ""))
  monkeypatch.setattr(sys, "dont_write_bytecode", True)
  export.run(output=tmp_path / "out", encoder=encoder, formats=[format])
  images = np.random.default_rng(0).random((2, SIZE, SIZE, 3), np.float32)
  h = np.asarray(load_py(tmp_path / "out")(images))
  assert h.shape[0] == 2
  with pytest.raises(ValueError, match="images range from 0"):
    load_py(tmp_path / "out")(255 * images)
  path = tmp_path / "out" / weights
  path = max(path.rglob("*"), key=os.path.getsize) if path.is_dir() else path
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{path.name} is damaged, its SHA-256"):
    load_py(tmp_path / "out")
  path.unlink()
  with pytest.raises(ValueError, match=f"{path.name} is missing"):
    load_py(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", "null", "3", "{", '"card"', "\x00\xff"])
@pytest.mark.parametrize("name", ["card.json", "manifest.json"])
def test_files_that_are_not_an_object(folder, name, content):
  (folder / name).write_bytes(content.encode("latin-1"))
  with pytest.raises(UserError, match=f"{name} is damaged: it is not the JSON"):
    simclr_jax.load_encoder(folder)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda card: card.pop("preprocessing"), "preprocessing is None, expected an object"),
    (lambda card: card.update(architecture="resnet"), "architecture is 'resnet', expected an object"),
    (lambda card: card["preprocessing"].update(size=-1), "preprocessing.size is -1, expected 1 to 8192"),
    (lambda card: card["preprocessing"].update(size=60_000), "preprocessing.size is 60000"),
    (lambda card: card["preprocessing"].update(size=True), "preprocessing.size is True"),
    (lambda card: card["preprocessing"].pop("size"), "preprocessing.size is None"),
    (lambda card: card["architecture"].update(depth=51), "card.json describes no encoder"),
    (lambda card: card["architecture"].update(command="x"), "card.json describes no encoder"),
    (lambda card: card["architecture"].update(width=2), "has another architecture"),
    (lambda card: card.update(schema_version=99), "schema_version 99, this package reads"),
  ],
)
def test_cards_that_say_something_else(folder, change, message):
  card = json.loads((folder / "card.json").read_text())
  change(card)
  (folder / "card.json").write_text(json.dumps(card))
  checkpoint.seal(files.absolute(folder))
  with pytest.raises(UserError, match=message):
    simclr_jax.load_encoder(folder)


def test_nothing_outside_of_the_folder_is_read(folder, tmp_path):
  manifest = json.loads((folder / "manifest.json").read_text())
  for name in ("../secret", "/etc/passwd", "encoder/../../secret"):
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: "0" * 64}))
    with pytest.raises(UserError, match="is not inside the folder"):
      simclr_jax.load_encoder(folder)


@pytest.mark.parametrize("name", ["card.json", "manifest.json", "encoder/_METADATA"])
def test_pipes_and_devices_are_not_opened(folder, name):
  (folder / name).unlink()
  os.mkfifo(folder / name)
  with pytest.raises(UserError, match="is not a plain file"):
    simclr_jax.load_encoder(folder)
  (folder / name).unlink()
  (folder / name).symlink_to("/dev/zero")
  with pytest.raises(UserError, match="is not a plain file"):
    simclr_jax.load_encoder(folder)


def test_links_to_files_are_read(folder, tmp_path):
  """As in the cache of a model hub."""
  (tmp_path / "blob").write_bytes((folder / "card.json").read_bytes())
  (folder / "card.json").unlink()
  (folder / "card.json").symlink_to(tmp_path / "blob")
  assert simclr_jax.load_encoder(folder)[2]["feature_dimension"]


def test_nothing_in_a_folder_is_run(folder, monkeypatch):
  code = f"open({str(folder / 'ran')!r}, 'w')\n"
  for name in ("load", "verify", "resnet", "sitecustomize", "conftest", "jax", "numpy", "card_check", "__init__"):
    (folder / f"{name}.py").write_text(code)
  checkpoint.seal(files.absolute(folder))
  monkeypatch.chdir(folder)
  apply, _, _ = simclr_jax.load_encoder(folder)
  apply(np.zeros((1, SIZE, SIZE, 3)))
  assert not (folder / "ran").exists()
