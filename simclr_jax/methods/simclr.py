"""SimCLR (arXiv 2002.05709): a contrastive loss on the two views of every image, and nothing to remember."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

from simclr_jax import contrast
from simclr_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class SimCLR(Method):
  """`contrastive` is (z [n, k, d]) -> (scalar, metrics)."""

  contrastive: Callable
  chance_loss: float | None = None

  def loss(self, outputs, extra, network, batch):
    loss, metrics = self.contrastive(outputs.z)
    return loss, metrics, {}


def create(config, mesh, source=None) -> SimCLR:
  """SimCLR with the loss of a config: NT-Xent unless `config.loss.name` says otherwise."""
  return SimCLR(loss_function(config, mesh), chance_loss(config))


def loss_function(config, mesh):
  """(z [n, k, d]) -> (loss, metrics): the one of contrast.LOSSES that `config.loss.name` says.

  Raises:
    ValueError: an option that the loss does not take, or a missing one that it needs.
  """
  name = config.loss.name
  options = check_options(config, contrast.LOSSES[name], ("z", "mesh"))
  mesh = {"mesh": mesh} if name == "nt_xent" else {}
  return functools.partial(contrast.LOSSES[name], **mesh, **options)


def check_options(config, loss: Callable, given) -> dict:
  """`config.loss` as arguments of `loss`, without those that the method gives it.

  Raises:
    ValueError: an option that the loss does not take, or a missing one that it needs.
  """
  options = dict(config.loss)
  accepted = {k: p for k, p in inspect.signature(loss).parameters.items() if k not in given}
  unknown = [key for key in options if key not in accepted]
  missing = [key for key, p in accepted.items() if p.default is p.empty and key not in options]
  if unknown or missing:
    mistake = f"{unknown[0]}: no such option" if unknown else f"{missing[0]} is missing"
    raise ValueError(f"config.loss.{mistake}; {config.loss.name} takes {', '.join(accepted)}")
  return options


def temperature(config) -> float:
  """`config.loss.temperature`, for methods whose loss is not one of contrast.LOSSES.

  Raises:
    ValueError: it is not given.
  """
  if config.loss.temperature is None:
    raise ValueError(f"config.loss.temperature is missing: config.method={config.method!r} needs one, such as 0.2")
  return config.loss.temperature


def precision(config) -> str:
  """`config.loss.precision` of the products of embeddings, for the same methods."""
  return config.loss.precision or "highest"


def chance_loss(config, remembered: int = 0) -> float | None:
  """NT-Xent of uninformative embeddings: ln(2n - 1 + the number of `remembered` negatives), twice that for the official sum;
  None for other losses."""
  if config.loss.name != "nt_xent":
    return None
  return contrast.REDUCTIONS[config.loss.reduction or "mean"] * math.log(2 * config.batch_size - 1 + remembered)
