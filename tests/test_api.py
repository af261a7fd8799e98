"""simclr_jax.pretrain, embed and probe as a notebook calls them."""

import bucket
import numpy as np
import pytest
import tiny

import simclr_jax
from simclr_jax import api, augment, data
from simclr_jax.programs import pretrain as program

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
  "train_steps": 2,
  "train_epochs": 0.0,
  "batch_size": 16,
  "augment.size": 16,
  "encoder.width": 0.0625,
  "projector.out_dim": 16,
  "evaluate.every_epochs": 0.0,
  "checkpoint.every_epochs": 0.0,
  "optimizer.warmup_epochs": 0.0,
}


@pytest.mark.slow
def test_arrays_in_arrays_out(tmp_path):
  source = tiny.source()
  images = np.stack([source.read(i) for i in range(96)])
  encoder = simclr_jax.pretrain(images, str(tmp_path / "run"), recipe="smoke", labels=source.labels, **SMALL)
  assert (tmp_path / "run/report.html").exists() and encoder.card["step"] == 2
  assert 0 < encoder.card["held_out"]["images"] < 20 and "classes" not in encoder.card["held_out"]
  h = simclr_jax.embed(encoder, images, batch_size=40)
  assert h.shape == (96, encoder.card["feature_dimension"]) and h.dtype == np.float32
  views = np.stack([augment.center_crop(image, size=16, proportion=1.0) for image in images[:5]])
  np.testing.assert_allclose(h[:5], encoder.apply(views), rtol=1e-4, atol=1e-5)
  several = [np.tile(images[0], (2, 2, 1)), images[1]]
  np.testing.assert_allclose(simclr_jax.embed(str(tmp_path / "run/encoder"), several)[1], h[1], rtol=1e-4, atol=1e-5)
  assert simclr_jax.embed(encoder, images[:0]).shape == (0, h.shape[1])
  h_of_run = simclr_jax.embed(str(tmp_path / "run"), images[:5])
  np.testing.assert_array_equal(h_of_run, simclr_jax.embed(encoder, images[:5]))
  again = simclr_jax.pretrain(None, str(tmp_path / "run"), resume=True)
  assert again.card["checksum"] == encoder.card["checksum"]
  with pytest.raises(
    ValueError, match="^workdir=.* is not empty: add resume=True to resume the run, overwrite=True to"
  ):
    simclr_jax.pretrain(images, str(tmp_path / "run"), recipe="smoke", **SMALL)


def test_arrays_of_a_run_in_a_bucket_lie_beside_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  with bucket.buckets(tmp_path / "buckets"):
    arrays = api._arrays(images, [0, 1, 0, 1])
    api._keep(arrays, "npz:gs://mine/runs/a.npz", same_only=False)
    source = data.open_source("npz:gs://mine/runs/a.npz")
    np.testing.assert_array_equal(source.read(2), images[2])
    with pytest.raises(ValueError, match="images"):
      api._keep(arrays | {"images": images[::-1]}, "npz:gs://mine/runs/a.npz", same_only=True)
  assert [path.name for path in tmp_path.iterdir()] == ["buckets"]


@pytest.mark.parametrize("before", ["photographs", "not an archive"])
def test_a_file_of_the_users_is_never_replaced(tmp_path, before):
  """The arrays would be saved beside the workdir, under a name that is taken."""
  file, images = tmp_path / "photos.npz", np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  if before == "photographs":
    np.savez(file, images=images, weights=np.ones(3))
  else:
    file.write_text(before)
  kept = file.read_bytes()
  for flags in ({}, {"overwrite": True}, {"resume": True}):
    with pytest.raises(ValueError, match=r"photos\.npz would be replaced, and is not the copy of a run's images"):
      simclr_jax.pretrain(images[:2], str(tmp_path / "photos"), recipe="smoke", **SMALL, **flags)
    assert file.read_bytes() == kept
  if before == "photographs":  # the same images: nothing to save
    api._keep(api._arrays(images, None), f"npz:{file}", same_only=True)
    assert file.read_bytes() == kept


def test_a_mistake_deletes_and_writes_nothing(tmp_path):
  run, images = tmp_path / "run", np.zeros((4, 8, 8, 3), np.uint8)
  (run / "encoder").mkdir(parents=True)
  for name in ("RUN", "COMPLETE", "config.json"):
    (run / name).write_text("")
  for wrong in ({"images": images / 255.0}, {"labels": [0, 1]}, {"batch_sise": 4}, {"recipe": "smok"}):
    for flag in ("overwrite", "resume"):
      with pytest.raises(ValueError):
        simclr_jax.pretrain(**{"images": images, "workdir": str(run), flag: True, **wrong})
  assert {path.name for path in run.iterdir()} == {"RUN", "COMPLETE", "config.json", "encoder"}
  assert not (tmp_path / "run.npz").exists()


