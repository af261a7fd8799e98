"""The Vision Transformer against plain loops in float64, its fixed parts, and a run that is exported; an encoder of one's own."""

import functools
import re
import sys
import textwrap
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy.special import erf

from simclr_jax import api, exporting, load_encoder, methods, model, optimizer
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import distill, finetune, pretrain, trained, transfer
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError
from simclr_jax.vit import SIZES, positions, vit

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = dict(size="Ti", patch=8)


@pytest.fixture(scope="module")
def variables():
  """Of a ViT-Ti, all of them away from their initial zeros and ones."""
  shapes = jax.eval_shape(vit(**SMALL).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.05).astype(np.float32), shapes)


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def reference(params, image, patch, heads, pool):
  """h of one image [h, w, 3], patch by patch and head by head."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  rows, columns = image.shape[0] // patch, image.shape[1] // patch
  tokens = [p["class_token"][0, 0]]
  for row in range(rows):
    for column in range(columns):
      pixels = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(-1)
      d = p["class_token"].shape[-1]
      angle = [10000.0 ** (-4 * i / d) for i in range(d // 4)]
      where = [f(at * a) for at in (column, row) for f in (np.sin, np.cos) for a in angle]
      tokens.append(dense(pixels, p["patch_embed"]) + np.array(where))
  x = np.stack(tokens)
  for i in range(12):
    b = p[f"block{i + 1}"]
    q, k, v = np.split(dense(norm(x, b["norm1"]), b["qkv"]), 3, axis=-1)
    out, width = np.zeros_like(x), x.shape[1] // heads
    for head in range(heads):
      part = slice(head * width, (head + 1) * width)
      scores = q[:, part] @ k[:, part].T / np.sqrt(width)
      weights = np.exp(scores - scores.max(1, keepdims=True))
      out[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
    x = x + dense(out, b["proj"])
    hidden = dense(norm(x, b["norm2"]), b["fc1"])
    x = x + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, b["fc2"])
  x = norm(x, p["norm"])
  return x[0] if pool == "token" else x[1:].mean(0)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_h_is_that_of_plain_loops(variables, pool):
  images = np.random.default_rng(1).random((2, 16, 24, 3), np.float32)  # not square
  h = vit(**SMALL, pool=pool).apply(variables, images)
  wanted = np.stack([reference(variables["params"], image.astype(np.float64), 8, 3, pool) for image in images])
  assert h.dtype == jnp.float32 and h.shape == (2, 192)
  np.testing.assert_allclose(h, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_rematerialization_changes_nothing_and_bfloat16_little(variables):
  images = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
  h = vit(**SMALL).apply(variables, images)
  np.testing.assert_array_equal(h, vit(**SMALL, remat="block").apply(variables, images))
  half = vit(**SMALL, dtype="bfloat16").apply(variables, images)
  assert half.dtype == jnp.float32 and np.abs(half - h).max() < 0.05 * np.abs(h).max()


def test_positions_differ_and_do_not_depend_on_the_size_of_the_image():
  small, large = positions(2, 3, 16), positions(4, 5, 16)
  assert len(np.unique(large.round(6), axis=0)) == 20
  np.testing.assert_array_equal(small.reshape(2, 3, 16), large.reshape(4, 5, 16)[:2, :3])


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_quarters_have_no_gradient(variables, frozen):
  images = np.random.default_rng(1).random((1, 8, 8, 3), np.float32)
  grads = jax.grad(lambda params: vit(**SMALL).apply({"params": params}, images, tune_after=frozen).sum())(
    variables["params"]
  )
  moved = {name for name, tree in grads.items() if any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))}
  assert moved - {"norm"} == {f"block{i + 1}" for i in range(3 * frozen, 12)}


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_no_optimizer_moves_the_patch_projection(variables, name):
  params = variables["params"]
  tx = optimizer.OPTIMIZERS[name](0.1, weight_decay=0.1)
  grads = jax.grad(lambda p: vit(**SMALL).apply({"params": p}, jnp.ones((1, 8, 8, 3))).sum())(params)
  steps, _ = tx.update(grads, tx.init(params), params)
  assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(steps["patch_embed"]))
  assert np.abs(steps["block1"]["qkv"]["kernel"]).max() > 0


@pytest.mark.parametrize(
  "arguments, words",
  [
    (dict(size="L", patch=4), "size 'L': expected one of Ti, S, B"),
    (dict(size="Ti", patch=0), "patch 0: expected the side"),
    (dict(size="Ti", patch=4, pool="max"), "pool 'max': expected one of token, mean"),
    (dict(size="Ti", patch=4, remat="group"), "remat 'group'"),
    (dict(size="Ti", patch=4, dtype="float16"), "dtype 'float16'"),
  ],
)
def test_impossible_arguments(arguments, words):
  with pytest.raises(ValueError, match=words):
    vit(**arguments)


def test_images_that_are_no_multiple_of_the_patch():
  with pytest.raises(ValueError, match="images of 12 x 16 pixels: expected multiples of the patch of 8"):
    vit(**SMALL).init(jax.random.key(0), jnp.zeros((1, 12, 16, 3)))


def vit_config(**changes):
  encoder = {"encoder.name": "vit", "encoder.size": "Ti", "encoder.patch": 8}
  resnets = {"encoder.depth": None, "encoder.width": 1.0, "encoder.stem": "imagenet"}
  return tiny.config(**{**resnets, **encoder, "train_steps": 2, **changes})


@pytest.mark.parametrize("tap", [0, 1])
def test_it_is_fine_tuned_and_is_a_teacher(tap):
  """Without BatchNorm of its own; with tap=1 the head has some."""
  source, mesh = tiny.source(), mesh_lib.make_mesh()
  net, method = model.create(vit_config()), methods.create(vit_config(), None, source)
  init = functools.partial(pretrain.init_state, model=net, method=method, tx=optax.identity(), image_size=16)
  state = jax.tree.map(lambda x: np.full(x.shape, 0.25, x.dtype), jax.eval_shape(init, jax.random.key(0)))
  networks = {name: model.variables_of(state, name) for name in ("encoder", "projector")}
  config = vit_config()
  start = trained.Start(config.encoder, config.projector, networks, config)
  changes = {"batch_size": 16, "train_steps": 2, "augment.size": 16, "evaluate.batch_size": 32, "tap": tap}
  c = config_lib.replace(
    config_lib.load("finetune:small"), {**changes, "encoder": start.encoder, "projector": start.projector}
  )
  task = finetune.make_task(c, start, source, mesh=mesh)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  begun = task.warm_start(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
  assert jax.tree.structure(begun) == jax.tree.structure(shapes)
  assert float(begun.params["encoder"]["block1"]["qkv"]["kernel"].max()) == 0.25 and bool(begun.batch_stats) == bool(
    tap
  )
  after, metrics = jax.eval_shape(task.step, begun, next(iter(task.stream(0))))
  assert jax.tree.structure(after) == jax.tree.structure(shapes) and metrics["loss"].shape == ()
  apply = functools.partial(finetune.create(c, 10).apply, train=False)
  teacher = types.SimpleNamespace(variables={"params": begun.params, "batch_stats": begun.batch_stats}, apply=apply)
  student = distill.make_task(
    config_lib.replace(config_lib.load("distill:small"), {**changes, "teacher": "x", "encoder": start.encoder, "tap": 0}),
    None, source, mesh=mesh, teacher=teacher, loss=functools.partial(distill.loss, temperature=1.0, alpha=1.0),
  )  # fmt: skip
  state = jax.eval_shape(student.init, jax.random.key(0))
  assert jax.eval_shape(student.step, state, next(iter(student.stream(0))), *student.constants)[1]["loss"].shape == ()


@pytest.mark.parametrize("blocks, tune_after", [(8, 1), (10, 1), (10, 3), (8, 4)])
def test_what_is_frozen_has_neither_gradient_nor_decay_at_any_depth(monkeypatch, blocks, tune_after):
  monkeypatch.setitem(SIZES, "S", (8, blocks, 2))
  net = vit("S", patch=4)
  images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
  params = jax.tree.map(lambda x: x + 0.1, net.init(jax.random.key(0), images)["params"])
  grads = jax.grad(lambda params: jnp.sum(jnp.sin(net.apply({"params": params}, images, tune_after=tune_after))))(
    params
  )
  changes = {"tune_after": tune_after, "train_steps": 2, "optimizer.weight_decay": 0.1, "optimizer.warmup_epochs": 0.0}
  tx, _ = finetune.optimizer_of(config_lib.replace(config_lib.load("finetune:small"), changes), net, 100)
  updates, _ = tx.update({"encoder": grads}, tx.init({"encoder": params}), {"encoder": params})
  frozen = {"patch_embed", "class_token", *(f"block{i + 1}" for i in range(blocks * tune_after // 4))}
  for name in params:
    for tree in (grads[name], updates["encoder"][name]):
      assert any(np.any(x) for x in jax.tree.leaves(tree)) == (name not in frozen), name


def test_a_view_that_is_no_multiple_of_the_patch_is_one_line(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  config = vit_config(**{"augment.size": 12, "data.train": spec, "data.test": f"{spec}:test"})
  with pytest.raises(UserError, match="images of 12 x 12 pixels: expected multiples of the patch of 8"):
    pretrain.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_encoder_that_takes_no_images_of_a_size_is_one_line(tmp_path):
  net, config = model.create(vit_config()), vit_config()
  shapes = jax.eval_shape(net.encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  folder = exporting.write(tmp_path / "encoder", weights, config, scores={}, step=0)
  words = "images of 20 x 20 pixels: expected multiples of the patch of 8"
  with pytest.raises(UserError, match=words):
    trained.TrainedRun(folder, overrides=["--config.augment.size=20"])
  with pytest.raises(UserError, match=words):
    transfer.FrozenEncoder(trained.open_start(folder), config_lib.replace(config, {"augment.size": 20}), None)


def test_exact_statistics_of_a_network_without_batch_norm():
  changes = {"projector.kind": "none", "microbatches": 2, "microbatch_norm": "exact"}
  task = pretrain.make_task(vit_config(**changes), tiny.source(), mesh=mesh_lib.make_mesh())
  state = jax.eval_shape(task.init, jax.random.key(0))
  after, _ = jax.eval_shape(task.step, state, next(iter(task.stream(0))))
  assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"encoder.patch": None}, "encoder.patch is missing"),
    ({"encoder.depth": 18}, "encoder.depth=18: encoder.name=vit takes size, patch"),
    ({"encoder.arrangement": "packed"}, "encoder.arrangement='packed': encoder.name=vit takes"),
    ({"encoder.remat": "group"}, "encoder.remat='group': encoder.name=vit takes none or block"),
    ({"encoder.name": "swin"}, "encoder.name='swin': expected resnet, vit, or module:function"),
  ],
)
def test_keys_of_another_encoder_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    vit_config(**changes)


@pytest.mark.slow
def test_a_run_is_exported_and_loaded(tmp_path, capsys):
  spec = tiny.npz(tmp_path / "tiny.npz")
  config = vit_config(**{"data.train": spec, "data.test": f"{spec}:test"})
  result = pretrain.run(config, tmp_path / "run")
  encode, variables, card = load_encoder(tmp_path / "run/encoder")
  images = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
  h = vit(**SMALL).apply(model.keep_encoder(result["state"]), images)
  np.testing.assert_allclose(encode(images), h, rtol=1e-5, atol=1e-5)
  assert repr(load_encoder(tmp_path / "run")).startswith("Encoder(ViT-Ti, patch 8, images [n, 16, 16, 3] -> h [n, 192]")
  assert "--format=timm" in (tmp_path / "run/report.html").read_text()
  assert card["architecture"] == dict(name="vit", size="Ti", patch=8, pool="token", remat="none", dtype="float32")
  for kind in ("orbax", "safetensors", "stablehlo", "onnx"):
    made = exporting.Export(kind, variables, exporting.make_card(variables, config, scores={}, step=2, format=kind))
    exporting.write_format(tmp_path / kind, made, exporting.make_example(made), sys.executable, False)
    assert float(re.search(rf"{kind}: .*difference ([\d.e-]+)", capsys.readouterr().out)[1]) <= 1e-5


class Mean(nn.Module):
  """The smallest encoder that keeps the contract of encoder.py."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(8)(x.mean((1, 2)))


