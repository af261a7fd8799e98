"""Self-supervised methods: what a paper adds to the training step, one short file each.

A new method is a file with a `create` and a line in METHODS; step, loop, checkpoint and export do not change.
CONTRIBUTING.md lists what else it needs: a recipe, a row of docs/methods.md and, for options, a section of the config.
"""

from typing import Any, Protocol

from simclr_jax.methods import (
  alignment,
  autoencoder,
  byol,
  controls,
  instdisc,
  memory,
  moco,
  moco_v3,
  simclr,
  supcon,
  tsimcne,
)

Extra = Any  # a tree of arrays, part of the training state: {} for SimCLR; a target network, a queue, a memory bank


class Method(Protocol):
  """What `train_step` needs to know.

  Attributes:
    chance_loss: the loss of uninformative embeddings, or None if no formula is known.

  A method may also have:
    predictor: a Linen module that is trained on z, (z [m, d], views [m, h, w, 3], train) -> [m, ...]; `outputs` is then
      model.Predicted.
    split: names of entries of its extra state whose rows are split over the devices, such as a memory bank.
    optimizer: (config, number of images) -> (optax transformation, schedule), in place of optimizer.create, for training
      in stages.
  """

  chance_loss: float | None

  def init(self, variables, outputs) -> Extra:
    """The extra state at step 0; `variables` are the network's, `outputs` the shapes of its model.Outputs."""

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


# (config, mesh, data source or None) -> Method
METHODS = {
  "simclr": simclr.create,
  "memory": memory.create,
  "moco": moco.create,
  "moco_v3": moco_v3.create,
  "byol": byol.create,
  "instdisc": instdisc.create,
  "supcon": supcon.create,
  "autoencoder": autoencoder.create,
  "alignment": alignment.create,
  "tsimcne": tsimcne.create,
  "supervised": controls.supervised,
  "oracle": controls.oracle,
}


# The values of config.loss that methods with a loss of their own agree with, and what some of them read.  The scale of
# NT-Xent, config.loss.reduction, is not among them: recipes of SimCLR state it, and another method is one option away.
PLAIN_LOSS = {
  "name": ("nt_xent",),
  "normalize": (None, True),
  **dict.fromkeys(("tile", "margin", "class_prior", "semi_hard"), (None,)),
}
READ = {"supcon": ("normalize",), "oracle": ("normalize",)}


def create(config, mesh, source=None) -> Method:
  """The method of a config.

  Args:
    source: the training images; some methods need their number or labels: `len`, `num_classes`.

  Raises:
    ValueError: no such method, or it refuses an option or the data.
  """
  if config.method not in METHODS:
    raise ValueError(f"config.method={config.method!r}: expected one of {', '.join(METHODS)}")
  own = config.method not in ("simclr", "memory")
  for key, plain in PLAIN_LOSS.items():
    if own and config.loss[key] not in plain and key not in READ.get(config.method, ()):
      raise ValueError(
        f"config.loss.{key}={config.loss[key]}: config.method={config.method!r} has its own loss; leave it out"
      )
  views = config.augment.views
  if views != 2 and (config.method, config.loss.name) != ("simclr", "nt_xent"):
    which = f"config.method={config.method!r}" + f" with config.loss.name={config.loss.name}" * (
      config.method == "simclr"
    )
    raise ValueError(f"config.augment.views={views}: {which} is for 2 views; more are for simclr with nt_xent")
  return METHODS[config.method](config, mesh, source)
