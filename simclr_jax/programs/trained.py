"""Opens trained networks: those of a run or of an exported folder, alone or with the data of their training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import data, exporting, views
from simclr_jax.evaluation import embed
from simclr_jax.methods import tsimcne
from simclr_jax.model import make_encoder, variables_of
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import same, splits
from simclr_jax.projector import Projector
from simclr_jax.runtime import checkpoint, errors, files, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Start:
  """Trained networks: their sections of a config, and variables {"params", "batch_stats"} (numpy) by name: "encoder", and
  where they are known "projector" and "classifier"; `config` is that of their training, `path` their folder."""

  encoder: config_lib.Encoder
  projector: config_lib.Projector
  variables: dict
  config: config_lib.Section
  path: str = ""

  @property
  def resize(self) -> str:
    """Interpolation of the images that the weights were trained on."""
    return self.config.augment.resize or "bicubic"

  @property
  def tap(self) -> int:
    """The layer of the head that the classifier is on."""
    return self.config.tap if isinstance(self.config, config_lib.Finetune) else 0

  def put_into(self, state, names):
    """A TrainState whose variables `names` are these networks', on the devices as its own are.

    Raises:
      ValueError: a network is not of the same shape.
    """
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    for name in names:
      found = self.variables[name]
      checkpoint.compare(found, variables_of(state, name), self.path)
      params[name] = placed_like(params[name], found["params"])
      if name in batch_stats:
        batch_stats[name] = placed_like(batch_stats[name], found["batch_stats"])
    return state.replace(params=params, batch_stats=batch_stats)


def placed_like(like, tree):
  """Copies of the arrays of a tree, on the devices as those of `like` are."""
  return jax.tree.map(lambda old, new: jax.device_put(jnp.array(new), old.sharding), like, tree)


def with_networks(config, encoder, **networks):
  """`config` with the architecture of given networks, an encoder and other sections or keys by their names.

  How the encoder computes (dtype, remat, arrangement) is no property of its weights and stays as `config` says; a function
  of your own has a dtype of its own.

  Raises:
    UserError: an encoder of this kind does not compute so.
  """
  takes = config_lib.ENCODERS.get(encoder.name, ())
  how = {key: getattr(config.encoder, key) for key in ("dtype", "remat", "arrangement")}
  plain = {"dtype": how["dtype"], "remat": "none", "arrangement": "plain"}
  how = {f"encoder.{key}": value for key, value in how.items() if key in takes or value != plain[key]}
  return config_lib.replace(config_lib.replace(config, {"encoder": encoder, **networks}), how)


def as_begun(config, workdir, keys):
  """`config` with the networks of the run in `workdir`, which has a config.start that need not be there any more.

  Args:
    keys: what the run took from its start.
  """
  if not config.start:
    return config
  kept = config_lib.from_json(checkpoint.read_config(workdir))
  if kept.program != config.program:
    return config
  return with_networks(config, **{key: functools.reduce(getattr, key.split("."), kept) for key in keys})


def open_start(path, step: int | None = None) -> Start:
  """The networks of a run's newest checkpoint, or of the one of `step`, or of a folder that `simclr export` or `simclr import` wrote.

  Raises:
    ValueError: neither.
  """
  path = files.absolute(path)
  if (path / "card.json").exists():
    if step is not None:
      raise _one_encoder(path, step)
    _, encoder, card = exporting.load_encoder(path)
    if ":" in card["architecture"]["name"]:  # a folder may come from elsewhere: nothing that it names is imported
      raise UserError(f"{path} holds a custom encoder,  {card['architecture']['name']}: give the run instead")
    config = config_lib.from_saved(card["pretraining"])
    heads = {name: checkpoint.read_tree(path / name) for name in ("projector", "classifier")}
    if card.get("format") == "safetensors":
      heads = {"projector": exporting.read_safetensors(path).get("projector")}
    variables = {"encoder": encoder, **{name: tree for name, tree in heads.items() if tree}}
    return Start(
      config_lib.build(config_lib.Encoder, card["architecture"]), config.projector, variables, config, str(path)
    )
  config = config_lib.from_json(checkpoint.read_config(path, flag=""))
  _, state = checkpoint.read_run_state(path, step, flag="")
  variables = {
    name: {"params": params, "batch_stats": state["batch_stats"].get(name, {})}
    for name, params in state["params"].items()
  }
  return Start(config.encoder, config.projector, variables, config, str(path))


def _one_encoder(path, step) -> UserError:
  return UserError(f"--step={step}: {path} holds one encoder; a run of pretraining has several")


def exported(path):
  """The folder of the exported encoder that `path` is or, for a run of fine-tuning, holds; None for a run of pretraining."""
  path = files.absolute(path)
  if (path / "card.json").exists():
    return path
  if (path / "encoder/card.json").exists() and (path / "config.json").exists():
    made_by = config_lib.from_json(checkpoint.read_config(path)).program
    return None if made_by == "pretrain" else path / "encoder"
  return None


def where_encoder_is(workdir, config) -> str:
  """What to give instead of a run in `workdir` that is not of pretraining, for a message; `config` is the run's."""
  folder = files.absolute(workdir)
  if config.program == "transfer":
    return f"it scores the encoder of {config.start}: give that"
  if config.program == "downstream":
    return f"give a run that it consists of, such as {folder / f'seed{config.seeds[0]}' / 'pretrain'}"
  return f"its encoder is in {folder / 'encoder'} when it is done: give that"


