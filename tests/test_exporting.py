"""Every export format, opened by its own load.py in another process that does not see this package."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_tree
import tiny
from flax import traverse_util
from PIL import Image

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import augment, exporting, model
from simclr_jax.data import decode
from simclr_jax.encoder import resnet
from simclr_jax.exporting import torch_folders, torch_names
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import export, pretrain
from simclr_jax.projector import Projector
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "docs/card.schema.json").read_text())
HEAD = dict(kind="nonlinear", layers=3, out_dim=16)
FAST = {
  "r18-cifar": (dict(depth=18, width=0.25, stem="cifar"), 32),
}
# Odd sides as well: there the two paddings of the max-pool agree.
SLOW = {
  "r50-sk": (dict(depth=50, width=0.125, sk_ratio=0.0625), 64),
  "r50": (dict(depth=50, width=0.125), 64),
  "r18-sk-se-odd": (dict(depth=18, width=0.125, sk_ratio=0.25, se_ratio=0.25), 67),
  "r50-sk-se-cifar-odd": (
    dict(depth=50, width=0.125, sk_ratio=0.25, se_ratio=0.25, stem="cifar", dtype="bfloat16"),
    33,
  ),
  "r50-torch-pool": (dict(depth=50, width=0.125, pool_padding="torch", dtype="bfloat16"), 64),
}
FULL = {
  "R50": (dict(depth=50), 224),
  "R50, pool_padding=torch": (dict(depth=50, pool_padding="torch"), 224),
  "R50+SK": (dict(depth=50, sk_ratio=0.0625), 224),
  "R18-CIFAR": (dict(depth=18, stem="cifar"), 32),
}
TORCH_PYTHON = os.environ.get("SIMCLR_TORCH_PYTHON", sys.executable)  # where torch, torchvision, timm, transformers are
HERE = ("orbax", "safetensors", "stablehlo", "onnx", "savedmodel")
THERE = ("torchvision", "timm", "huggingface")


def random_like(shapes):
  """Variables whose every scale and bias matters."""
  rng = np.random.default_rng(0)
  last = "norm3" if "norm3" in shapes["params"].get("group1", {}).get("block1", {}) else "norm2"

  def fill(path, shape):
    if path[-1].key == "kernel":
      return np.float32(rng.normal(0, np.sqrt(2 / np.prod(shape.shape[:-1])), shape.shape))
    if path[-1].key in ("scale", "var"):  # a block changes what passes it by a part, as in a trained network
      part = 0.3 if path[-2].key == last and path[-1].key == "scale" else 1
      return np.float32(rng.uniform(0.5, 1.5, shape.shape) * part)
    return np.float32(rng.normal(0, 0.3, shape.shape))

  return jax.tree_util.tree_map_with_path(fill, shapes)


def random_encoder(encoder, size):
  """Variables with moving statistics near those of real activations, as after training: with random ones activations
  explode, and the softmax of a selective kernel then makes much of rounding."""
  module = resnet(**encoder | {"dtype": "float32"})
  side = min(size, 64) // 4
  images = np.random.default_rng(1).random((16, side, side, 3), np.float32).repeat(4, 1).repeat(4, 2)
  variables = random_like(jax.eval_shape(module.init, jax.random.key(0), images))
  train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])[1]["batch_stats"])
  rng, after = np.random.default_rng(2), train(variables, images)

  def of_batch(path, new, old):
    statistic = (np.asarray(new) - 0.9 * old) / 0.1
    noise = rng.uniform(0.7, 1.4, old.shape) if path[-1].key == "var" else rng.normal(1, 0.1, old.shape)
    return np.float32(np.maximum(statistic, 1e-3) * noise if path[-1].key == "var" else statistic * noise)

  stats = jax.tree_util.tree_map_with_path(of_batch, after, variables["batch_stats"])
  return {"params": variables["params"], "batch_stats": stats}


def save(folder, encoder, size):
  """An Orbax folder with a random encoder and head, as a finished fine-tuning leaves it."""
  variables = random_encoder(encoder, size)
  h = jax.eval_shape(resnet(**encoder).apply, variables, jnp.zeros((1, size, size, 3)))
  head = random_like(jax.eval_shape(Projector(**HEAD).init, jax.random.key(0), h))
  changes = {"encoder": encoder, "projector": HEAD, "augment.size": size, "data.train": "npz:mine"}
  config = config_lib.replace(config_lib.load("v1"), changes)
  exporting.write(folder, variables, config, scores={"h": {"knn": 0.5}}, step=3, heads={"projector": head})
  return folder


@pytest.fixture(scope="module", params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def exported(request, tmp_path_factory):
  return save(tmp_path_factory.mktemp(request.param) / "encoder", *(FAST | SLOW)[request.param])


def has(python, *packages):
  code = f"import importlib.util as u; raise SystemExit(not all(map(u.find_spec, {packages})))"
  return not subprocess.run([python, "-c", code]).returncode


def available(*formats):
  """Those formats that this interpreter can write and read."""
  needs = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime")}
  formats = [name for name in formats if name != "savedmodel" or exporting.tensorflow_reads_jax()]
  return [name for name in formats if has(sys.executable, *needs.get(name, ()))]


def differences(text) -> dict:
  return {
    name: float(value) for name, value in re.findall(r"^(\w+): largest relative difference (\S+) on 16", text, re.M)
  }


def violations(value, schema, where="card"):
  """What of `value` does not fit a JSON schema of the keywords that ours uses."""
  types = {"object": dict, "string": str, "integer": int, "number": (int, float)}
  assert schema.keys() <= {
    *("$schema", "title", "description", "type", "required", "additionalProperties", "properties"),
    *("const", "enum", "pattern", "oneOf"),
  }
  if "oneOf" in schema:
    return min((violations(value, one, where) for one in schema["oneOf"]), key=len)
  if "type" in schema and (not isinstance(value, types[schema["type"]]) or isinstance(value, bool)):
    return [f"{where} is no {schema['type']}"]
  out = [f"{where} is {value}"] * ("const" in schema and value != schema["const"])
  out += [f"{where} is {value}"] * ("enum" in schema and value not in schema["enum"])
  out += [f"{where} is {value}"] * ("pattern" in schema and not re.search(schema["pattern"], value))
  if isinstance(value, dict):
    known = schema.get("properties", {})
    out += [f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value]
    for key, entry in value.items():
      if key in known:
        out += violations(entry, known[key], f"{where}.{key}")
      elif not schema.get("additionalProperties", True):
        out.append(f"{where}.{key} is unknown")
  return out


def prove_here(folder, export, python):
  """exporting.prove without the seconds that another process needs to import what is imported here."""
  before, names = list(sys.path), {p.stem for p in folder.glob("*.py")}
  assert not names & sys.modules.keys()
  sys.path.insert(0, str(folder))
  importlib.invalidate_caches()
  output = io.StringIO()
  try:
    with contextlib.redirect_stdout(output):
      code = runpy.run_path(str(folder / "verify.py"))["main"]()
  finally:
    sys.path[:] = before
    for name in names:
      sys.modules.pop(name, None)
    for cache in folder.glob("__pycache__"):
      shutil.rmtree(cache)
  assert code == 0, output.getvalue()
  return output.getvalue().strip(), output.getvalue().strip()


def check_card(folder, format, variables):
  card = json.loads((folder / "card.json").read_text())
  assert violations(card, SCHEMA) == [] and card["format"] == format
  assert card["checksum"] == exporting.checksum(variables)
  there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  assert there == {*card["files"], "card.json", "manifest.json"}
  return card


def test_values(exported, tmp_path, capsys, monkeypatch):
  """Every format that needs no torch, of every kind of encoder."""
  monkeypatch.setattr(exporting, "prove", prove_here)
  formats = available(*HERE)
  export.run(output=tmp_path / "out", encoder=exported, formats=[",".join(formats)], head=True)
  found = differences(capsys.readouterr().out)
  assert found.keys() == set(formats) and all(value <= 1e-5 for value in found.values()), found
  _, variables, card = simclr_jax.load_encoder(exported)
  assert violations(card, SCHEMA) == []
  for name in formats:
    card = check_card(tmp_path / "out" / name, name, variables)
    assert "largest relative difference" in card["proof"] and card["projector"] == HEAD
    trained_in = card["architecture"]["dtype"]
    assert card["compute"] == "float32" + ", trained in bfloat16" * (trained_in == "bfloat16")
  example = np.load(tmp_path / "out" / formats[0] / "example.npz")
  for name in {"orbax", "safetensors"} & set(formats):  # what load_encoder and --encoder read
    _, head, _, _ = export._of_folder(tmp_path / "out" / name)
    jax.tree.map(np.testing.assert_array_equal, head, checkpoint.read_tree(exported / "projector"))
    apply, again, _ = simclr_jax.load_encoder(tmp_path / "out" / name)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    h = apply(example["images"] / 255)
    np.testing.assert_allclose(h, example["h"], rtol=0, atol=1e-5 * np.abs(example["h"]).max())


@pytest.mark.slow
def test_folders_open_without_this_package(small, tmp_path, capsys):
  formats = available(*HERE)
  export.run(output=tmp_path, encoder=small, formats=formats)
  found = differences(capsys.readouterr().out)
  assert found.keys() == set(formats) and all(value <= 1e-5 for value in found.values()), found
  for path in tmp_path.glob("*/*.py"):
    imported = {name.partition(".")[0] for _, name in test_tree.imports(path)}
    assert "simclr_jax" not in imported, path


@pytest.mark.slow
@pytest.mark.skipif(not has(TORCH_PYTHON, "torch", "torchvision", "timm", "transformers"), reason="no torch")
@pytest.mark.skipif(not has(sys.executable, "safetensors"), reason="no safetensors")
def test_torch_formats(exported, tmp_path, capsys):
  export.run(output=tmp_path, encoder=exported, formats=(*THERE, "stablehlo"), head=True, python=TORCH_PYTHON)
  text = capsys.readouterr().out
  found = differences(text)
  assert found.keys() == {*THERE, "stablehlo"} and all(value <= 1e-5 for value in found.values()), found
  assert f"hf upload NAME/REPOSITORY {tmp_path / 'huggingface'}" in text
  by_itself = (tmp_path / "timm/load.py").read_text() == (exporting.LOADERS / "load_timm.py").read_text()
  assert text.count("own module, verified with torch; timm, which has no such network, was not used") == (not by_itself)
  show_of_card(tmp_path / "huggingface", exported)
  for name in THERE:
    check_card(tmp_path / name, name, simclr_jax.load_encoder(exported)[1])


def show_of_card(folder, exported):
  """The snippet of a folder's README, on a half-transparent image that has to be cropped, gives the h of simclr_jax.embed."""
  photo = np.random.default_rng(3).integers(0, 256, (90, 70, 4), np.uint8)
  photo[:45, :, 3] = 255
  Image.fromarray(photo).save(folder.parent / "photo.png")
  code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
  code = code.replace('Image.new("RGB", (640, 480))', 'Image.open("../photo.png")')
  code += '\nimport numpy\nnumpy.save("../h.npy", h.numpy())\n'
  modules = folder.parent / "modules"  # where transformers copies the folder's Python files
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
  done = subprocess.run([TORCH_PYTHON, "-B", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  h, expected = (
    np.load(folder.parent / "h.npy"),
    simclr_jax.embed(exported, [decode((folder.parent / "photo.png").read_bytes())]),
  )
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def every_format_agrees(name, encoder, there, tmp_path, capsys):
  """Exports an encoder to every format that can be opened here, and to those of `there` by TORCH_PYTHON; shows how far h is."""
  formats = available(*HERE)
  export.run(output=tmp_path / "out", encoder=encoder, formats=formats)
  if has(TORCH_PYTHON, "torch", "torchvision", "timm", "transformers"):
    formats += there
    export.run(output=tmp_path / "out", encoder=encoder, formats=there, python=TORCH_PYTHON)
  text = capsys.readouterr().out
  with capsys.disabled():
    print(f"\n{name}\n" + "\n".join(line for line in text.split("\n") if "largest" in line))
  found = differences(text)
  assert found.keys() == set(formats) and all(value <= 1e-5 for value in found.values()), found


@pytest.mark.release
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, tmp_path, capsys):
  """The table of docs/export.md: run with -s, and SIMCLR_TORCH_PYTHON for the torch formats."""
  encoder = save(tmp_path / "encoder", *FULL[name])
  every_format_agrees(name, encoder, THERE, tmp_path, capsys)


def test_torch_names_are_those_of_torchvision():
  """All 318 of a ResNet-50, by their rule; the real library loads them with strict=True in test_torch_formats."""
  like = jax.eval_shape(resnet(50).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  state = torch_names.encoder(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))
  norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
  expected = {"conv1.weight"} | {f"bn1.{leaf}" for leaf in norm}
  for i, count in enumerate((3, 4, 6, 3), 1):
    for j in range(count):
      expected |= {f"layer{i}.{j}.conv{k}.weight" for k in (1, 2, 3)}
      expected |= {f"layer{i}.{j}.bn{k}.{leaf}" for k in (1, 2, 3) for leaf in norm}
    expected |= {f"layer{i}.0.downsample.0.weight"} | {f"layer{i}.0.downsample.1.{leaf}" for leaf in norm}
  assert state.keys() == expected and len(expected) == 318
  assert state["conv1.weight"].shape == (64, 3, 7, 7) and state["layer2.0.downsample.0.weight"].shape == (
    512,
    256,
    1,
    1,
  )


@pytest.mark.parametrize("kind", augment.RESIZES)
def test_preprocessing_of_a_folder_is_that_of_the_evaluation(kind, monkeypatch):
  monkeypatch.syspath_prepend(exporting.LOADERS)
  preprocessing = importlib.import_module("preprocessing")
  rng = np.random.default_rng(0)
  for shape, dtype in (((33, 50, 3), "uint8"), ((377, 501, 3), "uint8"), ((17, 16, 3), "float32")):
    image = rng.integers(0, 256, shape, np.uint8) if dtype == "uint8" else rng.random(shape, np.float32)
    for size in (16, 31):
      expected = augment.center_crop(image, size=size, resize=kind).numpy()
      found = preprocessing.center_crop(image, size=size, proportion=0.875, resize=kind)
      assert found.dtype == np.float32
      np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_encoder_is_one_line(small):
  text = repr(simclr_jax.load_encoder(small))
  assert text == "Encoder(ResNet-18, width 0.0625, images [n, 16, 16, 3] -> h [n, 32], step 3)"


@pytest.mark.parametrize(
  "value, public",
  [
    ("folder:/home/me/photos", "folder:photos"),
    ("tfds:imagenet2012_subset/1pct:train", "tfds:imagenet2012_subset/1pct:train"),
    ("/home/me/runs/a", "a"),
    (3, 3),
  ],
)
def test_a_published_card_names_no_folders(value, public):
  assert exporting._without_folders({"data": value}) == {"data": public}


def test_another_python_may_be_named_relative_to_this_folder(tmp_path, monkeypatch):
  python = tmp_path / "env/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text("#!/bin/sh\necho $2\n")
  python.chmod(0o755)
  (tmp_path / "out").mkdir()
  monkeypatch.chdir(tmp_path)
  assert exporting._verified_by("env/bin/python", "out").stdout == f"{tmp_path / 'out/verify.py'}\n"


def write_torch_folder(tmp_path, name, variables, **config):
  """The files of a folder for a library of torch, of a network whose weights are not looked at."""
  encoder = dict(depth=18, width=0.0625, stem="cifar") | config.pop("encoder", {})
  license = config.pop("license", "not stated")
  changes = {"encoder": encoder, "augment.size": 16, "data.train": "folder:/home/me/photos", **config}
  config = config_lib.replace(config_lib.load("v1"), changes)
  card = exporting.make_card(variables, config, format=name, scores={"h": {"knn": 0.5}}, step=3, license=license)
  folder = tmp_path / name
  folder.mkdir()
  torch_folders.write(folder, exporting.Export(name, variables, card))
  return folder, card


def test_the_image_processor_lays_transparent_pixels_over_white(tmp_path, monkeypatch):
  """As the decoder of training does; transformers, of which it is a subclass, is replaced by the two names it needs."""
  (tmp_path / "hub").mkdir()
  for name in ("image_processing_simclr.py", "preprocessing.py"):
    shutil.copyfile(exporting.LOADERS / name, tmp_path / "hub" / name)
  library = types.SimpleNamespace(BaseImageProcessor=object, BatchFeature=lambda data, tensor_type: data)
  monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
  monkeypatch.setitem(sys.modules, "transformers.image_processing_utils", library)
  monkeypatch.syspath_prepend(str(tmp_path))
  made = importlib.import_module("hub.image_processing_simclr").SimCLRImageProcessor(16, 1.0)
  image = np.random.default_rng(3).integers(0, 256, (30, 20, 4), np.uint8)
  image[:15, :, 3] = 255
  picture, stored = Image.fromarray(image), io.BytesIO()
  picture.save(stored, "PNG")
  expected = augment.center_crop(decode(stored.getvalue()), size=16, proportion=1.0)
  (found,) = made.preprocess(picture)["pixel_values"]
  np.testing.assert_allclose(found.transpose(1, 2, 0), expected, atol=1e-5)


def test_folders_for_torch_say_what_they_are(small, tmp_path):
  """The libraries of torch are not needed for what the files say; test_torch_formats opens them."""
  variables = simclr_jax.load_encoder(small)[1]
  folder, card = write_torch_folder(tmp_path, "timm", variables)
  assert card["data"] == "folder:/home/me/photos"
  assert json.loads((folder / "config.json").read_text())["architecture"] == "simclr_resnet18"  # timm's is another
  folder, card = write_torch_folder(tmp_path, "huggingface", variables, license="My own: 2.0")
  assert card["data"] == "folder:photos" == card["pretraining"]["data"]["train"]
  files_of_it = {path.name for path in folder.iterdir()}
  processor = json.loads((folder / "preprocessor_config.json").read_text())
  module, _, name = processor["auto_map"]["AutoImageProcessor"].partition(".")
  assert f"{module}.py" in files_of_it and f"class {name}(" in (folder / f"{module}.py").read_text()
  assert (processor["side"], processor["proportion"], processor["interpolation"]) == (16, 0.875, "bicubic")
  readme = (folder / "README.md").read_text()
  assert "license: other\nlicense_name: my-own-2.0\n" in readme and "/home" not in readme
  compile(readme.partition("```python\n")[2].partition("```")[0], "README.md", "exec")
  for name, line in (("Apache-2.0", "license: apache-2.0"), ("not stated", "license: unknown")):
    assert torch_folders._license({"license": name}) == [line]


def test_a_run_and_its_head(tmp_path, capsys):
  """From a run's checkpoint, through the command, without its data; one format goes to the folder itself."""
  config = tiny.config(**{"data.train": "npz:/gone.npz"})
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh())
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  state = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(x.dtype), shapes)
  text = config_lib.to_json(config)
  with checkpoint.Checkpoints(tmp_path / "run") as saved:
    saved.save(3, state, {"encoder": model.keep_encoder(state)}, text)
  (tmp_path / "run/config.json").write_text(text)
  out = tmp_path / "out"
  argv = ["export", f"--workdir={tmp_path / 'run'}", f"--output={out}", "--format=stablehlo", "--license=CC0-1.0"]
  assert command.main([*argv, "--head"]) == 0, capsys.readouterr().err
  assert differences(capsys.readouterr().out)["stablehlo"] <= 1e-5
  card = check_card(out, "stablehlo", jax.device_get(model.keep_encoder(state)))
  assert card["license"] == "CC0-1.0" and card["data"] == "npz:/gone.npz" and card["projector"]["out_dim"] == 16
  weights = np.load(out / "weights.npz")
  np.testing.assert_array_equal(
    weights["projector/params/dense0/kernel"], state.params["projector"]["dense0"]["kernel"]
  )
  assert command.main(argv) == 1
  assert capsys.readouterr().err == f"simclr: {out} is not empty: add --overwrite or name another folder\n"
  assert command.main([*argv, "--overwrite"]) == 0
  assert not any(name.startswith("projector") for name in np.load(out / "weights.npz"))
  with pytest.raises(ValueError, match="is an export to stablehlo: its load.py opens it"):
    simclr_jax.load_encoder(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return save(tmp_path_factory.mktemp("small") / "encoder", dict(depth=18, width=0.0625, stem="cifar"), 16)


def test_cards_of_version_1_are_read(small, tmp_path):
  card = json.loads((small / "card.json").read_text())
  old = {key: card[key] for key in ("feature_dimension", "preprocessing", "pretraining", "step", "scores", "versions")}
  old |= {"card_version": 1, "architecture": {"name": "resnet", "depth": 18, "width": 0.0625, "stem": "cifar"}}
  variables = simclr_jax.load_encoder(small)[1]

  def fill(folder, card=old):
    checkpoint.save_trees(folder, {"encoder": variables})
    files.write_text(folder / "card.json", json.dumps(card))

  exporting.save_export(tmp_path / "old", fill)
  jax.tree.map(np.testing.assert_array_equal, simclr_jax.load_encoder(tmp_path / "old")[1], variables)
  export.run(output=tmp_path / "new", encoder=tmp_path / "old", formats=["stablehlo"])
  assert json.loads((tmp_path / "new/card.json").read_text())["schema_version"] == 2
  exporting.save_export(tmp_path / "future", lambda folder: fill(folder, {**old, "card_version": 3}))
  with pytest.raises(ValueError, match="schema_version 3, this package reads 1 to 2"):
    simclr_jax.load_encoder(tmp_path / "future")


def test_a_library_may_be_installed_under_another_name():
  """PIL is of the distribution pillow, as onnxruntime may be of onnxruntime-gpu."""
  verify = runpy.run_path(str(exporting.LOADERS / "verify.py"))
  for version, unknown in ((verify["_version"], "of unknown version"), (exporting._version, "")):
    assert version("PIL") == version("pillow") == importlib.metadata.version("pillow")
    assert version("no_such_library") == unknown


def refused(*argv, capsys):
  """The one line that `simclr export` ends with."""
  capsys.readouterr()
  assert command.main(["export", *argv]) == 1
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and err.startswith("simclr: "), err
  return err


def test_mistakes_are_one_line(small, tmp_path, capsys, monkeypatch):
  source, output = f"--encoder={small}", f"--output={tmp_path / 'out'}"
  assert "did you mean onnx? Known are orbax, safe" in refused(source, output, "--format=orbax,onx", capsys=capsys)
  assert "is empty: expected orbax" in refused(source, output, "--format=,", capsys=capsys)
  assert "card.json is missing" in refused(f"--encoder={tmp_path}", output, capsys=capsys)
  assert "no run here" in refused(f"--workdir={tmp_path}", output, capsys=capsys)
  (tmp_path / "file").write_text("")
  assert "is a file: name a folder" in refused(source, f"--output={tmp_path / 'file'}", capsys=capsys)
  assert "cannot be written" in refused(source, f"--output={tmp_path / 'file/below'}", capsys=capsys)
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs/thesis.tex").write_text("")
  assert "delete it yourself" in refused(source, f"--output={tmp_path / 'theirs'}", "--overwrite", capsys=capsys)
  export_of_theirs = tmp_path / "small_copy"
  shutil.copytree(small, export_of_theirs)
  (export_of_theirs / "thesis.tex").write_text("")
  said = refused(source, f"--output={export_of_theirs}", "--overwrite", capsys=capsys)
  assert "small_copy/thesis.tex is not part of the export there: move it elsewhere" in said
  assert (export_of_theirs / "thesis.tex").exists()
  (export_of_theirs / "thesis.tex").unlink()
  (export_of_theirs / ".git").mkdir()
  (export_of_theirs / ".git/HEAD").write_text("")
  said = refused(source, f"--output={export_of_theirs}", "--overwrite", capsys=capsys)
  assert "small_copy/.git/HEAD is not part of the export there" in said and (export_of_theirs / ".git/HEAD").exists()
  shutil.rmtree(export_of_theirs / ".git")
  for itself in (export_of_theirs, export_of_theirs / "..//small_copy"):
    said = refused(f"--encoder={export_of_theirs}", f"--output={itself}", "--overwrite", capsys=capsys)
    assert "small_copy --overwrite would delete the encoder that this reads: name another folder" in said
  assert (export_of_theirs / "projector").exists()
  assert "s3://a/b: expected a path on this machine, or gs://" in refused("--workdir=s3://a/b", output, capsys=capsys)
  with monkeypatch.context() as laptop:
    laptop.setattr(files, "_has_gcsfs", lambda: False)
    assert "gs://a/b: gs:// needs gcsfs" in refused("--workdir=gs://a/b", output, capsys=capsys)
  assert "is only for --workdir" in refused(source, output, "--step=3", capsys=capsys)
  assert "does not start" in refused(source, output, "--python=/no/python", capsys=capsys)
  no_head = config_lib.from_dict(json.loads((small / "card.json").read_text())["pretraining"])
  exporting.write(tmp_path / "bare", simclr_jax.load_encoder(small)[1], no_head, scores={}, step=0)
  assert "has no projection head: leave --head" in refused(
    f"--encoder={tmp_path / 'bare'}", output, "--head", capsys=capsys
  )

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  assert "the disk is full; free space" in refused(source, output, "--format=stablehlo", capsys=capsys)
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))
  monkeypatch.setitem(exporting.FORMATS, "onnx", ("onnx_graph", "no_such_package", ("onnxruntime",)))
  assert "needs no_such_package: pip install 'simclr_jax[export]'" in refused(
    source, output, "--format=onnx", capsys=capsys
  )
  with pytest.raises(SystemExit):
    command.main(["export", output])
  assert "one of the arguments --workdir --encoder is required" in capsys.readouterr().err


