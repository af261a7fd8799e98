"""Whatever labels, names of files and image headers are: no crash, and nothing silently wrong.

Every property is tried on 100 examples, and on 1,000 in the longer tests.
"""

import os
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import encoded, gradient

from simclr_jax import data
from simclr_jax.data.decode import may_be_deep, significant_bits
from simclr_jax.data.records import plain_label
from simclr_jax.runtime import files

EXAMPLES = pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])


def holds(examples, prop, *strategies):
  """Tries a property, always on the same examples."""
  options = dict(max_examples=examples, deadline=None, derandomize=True, database=None)
  settings(**options, suppress_health_check=list(HealthCheck))(given(*strategies)(prop))()


INTEGERS = st.one_of(st.integers(-1, 12), st.integers(-3, 300), st.integers(-1, 2**64 - 1), st.just(2**31 - 1))
TEXTS = st.one_of(st.text(max_size=4), st.sampled_from(["cat", " cat", "1", "01", "-1", "10", "", "²", "1_0"]))
LABELS = st.one_of(
  st.lists(INTEGERS, max_size=12),
  st.lists(st.integers(0, 255), max_size=12).map(lambda x: np.asarray(x, np.uint8)),
  st.lists(st.integers(-1, 2**62), max_size=12).map(lambda x: np.asarray(x, np.int64)[:, None]),
  st.lists(st.booleans(), max_size=12),
  st.lists(TEXTS, max_size=12),
  st.lists(TEXTS, max_size=12).map(lambda x: np.asarray([t.encode() for t in x], object)),
  st.lists(st.one_of(st.none(), TEXTS, INTEGERS), max_size=12).map(lambda x: np.asarray([*x, None], object)[:-1]),
  st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), max_size=6),
  st.lists(st.one_of(st.floats(), st.none()), max_size=6),
  st.lists(st.lists(st.integers(-2, 3), max_size=3), max_size=6),
)


def plain(value):
  """What a label says, as an independent reader has it: None, a number or a text."""
  if isinstance(value, np.ndarray | list):
    if len(value) > 1:
      return int(np.argmax(value)) if np.any(value) else None
    value = value[0]
  if isinstance(value, bytes | np.bytes_):
    value = files.printable(value.decode("utf-8", "surrogateescape"))
  if value is None:
    return None
  text = str(int(value)) if isinstance(value, bool | np.bool_) else str(value).strip()
  return None if text in ("", "-1") else text


def labels_are_right(values):
  try:
    numbers, names = data.make_labels(values)
  except ValueError as error:
    assert "\n" not in str(error) and "expected" in str(error)
    return
  assert numbers.dtype == np.int32 and numbers.shape == (len(values),)
  assert len(set(names)) == len(names) and ((-1 <= numbers) & (numbers < max(len(names), 1))).all()
  used = {n for n in numbers.tolist() if n >= 0}
  assert len(names) <= 2 * len(used) + 10
  for number, value in zip(numbers.tolist(), values, strict=True):
    said = plain(value)
    if number < 0:
      assert said is None
    else:
      assert said is not None and (names[number] == str(said) or int(names[number]) == int(said))


@EXAMPLES
def test_labels(examples):
  holds(examples, labels_are_right, LABELS)


NAMES = st.lists(st.sampled_from(["a", "b", "c", "0", "1", "2", "3", "10", "01", "x y", "é"]), min_size=1, max_size=5, unique=True)  # fmt: skip


def classes_are_right(known, names):
  source = [data.ArraySource(np.zeros((len(own), 2, 2), np.uint8), range(len(own)), class_names=own) for own in (known, names)]  # fmt: skip
  try:
    aligned = data.align(*source)
  except ValueError as error:
    assert "\n" not in str(error) and set(names) - set(known)
    return
  assert aligned.class_names == tuple(known)
  only = [all(name.isdigit() for name in own) for own in (known, names)]
  for place, number in enumerate(aligned.labels.tolist()):
    by_place = only[0] != only[1] and (known[number], names[place]) in ((str(place), names[place]), (known[number], str(number)))  # fmt: skip
    by_number = all(only) and int(known[number]) == int(names[place])
    assert known[number] == names[place] or by_number or by_place
    assert aligned.item(place)[1] == number


@EXAMPLES
def test_classes(examples):
  holds(examples, classes_are_right, NAMES, NAMES)


def a_stored_label_is_right(value):
  try:
    label = plain_label(value, "set:0")
  except ValueError as error:
    assert str(error).startswith("set:0: its label is ") and "\n" not in str(error)
    return
  assert label is None or isinstance(label, int | str)
  if isinstance(value, float) and value == value:
    assert label == value


@EXAMPLES
def test_stored_labels(examples):
  one = st.one_of(st.none(), st.integers(), st.floats(), st.binary(max_size=4), st.text(max_size=4), st.booleans())
  holds(examples, a_stored_label_is_right, st.one_of(one, st.lists(one, max_size=3)))


FILE_NAMES = st.one_of(st.binary(min_size=1, max_size=40), st.text(min_size=1, max_size=20).map(lambda t: t.encode("utf-8", "surrogatepass")))  # fmt: skip
FILE_NAMES = FILE_NAMES.map(lambda name: name.replace(b"/", b"").replace(b"\0", b"").lstrip(b".") or b"x")


def names_are_written_in_a_line(names):
  written = [files.printable(os.fsdecode(name)) for name in names]
  assert len(set(written)) == len(names)
  for text in written:
    assert text.encode().decode() == text and text.splitlines() == [text] and "\t" not in text
  with tempfile.TemporaryDirectory() as root:
    good = encoded(gradient(2, 2), "PNG")
    for i, name in enumerate(names):
      pathlib.Path(root, os.fsdecode(name + b".png")).write_bytes(good if i else b"")
    source = data.open_source(f"folder:{root}")
    assert sorted(source.name(i) for i in range(len(source))) == sorted(f"{root}/{text}.png" for text in written)
    reader = data.stream._Reader(source, 1.0, os.path.join(root, "bad.txt"))
    for i in range(len(source)):
      if len(names) > 1:
        reader.read(i)
    if len(names) > 1:
      lines = pathlib.Path(root, "bad.txt").read_text(encoding="utf-8").splitlines()
      assert lines == [f"{root}/{written[0]}.png\tempty file"]


@EXAMPLES
def test_names(examples):
  holds(examples, names_are_written_in_a_line, st.lists(FILE_NAMES, min_size=1, max_size=4, unique=True))


GOOD = [encoded(gradient(6, 5), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")]
GOOD += [encoded(np.full((6, 5), 900, np.uint16), "PNG"), encoded(np.full((6, 5), 900, np.uint16), "TIFF")]


def damaged(kind, edits, cut):
  body = bytearray(GOOD[kind])
  for at, value in edits:
    body[at % min(len(body), 120)] = value
  return bytes(body[: len(body) - cut])


def an_image_or_a_reason(body):
  significant_bits(body), may_be_deep(body), data.sniff(body)
  for bits in (8, 16):
    try:
      pixels = data.decode(body, max_pixels=10_000, bits=bits)
    except data.BadImage as reason:
      assert "\n" not in str(reason) and 0 < len(str(reason)) < 250
    else:
      assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and 0 < pixels.size <= 30_000


@EXAMPLES
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_image_headers(examples):
  edits = st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=3)
  bodies = st.builds(damaged, st.integers(0, len(GOOD) - 1), edits, st.sampled_from([0, 0, 1, 9, 40]))
  holds(examples, an_image_or_a_reason, st.one_of(bodies, st.binary(max_size=64)))
