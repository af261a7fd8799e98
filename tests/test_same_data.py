"""A run that is resumed finds the data that it began with, or says what has changed."""

import json
import shutil

import numpy as np
import pytest
import tiny
from images import save

from simclr_jax import data
from simclr_jax.evaluation import embed
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import distill, finetune, pretrain, same, splits, trained, transforms
from simclr_jax.runtime import checkpoint
from simclr_jax.runtime.errors import UserError


def picture(i):
  return np.full((4, 4, 3), i, np.uint8)


@pytest.fixture
def folder(tmp_path):
  for i in range(12):
    save(tmp_path / f"set/{'ab'[i % 2]}/{i:02}.png", picture(i))
  return tmp_path / "set"


def changed(folder):
  """What is said of the folder after each change."""
  before = data.open_source(f"folder:{folder}").fingerprint()
  return lambda: same.difference(before, json.loads(json.dumps(data.open_source(f"folder:{folder}").fingerprint())))


def add(folder):
  save(folder / "a/20.png", picture(20))


def delete(folder):
  (folder / "a/00.png").unlink()


def rename(folder):
  (folder / "a").rename(folder / "c")


def replace_all(folder):
  for path in folder.rglob("*.png"):
    path.write_bytes(path.read_bytes()[::-1])


def replace_one_by_a_larger(folder):
  save(folder / "b/11.png", np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))


@pytest.mark.parametrize(
  "change, words",
  [
    (add, "13 images instead of 12 and other names, labels, contents"),
    (delete, "11 images instead of 12 and other names, labels, contents"),
    (rename, "other classes, names, contents"),
    (replace_all, "other contents"),
    (replace_one_by_a_larger, "other names and sizes, contents"),
    (lambda folder: None, ""),
  ],
)
def test_what_has_changed_in_a_folder(folder, change, words):
  said = changed(folder)
  change(folder)
  assert said() == words.replace("names,", "names and sizes,")


def test_a_folder_may_move(folder, tmp_path):
  before = data.open_source(f"folder:{folder}").fingerprint()
  shutil.move(folder, tmp_path / "elsewhere")
  assert data.open_source(f"folder:{tmp_path}/elsewhere").fingerprint() == before


def test_arrays_are_compared_whole():
  images, labels = np.zeros((300, 4, 4), np.uint8), np.arange(300) % 3
  before = data.ArraySource(images, labels).fingerprint()
  assert data.ArraySource(images.copy(), labels, title="other").fingerprint() == before
  other = images.copy()
  other[137, 0, 0] = 1
  assert same.difference(before, data.ArraySource(other, labels).fingerprint()) == "other contents"
  assert same.difference(before, data.ArraySource(images, labels[::-1]).fingerprint()) == "other labels"
  names = data.ArraySource(images, labels, class_names="abc").fingerprint()
  assert same.difference(before, names) == "other classes"
  relabeled = data.align(data.ArraySource(images, labels, class_names="cab"), data.ArraySource(images, labels, class_names="abc"))  # fmt: skip
  assert relabeled.fingerprint() == names  # of the set itself


def test_only_a_sample_of_a_folder_is_read(folder, monkeypatch):
  read = []
  source = data.open_source(f"folder:{folder}")
  monkeypatch.setattr(data.FolderSource, "item", lambda self, i: (read.append(i), (b"", 0))[1])
  monkeypatch.setattr("simclr_jax.data.sources.SAMPLE", 4)
  source.fingerprint()
  assert read == [0, 4, 7, 11]


def test_runs_refuse_changed_data(folder, tmp_path):
  """Before anything in the folder of the run is touched; `accept` goes on."""
  spec, workdir = f"folder:{folder}", tmp_path / "run"
  workdir.mkdir()
  (workdir / "COMPLETE").touch()
  source = data.open_source(spec)
  same.keep_data(workdir, same.check_data(workdir, True, "refuse", {"data.train": source, "data.test": source}))
  delete(folder)
  config = tiny.config(**{"data.train": spec, "data.test": spec, "batch_size": 8})
  with pytest.raises(ValueError, match="data.train is not what the run began with: 11 images instead of 12.*; restore") as raised:  # fmt: skip
    pretrain.run(config, workdir, resume=True)
  assert "\n" not in str(raised.value) and "--config.data.changed=accept" in str(raised.value)
  assert (workdir / "COMPLETE").exists()
  now = {"data.train": data.open_source(spec)}
  assert same.check_data(workdir, True, "accept", now)["data.train"]["images"] == 11
  assert same.check_data(workdir, False, "refuse", now)  # a new run


