"""LARS steps and schedules against the official code's numbers; the other optimizers against hand-written loops."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from simclr_jax import optimizer

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/official_golden.json").read_text())


def config_for(case):
  return ml_collections.ConfigDict(
    dict(
      batch_size=case["batch"],
      train_epochs=case["epochs"],
      train_steps=0,
      optimizer=dict(base_lr=case["base"], lr_scaling=case["scaling"], warmup_epochs=case["warmup_epochs"]),
    )
  )


@pytest.mark.parametrize("case", GOLDEN["lr"], ids=lambda c: f"B{c['batch']}-{c['scaling']}")
def test_schedule_is_the_official_one(case):
  config = config_for(case)
  assert optimizer.train_steps(config, case["num_examples"]) == case["train_steps"]
  schedule = optimizer.learning_rate(config, case["num_examples"])
  # Near the end the official f32 cosine rounds 1 + cos(pi) to a multiple of 6e-8, hence the absolute part.
  got = [float(schedule(step)) for step in case["steps"]]
  np.testing.assert_allclose(got, case["lr"], rtol=2e-6, atol=4e-7)


def test_first_step_has_rate_zero_and_last_step_too():
  case = GOLDEN["lr"][0]
  schedule = optimizer.learning_rate(config_for(case), case["num_examples"])
  assert float(schedule(0)) == 0.0
  assert float(schedule(case["train_steps"])) == 0.0


def golden_lars(name_of):
  params = {
    name_of["conv"]: {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])},
    name_of["bn"]: {"scale": jnp.array([1.0, 2.0])},
    name_of["zero"]: {"kernel": jnp.array([0.0, 0.0])},
  }
  grads = {
    name_of["conv"]: {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]])},
    name_of["bn"]: {"scale": jnp.array([0.1, -0.2])},
    name_of["zero"]: {"kernel": jnp.array([0.3, 0.1])},
  }
  return params, grads


def test_lars_steps_are_the_official_ones():
  """An adapted kernel, a BatchNorm scale and a kernel of zeros (trust ratio 1), three steps, rounding level."""
  names = {"conv": "conv1", "bn": "norm1", "zero": "conv2"}
  params, grads = golden_lars(names)
  tx = optimizer.lars(0.5, momentum=0.9, weight_decay=1e-4, trust_coefficient=1e-3)
  state = tx.init(params)
  for i, want in enumerate(GOLDEN["lars"]["steps"]):
    g = {**grads, "conv1": {"kernel": grads["conv1"]["kernel"] * (i + 1)}}
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["conv1"]["kernel"], want["conv_kernel"], rtol=3e-7)
    np.testing.assert_allclose(params["norm1"]["scale"], want["bn_gamma"], rtol=3e-7)
    np.testing.assert_allclose(params["conv2"]["kernel"], want["zero_kernel"], rtol=3e-7)


def test_exclusions_by_path():
  """BatchNorm, biases and the classifier move by lr * g alone, whatever their size; kernels are adapted."""
  params = {
    "encoder": {"stem_norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "stem_conv": {"kernel": jnp.full(3, 7.0)}},
    "classifier": {"kernel": jnp.full(3, 7.0), "bias": jnp.ones(3)},
    "projector": {"layer0": {"kernel": jnp.full(3, 7.0)}},
  }
  grads = jax.tree.map(jnp.ones_like, params)
  tx = optimizer.lars(1.0, weight_decay=0.5)
  updates, _ = tx.update(grads, tx.init(params), params)
  for excluded in (updates["encoder"]["stem_norm"]["scale"], updates["encoder"]["stem_norm"]["bias"]):
    np.testing.assert_array_equal(excluded, -1.0)
  np.testing.assert_array_equal(updates["classifier"]["kernel"], -1.0)
  np.testing.assert_array_equal(updates["classifier"]["bias"], -1.0)
  adapted = -1e-3 * np.linalg.norm([7.0] * 3) / np.linalg.norm([4.5] * 3) * 4.5
  np.testing.assert_allclose(updates["encoder"]["stem_conv"]["kernel"], adapted, rtol=1e-6)
  np.testing.assert_allclose(updates["projector"]["layer0"]["kernel"], adapted, rtol=1e-6)


@pytest.mark.parametrize("excluded", [optimizer.exclude_from_l2, optimizer.exclude_from_lars])
def test_what_is_excluded_in_an_encoder_of_ones_own(excluded):
  """The parameters of its normalizations, not all of the modules that contain them."""
  conv, norm = {"kernel": 0}, {"scale": 0, "bias": 0}
  params = {
    "ConvNormRelu_0": {"Conv_0": conv, "BatchNorm_0": norm},
    "PreNorm_0": {"Dense_0": conv},
    "bn1": norm,
    "classifier": conv,
  }
  found = jax.tree_util.tree_map_with_path(lambda path, _: excluded(path), {"encoder": params})["encoder"]
  conv, norm = {"kernel": False}, {"scale": True, "bias": True}
  assert found == {
    "ConvNormRelu_0": {"Conv_0": conv, "BatchNorm_0": norm}, "PreNorm_0": {"Dense_0": conv}, "bn1": norm, "classifier": conv
  }  # fmt: skip


def test_sgd_nesterov_keeps_the_rate_inside_the_velocity():
  """Under a moving rate, lr inside and outside the velocity differ; Keras has it inside."""
  rates = [0.1, 0.5, 0.02]
  tx = optimizer.sgd_nesterov(lambda step: jnp.asarray(rates)[step], momentum=0.9, weight_decay=0.01)
  params = {"conv": {"kernel": jnp.array([1.0, -2.0])}, "norm": {"scale": jnp.array([3.0])}}
  state = tx.init(params)
  w, s, v, u = np.array([1.0, -2.0]), np.array([3.0]), np.zeros(2), np.zeros(1)
  for lr in rates:
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
    g = 1.0 + 0.01 * w
    v = 0.9 * v + lr * g
    w = w - (lr * g + 0.9 * v)
    u = 0.9 * u + lr  # BatchNorm is not decayed
    s = s - (lr + 0.9 * u)
  np.testing.assert_allclose(params["conv"]["kernel"], w, rtol=1e-6)
  np.testing.assert_allclose(params["norm"]["scale"], s, rtol=1e-6)


def test_adamw_decays_kernels_only():
  params = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
  tx = optimizer.adamw(1.0, weight_decay=0.25)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["conv"]["kernel"], -0.25)
  np.testing.assert_array_equal(updates["conv"]["bias"], 0.0)
  np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(lr_scaling="cubic"), "lr_scaling='cubic': expected one of linear, sqrt, none"),
    (dict(warmup_epochs=200), "shorten the warm-up"),
  ],
)
def test_impossible_values_are_one_line_errors(change, message):
  config = config_for(GOLDEN["lr"][0])
  config.optimizer.update(change)
  with pytest.raises(ValueError, match=message) as error:
    optimizer.learning_rate(config, 1281167)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(optimizer.OPTIMIZERS))
def test_a_part_that_begins_late_begins_as_if_it_were_new(name):
  """Its first steps are those of a new optimizer at the learning rates of that time, to the bit, and the rest waits for nothing."""
  rng = np.random.default_rng(0)
  params = {part: {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for part in ("encoder", "projector")}
  grads = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(12)]

  def rule(begin):
    return optimizer.OPTIMIZERS[name](lambda count: 0.1 / (1.0 + count + begin), momentum=0.9, weight_decay=0.01)

  def run(tx, grads, params):
    state, steps = tx.init(params), []
    for g in grads:
      updates, state = tx.update({part: g[part] for part in params}, state, params)
      steps.append(updates)
    return steps

  late = run(optimizer.staged(rule(0), {"encoder": lambda updates: updates >= 8}), grads, params)
  for step in late[:8]:
    np.testing.assert_array_equal(step["encoder"]["kernel"], 0)
  new = run(rule(8), grads[8:], {"encoder": params["encoder"]})
  at_once = run(rule(0), grads, {"projector": params["projector"]})
  for part, steps, others in (("encoder", late[8:], new), ("projector", late, at_once)):
    for step, other in zip(steps, others, strict=True):
      np.testing.assert_array_equal(step[part]["kernel"], other[part]["kernel"])


@pytest.mark.parametrize("name", list(optimizer.OPTIMIZERS))
def test_a_part_that_pauses_goes_on_as_if_there_had_been_no_pause(name):
  """Whatever the gradients of the pause are, also where one such transformation contains another."""
  rng = np.random.default_rng(0)
  params = {"encoder": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}
  grads = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(9)]
  rule = optimizer.OPTIMIZERS[name](0.1, momentum=0.9, weight_decay=0.01)

  def run(tx, grads):
    state, steps = tx.init(params), []
    for g in grads:
      updates, state = tx.update(g, state, params)
      steps.append(np.asarray(updates["encoder"]["kernel"]))
    return steps

  def pause(tx, begin, end):
    return optimizer.staged(tx, {"encoder": lambda updates: (updates < begin) | (updates >= end)})

  for tx in (pause(rule, 4, 7), pause(pause(rule, 5, 7), 4, 6)):
    steps = run(tx, grads)
    np.testing.assert_array_equal(steps[4:7], 0)
    np.testing.assert_array_equal(steps[:4] + steps[7:], run(rule, grads[:4] + grads[7:]))
