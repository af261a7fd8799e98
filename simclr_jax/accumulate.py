"""One large batch from microbatches, exactly: the contrastive loss still sees every negative of the global batch.

Embed all microbatches, take the loss and dL/dz once over the whole batch, then encode each microbatch again and
backpropagate its share of dL/dz (GradCache, arXiv 2101.06983).  Memory: the activations of one microbatch.

What BatchNorm ranges over is a choice:
  "microbatch"  each microbatch normalises by its own statistics.  Exact for that function, at one extra forward pass;
                it is not the function of the unsplit step.  Keep microbatches at some hundred images.
  "exact"       statistics of the whole batch, in forward and backward, equal to the unsplit step.  The statistics of a
                layer depend on those of the layers before it, so they are found by repeated passes, one for every
                BatchNorm in the longest chain (20 for ResNet-18 with its head, 51 for ResNet-50), and their gradients
                likewise: that many forward passes and as many forward-backward passes.  For checking, and for small
                networks.
"""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

BATCH_NORM = ("microbatch", "exact")


def split(x, parts: int, devices: int):
  """[n, ...] -> [parts, n / parts, ...], each part with an equal share of every device's rows: nothing moves."""
  rows = x.shape[0] // (parts * devices)
  x = jnp.moveaxis(x.reshape(devices, parts, rows, *x.shape[1:]), 0, 1)
  return x.reshape(parts, devices * rows, *x.shape[3:])


def join(x, devices: int):
  """The inverse of `split`: [parts, n / parts, ...] -> [n, ...]."""
  parts, rows = x.shape[0], x.shape[1] // devices
  x = jnp.moveaxis(x.reshape(parts, devices, rows, *x.shape[2:]), 1, 0)
  return x.reshape(devices * parts * rows, *x.shape[3:])


def value_and_grad(forward, loss, params, batch_stats, parts, *, devices: int, batch_norm: str):
  """Loss and gradients of a batch that is given in parts.

  Args:
    forward: (params, batch_stats, part, train) -> ((z [m, 2, d], side), updated batch_stats).  `side` is a dict of
      scalars that add up over the parts; its `online_loss` is added to the loss.  train=False normalises by the given
      batch_stats.  Linen modules called BatchNorm inside it are what "exact" finds.
    loss: (z [n, 2, d]) -> (scalar, metrics).
    parts: pytree of [k, m, ...] arrays as `split` makes them, n = k m.
    batch_norm: "microbatch" or "exact".

  Returns:
    ((metrics, updated batch_stats), gradients of loss + online_loss by params).

  Raises:
    ValueError: unknown batch_norm.
  """
  if batch_norm not in BATCH_NORM:
    raise ValueError(f"batch_norm={batch_norm!r}: expected one of {', '.join(BATCH_NORM)}")
  exact = batch_norm == "exact"
  used = _whole_batch_statistics(forward, params, batch_stats, parts) if exact else batch_stats

  def encode(params, used, part):
    return forward(params, used, part, not exact)

  def embed(_, part):
    (z, side), updated = encode(params, used, part)
    return None, (z, side, updated)

  _, (z, side, updated) = jax.lax.scan(embed, None, parts)
  (contrastive, metrics), dz = jax.value_and_grad(loss, has_aux=True)(join(z, devices))
  dz = split(dz, len(z), devices)

  def backward(gradients, x):
    part, dz = x

    def scalar_and_z(params, used):
      (z, side), _ = encode(params, used, part)
      return z, side["online_loss"]

    _, pull = jax.vjp(scalar_and_z, params, used)
    return jax.tree.map(jnp.add, gradients, pull((dz, jnp.ones(())))), None

  start = jax.tree.map(jnp.zeros_like, (params, used))
  (gradients, by_statistics), _ = jax.lax.scan(backward, start, (parts, dz))
  if exact:
    gradients = jax.tree.map(jnp.add, gradients, _through_statistics(forward, params, used, parts, by_statistics))
    updated = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, batch_stats, used)  # as BatchNorm moves them
  else:
    updated = _merge(updated)
  return ({"loss": contrastive, **metrics, **jax.tree.map(jnp.sum, side)}, updated), gradients


def _merge(updated):
  """Moving statistics [k, ...] after one update by each of k microbatches -> after one update by the whole batch.

  The mean of the means is exact; to the mean of the variances the variance of the means is added, which in moving
  averages that took one step of 0.1 stands a hundredfold too small.
  """
  flat = flax.traverse_util.flatten_dict(updated)
  out = {}
  for path, values in flat.items():
    out[path] = jnp.mean(values, 0)
    if path[-1] == "var":
      out[path] += 0.1 * jnp.var(flat[(*path[:-1], "mean")], axis=0) / 0.01
  return flax.traverse_util.unflatten_dict(out)


def _moments(forward, params, statistics, part):
  """{path: (mean, mean of squares)} of what each BatchNorm is given when all normalise by `statistics`."""
  seen = {}

  def record(call, args, kwargs, context):
    module = context.module
    if context.method_name == "__call__" and type(module).__name__ == "BatchNorm":
      x = args[0].astype(jnp.float32)
      axes = tuple(range(x.ndim - 1))
      seen[module.path] = (jnp.mean(x, axes), jnp.mean(jnp.square(x), axes))
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    forward(params, statistics, part, False)
  return seen


def _statistics(forward, params, statistics, parts):
  """Statistics of the whole batch at every BatchNorm if all normalise by `statistics`; same tree as batch_stats."""

  def add(total, part):
    return jax.tree.map(jnp.add, total, _moments(forward, params, statistics, part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: _moments(forward, params, statistics, first))
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  k = jax.tree.leaves(parts)[0].shape[0]
  flat = {}
  for path, (mean, square) in total.items():
    mean, square = mean / k, square / k
    flat[(*path, "mean")] = mean
    flat[(*path, "var")] = jnp.maximum(square - jnp.square(mean), 0)
  return flax.traverse_util.unflatten_dict(flat)


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


def _whole_batch_statistics(forward, params, batch_stats, parts):
  """The statistics that reproduce themselves; a layer's are right once those of all layers before it are."""
  return _settle(lambda s: _statistics(forward, params, s, parts), batch_stats)


def _through_statistics(forward, params, statistics, parts, by_statistics):
  """The part of the gradient that reaches params through the statistics.

  With s = T(params, s) and l = dL/ds directly, the whole adjoint is a = l + (dT/ds)' a, found as the statistics are.
  """
  _, pull = jax.vjp(lambda p, s: _statistics(forward, p, s, parts), params, statistics)
  adjoint = _settle(lambda a: jax.tree.map(jnp.add, by_statistics, pull(a)[1]), by_statistics)
  return pull(adjoint)[0]
