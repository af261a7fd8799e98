"""Standard output and error that may be lost (with a terminal, a reader or a disk) without stopping the program."""

import contextlib
import os
import sys


class _Stream:
  """A text stream whose first failure is kept in `failure`, and after which everything is thrown away."""

  def __init__(self, stream, announce):
    self._stream, self._announce, self.failure = stream, announce, None

  def write(self, text: str) -> int:
    self._try(self._stream.write, text)
    return len(text)

  def flush(self):
    self._try(self._stream.flush)

  def _try(self, what, *arguments):
    try:
      what(*arguments)
    except (OSError, ValueError) as error:  # ValueError: it was closed
      if isinstance(error, UnicodeError):
        raise
      self._lose(error)

  def _lose(self, error):
    first, self.failure = self.failure is None, self.failure or error
    with contextlib.suppress(OSError, ValueError):
      # What lies in its buffer would fail again, at the latest when Python ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    if first:
      self._announce(error)

  def __getattr__(self, name):
    return getattr(self._stream, name)


def open_standard_files():
  """Opens /dev/null for standard input, output or error if the process started without it; otherwise the next opened
  file, such as a checkpoint, would take its number and receive what is printed."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
  sys.stdout = sys.stdout or open(1, "w")
  sys.stderr = sys.stderr or open(2, "w")


@contextlib.contextmanager
def kept_going(announce):
  """Within it, sys.stdout and sys.stderr lose what they cannot write; `announce(error)` is called when stdout is lost.

  Yields:
    the stream in the place of stdout; its `failure` is the first error, or None.
  """
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = out, _ = _Stream(before[0], announce), _Stream(before[1], lambda error: None)
  try:
    yield out
    out.flush()
  finally:
    sys.stdout, sys.stderr = before
