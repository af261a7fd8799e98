"""Mistakes of the user, which the command prints on one line, in contrast to failures, whose traceback it shows."""

import contextlib
import re

EXIT_LOST = (
  142  # another process or a bucket is lost, or this process hung: the launch scripts restart on 128 and above
)
to_resume = "resume with --resume"  # how messages end; the command sets it to what its own flags allow


class UserError(ValueError):
  """A mistake in a flag, a config or the data: one line with the value, what was expected and what to do.

  It stays one line even if it quotes a library's message of several lines.
  """

  def __init__(self, message):
    super().__init__(re.sub(r"\s*\n\s*", " ", str(message).strip()))


class Unavailable(OSError):
  """A bucket did not answer or was overloaded, also after several tries: started again, the run may succeed."""

  exit_code = EXIT_LOST


@contextlib.contextmanager
def of_the_user():
  """A ValueError of one line that is raised within, or in a function decorated with this, becomes a UserError.

  It is for the part of a program that checks whether a config is possible.  There, the science functions, which can be copied
  out of this package and raise plain ValueErrors, are called with the values of the config.
  """
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    if "\n" in str(error):
      raise
    raise UserError(str(error)) from error
