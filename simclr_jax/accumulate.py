"""One large batch from microbatches, exactly: the contrastive loss still sees every negative of the global batch.

A network is a function (variables, batch, train) -> (outputs, batch_stats).  `in_parts` makes one that encodes the batch
a microbatch at a time and keeps only the outputs; differentiated, it encodes each microbatch again and backpropagates its
part of the gradient (GradCache, arXiv 2101.06983).  Memory: the activations of one microbatch.

Which images BatchNorm spans is a choice:
  "microbatch"  each microbatch normalizes by its own statistics.  Exact for that function, at one extra forward pass;
                it is not the function of the unsplit step.  Keep microbatches at a few hundred images or more.
  "exact"       statistics of the whole batch, in forward and backward, equal to the unsplit step.  The statistics of a
                layer depend on those of the layers before it, so they are found by repeated passes, one for every
                BatchNorm in the longest chain (20 for ResNet-18 with its head, 51 for ResNet-50), and their gradients
                likewise: that many forward passes and as many forward-backward passes.  For checking, and for small
                networks.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

BATCH_NORM = ("microbatch", "exact")
MOMENTS = "batch_moments"  # the collection in which a BatchNorm leaves `mean` and `square` of what it was given


def split(x, parts: int, devices: int):
  """[n, ...] -> [parts, n / parts, ...]; each part has equally many rows of every device, so no data moves."""
  rows = x.shape[0] // (parts * devices)
  x = jnp.moveaxis(x.reshape(devices, parts, rows, *x.shape[1:]), 0, 1)
  return x.reshape(parts, devices * rows, *x.shape[3:])


def join(x, devices: int):
  """The inverse of `split`: [parts, n / parts, ...] -> [n, ...]."""
  parts, rows = x.shape[0], x.shape[1] // devices
  x = jnp.moveaxis(x.reshape(parts, devices, rows, *x.shape[2:]), 1, 0)
  return x.reshape(devices * parts * rows, *x.shape[3:])


def in_parts(network, *, parts: int, devices: int, batch_norm: str, moments=None):
  """A network that encodes `parts` microbatches one after the other and keeps only their outputs.

  Args:
    network: ({"params", "batch_stats"}, batch, train) -> (outputs, updated batch_stats); outputs is a tree of [n, ...]
      arrays.  train=False normalizes by the given batch_stats.
    devices: over which the batch is split.
    batch_norm: "microbatch" or "exact".
    moments: for "exact", (variables, batch) -> tree like batch_stats with `mean` and `square` in place of `mean` and
      `var`: the moments of each BatchNorm's input in inference mode, from the collection MOMENTS.

  Returns:
    The same function; batch is a tree of [n, ...] arrays, n a multiple of parts * devices.

  Raises:
    ValueError: unknown batch_norm.
  """
  if batch_norm not in BATCH_NORM:
    raise ValueError(f"batch_norm={batch_norm!r}: expected one of {', '.join(BATCH_NORM)}")

  def apply(variables, batch, train=True):
    batch = jax.tree.map(lambda x: split(x, parts, devices), batch)
    before = variables["batch_stats"]
    exact = train and batch_norm == "exact" and bool(jax.tree.leaves(before))  # else there is no BatchNorm
    if exact:
      variables = {**variables, "batch_stats": _whole_batch_statistics(moments, variables, batch)}

    @jax.checkpoint  # the backward pass encodes the part again
    def encode(variables, part):
      return network(variables, part, train and not exact)

    _, (outputs, updated) = jax.lax.scan(lambda _, part: (None, encode(variables, part)), None, batch)
    outputs = jax.tree.map(lambda x: join(x, devices), outputs)
    if not train:
      return outputs, before
    kept = momenta(network, variables, jax.tree.map(lambda x: x[0], batch))
    if not exact:
      return outputs, merge(updated, kept)
    new = jax.lax.stop_gradient(variables["batch_stats"])
    return outputs, jax.tree.map(lambda m, old, new: m * old + (1 - m) * new, kept, before, new)

  return apply


def momenta(network, variables, batch):
  """The momentum of each moving statistic, the share of it that an update keeps: the derivative of the new by the old.

  Encoders differ in it (TensorFlow and this package have 0.9, Flax 0.99) and need not say which they have.  Under `jit`
  nothing of the network is computed for it.

  Returns:
    a tree like batch_stats.
  """
  variables, batch = jax.lax.stop_gradient((variables, batch))
  old = variables["batch_stats"]
  if not jax.tree.leaves(old):
    return old

  def update(statistics):
    return network({**variables, "batch_stats": statistics}, batch, True)[1]

  return jax.jvp(update, (old,), (jax.tree.map(jnp.ones_like, old),))[1]


def merge(updated, momentum):
  """Moving statistics [k, ...] after one update by each of k microbatches -> after one update by the whole batch.

  The mean of the means is exact.  The variance is the mean of the variances plus the variance of the means; moving averages
  that took one step of 1 - momentum contain the latter scaled by the square of that step, which is corrected here.

  Args:
    momentum: a tree as `momenta` returns; at 1 a statistic does not move.
  """
  flat, kept = (flax.traverse_util.flatten_dict(tree) for tree in (updated, momentum))
  out = {}
  for path, values in flat.items():
    out[path] = jnp.mean(values, 0)
    if path[-1] == "var":
      step = 1 - kept[path]
      spread = jnp.var(flat[(*path[:-1], "mean")], axis=0)
      out[path] += jnp.where(step > 0, spread / jnp.where(step > 0, step, 1), 0)
  return flax.traverse_util.unflatten_dict(out)


def _statistics(moments, params, statistics, batch):
  """Statistics of the whole batch at every BatchNorm if all normalize by `statistics`; same tree as batch_stats."""

  def one(part):
    return moments({"params": params, "batch_stats": statistics}, part)

  first = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
  total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, batch)
  k = jax.tree.leaves(batch)[0].shape[0]
  flat, out = flax.traverse_util.flatten_dict(total), {}
  for *module, name in flat:
    if name == "mean":
      mean, square = flat[(*module, "mean")] / k, flat[(*module, "square")] / k
      out[(*module, "mean")] = mean
      out[(*module, "var")] = jnp.maximum(square - jnp.square(mean), 0)
  return flax.traverse_util.unflatten_dict(out)


def _settle(step, start):
  """step(step(... start)) until nothing changes, at most once for every BatchNorm there is."""
  limit = len(jax.tree.leaves(start)) // 2 + 1

  def unfinished(carry):
    before, now, count = carry
    same = jax.tree.map(lambda a, b: jnp.all(a == b), before, now)
    return (count < limit) & ~jnp.all(jnp.stack(jax.tree.leaves(same)))

  def again(carry):
    _, now, count = carry
    return now, step(now), count + 1

  return jax.lax.while_loop(unfinished, again, (start, step(start), 1))[1]


def _whole_batch_statistics(moments, variables, batch):
  """The statistics s that reproduce themselves, s = T(params, s), as a differentiable function of the parameters.

  A layer's are right once those of all layers before it are.  For the gradient, with l = dL/ds, the whole adjoint is
  a = l + (dT/ds)' a, found as the statistics are.
  """

  @jax.custom_vjp
  def settled(params, start, batch):
    return _settle(lambda s: _statistics(moments, params, s, batch), start)

  def forward(params, start, batch):
    found = settled(params, start, batch)
    return found, (params, found, batch)

  def backward(residuals, by_statistics):
    params, found, batch = residuals
    _, pull = jax.vjp(lambda p, s: _statistics(moments, p, s, batch), params, found)
    adjoint = _settle(lambda a: jax.tree.map(jnp.add, by_statistics, pull(a)[1]), by_statistics)
    zeros = jax.tree.map(jnp.zeros_like, found)
    return pull(adjoint)[0], zeros, jax.tree.map(_no_gradient, batch)

  settled.defvjp(forward, backward)
  return settled(variables["params"], variables["batch_stats"], batch)


def _no_gradient(x):
  """The cotangent of an input that is not differentiated: zeros, of dtype float0 for integers."""
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
