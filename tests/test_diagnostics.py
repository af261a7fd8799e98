"""The verdict calls a collapsed run collapsed and a healthy one not: on made-up embeddings and on real short runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import diagnostics
from simclr_jax.contrast import nt_xent
from simclr_jax.programs import pretrain, scores
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime import metrics as metrics_lib

rng = np.random.default_rng(0)
H, Z = rng.normal(size=(400, 64)), rng.normal(size=(400, 32))
ONE = rng.normal(size=(1, 64))


def test_alignment_and_uniformity_are_those_of_the_loss():
  pairs = np.random.default_rng(0).normal(size=(40, 2, 8)) + 0.5
  _, metrics = nt_xent(jnp.asarray(pairs, jnp.float32), 0.5)
  assert diagnostics.alignment(pairs) == pytest.approx(float(metrics["alignment"]), rel=1e-4)
  assert diagnostics.uniformity(pairs[:, 0]) == pytest.approx(float(metrics["uniformity"]), rel=1e-4)
  assert diagnostics.uniformity(np.ones((5, 8))) == pytest.approx(0, abs=1e-4)


def test_the_spectrum_is_that_of_the_covariance():
  h = np.random.default_rng(0).normal(size=(300, 6)) @ np.diag([3, 1, 0.5, 0.1, 0.01, 0]) + 7
  expected = np.linalg.eigvalsh(np.cov(h.T))[::-1]
  np.testing.assert_allclose(diagnostics.spectrum(jnp.asarray(h, jnp.float32)), expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize(
  "h, z, collapsed, word",
  [
    (H, Z, False, "healthy"),
    (np.abs(H), Z + 0.5, False, "healthy"),  # outputs of a ReLU, and a common part
    (H, np.ones((400, 32)) + 0.01 * Z, True, "COLLAPSED"),  # all z the same
    (rng.normal(size=(400, 1)) * ONE, Z, True, "COLLAPSED"),  # h on a line
    (H, np.sign(Z[:, :1]) * np.ones((1, 32)) + 0.1 * Z, False, "healthy"),  # two clusters are no collapse
    (H, np.ones((400, 32)) + 0.3 * Z, False, "narrow"),
    (H[:, :3] @ rng.normal(size=(3, 64)), Z, False, "narrow"),  # three directions
    (H * (np.arange(64) < 20), Z, False, "narrow"),  # most dimensions are dead
  ],
)
def test_verdict_of_made_up_embeddings(h, z, collapsed, word):
  said, line = diagnostics.verdict(diagnostics.summary(h, z))
  assert said == collapsed and line.startswith(word) and "\n" not in line


@pytest.mark.parametrize("n, d, healthy, collapsed", [
  (2, 64, False, False), (7, 64, False, False), (8, 64, False, True), (19, 64, False, True), (20, 64, True, True),
  (160, 2048, False, True),
])  # fmt: skip
def test_a_few_images_are_not_judged(n, d, healthy, collapsed):
  """Their effective rank is at most their number, however healthy the network is."""
  h, z = (np.random.default_rng(1).normal(size=(n, size)) for size in (d, 32))
  for x, judged, word in ((z, healthy, "healthy"), (np.ones((n, 32)) + 0.01 * z, collapsed, "COLLAPSED")):
    said, line = diagnostics.verdict(diagnostics.summary(h, x))
    assert line.startswith(word if judged else f"too few images ({n}) to judge")
    assert said == (judged and word == "COLLAPSED")


@pytest.mark.parametrize("z, word", [(Z, "healthy"), (np.ones((400, 32)) + 0.3 * Z, "narrow")])
def test_where_nothing_is_scored_the_verdict_speaks_of_no_scores(z, word):
  _, line = diagnostics.verdict(diagnostics.summary(H, z), scored=False)
  assert line.startswith(word) and "score" not in line and "kNN" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, collapsed",
  [
    ({}, False),
    ({"optimizer.name": "sgd", "optimizer.base_lr": 1e3}, True),
    ({"optimizer.name": "lars", "optimizer.base_lr": 1e3}, None),
    ({"method": "alignment", "projector.kind": "none", "optimizer.base_lr": 0.05}, True),
  ],
  ids=["healthy", "sgd", "lars", "alignment"],
)
def test_verdict_of_a_run(changes, collapsed, tmp_path, capsys):
  """Sixty steps on one device: as it should be, with a learning rate of a thousand, and without negatives.

  The steps of LARS at a thousand are as long as the weights, so it collapses and may recover to "narrow" by the end.
  """
  config = tiny.config(**{"train_steps": 60, "batch_size": 32, "log.every_steps": 20, **changes})
  mesh, source = mesh_lib.make_mesh(jax.devices()[:1]), tiny.source(256)
  evaluation = scores.PretrainEvaluation(config, source, source, mesh)
  task = pretrain.make_task(config, source, mesh=mesh, evaluators={"h": loop.Evaluator(evaluation.quick, 30)})
  loop.run(
    task,
    loop.LoopConfig(log_every=20),
    mesh=mesh,
    workdir=tmp_path,
    config_json="{}",
    seed=0,
  )
  rows = [row for row in metrics_lib.read(tmp_path) if "verdict" in row]
  assert [row["step"] for row in rows] == [30, 60]
  if collapsed is None:
    assert any(row["verdict"].startswith("COLLAPSED") for row in rows)
    assert not any(row["verdict"].startswith("healthy") for row in rows)
    collapsed = rows[-1]["verdict"].startswith("COLLAPSED")
  assert bool(rows[-1]["collapsed"]) == collapsed == rows[-1]["verdict"].startswith("COLLAPSED"), rows[-1]["verdict"]
  assert rows[-1]["verdict"] in capsys.readouterr().out
