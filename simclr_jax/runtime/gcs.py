"""The client of Google Cloud Storage: gcsfs, set up for runs that several processes read and write for weeks.

`files` registers it, so that epath, and with it Orbax, uses it too.
"""

import logging

import aiohttp
from gcsfs import core, retry

from simclr_jax.runtime import watchdog
from simclr_jax.runtime.errors import Unavailable

# Seconds without a byte of an answer, after which a request is sent again; 5 minutes, and not again, in gcsfs.  With the
# pauses between six tries, 36 s at most, it is shorter than what the watchdog lets a phase take.
SILENCE = 10.0


class FileSystem(core.GCSFileSystem):
  """gcsfs with three differences.

  Listings are not cached, because other processes also write.  A request that is not answered is sent again, as gcsfs does
  after 429, 5xx and lost connections: six times in all, with growing pauses.  A final failure is an OSError of one line,
  whatever type the libraries below use for it: Unavailable where gcsfs would send the request again.
  """

  def __init__(self, **options):
    watchdog.use_bucket()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    super().__init__(**{"use_listings_cache": False, "requests_timeout": timeout, **options})
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what is raised, too

  async def _request(self, method, path, *args, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
    try:
      return await super()._request(method, path, *args, **options)  # pyright: ignore[reportGeneralTypeIssues]
    except (FileNotFoundError, FileExistsError):
      raise
    except Exception as error:  # HttpError, aiohttp.ClientError, GoogleAuthError, ValueError, ...
      where = path.format(*args).partition("?")[0]
      kind = Unavailable if retry.is_retriable(error) else OSError
      raise kind(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error

  def look_at_bucket(self, path: str):
    """Raises OSError if there is no such bucket, or it may not be inspected."""
    self.call("GET", "b/{}", self.split_path(path)[0])

  def read_part(self, path: str, begin: int, length: int, generation: str) -> bytes:
    """Bytes of an object in one request.

    Raises:
      FileExistsError: another object has been written in its place since this generation.
      OSError: it is gone, ends before, or cannot be read.
    """
    head = {"Range": f"bytes={begin}-{begin + length - 1}"}
    if not length:
      return b""
    _, content = self.call("GET", self.url(path), headers=head, ifGenerationMatch=generation)  # pyright: ignore
    return content

  def remove_generation(self, path: str, generation: str):
    """Deletes an object; raises FileExistsError if it has been rewritten since this generation."""
    bucket, key, _ = self.split_path(path)
    self.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)
