"""Claims: statistics against scipy, verdicts, formulas, and cells that are run once, whatever ends the command."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import tiny

from simclr_jax import __main__ as cli
from simclr_jax import optimizer, report
from simclr_jax.evaluation import intervals
from simclr_jax.programs import cells, claims, claims_page, experiments
from simclr_jax.programs.experiments import Claim
from simclr_jax.runtime import errors

pytestmark = pytest.mark.usefixtures("one_device")

CHANGES = (("encoder.width", 0.0625), ("batch_size", 16), ("projector.out_dim", 16), ("evaluate.batch_size", 32))
TINY = claims.Budget(seeds=(0, 1), epochs=0.5, train=60, test=32, data=(), changes=CHANGES)
FEW = (
  Claim("h over pixels", "h beats pixels.", "v1", "simclr.linear - pixels.linear", paper=1.0),
  Claim("training", "Training helps.", "v1", "simclr.linear - untrained.linear"),
  Claim("z", "h beats z.", "v1", "simclr.linear - simclr.linear_z"),
)


@pytest.fixture
def few(monkeypatch):
  """Three claims of four settings, of which SimCLR's alone trains and measures z alone."""
  monkeypatch.setattr(experiments, "CLAIMS", FEW)
  settings = {name: cells.Setting(kind=experiments.SETTINGS[name].kind) for name in ("pixels", "untrained")}
  monkeypatch.setattr(experiments, "SETTINGS", settings | {"simclr": cells.Setting(measures=("z",))})


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
  """A labeled set of 96 gray images, split in two."""
  source = tiny.source(96)
  images = np.stack([source.read(i) for i in range(96)])
  path = tmp_path_factory.mktemp("data") / "tiny.npz"
  parts = {"train": slice(0, 64), "test": slice(64, None)}
  np.savez(
    path,
    **{f"{name}_{k}": a[p] for name, p in parts.items() for k, a in (("images", images), ("labels", source.labels))},
  )
  return f"npz:{path}"


# ---- statistics and verdicts -----------------------------------------------------------------------------------------


def test_the_interval_is_that_of_scipys_paired_test():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 5))
  found = intervals.interval(a - b)
  expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
  assert found.mean == pytest.approx(np.mean(a - b))
  # Three values worked by hand: 2 +- 4.303 * 1 / sqrt(3).
  found = intervals.interval([1.0, 2.0, 3.0])
  assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
  assert not found.excludes_zero and intervals.interval([1.0, 1.1, 1.2]).excludes_zero
  assert intervals.interval([1.0]).low == -np.inf
  with pytest.raises(ValueError, match="no differences"):
    intervals.interval([])


@pytest.mark.parametrize(
  "low, high, direction, expected",
  [
    (1, 2, 1, "supported"),
    (-1, 2, 1, "not supported"),
    (-2, -1, 1, "contrary"),
    (0, 2, 1, "not supported"),
    (-2, -1, -1, "supported"),
    (1, 2, -1, "contrary"),
    (-1, 2, -1, "not supported"),
    (-1, 1.5, 0, "supported"),
    (0.5, 1.5, 0, "supported"),  # a difference for sure, and one that is too small to matter
    (-1, 3, 0, "not supported"),
    (3, 4, 0, "contrary"),
    (-4, -3, 0, "contrary"),
  ],
)
def test_verdicts(low, high, direction, expected):
  assert intervals.verdict(intervals.Interval((low + high) / 2, low, high), direction, margin=2.0) == expected


# ---- formulas --------------------------------------------------------------------------------------------------------


def scores_of(**by_setting):
  """{("set", setting): {seed: {"linear", "validation"}}} of lists of accuracies."""
  return {
    ("set", name): {seed: {"linear": value, "validation": value} for seed, value in enumerate(values)}
    for name, values in by_setting.items()
  }


def test_a_difference_is_taken_seed_by_seed_and_what_has_no_seed_counts_for_all():
  claim = Claim("a", "a", "v1", "simclr.linear - pixels.linear")
  found = claims.judge(claim, "set", scores_of(simclr=[0.5, 0.6, 0.7], pixels=[0.4]), (0, 1, 2))
  expected = intervals.interval([10.0, 20.0, 30.0])
  assert found.interval.mean == pytest.approx(20) and found.interval.low == pytest.approx(expected.low)
  assert found.verdict == "not supported"  # three seeds so far apart
  assert found.values == {"simclr.linear": pytest.approx(60), "pixels.linear": pytest.approx(40)}
  paired = claims.judge(Claim("b", "b", "v1", "simclr.linear - head_none.linear"), "set",
                        scores_of(simclr=[0.5, 0.6, 0.7], head_none=[0.41, 0.5, 0.61]), (0, 1, 2))  # fmt: skip
  assert paired.verdict == "supported"


