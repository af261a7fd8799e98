"""NT-Xent in tiles: the same function as `nt_xent` in the memory of one tile, on one device or around a ring of them.

With y = z / sqrt(tau), logits s_ij = y_i y_j, row loss l_i = log(1 + sum_neg e^s_ij / e^s_ip) of weight w_i:

  dL/dy_i = sum_{j neg} (w_i p_ij + w_j p_ji) y_j - (w_i q_i + w_p q_p) y_p      p_ij = e^(s_ij - lse_i)

where p is the positive of i and q_i = 1 - e^-l_i. S is symmetric, so one tile of it serves its rows and its
columns: each tile is computed once in the forward pass, giving row sums and column sums, and once in the
backward pass, giving G y_j and G^T y_i with G = w_i p_ij + w_j p_ji. Nothing of size n x n is ever stored.

Over P devices the blocks of y travel around a ring. Device r meets the blocks r-1 ... r-P/2 and no others:
the column results of a tile travel on with the visiting block, and return to its owner at the end. If P is
even the two devices at opposite ends of the ring meet at the same time, and each keeps its own rows.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from simclr_jax.contrast.nt_xent import nt_xent
from simclr_jax.contrast.similarities import (
  MASKED,
  dot,
  over_pairs,
  pair_potential,
  positives,
  prepare,
  reduce,
  row_dot,
  summary,
)

AXIS = "data"
VIEW_PAIRS = tuple(itertools.product((0, 1), (0, 1)))


@over_pairs
def nt_xent_tiled(z, temperature, *, mesh=None, tile=None, normalize=True, reduction="mean", precision="highest"):
  """`nt_xent`, same values, gradients and metrics, in O(n d / devices) memory and about half the multiplications.

  The entropy leaves out the official code's 1e-8 inside the logarithm, a difference below n * 1e-8.

  Args:
    z, temperature, normalize, reduction, precision: as for `nt_xent`.
    mesh: a mesh with an axis "data" over which z is sharded; n is a multiple of its size. None: one device (if z is
      sharded under jit, the result is still right, but every device computes all of it).
    tile: largest number of images along the side of a tile (a tile has four [tile, tile] matrices, one per pair of views).
      None: 128 on a CPU, where a tile should stay in the cache, and 2048 elsewhere.

  Returns:
    loss and metrics, as `nt_xent`.

  Raises:
    ValueError: as `nt_xent`; or the mesh has no axis "data", or its size does not divide n, or tile < 1.
  """
  y, metrics = prepare(z, temperature, normalize, reduction, precision)
  n = y.shape[0]
  if mesh is not None and AXIS not in mesh.shape:
    raise ValueError(
      f"mesh has axes {mesh.axis_names}; expected one named {AXIS!r}: jax.sharding.Mesh(jax.devices(), ('data',))"
    )
  devices = 1 if mesh is None else mesh.shape[AXIS]
  if n % devices:
    raise ValueError(f"batch of {n} images on {devices} devices; expected a multiple of {devices}")
  if tile is None:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    tile = 128 if platform == "cpu" else 2048
  if tile < 1:
    raise ValueError(f"tile is {tile}; expected a number of images of at least 1, or None")
  local = n // devices
  count = math.ceil(local / tile)
  # |logit| <= 1 / tau for unit vectors: e^(logit - 1 / tau) then neither overflows nor, for tau above 1/32,
  # loses a row by underflow, and one exponential serves a row and a column. Else each row keeps its own maximum.
  bounded = normalize and isinstance(temperature, int | float) and temperature >= 1 / 32
  plan = _Plan(
    mesh=mesh,
    local=local,
    count=count,
    size=math.ceil(local / count),
    precision=precision,
    shift=1.0 / temperature if bounded else None,
  )
  losses, rows = _losses(y, jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32)), plan)  # pyright: ignore  (custom_vjp hides the tuple)
  rows["potential"] = jnp.sum(rows["potential"])
  return reduce(losses, reduction), metrics | summary(**jax.lax.stop_gradient(rows))


def nt_xent_auto(z, temperature, *, mesh=None, tile=None, normalize=True, reduction="mean", precision="highest"):
  """`nt_xent` or `nt_xent_tiled`, whichever `choose` picks; a given `tile` asks for the latter. Arguments, results and
  errors are theirs."""
  keywords = {"normalize": normalize, "reduction": reduction, "precision": precision}
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if choose(len(z), 1 if mesh is None else mesh.size, platform, tile) == "dense":
    return nt_xent(z, temperature, **keywords)
  return nt_xent_tiled(z, temperature, mesh=mesh, tile=tile, **keywords)


# Bytes of similarities a device above which the tiled form is the cheaper one (docs/contrast.md).  On a CPU it takes
# the processor time of the dense form at 0.5 MiB (512 images on 8 devices) and 0.4 times at 32 MiB.  On a ring of
# TPUs latency counts first: compiled for 256 v5e chips at 32,768 images, 16 MiB, the dense form is estimated at a third
# of the tiled one's time, so memory decides there.
DENSE_BYTES = {"cpu": 4 * 2**20}
DENSE_BYTES_ACCELERATOR = 128 * 2**20


def choose(n, num_devices, platform, tile=None):
  """ "dense" for n images on `num_devices` devices if a device's part of the matrix, 4 (2n)^2 bytes in all, is small and no
  tile is given; else "tiled"."""
  most = DENSE_BYTES.get(platform, DENSE_BYTES_ACCELERATOR)
  return "tiled" if tile is not None or 4 * (2 * n) ** 2 / num_devices > most else "dense"


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What is known before tracing. Each device has `local` images in `count` blocks of `size`, the last padded."""

  mesh: Mesh | None
  local: int
  count: int
  size: int
  precision: str
  shift: float | None  # subtracted from every logit before exp; None: each row's largest so far

  @property
  def devices(self):
    return 1 if self.mesh is None else self.mesh.shape[AXIS]

  def blocks(self, x):
    """[local, 2, ...] -> [count, 2, size, ...], zeros at the end."""
    padding = [(0, self.count * self.size - self.local)] + [(0, 0)] * (x.ndim - 1)
    return jnp.swapaxes(jnp.pad(x, padding).reshape(self.count, self.size, *x.shape[1:]), 1, 2)

  def unblock(self, x):
    return jnp.swapaxes(x, 1, 2).reshape(self.count * self.size, 2, *x.shape[3:])[: self.local]

  def island(self, function, *in_specs):
    """The function on each device's share of its arguments."""
    if self.mesh is None:
      return function
    # check_vma would ask for a cast on every constant that enters a loop; every output here is per device.
    return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=PartitionSpec(AXIS), check_vma=False)

  def hop(self, x, distance):
    """Sends x (any tree of arrays) this many places along the ring."""
    ring = _ring_order(self.mesh)
    return jax.lax.ppermute(x, AXIS, list(zip(ring, np.roll(ring, -distance).tolist(), strict=True)))

  def logits(self, y_i, y_j, i, j, same_images=False):
    """{(u, v): [size, size] logits of view u of block i against view v of block j}; masked if not negatives."""
    k = jnp.arange(self.size)
    negative = True
    if self.count * self.size > self.local:
      negative = ((i * self.size + k) < self.local)[:, None] & ((j * self.size + k) < self.local)
    if same_images:
      negative &= k[:, None] != k
    tiles = {(u, v): dot(y_i[u], y_j[v].T, self.precision) for u, v in VIEW_PAIRS}
    return tiles if negative is True else {uv: jnp.where(negative, s, MASKED) for uv, s in tiles.items()}


