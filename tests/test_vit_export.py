"""A Vision Transformer in the formats of others.  Those of torch are opened where torch is; names are checked without it."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_exporting import (
  HEAD,
  THERE,
  TORCH_PYTHON,
  check_card,
  differences,
  every_format_agrees,
  has,
  prove_here,
  random_like,
  refused,
  show_of_card,
)

import simclr_jax
from simclr_jax import exporting
from simclr_jax.exporting import torch_folders, torch_vit_names
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import export
from simclr_jax.projector import Projector
from simclr_jax.vit import vit

NAMES = json.loads(
  (pathlib.Path(__file__).parent / "golden/vit_names.json").read_text()
)  # of a Ti, patch 16, 224 pixels
FULL = {
  "ViT-Ti/4, 32 pixels": (dict(size="Ti", patch=4), 32),
  "ViT-S/16, 224 pixels": (dict(size="S", patch=16), 224),
  "ViT-B/16, pool=mean, 64 pixels": (dict(size="B", patch=16, pool="mean"), 64),
}
WITH_TORCH = pytest.mark.skipif(
  not has(TORCH_PYTHON, "torch", "torchvision", "timm", "transformers"), reason="no torch"
)


def save(folder, encoder, size):
  """An Orbax folder with a random encoder and head, every weight of which matters."""
  module = vit(**encoder)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  variables = random_like(shapes)
  for name, block in variables["params"].items():
    if name.startswith("block"):  # which changes what passes it by a part, as in a trained network
      for layer in ("proj", "fc2"):
        block[layer]["kernel"] *= np.float32(0.3)
  h = jax.eval_shape(module.apply, variables, jnp.zeros((1, size, size, 3)))
  head = random_like(jax.eval_shape(Projector(**HEAD).init, jax.random.key(0), h))
  changes = {"encoder": {"name": "vit", **encoder}, "projector": HEAD, "augment.size": size, "data.train": "npz:mine"}
  config = config_lib.replace(config_lib.load("vit"), changes)
  exporting.write(folder, variables, config, scores={"h": {"knn": 0.5}}, step=3, heads={"projector": head})
  return folder


def formats_of_torch(pool):
  return tuple(name for name in THERE if (name, pool) != ("torchvision", "mean"))


@pytest.fixture(scope="module", params=["token", "mean"])
def exported(request, tmp_path_factory):
  encoder = dict(size="Ti", patch=4, pool=request.param)
  return save(tmp_path_factory.mktemp(request.param) / "encoder", encoder, 16)


@pytest.mark.parametrize("library", NAMES)
def test_names_and_shapes_are_those_of_the_library(library):
  like = jax.eval_shape(vit("Ti", patch=16).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  state = torch_vit_names.timm(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like), patch=16, size=224)
  rename = {"huggingface": torch_vit_names.hugging_face, "torchvision": torch_vit_names.torchvision}
  state = rename[library](state) if library in rename else state
  assert all(value.dtype == np.float32 for value in state.values())
  expected = {name.replace("N", str(i)): shape for name, shape in NAMES[library].items() for i in range(12)}
  assert {name: list(value.shape) for name, value in state.items()} == expected


def test_onnx(exported, tmp_path, capsys, monkeypatch):
  """h and z; and h of images of other sides, for which the graph has its positions."""
  pytest.importorskip("onnx")
  onnxruntime = pytest.importorskip("onnxruntime")
  monkeypatch.setattr(exporting, "prove", prove_here)
  export.run(output=tmp_path / "out", encoder=exported, formats=["onnx"], head=True)
  assert differences(capsys.readouterr().out)["onnx"] <= 1e-5
  _, variables, card = simclr_jax.load_encoder(exported)
  check_card(tmp_path / "out", "onnx", variables)
  session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
  images = np.random.default_rng(0).random((3, 12, 24, 3), np.float32)
  h, z = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
  expected = vit("Ti", patch=4, pool=card["architecture"]["pool"]).apply(variables, images)
  assert z.shape == (3, HEAD["out_dim"])
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_folders_for_torch_say_what_they_are(exported, tmp_path):
  """Without the libraries, which test_torch_formats opens."""
  _, variables, card = simclr_jax.load_encoder(exported)
  pool = card["architecture"]["pool"]
  for name in formats_of_torch(pool):
    (tmp_path / name).mkdir()
    torch_folders.write(tmp_path / name, exporting.Export(name, variables, card | {"format": name}))
    assert (tmp_path / name / "load.py").exists() and not list(tmp_path.glob("*/modeling*"))
  timm = json.loads((tmp_path / "timm/config.json").read_text())
  assert timm["architecture"] == "vit_tiny_patch16_224" and timm["pretrained_cfg"]["first_conv"] == "patch_embed.proj"
  arguments = dict(img_size=16, patch_size=4, num_classes=0, fc_norm=False)
  assert timm["model_args"] == arguments | {"global_pool": "avg" if pool == "mean" else "token"}
  theirs = json.loads((tmp_path / "huggingface/config.json").read_text())
  assert (theirs["model_type"], theirs["image_size"], theirs["layer_norm_eps"]) == ("vit", 16, 1e-6)
  readme = (tmp_path / "huggingface/README.md").read_text()
  assert "# Image encoder: ViT-Ti, patch 4\n" in readme and "Training: simclr on npz:" in readme
  assert f"last_hidden_state{'[:, 1:].mean(1)' if pool == 'mean' else '[:, 0]'}\n" in readme


@pytest.mark.parametrize("exported", ["mean"], indirect=True)
def test_torchvision_has_no_mean(exported, tmp_path, capsys, monkeypatch):
  written = []
  monkeypatch.setattr(exporting, "write_format", lambda path, *_: written.append(path.name))
  monkeypatch.setattr(exporting, "make_example", lambda _: {})
  said = refused(f"--encoder={exported}", f"--output={tmp_path / 'out'}", "--format=timm,torchvision", capsys=capsys)
  assert "h of encoder.pool=mean is the mean over the patches: choose timm or huggingface" in said
  assert not written  # no format before it either
  export.run(output=tmp_path / "all", encoder=exported, formats=["all"])
  assert "left out: --format=torchvision: torchvision's VisionTransformer" in capsys.readouterr().out
  assert "torchvision" not in written and {"timm", "huggingface", "orbax"} < set(written)


@pytest.mark.slow
@WITH_TORCH
def test_torch_formats(exported, tmp_path, capsys):
  """Each library opens its folder, strictly; the snippet of the Hugging Face folder gives the same h."""
  _, variables, card = simclr_jax.load_encoder(exported)
  formats = formats_of_torch(card["architecture"]["pool"])
  export.run(output=tmp_path, encoder=exported, formats=formats, head=True, python=TORCH_PYTHON)
  found = differences(capsys.readouterr().out)
  assert found.keys() == set(formats) and all(value <= 1e-5 for value in found.values()), found
  for name in formats:
    check_card(tmp_path / name, name, variables)
  show_of_card(tmp_path / "huggingface", exported)
  code = f"""
