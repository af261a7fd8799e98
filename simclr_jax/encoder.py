"""The encoder f: ResNet-18 to -200 of any width, with selective kernels, squeeze-excite and a CIFAR stem.

SimCLR (arXiv 2002.05709) maps an image x to h = f(x), the average-pooled output of a ResNet (arXiv 1512.03385) whose
stride is in the 3x3 convolution.  SimCLRv2 (arXiv 2006.10029) makes it deeper, wider, and adds selective kernels
(arXiv 1903.06586) with the ResNet-D stem and shortcuts (arXiv 1812.01187).  Paddings, initial values and constants are
those of the official code, tf2/resnet.py, so that its weights give its numbers.

Parameter paths: stem_conv, stem_norm (selective kernels: stem_conv1..3, stem_norm1..3) and
group{1..4}/block{1..}/{shortcut_conv, shortcut_norm, conv1, norm1, conv2, norm2, conv3, norm3, sk/..., se/...}.
Kernels are HWIO.  A BatchNorm holds the parameters scale, bias and the batch_stats mean, var.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Depth -> (blocks in each of the four groups, bottleneck?).  arXiv 1512.03385, Table 1; 200: arXiv 1603.05027.
DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}
REMAT = ("none", "block", "group")
BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9
# VarianceScaling(1, fan_in, truncated_normal) in the official code.
CONV_INIT = nn.initializers.lecun_normal()


def resnet(
  depth: int,
  *,
  width: float = 1,
  sk_ratio: float = 0.0,
  se_ratio: float = 0.0,
  stem: str = "imagenet",
  pool_padding: str = "official",
  dtype: Any = jnp.float32,
  remat: str = "none",
  tpu: bool = False,
) -> nn.Module:
  """A ResNet: images float [n, h, w, 3] in [0, 1], not standardised, to representations h float32 [n, d].

  d is int(512 * width) for depths 18 and 34, four times that for the others.

  Args:
    depth: 18, 34, 50, 101, 152 or 200.
    width: multiplies the channels of every convolution, the stem's included; fractions are rounded down.
    sk_ratio: above 0, selective kernels in bottleneck blocks with that reduction (SimCLRv2: 0.0625), and the
      ResNet-D stem and shortcuts at any depth.
    se_ratio: above 0, squeeze-excite after the last BatchNorm of each block, with that reduction.
    stem: "imagenet" (7x7 stride 2 and a max-pool) or "cifar" (3x3 stride 1, no pool: arXiv 2002.05709, B.9).
    pool_padding: where the stem's 3x3 max-pool pads an even side: "official" (TensorFlow SAME: only bottom and right)
      or "torch" (one pixel on every side, as torchvision).
    dtype: of the activations, float32 or bfloat16.  Parameters, statistics and h are float32 in either case.
    remat: what the backward pass computes again instead of keeping it: "none", "block" (everything inside a residual
      block) or "group" (everything inside the blocks of one resolution), or one of these for each of the four groups,
      such as "block,block,none,none".  Same values, less memory, up to a forward pass more of time.
    tpu: the same parameters and values, computed in the way that suits a TPU: 1x1 convolutions to four times the channels
      are normalised as they are made (see BatchNorm), and in group 1, whose 64 channels fill half of the 128 lanes, two
      neighbours of a row stand side by side in the channels.  Elsewhere it is slower.

  Returns:
    a Linen module, `.apply({"params", "batch_stats"}, x, train=False)`.  Under train=True, BatchNorm normalises with
    the statistics of the batch it sees (under jit, the global batch) and updates batch_stats.  tune_after=0 freezes
    the stem, k > 0 also the groups up to k: no gradient, and BatchNorm in inference mode.  It sows the outputs stem
    and block_group1..4 into the collection "intermediates".

  Raises:
    ValueError: an argument outside of the above.
  """
  if depth not in DEPTHS:
    raise ValueError(f"encoder depth {depth!r}: expected one of {', '.join(map(str, DEPTHS))}")
  if isinstance(width, str) or not 1 <= 64 * width < float("inf"):
    raise ValueError(f"encoder width {width!r}: expected a multiplier of at least 1/64, such as 0.25, 1 or 2")
  for name, ratio in (("sk_ratio", sk_ratio), ("se_ratio", se_ratio)):
    if isinstance(ratio, str) or not 0 <= ratio <= 1:
      raise ValueError(f"encoder {name} {ratio!r}: expected 0 (off) to 1, such as 0.0625")
  if stem not in ("imagenet", "cifar"):
    raise ValueError(f'encoder stem {stem!r}: expected "imagenet" or "cifar"')
  if pool_padding not in ("official", "torch"):
    raise ValueError(f'encoder pool_padding {pool_padding!r}: expected "official" or "torch"')
  if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
    raise ValueError(f'encoder dtype {dtype!r}: expected "float32" or "bfloat16"')
  policies = str(remat).split(",")
  if len(policies) not in (1, 4) or not set(policies) <= set(REMAT):
    raise ValueError(f"encoder remat {remat!r}: expected one of {', '.join(REMAT)}, or four of them with commas")
  return ResNet(depth, width, sk_ratio, se_ratio, stem, pool_padding, jnp.dtype(dtype), remat, tpu)


class ResNet(nn.Module):
  """See `resnet`, which checks the arguments."""

  depth: int
  width: float
  sk_ratio: float
  se_ratio: float
  stem: str
  pool_padding: str
  dtype: Any
  remat: str = "none"
  tpu: bool = False

  @nn.compact
  def __call__(self, x, train=False, tune_after=-1):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"the encoder got {x.dtype} {list(x.shape)}: expected float images [n, h, w, 3] in [0, 1]")
    x = self._stem(x.astype(self.dtype), train and tune_after < 0)
    x = jax.lax.stop_gradient(x) if tune_after == 0 else x
    self.sow("intermediates", "stem", x)
    plain = self.sk_ratio == 0 and self.se_ratio == 0  # the others take means over pixels
    beside = 2 if self.tpu and plain and self.width <= 1 and x.shape[2] % 2 == 0 else 1
    x = x.reshape(*x.shape[:2], x.shape[2] // beside, -1)
    blocks, bottleneck = DEPTHS[self.depth]
    policies = self.remat.split(",")
    for i, (count, remat) in enumerate(zip(blocks, policies * (4 // len(policies)), strict=True)):
      group = nn.remat(BlockGroup, static_argnums=(2,)) if remat == "group" else BlockGroup
      x = group(
        blocks=count,
        filters=int(64 * 2**i * self.width),
        stride=1 if i == 0 else 2,
        bottleneck=bottleneck,
        sk_ratio=self.sk_ratio,
        se_ratio=self.se_ratio,
        remat_blocks=remat == "block",
        tpu=self.tpu,
        beside=beside,
        name=f"group{i + 1}",
      )(x, train and tune_after <= i)
      x = jax.lax.stop_gradient(x) if tune_after == i + 1 else x
      beside = beside if i == 0 else 1  # the stride of group 2 takes the pairs apart
      self.sow("intermediates", f"block_group{i + 1}", x.reshape(*x.shape[:2], beside * x.shape[2], -1))
    return jnp.mean(x, (1, 2), dtype=jnp.float32)

  def _stem(self, x, train):
    filters = int(64 * self.width)
    if self.stem == "cifar":
      x = Conv(filters, 3, name="stem_conv")(x)
      return BatchNorm(name="stem_norm")(x, train)
    padding = "SAME" if self.pool_padding == "official" else ((1, 1), (1, 1))
    if self.sk_ratio > 0:  # ResNet-D: three 3x3 for one 7x7
      for i, (f, stride) in enumerate(((filters // 2, 2), (filters // 2, 1), (filters, 1)), 1):
        x = Conv(f, 3, stride, name=f"stem_conv{i}")(x)
        x = BatchNorm(max_pool=padding if i == 3 else None, name=f"stem_norm{i}")(x, train)
      return x
    x = Conv(filters, 7, 2, name="stem_conv")(x)
    return BatchNorm(max_pool=padding, name="stem_norm")(x, train)


class BlockGroup(nn.Module):
  """Residual blocks of one resolution; the first strides and projects its shortcut, in group 1 of basic nets too.

  With beside = 2 the input [n, h, w, c] is [n, h, w / 2, 2c], pixels 2j and 2j + 1 in the channels of j, and so is the
  output of stride 1; with stride 2 it is as usual.
  """

  blocks: int
  filters: int
  stride: int
  bottleneck: bool
  sk_ratio: float
  se_ratio: float
  remat_blocks: bool
  tpu: bool = False
  beside: int = 1

  @nn.compact
  def __call__(self, x, train):
    block = nn.remat(Block, static_argnums=(2,)) if self.remat_blocks else Block
    for i in range(self.blocks):
      x = block(
        filters=self.filters,
        stride=self.stride if i == 0 else 1,
        project=i == 0,
        bottleneck=self.bottleneck,
        sk_ratio=self.sk_ratio,
        se_ratio=self.se_ratio,
        tpu=self.tpu,
        beside=self.beside if i == 0 or self.stride == 1 else 1,
        name=f"block{i + 1}",
      )(x, train)
    return x


class Block(nn.Module):
  """A post-activation residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 when `bottleneck`."""

  filters: int
  stride: int
  project: bool
  bottleneck: bool
  sk_ratio: float
  se_ratio: float
  tpu: bool = False
  beside: int = 1

  @nn.compact
  def __call__(self, x, train):
    relu = relu_of_sum
    after = self.beside if self.stride == 1 else 1
    shortcut = self._shortcut(x, train, after) if self.project else x
    if not self.bottleneck:
      x = Conv(self.filters, 3, self.stride, beside=self.beside, name="conv1")(x)
      x = BatchNorm(beside=after, name="norm1")(x, train)
      x = Conv(self.filters, 3, beside=after, name="conv2")(x)
      x = BatchNorm(relu=False, zero_scale=True, beside=after, name="norm2")(x, train)
    else:
      x = Conv(self.filters, 1, beside=self.beside, name="conv1")(x)
      x = BatchNorm(beside=self.beside, name="norm1")(x, train)
      if self.sk_ratio > 0:
        x = SelectiveKernel(self.filters, self.stride, self.sk_ratio, name="sk")(x, train)
      else:
        x = Conv(self.filters, 3, self.stride, beside=self.beside, name="conv2")(x)
        x = BatchNorm(beside=after, name="norm2")(x, train)
      relu = relu_of_residual if self._by_moments(x) else relu
      x = self._projected(x, train, "conv3", "norm3", beside=after, zero_scale=True)
    if self.se_ratio > 0:
      # The reduction counts from the block's `filters`, not from the 4 * filters of a bottleneck's output.
      x = SqueezeExcite(max(1, int(self.filters * self.se_ratio)), name="se")(x)
    return relu(x, shortcut)

  def _shortcut(self, x, train, after):
    stride = self.stride
    if self.sk_ratio > 0:
      x, stride = resnet_d_pool(x, stride), 1
    x = x[:, ::stride, :, : x.shape[-1] // 2] if after < self.beside else x[:, ::stride, ::stride]
    return self._projected(x, train, "shortcut_conv", "shortcut_norm", beside=after)

  def _projected(self, x, train, conv, norm, beside, zero_scale=False):
    """A 1x1 convolution to the channels of the output, and its BatchNorm."""
    features = self.filters * (4 if self.bottleneck else 1)
    norm = BatchNorm(relu=False, zero_scale=zero_scale, beside=beside, name=norm)
    if self._by_moments(x):
      return norm(x, train, Kernel(x.shape[-1] // beside, features, name=conv)())
    return norm(Conv(features, 1, beside=beside, name=conv)(x), train)

  def _by_moments(self, x) -> bool:
    """Whether products of the channels of x are little work beside the passes over its pixels that they save."""
    return self.tpu and 2 * x.shape[1] * x.shape[2] > x.shape[3]


class SelectiveKernel(nn.Module):
  """Two 3x3 streams mixed by a softmax over streams, one weight a channel; arXiv 1903.06586 as in SimCLRv2."""

  filters: int
  stride: int
  ratio: float

  @nn.compact
  def __call__(self, x, train):
    x = Conv(2 * self.filters, 3, self.stride, name="conv")(x)
    x = BatchNorm(name="norm")(x, train)
    f = self.filters
    g = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32)
    g = Conv(max(int(f * self.ratio), 32), 1, name="reduce_conv")(g[..., :f] + g[..., f:])
    g = BatchNorm(name="reduce_norm")(g, train)
    g = Conv(2 * f, 1, name="expand_conv")(g)
    # The softmax over two; the streams stay side by side, for an axis of their own is copied on a TPU.
    weight = nn.sigmoid(g[..., :f] - g[..., f:])
    return x[..., :f] * weight.astype(x.dtype) + x[..., f:] * (1 - weight).astype(x.dtype)


class SqueezeExcite(nn.Module):
  """Scales channels by a sigmoid of their averages; arXiv 1709.01507."""

  reduced: int

  @nn.compact
  def __call__(self, x):
    g = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32)
    g = nn.relu(Conv(self.reduced, 1, use_bias=True, name="reduce_conv")(g))
    g = nn.sigmoid(Conv(x.shape[-1], 1, use_bias=True, name="expand_conv")(g))
    return x * g.astype(x.dtype)


class Conv(nn.Module):
  """A k x k convolution with (k - 1) // 2 zeros in front and the rest behind, whatever the image size and stride.

  beside = 2: of an array [n, h, w / 2, 2c] with pixels 2j and 2j + 1 in the channels of j.  The result is one too where
  the stride is 1; a stride of 2 has one pixel for each pair.
  """

  features: int
  size: int
  stride: int = 1
  use_bias: bool = False
  beside: int = 1

  @nn.compact
  def __call__(self, x):
    shape = (self.size, self.size, x.shape[-1] // self.beside, self.features)
    kernel = self.param("kernel", CONV_INIT, shape, jnp.float32).astype(x.dtype)
    front = (self.size - 1) // 2
    rows = columns = (front, self.size - 1 - front)
    strides = (self.stride, self.stride)
    if self.beside == 2:
      kernel, columns, strides = side_by_side(kernel, self.stride), (front, front // self.stride), (self.stride, 1)
    if self.size == 1:
      y = pointwise(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    else:
      y = jax.lax.conv_general_dilated(x, kernel, strides, (rows, columns), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if self.use_bias:
      y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
    return y


class Kernel(nn.Module):
  """The parameter of a 1x1 convolution that BatchNorm makes."""

  inputs: int
  features: int

  @nn.compact
  def __call__(self):
    return self.param("kernel", CONV_INIT, (1, 1, self.inputs, self.features), jnp.float32)


def side_by_side(kernel, stride: int = 1):
  """The kernel HWIO [k, k, c, d] of Conv, k = 1 or 3, as it applies to pairs of pixels.

  Stride 1: [k, k, 2c, 2d], in which a pixel 2j + q reads its k neighbours among the 2k of k pairs.  Stride 2, k = 3:
  [3, 2, 2c, d], in which pixel 2j reads the second of the pair before its own, and its own.
  """
  k, _, c, d = kernel.shape
  front = (k - 1) // 2
  if stride == 2:
    return jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(k, 2, 2 * c, d)
  columns = [jnp.pad(kernel, ((0, 0), (front + q, k - front - q), (0, 0), (0, 0))) for q in (0, 1)]
  return jnp.stack(columns, 3).reshape(k, k, 2 * c, 2 * d)


@jax.custom_vjp
def pointwise(x, w):
  """A 1x1 convolution, x [n, h, w, c] by w [c, d]; on a CPU as a product of matrices, and so are its gradients.

  XLA:CPU is slow at the gradients of the convolution, and at the weight gradient in the form that differentiating the
  product gives, for which it copies a transposed array first.  XLA:TPU fuses BatchNorm into convolutions alone.
  """
  return jax.lax.platform_dependent(x, w, cpu=jnp.matmul, default=_convolution)


def _convolution(x, w):
  return jax.lax.conv_general_dilated(x, w[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pointwise_backward(residuals, dy):
  def products(x, w, dy):
    return dy @ w.T, jnp.einsum("nhwc,nhwd->cd", x, dy)

  def convolutions(x, w, dy):
    return jax.vjp(_convolution, x, w)[1](dy)

  return jax.lax.platform_dependent(*residuals, dy, cpu=products, default=convolutions)


pointwise.defvjp(lambda x, w: (pointwise(x, w), (x, w)), _pointwise_backward)


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, the ReLU after it and, with the padding `max_pool`, a 3x3 max-pool.

  The pool comes first, which is the same, as both grow with x where the scale is positive; where it is negative x is
  turned round.  A quarter of the pixels are left to be normalised.

  Given the kernel of a 1x1 convolution it is that of x @ kernel, whose statistics follow from x: with the means m and
  the covariance C of its channels, the mean of a column is m @ k and its variance k @ C @ k.  So the convolution is
  made once, normalised, and nothing of four times the channels waits in memory for its statistics, in either direction.

  Statistics are float32 and, under jit with a batch sharded over devices, those of the global batch.  The variance is
  E[x^2] - E[x]^2, biased, also in the moving average, as in the official code's synchronised BatchNorm.
  """

  relu: bool = True
  zero_scale: bool = False
  max_pool: Any = None
  beside: int = 1

  @nn.compact
  def __call__(self, x, train, kernel=None):
    shape = (x.shape[-1] // self.beside if kernel is None else kernel.shape[-1],)
    scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
    scale = self.param("scale", scale_init, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
    moving_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    moving_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    sign = jax.lax.stop_gradient(jnp.where(scale < 0, -1.0, 1.0)) if self.max_pool else 1.0
    if self.max_pool:
      x = x * sign.astype(x.dtype)
    if train:
      if kernel is None:
        axes = tuple(range(x.ndim - 1))
        mean = sign * self._folded(jnp.mean(x, axes, dtype=jnp.float32))
        var = self._folded(jnp.mean(jnp.square(x.astype(jnp.float32)), axes)) - jnp.square(mean)
      else:
        first, second = moments(x)
        first = self._folded(first)
        second = sum(jnp.split(part, self.beside, 1)[i] for i, part in enumerate(jnp.split(second, self.beside)))
        covariance = second / self.beside - first[:, None] * first
        mean = exact_dot(first, kernel[0, 0])
        var = jnp.sum(kernel[0, 0] * exact_dot(covariance, kernel[0, 0]), 0)
      var = jnp.maximum(var, 0)  # rounding can take it below 0
      if not self.is_initializing():
        moving_mean.value = BN_MOMENTUM * moving_mean.value + (1 - BN_MOMENTUM) * mean
        moving_var.value = BN_MOMENTUM * moving_var.value + (1 - BN_MOMENTUM) * var
    else:
      mean, var = moving_mean.value, moving_var.value
    scale = scale * jax.lax.rsqrt(var + BN_EPSILON)
    shift = jnp.tile(bias - mean * scale, self.beside)
    if kernel is not None:
      kernel = side_by_side(kernel * scale) if self.beside == 2 else kernel * scale
      y = pointwise(x, kernel[0, 0].astype(x.dtype)).astype(jnp.float32)
    else:
      if self.max_pool:
        x, scale = nn.max_pool(x, (3, 3), (2, 2), self.max_pool), scale * sign
      y = x.astype(jnp.float32) * jnp.tile(scale, self.beside)
    y = relu_of_sum(y, shift) if self.relu else y + shift
    return y.astype(x.dtype)

  def _folded(self, statistic):
    """The mean over the pixels that stand side by side: [beside * c] -> [c]."""
    return statistic.reshape(self.beside, -1).mean(0)


@jax.custom_vjp
def moments(x):
  """The means of the channels of x [n, h, w, c] and of their products, float32 [c] and [c, c]."""
  pixels = x.size // x.shape[-1]
  # XLA:TPU turns a product with one column of ones into a slower sum; 8 columns cost it nothing.
  ones = jnp.ones((*x.shape[:-1], 8), x.dtype)
  first = jnp.einsum("nhwi,nhwj->ij", x, ones, preferred_element_type=jnp.float32)[:, 0]
  second = jnp.einsum("nhwi,nhwj->ij", x, x, preferred_element_type=jnp.float32)
  return first / pixels, second / pixels


def _moments_backward(x, gradients):
  first, second = gradients
  pixels = x.size // x.shape[-1]
  # The products are symmetric, so this is one convolution; differentiating the einsum gives two.
  dx = pointwise(x, ((second + second.T) / pixels).astype(x.dtype)).astype(jnp.float32) + first / pixels
  return (dx.astype(x.dtype),)


moments.defvjp(lambda x: (moments(x), x), _moments_backward)
exact_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def relu_of_residual(a, b):
  """relu_of_sum, whose gradient knows the sign from the output, which is there anyway."""
  return relu_of_sum(a, b)


def _residual_forward(a, b):
  # XLA:TPU would else write out the signs in a pass of their own.
  y = jax.lax.optimization_barrier(relu_of_sum(a, b))
  return y, y


def _residual_backward(y, dy):
  dy = jnp.where(y <= 0, 0, dy)
  return dy, dy


relu_of_residual.defvjp(_residual_forward, _residual_backward)


def relu_of_sum(a, b):
  """max(a + b, 0), in the form that XLA:CPU fuses with its neighbours, which it does not do with a maximum.

  The comparison is this way round so that a NaN stays one and a diverged run is noticed.
  """
  return jnp.where(a <= -b, 0, a + b)


def resnet_d_pool(x, stride):
  """ResNet-D's average-pool before the projection of a shortcut, which the official code also has at stride 1."""
  if stride == 1:
    return nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False)
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  return nn.avg_pool(x, (2, 2), (stride, stride), "VALID")