@pytest.mark.parametrize("wrong, message", [
  ({"microbatches": 3}, "^microbatches=3: batch_size=16"),
  ({"start": "/nonexistent"}, "/nonexistent"),
  ({"labels": [0, 1, 2, 3]}, "photos"),  # nothing else is wrong: the folder is no run
])  # fmt: skip
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_nothing_is_written_or_locked_before_all_checks(tmp_path, wrong, message, flag):
  before, after = (np.full((4, 8, 8, 3), i, np.uint8) for i in (1, 2))
  workdir = tmp_path / ("photos" if "labels" in wrong else "run")
  workdir.mkdir()
  (workdir / "holiday.jpg").write_text("")
  if "labels" not in wrong:
    api._keep(api._arrays(before, None), f"npz:{workdir}.npz", same_only=True)
  kept = {path.name: path.stat().st_mtime_ns for path in (*tmp_path.iterdir(), *workdir.iterdir())}
  changes = {"data.changed": "accept"}  # so that other images do not end it
  with pytest.raises(ValueError, match=message):
    simclr_jax.pretrain(after, str(workdir), recipe="smoke", **{**SMALL, **changes, flag: True, **wrong})
  assert {path.name: path.stat().st_mtime_ns for path in (*tmp_path.iterdir(), *workdir.iterdir())} == kept


def test_a_run_that_fails_leaves_no_lock_and_its_images(tmp_path, monkeypatch):
  images, workdir = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8), tmp_path / "run"
  (tmp_path / "run").mkdir()

  def fail(*args, **options):
    assert (workdir / "LOCK").exists()
    raise RuntimeError("the accelerator is gone")

  monkeypatch.setattr(program.loop, "run", fail)
  with pytest.raises(RuntimeError, match="gone"):
    simclr_jax.pretrain(images, str(workdir), recipe="smoke", **SMALL)
  assert not (workdir / "LOCK").exists() and (workdir / "config.json").exists()
  np.testing.assert_array_equal(data.open_source(f"npz:{workdir}.npz").read(3), images[3])


def test_what_would_be_ignored_is_refused(tmp_path):
  images = np.zeros((4, 8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match="^labels beside images='fashion:train': a data set has its own"):
    simclr_jax.pretrain("fashion:train", str(tmp_path / "a"), labels=[0, 1])
  with pytest.raises(ValueError, match="^labels beside images=None"):
    simclr_jax.pretrain(None, str(tmp_path / "a"), labels=[0, 1], resume=True)
  with pytest.raises(ValueError, match="^data.train=fashion:train beside images: give one of them"):
    simclr_jax.pretrain(images, str(tmp_path / "a"), **{"data.train": "fashion:train"})
  assert not list(tmp_path.iterdir())


def test_arrays_that_were_saved_here_may_be_replaced(tmp_path):
  first, second = (api._arrays(np.full((4, 8, 8, 3), i, np.uint8), [0, 1, 0, 1]) for i in (1, 2))
  spec = f"npz:{tmp_path / 'run.npz'}"
  api._keep(first, spec, same_only=True)
  with pytest.raises(ValueError, match="images is not what the run began with: other contents"):
    api._keep(second, spec, same_only=True)
  assert data.open_source(spec).read(0).max() == 1
  api._keep(second, spec, same_only=False)
  assert data.open_source(spec).read(0).max() == 2
  api._keep(api._arrays(second["images"], ["a", "b", "a", "b"]), spec, same_only=False)
  assert data.open_source(spec).class_names == ("a", "b")


def test_probe_tells_separable_classes_apart():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 120)
  h = np.eye(3)[labels] * 4 + rng.standard_normal((120, 3)) * 0.3
  found = simclr_jax.probe(h[:80], labels[:80], h[80:], labels[80:])
  assert found["accuracy"] > 0.97 and found["l2"] > 0
  with pytest.raises(ValueError, match="test_h has 40 rows for 3 labels"):
    simclr_jax.probe(h[:80], labels[:80], h[80:], labels[:3])


def test_mistakes_are_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"images are float64 \[4, 8, 8, 3\]: expected uint8"):
    simclr_jax.pretrain(np.zeros((4, 8, 8, 3)), str(tmp_path / "a"))
  with pytest.raises(ValueError, match="2 labels for 4 images"):
    simclr_jax.pretrain(np.zeros((4, 8, 8, 3), np.uint8), str(tmp_path / "a"), labels=[0, 1])
  with pytest.raises(ValueError, match=r"^batch_sise: no such key; did you mean batch_size\?$"):
    simclr_jax.pretrain(np.zeros((4, 8, 8, 3), np.uint8), str(tmp_path / "b"), batch_sise=4)


