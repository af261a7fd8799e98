"""Fine-tuning: what is trained and what is not, from where, on which labels, against arithmetic by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import __main__ as cli
from simclr_jax import data, exporting, methods, model, optimizer
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, pretrain, splits, trained
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


def filled(shapes):
  """Variables like initial ones, but every BatchNorm matters; much faster than compiling an init."""
  rng = np.random.default_rng(0)

  def fill(path, x):
    leaf = str(getattr(path[-1], "key", ""))
    scale, shift = (np.prod(x.shape[:-1]) ** -0.5, 0) if leaf == "kernel" else (0.1, float(leaf in ("scale", "var")))
    return (scale * rng.normal(size=x.shape) + shift).astype(x.dtype)

  state = jax.tree_util.tree_map_with_path(fill, shapes)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return state.replace(step=zeros.step, opt_state=zeros.opt_state)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """An exported encoder with its head, whose BatchNorms are not the initial ones."""
  config = tiny.config()
  net, (tx, _) = model.create(config), optimizer.create(config, 96)
  init = functools.partial(pretrain.init_state, model=net, method=methods.create(config, None), tx=tx, image_size=16)
  state = filled(jax.eval_shape(init, jax.random.key(0)))
  folder = tmp_path_factory.mktemp("start") / "encoder"
  heads = {"projector": model.variables_of(state, "projector")}
  exporting.write(folder, model.keep_encoder(state), config, scores={}, step=1, heads=heads)
  return str(folder), state


def config(**changes):
  changes = {"batch_size": 16, "train_steps": 2, "augment.size": 16, "evaluate.batch_size": 32, **changes}
  return config_lib.replace(config_lib.load("configs/finetune.py:small"), changes)


def task_of(c, devices=1):
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  c, opened = finetune.resolve(c)
  return finetune.make_task(c, opened, tiny.source(), mesh=mesh), mesh


def begin(task, mesh):
  state = filled(jax.eval_shape(task.init, jax.random.key(0)))
  return task.warm_start(jax.device_put(state, mesh_lib.replicated(mesh)))


def step(task, mesh, state):
  batch = mesh_lib.global_batch(mesh, next(iter(task.stream(0))))
  return loop.compile_step(task, mesh, loop.abstract_state(task, mesh))(jax.tree.map(jnp.copy, state), batch)


def changed(before, after):
  """{module: whether anything in it changed}, e.g. "encoder/group1"."""
  out = {}
  for path, a in jax.tree_util.tree_leaves_with_path(jax.device_get(before)):
    b = after
    for key in path:
      b = b[key.key]
    name = "/".join(key.key for key in path[:2])
    out[name] = out.get(name, False) or not np.array_equal(a, b)
  return out


def test_from_the_first_layer_of_the_head_which_is_trained(start):
  folder, trained = start
  task, mesh = task_of(config(start=folder, tap=1))
  state = begin(task, mesh)
  for name in ("encoder", "projector"):
    jax.tree.map(np.testing.assert_array_equal, state.params[name], trained.params[name])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats[name], trained.batch_stats[name])
  after, _ = step(task, mesh, state)
  params = changed(state.params, after.params)
  assert params["encoder/stem_conv"] and params["encoder/group4"] and params["projector/dense0"]
  assert params["projector/norm0"] and params["classifier/kernel"]


@pytest.mark.slow
def test_on_8_devices_as_on_1(start):
  """The loss and BatchNorm range over the whole batch, so every gradient does."""
  results = []
  for devices in (1, 8):
    task, mesh = task_of(config(start=start[0], tap=1), devices)
    after, metrics = step(task, mesh, begin(task, mesh))
    results.append(jax.device_get((after.params, after.batch_stats, metrics)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


def test_frozen_groups_stay_to_the_bit(start):
  """Weight decay and momentum included; their BatchNorms neither move nor look at the batch."""
  changes = {"optimizer.weight_decay": 0.1, "optimizer.name": "lars", "optimizer.base_lr": 1.0}
  task, mesh = task_of(config(start=start[0], tune_after=2, **changes))
  state = begin(task, mesh)
  after, _ = step(task, mesh, state)
  for tree, new in ((state.params, after.params), (state.batch_stats, after.batch_stats)):
    moved = changed(tree["encoder"], new["encoder"])
    assert any("group3" in name for name in moved) and any("group4" in name for name in moved)
    for name, moves in moved.items():
      assert moves == (name.startswith(("group3", "group4"))), name


def test_head_only_is_the_gradient_by_hand(start):
  """All groups frozen, plain SGD: kernel - lr h^T (p - y) / n - lr wd kernel, h in inference mode."""
  changes = {
    "optimizer.name": "sgd",
    "optimizer.base_lr": 0.5,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.1,
  }
  task, mesh = task_of(config(start=start[0], tune_after=4, **changes))
  state = begin(task, mesh)
  after, metrics = step(task, mesh, state)
  batch = next(iter(task.stream(0)))
  apply, _, _ = exporting.load_encoder(start[0])
  h = np.asarray(apply(batch.pixels), np.float64)
  kernel, bias = (np.asarray(state.params["classifier"][name], np.float64) for name in ("kernel", "bias"))
  logits = h @ kernel + bias
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  y = np.eye(10)[batch.label]
  np.testing.assert_allclose(metrics["loss"], -np.mean(np.log(p[y > 0])), rtol=1e-5)
  expected = kernel - 0.5 * (h.T @ (p - y) / 16 + 0.1 * kernel)
  np.testing.assert_allclose(after.params["classifier"]["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_labels_are_balanced_seeded_and_nested():
  labels = np.repeat(np.arange(4), [100, 50, 200, 7])
  one, ten = (data.class_balanced(labels, share, 0) for share in (0.01, 0.1))
  assert np.bincount(labels[one]).tolist() == [1, 1, 2, 1] and np.bincount(labels[ten]).tolist() == [10, 5, 20, 1]
  two = data.class_balanced(np.append(labels, [4, -1]), 0.01, 0, at_least=2)
  assert np.bincount(np.append(labels, [4, -1])[two]).tolist() == [2, 2, 2, 2, 1]
  assert set(one) <= set(ten) and not np.array_equal(ten, data.class_balanced(labels, 0.1, 1))
  np.testing.assert_array_equal(data.class_balanced(labels, 1.0, 0), np.arange(357))
  part = data.Selection(tiny.source(), [5, 3])
  np.testing.assert_array_equal(part.labels, tiny.source().labels[[5, 3]])
  np.testing.assert_array_equal(part.read(1), tiny.source().read(3))


def test_a_list_of_names(tmp_path):
  from PIL import Image

  for name in ("a/n01_1.png", "a/n01_2.png", "b/n02_1.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / name)
  source = data.open_source(f"folder:{tmp_path}")
  labels = config_lib.Labels(list=str(tmp_path / "some.txt"))
  (tmp_path / "some.txt").write_text("n02_1.png\nn01_2.png\n")
  assert finetune.choose(source, labels).tolist() == [1, 2]
  (tmp_path / "some.txt").write_text("n02_1.png\nn09_2.png\n")
  with pytest.raises(ValueError, match="1 of 2 names are not in data.train, such as n09_2.png"):
    finetune.choose(source, labels)


def test_a_list_of_paths_and_of_names_with_spaces(tmp_path):
  from PIL import Image

  for name in ("a b/1.png", "a b/2 3.png", "c/1.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / name)
  source = data.open_source(f"folder:{tmp_path}")
  labels = config_lib.Labels(list=str(tmp_path / "some.txt"))
  for text, chosen in (("c/1.png\r\n2 3.png\n\n", [1, 2]), (f"{tmp_path}/a b/1.png\na b/1.png", [0])):
    (tmp_path / "some.txt").write_text(text)
    assert finetune.choose(source, labels).tolist() == chosen
  (tmp_path / "some.txt").write_text("2 3.png\n1.png\n")
  with pytest.raises(
    ValueError, match="1.png is .*/a b/1.png and .*/c/1.png; write which one, as class/name"
  ) as raised:
    finetune.choose(source, labels)
  assert "\n" not in str(raised.value)
  (tmp_path / "some.txt").write_text(" \n")
  with pytest.raises(ValueError, match="0 of 0 names are not in data.train; write one per line"):
    finetune.choose(source, labels)
  with pytest.raises(ValueError, match="absent.txt: no such file"):
    finetune.choose(source, config_lib.Labels(list=str(tmp_path / "absent.txt")))
  arrays = data.ArraySource(np.zeros((12, 4, 4), np.uint8), [0] * 12, title="npz:/x/set.npz")
  (tmp_path / "some.txt").write_text("11\nset.npz:2\n")
  assert finetune.choose(arrays, labels).tolist() == [2, 11]


@pytest.mark.slow
def test_the_program(start, tmp_path, capsys):
  """Trains, scores, exports with its heads, and goes on from what it left."""
  spec = tiny.npz(tmp_path / "tiny.npz")
  changes = {"data.train": spec, "data.test": f"{spec}:test", "start": start[0], "tap": 1, "labels.fraction": 0.5}
  result = finetune.run(config(**changes), tmp_path / "run")
  page = (tmp_path / "run/report.html").read_text()
  assert "<h1>Fine-tuning on tiny</h1>" in page and "By the classifier." in page and "Confusion matrix" in page
  assert 0 <= result["scores"]["accuracy"] <= result["scores"]["top_5"] <= 1
  assert "with 47 labels" in capsys.readouterr().out
  for folder in (tmp_path / "run", tmp_path / "run/encoder"):
    opened = trained.open_start(folder)
    assert set(opened.variables) == {"encoder", "projector", "classifier"} and opened.projector["layers"] == 2
    jax.tree.map(
      np.testing.assert_array_equal,
      opened.variables["classifier"]["params"],
      jax.device_get(result["state"].params["classifier"]),
    )


def test_mistakes_are_one_line_and_touch_nothing(start, tmp_path, capsys):
  spec = tiny.npz(tmp_path / "tiny.npz")
  changes = {"data.train": spec, "data.test": f"{spec}:test", "start": start[0], "labels.fraction": 0.5}
  with pytest.raises(ValueError, match="tap=3: start=.* has 2 layers"):
    finetune.run(config(**{**changes, "tap": 3}), tmp_path / "other")
  with pytest.raises(ValueError, match=r"labels.fraction=0.5 leaves: set --config.batch_size=40, or raise labels.fr"):
    finetune.run(config(**{**changes, "batch_size": 64}), tmp_path / "other")
  with pytest.raises(ValueError, match="exceeds the 47 training images"):
    finetune.run(config(**{**changes, "batch_size": 64}), tmp_path / "other")
  with pytest.raises(ValueError, match="no run here"):
    finetune.run(config(**{**changes, "start": str(tmp_path)}), tmp_path / "other")
  folder = tiny.export(tmp_path / "encoder", **{"data.train": spec, "data.test": "", "data.held_out": 0.1})
  unseen = {"data.test": "", "data.held_out": 0.3, "start": str(folder), "labels.fraction": 1.0}
  with pytest.raises(ValueError, match="data.held_out=0.3: the training of .* held out 0.1, so it saw some of the im"):
    finetune.run(config(**{**changes, **unseen}), tmp_path / "other")
  assert not (tmp_path / "other").exists()
  assert cli.main(["pretrain", "--config=configs/finetune.py:small", f"--workdir={tmp_path / 'x'}"]) == 1
  assert "is a recipe for simclr finetune" in capsys.readouterr().err
  (tmp_path / "tuned").mkdir()
  (tmp_path / "tuned/config.json").write_text(config_lib.to_json(config(**changes)))
  assert cli.main(["knn", f"--workdir={tmp_path / 'tuned'}"]) == 1
  assert "is a run of simclr finetune: its encoder is in" in capsys.readouterr().err


def test_the_start_says_what_the_network_is_and_the_recipe_how_it_computes(start, tmp_path):
  given = config(start=start[0], **{"encoder.dtype": "bfloat16", "encoder.arrangement": "packed"})
  resolved, _ = finetune.resolve(given)
  assert (resolved.encoder.width, resolved.encoder.dtype, resolved.encoder.arrangement) == (
    0.0625,
    "bfloat16",
    "packed",
  )
  (tmp_path / "checkpoints").mkdir()
  checkpoint.write_config(tmp_path, config_lib.to_json(resolved))
  gone = config_lib.replace(given, {"start": str(tmp_path / "gone")})
  assert finetune.resolve(given, tmp_path) == (resolved, None)  # a run that has begun does not open it again
  assert finetune.resolve(gone, tmp_path)[0].encoder == resolved.encoder
  task = finetune.make_task(resolved, None, tiny.source(), mesh=mesh_lib.make_mesh())
  state = begin(task, mesh_lib.make_mesh())  # no checkpoint could be loaded
  assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(s.params["encoder"]) for s in (state, start[1])), strict=True))  # fmt: skip


def test_a_start_of_another_kind_computes_as_the_recipe_says():
  vit = config_lib.load("vit").encoder
  own = config_lib.Encoder(name="mine:net")

  def given(encoder, **how):
    changes = {f"encoder.{key}": value for key, value in how.items()}
    return trained.with_networks(config_lib.replace(config_lib.load("finetune:v2_10pct"), changes), encoder).encoder

  found = given(dataclasses.replace(vit, dtype="float32"), remat="block")
  assert (found.name, found.dtype, found.remat) == ("vit", "bfloat16", "block")
  assert given(dataclasses.replace(vit, remat="block")).remat == "none"
  assert given(own) == own
  for encoder, key, value in ((vit, "remat", "group"), (vit, "arrangement", "packed"), (own, "remat", "block")):
    with pytest.raises(UserError, match=f"encoder.{key}='{value}': encoder.name={encoder.name} takes"):
      given(encoder, **{key: value})


def test_an_export_says_which_images_its_training_held_out(tmp_path, capsys):
  spec = tiny.npz(tmp_path / "tiny.npz")
  changes = {"data.train": spec, "data.test": "", "data.held_out": 0.1}
  _, test = splits.open_data(tiny.config(**changes).data)
  folder, earlier = (
    tiny.export(tmp_path / name, kept, **changes) for name, kept in (("a", test.fingerprint()), ("b", None))
  )
  trained.TrainedRun(folder)
  assert not capsys.readouterr().out
  tiny.npz(tmp_path / "tiny.npz", 90)
  with pytest.raises(ValueError, match="other images are held out now .*, and it trained on some of them"):
    trained.TrainedRun(folder)
  trained.TrainedRun(earlier)
  assert "does not say which images it held out" in capsys.readouterr().out


def test_names_of_held_out_images_are_told_from_unknown_ones(tmp_path):
  source = data.ArraySource(np.zeros((8, 4, 4), np.uint8), np.arange(8) % 2, title="set")
  train, test = data.Selection(source, range(6)), data.Selection(source, [6, 7])
  (tmp_path / "list.txt").write_text("set:1\nset:6\n")
  labels = config_lib.Labels(list=str(tmp_path / "list.txt"))
  with pytest.raises(
    ValueError, match="1 of 2 names are held out of data.train to be scored, such as set:6; remove them"
  ):
    finetune.choose(train, labels, test)
  with pytest.raises(ValueError, match="1 of 2 names are not in data.train, such as set:6"):
    finetune.choose(train, labels)


def test_an_unknown_operator_of_the_views_touches_nothing(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  c = config(
    **{"data.train": spec, "data.test": f"{spec}:test", "encoder.width": 0.0625, "augment.color_strength": 0.5}
  )
  with pytest.raises(ValueError, match="sobell.*sobel") as raised:
    c = config_lib.replace(c, {"augment.extra": (("sobell", 0.1),), "labels.fraction": 1.0})
    finetune.run(c, tmp_path / "run")
  assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
