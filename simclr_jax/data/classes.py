"""Matches the classes of a test set with those of the training set."""

import numpy as np

from simclr_jax.data.labels import UNLABELED, some
from simclr_jax.data.sources import Relabeled, Selection, Source
from simclr_jax.runtime.errors import UserError


def align(train: Source, test: Source, *, what: str = "data.test") -> Source:
  """A test source whose labels are renumbered as in the training source: classes with the same name are the same.  Its
  16-bit images are scaled like those of training.

  If the classes of either side have only numbers, they are matched by number.  A training class may have no test images,
  but a test image of a class that training does not have is refused.

  Args:
    what: what messages call the test set.

  Raises:
    UserError: only one of the two has labels, or the test set has images of classes that training does not have.
  """
  known, names = tuple(train.class_names), tuple(test.class_names)
  if bool(known) != bool(names):
    raise UserError(
      f"{what} has {len(names) or 'no'} classes and data.train {len(known) or 'none'}: name two splits of one data set,"
      " both with labels"
    )
  if known and test.labels is None:
    raise UserError(f"{what}: none of its images has a label, so it cannot be scored: name a labeled split")
  numbers = match_classes(known, names)
  if any(n == UNLABELED for n in numbers):
    used = set(np.unique(test.labels).tolist())
    unknown = [name for i, (name, n) in enumerate(zip(names, numbers, strict=True)) if n == UNLABELED and i in used]
    if unknown:
      missing = [known[n] for n in sorted(set(range(len(known))) - set(numbers))]
      raise UserError(
        f"{what} has images of classes that data.train does not have: {some(unknown)}; only data.train"
        f" has {some(missing) if missing else 'no other'}: name two splits of one data set"
      )
  return Relabeled(test, numbers, train)


def match_classes(known, names) -> np.ndarray:
  """int32 [len(names)]: the number in `known` that each class of `names` has, or -1; raises UserError for equal names."""
  if tuple(known) == tuple(names):
    return np.arange(len(known), dtype=np.int32)
  for own in (known, names):
    twice = [name for i, name in enumerate(own) if name in own[:i]] if len(set(own)) < len(own) else []
    if twice:
      raise UserError(f"two classes are called {twice[0]}, so classes cannot be matched by name: rename one of them")
  numbers = [[int(name) for name in own if name.isascii() and name.isdigit()] for own in (known, names)]
  only = [len(set(found)) == len(own) for found, own in zip(numbers, (known, names), strict=True)]
  if only[0] and (only[1] or not numbers[1]):  # by number, which is the place of a class where it has a name
    keys = [numbers[0], numbers[1] or range(len(names))]
  elif only[1] and not numbers[0]:
    keys = [range(len(known)), numbers[1]]
  else:
    keys = [known, names]
  place = {key: i for i, key in enumerate(keys[0])}
  return np.asarray([place.get(key, UNLABELED) for key in keys[1]], np.int32)


def labeled(source: Source) -> Source:
  """The images of a source that have a label; all of its images if none has one."""
  if source.labels is None or (source.labels >= 0).all():
    return source
  return Selection(source, np.flatnonzero(source.labels >= 0))
