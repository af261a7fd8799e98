"""Official checkpoints, written here with the official names and shapes, against the official forward passes."""

import jax
import numpy as np
import pytest
import tensorflow as tf
import test_encoder as golden
from flax import traverse_util

import simclr_jax
from simclr_jax import __main__ as cli
from simclr_jax.encoder import resnet
from simclr_jax.importing import official
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune

TF1 = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def case_of(depth, width=1, *, sk=False, se=0.0, size=64):
  """A network as the golden file describes one, without its numbers."""
  return {"depth": depth, "width": width, "sk_ratio": 0.0625 * sk, "se_ratio": se, "image_size": size}


def tf1_variables(case, *, layers=3, classes=1000, tf2=False):
  """({official name: array}, our encoder variables) with the golden file's weights; the heads hold random numbers."""
  variables = golden.hashed_variables(golden.build(case), case)
  params, stats = (traverse_util.flatten_dict(variables[name]) for name in ("params", "batch_stats"))
  convs, norms = golden.creation_order(case)
  names = {}
  scope, batch_norm = ("resnet/block", "sync_batch_normalization") if tf2 else ("base_model", "batch_normalization")
  for k, path in enumerate(convs):
    for leaf in ("kernel", "bias"):
      if (*path, leaf) in params:
        names[f"{scope}/conv2d{f'_{k}' * (k > 0)}/{leaf}"] = params[*path, leaf]
  for k, path in enumerate(norms):
    for leaf, theirs in TF1.items():
      values = params if leaf in ("scale", "bias") else stats
      names[f"{scope}/{batch_norm}{f'_{k}' * (k > 0)}/{theirs}"] = values[*path, leaf]
  width = params[*norms[-1], "scale"].size
  rng = np.random.default_rng(0)
  head = "projection_head" if tf2 else "head_contrastive"
  for j in range(layers):
    out = 128 if j == layers - 1 else width
    names[f"{head}/nl_{j}/dense{f'_{j}' * (tf2 and j > 0)}/kernel"] = np.float32(rng.normal(size=(width, out)))
    for theirs in list(TF1.values()):
      if theirs != "beta" or j < layers - 1:
        norm = f"{batch_norm}_{len(norms) + j}" if tf2 else batch_norm
        names[f"{head}/nl_{j}/{norm}/{theirs}"] = np.float32(rng.normal(size=out))
  if classes:
    names["head_supervised/linear_layer/dense/kernel"] = np.float32(rng.normal(size=(width, classes)))
    names["head_supervised/linear_layer/dense/bias"] = np.float32(rng.normal(size=classes))
  return names, variables


def write_bundle(prefix, names):
  slots = {f"{name}/Momentum": np.zeros_like(value) for name, value in list(names.items())[:3]}
  names = {**names, **slots, "global_step": np.int64(250228)}
  tf.raw_ops.SaveV2(
    prefix=str(prefix), tensor_names=list(names), shape_and_slices=[""] * len(names), tensors=list(names.values())
  )
  return str(prefix)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


CASES = {
  "r18-cifar": case_of(18, size=32),
  "r50_1x_sk0-narrow": case_of(50, 0.125),
  "r101_1x_sk1-narrow": case_of(101, 0.125, sk=True),
  "r152-narrow": case_of(152, 0.125),
  "r34_sk1-narrow": case_of(34, 0.25, sk=True),
  "r50_se-narrow": case_of(50, 0.25, se=0.25),
}
FAST = ("r18-1x-32px", "r50-1x-64px-sk0.0625")
FULL = {
  "r50_2x": case_of(50, 2),
  "r101_1x_sk1": case_of(101, sk=True),
  "r152": case_of(152),
}


@pytest.mark.parametrize(
  "case",
  [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name in FULL)) for name, c in (CASES | FULL).items()],
)
def test_every_variable_finds_its_place(case, tmp_path):
  names, want = tf1_variables(case)
  encoder, projector, classifier, info = official.load(write_bundle(tmp_path / "model.ckpt-250228", names))
  same(encoder, want)
  architecture = info["encoder"]
  assert (architecture["depth"], architecture["width"]) == (case["depth"], case["width"])
  assert (architecture["sk_ratio"], architecture["se_ratio"]) == (case["sk_ratio"], case["se_ratio"])
  assert architecture["stem"] == ("cifar" if case["image_size"] <= 32 else "imagenet")
  assert info["resize"] == "bicubic_tf1" and info["step"] == 250228 and not info["has_ema"]
  assert info["projector"] == {"kind": "nonlinear", "layers": 3, "out_dim": 128} and info["num_classes"] == 1000
  for j in range(3):
    same(projector["params"][f"dense{j}"]["kernel"], names[f"head_contrastive/nl_{j}/dense/kernel"])
    theirs = names[f"head_contrastive/nl_{j}/batch_normalization/moving_variance"]
    same(projector["batch_stats"][f"norm{j}"]["var"], theirs)
  assert "bias" not in projector["params"]["norm2"]
  same(classifier["params"]["kernel"], names["head_supervised/linear_layer/dense/kernel"])


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(c, id=golden.case_name(c), marks=[pytest.mark.slow] * (golden.case_name(c) not in FAST))
    for c in golden.CASES
  ],
)
def test_forward_pass_is_the_official_one(case, tmp_path):
  encoder, _, _, info = official.load(write_bundle(tmp_path / "model.ckpt-0", tf1_variables(case)[0]))
  model = resnet(**info["encoder"])
  apply = jax.jit(lambda v, x: model.apply(v, x, False, mutable=["intermediates"]))
  h, state = apply(encoder, golden.images(case["image_size"]))
  golden.assert_matches(case["eval"], state["intermediates"], h, golden.EVAL_TOLERANCES)