def test_an_h_that_differs_is_refused(small, tmp_path, monkeypatch):
  """What verify.py is for: weights that another program would turn into another h."""
  from simclr_jax.exporting import stablehlo

  honest = stablehlo.write

  def dishonest(folder, export):
    flat = traverse_util.flatten_dict(export.variables)
    key = next(key for key in flat if key[-1] == "var")
    changed = traverse_util.unflatten_dict(flat | {key: flat[key] * np.float32(1.001)})
    honest(folder, dataclasses.replace(export, variables=changed))

  monkeypatch.setattr(stablehlo, "write", dishonest)
  with pytest.raises(
    ValueError, match=r"stablehlo: the written files do not reproduce this encoder.* more than 1e-05 and than"
  ):
    export.run(output=tmp_path / "out", encoder=small, formats=["stablehlo"])
  assert not (tmp_path / "out").exists()


def test_what_cannot_be_verified_says_so(small, tmp_path, capsys, monkeypatch):
  """The libraries are in another environment, or in none."""
  bare = tmp_path / "bare"
  bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # no site-packages: not even numpy
  bare.chmod(0o755)
  export.run(output=tmp_path / "here", encoder=small, formats=["stablehlo"], python=str(bare))
  assert differences(capsys.readouterr().out)["stablehlo"] <= 1e-5  # by this interpreter, which has what it takes
  monkeypatch.setattr(sys, "executable", str(bare))
  export.run(output=tmp_path / "out", encoder=small, formats=["stablehlo"], python=str(bare))
  line = capsys.readouterr().out.strip()
  assert line == (
    f"stablehlo: not verified: numpy is not installed; to verify: pip install jax, then python {tmp_path}/out/verify.py"
  )
  assert json.loads((tmp_path / "out/card.json").read_text())["proof"] == "not verified: numpy is not installed"


