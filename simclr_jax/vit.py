"""The encoder f as a Vision Transformer: ViT-Ti, -S and -B (arXiv 2010.11929) with patches of any size.

Pre-norm blocks of attention and a two-layer perceptron, a learned class token, a final LayerNorm.  Two choices follow MoCo v3
(arXiv 2104.02057, section 4), which found them to make training without labels stable: positions are fixed sines of the two
coordinates, so that any image size works, and the patch projection keeps its random values.

Parameter paths: patch_embed, class_token, block{1..}/{norm1, qkv, proj, norm2, fc1, fc2}, norm.  The contract is that of
encoder.py; there is no BatchNorm, so "batch_stats" is empty.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12)}  # width, blocks, heads: arXiv 2012.12877, Table 1
POOLS = ("token", "mean")
REMAT = ("none", "block")
EPSILON = 1e-6
INIT = nn.initializers.xavier_uniform()


def vit(size: str, *, patch: int, pool: str = "token", dtype: Any = jnp.float32, remat: str = "none") -> nn.Module:
  """A Vision Transformer: images float [n, h, w, 3] in [0, 1], not standardized, to representations h float32 [n, d].

  Args:
    size: "Ti" (d = 192), "S" (384) or "B" (768), 12 blocks each.
    patch: side of a patch in pixels; the sides of images are multiples of it.
    pool: h is the class "token", or the "mean" over the patches.
    dtype: of the activations, float32 or bfloat16.  Parameters, LayerNorm, softmax and h are float32 in either case.
    remat: what the backward pass recomputes instead of keeping it: "none" or "block".

  Returns:
    a Linen module, `.apply({"params"}, x, train=False)`.  tune_after=0 freezes the class token, k > 0 also the first k
    quarters of the blocks.

  Raises:
    ValueError: an argument is not one of the above.
  """
  for name, value, choices in (("size", size, SIZES), ("pool", pool, POOLS), ("remat", remat, REMAT)):
    if value not in choices:
      raise ValueError(f"encoder {name} {value!r}: expected one of {', '.join(choices)}")
  if not isinstance(patch, int) or patch < 1:
    raise ValueError(f"encoder patch {patch!r}: expected the side of a patch in pixels, such as 4 or 16")
  if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
    raise ValueError(f'encoder dtype {dtype!r}: expected "float32" or "bfloat16"')
  return ViT(size, patch, pool, jnp.dtype(dtype), remat)


class ViT(nn.Module):
  """See `vit`, which checks the arguments."""

  size: str
  patch: int
  pool: str
  dtype: Any
  remat: str = "none"

  @nn.compact
  def __call__(self, x, train=False, tune_after=-1):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"the encoder got {x.dtype} {list(x.shape)}: expected float images [n, h, w, 3] in [0, 1]")
    n, height, width, _ = x.shape
    if height % self.patch or width % self.patch:
      raise ValueError(f"images of {height} x {width} pixels: expected multiples of the patch of {self.patch} pixels")
    d, blocks, heads = SIZES[self.size]
    rows, columns = height // self.patch, width // self.patch
    x = x.reshape(n, rows, self.patch, columns, self.patch, 3).swapaxes(2, 3).reshape(n, rows * columns, -1)
    # Never trained: an optimizer that decays weights leaves it alone too, see optimizer.py.
    x = jax.lax.stop_gradient(nn.Dense(d, dtype=self.dtype, kernel_init=INIT, name="patch_embed")(x))
    x = x + positions(rows, columns, d).astype(self.dtype)
    token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, d), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (n, 1, d)), x], axis=1)
    x = jax.lax.stop_gradient(x) if tune_after >= 0 else x
    kind = nn.remat(Block) if self.remat == "block" else Block
    for i in range(blocks):
      x = kind(heads, self.dtype, name=f"block{i + 1}")(x)
      x = jax.lax.stop_gradient(x) if self.stage(f"block{i + 1}") <= tune_after else x
    x = nn.LayerNorm(epsilon=EPSILON, name="norm")(x)
    return x[:, 0] if self.pool == "token" else jnp.mean(x[:, 1:], axis=1)

  def stage(self, name):
    """0 for what is before the blocks, 1 to 4 for the quarters of the blocks, infinity for the LayerNorm after them."""
    if name.startswith("block"):
      return -(-4 * int(name.removeprefix("block")) // SIZES[self.size][1])
    return float("inf") if name == "norm" else 0


class Block(nn.Module):
  """x [n, tokens, d] -> the same shape: attention, then a perceptron four times as wide, each added to its input."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    n, tokens, d = x.shape
    dense = lambda features, name: nn.Dense(features, dtype=self.dtype, kernel_init=INIT, name=name)  # noqa: E731
    norm = lambda name: nn.LayerNorm(epsilon=EPSILON, name=name)  # noqa: E731
    qkv = dense(3 * d, "qkv")(norm("norm1")(x)).reshape(n, tokens, 3, self.heads, d // self.heads)
    mixed = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))  # softmax in float32
    x = x + dense(d, "proj")(mixed.reshape(n, tokens, d))
    hidden = nn.gelu(dense(4 * d, "fc1")(norm("norm2")(x)), approximate=False)
    return x + dense(d, "fc2")(hidden)


def positions(rows: int, columns: int, d: int) -> np.ndarray:
  """float32 [rows * columns, d]: sines and cosines of the column in the first half, of the row in the second.

  d/4 frequencies, from 1 to 1/10,000, as in MoCo v3.
  """
  frequencies = 10000.0 ** (-np.arange(d // 4) / (d // 4))
  y, x = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:rows, :columns])
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)