def test_mistakes_speak_of_arguments(tmp_path):
  images = np.zeros((4, 8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match=r"^batch_size=0: expected a whole number of at least 2"):
    simclr_jax.pretrain(images, str(tmp_path / "a"), batch_size=0)
  with pytest.raises(ValueError, match=r"^images=None: give images, or resume=True"):
    simclr_jax.pretrain(None, str(tmp_path / "a"))
  with pytest.raises(ValueError, match=r"^workdir=.*: no run here"):
    simclr_jax.pretrain(None, str(tmp_path / "a"), resume=True)
  with pytest.raises(TypeError, match=r"pretrain\(\) has no argument overwrit: did you mean overwrite\?"):
    simclr_jax.pretrain(images, str(tmp_path / "a"), overwrit=True)
  with pytest.raises(TypeError, match=r"embed\(\) has no argument batchsize: did you mean batch_size\?"):
    simclr_jax.embed("encoder", images, batchsize=4)
  with pytest.raises(TypeError, match=r"probe\(\) has no argument k: it takes h, labels, test_h, test_labels"):
    simclr_jax.probe(images, [0], images, [0], k=1)


@pytest.mark.parametrize("change, message", [
  ({"h": np.zeros(6)}, r"^h is \[6\]: expected \[n, d\]"),
  ({"test_h": np.zeros((3, 2, 2))}, r"^test_h is \[3, 2, 2\]: expected"),
  ({"test_h": np.zeros((3, 5))}, "^h has 4 columns and test_h 5: expected features of one encoder"),
  ({"labels": np.eye(3)[[0, 1, 2, 0, 1, 2]]}, r"^labels are \[6, 3\] and test_labels \[3\]: expected both as"),
  ({"labels": np.eye(3)[[0, 1, 2, 0, 1, 2]], "test_labels": np.eye(4)[:3]}, r"^labels are \[6, 3\] and test_labels \[3, 4\]"),
])  # fmt: skip
def test_features_and_labels_that_do_not_fit_are_one_line(change, message):
  right = {"h": np.zeros((6, 4)), "labels": [0, 1, 2] * 2, "test_h": np.zeros((3, 4)), "test_labels": [0, 1, 2]}
  with pytest.raises(ValueError, match=message) as raised:
    simclr_jax.probe(**right | change)
  assert "\n" not in str(raised.value)


def test_embed_encodes_at_most_as_many_images_at_once_as_there_are(tmp_path):
  encoder, seen = simclr_jax.load_encoder(tiny.export(tmp_path / "encoder")), []

  def apply(images):
    seen.append(len(images))
    return np.asarray(images).reshape(len(images), -1)[:, :4]

  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  found = {}
  for size, calls in ((10**9, [8]), (256, [8]), (5, [5]), (2, [2, 2, 2]), (1, [1] * 5)):
    seen.clear()
    found[size] = simclr_jax.embed(encoder._replace(apply=apply), images, batch_size=size)
    assert seen == calls and found[size].shape == (5, 4)
    np.testing.assert_array_equal(found[size], found[10**9])
  for size in (0, -1):
    with pytest.raises(ValueError, match=f"^batch_size={size}: expected a whole number of at least 1"):
      simclr_jax.embed(encoder, images, batch_size=size)


def test_probe_takes_labels_of_any_kind():
  rng = np.random.default_rng(0)
  y = np.arange(60) % 3
  h = (3 * np.eye(4)[y] + 0.1 * rng.normal(size=(60, 4))).astype(np.float32)
  for labels in (y, 10**12 * y, np.array(["ant", "bee", "cat"])[y], np.eye(3)[y], np.where(np.arange(60) % 5, y, -1)):
    assert simclr_jax.probe(h, labels, h, labels)["accuracy"] == 1
  # A text stands for one class in both, whatever else is there.
  assert (
    simclr_jax.probe(h, np.array(["ant", "bee", "cat"])[y], h[y > 0], np.array(["?", "bee", "cat"])[y[y > 0]])[
      "accuracy"
    ]
    == 1
  )


@pytest.mark.parametrize(
  "images, message",
  [
    (np.full((2, 20, 20, 3), 255.0), "images range from 255 to 255"),
    (np.zeros((2, 20, 20, 3), np.int64), "images are int64"),
    (np.zeros((2, 20, 20), np.uint8), r"an image is \[20, 20\]"),
    ([np.zeros((9, 9, 3), np.uint8), np.full((8, 8, 3), np.nan)], "images range from nan"),
  ],
)
def test_embed_refuses_images_of_another_kind(tmp_path, images, message):
  with pytest.raises(ValueError, match=message):
    simclr_jax.embed(str(tiny.export(tmp_path / "encoder")), images)