import timm, transformers
from safetensors.torch import load_file
model = timm.create_model("local-dir:{tmp_path}/timm", pretrained=True)
model.load_state_dict(load_file("{tmp_path}/timm/model.safetensors"), strict=True)
options = dict(add_pooling_layer=False, output_loading_info=True)
_, info = transformers.AutoModel.from_pretrained("{tmp_path}/huggingface", **options)
assert not any(info.values()), info
"""
  done = subprocess.run([TORCH_PYTHON, "-c", code], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@WITH_TORCH
def test_names_of_the_installed_libraries():
  """Those of golden/vit_names.json; transformers 5 renames what it loads, which test_torch_formats sees."""
  code = """
import json, timm, torch, torchvision
models = {
  "timm": timm.create_model("vit_tiny_patch16_224", num_classes=0),
  "torchvision": torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768),
}
models["torchvision"].heads = torch.nn.Identity()
print(json.dumps({k: {n: list(v.shape) for n, v in m.state_dict().items()} for k, m in models.items()}))
"""
  done = subprocess.run([TORCH_PYTHON, "-c", code], capture_output=True, text=True, check=True)
  for library, found in json.loads(done.stdout).items():
    expected = {name.replace("N", str(i)): shape for name, shape in NAMES[library].items() for i in range(12)}
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, tmp_path, capsys):
  """The second table of docs/export.md: run with -s, and SIMCLR_TORCH_PYTHON for the torch formats."""
  arguments, size = FULL[name]
  encoder = save(tmp_path / "encoder", arguments, size)
  every_format_agrees(name, encoder, formats_of_torch(arguments.get("pool")), tmp_path, capsys)
