"""Files on a local disk or in a bucket (gs://): written whole or not at all, by everything in this package that writes.

`pathlib` turns gs://bucket/x into the relative path gs:/bucket/x, so a path that a user gave goes through `absolute`.
"""

import contextlib
import hashlib
import os
import tempfile
import unicodedata

from etils import epath


def is_remote(path) -> bool:
  return "://" in os.fspath(path)


def absolute(path) -> epath.Path:
  """The absolute path; one in a bucket is absolute already."""
  return epath.Path(path if is_remote(path) else os.path.abspath(path))


def printable(name: str) -> str:
  """The name of a file as a text of one line: control characters, backslashes and bytes that are not UTF-8 are escaped as
  in Python's strings, such as \\n, \\\\ and \\xff.  Different names stay different.
  """
  if name.isprintable() and "\\" not in name:
    return name
  escapes = {"Cc", "Zl", "Zp", "Cs"}  # control characters, separators of lines, bytes by surrogateescape
  return "".join(_escape(c) if c == "\\" or unicodedata.category(c) in escapes else c for c in name)


def _escape(c: str) -> str:
  return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def write_bytes(path, content: bytes):
  """Writes a whole file or nothing, in the place of the one that is there."""
  path = absolute(path)
  if is_remote(path):  # an object appears when its upload is complete, while renaming one copies it
    path.write_bytes(content)
    return
  temporary = f"{path.parent}/.{path.name}.{os.getpid()}.tmp"  # other processes may be writing the same file
  try:
    with open(temporary, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())  # or a power failure may leave the new name with no content
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def write_text(path, text: str):
  """Writes a whole file or nothing, as UTF-8; names of files that are not UTF-8 keep their bytes."""
  write_bytes(path, text.encode("utf-8", "surrogateescape"))


def read_text(path) -> str:
  """What `write_text` wrote."""
  return absolute(path).read_bytes().decode("utf-8", "surrogateescape")


def append_text(path, text: str):
  """Adds to the end of a file, which is made if needed."""
  path = absolute(path)
  if is_remote(path):  # objects cannot grow, and not every library that emulates it keeps what was there
    write_text(path, (read_text(path) if path.exists() else "") + text)
    return
  with open(path, "ab") as file:
    file.write(text.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def local(path):
  """The name of a local file with the content of this one, for libraries that open nothing else."""
  path = absolute(path)
  if not is_remote(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = os.path.join(folder, path.name)
    path.copy(copy)
    yield copy


def sha256(path) -> str:
  """Of a file's content, in hexadecimal."""
  digest = hashlib.sha256()
  with absolute(path).open("rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()
