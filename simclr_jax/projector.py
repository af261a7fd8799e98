"""The projection head g: z = g(h), on which the contrastive loss acts and which is discarded after pretraining.

SimCLR (arXiv 2002.05709, section 4.2) uses two layers, SimCLRv2 (arXiv 2006.10029, section 2) three and fine-tunes
from the output of the first.  As in the official code (tf2/model.py), every layer, including the last, is a Dense without
bias followed by BatchNorm; hidden layers are as wide as h and end in a ReLU.
"""

import flax.linen as nn
import jax.numpy as jnp

KINDS = ("none", "linear", "nonlinear")
BN_MOMENTUM = 0.9


class BatchNorm(nn.BatchNorm):
  """Flax's, which in inference mode leaves `mean` and `square` of x in "batch_moments" where that is mutable."""

  def __call__(self, x):
    if self.use_running_average and self.is_mutable_collection("batch_moments") and not self.is_initializing():
      self.put_variable("batch_moments", "mean", jnp.mean(x, 0))
      self.put_variable("batch_moments", "square", jnp.mean(jnp.square(x), 0))
    return super().__call__(x)


class Projector(nn.Module):
  """Maps representations h [n, d] to projections z float32 [n, out_dim], or to what `tap` selects.

  Attributes:
    layers: number of layers of the nonlinear head, including the last: 2 in SimCLR, 3 in SimCLRv2.  Other kinds ignore it.
    out_dim: the width of z.
    kind: "nonlinear"; "linear", which is only its last layer; or "none", z = h.  Figure 8 of arXiv 2002.05709.

  `tap=k` returns element k of [h, layer 0 after its ReLU, ..., z]; a negative k counts from the end.  Initialization also
  computes the layers past the tap, so that the parameters do not depend on it.

  Raises ValueError, in one line, for any other value.
  """

  layers: int = 3
  out_dim: int = 128
  kind: str = "nonlinear"

  @nn.compact
  def __call__(self, h, train=False, tap=None):
    if self.kind not in KINDS:
      raise ValueError(f"projector kind {self.kind!r}: expected one of {', '.join(KINDS)}")
    if self.layers < 1 or self.out_dim < 1:
      raise ValueError(f"projector layers={self.layers}, out_dim={self.out_dim}: expected 1 or more of each")
    layers = {"none": 0, "linear": 1, "nonlinear": self.layers}[self.kind]
    if tap is not None and not -layers - 1 <= tap <= layers:
      raise ValueError(f"projector tap {tap}: expected 0 (h) to {layers} (z)")
    h = h.astype(jnp.float32)
    outputs = [h]
    for i in range(layers):
      last = i == layers - 1
      z = nn.Dense(
        self.out_dim if last else h.shape[-1],
        use_bias=False,
        kernel_init=nn.initializers.normal(0.01),
        name=f"dense{i}",
      )(outputs[-1])
      z = BatchNorm(not train, momentum=BN_MOMENTUM, epsilon=1e-5, use_bias=not last, name=f"norm{i}")(z)
      outputs.append(z if last else nn.relu(z))
    return outputs[-1 if tap is None else tap]


class Predictor(nn.Module):
  """The predictor q of BYOL and MoCo v3, on top of the projection head: z [m, d] -> prediction float32 [m, d].

  A hidden layer with BatchNorm and ReLU, and a linear one whose output is not normalized (BYOL, arXiv 2006.07733,
  section 3.3).

  Attributes:
    hidden: width of the hidden layer.
  """

  hidden: int = 4096

  @nn.compact
  def __call__(self, z, views=None, train=False):
    """`views` is what z is of, which this module does not look at."""
    width = z.shape[-1]
    z = nn.Dense(self.hidden, use_bias=False, name="dense0")(z)
    z = BatchNorm(not train, momentum=BN_MOMENTUM, epsilon=1e-5, name="norm0")(z)
    return nn.Dense(width, name="dense1")(nn.relu(z))