def _for_evaluation(config, overrides):
  """The config of an encoder's training, with overrides, as one of pretraining, which says how kNN and probes score."""
  if isinstance(config, config_lib.Pretrain):
    return config_lib.override(config, overrides)
  values = {
    **{name: config_lib.to_dict(getattr(config, name)) for name in ("data", "encoder") if hasattr(config, name)},
    "augment": {
      **{key: config.augment[key] for key in views.CROP if hasattr(config.augment, key)},
      "resize": config.augment.resize or "bicubic",
    },
    "evaluate": {"crop": config.evaluate.crop, "batch_size": config.evaluate.batch_size},
    # Nothing is trained by them.
    **{"batch_size": 256, "train_steps": 1, "optimizer": {"base_lr": 1.0}},
  }
  changes = config_lib.parse(overrides)
  return config_lib.build(config_lib.Pretrain, config_lib.merge(values, changes, config_lib.Pretrain))


def open_data(config, workdir, training):
  """`splits.open_data` for `config`, by which the encoder of a run or an export in `workdir` is scored.

  Args:
    training: the config of its training.

  Raises:
    UserError: as there and for `check_unseen`.
  """
  train, test = splits.open_data(config.data)
  if test is not train:
    check_unseen(config.data, test, workdir, training)
  return train, test


def check_unseen(section, test, workdir, training):
  """Checks that the encoder of a run or an export in `workdir` has not seen the images that are to score it.

  Args:
    section: the section `data` by which they are chosen; test: they.
    training: the config of the encoder's training.

  Raises:
    UserError: it has, because its training held out fewer, or others of data that has changed since, or because they are
      images of another set that it was trained on.
  """
  own = getattr(training, "data", None)
  if own is None:
    return
  if not splits.are_one(section.train, own.train):
    what = f"data.test={section.test}" if section.test else f"data.train={section.train}, of which a part is held out"
    check_apart(test, what, "--config.data.test=...", section.data_dir, workdir, training)
    return
  if section.test:  # `splits.open_data` has found it apart from the images of training
    return
  held_out = 0.0 if own.test else own.held_out
  if section.held_out > held_out:
    raise UserError(
      f"data.held_out={section.held_out:g}: the training of {workdir} held out {held_out:g}, so it saw some of the images "
      "to score; name others with --config.data.test=..."
    )
  if section.held_out < held_out:  # these are among those that training held out
    _, test_of_training = splits.open_data(dataclasses.replace(section, held_out=held_out))
  else:
    test_of_training = test
  same.check_held_out(workdir, test_of_training)


def check_apart(test, what: str, key: str, data_dir: str, workdir, training):
  """Checks that the training of the run or export in `workdir` has not seen images of a set, as far as the set that it was
  trained on is still there and it is known where their images lie.  Nothing is opened that cannot share images.

  Args:
    test: the images, which `what` names; key: the key that names others.
    data_dir: where prepared TensorFlow Datasets are now.
    training: the config of the encoder's training.

  Raises:
    UserError: it has.
  """
  own = getattr(training, "data", None)
  places = test.places() if own else {}
  places = {place: found for place, found in places.items() if splits.may_hold(own.train, place)}
  if not places:
    return
  own = dataclasses.replace(own, data_dir=data_dir or own.data_dir)
  try:
    source = data.open_source(own.train, data_dir=own.data_dir or None)
    seen = source if own.test else splits.open_data(own, source)[0]
  except UserError:  # it is gone, or is not what it was
    return
  if type(training) is config_lib.Finetune:  # which left out the other images
    if training.labels.list or not seen.num_classes:  # nothing says which, if the file has been edited
      return
    seen = data.Selection(seen, data.class_balanced(seen.labels, training.labels.fraction, training.labels.seed))
  shared = splits.count_shared(seen, places)
  count = same.images_of_training(workdir)
  if shared and count and count != len(seen):
    if not jax.process_index():
      print(
        f"note        data.train={own.train} has changed since {workdir} was trained on it: scores are right only if it has "
        f"not seen images of {what}"
      )
  elif shared:
    raise UserError(
      f"{what}: {shared:,} of the {len(test):,} images to score are in {own.train}, which {workdir} was trained on; name "
      f"others with {key}, or where nothing has to be scored give --config.data.held_out=0.0"
    )


