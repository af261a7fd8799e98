"""A new method is one short file and one line in a table: it trains, resumes, evaluates and exports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import simclr_jax
from simclr_jax import contrast, methods, model
from simclr_jax.methods import autoencoder
from simclr_jax.programs import export, knn, pretrain
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch


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


@pytest.mark.parametrize("stem, size", [("cifar", 20), ("cifar", 16), ("imagenet", 45)])
def test_the_decoder_makes_images_of_every_size(stem, size):
  decoder = autoencoder.Decoder(18, 0.0625, stem)
  z, x = jnp.zeros((2, 8)), jnp.zeros((2, size, size, 3))
  variables = jax.eval_shape(decoder.init, jax.random.key(0), z, x)
  assert set(variables["params"]) >= {"unpool", "group1", "group2", "group3", "group4", "pixels"}
  made = functools.partial(decoder.apply, size=(size, size), train=False, method="reconstruct")
  assert jax.eval_shape(made, variables, z).shape == x.shape
  assert jax.eval_shape(decoder.apply, variables, z, x).shape == (2,)


def test_upsampling_repeats_pixels():
  x = np.arange(6.0).reshape(1, 2, 3, 1)
  expected = np.array([[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]])
  np.testing.assert_array_equal(autoencoder.upsample(jnp.asarray(x), (3, 5))[0, :, :, 0], expected)


def test_without_false_negatives_is_nt_xent_of_what_is_left():
  """A float64 loop over the anchors; with none removed it is NT-Xent, and an image without a label keeps all."""
  rng = np.random.default_rng(0)
  z, labels = rng.normal(size=(6, 2, 4)), np.array([0, 1, 0, 1, 0, -1])
  unit, losses = z / np.linalg.norm(z, axis=-1, keepdims=True), []
  for i in range(6):
    others = [j for j in range(6) if j != i and not (labels[j] == labels[i] >= 0)]
    for v in (0, 1):
      logit = lambda j, w, a=unit[i, v]: a @ unit[j, w] / 0.3  # noqa: E731
      total = sum(np.exp(logit(j, w)) for j in others for w in (0, 1))
      losses.append(np.log(np.exp(logit(i, 1 - v)) + total) - logit(i, 1 - v))
  of = functools.partial(contrast.without_false_negatives, jnp.asarray(z, jnp.float32), 0.3, labels=jnp.asarray(labels))
  assert float(of()[0]) == pytest.approx(np.mean(losses), rel=1e-5)
  all_of_them = contrast.nt_xent(jnp.asarray(z, jnp.float32), 0.3)[0]
  assert float(of(removed=0.0)[0]) == pytest.approx(float(all_of_them), rel=1e-6)
  assert float(of()[0]) < float(of(removed=0.5)[0]) < float(all_of_them)


@pytest.mark.parametrize("method", ["supervised", "positives_only", "oracle"])
def test_controls_are_losses_of_a_batch(method):
  """Perfect outputs have the lowest loss there is: of right labels, of equal views, of a class apart from the others."""
  control = methods.create(tiny.config(method=method), None, tiny.source())
  label = jnp.asarray([3, 3, 5])
  z = jnp.broadcast_to(20 * jax.nn.one_hot(label, 10)[:, None], (3, 2, 10))
  batch = Batch(pixels=None, label=label, index=None, seed=None)
  loss, _, updates = control.loss(model.Predicted(z, z, None, z), control.init({}, None), None, batch)
  assert updates == {} and float(loss) < (0.02 if method == "oracle" else 1e-4)


def test_a_supervised_control_needs_labels():
  with pytest.raises(ValueError, match="needs labeled training images"):
    methods.create(tiny.config(method="supervised"), None, tiny.source(labeled=False))
