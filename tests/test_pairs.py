"""Settings of the step in pairs: the arrangement of the encoder, what BatchNorm ranges over in microbatches, remat, dtype
and ZeRO-1.  Every two values of two settings meet in a traced step; those that promise the same numbers are compared.
"""

import itertools

import jax
import numpy as np
import pytest
import tiny

from simclr_jax.programs import pretrain
from simclr_jax.runtime import loop
from simclr_jax.runtime import mesh as mesh_lib

SETTINGS = {
  "encoder.arrangement": ("plain", "packed"),
  "microbatch_norm": (None, "microbatch", "exact"),  # None: the batch is not split
  "encoder.remat": ("none", "block", "group"),
  "encoder.dtype": ("float32", "bfloat16"),
  "zero1": (False, True),
}


def covering():
  """Combinations in which every two values of two settings meet, greedily few."""
  combinations = list(itertools.product(*SETTINGS.values()))
  pairs = lambda values: set(itertools.combinations(enumerate(values), 2))  # noqa: E731
  missing, chosen = set().union(*map(pairs, combinations)), []
  while missing:
    best = max(combinations, key=lambda values: len(pairs(values) & missing))
    chosen.append(best)
    missing -= pairs(best)
  return chosen


def step_of(values, devices=1, **more):
  """(task, mesh, jitted step, its abstract arguments)."""
  changes = {key: value for key, value in zip(SETTINGS, values, strict=True) if value is not None}
  changes |= {"microbatches": 2} if "microbatch_norm" in changes else {}
  depth = 50 if values[0] == "packed" else 18  # the packed arrangement is another one in bottleneck blocks
  config = tiny.config(**{"encoder.depth": depth, **changes, **more})
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  task = pretrain.make_task(config, tiny.source(), mesh=mesh)
  batch = pretrain.view_pipeline(config).spec(config.batch_size)
  return task, mesh, *loop.abstract_step(task, mesh, batch)


def test_few_combinations_cover_all_pairs():
  assert len(covering()) <= 12


@pytest.mark.parametrize("values", covering(), ids=lambda values: "-".join(map(str, values)))
def test_every_pair_is_traced(values):
  _, _, step, arguments = step_of(values, devices=2)
  state, metrics = jax.eval_shape(step, *arguments)
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype  # noqa: E731
  assert jax.tree.all(jax.tree.map(same, state, arguments[0])) and metrics["loss"].shape == ()


@pytest.mark.slow
def test_what_promises_the_same_numbers_gives_them():
  """The packed arrangement in two microbatches with exact BatchNorm and remat, against the plain step; of three views, whose
  images stay on the devices."""
  views, found = {"augment.views": 3, "augment.where": "resident"}, []
  for values in (("plain", None, "none", "float32", False), ("packed", "exact", "block", "float32", True)):
    task, mesh, step, _ = step_of(
      values, **{"encoder.depth": 18, "encoder.stem": "imagenet", "augment.size": 32, **views}
    )
    state = jax.jit(task.init)(jax.random.key(0))
    batch = mesh_lib.global_batch(mesh, next(iter(task.stream(0))))
    found.append(jax.device_get(step(state, batch)))
  (plain, expected), (packed, metrics) = found
  for key in ("loss", "grad_norm", "contrastive_accuracy"):
    np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-3)
  for a, b in zip(jax.tree.leaves(plain.batch_stats), jax.tree.leaves(packed.batch_stats), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)
