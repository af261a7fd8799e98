"""`simclr quickstart` chooses by what it measures, finds what was planted, and leaves one page that opens."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types

import images
import numpy as np
import pytest
import tiny

from simclr_jax import __main__ as cli
from simclr_jax.evaluation import features
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import quickstart
from simclr_jax.programs.quickstart import Network
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


def test_networks_fit_the_images():
  assert quickstart.candidates(28, True) == [Network(20, 0.25, "cifar")]  # as configs/smoke.py
  for side in (20, 40, 64, 100, 300, 3000):
    for on_cpu in (True, False):
      found = quickstart.candidates(side, on_cpu)
      assert found and all(16 <= network.size <= side for network in found)
      work = [network.work for network in found]
      assert work == sorted(work, reverse=True)  # the best first
  assert quickstart.candidates(500, False)[0].depth == 50


@pytest.mark.parametrize("n, devices, on_cpu, expected", [(300, 1, True, 64), (20, 1, True, 8), (10**6, 1, True, 128),
  (300, 8, True, 64), (20, 8, True, 8), (10**6, 6, False, 510)])  # fmt: skip
def test_batches_divide_and_leave_other_negatives(n, devices, on_cpu, expected):
  batch = quickstart.batch_size(n, devices, on_cpu)
  assert batch == expected and batch % devices == 0 and batch <= max(n / 2, devices)


class Many:
  """A source of n images of 200 pixels, which nobody reads but for their size."""

  class_names, num_classes, labels = (), 0, None

  def __init__(self, n):
    self._n = n

  def __len__(self):
    return self._n

  def read(self, i):
    return np.zeros((200, 300, 3), np.uint8)


@pytest.fixture
def chosen(monkeypatch):
  """(n images, minutes, {size: seconds a step}) -> (config, reasons, sizes that were timed)."""

  def choose(n, minutes, seconds):
    timed = []

    def measure(config, source, mesh):
      timed.append((config.augment.size, config.encoder.width))
      return seconds[timed[-1]]

    monkeypatch.setattr(quickstart, "seconds_a_step", measure)
    mesh = quickstart.mesh_lib.make_mesh()
    config, why = quickstart.choose(Many(n), "files:/x", mesh, minutes, time.monotonic())
    return config, why, timed

  return choose


def test_the_largest_network_that_is_fast_enough_is_taken(chosen):
  fast, slow = {(96, 0.5): 0.1}, {(96, 0.5): 2.0, (64, 0.5): 1.5, (64, 0.25): 0.2}
  config, why, timed = chosen(300, 8, fast)
  assert timed == [(96, 0.5)] and config.augment.size == 96 and "the largest of 4" in str(why)
  assert config.train_steps == 400 * 300 // 64  # 400 epochs, though the time would do for more
  config, why, timed = chosen(300, 6, slow)
  # (64, 0.5) has 2.25 times less work, and 96 pixels were 3 times too slow: it is not tried.
  assert timed == [(96, 0.5), (64, 0.25)] and config.encoder.width == 0.25
  assert config.train_steps == pytest.approx((6 * 60 - 60) / 0.2, rel=0.02)


def test_too_little_time_takes_the_smallest_and_says_so(chosen):
  times = {(96, 0.5): 9.0, (64, 0.5): 9.0, (64, 0.25): 9.0, (48, 0.25): 9.0}
  config, why, timed = chosen(300, 1, times)
  assert timed[-1] == (48, 0.25) and config.train_steps == 20 and "more --minutes would serve it" in str(why)
  assert "about 3:00', 'the fewest that make sense; it takes longer than the 1 minute'" in str(why)
  config, why, _ = chosen(300, 1, dict.fromkeys(times, 0.5))
  assert config.train_steps == 24 and "a fifth of the 1 minute; it takes longer than that, for the rest alone" in str(
    why
  )


def test_the_minutes_are_for_reading_the_images_too(chosen, monkeypatch):
  """All are read twice after the training: for h, and, as far as they are on the map, for their thumbnails."""
  slow = dict.fromkeys([(96, 0.5), (64, 0.5), (64, 0.25), (48, 0.25)], 0.5)
  monkeypatch.setattr(quickstart, "look", lambda source: (200, 0.01 * quickstart.data.cores()))
  config, why, _ = chosen(20_000, 10, slow)
  left = 10 * 60 - 60 - (20_000 + 10_000) * 0.01 - 10_000 * 0.004
  assert config.train_steps == pytest.approx(left / 0.5, rel=0.02) and "less 6:40 for the rest" in str(why)
  config, why, _ = chosen(100_000, 10, slow)
  assert config.train_steps == 2 * 60 / 0.5 and "a fifth of the 10 minutes" in str(why)  # not fewer


def test_sub_folders_color_the_map():
  labels, names = quickstart.classes("/x", ["/x/cat/1.png", "/x/cat/deep/2.png", "/x/dog/3.png"])
  assert labels.tolist() == [0, 0, 1] and names == ["cat", "dog"]
  assert quickstart.classes("/x", ["/x/cat/1.png", "/x/2.png"]) == (None, [])
  assert quickstart.classes("/x", ["/x/cat/1.png", "/x/cat/2.png"]) == (None, [])


def test_the_time_of_a_resumed_run_is_not_that_from_the_folder():
  assert quickstart.span(75.0, 0.0) == "1:15 from the folder to this page"
  assert quickstart.span(75.0, 300.0) == "1:15 from resuming to this page, after 5:00 of training"


def test_mistakes_are_one_line(tmp_path, capfd):
  (tmp_path / "few").mkdir()
  for argv, message in (
    ([str(tmp_path / "none")], "there is no folder"),
    ([], "name a folder of images, or resume a quickstart with --resume"),
    ([str(tmp_path / "few")], "no image in or below"),
    ([str(tmp_path / "few"), "--minutes=-1"], "--minutes=-1.0: expected a number above 0"),
  ):
    assert cli.main(["quickstart", *argv, f"--workdir={tmp_path / 'run'}"]) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("simclr: ")]
    assert len(error) == 1 and message in error[0]
  assert not (tmp_path / "run").exists()


def test_runs_that_are_not_its_own_are_spared(tmp_path):
  """The run that it starts from, with --overwrite, and one of pretraining, with --resume."""
  images.folder(tmp_path / "photos")
  run = tmp_path / "run"
  encoder = tiny.export(run / "encoder")
  (run / "checkpoints").mkdir()
  for name in ("RUN", "COMPLETE", "config.json"):
    (run / name).write_text("")
  before = sorted(path.name for path in run.iterdir())
  for flags, words in (
    ({"overwrite": True, "start": str(encoder)}, "--overwrite would delete .*encoder, which this starts from"),
    ({"resume": True}, "--resume: that run was not begun by simclr quickstart"),
    ({"overwrite": True, "start": str(tmp_path / "none")}, "none"),
  ):
    with pytest.raises(UserError, match=words):
      quickstart.run(str(tmp_path / "photos"), run, **flags)
    assert sorted(path.name for path in run.iterdir()) == before
  (run / "quickstart.json").write_text("")  # its own run, too, is deleted by a command that can begin
  with pytest.raises(UserError, match="nowhere"):
    quickstart.run(str(tmp_path / "photos"), run, overwrite=True, start=str(tmp_path / "nowhere"))
  assert (run / "COMPLETE").exists()
  files.write_sealed(run / "quickstart.json", json.dumps({"folder": "/other", "minutes": 1.0, "why": []}))
  with pytest.raises(UserError, match="is a quickstart of /other: name another folder for"):
    quickstart.run(str(tmp_path / "photos"), run, resume=True)
  assert (run / "COMPLETE").exists()


@pytest.fixture
def at_once(tmp_path, monkeypatch):
  """A quickstart of tmp_path/photos, 20 flat images in levels of gray, whose networks cost nothing.

  Its keyword arguments: `training` and `embedded` are called in the place of the training, and after the folder was
  embedded; `lost` are lines about unreadable images.
  """
  photos = tmp_path / "photos"
  for i in range(20):
    images.save(photos / f"{i:02}.png", np.full((40, 40, 3), 10 * i, np.uint8))
  h = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  monkeypatch.setattr(quickstart, "choose", lambda *_: (config_lib.load("folder"), [("what", "value", "why")]))
  monkeypatch.setattr(quickstart.map_lib.maps, "infonc_tsne", lambda h, near, seed: h[:, :2])

  def start(folder=photos, *, training=lambda: None, embedded=lambda: None, lost=(), **options):
    def train(*_, **__):
      training()
      return {"page": {"files": {}, "seconds": {}}, "state": types.SimpleNamespace(step=1)}

    def embed(workdir, spec, output, **_):
      source = quickstart.data.open_source(spec)
      n = len(source)
      name = np.array([source.name(i) for i in range(n)])
      about = dict(data=spec, encoder=str(workdir))
      made = features.Features(h=h[:n], name=name, label=np.full(n, -1, np.int32), index=np.arange(n), **about)
      features.write(output, made)
      files.write_text(f"{output}.unreadable.txt", "".join(f"{photos}/{name}\tis cut off\n" for name in lost))
      embedded()
      return output

    monkeypatch.setattr(quickstart.pretrain, "run", train)
    monkeypatch.setattr(quickstart.embed, "run", embed)
    return quickstart.run(folder and str(folder), tmp_path / "run", minutes=None, **options)

  return start


def test_photos_that_come_and_go_meanwhile_do_not_cost_the_page(at_once, tmp_path, monkeypatch):
  """While it trains, while it embeds, and while the thumbnails are read."""
  photos, thumbnails = tmp_path / "photos", quickstart.map_lib.thumbnails

  def training():
    images.save(photos / "000.png", np.full((40, 40, 3), 255, np.uint8))
    (photos / "07.png").unlink()

  def embedded():
    images.save(photos / "0.png", np.full((40, 40, 3), 77, np.uint8))
    (photos / "11.png").unlink()

  def drawn(*arguments):
    (photos / "13.png").unlink()
    return thumbnails(*arguments)

  monkeypatch.setattr(quickstart.map_lib, "thumbnails", drawn)
  chart = at_once(training=training, embedded=embedded)["chart"]
  shown = dict(zip(chart["names"], chart["pictures"][:, 8, 8, 0].tolist(), strict=True))
  expected = {f"{i:02}.png": 10 * i for i in range(20) if i not in (7, 11)} | {"000.png": 255, "13.png": 128}
  assert shown == expected
  assert "20 images, " in (tmp_path / "run/report.html").read_text() and (tmp_path / "run/COMPLETE").exists()


def test_of_a_large_folder_a_part_is_on_the_map(at_once, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(quickstart.map_lib, "MOST_ON_A_MAP", 12)
  found = at_once()
  names = found["chart"]["names"]
  assert len(names) == len(found["chart"]["pictures"]) == 12 and names == sorted(names)
  assert names != [f"{i:02}.png" for i in range(12)]  # but from all of the folder
  assert len(features.load(tmp_path / "run/features.npz").h) == 20
  page, said = (
    (tmp_path / "run/report.html").read_text(),
    "Map and lists are of 12 of the 20 images that were embedded.",
  )
  assert said in page and said in capsys.readouterr().out and re.search(r"near-duplicate pairs among 12 of them,", page)


def test_of_many_unreadable_files_the_number_of_those_not_shown_is_said(at_once, tmp_path, capsys):
  names = [f"cut_{i:03}.jpg" for i in range(640)]
  assert len(at_once(lost=names)["unreadable"]) == 640
  page, said = (tmp_path / "run/report.html").read_text(), capsys.readouterr().out
  assert names[99] in page and names[100] not in page and "and 540 more" in page
  assert "all are named in features.npz.unreadable.txt" in page
  assert (
    f"cut_004.jpg: is cut off\n            and 635 more: all are named in {tmp_path}/run/features.npz.unreadable"
    in said
  )
  at_once(lost=names[:5], overwrite=True)
  assert " more: " not in capsys.readouterr().out and "all are named" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("name", ["my\\photos", "a\nb", os.fsdecode(b"caf\xe9")])
def test_a_run_resumes_without_the_folder_whatever_its_name(at_once, tmp_path, name):
  folder, plan = tmp_path / name, tmp_path / "run/quickstart.json"
  (tmp_path / "photos").rename(folder)
  at_once(folder)
  for keep in (("path", "folder", "minutes", "why"), ("folder", "minutes", "why")):  # the latter before 0.2
    kept = json.loads(files.read_sealed(plan))
    files.write_sealed(plan, json.dumps({key: kept[key] for key in keep}))
    if "path" in keep:
      assert len(at_once(None, resume=True)["chart"]["names"]) == 20
    assert len(at_once(folder, resume=True)["chart"]["names"]) == 20
  assert kept["path"] == str(folder) and kept["folder"] == files.printable(str(folder))


def check(found, planted, workdir):
  pairs = {frozenset(str(found["chart"]["names"][i]) for i in pair[:2]) for pair in found["found"]["duplicates"]}
  assert frozenset(planted["pairs"]["exact"]) in pairs
  assert [pathlib.Path(name).name for name, _ in found["unreadable"]] == [planted["broken"]]
  page = (workdir / "report.html").read_text()
  assert not re.search(r"https?:|url\(|@import|<iframe", page)
  for heading in (
    "What was chosen, and why",
    "Map",
    "Near-duplicates",
    "Outliers",
    "Unreadable files",
    "Curves",
    "Config",
  ):
    assert f"<h2>{heading}</h2>" in page
  assert (workdir / "COMPLETE").exists() and (workdir / "map/map.png").exists()
  return pairs


@pytest.mark.slow
def test_folder_to_page_and_again(tmp_path, monkeypatch, capsys):
  planted = images.folder(tmp_path / "photos", 60)
  monkeypatch.setattr(quickstart, "candidates", lambda side, on_cpu: [Network(16, 0.0625, "cifar")])
  monkeypatch.setattr(quickstart, "seconds_a_step", lambda *_: 60.0)
  embed, complete = quickstart.embed.run, tmp_path / "run/COMPLETE"

  def embedded(*args, **options):
    assert not complete.exists() and (tmp_path / "run/LOCK").exists()  # the map and the page are still to come
    return embed(*args, **options)

  monkeypatch.setattr(quickstart.embed, "run", embedded)
  found = quickstart.run(tmp_path / "photos", tmp_path / "run", minutes=1)
  check(found, planted, tmp_path / "run")
  assert "from the folder to this page" in (tmp_path / "run/report.html").read_text()
  assert not (tmp_path / "run/LOCK").exists()
  with pytest.raises(ValueError, match="--resume"):
    quickstart.run(tmp_path / "photos", tmp_path / "run")
  with pytest.raises(UserError, match="--minutes=3: the run in .* was planned for 1; leave it out to resume"):
    quickstart.run(None, tmp_path / "run", minutes=3, resume=True)
  assert complete.exists()
  plan = tmp_path / "run/quickstart.json"
  kept = json.loads(files.read_sealed(plan))
  files.write_sealed(plan, json.dumps({**kept, "minutes": None}))  # of an earlier version, which did not keep it
  again = quickstart.run(None, tmp_path / "run", minutes=2, resume=True)
  assert json.loads(files.read_sealed(plan))["minutes"] == 2
  assert "from resuming to this page, after" in (tmp_path / "run/report.html").read_text()
  assert config_lib.difference(found["config"], again["config"]) == []
  np.testing.assert_array_equal(found["chart"]["views"]["PCA"], again["chart"]["views"]["PCA"])


@pytest.mark.slow
def test_300_images_in_minutes_and_the_page_opens(tmp_path):
  planted = images.folder(tmp_path / "photos")
  began = time.monotonic()
  command = [
    sys.executable,
    "-m",
    "simclr_jax",
    "quickstart",
    str(tmp_path / "photos"),
    f"--workdir={tmp_path / 'run'}",
    "--minutes=2",
  ]
  done = subprocess.run(command, capture_output=True, text=True, env=None)
  assert done.returncode == 0, done.stderr
  assert time.monotonic() - began < 600  # of training two minutes, on a machine that does other things too
  for pair in planted["pairs"].values():
    assert " and ".join(sorted(pair)) in done.stdout, pair
  assert planted["broken"] in done.stdout
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if browser:
    flags = [
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--enable-logging=stderr",
      "--v=0",
      "--virtual-time-budget=3000",
    ]
    shot = tmp_path / "shot.png"
    page = f"file://{tmp_path / 'run/report.html'}"
    seen = subprocess.run(
      [browser, *flags, f"--screenshot={shot}", "--window-size=390,844", page], capture_output=True, text=True
    )
    assert shot.exists() and "CONSOLE" not in seen.stderr