def test_parts_of_a_set_know_what_the_set_knows(folder):
  """The rest of a set of which a part is held out, which is what a run trains on if no test images are named."""

  def parts(source):
    rest = data.Selection(source, range(2, len(source)))
    return rest, data.Subset(source, 6, 0), data.Joined([rest, data.Selection(source, [0])])

  before = [part.fingerprint() for part in parts(data.open_source(f"folder:{folder}"))]
  file = folder / "a/06.png"
  file.write_bytes(file.read_bytes() + b"0")
  for old, part in zip(before, parts(data.open_source(f"folder:{folder}")), strict=True):
    assert "files or arrays" in same.difference(old, part.fingerprint())
    del old["files or arrays"]  # of a run of an earlier version
    assert "files or arrays" not in same.difference(old, part.fingerprint())
  same.check_result(folder.parent / "made.json", {"set": {"images": 3}}, "it")
  same.check_result(folder.parent / "made.json", {"set": {"images": 3, "files or arrays": "12"}}, "it")
  with pytest.raises(ValueError, match="it was made with another set"):
    same.check_result(folder.parent / "made.json", {"set": {"images": 4, "files or arrays": "12"}}, "it")
  images = np.zeros((300, 4, 4), np.uint8)
  before = data.Selection(data.ArraySource(images), range(200)).fingerprint()
  images[137] = 1
  now = data.Selection(data.ArraySource(images), range(200)).fingerprint()
  assert same.difference(before, now) == "other files or arrays"


def test_every_program_that_trains_checks():
  import inspect

  for program in (pretrain, finetune, distill):
    assert "same.claim(config, workdir, " in inspect.getsource(program.run)
  text = inspect.getsource(same.claim)
  assert text.index("check_data(") < text.index("workdir_lib.claim(") < text.index("keep_data(")


def test_what_is_accepted_is_said_and_accepted_once(folder, tmp_path, capsys):
  spec = f"folder:{folder}"
  config = tiny.config(**{"data.train": spec, "data.test": spec, "data.changed": "accept"})
  for change in (lambda folder: None, delete):
    change(folder)
    source = data.open_source(spec)
    kept, workdir = same.claim(config, tmp_path / "run", source, source, resume=True, overwrite=False)
    checkpoint.write_config(workdir, config_lib.to_json(kept))
    (workdir / "checkpoints").mkdir(exist_ok=True)
  assert "accepted    data.train is not what the run began with: 11 images instead of 12" in capsys.readouterr().out
  add(folder)
  resumed = config_lib.from_json(checkpoint.read_config(workdir))
  with pytest.raises(ValueError, match="12 images instead of 11|other names"):
    same.claim(resumed, workdir, data.open_source(spec), source, resume=True, overwrite=False)


def test_a_resumed_run_does_not_score_images_that_it_trained_on(folder, tmp_path):
  """Other images would be held out, also where the change is accepted; without labels there are none."""
  spec = f"folder:{folder}"
  config = tiny.config(**{"data.train": spec, "data.test": "", "data.changed": "accept", "batch_size": 8})

  def claim(config):
    train, test = splits.open_data(config.data)
    kept, workdir = same.claim(config, tmp_path / "run", train, test, resume=True, overwrite=False)
    checkpoint.write_config(workdir, config_lib.to_json(kept))
    (workdir / "checkpoints").mkdir(exist_ok=True)

  claim(config)
  claim(config)
  add(folder)
  with pytest.raises(UserError, match="so other images are held out now .*restore the data, or begin a new run"):
    claim(config)
  shutil.rmtree(tmp_path / "run")
  without = config_lib.replace(config, {"data.train": f"files:{folder}"})
  claim(without)
  delete(folder)
  claim(without)


def test_an_encoder_is_not_scored_on_images_that_it_was_trained_on(folder, tmp_path):
  """The held-out tenth of a folder is chosen by position, which a file that comes or goes shifts."""
  run, other = tmp_path / "run", f"folder:{shutil.copytree(folder, tmp_path / 'other')}"
  changes = {"data.train": f"folder:{folder}", "data.test": "", "batch_size": 8}
  config = tiny.config(**changes)
  train, test = splits.open_data(config.data)
  encoder = tiny.export(run / "encoder", **changes)
  same.keep_data(run, same.check_data(run, False, "refuse", {"data.train": train, "data.test": test}))
  names = lambda source: [source.name(i) for i in range(len(source))]  # noqa: E731
  assert names(trained.TrainedRun(encoder).test_source) == names(test)
  with pytest.raises(
    ValueError, match="data.held_out=0.5: the training of .* held out 0.1, so it saw .*config.data.test="
  ):
    trained.TrainedRun(encoder, overrides=["--config.data.held_out=0.5"])
  tested = tiny.config(**{**changes, "data.test": other})
  with pytest.raises(ValueError, match="data.held_out=0.1: the training of .* held out 0, so it saw"):
    trained.open_data(config, run, tested)
  add(folder)
  for score in (
    lambda: trained.TrainedRun(encoder),
    lambda: trained.TrainedRun(encoder, overrides=["--config.data.held_out=0.01"]),
    lambda: transforms.run(encoder),
    lambda: trained.open_data(config, run, config),
  ):
    with pytest.raises(ValueError, match="data.train is not what .*run began with, so other images are held out now") as raised:  # fmt: skip
      score()
    assert "\n" not in str(raised.value) and "--config.data.test=" in str(raised.value)
  for override in (f"--config.data.test={other}", f"--config.data.train={other}", "--config.data.held_out=0.0"):
    assert trained.TrainedRun(encoder, overrides=[override])