def _ring_order(mesh):
  """Positions along the mesh axis in an order that steps from neighbor to neighbor on a TPU's grid of chips.

  Longer hops share links, and on some TPUs they no longer overlap with computation.
  """
  devices = np.moveaxis(mesh.devices, mesh.axis_names.index(AXIS), 0).reshape(mesh.shape[AXIS], -1)[:, 0]
  if devices[0].platform != "tpu":
    return list(range(len(devices)))
  places = np.array([(*d.coords, d.core_on_chip) for d in devices])
  places -= places.min(axis=0)
  shape = (places.max(axis=0) + 1).tolist()
  across = next((a for a, size in enumerate(shape) if size > 1 and len(devices) // size % 2 == 0), None)
  if across is None or math.prod(shape) != len(devices):
    return list(range(len(devices)))
  width = shape.pop(across)
  rows = [()]  # a path through the grid of the other axes, an even number of places
  for size in shape:
    rows = [(*row, k if r % 2 == 0 else size - 1 - k) for r, row in enumerate(rows) for k in range(size)]
  # Out through columns 1 ... width - 1, to and fro, and home along column 0.
  walk = [(row, width - c if r % 2 else c) for r, row in enumerate(rows) for c in range(1, width)]
  walk += [(row, 0) for row in reversed(rows)]
  position = {tuple(place): k for k, place in enumerate(places.tolist())}
  return [position[(*row[:across], c, *row[across:])] for row, c in walk]


def _block(tree, k):
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), tree)


def _put(tree, block, k):
  return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, k, 0), tree, block)


