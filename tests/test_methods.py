"""A new method is one short file and one line in a table: it trains, resumes, evaluates and exports."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import simclr_jax
from simclr_jax import methods
from simclr_jax.programs import export, knn, pretrain, scores
from simclr_jax.runtime import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures("one_device")


@dataclasses.dataclass(frozen=True)
class OneNegative:
  """InfoNCE with one negative, the next image of the batch, seen by a moving average of the network."""

  decay: float = 0.9
  chance_loss: float = float(np.log(2.0))

  def init(self, variables, outputs):
    return {"target": variables, "norm": jnp.zeros(())}

  def loss(self, outputs, extra, network, batch):
    other, batch_stats = network(extra["target"])
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)  # noqa: E731
    anchor, target = unit(outputs.z[:, 0]), unit(jax.lax.stop_gradient(other.z[:, 1]))
    positive = jnp.sum(anchor * target, -1) / 0.5
    negative = jnp.sum(anchor * jnp.roll(target, 1, 0), -1) / 0.5
    loss = jnp.mean(jax.nn.softplus(negative - positive))
    return loss, {"contrastive_accuracy": jnp.mean(positive > negative)}, {"batch_stats": batch_stats}

  def after(self, variables, extra, updates):
    target = jax.tree.map(
      lambda a, w: self.decay * a + (1 - self.decay) * w, extra["target"]["params"], variables["params"]
    )
    norm = sum(jnp.sum(x**2) for x in jax.tree.leaves(target))
    return {"target": {"params": target, "batch_stats": updates["batch_stats"]}, "norm": norm}


@pytest.fixture
def one_negative(monkeypatch):
  monkeypatch.setitem(methods.METHODS, "one_negative", lambda config, mesh, source: OneNegative())


@pytest.mark.slow
def test_a_new_method_trains_resumes_evaluates_and_exports(one_negative, tmp_path, capsys):
  spec = tiny.npz(tmp_path / "set.npz")
  changes = {"method": "one_negative", "data.train": spec, "data.test": f"{spec}:test", "checkpoint.every_steps": 2}
  config = tiny.config(**changes)
  straight = pretrain.run(config, tmp_path / "straight")
  assert "loss at chance 0.693" in capsys.readouterr().out
  # Stopped after two steps: as a run that was killed there.
  for name in ("checkpoints/2", "config.json", "metrics.jsonl"):
    source, target = tmp_path / "straight" / name, tmp_path / "killed" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
  resumed = pretrain.run(config, tmp_path / "killed", resume=True)
  assert "resuming from step 2 of 4" in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r["state"]) for r in (straight, resumed)))
  assert float(resumed["state"].extra["norm"]) > 0
  assert 0 <= knn.run(tmp_path / "killed") <= 1
  (folder,) = export.run(tmp_path / "killed", tmp_path / "out")
  encode, _, card = simclr_jax.load_encoder(folder)
  assert encode(np.zeros((2, 16, 16, 3), np.float32)).shape == (2, card["feature_dimension"])


@pytest.mark.slow
def test_microbatches_and_whole_batches_agree_on_the_extra_state(one_negative):
  """With BatchNorm exact, encoding in two parts changes neither the loss nor what the method remembers."""
  mesh, found = mesh_lib.make_mesh(jax.devices()[:1]), []
  for changes in ({}, {"microbatches": 2, "microbatch_norm": "exact"}):
    config = tiny.config(method="one_negative", **changes)
    task = pretrain.make_task(config, tiny.source(), mesh=mesh)
    batch = mesh_lib.global_batch(mesh, next(iter(task.stream(0))))
    found.append(jax.jit(task.step)(jax.jit(task.init)(jax.random.key(0)), batch))
  (whole, metrics), (parts, in_parts) = found
  np.testing.assert_allclose(in_parts["loss"], metrics["loss"], rtol=1e-4)
  np.testing.assert_allclose(in_parts["grad_norm"], metrics["grad_norm"], rtol=1e-3)
  for a, b in zip(jax.tree.leaves(whole.extra), jax.tree.leaves(parts.extra), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_unknown_method_is_one_line():
  with pytest.raises(ValueError, match="config.method='nonesuch': expected one of simclr, memory"):
    methods.create(tiny.config(method="nonesuch"), None)


@pytest.mark.slow
def test_alignment_alone_collapses_and_the_verdict_says_so():
  """Without negatives, predictor or a target network; with negatives the same run does not."""
  mesh, source, said = mesh_lib.make_mesh(jax.devices()[:1]), tiny.source(256), {}
  for method in ("alignment", "simclr"):
    changes = {"projector.kind": "none", "optimizer.base_lr": 8e-3, "optimizer.warmup_epochs": 1.0}
    config = tiny.config(method=method, train_steps=60, batch_size=32, **changes)
    task = pretrain.make_task(config, source, mesh=mesh)
    state, step = jax.jit(task.init)(jax.random.key(0)), jax.jit(task.step)
    for batch in itertools.islice(task.stream(0), config.train_steps):
      state, _ = step(state, mesh_lib.global_batch(mesh, batch))
    said[method] = scores.PretrainEvaluation(config, source, source, mesh).quick(state)["verdict"]
  assert said["alignment"].startswith("COLLAPSED") and not said["simclr"].startswith("COLLAPSED"), said