def scored(own, now, workdir):
  """The images that are scored by the section `now` of an encoder that was trained by the section `own`."""
  training = tiny.config(**{f"data.{key}": value for key, value in ({"test": ""} | own).items()})
  section = tiny.config(**{f"data.{key}": value for key, value in ({"test": ""} | now).items()}).data
  _, test = splits.open_data(section)
  trained.check_unseen(section, test, workdir, training)
  return test


@pytest.mark.parametrize("own, now, shared", [
  ({"train": "files:{}"}, {"train": "folder:{}", "held_out": 0.5}, "6 of the 6"),
  ({"train": "files:{}/a"}, {"train": "folder:{}", "held_out": 0.5}, "3 of the 6"),
  ({"train": "folder:{}", "held_out": 0.5}, {"train": "fashion:train", "test": "files:{}/a"}, "3 of the 6"),
  ({"train": "folder:{}"}, {"train": "fashion:train", "test": "folder:{}/../other"}, None),
  ({"train": "folder:{}", "test": "fashion:test"}, {"train": "folder:{}", "test": "files:{}/../other"}, None),
  ({"train": "files:{}/../gone"}, {"train": "folder:{}", "held_out": 0.5}, None),
  ({"train": "folder:/gone", "data_dir": "/gone"}, {"train": "folder:{}", "held_out": 0.5}, None),
  ({"train": "fashion:test"}, {"train": "fashion:train", "test": "fashion:test"}, "2000 of the 2,000"),
  ({"train": "fashion:train"}, {"train": "textures:train", "test": "fashion:test"}, None),
  ({"train": "npz:{}/../link.npz"}, {"train": "npz:{}/../set.npz:test", "test": "npz:{}/../set.npz"}, "86 of the 96"),
  ({"train": "npz:{}/../set.npz:test"}, {"train": "fashion:train", "test": "npz:{}/../set.npz"}, None),
])  # fmt: skip
def test_images_of_another_set_that_training_has_seen_are_not_scored(own, now, shared, folder, tmp_path, monkeypatch):
  """However they are named.  What its training held out, and sets that are gone, are scored."""
  for i in range(4):
    save(tmp_path / f"other/{'ab'[i % 2]}/{i}.png", picture(i))
  tiny.npz(tmp_path / "set.npz")
  (tmp_path / "link.npz").symlink_to(tmp_path / "set.npz")
  monkeypatch.setattr(data, "align", lambda train, test, what: test)  # their classes do not matter here
  own, now = ({key: v.format(folder) if isinstance(v, str) else v for key, v in x.items()} for x in (own, now))
  if not shared:
    assert scored(own, now, tmp_path / "run")
    return
  what = f"data.test={now['test']}" if "test" in now else f"data.train={now['train']}, of which a part is held out"
  shared = shared.replace("2000", "1,800")  # a tenth was held out
  words = f"{what}: {shared} images to score are in {own['train']}, which .*/run was trained on; name others with --config.data.test="
  with pytest.raises(UserError, match=words):
    scored(own, now, tmp_path / "run")


def test_images_without_a_label_that_fine_tuning_used_are_scored(folder, tmp_path):
  own = {"train": f"folder:{folder}", "test": "fashion:test"}
  chosen = data.class_balanced(data.open_source(own["train"]).labels, 0.5, 7)
  source = data.open_source(own["train"])
  training = config_lib.replace(
    config_lib.load("finetune:small"), {"data": own, "labels": {"fraction": 0.5, "seed": 7}}
  )
  rest, chosen = data.Selection(source, np.setdiff1d(np.arange(12), chosen)), data.Selection(source, chosen)
  trained.check_apart(rest, "x", "--y", "", tmp_path, training)
  with pytest.raises(UserError, match="x: 6 of the 6 images to score are in folder:.*; name others with --y"):
    trained.check_apart(chosen, "x", "--y", "", tmp_path, training)


