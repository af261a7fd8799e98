"""Labels as people have them -> classes 0 to k - 1 and their names."""

import re
from collections.abc import Sequence

import numpy as np

from simclr_jax.runtime.errors import UserError
from simclr_jax.runtime.files import printable

UNLABELED = -1


def make_labels(
  values, class_names: Sequence[str] = (), *, count: int | None = None, what: str = "labels"
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Turns labels of any common kind into classes.

  Numbers that are already dense, from 0 with few gaps (such as the number of an empty folder), keep their values.
  Others, such as 255, 10^8 or 64-bit ids, become 0 to k - 1 in increasing order and name their classes.  Strings
  become 0 to k - 1 in alphabetical order; if all strings are numbers, they are treated as numbers.

  Args:
    values: integers of any width, booleans, or strings (str or bytes), [n] or [n, 1]; or one-hot rows [n, c] of
      zeros and ones.  -1, an empty string, None and a row of zeros mean that an image has no label.
    class_names: names of the classes (str or bytes), if known: number i, or the string class_names[i], is class i.
    count: number of images, where it is known.
    what: the beginning of a message, such as "npz:set.npz: labels".

  Returns:
    (int32 [n], 0 to k - 1, or -1 where an image has no label; the names of the k classes).

  Raises:
    UserError: another shape, type or number of labels, numbers below -1, or a label that class_names does not have.
  """
  names, array = tuple(str(_decoded(name)) for name in class_names), _as_array(values)
  kind = f"{what} are {array.dtype} {list(array.shape)}"
  if array.ndim == 2 and array.shape[1] == 1:
    array = array[:, 0]
  expected = "expected integers, texts or one-hot rows, one for each image"
  if array.ndim not in (1, 2) or (count is not None and len(array) != count):
    images = "" if count is None else f" for {count} images"
    raise UserError(f"{kind}{images}; {expected}")
  if array.ndim == 2:
    if (
      array.dtype.kind not in "buif"
      or not array.shape[1]
      or not np.isin(array, (0, 1)).all()
      or (array.sum(1, dtype=np.int64) > 1).any()
    ):
      raise UserError(f"{kind} and not one-hot; {expected}, with a single 1 in a row")
    names = names or _numbers(array.shape[1])
    array = np.where(array.any(1), array.argmax(1), UNLABELED)
  if array.dtype.kind in "OUS":
    texts = _texts(array, kind, expected)
    used = sorted(set(texts) - {""})
    if (names and set(used) <= set(names)) or not _are_numbers(used):
      return _named(texts, used, names, what)
    numbers = [int(text) if text else UNLABELED for text in texts]
    # Python's own integers have any width, and NumPy compares them too.
    array = np.asarray(numbers, np.int64 if max(numbers, default=0) < 2**63 else object)
  elif array.dtype.kind not in "biu" and len(array):
    raise UserError(f"{kind}; {expected}")
  return _numbered(array, names, what)


def _as_array(values) -> np.ndarray:
  try:
    return np.asarray(values)
  except ValueError:  # rows of several lengths
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _numbers(count: int) -> tuple[str, ...]:
  return tuple(map(str, range(count)))


def _decoded(item):
  """Bytes as a text, anything else as it is."""
  return printable(item.decode("utf-8", "surrogateescape")) if isinstance(item, bytes) else item


def _texts(array, kind, expected) -> list[str]:
  """Texts and integers [n] as texts, empty where there is no label, as for -1."""
  texts = []
  for item in array.tolist():
    item = _decoded(item)
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
      item = str(item)
    elif item is not None and not isinstance(item, str):
      raise UserError(f"{kind} with {type(item).__name__} among them; {expected}")
    text = (item or "").strip()
    texts.append("" if text == str(UNLABELED) else text)
  return texts


def _are_numbers(texts) -> bool:
  """Whether texts are integers, no two of them the same; at most as long as Python reads them."""
  if not all(re.fullmatch("[0-9]{1,4000}", text) for text in texts):
    return False
  return len({int(text) for text in texts}) == len(texts)


def _named(texts, used, names, what):
  names = names or tuple(used)
  number = {name: i for i, name in enumerate(names)}
  wrong = [name for name in used if name not in number]
  if wrong:
    raise UserError(f"{what}: {some(wrong)} is not among the {len(names)} classes, which are {some(names)}")
  if len(number) < len(names):
    raise UserError(f"{what}: two of the {len(names)} classes have the same name; give labels as numbers")
  number[""] = UNLABELED
  return np.asarray([number[text] for text in texts], np.int32), names


def _numbered(array, names, what):
  array = array.astype(np.int8) if array.dtype == bool else array
  low, high = (int(array.min()), int(array.max())) if len(array) else (0, UNLABELED)
  if low < UNLABELED:
    raise UserError(f"{what}: {low} is among them; expected integers >= 0, or -1 for an image without a label")
  if names and high >= len(names):
    raise UserError(f"{what}: {high} is among them; expected 0 to {len(names) - 1}, the numbers of {some(names)}")
  used = np.unique(array[array >= 0])
  if names or high < 2 * len(used) + 10:
    return array.astype(np.int32), names or _numbers(high + 1)
  numbers = np.where(array >= 0, np.searchsorted(used, array), UNLABELED)
  return numbers.astype(np.int32), tuple(map(str, used.tolist()))


def some(names, most: int = 5) -> str:
  """The first few of some names, for a message."""
  names = [str(name) for name in names]
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
