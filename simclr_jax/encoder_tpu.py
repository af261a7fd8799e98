"""The encoder of encoder.py arranged for a TPU: the same parameter paths and the same numbers, another order of work.

Two things are different.  1x1 convolutions to four times the channels are normalized as they are made (see BatchNorm),
which saves passes over memory.  And in group 1, whose 64 channels fill half of a TPU's 128 lanes, two neighbors of a row
are packed into the channels: an array [n, h, w, c] becomes [n, h, w / 2, 2c], with pixels 2j and 2j + 1 in the channels of
j.  On a CPU it is slower.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import encoder
from simclr_jax.encoder import BN_EPSILON, CONV_INIT, add_relu, convolution, pointwise

FIELDS = ("depth", "width", "sk_ratio", "se_ratio", "stem", "pool_padding", "dtype", "remat")


def resnet(depth: int, **arguments) -> nn.Module:
  """`encoder.resnet` with the same arguments and parameters, arranged for a TPU."""
  plain = encoder.resnet(depth, **arguments)
  return ResNet(**{name: getattr(plain, name) for name in FIELDS})


class ResNet(encoder.ResNet):
  """See `resnet`."""

  @nn.compact
  def __call__(self, x, train=False, tune_after=-1):
    x = self.stem_of(x, train, tune_after)
    plain = self.sk_ratio == 0 and self.se_ratio == 0  # the others take means over pixels
    packing = 2 if plain and self.width <= 1 and x.shape[2] % 2 == 0 else 1
    x = x.reshape(*x.shape[:2], x.shape[2] // packing, -1)
    for i in range(4):
      x = self.group_of(i, BlockGroup, pixel_packing=packing if i < 2 else 1)(x, train and tune_after <= i)
      x = jax.lax.stop_gradient(x) if tune_after == i + 1 else x
      columns = x.shape[2] * (packing if i == 0 else 1)  # the stride of group 2 takes the pairs apart
      self.sow("intermediates", f"block_group{i + 1}", x.reshape(*x.shape[:2], columns, -1))
    return jnp.mean(x, (1, 2), dtype=jnp.float32)


class BlockGroup(encoder.BlockGroup):
  """encoder.BlockGroup of packed pixels: so is the output of stride 1; with stride 2 it is as usual."""

  pixel_packing: int = 1

  @nn.compact
  def __call__(self, x, train):
    for i in range(self.blocks):
      packing = self.pixel_packing if i == 0 or self.stride == 1 else 1
      x = self.block_of(i, Block, pixel_packing=packing)(x, train)
    return x


class Block(encoder.Block):
  """encoder.Block of packed pixels."""

  pixel_packing: int = 1

  @nn.compact
  def __call__(self, x, train):
    packing, after = self.pixel_packing, self.pixel_packing if self.stride == 1 else 1
    shortcut, add = self._packed_shortcut(x, train, after) if self.project else x, add_relu
    if not self.bottleneck:
      x = Conv(self.filters, 3, self.stride, pixel_packing=packing, name="conv1")(x)
      x = BatchNorm(pixel_packing=after, name="norm1")(x, train)
      x = Conv(self.filters, 3, pixel_packing=after, name="conv2")(x)
      x = BatchNorm(relu=False, zero_scale=True, pixel_packing=after, name="norm2")(x, train)
    else:
      x = Conv(self.filters, 1, pixel_packing=packing, name="conv1")(x)
      x = BatchNorm(pixel_packing=packing, name="norm1")(x, train)
      if self.sk_ratio > 0:
        x = encoder.SelectiveKernel(self.filters, self.stride, self.sk_ratio, name="sk")(x, train)
      else:
        x = Conv(self.filters, 3, self.stride, pixel_packing=packing, name="conv2")(x)
        x = BatchNorm(pixel_packing=after, name="norm2")(x, train)
      add = add_relu_of_output if by_moments(x) else add
      x = self._projected(x, train, "conv3", "norm3", after, zero_scale=True)
    return add(self.excited(x), shortcut)

  def _packed_shortcut(self, x, train, after):
    stride = self.stride
    if self.sk_ratio > 0:
      x, stride = encoder.resnet_d_pool(x, stride), 1
    x = x[:, ::stride, :, : x.shape[-1] // 2] if after < self.pixel_packing else x[:, ::stride, ::stride]
    return self._projected(x, train, "shortcut_conv", "shortcut_norm", after)

  def _projected(self, x, train, conv, norm, packing, zero_scale=False):
    """A 1x1 convolution to the channels of the output, and its BatchNorm."""
    features = self.filters * (4 if self.bottleneck else 1)
    norm = BatchNorm(relu=False, zero_scale=zero_scale, pixel_packing=packing, name=norm)
    if by_moments(x):
      return norm(x, train, Kernel(x.shape[-1] // packing, features, name=conv)())
    return norm(Conv(features, 1, pixel_packing=packing, name=conv)(x), train)


def by_moments(x) -> bool:
  """Whether products of the channels of x are little work beside the passes over its pixels that they save."""
  return 2 * x.shape[1] * x.shape[2] > x.shape[3]


class Conv(encoder.Conv):
  """encoder.Conv of packed pixels: its result is packed where the stride is 1; a stride of 2 leaves one of each pair."""

  pixel_packing: int = 1

  @nn.compact
  def __call__(self, x):
    if self.pixel_packing == 1:
      return super().__call__(x)
    shape = (self.size, self.size, x.shape[-1] // 2, self.features)
    kernel = pack_kernel(self.param("kernel", CONV_INIT, shape, jnp.float32).astype(x.dtype), self.stride)
    front = (self.size - 1) // 2
    return convolution(x, kernel, (self.stride, 1), ((front, self.size - 1 - front), (front, front // self.stride)))


class Kernel(nn.Module):
  """The kernel of a 1x1 convolution that `BatchNorm` applies."""

  inputs: int
  features: int

  @nn.compact
  def __call__(self):
    return self.param("kernel", CONV_INIT, (1, 1, self.inputs, self.features), jnp.float32)


def pack_kernel(kernel, stride: int = 1):
  """The kernel HWIO [k, k, c, d] of Conv, k = 1 or 3, as it applies to pairs of pixels.

  Stride 1: [k, k, 2c, 2d], in which a pixel 2j + q reads its k neighbors among the 2k of k pairs.  Stride 2, k = 3:
  [3, 2, 2c, d], in which pixel 2j reads the second of the pair before its own, and its own.
  """
  k, _, c, d = kernel.shape
  front = (k - 1) // 2
  if stride == 2:
    return jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(k, 2, 2 * c, d)
  columns = [jnp.pad(kernel, ((0, 0), (front + q, k - front - q), (0, 0), (0, 0))) for q in (0, 1)]
  return jnp.stack(columns, 3).reshape(k, k, 2 * c, 2 * d)


class BatchNorm(encoder.BatchNorm):
  """encoder.BatchNorm of packed pixels or, given the kernel of a 1x1 convolution, of x @ kernel.

  The statistics of x @ kernel follow from x: with the means m and the covariance C of its channels, the mean of a column
  is m @ k and its variance k @ C @ k.  So the convolution is made once, normalized, and nothing of four times the channels
  waits in memory for its statistics, in either direction.
  """

  pixel_packing: int = 1

  @nn.compact
  def __call__(self, x, train, kernel=None):
    if kernel is None and self.pixel_packing == 1:
      return super().__call__(x, train)
    features = x.shape[-1] // self.pixel_packing if kernel is None else kernel.shape[-1]
    scale, bias = self.parameters_of(features)
    mean, var = self.statistics_of(features, train, functools.partial(self._of_batch, x, kernel))
    scale = scale * jax.lax.rsqrt(var + BN_EPSILON)
    shift = jnp.tile(bias - mean * scale, self.pixel_packing)
    if kernel is None:
      y = x.astype(jnp.float32) * jnp.tile(scale, self.pixel_packing)
    else:
      kernel = pack_kernel(kernel * scale) if self.pixel_packing == 2 else kernel * scale
      y = pointwise(x, kernel[0, 0].astype(x.dtype)).astype(jnp.float32)
    y = add_relu(y, shift) if self.relu else y + shift
    return y.astype(x.dtype)

  def _of_batch(self, x, kernel):
    if kernel is None:
      axes = tuple(range(x.ndim - 1))
      mean = self._folded(jnp.mean(x, axes, dtype=jnp.float32))
      return mean, self._folded(jnp.mean(jnp.square(x.astype(jnp.float32)), axes)) - jnp.square(mean)
    first, second = moments(x)
    first = self._folded(first)
    packing = self.pixel_packing
    second = sum(jnp.split(part, packing, 1)[i] for i, part in enumerate(jnp.split(second, packing)))
    covariance = second / packing - first[:, None] * first
    return exact_dot(first, kernel[0, 0]), jnp.sum(kernel[0, 0] * exact_dot(covariance, kernel[0, 0]), 0)

  def _folded(self, statistic):
    """The mean over the pixels that are packed: [pixel_packing * c] -> [c]."""
    return statistic.reshape(self.pixel_packing, -1).mean(0)


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
def add_relu_of_output(a, b):
  """add_relu, whose gradient knows the sign from the output, which is there anyway."""
  return add_relu(a, b)


def _add_relu_forward(a, b):
  # XLA:TPU would else write out the signs in a pass of their own.
  y = jax.lax.optimization_barrier(add_relu(a, b))
  return y, y


def _add_relu_backward(y, dy):
  dy = jnp.where(y <= 0, 0, dy)
  return dy, dy


add_relu_of_output.defvjp(_add_relu_forward, _add_relu_backward)