def test_a_set_that_has_grown_since_training_may_hold_new_images_to_score(folder, tmp_path, capsys):
  own = {"train": f"files:{folder}"}
  source = data.open_source(own["train"])
  same.keep_data(tmp_path, {"data.train": source.fingerprint(), "data.test": source.fingerprint()})
  add(folder)
  scored(own, {"train": f"folder:{folder}", "held_out": 0.5}, tmp_path)
  assert f"note        data.train=files:{folder} has changed since" in capsys.readouterr().out


def test_places_of_parts(folder, tmp_path):
  tiny.npz(tmp_path / "set.npz")
  source, arrays = data.open_source(f"folder:{folder}"), data.open_source(f"npz:{tmp_path}/set.npz")
  listed = lambda source: {key: found.tolist() for key, found in source.places().items()}  # noqa: E731
  part = data.Selection(source, [0, 7, 6])
  assert listed(part) == {f"{folder}/a": ["00.png"], f"{folder}/b": ["03.png", "01.png"]}
  assert listed(data.Selection(part, [1])) == {f"{folder}/b": ["03.png"]}
  assert listed(data.Subset(arrays, 3, 0)) == {f"{tmp_path}/set.npz:": data.Subset(arrays, 3, 0)._chosen.tolist()}
  assert listed(source) == listed(data.Selection(source, range(12))) and not data.ArraySource(arrays.images).places()


def test_pretraining_from_a_start_does_not_score_what_the_start_has_seen(folder, tmp_path):
  encoder = tiny.export(tmp_path / "encoder", **{"data.train": f"files:{folder}", "data.test": ""})
  changes = {"data.train": f"folder:{folder}", "data.test": "", "data.held_out": 0.5, "start": str(encoder)}
  with pytest.raises(UserError, match="6 of the 6 images to score are in files:.*set, which .*encoder was trained on"):
    pretrain.run(tiny.config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_groups_of_batch_norm_are_those_that_the_run_began_with(tmp_path, monkeypatch):
  """On eight devices the config keeps eight; a run of an earlier version, which kept none, resumes."""
  spec = tiny.npz(tmp_path / "tiny.npz")
  config = tiny.config(**{"data.train": spec, "data.test": f"{spec}:test", "norm_scope": "device"})
  kept = []

  def claim(config, *_, **__):
    kept.append(config)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(same, "claim", claim)
    with pytest.raises(KeyboardInterrupt):
      pretrain.run(config, tmp_path / "run")
  assert kept[0].norm_devices == 8
  now = config_lib.replace(config, {"norm_devices": 4})
  (tmp_path / "run").mkdir()
  checkpoint.write_config(tmp_path / "run", config_lib.to_json(kept[0]))
  with pytest.raises(ValueError, match="config.norm_devices is 8 in the run and 4 now"):
    same.same_config(now, tmp_path / "run")
  checkpoint.write_config(tmp_path / "run", config_lib.to_json(config))
  assert same.same_config(now, tmp_path / "run") == now


def test_a_resumed_run_takes_what_changes_neither_its_steps_nor_its_scores(tmp_path):
  config = tiny.config(**{"evaluate.every_epochs": 1.0})
  (tmp_path / "checkpoints").mkdir()
  checkpoint.write_config(tmp_path, config_lib.to_json(config))
  taken = {
    "rollback.times": 3,
    "rollback.spike": 6.0,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 9,
    "log.every_steps": 3,
    "evaluate.batch_size": 8,
    "evaluate.every_epochs": 0.0,
    "evaluate.every_steps": 7,
    "data.max_bad_fraction": 0.5,
  }
  now = config_lib.replace(config, taken)
  assert same.same_config(now, tmp_path) == now
  source = tiny.source()
  kept, _ = same.claim(now, tmp_path, source, source, resume=True, overwrite=False)
  assert kept == now
  for key, value in (
    ("optimizer.base_lr", 1.0),
    ("evaluate.crop", 0.5),
    ("evaluate.knn_k", 3),
    ("evaluate.train_examples", 9),
    ("batch_size", 8),
  ):
    with pytest.raises(UserError, match=f"--resume: config.{key} is .* in the run and {value} now"):
      same.same_config(config_lib.replace(now, {key: value}), tmp_path)


def test_some_training_images_are_drawn_from_those_with_a_label():
  source = tiny.source(40)
  some = data.ArraySource(source.images, np.where(np.arange(40) % 4, -1, source.labels), class_names=source.class_names)
  chosen = embed.train_examples(some, tiny.config(**{"evaluate.train_examples": 6}))
  assert len(chosen) == 6 and (chosen.labels >= 0).all()