def test_four_terms_are_a_difference_of_differences():
  claim = Claim("a", "a", "v1", "simclr.linear - short.linear - supervised.linear + oracle.linear")
  found = claims.judge(
    claim, "set", scores_of(simclr=[0.9] * 3, short=[0.8] * 3, supervised=[0.5] * 3, oracle=[0.45] * 3), (0, 1, 2)
  )
  assert found.interval.mean == pytest.approx(5)


def test_the_best_of_several_is_the_best_on_held_out_images():
  """It is the worse of the two on test images, which are not asked."""
  scores = scores_of(simclr=[0.5, 0.5], short=[0.3, 0.3], oracle=[0.4, 0.4])
  for cell in scores["set", "short"].values():
    cell["validation"] = 0.9
  found = claims.judge(Claim("a", "a", "v1", "simclr.linear - best(short,oracle).linear"), "set", scores, (0, 1))
  assert found.interval.mean == pytest.approx(20) and "short.linear" in found.values


def test_a_claim_over_each_of_several_is_judged_by_the_strongest_on_test_images():
  """Of two rivals that look alike on held-out images, and one that diverged, which is beaten."""
  scores = scores_of(simclr=[0.5, 0.52], short=[0.3, 0.3], oracle=[0.49, 0.5], debiased=[0.9, 0.9])
  for cell in scores["set", "oracle"].values():
    cell["validation"] = 0.1
  scores["set", "debiased"][0] = {"diverged": 1.0}
  claim = Claim("a", "a", "v1", "simclr.linear - each(short,oracle,debiased).linear")
  found = claims.judge(claim, "set", scores, (0, 1))
  assert found.interval.mean == pytest.approx(1.5) and found.verdict == "not supported" and found.claim == claim
  assert set(found.values) == {"simclr.linear", "oracle.linear"}
  del scores["set", "short"][1]
  assert claims.judge(claim, "set", scores, (0, 1)).verdict == "not measured"
  scores["set", "simclr"] = {seed: {"diverged": 1.0} for seed in (0, 1)}
  assert claims.judge(Claim("a", "a", "v1", "simclr.linear - each(oracle).linear"), "set", scores, (0, 1)).verdict == "diverged"  # fmt: skip


def test_a_noisy_rival_does_not_hide_one_that_is_better_for_sure():
  """Of two that beat the claim, the one whose interval excludes zero; of several looks, at the level that many allow."""
  seeds = (0, 1, 2)
  clear, noisy = [0.6, 0.6005, 0.601], [0.2, 0.6, 1.0]
  scores = scores_of(simclr=[0.5, 0.5, 0.5], oracle=clear, short=noisy, debiased=[0.1, 0.2, 0.3])
  claim = Claim("a", "a", "v1", "simclr.linear - each(short,oracle,debiased).linear")
  found = claims.judge(claim, "set", scores, seeds)
  assert found.verdict == "contrary" and set(found.values) == {"simclr.linear", "oracle.linear"}
  assert found.interval == intervals.interval([-10.0, -10.05, -10.1])
  # t of 95 % is 4.30 and of 98.33 % 7.65: -4 +- 4.30 * 1 / sqrt(3) excludes zero, -4 +- 7.65 * 1 / sqrt(3) does not.
  scores |= scores_of(oracle=[0.53, 0.54, 0.55], short=[0.1, 0.1, 0.1])
  found = claims.judge(claim, "set", scores, seeds)
  assert found.verdict == "not supported" and found.interval.excludes_zero and found.interval.mean == pytest.approx(-4)
  alone = claims.judge(Claim("a", "a", "v1", "simclr.linear - each(oracle).linear"), "set", scores, seeds)
  assert alone.verdict == "contrary"
  scores |= scores_of(oracle=[0.3, 0.3, 0.3])
  assert claims.judge(claim, "set", scores, seeds).verdict == "supported"


def test_differences_of_nothing_support_nothing():
  """0.1 + 0.2 - 0.3 three times is 0, however it is rounded; and a score that is no number is not measured."""
  assert not intervals.interval([0.1 + 0.2 - 0.3] * 3).excludes_zero
  claim = Claim("a", "a", "v1", "simclr.linear - short.linear")
  found = claims.judge(claim, "set", scores_of(simclr=[0.5, float("nan")], short=[0.3, 0.3]), (0, 1))
  assert found.verdict == "not measured" and found.interval is None


