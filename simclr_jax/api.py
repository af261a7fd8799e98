"""SimCLR from a notebook: takes arrays, returns arrays and plain trees.

`simclr_jax.pretrain(...)`, `simclr_jax.embed(...)` and `simclr_jax.probe(...)` are these functions.
"""

import difflib
import functools
import inspect
import io
import os
import re
from typing import Any

import numpy as np

from simclr_jax import data
from simclr_jax.evaluation import embed as embed_lib
from simclr_jax.evaluation import linear
from simclr_jax.exporting import Encoder, image_check, load_encoder
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import pretrain as program
from simclr_jax.programs import same, trained
from simclr_jax.runtime import files, lock
from simclr_jax.runtime.errors import UserError

MARK = "saved_by_simclr_jax"  # an empty array in the files that `pretrain` writes, which it may replace


def _in_python(function):
  """Errors of a function that this decorates speak of arguments, where those of a command speak of flags; a misspelled
  argument gets the nearest name."""
  names = inspect.signature(function).parameters
  takes_keys = any(one.kind is one.VAR_KEYWORD for one in names.values())

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    rows = config_lib.describe(config_lib.Pretrain) if takes_keys else ()
    keys = {name for row in rows for name in (row.key, row.key.rpartition(".")[0])}
    for name in kwargs.keys() - names.keys() - keys:
      near = difflib.get_close_matches(name, names, n=1)
      if near or not takes_keys:  # else the config says which key is meant
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
        raise TypeError(f"{function.__name__}() has no argument {name}: {hint}")
    try:
      return function(*args, **kwargs)
    except UserError as error:
      message = re.sub(r"(?<![\w/])(--)?config\.(?!json)(?=\w)", "", str(error))
      message = re.sub(r"(?<![\w/])--(resume|overwrite)\b", r"\1=True", message)
      raise UserError(re.sub(r"(?<![\w/])--(?=\w)", "", message)) from None

  return wrapped


@_in_python
def pretrain(
  images: np.ndarray | str | None,
  workdir: str,
  *,
  recipe: str = "folder",
  labels: np.ndarray | None = None,
  resume: bool = False,
  overwrite: bool = False,
  **changes: Any,
) -> Encoder:
  """Pretrains an encoder and writes a complete run, including page and checkpoints, to `workdir`.

  Args:
    images: uint8 [n, h, w, 3] or [n, h, w]; or a data set such as "folder:/my/images"; or None, to resume the run in
      `workdir` with its own images and config.
    workdir: folder of the run; arrays are saved next to it, in WORKDIR.npz, so that the run can be resumed without them.
    recipe: name of the recipe in configs/ that gives all other values.
    labels: anything that `data.make_labels` takes, used only for scores: a tenth of every class is held out of training and
      scored (`data.held_out`), unless `**{"data.test": ...}` names other images.
    resume, overwrite: resume the run in `workdir`, or delete it; without either, a folder that is not empty is an error.
    changes: values of the recipe by their dotted names, `**{"encoder.width": 0.5, "train_steps": 200}`.
  Returns:
    the trained encoder.
  Raises:
    ValueError: a mistake in the arguments, on one line.
  """
  are_arrays = not (images is None or isinstance(images, str))
  if labels is not None and not are_arrays:
    raise UserError(f"labels beside images={images!r}: a data set has its own; give labels with an array of images")
  if images is None and not resume:
    raise UserError("images=None: give images, or resume=True to resume the run in workdir")
  folder, given = files.absolute(workdir), {}
  saved = f"npz:{folder.with_name(f'{folder.name}.npz')}"
  if images is None:
    recipe, config = config_lib.of_run(workdir)
    config = config_lib.replace(config, changes)
  else:
    train = images if isinstance(images, str) else saved
    config = config_lib.replace(config_lib.load(recipe), {"data.train": train, "data.test": "", **changes})
    if config.data.train != train:
      raise UserError(f"data.train={config.data.train} beside images: give one of them")
  if are_arrays:
    arrays, same_only = _arrays(images, labels), resume and config.data.changed == "refuse"
    _is_kept(arrays, saved, same_only=same_only)
    given = {"source": _source(arrays, saved), "keep": lambda: _keep(arrays, saved, same_only=same_only)}
  try:
    program.run(config, str(workdir), resume=resume, overwrite=overwrite, recipe=recipe, **given)
  finally:
    lock.release(workdir)  # the process may live on, as in a notebook
  return load_encoder(folder / "encoder", trained.own_network(folder))


def _arrays(images, labels) -> dict[str, np.ndarray]:
  """What is saved of images and labels; raises UserError if they cannot be trained on."""
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.ndim not in (3, 4):
    raise UserError(
      f"images are {images.dtype} {list(images.shape)}: expected uint8 [n, h, w, 3] or [n, h, w], such as "
      "np.uint8(255 * images)"
    )
  if labels is None:
    return {"images": images}
  if len(labels) != len(images):
    raise UserError(f"{len(labels)} labels for {len(images)} images: expected one per image")
  numbers, names = data.make_labels(labels, count=len(images))
  return {"images": images, "labels": numbers, "class_names": np.asarray(names, np.str_)}


