"""The controls of the experiments: what SimCLR is compared with, and an oracle of its false negatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from simclr_jax import contrast, methods, model
from simclr_jax.programs import pretrain
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.views import Batch


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


@pytest.mark.parametrize("method", ["supervised", "oracle"])
def test_controls_are_losses_of_a_batch(method):
  """Perfect outputs have the lowest loss there is: of right labels, of a class apart from the others."""
  control = methods.create(tiny.config(method=method), None, tiny.source())
  label = jnp.asarray([3, 3, 5])
  z = jnp.broadcast_to(20 * jax.nn.one_hot(label, 10)[:, None], (3, 2, 10))
  batch = Batch(pixels=None, label=label, index=None, seed=None)
  loss, _, updates = control.loss(model.Predicted(z, z, None, z), control.init({}, None), None, batch)
  assert updates == {} and float(loss) < (0.02 if method == "oracle" else 1e-4)


def test_an_oracle_adds_up_as_the_loss_that_it_is_compared_with():
  """With nothing removed it is NT-Xent in either reduction, so that learning rates mean the same."""
  z, label = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 4)), jnp.float32), jnp.arange(6) % 2
  batch = Batch(pixels=None, label=label, index=None, seed=None)
  for reduction in (None, "mean", "official_sum"):
    config = tiny.config(method="oracle", removed_negatives=0.0, **{"loss.reduction": reduction})
    control = methods.create(config, None, tiny.source())
    loss, _, _ = control.loss(model.Predicted(z, z, None, z), control.init({}, None), None, batch)
    expected, _ = contrast.nt_xent(z, config.loss.temperature, reduction=reduction or "mean")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("method", ["supervised", "oracle"])
def test_controls_need_labels(method):
  with pytest.raises(ValueError, match=f"method='{method}': needs labeled training images"):
    methods.create(tiny.config(method=method), None, tiny.source(labeled=False))


@pytest.mark.parametrize(
  "method, changes, words",
  [
    ("memory", {"loss.tile": 128}, "config.loss.tile: no such option; nt_xent takes temperature"),
    ("memory", {"loss.margin": 0.4}, "config.loss.margin: no such option"),
    ("memory", {"loss.temperature": None}, "config.loss.temperature is missing"),
    ("oracle", {"loss.temperature": None}, "config.loss.temperature is missing"),
    ("oracle", {"loss.margin": 0.4}, "config.loss.margin=0.4: config.method='oracle' has its own loss"),
    ("moco", {"loss.semi_hard": True}, "config.loss.semi_hard=True: config.method='moco' has its own loss"),
  ],
)
def test_options_of_a_loss_that_a_method_does_not_take_are_one_line(method, changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    methods.create(tiny.config(method=method, **changes), None, tiny.source())


@pytest.mark.parametrize("method", ["byol", "moco_v3"])
def test_a_predictor_needs_no_projection_head(method):
  config = tiny.config(method=method, **{"projector.kind": "none"})
  task = pretrain.make_task(config, tiny.source(), mesh=mesh_lib.make_mesh(jax.devices()[:1]))
  state, metrics = jax.eval_shape(task.step, jax.eval_shape(task.init, jax.random.key(0)), next(iter(task.stream(0))))
  assert metrics["loss"].shape == () and state.params["predictor"]["dense1"]["kernel"].shape[1] == 32
