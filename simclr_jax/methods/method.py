"""What the training step wants of a method, and what a method without a memory has already."""

from typing import Any, Protocol

Extra = Any  # a tree of arrays, part of the training state: {} for SimCLR; a target network, a queue, a memory bank


class Method(Protocol):
  """What `train_step` needs to know.  One that remembers nothing between steps defines `loss` alone.

  Attributes:
    chance_loss: the loss of uninformative embeddings, or None if no formula is known.

  A method may also have:
    predictor: a Linen module that is trained on z, (z [m, d], views [m, h, w, 3], train) -> [m, ...]; `outputs` is then
      model.Predicted.
    split: names of entries of its extra state whose rows are split over the devices, such as a memory bank.
    optimizer: (config, number of images) -> (optax transformation, schedule), in place of optimizer.create, for training
      in stages.
  """

  chance_loss: float | None = None

  def init(self, variables, outputs) -> Extra:
    """The extra state at step 0; `variables` are the network's, `outputs` the shapes of its model.Outputs."""
    return {}

  def loss(self, outputs, extra: Extra, network, batch):
    """The loss of the global batch, a pure function.

    Args:
      outputs: model.Outputs of the trained network, h and z [n, k, d]; k is 2 unless the method takes more views.
      network: variables -> (model.Outputs, batch_stats) of the same views by another network, such as a moving average.
      batch: views.Batch: labels, numbers of the images, seeds.

    Returns:
      (float32 scalar, metrics, updates): `updates` is what `after` needs.
    """

  def after(self, variables, extra: Extra, updates) -> Extra:
    """The extra state after the update that led to `variables`: moving averages, an enqueued batch."""
    return {}
