"""Transfer: the significance test against the exact one, the splits, and a whole list of rows."""

import json
import types

import jax
import numpy as np
import pytest
import scipy.stats
import tiny
from test_distill import teacher  # noqa: F401  an exported encoder

from simclr_jax import data, exporting
from simclr_jax.evaluation import linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, transfer
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("better, worse", [(2, 0), (10, 2), (30, 25)])
def test_permutation_test_is_the_sign_test_for_top_1(better, worse):
  """Where every image counts alike, exchanges are coin flips for the images that one model alone gets right."""
  a = np.array([1] * better + [0] * worse + [1] * 50)
  b = np.array([0] * better + [1] * worse + [1] * 50)
  exact = scipy.stats.binomtest(better, better + worse).pvalue
  assert transfer.permutation_test(a, b, samples=20000) == pytest.approx(exact, abs=0.012)
  assert transfer.permutation_test(a, a, samples=100) == 1


def test_permutation_test_weighs_rare_classes_more():
  """One image of a class of one against one of a class of four: |+-1 +- 1/4| >= 3/4 always, >= 5/4 half the time."""
  weight = np.array([1, 0.25])
  assert transfer.permutation_test([1, 0], [0, 1], weight=weight, samples=1000) == 1
  assert transfer.permutation_test([1, 1], [0, 0], weight=weight, samples=20000) == pytest.approx(0.5, abs=0.012)


def test_the_papers_table():
  assert len(transfer.ROWS) == 12 and set(transfer.ROWS) == set(config_lib.load("configs/transfer.py").rows)
  # Of the twelve, self-supervised fine-tuning beats the supervised baseline on five (abstract of arXiv 2002.05709).
  ours, theirs = transfer.PAPER["4x fine-tuned SimCLR"], transfer.PAPER["4x fine-tuned supervised"]
  assert sum(ours[row] > theirs[row] for row in transfer.ROWS) >= 5


def rows(tmp_path, **extra):
  spec, other = tiny.npz(tmp_path / "tiny.npz"), tiny.npz(tmp_path / "other.npz")
  return {
    "split": dict(train=spec, validation=other, test=f"{spec}:test", metric="mean_per_class"),
    "held_out": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1"),
    **extra,
  }


def config(start, rows, **changes):
  changes = {"start": start, "rows": rows, "samples": 200, "augment.size": 16, **changes}
  return config_lib.replace(config_lib.load("configs/transfer.py:small"), changes)