def test_every_verdict_is_counted():
  one = claims.Finding(FEW[0], "set", intervals.Interval(1, 0.5, 1.5), "supported", {})
  none = [dataclasses.replace(one, interval=None, verdict=verdict) for verdict in ("diverged", "not measured")]
  expected = (
    "3 claims: 1 supported, 0 not supported, 0 contrary, 1 diverged, 1 not measured; 1 of the intervals exclude zero."
  )
  assert claims.summary([one, *none]) == expected


def test_time_left_is_that_of_the_cell_in_the_middle(spec, tmp_path):
  """One that was stopped on its way, one that was paused, and one of another budget say nothing."""
  images = cells.open_images(spec, most_train=60, most_test=32)
  todo = [
    claims.Cell("simclr", images, cells.config_of(cells.Setting(), seed, 1.0, {}), str(seed)) for seed in range(5)
  ]
  results = claims.Results(tmp_path)
  assert claims.seconds_of(todo[0], todo, results) is None
  for cell, seconds in zip(todo, (100.0, 3.0, 5000.0, 120.0), strict=False):
    results.add(cell, {"linear": 0.5, "seconds": seconds})
  results.add(dataclasses.replace(todo[4]), {"diverged": 1.0, "seconds": 1.0})
  results.add(claims.Cell("simclr", images, todo[0].config, "another budget's"), {"linear": 0.5, "seconds": 1.0})
  assert claims.estimate(todo[0], True, todo, results) == 110


def test_what_is_missing_and_what_diverged_is_said():
  claim = Claim("a", "a", "v1", "simclr.linear - short.linear")
  assert claims.judge(claim, "set", scores_of(simclr=[0.5, 0.5], short=[0.3]), (0, 1)).verdict == "not measured"
  scores = scores_of(simclr=[0.5, 0.5], short=[0.3, 0.3])
  scores["set", "short"][1] = {"diverged": 1.0}
  assert claims.judge(claim, "set", scores, (0, 1)).verdict == "diverged"
  claim = Claim("a", "a", "v1", "simclr.color_h - simclr.color_z")  # of images that have no color after all
  assert claims.judge(claim, "set", scores_of(simclr=[0.5, 0.5]), (0, 1)).verdict == "not measured"


SCORES = {  # what each measure adds
  "z": {"linear_z"}, "few": {"linear_10pct", "linear_1pct", "knn_20", "knn_200"},
  "few_z": {"linear_10pct_z", "linear_1pct_z", "knn_20_z", "knn_200_z"}, "contrastive": {"contrastive"},
  "geometry": {"spread_z", "rank_h", "rank_z"}, "matching": {"matched"}, "course": set(),
  "transforms": {f"{what}_{name}" for what in ("color", "rotation", "noise", "sobel", "hue", "position") for name in "hz"},
}  # fmt: skip


@pytest.mark.parametrize("claim", experiments.CLAIMS, ids=lambda c: c.name)
def test_every_claim_asks_for_what_is_measured(claim):
  assert claim.says.endswith(".") and claim.source
  found = claims.terms(claim.formula)
  assert sum(sign for sign, _, _ in found) == 0 and len(found) in (2, 4)
  assert len(found) == 1 + claim.formula.count(" - ") + claim.formula.count(" + ")
  for _, setting, score in found:
    for name in claims.alternatives(setting):
      setting = experiments.SETTINGS[name]
      measured = set().union(*(SCORES[m] for m in setting.measures)) | {"linear"}
      assert score in measured | ({"own"} if ("method", "supervised") in setting.changes else set()), name


@pytest.mark.parametrize("name", experiments.SETTINGS)
def test_every_setting_has_a_config(name):
  config = cells.config_of(experiments.SETTINGS[name], 1, 4.0, {})
  assert config.seed == 1 and config.encoder.width == 0.125


@pytest.mark.parametrize("few", [450, 40])
def test_with_few_labels_the_learning_rate_is_the_same_at_every_step(few):
  """The rows of supervised training with a tenth and a hundredth of 4,500 labels; 40, four a class, are fewer than a batch."""
  labels = np.arange(4500) % 10
  assert len(cells._labeled_part(labels, 0.1 if few == 450 else 0.01, 0)) == few
  whole = cells.config_of(experiments.SETTINGS["supervised"], 0, 8.0, {})
  setting = experiments.SETTINGS["supervised_10pct" if few == 450 else "supervised_1pct"]
  part = cells.config_of_few_labels(cells.config_of(setting, 0, 8.0, {}), 4500, few)
  assert part.batch_size == min(128, few)
  steps = optimizer.train_steps(whole, 4500)
  assert optimizer.train_steps(part, few) == steps == 282
  of_whole, of_part = (
    jax.vmap(optimizer.learning_rate(c, n))(np.arange(steps)) for c, n in ((whole, 4500), (part, few))
  )
  np.testing.assert_allclose(of_part, of_whole, rtol=1e-5)


