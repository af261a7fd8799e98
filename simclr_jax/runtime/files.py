"""Files on a local disk or in a bucket (gs://): written whole or not at all, by everything in this package that writes.

`pathlib` turns gs://bucket/x into the relative path gs:/bucket/x, so a path that a user gave goes through `absolute`.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import unicodedata

from etils import epath

from simclr_jax.runtime.errors import UserError


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


def write_sealed(path, text: str):
  """Writes a text file that a later run relies on, and the SHA-256 of its bytes beside it, for `read_sealed`.

  The digest is written first and stands beside that of the content to be replaced, so that a process that is killed
  between the two writes leaves a file that can be read.
  """
  path = absolute(path)
  seals = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()]
  with contextlib.suppress(UserError, FileNotFoundError):
    seals.append(hashlib.sha256(read_sealed(path).encode("utf-8", "surrogateescape")).hexdigest())
  write_text(_seal_of(path), "\n".join(dict.fromkeys(seals)) + "\n")
  write_text(path, text)


def read_sealed(path) -> str:
  """What `write_sealed` wrote; a file without a seal, of an earlier version, is read as it is.

  Raises:
    FileNotFoundError: neither the file nor its seal exists.
    UserError: the content is not what was written; one line that names the file.
  """
  path = absolute(path)
  seal = _seal_of(path)
  if not seal.exists():
    return read_text(path)
  if not path.exists():
    raise UserError(f"{path} is missing, although its seal {seal.name} is there: restore it from a copy")
  content = path.read_bytes()
  if hashlib.sha256(content).hexdigest() not in read_text(seal).split():
    raise UserError(
      f"{path} is damaged: its SHA-256 is not the one in {seal.name}; restore it from a copy, or delete {seal.name} if "
      "you changed the file on purpose"
    )
  return content.decode("utf-8", "surrogateescape")


def _seal_of(path):
  return path.with_name(f"{path.name}.sha256")


def create_text(path, text: str) -> bool:
  """Writes a file that nobody else has: whether it was not there before.

  On a local disk exactly one of several processes succeeds.  A bucket has no such operation behind this interface: the
  file is written where none is, and read again, so of two processes within the same moment the later one succeeds.
  """
  path = absolute(path)
  if is_remote(path):
    if path.exists():
      return False
    write_text(path, text)
    return read_text(path) == text
  try:
    with open(path, "x", encoding="utf-8", errors="surrogateescape") as file:
      file.write(text)
  except FileExistsError:
    return False
  return True


def disk_is_full(error, path) -> bool:
  """Whether that is why writing below `path` failed; Orbax raises many types of error for it."""
  text = str(error)
  free = shutil.disk_usage(path).free if os.path.isdir(path) else 1 << 40
  return "No space left" in text or "RESOURCE_EXHAUSTED" in text or free < 1 << 20


def user_cache() -> pathlib.Path:
  """This user's folder for what can be made again, $XDG_CACHE_HOME/simclr_jax; below the temporary folder where the user
  has no home, as in a container that runs with an arbitrary uid."""
  try:
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  except RuntimeError:
    base = pathlib.Path(tempfile.gettempdir()) / f"cache-{os.geteuid()}"
  return base / "simclr_jax"


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


def size(path) -> int:
  """Bytes of a file; epath's own `stat` fails where the owner has no name, as in a container with an arbitrary uid."""
  path = absolute(path)
  return path.stat().length if is_remote(path) else os.path.getsize(path)


def sha256(path) -> str:
  """Of a file's content, in hexadecimal."""
  digest = hashlib.sha256()
  with absolute(path).open("rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()