def test_a_loader_that_fails_is_one_line(small, tmp_path):
  broken = tmp_path / "broken"
  broken.write_text("#!/bin/sh\necho 'ImportError: this jax is too old' >&2; exit 1\n")
  broken.chmod(0o755)
  with pytest.raises(
    ValueError, match="^stablehlo: load.py fails in .*broken, so nothing is kept: ImportError: this jax"
  ):
    export.run(output=tmp_path / "out", encoder=small, formats=["stablehlo"], python=str(broken))
  assert not (tmp_path / "out").exists()


def test_damaged_safetensors(small, tmp_path):
  pytest.importorskip("safetensors")
  export.run(output=tmp_path / "out", encoder=small, formats=["safetensors"])
  file = tmp_path / "out/model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match="model.safetensors is damaged: its SHA-256"):
    simclr_jax.load_encoder(tmp_path / "out")
  (tmp_path / "out/manifest.json").write_text("{}")
  with pytest.raises(
    ValueError, match="model.safetensors is not a complete safetensors file .*: export it again"
  ) as error:
    simclr_jax.load_encoder(tmp_path / "out")
  assert "\n" not in str(error.value)


def test_large_onnx_models_keep_their_weights_in_a_file_of_their_own(small, tmp_path, capsys, monkeypatch):
  pytest.importorskip("onnx")
  pytest.importorskip("onnxruntime")
  import onnx

  from simclr_jax.exporting import onnx_graph

  checked, check = [], onnx.checker.check_model
  monkeypatch.setattr(onnx.checker, "check_model", lambda model: (checked.append(model), check(model)))
  monkeypatch.setattr(onnx_graph, "PROTOBUF_LIMIT", 1000)
  export.run(output=tmp_path / "out", encoder=small, formats=["onnx"])
  assert differences(capsys.readouterr().out)["onnx"] <= 1e-5
  assert (tmp_path / "out/model.weights").stat().st_size > 1000 * 10
  assert isinstance(checked[0], str)  # the file: a model of more than 2 GiB cannot be checked in memory
