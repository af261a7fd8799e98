"""The images that a program trains on and those that it scores: never the same ones."""

import fnmatch
import os
import re

import numpy as np

from simclr_jax import data
from simclr_jax.programs import workdir
from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

SEED = 0  # of the held-out images; not the run's seed, so that runs are scored alike


def open_data(section, train=None):
  """(training images, images to score) that the section `data` of a config names; `train` are those of section.train, where
  they are open already.

  Without `data.test`, the fraction `data.held_out` of every class is held out of labeled training images, the same ones
  for every run.  If there is nothing to score, the training images are returned twice, for what needs no labels:
  diagnostics, neighbors and the map.

  Raises:
    UserError: there are test classes that training does not know.
  """
  train = _open(section.train, section) if train is None else train
  if section.test and are_one(section.train, section.test):
    return train, train
  if section.test:
    test = _open(section.test, section)
    if len(train) == len(test) and train.fingerprint() == test.fingerprint():  # under another name or path
      return train, train
    check_apart(train, f"data.train={section.train}", test, f"data.test={section.test}")
    return train, data.align(train, test, what=f"data.test={section.test}")
  if not train.num_classes or not section.held_out:
    return train, train
  held_out = hold_out(train.labels, section.held_out)
  if not len(held_out):
    return train, train
  rest = np.setdiff1d(np.arange(len(train)), held_out)
  return data.Selection(train, rest), data.Selection(train, held_out)


def check_apart(train, name: str, test, name_of_test: str):
  """Raises UserError if some images are in both sets, as far as it is known where they lie."""
  of_test = test.places()
  shared = count_shared(train, of_test) if of_test else 0
  if shared:
    raise UserError(
      f"{name_of_test} has {shared:,} images of {name}: name sets that do not overlap, such as train[:90%] and train[90%:]"
    )


def count_shared(train, of_test: dict) -> int:
  """How many images of a source lie at `places` of another one; takes a second for a million files."""
  places = train.places()
  sets = ((set(places[path].tolist()), of_test[path].tolist()) for path in places.keys() & of_test.keys())
  return sum(len(one.intersection(other)) for one, other in sets)  # no sorting, which takes seconds for names


def may_hold(spec: str, place: str) -> bool:
  """Whether images that lie at a key of `Source.places` may be of the set `spec`, as far as its name tells; asks no bucket."""
  kind, _, rest = spec.partition(":")
  if kind == "npz" and files.is_remote(rest):  # FILE or FILE:SPLIT
    return place in (rest, f"{rest}:")
  kind, path, split = _place(spec)
  if kind == "tfds":  # whose files are called SET-SPLIT.tfrecord-00000-of-00001
    names = {name.strip() for name in re.split(r"\[[^]]*\]|\+", split)} - {""}
    found = os.path.basename(place)
    return any(found.startswith(f"{path.partition('/')[0]}-{'' if name == 'all' else f'{name}.'}") for name in names)
  if kind in data.EMBEDDED or kind == "npz":
    return place == (data.place_of_npz(path, split) if kind == "npz" else f"{kind}:{path}")
  if kind in ("folder", "files"):
    return f"{place}/".startswith(f"{path.rstrip('/')}/")
  return place == path or os.path.dirname(place) == path or fnmatch.fnmatchcase(place, path)


def check_labeled(section, train, test):
  """Checks what `open_data` returned, for a program that needs labels.

  Raises:
    UserError: there are no labels, or no images to score, or these are the training images.
  """
  if test is train and section.test:
    raise UserError(
      f"data.test={section.test} is data.train: a set that is scored against itself looks better than it is; name "
      "another with --config.data.test=..."
    )
  if not train.num_classes:
    raise UserError(
      f"data.train={section.train} has no labels, and scores need them; name labeled sets with --config.data.train=... "
      "--config.data.test=..."
    )
  if test is train:
    raise UserError(
      f"data.train={section.train}, data.held_out={section.held_out:g}: no images are left to score; name others with "
      "--config.data.test=..., or hold out more of every class with --config.data.held_out=0.1"
    )
  return train, test


def describe(section, test) -> str:
  """The scored images in a few words."""
  return section.test or f"{len(test):,} images held out of {section.train}"


def nothing_is_scored(section) -> str:
  """Why labeled images are not scored, where `open_data` returned them twice."""
  cause = f"data.test={section.test} is data.train" if section.test else "no images are held out of training"
  return f"nothing, because {cause}; see data.test and data.held_out"


def title(spec: str) -> str:
  """The name of a data set in a heading: cifar10 for npz:/data/cifar10.npz:train, images for folder:/my/images."""
  kind, _, rest = spec.partition(":")
  if kind in data.EMBEDDED:
    return kind
  name = rest.partition("/")[0] if kind == "tfds" else os.path.basename(rest.rstrip("/"))
  return name.partition(":")[0].removesuffix(".npz") or kind


def hold_out(labels, fraction: float) -> np.ndarray:
  """Sorted indices of a fraction of every class of labels [n] (-1: none), of which at least one image stays."""
  return data.class_balanced(labels, fraction, SEED, leave=1)


def _open(spec, section):
  return data.open_source(spec, data_dir=section.data_dir or None)


def are_one(a: str, b: str) -> bool:
  """Whether two specs name the same data set, however they spell its path."""
  return _place(a) == _place(b)


def _place(spec: str) -> tuple[str, str, str]:
  """(kind, name or path, split) of a spec, spelled in one way."""
  kind, _, rest = spec.partition(":")
  if kind == "tfds":
    name, _, split = rest.partition(":")
    return kind, name, split or "train"
  path, split = data.split_npz(rest) if kind == "npz" else (rest, "")
  is_here = kind in workdir.ON_DISK and not files.is_remote(path)
  return kind, os.path.realpath(os.path.expanduser(path)) if is_here else path.rstrip("/"), split
