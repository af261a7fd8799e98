"""Files on a local disk or in a bucket (gs://): everything in this package writes them completely or not at all.

`pathlib` turns gs://bucket/x into the relative path gs:/bucket/x, so every path that a user gives goes through `absolute`.
One client reads and writes what is in a bucket, `runtime/gcs.py`, for epath and for Orbax's metadata too; Orbax's arrays go
through tensorstore.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import unicodedata

import fsspec
from etils import epath

from simclr_jax.runtime.errors import Unavailable, UserError

# epath asks for the first when it opens its first path, tensorstore for the others with its first request.
for _name, _value in {
  "EPATH_USE_TF": "false",  # TensorFlow's file system has no conditional writes, and takes seconds to import
  "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "10",  # as gcs.SILENCE; or a request that is never answered is waited for forever
  "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}.items():
  os.environ.setdefault(_name, _value)
fsspec.register_implementation("gcs", "simclr_jax.runtime.gcs.FileSystem", clobber=True)


def is_remote(path) -> bool:
  return "://" in os.fspath(path)


def absolute(path) -> epath.Path:
  """The absolute path; one in a bucket is absolute already.

  Raises:
    UserError: it is on the web or in a cloud, but not in a bucket that can be read here.
  """
  if not is_remote(path):
    return epath.Path(os.path.abspath(path))
  if not os.fspath(path).startswith("gs://"):
    raise UserError(f"{os.fspath(path)}: expected a path on this machine, or gs://BUCKET/NAME")
  if not _has_gcsfs():
    raise UserError(f"{os.fspath(path)}: gs:// needs gcsfs, which is not installed: pip install 'simclr_jax[gcs]'")
  return epath.Path(path)


def expanded(path) -> epath.Path:
  """`absolute` of a path that may begin with ~."""
  return absolute(os.path.expanduser(path))


@functools.cache
def _has_gcsfs() -> bool:
  return importlib.util.find_spec("gcsfs") is not None


def _bucket():
  """The client that epath uses; fsspec keeps one of these arguments."""
  return fsspec.filesystem("gcs", finalize_on_close=True)


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


def is_within(path, folder) -> bool:
  """Whether a path is a folder or inside it, wherever links lead."""
  where, what = (os.fspath(p).rstrip("/") if is_remote(p) else os.path.realpath(p) for p in (path, folder))
  return f"{where}/".startswith(f"{what}/")


def check_bucket(path):
  """Inspects the bucket itself, as Orbax does, but only when a run resumes.

  Raises:
    UserError: it may not be inspected.
    Unavailable: it does not answer.
  """
  try:
    _bucket().look_at_bucket(os.fspath(path))
  except Unavailable:
    raise
  except OSError as error:
    raise UserError(f"{path}: the bucket cannot be inspected ({error}); Orbax needs storage.buckets.get") from None


def is_left_behind(name: str) -> bool:
  """Whether `write_bytes` leaves a file of this name when its process is killed."""
  return bool(re.fullmatch(r"\..+\.\d+\.tmp", name))


def write_bytes(path, content: bytes):
  """Writes a whole file or nothing, replacing an existing one."""
  path = absolute(path)
  if is_remote(path):  # an object appears when its upload is complete, while renaming one copies it
    _bucket().pipe_file(os.fspath(path), content)
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
  return read_bytes(path).decode("utf-8", "surrogateescape")


def read_bytes(path) -> bytes:
  """A whole file; of a bucket in one request."""
  path = absolute(path)
  return _bucket().cat_file(os.fspath(path)) if is_remote(path) else path.read_bytes()


def write_sealed(path, text: str):
  """Writes a text file that a later run relies on, and next to it the SHA-256 of its bytes, for `read_sealed`.

  The digest is written first, next to the digest of the content to be replaced, so that a process that is killed
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
  content = read_bytes(path)
  if hashlib.sha256(content).hexdigest() not in read_text(seal).split():
    raise UserError(
      f"{path} is damaged: its SHA-256 is not the one in {seal.name}; restore it from a copy, or delete {seal.name} if "
      "you changed the file on purpose"
    )
  return content.decode("utf-8", "surrogateescape")


def _seal_of(path):
  return path.with_name(f"{path.name}.sha256")


def create_text(path, text: str) -> bool:
  """Creates a file unless it exists; returns whether this process created it.

  Exactly one of several processes succeeds, provided that each writes its own text.
  """
  path = absolute(path)
  if is_remote(path):
    try:
      _bucket().pipe_file(os.fspath(path), text.encode("utf-8", "surrogateescape"), mode="create")
      return True
    except FileExistsError:
      # It is this process's own where the answer to the first try was lost, and the request sent again.
      with contextlib.suppress(FileNotFoundError):
        return read_text(path) == text
      return False
  try:
    with open(path, "x", encoding="utf-8", errors="surrogateescape") as file:
      file.write(text)
  except FileExistsError:
    return False
  return True


def remove_text(path, text: str):
  """Removes the file with this content, but not one that somebody else has written in its place in the meantime."""
  path = absolute(path)
  if is_remote(path):
    with contextlib.suppress(FileNotFoundError, FileExistsError):
      generation = _bucket().info(os.fspath(path))["generation"]
      if read_text(path) == text:
        _bucket().remove_generation(os.fspath(path), generation)
    return
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.rename(aside)
  except OSError:  # another process was faster
    return
  if (found := read_text(aside)) != text:
    create_text(path, found)
  aside.unlink(missing_ok=True)


def move(path, target):
  """Renames a folder, also to another disk; in a bucket its files are copied one by one and then deleted."""
  if is_remote(path):
    _bucket().mv(os.fspath(path), os.fspath(target), recursive=True)
  else:
    shutil.move(path, target)


def version(path) -> tuple:
  """What changes when a file is rewritten: its size, and the time or, in a bucket, the generation.

  Raises:
    OSError: there is none.
  """
  if is_remote(path):
    found = _bucket().info(os.fspath(path))
    return found["size"], found["generation"]
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def read_part(path: str, begin: int, length: int, seen: tuple) -> bytes:
  """`length` bytes of a file from byte `begin` on; fewer where it ends before.

  Args:
    seen: its `version` when its content was examined.

  Raises:
    OSError: it is gone or cannot be read; or it is in a bucket, where this check costs no request, and was rewritten since.
  """
  if is_remote(path):
    try:
      return _bucket().read_part(path, begin, length, seen[1])
    except FileExistsError:
      raise OSError("has been written anew since it was opened") from None
  # Opened anew each time: a set may have more shards than a process may have open files.
  file = os.open(path, os.O_RDONLY)
  try:
    return os.pread(file, length, begin)
  finally:
    os.close(file)


def disk_is_full(error, path) -> bool:
  """Whether that is why writing below `path` failed; Orbax raises many types of error for it."""
  text = str(error)
  free = shutil.disk_usage(path).free if os.path.isdir(path) else 1 << 40
  return "No space left" in text or "RESOURCE_EXHAUSTED" in text or free < 1 << 20


def user_cache() -> pathlib.Path:
  """This user's folder for files that can be made again, $XDG_CACHE_HOME/simclr_jax; it is below the temporary folder if the
  user has no home, as in a container that runs with an arbitrary uid."""
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
  """The name of a local file with the content of this one, for libraries that only open local files."""
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
