"""SimCLR = encoder f + projection head g, with a linear classifier that watches h without touching it."""

import importlib
import typing
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from simclr_jax import encoder, encoder_tpu, vit
from simclr_jax.projector import Projector

ENCODERS = {"resnet": encoder.resnet, "vit": vit.vit}
ARRANGEMENTS = {"plain": encoder.resnet, "packed": encoder_tpu.resnet}  # of a ResNet


@flax.struct.dataclass
class TrainState:
  """Everything that training changes, and nothing else."""

  step: jax.Array  # int32 [], number of updates done
  params: dict
  batch_stats: dict  # BatchNorm running means and variances, f32
  opt_state: tuple
  extra: Any = flax.struct.field(default_factory=dict)  # what the method remembers: see methods/

  @property
  def variables(self) -> dict:
    return {"params": self.params, "batch_stats": self.batch_stats}


class Outputs(NamedTuple):
  """The outputs of SimCLR for k views of each of n images, all float32; k is 2 unless augment.views says more."""

  h: jax.Array  # [n, k, d]
  z: jax.Array  # [n, k, out_dim]
  logits: jax.Array | None  # [n, k, num_classes] of the online classifier; None without labels


class SimCLR(nn.Module):
  """views x [n, k, height, width, 3] -> h, z and the online classifier's logits.

  Attributes:
    encoder: f, maps [m, height, width, 3] to h [m, d].
    projector: g, maps h to z [m, out_dim].
    num_classes: size of the online classifier on stop_gradient(h); 0 for none (no labels).

  Source: v1 paper section 2.1, Algorithm 1; the online classifier is the official run.py
  --lineareval_while_pretraining.
  """

  encoder: nn.Module
  projector: nn.Module
  num_classes: int = 0

  def setup(self):
    if self.num_classes:
      # N(0, 0.01) kernel and zero bias: official model.py SupervisedHead / resnet.py LinearLayer.
      self.classifier = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

  def __call__(self, views, train: bool = False):
    """views [n, k, height, width, 3] -> Outputs.

    The views of an image stay neighbors all the way: folding [n, k, ...] to [n k, ...] is a reshape, which moves nothing
    between devices, whereas concatenating all first views with all second ones would move images.
    """
    n, k = views.shape[:2]
    h = self.encoder(views.reshape(n * k, *views.shape[2:]), train=train)
    z = self.projector(h, train=train)
    logits = self.classifier(jax.lax.stop_gradient(h)).reshape(n, k, -1) if self.num_classes else None
    return Outputs(h.reshape(n, k, -1), z.reshape(n, k, -1), logits)


class Predicted(NamedTuple):
  """Outputs, and the method's own module applied to z."""

  h: jax.Array
  z: jax.Array
  logits: jax.Array | None
  prediction: jax.Array  # float32 [n, k, ...]


class WithPredictor(SimCLR):
  """SimCLR with one more module, which a method trains on z: the predictor of BYOL, the decoder of an autoencoder.

  Its variables are "predictor"; neither evaluation nor an export sees it.

  Attributes:
    predictor: q, maps z [m, out_dim] and the views [m, height, width, 3] from which z was computed to a prediction [m, ...].
  """

  predictor: nn.Module | None = None

  def __call__(self, views, train: bool = False):
    """views [n, k, height, width, 3] -> Predicted."""
    outputs = super().__call__(views, train)
    n, k = views.shape[:2]
    z = outputs.z.reshape(n * k, -1)
    prediction = self.predictor(z, views.reshape(n * k, *views.shape[2:]), train=train)
    return Predicted(*outputs, prediction.reshape(n, k, *prediction.shape[1:]))


class Classifier(nn.Module):
  """Images -> logits: the encoder, the projection head up to layer `tap`, and a linear layer on top.

  Attributes:
    tap: the layer of the head to classify from: 0 for h itself (SimCLR), 1 for the output of the first layer, from which
      SimCLRv2 fine-tunes (arXiv 2006.10029, section 2.2).
    projector: not needed for tap 0.
  """

  encoder: nn.Module
  num_classes: int
  projector: nn.Module | None = None
  tap: int = 0

  def setup(self):
    self.classifier = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

  def __call__(self, x, train: bool = False, tune_after: int = -1):
    """x [n, h, w, 3] -> logits float32 [n, num_classes]; `tune_after` as in encoder.resnet."""
    h = self.encoder(x, train=train, **({"tune_after": tune_after} if tune_after >= 0 else {}))
    return self.classifier(self.projector(h, train=train, tap=self.tap) if self.tap else h)


def make_encoder(name: str = "resnet", *, arrangement: str = "plain", **arguments) -> nn.Module:
  """The encoder f, a module as encoder.py describes it.

  Args:
    name: a key of ENCODERS, whose function gets the arguments; or "module:function", which is imported and called
      without arguments: a Linen module, or a function annotated to return one, whose `__call__(x, train)` returns h.
    arrangement: of a ResNet: "plain" as in the paper, or "packed" for a TPU, with the same parameters and numbers.

  Raises:
    ValueError: no such encoder or arrangement, or an invalid argument.
  """
  if ":" in name:
    return _of_the_user(name)
  if name not in ENCODERS:
    raise ValueError(f"encoder {name!r}: expected one of {', '.join(ENCODERS)}, or module:function")
  if arrangement not in ARRANGEMENTS:
    raise ValueError(f"encoder arrangement {arrangement!r}: expected one of {', '.join(ARRANGEMENTS)}")
  return (ARRANGEMENTS[arrangement] if name == "resnet" else ENCODERS[name])(**arguments)


def _of_the_user(name: str) -> nn.Module:
  module, _, function = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"encoder {name!r}: {error}; expected module:function, on the Python path") from None
  # A config may come from elsewhere, so that nothing is called but what says of itself that it makes a network.
  returns = found if isinstance(found, type) else typing.get_type_hints(found).get("return")
  if not (isinstance(returns, type) and issubclass(returns, nn.Module)):
    raise ValueError(f"encoder {name!r}: expected a Linen module, or a function annotated with -> flax.linen.Module")
  return found()


def create(config, num_classes: int = 0, predictor: nn.Module | None = None) -> SimCLR:
  """The model of a config: `config.encoder` goes to `make_encoder`, `config.projector` to `Projector`.

  Args:
    predictor: the module of a method that has one, see `WithPredictor`; only needed in training.
  """
  encoder = make_encoder(config.encoder.name, arrangement=config.encoder.arrangement, **config.encoder)
  parts = dict(encoder=encoder, projector=Projector(**config.projector), num_classes=num_classes)
  return SimCLR(**parts) if predictor is None else WithPredictor(**parts, predictor=predictor)


def cross_entropy(logits, label):
  """(loss, accuracy): means over the images with a label and their views.

  Args:
    logits: [n, views, classes].
    label: int32 [n], -1 for images without a label.
  """
  y = jnp.maximum(label, 0)[:, None]  # all views of an image have its label
  known = label >= 0
  weight = known[:, None] / (logits.shape[1] * jnp.maximum(known.sum(), 1))
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(y, logits.shape[:2]))
  return jnp.sum(weight * losses), jnp.sum(weight * (logits.argmax(-1) == y))


def variables_of(state: TrainState, name: str) -> dict:
  """Variables {"params", "batch_stats"} of one submodule: "encoder", "projector", "classifier" or "predictor"."""
  return {"params": state.params.get(name, {}), "batch_stats": state.batch_stats.get(name, {})}


def keep_encoder(state: TrainState) -> dict:
  """The result of pretraining: the variables of f.  g, the classifier and a predictor are discarded."""
  return variables_of(state, "encoder")