def _source(arrays: dict[str, np.ndarray], title: str) -> data.ArraySource:
  names = arrays["class_names"].tolist() if "labels" in arrays else ()
  return data.ArraySource(arrays["images"], arrays.get("labels"), class_names=names, title=title)


def _is_kept(arrays: dict[str, np.ndarray], spec: str, *, same_only: bool) -> bool:
  """Whether the arrays are in the file of `spec`, npz:FILE, already.

  Raises:
    UserError: it holds others, and `same_only`; or it was not written here.
  """
  file = files.absolute(spec.removeprefix("npz:"))
  if not file.exists():
    return False
  try:
    what = same.difference(data.open_source(spec).fingerprint(), _source(arrays, spec).fingerprint())
    with files.local(file) as local, np.load(local, allow_pickle=False) as kept:
      is_ours = MARK in kept
  except UserError as error:
    what, is_ours = str(error), False
  if what and not is_ours:
    raise UserError(f"{file} would be replaced, and is not the copy of a run's images: name another --workdir ({what})")
  if what and same_only:
    same.refuse_changed("images", what)
  return not what


def _keep(arrays: dict[str, np.ndarray], spec: str, *, same_only: bool):
  """Saves the arrays in the file of `spec`, npz:FILE, unless they are in it; raises as `_is_kept`."""
  if _is_kept(arrays, spec, same_only=same_only):
    return
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays, **{MARK: np.zeros(0)})
  file = files.absolute(spec.removeprefix("npz:"))
  file.parent.mkdir(parents=True, exist_ok=True)
  files.write_bytes(file, buffer.getvalue())


@_in_python
def embed(encoder: Encoder | str, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
  """h of images of any size, cropped and resized as the encoder's card says: float32 [n, d].

  Args:
    encoder: what `pretrain` or `load_encoder` returned, or the folder of an export or of a finished run.
    images: uint8, or floating point in [0, 1]: [n, h, w, 3], or a list of [h, w, 3] of different sizes.
    batch_size: largest number of images to encode at once.
  Raises:
    ValueError: the folder is not an export, or the images are of another type, range or shape.
  """
  encoder = load_encoder(encoder) if isinstance(encoder, str | os.PathLike) else Encoder(*encoder)
  crop = embed_lib.crop_of(config_lib.from_dict(encoder.card["pretraining"]))
  if batch_size < 1:
    raise UserError(f"batch_size={batch_size}: expected a whole number of at least 1")
  # Of the next power of two: calls with a few images more or less use one compiled program.
  batch_size = min(batch_size, 1 << max(len(images) - 1, 0).bit_length())
  parts = []
  for start in range(0, len(images), batch_size):
    images_now = [np.asarray(image) for image in images[start : start + batch_size]]
    for image in images_now:
      if image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"an image is {list(image.shape)}: expected [h, w, 3]")
      image_check.check_range(image)
    views = crop(images_now)
    padding = [(0, batch_size - len(views)), *[(0, 0)] * 3]  # one shape, one compilation
    parts.append(np.asarray(encoder.apply(np.pad(views, padding)))[: len(views)])
  return np.concatenate(parts) if parts else np.zeros((0, encoder.card["feature_dimension"]), np.float32)


@_in_python
def probe(h: np.ndarray, labels: np.ndarray, test_h: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
  """Linear evaluation: multinomial logistic regression on h, with the penalty chosen on a held-out tenth of h.

  Args:
    h, test_h: float [n, d] and [m, d].
    labels, test_labels: n and m labels, as `data.make_labels` takes them: integers, strings, one-hot rows; -1 for none.
  Returns:
    dict(accuracy, l2): the fraction of the labeled test examples that is classified correctly, and the penalty.
  Raises:
    ValueError: the numbers of rows do not match, labels are invalid, or features are not finite.
  """
  for name, features, y in (("h", h, labels), ("test_h", test_h, test_labels)):
    if len(features) != len(y):
      raise UserError(f"{name} has {len(features)} rows for {len(y)} labels: expected one label per row")
    if np.ndim(features) != 2:
      raise UserError(f"{name} is {list(np.shape(features))}: expected [n, d], a row for each image")
  if np.shape(h)[1] != np.shape(test_h)[1]:
    raise UserError(
      f"h has {np.shape(h)[1]} columns and test_h {np.shape(test_h)[1]}: expected features of one encoder"
    )
  kinds = [list(np.shape(y)) for y in (labels, test_labels)]
  if kinds[0][1:] != kinds[1][1:]:
    raise UserError(
      f"labels are {kinds[0]} and test_labels {kinds[1]}: expected both as numbers or texts, or both as one-hot rows of "
      "the same classes"
    )
  both = np.concatenate([np.asarray(labels), np.asarray(test_labels)])  # numbered together
  y, names = data.make_labels(both, count=len(both))
  classifier = linear.logistic_regression(h, y[: len(labels)], num_classes=len(names))
  right = linear.accuracy(classifier, test_h, y[len(labels) :])
  return {"accuracy": float(right), "l2": float(classifier["l2"])}
