"""The contrastive loss: NT-Xent (SimCLR, arXiv 2002.05709, equation 1 and Algorithm 1).

`nt_xent` is the loss on one page: the whole similarity matrix, plain JAX.
`nt_xent_tiled` is the same function in the memory of one tile, on one device or around a ring of them.
`nt_xent_auto` takes the cheaper of the two.

Everywhere z is [n, 2, d]: the projections of n images, two views each, the views of an image side by side.
Both views of image i are each other's positive; the 2n - 2 views of the other images are the negatives.
This module needs jax and numpy alone.
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

REDUCTIONS = {"mean": 1.0, "official_sum": 2.0}
PRECISIONS = ("highest", "high", "default")
# Stands for -inf in a masked logit: exp of it is exactly 0 beside any real logit, and unlike -inf it leaves
# a row without negatives (n = 1) with loss 0 and gradient 0 where inf - inf would be NaN.
MASKED = jnp.finfo(jnp.float32).min


def nt_xent(z, temperature, *, normalize=True, reduction="mean", precision="highest", bank=None, banked=0):
  """NT-Xent over the global batch, with the whole [2n, 2n] matrix of similarities in memory.

  Under jit, z may be sharded over its first axis; negatives range over all of it.

  Args:
    z: [n, 2, d] projections, any float type; computed in float32.
    temperature: tau > 0, a number or a scalar array (which may be learned).
    normalize: divide each projection by its norm (cosine similarity); otherwise plain dot products.
    reduction: "mean" over the 2n anchors (the paper's equation), or "official_sum": the mean over the n images
      of the sum over both views, twice as large (official code: objective.py).
    precision: of the similarities. "highest" is float32; "high" is three bfloat16 passes on a TPU; "default"
      rounds z to bfloat16 and accumulates in float32, on every platform as a TPU does it unasked.
    bank, banked: [k, d] further negatives of every anchor, taken as they are, of which the first `banked` count: the
      memory of SimCLRv2 (memory.py).  The metrics leave them out.

  Returns:
    loss, a float32 scalar, and metrics, float32 scalars without gradient:
      contrastive_accuracy: how often a first view is more similar to its positive than to the second view of
        every other image (official code: metrics.py; ties are misses).
      contrastive_accuracy_all: the same of all 2n anchors against all 2n - 2 negatives.
      entropy: of the softmax over the n second views, mean over first views, nats (official code: metrics.py).
      positive_similarity, negative_similarity: mean cosine (or dot product) of positive and negative pairs.
      alignment: mean squared distance of positive pairs (Wang & Isola, arXiv 2005.10242, alpha = 2).
      uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over all pairs i != j of first views (ibid., t = 2).

  Raises:
    ValueError: z is not [n, 2, d], temperature is not positive, reduction or precision is not one of the above.
  """
  y, metrics = _prepare(z, temperature, normalize, reduction, precision)
  logits, positive, negatives = _compare(y, precision)
  # -log(e^pos / (e^pos + sum e^neg)) = log(1 + e^(lse(neg) - pos)), which keeps its digits when nearly 0.
  against = (
    negatives if bank is None else jnp.concatenate([negatives, _remembered(y, temperature, bank, banked, precision)], 1)
  )
  losses = jax.nn.softplus(jax.nn.logsumexp(against, axis=1) - positive)
  return _reduce(losses, reduction), metrics | _matrix_metrics(logits, negatives, _potentials(y, temperature, logits))


def _compare(y, precision):
  """Logits of all 2n views, 2i and 2i + 1 of image i: all [2n, 2n], of the positives [2n], of the negatives alone."""
  n, _, d = y.shape
  rows = y.reshape(2 * n, d)
  logits = _dot(rows, rows.T, precision)
  image = jnp.arange(2 * n) // 2
  negatives = jnp.where(image[:, None] == image[None, :], MASKED, logits)
  return logits, jnp.repeat(_row_dot(y[:, 0], y[:, 1]), 2), negatives


def _remembered(y, temperature, bank, banked, precision):
  """Logits [2n, k] of all views against a bank of projections."""
  scaled = (bank * jax.lax.rsqrt(jnp.asarray(temperature, jnp.float32))).astype(y.dtype)
  logits = _dot(y.reshape(-1, y.shape[-1]), scaled.T, precision)
  return jnp.where(jnp.arange(len(bank)) < banked, logits, MASKED)


def _matrix_metrics(logits, negatives, potentials):
  """The metrics that `_prepare` leaves, from the matrices [2n, 2n] and `_potential` between first views [n, n]."""
  logits, negatives, potentials = jax.lax.stop_gradient((logits, negatives, potentials))
  n = len(logits) // 2
  first = logits.reshape(n, 2, 2 * n)[:, 0]  # [n, 2n], the rows of first views
  cross = first[:, 1::2]  # [n, n], the official logits_ab
  own = jnp.eye(n, dtype=bool)
  positive = jnp.sum(jnp.where(own, cross, 0.0), axis=1)  # as the matrix has it: equal rows are exact ties
  p = jax.nn.softmax(cross, axis=1)
  return _summary(
    hit=positive > jnp.max(jnp.where(own, MASKED, cross), axis=1),
    hit_all=jnp.repeat(positive, 2) > jnp.max(negatives, axis=1),
    entropy=-jnp.sum(p * jnp.log(p + 1e-8), axis=1),
    potential=jnp.sum(jnp.where(own, 0.0, potentials)),
  )


def _potentials(y, temperature, logits):
  n = len(y)
  first = logits.reshape(n, 2, 2 * n)[:, 0]
  square = _row_dot(y[:, 0], y[:, 0])
  return _potential(first[:, 0::2], square, square, temperature)


def _prepare(z, temperature, normalize, reduction, precision, fewest=1):
  """Checks the arguments; returns y = z / sqrt(tau), so that logits are y y^T, and the metrics that need no matmul."""
  if z.ndim != 3 or z.shape[1] != 2:
    raise ValueError(
      f"z has shape {z.shape}; expected [n, 2, d], both views of an image side by side: stack them on axis 1"
    )
  if isinstance(temperature, int | float) and not temperature > 0:
    raise ValueError(f"temperature is {temperature}; expected a number above 0, such as 0.1")
  for name, value, known in (("reduction", reduction, REDUCTIONS), ("precision", precision, PRECISIONS)):
    if value not in known:
      raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
  n = len(z)
  if n < fewest:
    raise ValueError(f"batch of {n} images; expected at least {fewest}")
  z = z.astype(jnp.float32)
  if normalize:
    z = l2_normalize(z)
  y = z * jax.lax.rsqrt(jnp.asarray(temperature, jnp.float32))
  if precision == "default":
    y = y.astype(jnp.bfloat16)
  z = jax.lax.stop_gradient(z)
  # Reductions over the views, not z[:, 0] and z[:, 1]: XLA would copy each of those out of z.
  both = jnp.sum(z, axis=1)  # [n, d]
  between_images = jnp.sum(jnp.square(jnp.sum(both, axis=0))) - jnp.sum(jnp.square(both))
  return y, {
    "positive_similarity": jnp.sum(jnp.prod(z, axis=1)) / n,
    "negative_similarity": between_images / max(1.0, 4.0 * n * (n - 1)),
    "alignment": 2.0 * jnp.sum(jnp.square(z - both[:, None] / 2.0)) / n,  # |a - b|^2 = 2 |a - m|^2 + 2 |b - m|^2
  }


def l2_normalize(z):
  """z [..., d] divided by its norms, with the floor of tf.math.l2_normalize."""
  return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))


def _dot(a, b, precision):
  """a b in float32 from float32 or bfloat16 operands."""
  return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _row_dot(a, b):
  return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _positives(blocks):
  """[count, 2, size, d] -> logits of the positives [count, size]."""
  return jnp.sum(jnp.prod(blocks.astype(jnp.float32), axis=1), axis=-1)


def _potential(logits, square_i, square_j, temperature):
  """exp(-2 |z_i - z_j|^2) of each pair, from logits y_i y_j and the squared norms of y = z / sqrt(tau)."""
  distance = temperature * (square_i[:, None] + square_j[None, :] - 2.0 * logits)
  return jnp.exp(-2.0 * jnp.maximum(distance, 0.0))


def _summary(*, hit, hit_all, entropy, potential):
  """Metrics from: hits of the first views [n] and of all anchors [2n], entropies [n], and the summed potential."""
  n = hit.shape[0]
  uniformity = jnp.log(jnp.maximum(potential / (n * (n - 1.0)), jnp.finfo(jnp.float32).tiny)) if n > 1 else 0.0
  return {
    "contrastive_accuracy": jnp.mean(hit, dtype=jnp.float32),
    "contrastive_accuracy_all": jnp.mean(hit_all, dtype=jnp.float32),
    "entropy": jnp.mean(entropy),
    "uniformity": jnp.asarray(uniformity, jnp.float32),
  }


def _reduce(losses, reduction):
  return jnp.mean(losses) * REDUCTIONS[reduction]


# ----------------------------------------------------------------------------------------------------------
# NT-Xent in tiles.
#
# With y = z / sqrt(tau), logits s_ij = y_i y_j, row loss l_i = log(1 + sum_neg e^s_ij / e^s_ip) of weight w_i:
#
#   dL/dy_i = sum_{j neg} (w_i p_ij + w_j p_ji) y_j - (w_i q_i + w_p q_p) y_p      p_ij = e^(s_ij - lse_i)
#
# where p is the positive of i and q_i = 1 - e^-l_i. S is symmetric, so one tile of it serves its rows and its
# columns: each tile is computed once in the forward pass, giving row sums and column sums, and once in the
# backward pass, giving G y_j and G^T y_i with G = w_i p_ij + w_j p_ji. Nothing of size n x n is ever stored.
#
# Over P devices the blocks of y travel around a ring. Device r meets the blocks r-1 ... r-P/2 and no others:
# the column results of a tile travel on with the visiting block, and return to its owner at the end. If P is
# even the two devices at opposite ends of the ring meet at the same time, and each keeps its own rows.
# ----------------------------------------------------------------------------------------------------------

AXIS = "data"
VIEW_PAIRS = tuple(itertools.product((0, 1), (0, 1)))


def nt_xent_tiled(z, temperature, *, mesh=None, tile=None, normalize=True, reduction="mean", precision="highest"):
  """`nt_xent`, same values, gradients and metrics, in O(n d / devices) memory and about half the multiplications.

  The entropy leaves out the official code's 1e-8 inside the logarithm, a difference below n * 1e-8.

  Args:
    z, temperature, normalize, reduction, precision: as for `nt_xent`.
    mesh: a mesh with an axis "data" over which z is sharded, n a multiple of its size. None: one device (with z
      sharded under jit the result is right all the same, but every device computes all of it).
    tile: most images along the side of a tile (a tile has four [tile, tile] matrices, one a pair of views).
      None: 128 on a CPU, where a tile should stay in the cache, 2048 elsewhere.

  Returns:
    loss and metrics, as `nt_xent`.

  Raises:
    ValueError: as `nt_xent`; or the mesh has no axis "data", or its size does not divide n, or tile < 1.
  """
  y, metrics = _prepare(z, temperature, normalize, reduction, precision)
  n = y.shape[0]
  if mesh is not None and AXIS not in mesh.shape:
    raise ValueError(f"mesh has axes {mesh.axis_names}; expected one named {AXIS!r}: jax.make_mesh((8,), ('data',))")
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
  losses, rows = _losses(y, jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32)), plan)
  rows["potential"] = jnp.sum(rows["potential"])
  return _reduce(losses, reduction), metrics | _summary(**jax.lax.stop_gradient(rows))


def nt_xent_auto(z, temperature, *, mesh=None, tile=None, normalize=True, reduction="mean", precision="highest"):
  """`nt_xent` or `nt_xent_tiled`, whichever `choose` takes. Arguments, returns and errors as theirs."""
  keywords = {"normalize": normalize, "reduction": reduction, "precision": precision}
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if choose(len(z), 1 if mesh is None else mesh.size, platform) == "dense":
    return nt_xent(z, temperature, **keywords)
  return nt_xent_tiled(z, temperature, mesh=mesh, tile=tile, **keywords)


# Bytes of similarities a device above which the tiled form is the cheaper one (docs/contrast.md).  On a CPU it takes 1.2
# times the processor time of the dense form at 0.5 MiB (512 images on 8 devices) and 0.4 times at 32 MiB.  On a ring of
# TPUs latency counts first: compiled for 256 v5e chips at 32,768 images, 16 MiB, the dense form is estimated at a third
# of the tiled one's time, so memory decides there.
DENSE_BYTES = {"cpu": 4 * 2**20}
DENSE_BYTES_ACCELERATOR = 128 * 2**20


def choose(n, num_devices, platform):
  """ "dense" for n images on so many devices if a device's share of the matrix, 4 (2n)^2 bytes in all, is small; else
  "tiled"."""
  most = DENSE_BYTES.get(platform, DENSE_BYTES_ACCELERATOR)
  return "tiled" if 4 * (2 * n) ** 2 / num_devices > most else "dense"


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
    tiles = {(u, v): _dot(y_i[u], y_j[v].T, self.precision) for u, v in VIEW_PAIRS}
    return tiles if negative is True else {uv: jnp.where(negative, s, MASKED) for uv, s in tiles.items()}


def _ring_order(mesh):
  """Positions along the mesh axis in an order that steps from neighbour to neighbour on a TPU's grid of chips.

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

  def meet(_, carry):
    rows, visitors, travelling = carry
    following = plan.hop(visitors, 1)
    arriving = plan.hop(travelling, 1)  # the results so far of the blocks that visit now
    rows, columns = sweep(visitors, rows, empty)
    return rows, following, merge(arriving, columns)

  meetings = (plan.devices - 1) // 2
  rows, visitors, travelling = jax.lax.fori_loop(0, meetings, meet, (rows, visitors, empty))
  returned = plan.hop(travelling, -meetings)
  if plan.devices % 2 == 0:
    rows, _ = sweep(visitors, rows, None)
  return merge(rows, returned)


class _Sums(NamedTuple):
  """Over the negatives of anchors of view u with view v, exponentials being exp(logit - base), see `_base`."""

  top: Any  # [..., u, v, size], the largest logit; with a fixed base, the largest exponential
  total: Any  # [..., u, v, size], the sum of exponentials
  cross_moment: Any  # [..., size], the sum of exponential * logit for u = 0, v = 1
  potential: Any  # [..., size], the sum of `_potential` for u = v = 0; of a symmetric tile its rows count both


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
  """Row losses [n, 2] and what `_summary` asks for; y: [n, 2, d]. No gradient through the latter."""
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
      square_i, square_j = _row_dot(y_i[0], y_i[0]), _row_dot(y_j[0], y_j[0])
      potential = jnp.sum(_potential(s[0, 0], square_i, square_j, temperature), axis=1)
      both = column is not None
      row = merge(row, _tile_sums(s, e, 1, plan)._replace(potential=potential * (2.0 if both else 1.0)))
      return row, merge(column, _tile_sums(s, e, 0, plan)) if both else None

    def meet_itself(i):
      # A positive as its tile has it, so that equal rows are exact ties; in the loss, as rows give it.
      own, start = _block((blocks, empty), i)
      positive = jnp.diagonal(_dot(own[0], own[1].T, plan.precision))
      return visit(i, own, i, own, start, None, same_images=True)[0], positive

    sums, positive = jax.lax.map(meet_itself, jnp.arange(plan.count))
    sums = _meet_all(visit, merge, empty, sums, blocks, plan)

    base = _base(sums.top, plan)
    lse_negatives = jax.nn.logsumexp(base + jnp.log(sums.total), axis=2)
    losses = jax.nn.softplus(lse_negatives - _positives(blocks)[:, None])
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
    lse = losses + _positives(y)[:, None]
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
      row += jnp.stack([sum(_dot(g[u, v], y_j[v], plan.precision) for v in (0, 1)) for u in (0, 1)])
      if column is not None:
        column += jnp.stack([sum(_dot(g[u, v].T, y_i[u], plan.precision) for u in (0, 1)) for v in (0, 1)])
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


# ----------------------------------------------------------------------------------------------------------
# Other objectives on the same z, each one term away from NT-Xent and each with the whole matrix in memory.
# ----------------------------------------------------------------------------------------------------------


def decoupled(z, temperature, *, normalize=True, precision="highest"):
  """Decoupled contrastive loss (Yeh et al., arXiv 2110.06848): NT-Xent without the positive in its denominator.

  Args and returns: as `nt_xent`, the mean over the 2n anchors. Raises ValueError for n = 1 too.
  """
  y, metrics = _prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = _compare(y, precision)
  losses = jax.nn.logsumexp(negatives, axis=1) - positive
  return jnp.mean(losses), metrics | _matrix_metrics(logits, negatives, _potentials(y, temperature, logits))


def supervised(z, temperature, *, labels, normalize=True, precision="highest"):
  """Supervised contrastive loss, L_out (Khosla et al., arXiv 2004.11362): all views of a class are positives.

  Args:
    z, temperature, normalize, precision: as for `nt_xent`; labels: [n] integers.

  Returns:
    The mean over anchors of the mean over their positives of -log softmax over all other 2n - 1 views, without
    the factor tau of that paper's code; and the metrics of `nt_xent`, which know of images only.
  """
  if labels.shape != z.shape[:1]:
    raise ValueError(f"labels have shape {labels.shape}; expected {z.shape[:1]}, one for each image of z")
  y, metrics = _prepare(z, temperature, normalize, "mean", precision)
  logits, _, negatives = _compare(y, precision)
  itself = jnp.eye(len(logits), dtype=bool)
  label = jnp.repeat(labels, 2)
  positives = (label[:, None] == label[None, :]) & ~itself
  log_p = logits - jax.nn.logsumexp(jnp.where(itself, MASKED, logits), axis=1, keepdims=True)
  losses = -jnp.sum(jnp.where(positives, log_p, 0.0), axis=1) / jnp.sum(positives, axis=1)
  return jnp.mean(losses), metrics | _matrix_metrics(logits, negatives, _potentials(y, temperature, logits))


def debiased(z, temperature, *, class_prior=0.1, normalize=True, precision="highest"):
  """Debiased contrastive loss (Chuang et al., arXiv 2007.00224, equation 8, one positive).

  The N = 2n - 2 terms of the denominator become N g, an estimate of what true negatives would add:
  g = max((mean e^neg - prior e^pos) / (1 - prior), e^(-1/tau)).

  Args:
    z, temperature, normalize, precision: as for `nt_xent`. class_prior: how often a "negative" shares the
      anchor's class, at least 0 and below 1; 0 gives NT-Xent.

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`. Raises ValueError for n = 1 too.
  """
  if not 0 <= class_prior < 1:
    raise ValueError(f"class_prior is {class_prior}; expected at least 0 and below 1, such as 0.1 for ten classes")
  y, metrics = _prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = _compare(y, precision)
  count = len(logits) - 2
  log_mean = jax.nn.logsumexp(negatives, axis=1) - math.log(count)
  top = jax.lax.stop_gradient(jnp.maximum(log_mean, positive))
  estimate = (jnp.exp(log_mean - top) - class_prior * jnp.exp(positive - top)) / (1 - class_prior)
  floor = jnp.finfo(jnp.float32).tiny  # keeps the gradient of log finite where the maximum below takes over
  log_g = jnp.maximum(top + jnp.log(jnp.maximum(estimate, floor)), -1.0 / temperature)
  losses = jax.nn.softplus(math.log(count) + log_g - positive)
  return jnp.mean(losses), metrics | _matrix_metrics(logits, negatives, _potentials(y, temperature, logits))


def cauchy(z, *, precision="highest"):
  """NT-Xent with a heavy-tailed similarity, for two-dimensional maps (t-SimCNE, Boehm et al., arXiv 2210.09879).

  The logit of a pair is log(1 / (1 + |z_i - z_j|^2)), z as it comes: no normalisation and no temperature.

  Args: z, precision: as for `nt_xent`.
  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`, over these logits.
  """
  y, metrics = _prepare(z, 1.0, False, "mean", precision)
  n, _, d = y.shape
  rows = y.reshape(2 * n, d)
  if d <= 3:  # |a|^2 + |b|^2 - 2ab loses digits far from the origin, and saves nothing here
    squared = jnp.sum(jnp.square(rows[:, None].astype(jnp.float32) - rows[None, :].astype(jnp.float32)), axis=-1)
  else:
    square = _row_dot(rows, rows)
    squared = jnp.maximum(square[:, None] + square[None, :] - 2.0 * _dot(rows, rows.T, precision), 0.0)
  logits = -jnp.log1p(squared)
  image = jnp.arange(2 * n) // 2
  negatives = jnp.where(image[:, None] == image[None, :], MASKED, logits)
  difference = y[:, 0].astype(jnp.float32) - y[:, 1].astype(jnp.float32)
  positive = jnp.repeat(-jnp.log1p(_row_dot(difference, difference)), 2)
  losses = jax.nn.softplus(jax.nn.logsumexp(negatives, axis=1) - positive)
  potentials = jnp.exp(-2.0 * squared.reshape(n, 2, 2 * n)[:, 0, 0::2])
  return jnp.mean(losses), metrics | _matrix_metrics(logits, negatives, potentials)


def nt_logistic(z, temperature, *, semi_hard=False, normalize=True, precision="highest"):
  """NT-Logistic, the competitor of arXiv 2002.05709, Tables 2 and 4: -log s(pos) - log s(-neg), s the sigmoid.

  An anchor's negatives are the n - 1 other images in the view that is not its own (ibid., appendix B.10).

  Args:
    z, temperature, normalize, precision: as for `nt_xent`.
    semi_hard: of the negatives take only the nearest that is farther than the positive (ibid., section 5.1);
      an anchor that has none keeps its positive term. Otherwise the mean over all negatives.

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent`. Raises ValueError for n = 1 too.
  """
  y, metrics = _prepare(z, temperature, normalize, "mean", precision, fewest=2)
  logits, positive, negatives = _compare(y, precision)
  terms = jax.nn.softplus(negatives)  # -log s(-neg); 0 where masked
  losses = jax.nn.softplus(-positive) + _over_negatives(terms, positive, negatives, semi_hard)
  return jnp.mean(losses), metrics | _matrix_metrics(logits, negatives, _potentials(y, temperature, logits))


def margin_triplet(z, *, margin=0.8, semi_hard=False, normalize=True, precision="highest"):
  """Margin triplet loss, the competitor of arXiv 2002.05709, Tables 2 and 4: max(neg - pos + margin, 0).

  Similarities are cosines, negatives and semi_hard as for `nt_logistic`; an anchor without a semi-hard negative
  adds 0. The paper tried margins 0, 0.4, 0.8 and 1.6 (appendix B.10).

  Returns: loss, the mean over the 2n anchors, and metrics as `nt_xent` at tau = 1. Raises ValueError for n = 1 too.
  """
  y, metrics = _prepare(z, 1.0, normalize, "mean", precision, fewest=2)
  similarity, positive, negatives = _compare(y, precision)
  terms = jnp.maximum(negatives - positive[:, None] + margin, 0.0)  # 0 where masked
  losses = _over_negatives(terms, positive, negatives, semi_hard)
  return jnp.mean(losses), metrics | _matrix_metrics(similarity, negatives, _potentials(y, 1.0, similarity))


def _over_negatives(terms, positive, negatives, semi_hard):
  """The mean of an anchor's terms [2n, 2n] over its n - 1 negatives in the other view, or its semi-hard one."""
  view = jnp.arange(len(terms)) % 2
  candidate = (view[:, None] != view[None, :]) & (negatives > MASKED)
  if not semi_hard:
    return jnp.sum(jnp.where(candidate, terms, 0.0), axis=1) / (len(terms) // 2 - 1)
  candidate &= negatives < positive[:, None]
  nearest = jnp.argmax(jnp.where(candidate, negatives, MASKED), axis=1)[:, None]
  term = jnp.take_along_axis(jnp.where(candidate, terms, 0.0), nearest, axis=1)
  return term[:, 0]


LOSSES = {
  "nt_xent": nt_xent_auto,
  "decoupled": decoupled,
  "supervised": supervised,
  "debiased": debiased,
  "cauchy": cauchy,
  "nt_logistic": nt_logistic,
  "nt_logistic_semi_hard": functools.partial(nt_logistic, semi_hard=True),
  "margin_triplet": margin_triplet,
  "margin_triplet_semi_hard": functools.partial(margin_triplet, semi_hard=True),
}
