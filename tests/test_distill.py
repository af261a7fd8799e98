"""Distillation against equations 2 and 3 by hand, and a whole run of a student that sees no label."""

import contextlib
import functools
import json
import types

import images
import jax
import numpy as np
import pytest
import tiny
from test_finetune import filled

from simclr_jax import augment, data, exporting, model
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import distill, finetune, same, trained
from simclr_jax.runtime import checkpoint, files, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError
from simclr_jax.views import Batch


def softmax(x):
  e = np.exp(x - x.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def test_loss_is_equations_2_and_3():
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 6, 4))
  label = np.array([0, -1, 3, -1, -1, 2])
  for temperature in (0.1, 1.0, 2.0):
    soft = -np.mean(np.sum(softmax(teacher / temperature) * np.log(softmax(student / temperature)), 1))
    hard = -np.mean(np.log(softmax(student)[[0, 2, 5], [0, 3, 2]]))
    for alpha in (1.0, 0.7):
      batch = Batch(pixels=None, label=label, index=None, seed=None, teacher=teacher)
      value, metrics = distill.loss(student, batch, temperature=temperature, alpha=alpha)
      assert float(value) == pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-5)
      assert float(metrics["distillation_loss"]) == pytest.approx(soft, rel=1e-5)
  # With a teacher that is sure, distillation is the cross-entropy of its choice; it is least where they agree.
  assert distill.distillation(student, 1e4 * teacher, 1.0) == pytest.approx(
    -np.mean(np.log(softmax(student)[np.arange(6), teacher.argmax(1)])), rel=1e-5
  )
  slope = jax.grad(lambda s: distill.distillation(s, np.float32(teacher), 0.5))(np.float32(teacher))
  np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_metrics_of_labels_are_of_the_batches_that_have_some():
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 4, 3)).astype(np.float32)

  def metrics(label, alpha):
    batch = Batch(pixels=None, label=np.array(label), index=None, seed=None, teacher=teacher)
    loss = functools.partial(distill.loss, batch=batch, temperature=1.0, alpha=alpha)
    (value, found), slope = jax.value_and_grad(loss, has_aux=True)(student)
    assert np.isfinite(value) and np.isfinite(slope).all()
    return found

  of_labels = {"train_accuracy", "supervised_loss"}
  assert not of_labels & metrics([0, 1, 2, 0], 1.0).keys()
  some, none = metrics([int(student[0].argmax()), -1, -1, -1], 0.5), metrics([-1] * 4, 0.5)
  assert some["train_accuracy"] == 1 and some["supervised_loss"] > 0
  assert all(np.isnan(none[name]) for name in of_labels) and np.isfinite(none["distillation_loss"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """What fine-tuning exports, with random weights."""
  c = config_lib.replace(config_lib.load("finetune:small"), {"augment.size": 16, "encoder.width": 0.0625})
  task = finetune.make_task(c, None, tiny.source(), mesh=mesh_lib.make_mesh())
  state = filled(jax.eval_shape(task.init, jax.random.key(0)))
  folder = tmp_path_factory.mktemp("teacher") / "encoder"
  heads = {"classifier": model.variables_of(state, "classifier")}
  exporting.write(folder, model.keep_encoder(state), c, scores={}, step=1, heads=heads)
  return str(folder), state


def config(teacher, spec, **changes):
  changes = {
    "teacher": teacher,
    "data.train": spec,
    "data.test": f"{spec}:test",
    "batch_size": 16,
    "train_steps": 2,
    **changes,
  }
  changes |= {"augment.size": 16, "encoder.width": 0.0625, "evaluate.batch_size": 32}
  return config_lib.replace(config_lib.load("configs/distill.py:small"), changes)


def test_the_teacher_and_its_cache(teacher, tmp_path):
  """Its logits are those of the network it was; the cache has them by image, and hides every label."""
  folder, state = teacher
  source, mesh = tiny.source(), mesh_lib.make_mesh(jax.devices()[:1])
  c = config(folder, "unused", cache=True)
  opened = distill.Teacher(folder)
  make = {"mesh": mesh, "loss": None, "evaluators": {}, "teacher": opened}
  cache = distill._logits(c, opened, source, mesh)
  task = distill.make_task(c, None, source, chosen=np.arange(10), cache=cache, **make)
  batch = next(iter(task.stream(0)))
  assert (batch.label == -1).all()  # alpha is 1: not even those that were chosen
  images = np.stack([augment.center_crop(source.read(i), size=16, proportion=1.0) for i in batch.index])
  h, _, _ = exporting.load_encoder(folder)
  classifier = state.params["classifier"]
  np.testing.assert_allclose(batch.teacher, h(images) @ classifier["kernel"] + classifier["bias"], rtol=1e-4, atol=1e-4)
  c = config(folder, "unused", cache=True, alpha=0.5)
  task = distill.make_task(c, None, source, chosen=np.arange(10), cache=cache, **make)
  batch = next(iter(task.stream(0)))
  np.testing.assert_array_equal(batch.label, np.where(batch.index < 10, source.labels[batch.index], -1))


def test_an_unreadable_test_image_is_left_out_of_the_teachers_score(tmp_path):
  source = tiny.source(40)
  for i in range(40):
    images.save(tmp_path / f"{source.labels[i]}/{i:02}.png", source.read(i))
  (tmp_path / f"{source.labels[5]}/05.png").write_bytes(b"")
  one = source.labels[7]  # the class that this teacher always names
  classes = sorted({str(label) for label in source.labels})
  apply = lambda _, x: jax.nn.one_hot(jax.numpy.full(len(x), classes.index(str(one))), len(classes))  # noqa: E731
  always = types.SimpleNamespace(variables={}, apply=apply)
  c = config("x", "unused", **{"data.max_bad_fraction": 0.1})
  found = distill.accuracy(c, always, data.open_source(f"folder:{tmp_path}"), mesh_lib.make_mesh(jax.devices()[:1]))
  assert found == pytest.approx(np.mean(np.delete(source.labels, 5) == one))


@pytest.mark.parametrize("program", [finetune, distill])
def test_unreadable_training_images_are_listed_in_the_run(program, tmp_path, monkeypatch):
  source = tiny.source(40)
  for i in range(40):
    images.save(tmp_path / f"set/{source.labels[i]}/{i:02}.png", source.read(i))
  (bad := tmp_path / f"set/{source.labels[5]}/05.png").write_bytes(b"")
  apply = lambda variables, images: images  # noqa: E731
  teacher = types.SimpleNamespace(
    num_classes=len(set(source.labels)), variables={}, apply=apply, resize="bicubic", config=tiny.config()
  )
  monkeypatch.setattr(distill, "Teacher", lambda _: teacher)
  drawn = []

  def run(task, *_, **__):
    batches = task.stream(0)
    drawn.append([next(batches) for _ in range(3)])  # an epoch and more
    raise loop.Diverged("far enough")

  monkeypatch.setattr(loop, "run", run)
  changes = {"data.train": f"folder:{tmp_path}/set", "data.test": "", "data.max_bad_fraction": 0.1, "augment.size": 16}
  changes |= {"batch_size": 16, "train_steps": 3, "evaluate.batch_size": 32, "labels.fraction": 1.0} | (
    {"teacher": "x"} if program is distill else {}
  )
  c = config_lib.replace(config_lib.load(f"{program.__name__.rpartition('.')[2]}:small"), changes)
  with pytest.raises(loop.Diverged):
    program.run(c, tmp_path / "run")
  assert drawn and (tmp_path / "run/unreadable.txt").read_text() == f"{bad}\tempty file\n"


def test_an_unreadable_image_ends_a_run_with_a_cache_before_the_older_one_is_deleted(tmp_path, monkeypatch):
  source = tiny.source(40)
  for i in range(40):
    images.save(tmp_path / f"set/{source.labels[i]}/{i:02}.png", source.read(i))
  (tmp_path / f"set/{source.labels[5]}/05.png").write_bytes(b"")
  apply = lambda variables, images: images  # noqa: E731
  teacher = types.SimpleNamespace(
    num_classes=len(set(source.labels)), variables={}, apply=apply, resize="bicubic", config=tiny.config()
  )
  monkeypatch.setattr(distill, "Teacher", lambda _: teacher)
  (tmp_path / "run").mkdir()
  for name in ("RUN", "COMPLETE"):
    (tmp_path / "run" / name).touch()
  changes = {"data.test": "", "data.held_out": 0.1, "data.max_bad_fraction": 0.1}
  c = config("x", f"folder:{tmp_path}/set", cache=True, **changes)
  with pytest.raises(UserError, match="config.cache=True: 1 images are unreadable"):
    distill.run(c, tmp_path / "run", overwrite=True)
  assert (tmp_path / "run/COMPLETE").exists()


@pytest.mark.slow
def test_the_program(teacher, tmp_path, capsys):
  spec = tiny.npz(tmp_path / "tiny.npz")
  result = distill.run(config(teacher[0], spec), tmp_path / "run")
  assert "its teacher" in capsys.readouterr().out and 0 <= result["scores"]["accuracy"] <= 1
  assert "<h1>Distillation on tiny</h1>" in (tmp_path / "run/report.html").read_text()
  # The teacher is a constant of the task: no checkpoint holds it, and resuming opens it again.
  assert set(checkpoint.read_run_state(tmp_path / "run")[1]) <= {"step", "params", "batch_stats", "opt_state", "extra"}
  again = distill.run(config(teacher[0], spec), tmp_path / "run", resume=True)
  assert again["scores"] == result["scores"]
  exporting.write(tmp_path / "bare", model.keep_encoder(teacher[1]), config(teacher[0], spec), scores={}, step=1)
  with pytest.raises(ValueError, match="holds no classifier"):
    distill.run(config(str(tmp_path / "bare"), spec), tmp_path / "other")


def test_a_teacher_of_other_classes_is_refused(tmp_path):
  config = types.SimpleNamespace(teacher=str(tmp_path), data=types.SimpleNamespace(train="folder:x"))
  source = data.ArraySource(np.zeros((2, 2, 2), np.uint8), [0, 1], class_names=["a", "b"])
  distill.check_classes(config, source)  # its folder does not say
  for taught, refused in ((["a", "b"], False), (["0", "1"], False), (["b", "a"], True), (["a", "c"], True)):
    other = data.ArraySource(np.zeros((2, 2, 2), np.uint8), [0, 1], class_names=taught)
    same.keep_data(tmp_path, {"data.train": other.fingerprint()})
    with (
      pytest.raises(ValueError, match="its class . is ., that of .*: name the data")
      if refused
      else contextlib.nullcontext()
    ):
      distill.check_classes(config, source)

  (tmp_path / "encoder").mkdir()
  (tmp_path / "encoder/card.json").write_text("{}")
  config.teacher = str(tmp_path / "encoder")  # the same run's
  with pytest.raises(ValueError, match="its class . is ., that of .*: name the data"):
    distill.check_classes(config, source)


@pytest.mark.parametrize("held_out, refused", [(0.3, True), (0.1, False), (0.05, False)])
def test_images_that_the_teacher_has_seen_are_not_scored(held_out, refused, tmp_path, monkeypatch):
  spec = tiny.npz(tmp_path / "tiny.npz")
  taught = config("x", spec, **{"data.test": "", "data.held_out": 0.1})
  apply = lambda variables, images: images  # noqa: E731
  known = types.SimpleNamespace(num_classes=10, variables={}, apply=apply, resize="bicubic_antialias", config=taught)
  monkeypatch.setattr(distill, "Teacher", lambda _: known)
  seen = []

  def train(c, *_, **__):
    seen.append(c)
    raise loop.Diverged("far enough")

  monkeypatch.setattr(finetune, "train", train)
  c = config("x", spec, **{"data.test": "", "data.held_out": held_out})
  words = "data.held_out=0.3: the training of x held out 0.1, so it saw some of the images"
  with pytest.raises(ValueError, match=words) if refused else pytest.raises(loop.Diverged):
    distill.run(c, tmp_path / "run")
  assert refused == (not (tmp_path / "run").exists())
  assert [c.augment.resize for c in seen] == ["bicubic_antialias"] * (not refused)  # as the teacher saw images


@pytest.mark.parametrize("program", ["import", "pretrain"])
def test_only_classifiers_of_finetuning_are_teachers(program, monkeypatch):
  """Nobody knows on which layer an imported one was; that of pretraining watches an encoder that was trained without it."""
  made_by = tiny.config()
  if program == "import":
    made_by = config_lib.Import(source={}, encoder=made_by.encoder, augment=config_lib.ImportAugment(size=16))
  start = trained.Start(made_by.encoder, made_by.projector, {"encoder": {}, "classifier": {}}, made_by)
  monkeypatch.setattr(trained, "open_start", lambda _: start)
  with pytest.raises(UserError, match="holds no classifier of simclr finetune"):
    distill.Teacher("x")


def test_labels_that_would_not_be_used_are_refused():
  for key, value in (("labels.fraction", 0.1), ("labels.list", "names.txt")):
    with pytest.raises(UserError, match=f"config.{key}={value}: with config.alpha=1 no labels are used"):
      config_lib.load("distill:small", [f"--config.{key}={value}"])
    config_lib.load("distill:small", [f"--config.{key}={value}", "--config.alpha=0.5"])


def test_earlier_runs_with_values_of_no_effect_are_still_opened():
  plain = config_lib.load("distill:small")
  values = config_lib.to_dict(plain)
  old = {**values, "labels": {**values["labels"], "fraction": 0.1}, "augment": {**values["augment"], "canvas": 64}}
  assert config_lib.from_saved(old) == plain
  half = config_lib.from_saved({**old, "alpha": 0.5})
  assert (half.labels.fraction, half.augment.canvas) == (0.1, 512)


def test_a_run_resumes_with_the_teacher_that_it_began_with(teacher, tmp_path):
  """Another one is refused before the folder is touched."""
  folder, _ = teacher
  c, workdir = config(folder, tiny.npz(tmp_path / "tiny.npz")), tmp_path / "run"
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "COMPLETE").touch()
  checkpoint.write_config(workdir, config_lib.to_json(c))
  other = jax.tree.map(lambda x: x + 1, distill.Teacher(folder).variables)
  same.check_result(workdir / "teacher.json", {"teacher": exporting.checksum(other)}, "it")
  with pytest.raises(ValueError, match=f"the run in {workdir} was made with another teacher: use another --workdir"):
    distill.run(c, workdir, resume=True)
  assert (workdir / "COMPLETE").exists()


def test_a_run_resumes_with_the_labels_that_it_began_with(teacher, tmp_path):
  """Their list may have been edited; a run of before did not keep which they were."""
  folder, _ = teacher
  listed, workdir = tmp_path / "names.txt", tmp_path / "run"
  listed.write_text("0\n1\n")
  c = config(folder, tiny.npz(tmp_path / "tiny.npz"), alpha=0.5, **{"labels.list": str(listed)})
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "RUN").touch()
  checkpoint.write_config(workdir, config_lib.to_json(c))

  def resume(**changes):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(finetune, "train", lambda *_, **__: {"scores": {"accuracy": 0.5}, "workdir": workdir})
      patch.setattr(distill, "accuracy", lambda *_: 0.5)
      distill.run(config_lib.replace(c, changes), workdir, resume=True)

  resume()
  listed.write_text("0\n2\n")
  with pytest.raises(UserError, match="labels is not what the run began with"):
    resume()
  resume(**{"data.changed": "accept"})
  resume()
  kept = json.loads((workdir / same.FILE).read_text())
  files.write_sealed(workdir / same.FILE, json.dumps({key: value for key, value in kept.items() if key != "labels"}))
  listed.write_text("0\n3\n")
  resume()


@pytest.mark.parametrize("labeled, fraction", [("1pct", 0.01), ("10pct", 0.1)])
def test_the_labels_of_a_student_are_those_of_a_teacher_as_the_header_says(labeled, fraction):
  """The official subset of the teacher's own recipe is other images than the student draws."""
  as_said = ["--config.data.train=tfds:imagenet2012:train", f"--config.labels.fraction={fraction}"]
  student, taught = config_lib.load(f"distill:r50_1x_sk0-labels_{labeled}"), f"finetune:v2_{labeled}"
  assert (config_lib.load(taught, as_said).data, config_lib.load(taught, as_said).labels) == (
    student.data,
    student.labels,
  )
  header = (config_lib.recipe_folder() / "distill.py").read_text()
  assert as_said[0] in header and "--config.labels.fraction=0.01 (or 0.1)" in header
