"""Opening what was trained: the networks of a run or of an exported folder, and a pretraining run with its data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from simclr_jax import exporting
from simclr_jax.encoder import resnet
from simclr_jax.evaluation import embed
from simclr_jax.methods import tsimcne
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import splits
from simclr_jax.projector import Projector
from simclr_jax.runtime import checkpoint
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Start:
  """Trained networks: their sections of a config, and variables {"params", "batch_stats"} (numpy) by name: "encoder", and
  where they are known "projector" and "classifier"; `config` is that of their training."""

  encoder: config_lib.Encoder
  projector: config_lib.Projector
  variables: dict
  config: config_lib.Section

  @property
  def resize(self) -> str:
    """Interpolation of the images that the weights were trained on."""
    return self.config.augment.resize or "bicubic"

  @property
  def tap(self) -> int:
    """The layer of the head that the classifier is on."""
    return self.config.tap if isinstance(self.config, config_lib.Finetune) else 0


def open_start(path, step: int | None = None) -> Start:
  """The networks of a run's newest checkpoint, or of the one of `step`, or of a folder that `simclr export` or `simclr import` wrote.

  Raises:
    ValueError: neither.
  """
  path = epath.Path(path)
  if (path / "card.json").exists():
    _, encoder, card = exporting.load_encoder(path)
    config = config_lib.from_dict(card["pretraining"])
    heads = {name: checkpoint.read_tree(path / name) for name in ("projector", "classifier")}
    architecture = {key: value for key, value in card["architecture"].items() if key != "name"}
    variables = {"encoder": encoder, **{name: tree for name, tree in heads.items() if tree}}
    return Start(config_lib.build(config_lib.Encoder, architecture), config.projector, variables, config)
  config = config_lib.from_json(checkpoint.read_config(path))
  _, state = checkpoint.read_run_state(path, step)
  variables = {
    name: {"params": params, "batch_stats": state["batch_stats"].get(name, {})}
    for name, params in state["params"].items()
  }
  return Start(config.encoder, config.projector, variables, config)


class TrainedRun:
  """A finished (or interrupted) pretraining run, opened for evaluation: its config, its encoder, its data.

  Raises:
    ValueError: no run or no such checkpoint in the folder, or an override that does not fit.
  """

  def __init__(self, workdir, *, step: int | None = None, overrides=()):
    self.workdir = epath.Path(workdir)
    self.config = config_lib.override(config_lib.from_json(checkpoint.read_config(workdir)), overrides)
    made_by = config_lib.program(self.config)
    if made_by != "pretrain":
      raise UserError(
        f"--workdir={workdir} is a run of simclr {made_by}: its encoder is in {self.workdir / 'encoder'}; score that "
        "with simclr transfer"
      )
    self.mesh = mesh_lib.make_mesh()
    self.encoder = resnet(**self.config.encoder)
    size = self.config.augment.size
    like = jax.eval_shape(self.encoder.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    self.step, self.variables = checkpoint.read_run_export(workdir, "encoder", like, step)
    self.train_source, self.test_source = splits.open_data(self.config.data)
    self._encode = jax.jit(functools.partial(self.encoder.apply, train=False))

  def h(self, source):
    """(h float32 [n, d], labels int32 [n]) of all readable labeled images of a source, BatchNorm in inference mode."""
    images = embed.eval_set(source, self.config, self.mesh, labeled=True)
    return self.encode(images), images.labels()

  def on_the_map(self, h):
    """float32 [n, 2]: the points in the plane at which a run of t-SimCNE places h [n, d], whatever images it is of.

    Raises:
      UserError: the run is of another method.
    """
    if self.config.method != "tsimcne":
      raise UserError(
        f"--method=tsimcne: {self.workdir} is a run of config.method={self.config.method}: expected one of tsimcne, such as"
        " of configs/tsimcne.py; or leave --method out"
      )
    _, state = checkpoint.read_run_state(self.workdir, self.step)
    of = lambda name: {"params": state["params"][name], "batch_stats": state["batch_stats"].get(name, {})}  # noqa: E731
    z = Projector(**self.config.projector).apply(of("projector"), h)
    return np.asarray(tsimcne.Plane().apply(of("predictor"), z)[:, 0])

  def encode(self, images: embed.EvalSet):
    """h float32 [n, d] of the readable images of a set."""
    return embed.embed(self._encode, self.variables, images, self.mesh)