def test_an_encoder_of_ones_own_is_exported_and_loaded(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "test_vit", sys.modules[__name__])
  mine = {"encoder.depth": None, "encoder.width": 1.0, "encoder.stem": "imagenet", "encoder.name": "test_vit:Mean"}
  images = np.zeros((2, 16, 16, 3), np.float32)
  variables = Mean().init(jax.random.key(0), images, train=False)
  exporting.write(tmp_path / "encoder", variables, tiny.config(**mine), scores={}, step=0)
  encode, _, card = load_encoder(tmp_path / "encoder", network=Mean())
  assert encode(images).shape == (2, 8) and card["feature_dimension"] == 8


@pytest.mark.slow
def test_an_encoder_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / "my_nets.py").write_text(
    textwrap.dedent("""
      import flax.linen as nn
      from test_vit import Mean

      def small() -> nn.Module:
        return Mean()

      def other():
        raise SystemExit("called")
    """)
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setitem(sys.modules, "test_vit", sys.modules[__name__])
  spec = tiny.npz(tmp_path / "tiny.npz")
  mine = {"encoder.depth": None, "encoder.width": 1.0, "encoder.stem": "imagenet", "encoder.name": "my_nets:small"}
  config = tiny.config(**mine, **{"data.train": spec, "data.test": f"{spec}:test", "train_steps": 2})
  pretrain.run(config, tmp_path / "run")
  with pytest.raises(UserError, match="network=my_nets:small"):
    load_encoder(tmp_path / "run/encoder")
  encode, _, card = load_encoder(tmp_path / "run/encoder", network=Mean())
  assert "Encoder(my_nets:small, images [n, 16, 16, 3] -> h [n, 8]" in repr(
    load_encoder(tmp_path / "run/encoder", Mean())
  )
  assert "network=small()" in exporting.snippet("e", 16, "my_nets:small")
  assert encode(np.zeros((2, 16, 16, 3), np.float32)).shape == (2, 8) and card["feature_dimension"] == 8
  encode, *_ = api.pretrain(None, str(tmp_path / "run"), resume=True)
  assert encode(np.zeros((2, 16, 16, 3))).shape == (2, 8)
  tuned = {"start": str(tmp_path / "run"), "data.train": spec, "data.test": f"{spec}:test", "data.data_dir": ""}
  tuned |= {
    "train_steps": 1,
    "train_epochs": 0.0,
    "batch_size": 16,
    "labels.fraction": 1.0,
    "augment.size": 16,
    "evaluate.batch_size": 96,
  }
  finetune.run(config_lib.replace(config_lib.load("finetune:small"), tuned), tmp_path / "tuned")
  opened = trained.TrainedRun(tmp_path / "tuned")
  assert opened.h(opened.test_source)[0].shape == (len(opened.test_source), 8)
  for name in ("my_nets:other", "os:abort", "my_nets:none", "no_such:module"):
    with pytest.raises(ValueError, match="encoder '"):
      model.make_encoder(name)