def test_splits(tmp_path):
  c = config("x", rows(tmp_path))
  train, held_out, test = transfer.splits(c.rows["split"], None)
  assert len(train.source) == 192 and held_out.tolist() == [False] * 96 + [True] * 96 and len(test.targets) == 32
  np.testing.assert_array_equal(train.source.labels, train.targets)
  np.testing.assert_array_equal(train.source.read(100), tiny.source().read(4))
  assert train.source.read_labeled(100)[1] == train.targets[100] and train.source.name(100).endswith(":4")
  train, held_out, _ = transfer.splits(c.rows["held_out"], None)
  assert len(train.source) == 96 and 5 <= held_out.sum() <= 20


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"validation": "{}:test"}, "validation=.*:test is the test set too: name other images, or none"),
    ({"validation": "{}"}, "validation=.* is the training set too"),
    ({"metric": "mean_average_precision"}, "images of .* have one label each; expected top_1 or mean_per_class"),
  ],
)
def test_settings_are_not_chosen_on_what_is_scored_and_scores_fit_the_labels(changes, words, tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  row = dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")
  row |= {key: value.format(spec) for key, value in changes.items()}
  with pytest.raises(UserError, match=words):
    transfer.splits(config("x", {"row": row}).rows["row"], None)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"rows": {"row": {"train": "npz:none.npz"}}}, "none.npz"),
    ({"rows": {"row": {"metric": "mean_average_precision"}}}, "expected top_1 or mean_per_class"),
    (
      {"finetune.recipe": "smoke", "methods": ("finetune",)},
      "config.finetune.recipe=smoke: a recipe for simclr pretrain",
    ),
    (
      {"methods": ("finetune",), "finetune.batch_size": 96},
      "finetune.batch_size=96 exceeds the 8[0-9] training images of npz:.*: lower it with --config.finetune.batch_size=",
    ),
  ],
)
def test_what_would_end_it_after_some_rows_ends_it_before(changes, words, tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  row = dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")
  rows = {"fine": row, "row": row | changes.get("rows", {"row": {}})["row"]}
  changes = {key: value for key, value in changes.items() if key != "rows"}
  settings = config_lib.replace(config(str(tiny.export(tmp_path / "encoder")), rows), changes)
  kept = tmp_path / "run/transfer.json"
  kept.parent.mkdir()
  for name in ("RUN", "COMPLETE", "transfer.json"):
    (kept.parent / name).write_text("[]")
  with pytest.raises(UserError, match=words):
    transfer.run(settings, kept.parent, overwrite=True)
  assert kept.exists()


def test_data_in_the_workdir_is_not_deleted(tmp_path, monkeypatch):
  without_network(monkeypatch)
  run = tmp_path / "run"
  (run / "transfer").mkdir(parents=True)
  (run / "RUN").touch()
  inside, outside = tiny.npz(run / "transfer/tiny.npz"), tiny.npz(tmp_path / "tiny.npz")
  for changes in ({"train": inside}, {"validation": inside}, {"test": f"{inside}:test"}):
    row = dict(train=outside, validation="", test=f"{outside}:test", metric="top_1") | changes
    settings = config("x", {"row": row})
    with pytest.raises(UserError, match="a run and its data must not contain each other"):
      transfer.run(settings, run, overwrite=True)
  assert (run / "transfer/tiny.npz").exists()


@pytest.mark.slow
def test_linear_rows(tmp_path, teacher, capsys):  # noqa: F811
  c = config(teacher[0], rows(tmp_path))
  result = transfer.run(c, tmp_path / "run")
  assert "paper" not in capsys.readouterr().out  # the paper's columns stand only beside its own sets
  page = (tmp_path / "run/report.html").read_text()
  assert "<h1>Transfer</h1>" in page and "held_out, top 1" in page and "permutation test" in page
  saved = json.loads((tmp_path / "run/transfer.json").read_text())
  assert {row["name"] for row in saved} == {"split", "held_out"} and saved == result["rows"]
  row = next(row for row in saved if row["name"] == "held_out")
  assert set(row["scores"]) == {"linear pretrained", "linear random"} and 0 < row["p"]["linear random"] <= 1
  # The score is that of a classifier with the penalty that was chosen, on the same features.
  encoder = transfer.FrozenEncoder(transfer.trained.open_start(teacher[0]), c, mesh_lib.make_mesh())
  h, y = encoder.features(tiny.source()), tiny.source().labels
  test = transfer.open_split(f"npz:{tmp_path / 'tiny.npz'}:test")
  chosen = linear.logistic_regression(h, y, num_classes=10, l2s=(row["chosen"]["linear pretrained"],))
  assert linear.accuracy(chosen, encoder.features(test.source), test.targets) == pytest.approx(
    row["scores"]["linear pretrained"], abs=0.011
  )
  text = transfer.table([{**row, "name": "cifar10"}])
  assert "95.3" in text and "90.6" in text
  with pytest.raises(ValueError, match="rows.split.metric='top1': expected one of top_1"):
    transfer.run(config(teacher[0], rows(tmp_path), **{"rows.split.metric": "top1"}), tmp_path / "other")


def test_several_labels_of_a_prepared_set(tmp_path):
  """A set in the layout of TFDS voc/2007: difficult objects are neither positive nor negative."""
  tfds = pytest.importorskip("tensorflow_datasets")

  with tfds.core.registered.skip_registration():  # TensorFlow Datasets has one of this name

    class Voc(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        several = tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog", "cow"]))
        features = {"image": tfds.features.Image(), "labels": several, "labels_no_difficult": several}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i, (labels, easy) in enumerate([([0, 1], [0]), ([2], [2])]):
          yield i, {"image": np.zeros((4, 4, 3), np.uint8), "labels": labels, "labels_no_difficult": easy}

  Voc(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
  split = transfer.open_split("tfds:voc:train", str(tmp_path))
  assert split.num_classes == 3
  assert sorted(split.targets.tolist()) == [[0, 0, 1], [1, -1, 0]]
  with pytest.raises(ValueError, match="has no labels"):
    np.savez(tmp_path / "plain.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    transfer.open_split(f"npz:{tmp_path / 'plain.npz'}")


@pytest.mark.slow
def test_fine_tuning_grid(tmp_path, teacher):  # noqa: F811
  spec = tiny.npz(tmp_path / "tiny.npz")
  only = {"tiny": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")}
  changes = {
    "methods": ("finetune",),
    "finetune.train_steps": 2,
    "finetune.batch_size": 16,
    "from_scratch.train_steps": 3,
    "from_scratch.base_lrs": (0.1,),
  }
  result = transfer.run(config(teacher[0], only, **changes), tmp_path / "run")
  (row,) = result["rows"]
  assert set(row["scores"]) == {"finetune pretrained", "finetune random"}
  assert row["chosen"]["finetune pretrained"]["base_lr"] in (0.03, 0.1)
  assert (tmp_path / "run/tiny/pretrained/final/checkpoints/2").exists()
  kept = {path.name.partition(".")[0] for path in (tmp_path / "run/tiny/pretrained").iterdir() if path.is_file()}
  assert kept == {"grid0", "grid1"} and not (tmp_path / "run/tiny/pretrained/grid0").exists()
  assert (tmp_path / "run/tiny/random/final/checkpoints/3").exists()
  assert (tmp_path / "run/tiny/random/final/encoder/card.json").exists()


def fine_tuned(tmp_path, monkeypatch, result, row="held_out", **changes):
  """(what transfer.fine_tune returns, the configs that it trains with) where each prediction is `result` classes too high."""
  configs = []

  def train(c, start, source, tested, folder, **_):
    configs.append(c)
    labels = np.asarray(tested.labels)
    return {"logits": np.eye(10)[(labels + result(c)) % 10], "labels": labels}

  monkeypatch.setattr(finetune, "train", train)
  c = config("x", rows(tmp_path), **changes)
  train, held_out, test = transfer.splits(c.rows[row], None)
  started = types.SimpleNamespace(encoder=tiny.config().encoder, path="x")
  frozen = types.SimpleNamespace(start=started, resize="bicubic_tf1")
  found = transfer.fine_tune(c, frozen, started, train, held_out, test, c.rows[row].metric, tmp_path / "run", mesh=None)
  return found, configs


def test_a_point_of_the_grid_that_diverges_is_the_worst(tmp_path, monkeypatch, capsys):
  def train(c):
    if c.optimizer.base_lr > 0.05:
      raise loop.Diverged("the loss is nan")
    return 0

  grid = {"finetune.base_lrs": (0.1, 0.03), "finetune.weight_decays": (1e-4,)}
  (score, _, chosen), _ = fine_tuned(tmp_path, monkeypatch, train, **grid)
  assert score == 1 and chosen["base_lr"] == 0.03
  assert "base_lr=0.1, weight_decay=0.0001: the loss is nan" in capsys.readouterr().out


def test_a_final_fit_that_diverges_is_told_of_keys_of_transfer(tmp_path, monkeypatch):
  """And no point of the grid is, which may diverge."""
  spec, advice = tiny.npz(tmp_path / "tiny.npz"), {}

  def train(c, start, source, tested, folder, *, mesh, make):
    advice[folder.parent.name, folder.name] = make(c, None, source, mesh=mesh).advice
    return {"logits": np.eye(10)[tested.labels], "labels": tested.labels}

  monkeypatch.setattr(finetune, "train", train)
  c = config("x", {"tiny": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")})
  parts, mesh = transfer.splits(c.rows["tiny"], None), mesh_lib.make_mesh()
  start = types.SimpleNamespace(encoder=tiny.config().encoder, path="x")
  frozen = types.SimpleNamespace(start=start, resize="bicubic")
  for begun, section in ((start, "finetune"), (None, "from_scratch")):
    transfer.fine_tune(c, frozen, begun, *parts, "top_1", tmp_path / section, mesh=mesh)
    assert advice[section, "final"] == f"begin again with lower config.{section}.base_lrs"
    assert advice[section, "grid0"] == ""


def test_fine_tuning_sees_the_pixels_that_linear_evaluation_sees(tmp_path, monkeypatch):
  _, configs = fine_tuned(tmp_path, monkeypatch, lambda c: 0)
  assert {c.augment.resize for c in configs} == {"bicubic_tf1"}


def test_fine_tuned_networks_see_the_crop_of_their_recipe(tmp_path, monkeypatch):
  """Shorter side to 256, center 224; the whole of the shorter side is for the linear score (arXiv 2002.05709, App. B.8)."""
  assert config_lib.load("transfer").evaluate.crop == 1.0
  changes = {"finetune.recipe": config_lib.load("transfer").finetune.recipe, "evaluate.batch_size": 7}
  _, configs = fine_tuned(tmp_path, monkeypatch, lambda c: 0, **changes)
  assert {(c.evaluate.crop, c.evaluate.batch_size) for c in configs} == {(0.875, 7)}


def test_the_configs_of_fine_tuning_name_its_data_and_its_start(tmp_path, monkeypatch):
  changes = {"finetune.recipe": "finetune:v1_1pct"}
  _, configs = fine_tuned(tmp_path, monkeypatch, lambda c: 0, **changes)
  spec = f"npz:{tmp_path / 'tiny.npz'}"
  *grid, final = configs
  assert {(c.data.train, c.labels.fraction, c.start) for c in configs} == {(spec, 1.0, "x")}
  assert final.data.test == f"{spec}:test" and {c.data.test for c in grid} == {""}  # these score held-out images


def test_the_points_of_a_grid_name_the_validation_images_that_they_score(tmp_path, monkeypatch):
  _, configs = fine_tuned(tmp_path, monkeypatch, lambda c: 0, row="split")
  tested = [f"npz:{tmp_path / 'other.npz'}"] * 2 + [f"npz:{tmp_path / 'tiny.npz'}:test"]
  assert [c.data.test for c in configs] == tested


def test_of_a_point_of_the_grid_its_score_is_kept_and_no_file_else(tmp_path, monkeypatch):
  """A killed command trains neither the points with a score again nor those that diverged."""
  killed = KeyboardInterrupt()

  def train(c):
    assert c.checkpoint.every_steps == transfer.SAVE_EVERY and c.log.every_steps == 100
    if c.optimizer.base_lr > 0.05:
      raise loop.Diverged("the loss is nan")
    if c.data.test and killed:
      raise killed
    return 0

  changes = {"finetune.base_lrs": (0.1, 0.03, 0.01)}
  with pytest.raises(KeyboardInterrupt):
    fine_tuned(tmp_path, monkeypatch, train, **changes)
  run = tmp_path / "run"
  names = [f"grid{i}.json{seal}" for i in range(3) for seal in ("", ".sha256")]
  assert sorted(path.name for path in run.iterdir()) == ["final", *names]
  assert [json.loads((run / f"grid{i}.json").read_text())["score"] for i in range(3)] == [None, 1, 1]
  (run / "grid1").mkdir()  # killed before it was removed
  killed = None
  (score, _, chosen), configs = fine_tuned(tmp_path, monkeypatch, train, **changes, **{"evaluate.batch_size": 7})
  assert score == 1 and chosen["base_lr"] == 0.03 and len(configs) == 1 and not (run / "grid1").exists()
  with pytest.raises(UserError, match="config.labels.seed is 0 in the run and 7 now"):
    edited = config_lib.replace(config_lib.load("finetune:small"), {"labels.seed": 7})
    monkeypatch.setattr(config_lib, "load", lambda *_, load=config_lib.load: edited if "finetune" in _[0] else load(*_))
    fine_tuned(tmp_path, monkeypatch, train, **changes)


def test_an_unfinished_fit_goes_on_only_as_it_was_begun(tmp_path, monkeypatch):
  """The fit of the best point is begun anew where another point is the best since; how a fit is scored may have changed."""
  changes = {"finetune.base_lrs": (0.1, 0.03)}
  _, configs = fine_tuned(tmp_path, monkeypatch, lambda c: 0, **changes)
  final, fitted = tmp_path / "run/final", configs[-1]
  for values, goes_on in (({"evaluate.crop": 0.5, "data.test": ""}, True), ({"optimizer.base_lr": 0.5}, False)):
    final.mkdir(exist_ok=True)
    checkpoint.write_config(final, config_lib.to_json(config_lib.replace(fitted, values)))
    (final / "begun").touch()
    (score, _, _), again = fine_tuned(tmp_path, monkeypatch, lambda c: 0, **changes)
    assert score == 1 and again == [fitted] and (final / "begun").exists() == goes_on
  final.mkdir(exist_ok=True)
  checkpoint.write_config(final, config_lib.to_json(config_lib.replace(fitted, {"labels.seed": 7})))
  with pytest.raises(UserError, match="config.labels.seed is 7 in the run and 0 now"):
    fine_tuned(tmp_path, monkeypatch, lambda c: 0, **changes)


def test_a_row_of_which_nothing_is_finished_may_be_of_other_images(tmp_path, monkeypatch):
  """Such as one that ended at an unreadable image, which is removed; not where there are runs of fine-tuning to resume."""
  path, run = tmp_path / "tiny.npz", tmp_path / "run"
  spec = tiny.npz(path)
  without_network(monkeypatch)
  c = config("x", {"tiny": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")})

  def unreadable(*_, **__):
    raise UserError("1 of 96 images are unreadable")

  monkeypatch.setattr(transfer, "linear_evaluation", unreadable)
  with pytest.raises(UserError, match="1 of 96 images are unreadable"):
    transfer.run(c, run)
  arrays = dict(np.load(path))
  np.savez(path, **{**arrays, "images": arrays["images"][1:], "labels": arrays["labels"][1:]})
  monkeypatch.setattr(transfer, "linear_evaluation", lambda *_, **__: (0.5, np.zeros((32, 10)), 1e-3))
  (run / "tiny").mkdir()
  with pytest.raises(UserError, match="row tiny of .*run was made with another training set"):
    transfer.run(c, run, resume=True)
  (run / "tiny").rmdir()
  assert len(transfer.run(c, run, resume=True)["rows"]) == 1
  np.savez(path, **arrays)
  with pytest.raises(UserError, match="row tiny of .*run was made with another training set"):
    transfer.run(c, run, resume=True)
  assert (run / "COMPLETE").exists()


def without_network(monkeypatch):
  """Runs of transfer open no encoder."""
  start = types.SimpleNamespace(variables={"encoder": {}}, config=None, path="x")
  monkeypatch.setattr(transfer.trained, "open_start", lambda _: start)
  monkeypatch.setattr(transfer, "FrozenEncoder", lambda *_, **__: types.SimpleNamespace(start=start))


def test_images_with_several_labels_are_scored_by_the_linear_classifier_only(tmp_path, monkeypatch, capsys):
  """The row keeps its linear score, and the rows after it get both."""
  several = tiny.npz(tmp_path / "several.npz")

  def several_labels(source):
    return np.eye(10, dtype=np.int8)[source.labels] if source.name(0).startswith(several) else None

  without_network(monkeypatch)
  monkeypatch.setattr(data.ArraySource, "several_labels", several_labels)
  monkeypatch.setattr(transfer, "linear_evaluation", lambda *_, **__: (0.5, np.zeros((32, 10)), 1e-3))
  monkeypatch.setattr(transfer, "fine_tune", lambda *_, **__: (0.75, np.zeros((32, 10)), {"base_lr": 0.1}))
  sets = {
    "voc2007": dict(train=several, validation="", test=f"{several}:test", metric="mean_average_precision"),
    "z": dict(train=(spec := tiny.npz(tmp_path / "tiny.npz")), validation="", test=f"{spec}:test", metric="top_1"),
  }
  c = config("x", sets, methods=("linear", "finetune"))
  result = transfer.run(c, tmp_path / "run")
  linear_only = {"linear pretrained": 0.5, "linear random": 0.5}
  assert [row["name"] for row in result["rows"]] == ["voc2007", "z"]
  assert result["rows"][0]["scores"] == linear_only
  assert result["rows"][1]["scores"] == linear_only | {"finetune pretrained": 0.75, "finetune random": 0.75}
  out = capsys.readouterr().out
  assert "voc2007: images have several labels, so fine-tuning is left out\n" in out and "z: images have" not in out
  assert (tmp_path / "run/COMPLETE").exists() and "voc2007" in (tmp_path / "run/report.html").read_text()


def test_a_set_is_not_scored_against_itself(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  c = config("x", {"tiny": dict(train=spec, validation="", test=spec, metric="top_1")})
  with pytest.raises(ValueError, match="is the training set too"):
    transfer.splits(c.rows["tiny"], None)


def test_images_that_an_encoder_was_trained_on_are_not_scored(tmp_path):
  """Neither by one of the encoders nor by the other, and before the workdir is touched."""
  spec = tiny.npz(tmp_path / "tiny.npz")
  seen = tiny.export(tmp_path / "seen", **{"data.train": f"{spec}:test", "data.test": spec})
  other = tiny.export(tmp_path / "other", **{"data.train": spec, "data.test": ""})
  only = {"tiny": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")}
  for start, supervised in ((seen, ""), (other, seen)):
    words = (
      "rows.tiny.test=.*:test: 32 of the 32 images to score are in .*seen was trained on; .*--config.rows.tiny.test="
    )
    with pytest.raises(UserError, match=words):
      transfer.run(config(str(start), only, supervised=str(supervised)), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_finished_rows_are_handed_out_for_the_same_encoder_and_images_only(tmp_path, monkeypatch):
  path, spec = tmp_path / "tiny.npz", tiny.npz(tmp_path / "tiny.npz")
  encoder = tiny.export(tmp_path / "encoder")
  c = config(str(encoder), {"tiny": dict(train=spec, validation="", test=f"{spec}:test", metric="top_1")})
  monkeypatch.setattr(transfer, "linear_evaluation", lambda encoder, *_, **__: (0.5, np.zeros((32, 10)), 1e-3))
  transfer.run(c, tmp_path / "run")
  assert (tmp_path / "run/COMPLETE").exists()
  monkeypatch.setattr(transfer, "linear_evaluation", None)  # nothing is computed again
  assert transfer.run(c, tmp_path / "run", resume=True)["rows"][0]["scores"] == {
    "linear pretrained": 0.5,
    "linear random": 0.5,
  }
  with pytest.raises(ValueError, match="config.samples is 200 in the run and 300 now"):
    transfer.run(config_lib.replace(c, {"samples": 300}), tmp_path / "run", resume=True)
  arrays = dict(np.load(path))
  np.savez(path, **{**arrays, "test_labels": np.roll(arrays["test_labels"], 1)})
  with pytest.raises(ValueError, match="row tiny of .*run was made with another test set"):
    transfer.run(c, tmp_path / "run", resume=True)
  np.savez(path, **arrays)
  _, variables, card = exporting.load_encoder(encoder)
  variables = jax.tree.map(lambda x: 2 * x, variables)
  exporting.write(encoder, variables, config_lib.from_dict(card["pretraining"]), scores={}, step=0, overwrite=True)
  with pytest.raises(ValueError, match="row tiny of .*run was made with another pretrained encoder"):
    transfer.run(c, tmp_path / "run", resume=True)
  assert (tmp_path / "run/COMPLETE").exists()  # which no refusal has taken away
