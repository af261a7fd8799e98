"""Self-supervised methods: what a paper adds to the training step, one short file each.

A new method is a file with a `create` and a line in METHODS; step, loop, checkpoint and export do not change.
CONTRIBUTING.md lists what else it needs: a recipe, a row of docs/methods.md and, for options, a section of the config.
"""

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
from simclr_jax.methods.method import Method

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