def _meet_all(visit, merge, empty, start, blocks, plan):
  """Each device's results after its own blocks have met every other block of the batch.

  Args:
    visit: (i, block i, j, block j, result of i, result of j or None) -> the two results, updated.
    merge: adds two trees of results.
    empty, start: the results of a block that has met nobody, and of this device's blocks so far; [count, ...].
    blocks: a tree of [count, ...], this device's blocks.
  """
  count = plan.count

  def among_own(k, rows):
    i = k % count
    j = (i + k // count + 1) % count  # each pair once: a ring of blocks
    row, column = visit(i, _block(blocks, i), j, _block(blocks, j), _block(rows, i), _block(rows, j))
    return _put(_put(rows, row, i), column, j)

  def sweep(visitors, rows, columns):
    def body(k, results):
      i, j = k // count, k % count
      row, column = _block(results[0], i), _block(results[1], j)
      row, column = visit(i, _block(blocks, i), j, _block(visitors, j), row, column)
      return _put(results[0], row, i), _put(results[1], column, j)

    return jax.lax.fori_loop(0, count * count, body, (rows, columns))

  # A hop is issued one sweep before its result is needed, so that it overlaps with the sweep.
  visitors = plan.hop(blocks, 1) if plan.devices > 1 else None
  rows = jax.lax.fori_loop(0, count * (count - 1) // 2, among_own, start) if count > 1 else start
  if plan.devices == 1:
    return rows

  def one_hop(_, carry):
    rows, visitors, traveling = carry
    following = plan.hop(visitors, 1)
    arriving = plan.hop(traveling, 1)  # the results so far of the blocks that visit now
    rows, columns = sweep(visitors, rows, empty)
    return rows, following, merge(arriving, columns)

  meetings = (plan.devices - 1) // 2
  rows, visitors, traveling = jax.lax.fori_loop(0, meetings, one_hop, (rows, visitors, empty))
  returned = plan.hop(traveling, -meetings)
  if plan.devices % 2 == 0:
    rows, _ = sweep(visitors, rows, None)
  return merge(rows, returned)


class _Sums(NamedTuple):
  """Over the negatives of anchors of view u with view v, exponentials being exp(logit - base), see `_base`."""

  top: Any  # [..., u, v, size], the largest logit; with a fixed base, the largest exponential
  total: Any  # [..., u, v, size], the sum of exponentials
  cross_moment: Any  # [..., size], the sum of exponential * logit for u = 0, v = 1
  potential: Any  # [..., size], the sum of `potential` for u = v = 0; of a symmetric tile its rows count both


def _base(top, plan):
  return jnp.maximum(top, MASKED / 2) if plan.shift is None else jnp.full_like(top, plan.shift)


def _merge(a, b, plan):
  top = jnp.maximum(a.top, b.top)
  scale_a, scale_b = (jnp.exp(_base(x.top, plan) - _base(top, plan)) for x in (a, b))
  return _Sums(
    top=top,
    total=a.total * scale_a + b.total * scale_b,
    cross_moment=a.cross_moment * scale_a[..., 0, 1, :] + b.cross_moment * scale_b[..., 0, 1, :],
    potential=a.potential + b.potential,
  )


def _tile_sums(logits, exponentials, axis, plan):
  """`_Sums`, but for the potential, of the anchors along a tile's rows (axis=1 is summed) or columns (axis=0)."""

  def by_anchor(tiles):
    return tiles if axis == 1 else {(u, v): tiles[v, u] for u, v in VIEW_PAIRS}

  def stack(sums):
    return jnp.stack([sums[uv] for uv in VIEW_PAIRS]).reshape(2, 2, plan.size)

  logits = by_anchor(logits)
  if exponentials is None:
    top = {uv: jnp.max(s, axis=axis) for uv, s in logits.items()}
    e = {uv: jnp.exp(s - jnp.expand_dims(_base(top[uv], plan), axis)) for uv, s in logits.items()}
  else:
    e = by_anchor(exponentials)
    # As good as the largest logit, and the one maximum that XLA fuses with the sums (on a TPU, with the dot too).
    top = {uv: jnp.max(e_uv, axis=axis) for uv, e_uv in e.items()}
  return _Sums(
    top=stack(top),
    total=stack({uv: jnp.sum(e_uv, axis=axis) for uv, e_uv in e.items()}),
    cross_moment=jnp.sum(e[0, 1] * logits[0, 1], axis=axis),
    potential=jnp.zeros(plan.size),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses(y, temperature, plan):
  """Row losses [n, 2] and what `summary` asks for; y: [n, 2, d]. No gradient through the latter."""
  return _losses_forward(y, temperature, plan)[0]


def _losses_forward(y, temperature, plan):
  def on_device(y, temperature):
    blocks = plan.blocks(y)
    merge = functools.partial(_merge, plan=plan)
    none = jnp.zeros((plan.count, plan.size))
    four = jnp.zeros((plan.count, 2, 2, plan.size))
    empty = _Sums(top=four + MASKED, total=four, cross_moment=none, potential=none)

    def visit(i, y_i, j, y_j, row, column, same_images=False):
      s = plan.logits(y_i, y_j, i, j, same_images)
      e = None if plan.shift is None else {uv: jnp.exp(s_uv - plan.shift) for uv, s_uv in s.items()}
      square_i, square_j = row_dot(y_i[0], y_i[0]), row_dot(y_j[0], y_j[0])
      potential = jnp.sum(pair_potential(s[0, 0], square_i, square_j, temperature), axis=1)
      both = column is not None
      row = merge(row, _tile_sums(s, e, 1, plan)._replace(potential=potential * (2.0 if both else 1.0)))
      return row, merge(column, _tile_sums(s, e, 0, plan)) if both else None

    def meet_itself(i):
      # A positive as its tile has it, so that equal rows are exact ties; in the loss, as rows give it.
      own, start = _block((blocks, empty), i)
      positive = jnp.diagonal(dot(own[0], own[1].T, plan.precision))
      return visit(i, own, i, own, start, None, same_images=True)[0], positive

    sums, positive = jax.lax.map(meet_itself, jnp.arange(plan.count))
    sums = _meet_all(visit, merge, empty, sums, blocks, plan)

    base = _base(sums.top, plan)
    lse_negatives = jax.nn.logsumexp(base + jnp.log(sums.total), axis=2)
    losses = jax.nn.softplus(lse_negatives - positives(blocks)[:, None])
    # The softmax of first views over all n second views: the negatives and the positive.
    top = jnp.maximum(base[:, 0, 1], positive)
    scale, own = jnp.exp(base[:, 0, 1] - top), jnp.exp(positive - top)
    total = sums.total[:, 0, 1] * scale + own
    entropy = top + jnp.log(total) - (sums.cross_moment * scale + own * positive) / total

    compared = positive if plan.shift is None else jnp.exp(positive - plan.shift)

    def images(x):
      return x.reshape(-1, *x.shape[2:])[: plan.local]

    return (
      plan.unblock(losses),
      {
        "hit": images(compared > sums.top[:, 0, 1]),
        "hit_all": plan.unblock(compared[:, None] > jnp.max(sums.top, axis=2)),
        "entropy": images(entropy),
        "potential": images(sums.potential),
      },
      blocks,
    )

  data = PartitionSpec(AXIS)
  losses, rows, blocks = plan.island(on_device, data, PartitionSpec())(y, temperature)
  return (losses, rows), (blocks, temperature, losses)


def _losses_backward(plan, residuals, cotangents):
  y, temperature, losses = residuals
  weights, _ = cotangents

  def on_device(y, losses, weights):
    losses, weights = plan.blocks(losses), plan.blocks(weights)
    lse = losses + positives(y)[:, None]
    if plan.shift is None:
      blocks = {"y": y, "weight": weights, "lse": lse}
    else:
      blocks = {"y": y, "weight": weights * jnp.exp(plan.shift - lse)}
    empty = jnp.zeros(y.shape, jnp.float32)

    def visit(i, block_i, j, block_j, row, column, same_images=False):
      y_i, y_j = block_i["y"], block_j["y"]
      g = {}
      for (u, v), s in plan.logits(y_i, y_j, i, j, same_images).items():
        weight_i, weight_j = block_i["weight"][u][:, None], block_j["weight"][v]
        if plan.shift is None:
          lse_i, lse_j = block_i["lse"][u][:, None], block_j["lse"][v]
          g_uv = weight_i * jnp.exp(s - lse_i) + weight_j * jnp.exp(s - lse_j)
        else:
          g_uv = (weight_i + weight_j) * jnp.exp(s - plan.shift)
        g[u, v] = g_uv.astype(y_i.dtype)
      row += jnp.stack([sum(dot(g[u, v], y_j[v], plan.precision) for v in (0, 1)) for u in (0, 1)])
      if column is not None:
        column += jnp.stack([sum(dot(g[u, v].T, y_i[u], plan.precision) for u in (0, 1)) for v in (0, 1)])
      return row, column

    def meet_itself(i):
      own, start = _block((blocks, empty), i)
      return visit(i, own, i, own, start, None, same_images=True)[0]

    dy = jax.lax.map(meet_itself, jnp.arange(plan.count))
    dy = _meet_all(visit, jnp.add, empty, dy, blocks, plan)
    attraction = jnp.sum(weights * -jnp.expm1(-losses), axis=1, keepdims=True)  # w_i q_i + w_p q_p
    return plan.unblock(dy - attraction[..., None] * y[:, ::-1]).astype(y.dtype)

  data = PartitionSpec(AXIS)
  return plan.island(on_device, data, data, data)(y, losses, weights), jnp.zeros_like(temperature)


_losses.defvjp(_losses_forward, _losses_backward)
