"""An autoencoder: the same encoder, a mirrored decoder, and the squared error of pixels; no two views are compared.

This is the representation learning with which contrastive methods are contrasted (Hinton and Salakhutdinov, Science 313,
2006).  Each augmented view is reconstructed from its own z, as a plain autoencoder reconstructs its input.  The image before
augmentation is not part of a batch, and predicting it would be another method, a denoising autoencoder.
With projector.kind=none, z is h and there is no bottleneck but h itself.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from simclr_jax.encoder import DEPTHS, BatchNorm, BlockGroup, Conv
from simclr_jax.methods.method import Method


class Decoder(nn.Module):
  """A ResNet in reverse: z to an image, with the encoder's blocks in reverse order, nearest-neighbor upsampling instead
  of strides, and a linear layer instead of average pooling.  Without selective kernels and squeeze-excite.

  Attributes: as encoder.resnet's.
  """

  depth: int
  width: float = 1.0
  stem: str = "imagenet"
  dtype: str = "float32"

  def __call__(self, z, views, train=False):
    """z [m, d], views float [m, h, w, 3] -> mean squared error of each reconstruction, float32 [m].

    The error and not the image, so that microbatches need not keep images.
    """
    return jnp.mean(jnp.square(self.reconstruct(z, views.shape[1:3], train) - views), (1, 2, 3))

  @nn.compact
  def reconstruct(self, z, size, train):
    """z [m, d] -> float32 [m, *size, 3]."""
    blocks, bottleneck = DEPTHS[self.depth]
    sizes = [size]
    for _ in range(3 if self.stem == "cifar" else 5):  # the encoder halves them so often, rounding up
      sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    filters = [int(64 * 2**i * self.width) for i in range(4)]
    height, width = sizes.pop()
    x = nn.Dense(height * width * filters[3], name="unpool")(z)
    x = x.reshape(-1, height, width, filters[3]).astype(self.dtype)
    for i in reversed(range(4)):
      group = dict(blocks=blocks[i], filters=filters[i], stride=1, bottleneck=bottleneck, remat_blocks=False)
      x = BlockGroup(**group, sk_ratio=0.0, se_ratio=0.0, name=f"group{i + 1}")(x, train)
      x = upsample(x, sizes.pop()) if i else x
    while sizes:  # the stem's max-pool and stride
      x = BatchNorm(name=f"norm{len(sizes)}")(Conv(filters[0], 3, name=f"conv{len(sizes)}")(x), train)
      x = upsample(x, sizes.pop())
    return Conv(3, 3, use_bias=True, name="pixels")(x).astype(jnp.float32)


def upsample(x, size):
  """Nearest-neighbor upsampling of x [m, h, w, c] by 2, cropped to [m, *size, c]."""
  return x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]


@dataclasses.dataclass(frozen=True)
class Autoencoder(Method):
  """The error of each view, which the decoder computes."""

  predictor: Decoder

  def loss(self, outputs, extra, network, batch):
    return jnp.mean(outputs.prediction), {}, {}


def create(config, mesh, source=None) -> Autoencoder:
  """The autoencoder of `config.encoder`.

  Raises:
    ValueError: the encoder is not a ResNet, which the decoder mirrors.
  """
  c = config.encoder
  if c.name != "resnet":
    raise ValueError(f"config.method='autoencoder': encoder.name={c.name} has no matching decoder here; use a resnet")
  return Autoencoder(Decoder(c.depth, c.width, c.stem, c.dtype))