def read_encoder(workdir, config, step: int | None = None, flag: str = "--workdir="):
  """(step, variables of f) of a run's newest checkpoint, or of the one of `step`; `config` is the run's, `flag` as in
  read_config."""
  init = functools.partial(make_encoder(config.encoder.name, **config.encoder).init, train=False)
  like = jax.eval_shape(init, jax.random.key(0), _image(config))
  return checkpoint.read_run_export(workdir, "encoder", like, step, flag)


def _image(config):
  return jnp.zeros((1, config.augment.size, config.augment.size, 3))


def own_network(workdir):
  """The module of a run's own encoder, which its config names as module:function; None for the encoders of this package."""
  name = config_lib.from_json(checkpoint.read_config(workdir)).encoder.name
  return make_encoder(name) if ":" in name else None


class TrainedRun:
  """A pretraining run, finished or interrupted, or an exported encoder, opened for evaluation: its config, encoder and data.

  Raises:
    ValueError: neither is in the folder, no such checkpoint, or an override that does not fit.
  """

  @errors.of_the_user()
  def __init__(self, workdir, *, step: int | None = None, overrides=()):
    self.workdir = files.absolute(workdir)
    self.mesh = mesh_lib.make_mesh()
    self._exported = exported(workdir)
    if self._exported:
      if step is not None:
        raise _one_encoder(self._exported, step)
      _, self.variables, card = exporting.load_encoder(
        self._exported, None if self._exported == self.workdir else own_network(workdir)
      )
      self.step = card.get("step", 0)
      training = config_lib.from_saved(card["pretraining"])
      self.config = _for_evaluation(training, overrides)
    else:
      training = config_lib.from_json(checkpoint.read_config(workdir))
      self.config = config_lib.override(training, overrides)
      made_by = self.config.program
      if made_by != "pretrain":
        raise UserError(f"--workdir={workdir} is a run of simclr {made_by}: {where_encoder_is(workdir, training)}")
      self.step, self.variables = read_encoder(workdir, self.config, step)
    self.encoder = make_encoder(self.config.encoder.name, **self.config.encoder)
    apply = functools.partial(self.encoder.apply, train=False)
    jax.eval_shape(apply, self.variables, _image(self.config))  # says at once which sizes it does not take
    self.train_source, self.test_source = open_data(self.config, self.workdir, training)
    if processes.is_multiprocess():
      same.agree({"data.train": self.train_source.fingerprint(), "data.test": self.test_source.fingerprint()})
    self._encode = jax.jit(apply)

  def results(self, name: str):
    """Where a program writes its results: in the folder of a run, but next to the folder of an export, which is not changed."""
    folder = files.absolute(self.workdir)
    return folder.with_name(f"{folder.name}.{name}") if self._exported == self.workdir else folder / name

  def h(self, source):
    """(h float32 [n, d], labels int32 [n]) of all readable labeled images of a source, BatchNorm in inference mode."""
    images = embed.eval_set(source, self.config, self.mesh, labeled=True)
    return self.encode(images), images.labels()

  def on_the_map(self, h):
    """float32 [n, 2]: the points in the plane at which a run of t-SimCNE places h [n, d] of any images.

    Raises:
      UserError: the run is of another method.
    """
    if self.config.method != "tsimcne":
      raise UserError(
        f"--method=tsimcne: {self.workdir} is a run of config.method={self.config.method}: expected one with"
        " config.method=tsimcne, such as from configs/tsimcne.py; or leave out --method"
      )
    if self._exported:
      raise UserError(f"--method=tsimcne: {self.workdir} holds the encoder alone: give the folder of the run")
    _, state = checkpoint.read_run_state(self.workdir, self.step)
    of = lambda name: {part: state[part].get(name, {}) for part in ("params", "batch_stats")}  # noqa: E731
    z = Projector(**self.config.projector).apply(of("projector"), h)
    return np.asarray(tsimcne.Plane().apply(of("predictor"), z)[:, 0])

  def encode(self, images: embed.EvalSet):
    """h float32 [n, d] of the readable images of a set."""
    return embed.embed(self._encode, self.variables, images, self.mesh)