def test_tf2_checkpoint_and_saved_model(tmp_path):
  """As the TF2 code writes them: keyed by the object graph, proper names beside; numbers go on counting into the head."""
  names, want = tf1_variables(case_of(18, 0.25, size=32), classes=10, tf2=True)

  class Module(tf.Module):
    pass

  module, model = Module(), Module()
  model.parts = [tf.Variable(value, name=name) for name, value in names.items() if not name.endswith("moving_mean")]
  means = [tf.Variable(value, name=name) for name, value in names.items() if name.endswith("moving_mean")]
  module.model, module.trainable_variables_list = model, means
  tf.saved_model.save(module, str(tmp_path / "saved"))
  whole = tf.train.Checkpoint(model=module, global_step=tf.Variable(7, dtype=tf.int64))
  prefix = whole.save(str(tmp_path / "ckpt"))
  for path, kind, step in ((prefix, "TF2 checkpoint", 7), (tmp_path / "saved", "SavedModel", None)):
    encoder, projector, classifier, info = official.load(path)
    same(encoder, want)
    assert info["format"] == kind and info["resize"] == "bicubic" and info["step"] == step
    assert projector["params"]["dense1"]["kernel"].shape == (128, 128) and info["num_classes"] == 10


def test_moving_averages_are_a_copy(tmp_path):
  names, want = tf1_variables(case_of(18, 0.25, size=32), classes=0)
  copies = {f"ema_model/{name}": value + 1 for name, value in names.items()}
  prefix = write_bundle(tmp_path / "model.ckpt-1", names | copies | {"memory/queue": np.zeros((8, 128), np.float32)})
  encoder, _, classifier, info = official.load(prefix)
  same(encoder, want)
  assert info["has_ema"] and classifier is None and info["num_classes"] == 0
  same(official.load(prefix, ema=True)[0], jax.tree.map(lambda x: x + 1, want))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda n: n | {"base_model/conv2d_3/gamma_two": np.zeros(3)}, "unknown base_model/conv2d_3/gamma_two$"),
    (lambda n: {k: v for k, v in n.items() if k != "base_model/conv2d_7/kernel"}, "missing conv2d_7/kernel$"),
    (
      lambda n: n | {"base_model/batch_normalization_4/beta": np.zeros(5)},
      r"base_model/batch_normalization_4/beta is \[5\] and should be \[16\]$",
    ),
    (
      lambda n: {k: v for k, v in n.items() if k != "head_contrastive/nl_1/batch_normalization/gamma"},
      "missing nl_1/batch_normalization/gamma$",
    ),
    (
      lambda n: {k: v for k, v in n.items() if k != "head_supervised/linear_layer/dense/kernel"},
      "missing linear_layer/dense/kernel$",
    ),
    (lambda n: {"weights": np.zeros(3)}, "holds no variable of a ResNet"),
  ],
)
def test_what_does_not_fit_is_one_line(change, message, tmp_path):
  names, _ = tf1_variables(case_of(18, 0.25, size=32))
  prefix = write_bundle(tmp_path / "model.ckpt-1", change(names))
  with pytest.raises(ValueError, match=message) as error:
    official.load(prefix)
  assert "\n" not in str(error.value)


def test_the_output_is_checked_before_the_checkpoint_is_read(tmp_path, capsys, monkeypatch):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/file").write_text("")
  monkeypatch.setattr(official, "load", None)
  assert cli.main(["import", "model.ckpt-1", f"--output={tmp_path / 'out'}"]) == 1
  assert "is not empty: add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, 1000])
def test_data_that_are_missing_or_cut_off_are_named(size, tmp_path):
  prefix = write_bundle(tmp_path / "model.ckpt-1", tf1_variables(case_of(18, 0.25, size=32))[0])
  data = tmp_path / "model.ckpt-1.data-00000-of-00001"
  data.unlink() if size is None else data.write_bytes(data.read_bytes()[:size])
  with pytest.raises(ValueError, match="cannot be read .*: copy the checkpoint again, with all its files$") as error:
    official.load(prefix)
  assert "\n" not in str(error.value)


def test_the_program(tmp_path, capsys):
  names, want = tf1_variables(case_of(18, 0.25, size=32), classes=0)
  prefix = write_bundle(tmp_path / "model.ckpt-1", names)
  assert cli.main(["import", prefix, f"--output={tmp_path / 'out'}"]) == 0
  assert "ResNet-18 0.25x, cifar stem, projector" in capsys.readouterr().out
  _, variables, card = simclr_jax.load_encoder(tmp_path / "out")
  same(variables, want)
  assert card["preprocessing"]["resize"].startswith("bicubic_tf1: a = -0.75")
  assert card["preprocessing"]["size"] == 32 and card["preprocessing"]["center_crop"] == 1.0
  assert card["pretraining"]["source"]["format"] == "TF1 bundle" and card["step"] == 250228
  # Fine-tuning goes on from it: its head, its resize.
  recipe = config_lib.replace(config_lib.load("configs/finetune.py:v2_10pct"), {"start": str(tmp_path / "out")})
  config, start = finetune.resolve(recipe)
  assert config.augment.resize == "bicubic_tf1" and config.encoder.depth == 18 and config.encoder.stem == "cifar"
  assert config.projector.layers == 3 and start.variables["projector"]["params"]["dense0"]["kernel"].shape == (128, 128)
  with pytest.raises(ValueError, match="config.tap=4: .* has 3 layers in its head"):
    finetune.resolve(config_lib.replace(recipe, {"tap": 4}))
  assert cli.main(["import", str(tmp_path / "nothing"), f"--output={tmp_path / 'out2'}"]) == 1
  assert "no checkpoint; give the part before .index" in capsys.readouterr().err
