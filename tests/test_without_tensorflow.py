"""Runs whose images are in memory never import TensorFlow: here nobody can."""

import contextlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from simclr_jax import augment, data
from simclr_jax.evaluation import embed

TESTS = pathlib.Path(__file__).parent
BLOCKED = """
import importlib.machinery, sys
class Blocked:
  def find_spec(self, name, path=None, target=None):  # etils asks whether TensorFlow is installed: it is
    if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "keras"):
      return importlib.machinery.ModuleSpec(name, self)
  def create_module(self, spec):
    raise ImportError(f"{spec.name} is blocked")
  def exec_module(self, module):
    pass
sys.meta_path.insert(0, Blocked())
"""


ABSENT = """
import importlib.metadata, sys
NAMES = ("tensorflow", "tensorflow_datasets", "tensorflow-datasets", "keras")
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in NAMES:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in NAMES else find_spec(name, package)
def version_of_those_there(name):
  if name in NAMES:
    raise importlib.metadata.PackageNotFoundError(name)
  return version(name)
importlib.metadata.version = version_of_those_there
"""


def python(code, *arguments, without=BLOCKED):
  """Runs code where TensorFlow cannot be imported, or is not installed; returns what it printed."""
  environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
  command = [sys.executable, "-c", without + code, *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_arrays(tmp_path):
  python(
    """
import jax, numpy as np, tiny
from simclr_jax import data
from simclr_jax.evaluation import embed
from simclr_jax.runtime import mesh as mesh_lib

config, mesh = tiny.config(), mesh_lib.make_mesh()
for spec in ("fashion:test", "textures:test", tiny.npz(sys.argv[1])):
  source = data.open_source(spec)
  images, extent, _ = data.in_memory(source)
  index, seed = data.draws(source, batch_size=16, seed=0)(3)
  assert len(images) == len(extent) == len(source) and index.shape == (16,) and seed.shape == (16, 2)
  part = embed.eval_set(data.Subset(source, 70, 0), config, mesh)
  h = embed.embed(jax.jit(lambda _, x: x.mean((1, 2))), {}, part, mesh)
  assert h.shape == (70, 3) and part.labels().shape == (70,) and len(part.pixels()) == 70
  assert part.images(np.arange(4)).shape == (4, 16, 16, 3)
assert not {"clu", "tensorboard"} & set(sys.modules)
""",
    tmp_path / "tiny.npz",
  )


def test_every_program_is_imported():
  """Those that need TensorFlow for a part of what they do import it there, and `simclr plan` needs none of it."""
  python(
    """
import importlib, pkgutil, simclr_jax.programs
names = [module.name for module in pkgutil.iter_modules(simclr_jax.programs.__path__)]
assert {"pretrain", "probe", "finetune", "transfer", "plan", "timing"} <= set(names)
for name in names:
  importlib.import_module(f"simclr_jax.programs.{name}")
"""
  )


def test_embed(tmp_path):
  """From a notebook, with images of one size and of several, and as a program."""
  python(
    """
import numpy as np, tiny
import simclr_jax
from simclr_jax.evaluation import features
from simclr_jax.programs import embed
encoder, images = sys.argv[1], np.zeros((5, 28, 28, 3), np.uint8)
assert simclr_jax.embed(encoder, images).shape == simclr_jax.embed(encoder, [images[0, :20], *images[1:]]).shape
features = features.load(embed.run(encoder, tiny.npz(sys.argv[2] + "/tiny.npz", 20), sys.argv[2] + "/h.npz"))
assert len(features.h) == 20
""",
    tiny.export(tmp_path / "encoder"),
    tmp_path,
  )


def test_the_smaller_installation_brings_no_tensorflow():
  """grep -v tensorflow requirements.txt | pip install -r /dev/stdin, with all that it depends on."""
  lines = [line for line in (TESTS.parent / "requirements.txt").read_text().splitlines() if "tensorflow" not in line]
  todo = [line for line in lines if line.partition("#")[0].strip()]
  assert len(todo) > 10 and any(line.startswith("flatbuffers") for line in todo)
  found = set()
  while todo:
    name = re.match(r"[\w.-]+", todo.pop())[0].lower()
    if name not in found:
      found.add(name)
      with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of other platforms
        todo += [one for one in importlib.metadata.requires(name) or [] if "extra ==" not in one]
  assert "jax" in found and not any(name.startswith(("tensorflow", "keras")) for name in found)


def test_arrays_and_exports_where_it_is_not_installed(tmp_path):
  """What the smaller installation is for; whatever needs TensorFlow says so on one line."""
  (tmp_path / "photos").mkdir()
  for i in range(4):
    Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(tmp_path / f"photos/{i}.jpg")
  out = python(
    """
import contextlib, io, numpy as np, simclr_jax, tiny
from simclr_jax.__main__ import main
encoder, folder = sys.argv[1:]
images = np.zeros((5, 28, 28, 3), np.uint8)
h = simclr_jax.embed(encoder, images)
assert simclr_jax.probe(np.eye(4)[[0, 1] * 9], [0, 1] * 9, np.eye(4)[:2], [0, 1])["accuracy"] == 1
assert main(["export", f"--encoder={encoder}", f"--output={folder}/out", "--format=safetensors"]) == 0
assert (simclr_jax.embed(f"{folder}/out", images) == h).all()
spec = tiny.npz(f"{folder}/tiny.npz")
of = [f"--workdir={encoder}", f"--config.data.train={spec}", f"--config.data.test={spec}:test"]
assert main(["probe", *of]) == 0
for words in (
  ["export", f"--encoder={encoder}", f"--output={folder}/saved", "--format=savedmodel"],
  ["embed", f"--encoder={encoder}", f"--data=folder:{folder}/photos", f"--output={folder}/h.npz"],
  ["probe", *of, "--config.probe.method=sgd"],
):
  with contextlib.redirect_stderr(io.StringIO()) as said:
    assert main(words) == 1
  print(said.getvalue().strip())
""",
    tiny.export(tmp_path / "encoder"),
    tmp_path,
    without=ABSENT,
  )
  saved, embedded, probed = (line for line in out.splitlines() if line.startswith("simclr: "))
  assert saved == "simclr: --format=savedmodel needs TensorFlow: pip install tensorflow, or choose onnx"
  assert embedded.startswith("simclr: this needs TensorFlow, which is not installed: pip install tensorflow")
  assert probed == embedded


@pytest.mark.slow
@pytest.mark.parametrize("without", [BLOCKED, ABSENT], ids=["blocked", "absent"])
def test_a_resident_run(tmp_path, without):
  out = python(
    """
import tiny
from simclr_jax.__main__ import main
spec, workdir = tiny.npz(sys.argv[1] + "/tiny.npz"), sys.argv[1] + "/run"
changes = {
  "data.train": spec, "data.test": f"{spec}:test", "augment.where": "resident", "augment.size": 16, "batch_size": 16,
  "train_epochs": 0.0, "train_steps": 2, "optimizer.warmup_epochs": 0.0, "encoder.width": 0.0625,
  "projector.out_dim": 16, "evaluate.batch_size": 32, "evaluate.every_epochs": 0.0, "checkpoint.every_epochs": 0.0,
}
overrides = [f"--config.{key}={value}" for key, value in changes.items()]
assert main(["pretrain", "--config=smoke", f"--workdir={workdir}", *overrides]) == 0
assert main(["runs", sys.argv[1]]) == 0
assert main(["export", f"--workdir={workdir}", f"--output={sys.argv[1]}/export", "--format=safetensors"]) == 0
""",
    tmp_path,
    without=without,
  )
  assert re.search("^h +[0-9]", out, re.M)


@pytest.mark.parametrize("count, process_count", [(21, 1), (16, 2)])
def test_arrays_are_evaluated_as_streams_are(count, process_count):
  """The same rows in the same order: images, labels, indices and masks, of every process."""
  source, crop = tiny.source(count), embed.Crop(16, 0.875)
  for part in (source, data.Selection(source, np.arange(count)[::-2])):
    for process in range(process_count):
      options = dict(batch_size=8, process_index=process, process_count=process_count, begin=2)
      ours = list(crop.batches(part, **options))
      transform = lambda image: augment.center_crop(image, size=16, proportion=0.875)  # noqa: E731
      theirs = list(data.eval_batches(part, transform, **options))
      assert len(ours) == len(theirs)
      for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one.pop("image"), other.pop("image"), rtol=0, atol=1e-6)
        for key in one:
          assert one[key].dtype == other[key].dtype
          np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_images_of_several_sizes():
  rng, crop = np.random.default_rng(0), embed.Crop(16, 0.875)
  images = [rng.integers(0, 256, (*rng.integers(3, 70, 2), 3), np.uint8) for _ in range(12)]
  expected = [augment.center_crop(image, size=16, proportion=0.875) for image in images]
  np.testing.assert_allclose(crop(images), expected, rtol=0, atol=1e-6)
  with pytest.raises(ValueError, match=r"expected \[n, h, w, 3\]"):
    crop([images[0], images[1][..., :1]])