def test_a_linear_image_of_h_uses_as_much_of_its_dimensions():
  """z of 16 dimensions that holds h of 8 rotated, wherever their means are: the rank of z is a fraction of 8."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(200, 8)) * np.arange(1, 9)
  rotation, _ = np.linalg.qr(rng.normal(size=(16, 8)))
  found = cells.Found(None, None, [{}, {"h": h + 5, "z": h @ rotation.T - 3}], [], None, None, [])
  numbers = cells.MEASURES["geometry"](found)
  assert numbers["rank_h"] == pytest.approx(numbers["rank_z"], rel=1e-3) and 0.5 < numbers["rank_h"] < 1


def test_contrastive_accuracy_is_that_of_the_last_quarter_however_often_rows_are_logged():
  """562 steps, in every one of which the accuracy is the number of the step; rows after 141 steps, and after 36 too."""
  for every in ([], range(36, 562, 36)):
    ends = sorted({141, 282, 423, 562, *every})
    rows = [{"step": b, "contrastive_accuracy": (a + 1 + b) / 2} for a, b in zip([0, *ends], ends, strict=False)]
    rows.insert(2, {"step": 36, "rank_h": 3.0})
    found = cells.Found(None, None, [], [], None, None, rows)
    assert cells.MEASURES["contrastive"](found)["contrastive"] == pytest.approx(np.mean(range(424, 563)))


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_a_cell_is_kept_under_what_made_it(spec):
  images = cells.open_images(spec, most_train=60, most_test=32)
  assert (len(images.train), len(images.validation), len(images.test), images.has_color) == (54, 6, 32, False) or len(images.train) + len(images.validation) == 60  # fmt: skip
  key = lambda setting, seed=0: cells.key(setting, cells.config_of(setting, seed, 1.0, {}), images)  # noqa: E731
  base = cells.Setting(measures=("z", "few"))
  assert key(base) == key(cells.Setting(row="loss-nt_xent", measures=("few", "z")))  # the same run by another name
  others = [key(base, 1), key(cells.Setting()), key(cells.Setting("temperature-1", measures=("z", "few")))]
  fewer = cells.open_images(spec, most_train=50, most_test=32)
  others.append(cells.key(base, cells.config_of(base, 0, 1.0, {}), fewer))
  assert len({key(base), *others}) == 5


def test_cells_that_were_measured_are_found_again():
  """A change of this key makes everybody's cells anew: it is to be meant."""
  images = cells.open_images("textures", most_train=5000, most_test=5000)
  setting = experiments.SETTINGS["simclr"]
  assert cells.key(setting, cells.config_of(setting, 0, 8.0, {}, "textures"), images) == "b32c8048da5ed82f"


@pytest.mark.parametrize("color", [0, 1, 40])
def test_gray_images_that_jpeg_has_colored_a_little_are_gray(tmp_path, color):
  """Noise of a level between the channels; sorted, with the gray ones first."""
  rng = np.random.default_rng(0)
  images = np.repeat(rng.integers(0, 200, (300, 8, 8, 1), dtype=np.uint8), 3, -1)
  images[150:, ..., 0] += np.uint8(color)
  labels = np.arange(300) % 3
  np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images[:9], test_labels=labels[:9])
  assert cells.open_images(f"npz:{tmp_path}/a.npz", most_train=300, most_test=300).has_color == (color == 40)


def test_a_network_that_the_last_update_broke_has_diverged(spec, tmp_path, monkeypatch):
  images = cells.open_images(spec, most_train=60, most_test=32)
  embed = cells.embed.embed
  monkeypatch.setattr(cells.embed, "embed", lambda *a: embed(*a) | {"h": np.full((1, 8), np.nan, np.float32)})
  setting = cells.Setting(kind=cells.UNTRAINED)
  numbers = cells.Runner(tmp_path).run(setting, cells.config_of(setting, 0, 0.5, dict(CHANGES)), images)
  assert numbers.pop("seconds") > 0 and numbers == {"diverged": 1.0}


