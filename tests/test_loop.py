"""The loop on a state of two arrays, whose update takes microseconds: what a resumed run must do as one never stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.model import TrainState
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib

ROWS = 8


def init(key):
  return TrainState(jnp.zeros((), jnp.int32), {"w": jax.random.normal(key, (4,))}, {}, {})


def step(state, batch):
  params = {"w": 0.9 * state.params["w"] + batch["x"].mean(0)}
  loss = 2.0 + 0.1 * jnp.sin(state.step) + jnp.max(batch["leap"])
  return state.replace(step=state.step + 1, params=params), {"loss": loss}


def task(steps, leaps=(), stop_at=None, stop=KeyboardInterrupt):
  """Batches numbered from 0; those of `leaps` make the loss leap, and number `stop_at` is not reached."""

  def stream(first):
    for number in range(first, 2 * steps):
      if number == stop_at:
        raise stop
      x = np.random.default_rng(number).standard_normal((ROWS, 4), np.float32)
      yield {"x": x, "leap": np.full(ROWS, float(number in leaps), np.float32)}

  return loop.Task(
    init=init, step=step, stream=stream, evaluators={}, total_steps=steps, batch_size=ROWS, num_examples=100 * ROWS,
    exports=lambda state: {},
  )  # fmt: skip


def run(workdir, task, **options):
  config = loop.LoopConfig(**{"log_every": 5, "checkpoint_every": 65, **options})
  state, _ = loop.run(task, config, mesh=mesh_lib.make_mesh(), workdir=workdir, config_json="{}", seed=0)
  return np.asarray(state.params["w"])


def losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows}


def test_a_resumed_run_knows_the_losses_that_a_leap_is_measured_against(tmp_path):
  """Also one that has gone back before it was killed."""
  wary = {"rollback": loop.Rollback(times=3, spike=6.0), "keep": 9}
  leaps = {133, 142}  # in the updates 134 and, past the batches 130 to 134, 138
  straight = run(tmp_path / "straight", task(150, leaps), **wary)
  skipped = (tmp_path / "straight/skipped.json").read_text()
  assert json.loads(skipped) == [[130, 5], [130, 10]]
  for stop_at in (131, 137, 148):  # before the first leap, between the two, and after both
    where = tmp_path / f"{stop_at}"
    with pytest.raises(KeyboardInterrupt):
      run(where, task(150, leaps, stop_at), **wary)
    np.testing.assert_array_equal(run(where, task(150, leaps), **wary), straight)
    assert (where / "skipped.json").read_text() == skipped
    assert losses(where) == losses(tmp_path / "straight")