def test_claims_end_to_end_and_again_without_a_run(few, spec, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(experiments, "CLAIMS", (Claim("a", "A.", "v1", "untrained.linear - pixels.linear", paper=1.0),))
  assert claims.run([spec], tmp_path, budget=TINY, plan_only=True) == []
  assert "3 cells, 0 of them done" in capsys.readouterr().out and not list(tmp_path.iterdir())
  findings = claims.run([spec], tmp_path, budget=TINY)
  assert findings[0].interval and findings[0].verdict in ("supported", "not supported", "contrary")
  kept = json.loads((tmp_path / "claims.json").read_text())
  assert sorted(c["setting"] for c in kept["cells"].values()) == ["pixels", "untrained", "untrained"]
  assert all(0 <= c["numbers"]["linear"] <= 1 and c["numbers"]["seconds"] > 0 for c in kept["cells"].values())
  assert kept["findings"][0]["verdict"] == findings[0].verdict and "3 runs" in kept["summary"]
  page = (tmp_path / "claims.html").read_text()
  assert page.count("<article") == 1 and "paper: +1.0" in page
  claims.write_page(tmp_path / "again.html", kept)
  assert "paper: +1.0" in (tmp_path / "again.html").read_text() and kept["matrices"] == {}

  monkeypatch.setattr(cells.Runner, "run", lambda *_: pytest.fail("a cell was run twice"))
  assert claims.run([spec], tmp_path, budget=TINY) == findings
  claims.run([spec], tmp_path, budget=TINY, plan_only=True)
  assert "3 cells, 3 of them done" in capsys.readouterr().out


@pytest.mark.slow
def test_cells_that_train_share_their_programs_and_leave_numbers_alone(few, spec, tmp_path, capsys, monkeypatch):
  """Every measure on three seeds, the last of which goes on after a signal; the second and third compile nothing."""
  setting = cells.Setting(measures=("z", "few", "few_z", "contrastive", "geometry", "transforms", "course"))
  monkeypatch.setattr(experiments, "SETTINGS", {"simclr": setting})
  monkeypatch.setattr(experiments, "CLAIMS", FEW[2:])
  budget = dataclasses.replace(TINY, seeds=(0, 1, 2))
  (finding,) = claims.run([spec], tmp_path, budget=budget)
  assert capsys.readouterr().out.count("compiling the step: 0:00") >= 2
  assert finding.interval and not list((tmp_path / "cells").iterdir())
  first, *_ = json.loads((tmp_path / "claims.json").read_text())["cells"].values()
  measured = set().union(*(SCORES[name] for name in setting.measures))
  colorless = {f"{what}_{name}" for what in ("color", "hue") for name in "hz"}
  followed = {key for key in first["numbers"] if "/" in key}
  assert set(first["numbers"]) - followed == measured - colorless | {"linear", "validation", "seconds"}
  assert {key for key in followed if "spectrum" not in key} == {
    f"{key}/{step}" for key in cells.Course.KEYS for step in (1, 2)
  }
  assert sum(first["numbers"][f"spectrum_z/{i}"] for i in range(1, 17)) == pytest.approx(1, abs=1e-5)
  (lines,) = json.loads((tmp_path / "claims.json").read_text())["courses"].values()
  assert list(lines) == ["simclr, h", "simclr, z"] and "Through training" in (tmp_path / "claims.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["supervised_10pct", "oracle", "norm_per_device", "autoencoder", "rotated", "noised", "edged", "moco", "byol"]
)
def test_settings_that_are_no_plain_simclr_train(name, spec, tmp_path):
  images = cells.open_images(spec, most_train=60, most_test=32)
  setting = experiments.SETTINGS[name]
  changes = dict(CHANGES) | ({"norm_devices": 4} if name == "norm_per_device" else {})
  setting = dataclasses.replace(setting, changes=tuple(c for c in setting.changes if c[0] != "norm_devices"))
  config = cells.config_of(setting, 0, 0.5, changes)
  numbers = cells.Runner(tmp_path).run(setting, config, images)
  assert 0 <= numbers["linear"] <= 1 and np.isfinite(list(numbers.values())).all()


@pytest.mark.parametrize("ends_at", [0, 1, 3, 4])
def test_an_error_at_any_cell_loses_that_cell_alone(few, spec, tmp_path, monkeypatch, ends_at):
  ran = []

  def run(self, setting, config, images):
    if len(ran) == ends_at and "again" not in ran:
      raise RuntimeError("the power fails")
    ran.append((setting, config.seed))
    return {"linear": 0.5, "validation": 0.5, "linear_z": 0.25, "seconds": 1.0}

  monkeypatch.setattr(cells.Runner, "run", run)
  with pytest.raises(RuntimeError):
    claims.run([spec], tmp_path, budget=TINY)
  before, kept = list(ran), tmp_path / "claims.json"
  assert (len(json.loads(kept.read_text())["cells"]) if kept.exists() else 0) == ends_at
  ran.append("again")
  findings = claims.run([spec], tmp_path, budget=TINY)
  ran.remove("again")
  assert len(ran) == len(set(ran)) == 5 and ran[:ends_at] == before
  assert [f.verdict for f in findings] == ["not supported", "not supported", "supported"]
  assert findings[2].interval.low == pytest.approx(25)


def test_what_another_command_added_stays(spec, tmp_path):
  images = cells.open_images(spec, most_train=60, most_test=32)
  one, other = (
    claims.Cell("pixels", images, cells.config_of(cells.Setting(), seed, 1.0, {}), str(seed)) for seed in (0, 1)
  )
  results = claims.Results(tmp_path)
  results.add(one, {"linear": 0.5})
  claims.Results(tmp_path).add(other, {"linear": 0.6})
  results.conclude({"summary": "Done."})
  kept = json.loads((tmp_path / "claims.json").read_text())
  assert kept["summary"] == "Done." and set(kept["cells"]) == {"0", "1"}


def test_a_damaged_file_of_results_is_one_line(few, spec, tmp_path):
  (tmp_path / "claims.json").write_text('{"cells": {')
  with pytest.raises(errors.UserError, match="claims.json is damaged"):
    claims.run([spec], tmp_path, budget=TINY)


def test_flags():
  flags = cli.parser().parse_args(["claims", "--data=textures", "--data=npz:a.npz", "--budget=full"])
  assert flags.data == ["textures", "npz:a.npz"] and flags.workdir == "runs/claims" and not flags.plan


def test_color_claims_are_not_made_of_gray_images(spec):
  images = cells.open_images(spec, most_train=60, most_test=32)
  full, quick = (dataclasses.replace(claims.BUDGETS[name], changes=TINY.changes) for name in ("full", "quick"))
  names = {claim.name for claim in claims.claims_of(full, images)}
  assert "h over z" in names and "still longer" in names and not any(c.color for c in claims.claims_of(TINY, images))
  assert "still longer" not in {claim.name for claim in claims.claims_of(quick, images)}


def test_claims_whose_batches_a_set_does_not_fill_are_left_out_by_name(spec):
  """A batch that holds an image twice takes it as a negative of itself."""
  full = dataclasses.replace(claims.BUDGETS["full"], changes=TINY.changes)
  images = dataclasses.replace(cells.open_images(spec, most_train=60, most_test=32), has_color=True)
  large = dataclasses.replace(images, train=range(3000))
  names, of_large = ({claim.name for claim in claims.claims_of(full, part)} for part in (images, large))
  assert names < of_large and of_large - names >= {"LARS at 2,048", "LARS over AdamW at 2,048"}
  said = claims.left_out(full, images)
  assert "has 50 images to train on, fewer than a batch of: " in said and "LARS at 2,048" in said
  assert claims.left_out(full, large) == ""
  used = {
    c.config.batch_size for c in claims.cells_of(full, [images]) if experiments.SETTINGS[c.setting].kind == "train"
  }
  assert max(used) <= 50
  assert claims.claims_of(claims.BUDGETS["quick"], images) == []  # none of its batches is as small


def test_sets_that_cannot_be_judged_are_one_line(tmp_path):
  images = np.zeros((24, 8, 8, 3), np.uint8)
  for name, labels, message in (
    ("one", np.zeros(24, int), "24 training images of 1 classes; claims need two classes"),
    ("each", np.arange(24), "a tenth of the images of a class held out"),
  ):
    np.savez(
      tmp_path / f"{name}.npz", train_images=images, train_labels=labels, test_images=images + 1, test_labels=labels
    )
    with pytest.raises(errors.UserError, match=message):
      cells.open_images(f"npz:{tmp_path / name}.npz", most_train=24, most_test=24)


@pytest.mark.parametrize(
  "name, message",
  [
    ("fashion:train", "--data=fashion:train: name the set without a split, fashion; fashion:train and fashion:test"),
    ("npz:a.npz:test", "name the set without a split, npz:a.npz"),
    ("/nowhere/pictures", "did you mean folder:/nowhere/pictures?"),
    ("folder:/nowhere/pictures", "there is no folder /nowhere/pictures/train"),
  ],
)  # fmt: skip
def test_a_name_that_is_no_set_is_one_line(name, message):
  with pytest.raises(errors.UserError) as caught:
    cells.open_images(name, most_train=60, most_test=32)
  assert message in str(caught.value)


def test_a_folder_is_a_set_if_it_holds_train_and_test(tmp_path):
  for i in range(48):
    place = tmp_path / ("test" if i < 12 else "train") / "ab"[i % 2]
    place.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(place / f"{i}.png")
  images = cells.open_images(f"folder:{tmp_path}", most_train=60, most_test=32)
  assert len(images.train) + len(images.validation) == 36 and len(images.test) == 12


def test_a_cell_of_a_command_that_ended_without_it_is_run_by_the_other(few, spec, tmp_path, monkeypatch):
  """It is skipped at first, because another command has its lock; after the rest it is tried again."""
  monkeypatch.setattr(
    cells.Runner, "run", lambda *_: {"linear": 0.5, "linear_z": 0.4, "validation": 0.5, "seconds": 1.0}
  )
  take, held = claims.lock.take, []

  def busy(place):
    if not held:
      held.append(place)
      raise errors.UserError("in use")
    return take(place)

  monkeypatch.setattr(claims.lock, "take", busy)
  findings = claims.run([spec], tmp_path, budget=TINY)
  assert held and len(findings) == 3 and (tmp_path / "claims.html").exists()


def test_the_histogram_counts_colors():
  x = np.zeros((1, 2, 2, 3), np.float32)
  x[0, 0, 0] = (1.0, 0.3, 0.6)
  (found,) = cells.color_histogram(x)
  assert found[0] == 0.75 and found[3 * 16 + 1 * 4 + 2] == 0.25 and found.sum() == 1


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_effects_and_the_matrix_and_escapes(tmp_path):
  row = dict(data="set <1>", name="a <b>", says="It is so.", source="v1", unit="points", margin=None, values={"simclr.linear": 60.0})  # fmt: skip
  rows = [
    row | dict(verdict="contrary", paper=3.0, interval=(-2.0, -3.0, -1.0)),
    row | dict(verdict="supported", paper=0.0, interval=(0.5, -0.5, 1.5), margin=2.0),
    row | dict(verdict="not measured", paper=None, interval=None),
  ]
  report.write_claims(
    tmp_path / "claims.html", title="t", summary="s", claims=rows, matrices={"set": (["crop", "color"], [[0.3, 0.5], [0.5, None]])},
    standings={"set": [["", "linear"], ["<h>", "60.0 (59.0 to 61.0)"]]},
    courses={"set": {"<z>": [{"step": 1, "rank": 3.0}, {"step": 2, "rank": 2.0}]}},
  )  # fmt: skip
  page = (tmp_path / "claims.html").read_text()
  assert "a <b>" not in page and "a &lt;b&gt;" in page
  assert page.count('<figure class="effect">') == 2 and 'class="margin"' in page and 'class="bad"' in page
  assert "--a:0.70" in page and "--a:0.08" in page  # the best and the worst pair


def test_the_matrix_shows_a_pair_in_both_orders():
  scores = {
    ("set", "compose_crop_color"): {0: {"linear": 0.5}, 1: {"linear": 0.7}},
    ("set", "compose_crop_crop"): {0: {"linear": 0.3}},
    ("set", "compose_crop_sobel"): {0: {"diverged": 1.0}},
    ("other", "compose_crop_rotate"): {0: {"linear": 0.1}},
  }
  names, rows = claims.matrix(scores, "set")
  assert names == ["crop", "color"] and rows == [[0.3, pytest.approx(0.6)], [pytest.approx(0.6), None]]
  assert claims.matrix(scores, "none") is None


def test_courses_are_means_over_the_seeds_of_a_data_set():
  scores = {
    ("set", "simclr"): {
      0: {"linear": 0.5, "rank_h/10": 3.0, "rank_z/10": 2.0, "spectrum_z/1": 0.012},
      1: {"linear": 0.7, "rank_h/10": 5.0, "rank_z/10": 2.0, "spectrum_z/1": 0.008},
    },
    ("set", "alignment"): {0: {"diverged": 1.0}},
    ("other", "simclr"): {0: {"rank_h/10": 9.0}},
  }
  assert claims.courses(scores, "set") == {
    "simclr, h": [{"step": 10, "rank": 4.0}],
    "simclr, z": [{"step": 10, "rank": 2.0}, {"step": 1, report.SPECTRUM: pytest.approx(-2.0)}],
  }
  assert claims.courses(scores, "none") == {}


def test_the_page_of_the_docs_lists_every_claim():
  """python -m simclr_jax.programs.claims_page benchmarks/claims/* > docs/claims.md"""
  root = pathlib.Path(__file__).parents[1]
  page = (root / "docs/claims.md").read_text()
  assert page == claims_page.page(*sorted((root / "benchmarks/claims").iterdir()))
  assert page.startswith(claims_page.page()) and "## Measured" in page and "*MoCo v2, MoCo v3 and BYOL" in page


def test_the_page_of_the_docs_has_the_results():
  rows = [
    dict(data="textures", name="h over z", unit="points", paper=10.0, verdict="contrary", interval=[-2.0, -3.0, -1.0]),
    dict(data="textures", name="hue", unit="", paper=None, verdict="not measured", interval=None),
  ]
  scores = {("textures", "simclr"): {0: {f"{key}{z}": 0.5 for key in claims.STANDINGS for z in ("", "_z")},
                                     1: {f"{key}{z}": 0.6 for key in claims.STANDINGS for z in ("", "_z")}},
            ("textures", "pixels"): {0: {key: 0.25 for key in claims.STANDINGS}}, ("textures", "short"): {0: {"linear": 0.9}}}  # fmt: skip
  standings = {"textures": claims.standings(scores, "textures")}
  text = claims_page.results("full", {"summary": "Two claims.", "findings": rows, "standings": standings})
  assert "| simclr, z | 55.0 (50.0 to 60.0) |" in text and "| pixels | 25.0 |" in text and "short" not in text
  assert "| h over z | +10.0 | -2.0 | -3.0 to -1.0 | **contrary** |" in text
  assert "| hue |  |  |  | not measured |" in text and "## Measured: full, on textures" in text


def test_contrary_stands_out_in_the_table():
  claim = Claim("a", "a", "v1", "simclr.linear - short.linear", paper=2.0)
  found = claims.judge(claim, "set", scores_of(simclr=[0.5, 0.51, 0.52], short=[0.6, 0.61, 0.62]), (0, 1, 2))
  text = claims.table([found])
  assert "CONTRARY" in text and "-10.0 points" in text and "+2.0" in text
  assert (
    claims.summary([found]) == "1 claims: 0 supported, 0 not supported, 1 contrary; 1 of the intervals exclude zero."
  )


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from simclr_jax.programs import cells, claims, experiments
import test_claims
experiments.CLAIMS = test_claims.FEW
experiments.SETTINGS = {{"pixels": cells.Setting(kind="pixels"), "untrained": cells.Setting(kind="untrained"),
                        "simclr": cells.Setting(measures=("z",))}}
claims.run([{spec!r}], {workdir!r}, budget=test_claims.TINY)
"""


@pytest.mark.slow
def test_sigkill_loses_at_most_one_cell(spec, tmp_path):
  """Killed once a cell is kept, and again later: what was kept is not run again, and the rest is."""
  program = KILLED.format(tests=str(pathlib.Path(__file__).parent), spec=spec, workdir=str(tmp_path / "claims"))
  file, outputs = tmp_path / "claims" / "claims.json", []

  def kept():
    return set(json.loads(file.read_text())["cells"]) if file.exists() else set()

  for enough in (1, 4, 5):
    before = kept()
    with open(tmp_path / "out.txt", "w") as out:
      one_device = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1"}
      process = subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=subprocess.STDOUT, env=one_device)
      deadline = time.monotonic() + 240
      while len(kept()) < enough and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
      if enough < 5:
        process.send_signal(signal.SIGKILL)
      process.wait(240)
    outputs.append((tmp_path / "out.txt").read_text())
    assert before <= kept() and len(kept()) >= enough, outputs[-1]
    # The cells that were begun: those that are kept since, and one more at most.
    assert outputs[-1].count(" of 5: ") <= len(kept()) - len(before) + 1, outputs[-1]
  assert "5 runs on" in outputs[-1] and (tmp_path / "claims" / "claims.html").exists()


@pytest.mark.slow
def test_commands_at_once_share_the_cells(spec, tmp_path):
  """Each cell is run by one of two, and the last of them to end writes the page."""
  program = KILLED.format(tests=str(pathlib.Path(__file__).parent), spec=spec, workdir=str(tmp_path / "claims"))
  quick = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1"}
  started = [
    subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quick)
    for _ in range(2)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=400)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0], outputs
  assert sum(text.count(" of 5: ") for text in outputs) == 5, outputs
  assert any("5 runs on" in text for text in outputs) and (tmp_path / "claims" / "claims.html").exists()
