"""From the bytes of a file to pixels."""

import contextlib
import functools
import io

import numpy as np

MAX_PIXELS = 64_000_000
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


# Folders that systems and file servers make beside what people keep; hidden ones begin with a dot.
JUNK = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class BadImage(Exception):
  """One image cannot be used; the message is the reason, in a few words."""


_FIRST_BYTES = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"))
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: a[::-1].swapaxes(0, 1),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def is_junk(folder: str, name: str) -> bool:
  """Whether a file or folder `name` in `folder`, a relative path, is hidden or a system's: never a class or an image."""
  return any(part in JUNK or (part.startswith(".") and part != ".") for part in (*folder.split("/"), name))


def sniff(data: bytes) -> str | None:
  """The image format that the first bytes announce; file names are not to be trusted."""
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "WEBP"
  return next((kind for magic, kind in _FIRST_BYTES if data.startswith(magic)), None)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes one JPEG, PNG, WebP, BMP or single-frame GIF to uint8 [h, w, 3], upright.

  Gray, palette and CMYK images become RGB; 16 bits a channel become 8; transparent pixels are laid over white; the
  EXIF orientation is applied.  The size in the header is checked before a pixel is decoded, because a PNG of one
  megabyte can unfold to a gigabyte.

  Raises:
    BadImage: empty, not an image, truncated, animated, or more than `max_pixels` pixels.
  """
  from PIL import Image, ImageOps

  if not data:
    raise BadImage("empty file")
  kind = sniff(data)
  if kind is None:
    raise BadImage(f"not a jpeg, png, webp, bmp or gif: it begins with {bytes(data[:12])!r}")
  if kind == "JPEG":
    return _decode_jpeg(data, jpeg_header(data, max_pixels=max_pixels)[2])
  with _opened(data, kind, max_pixels) as picture:
    if getattr(picture, "is_animated", False):
      raise BadImage(f"animated {kind.lower()} of {picture.n_frames} frames")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit gray, whatever its byte order
      return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.has_transparency_data:
      picture = picture.convert("RGBA")
      picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def jpeg_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, int]:
  """(height, width, EXIF orientation 1 to 8) of a JPEG, without decoding it.

  Raises:
    BadImage: more than `max_pixels` pixels, or no header that gives a size.
  """
  with _opened(data, "JPEG", max_pixels) as picture:
    (width, height), orientation = picture.size, 1
    with contextlib.suppress(Exception):  # a damaged tag does not make the pixels bad
      orientation = picture.getexif().get(_EXIF_ORIENTATION)
  return height, width, orientation if orientation in _UPRIGHT else 1


@contextlib.contextmanager
def _opened(data, kind, max_pixels):
  """An image as Pillow opens it, its size checked; whatever goes wrong with it is a BadImage."""
  from PIL import Image

  try:
    with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
      width, height = picture.size
      if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels in its header, above the limit of {max_pixels}")
      yield picture
  except BadImage:
    raise
  except Image.DecompressionBombError as error:  # Pillow's own limit, of 179 million
    raise BadImage(f"far above the limit of {max_pixels} pixels, by its header: {error}") from error
  except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error and more
    raise BadImage(f"broken {kind.lower()}: {one_line(error)}") from error


def _decode_jpeg(data: bytes, orientation: int) -> np.ndarray:
  tf = import_tensorflow()
  if b"\xff\xd9" not in data[-1024:]:  # cut off; TensorFlow would find out too, but writes to stderr that it did
    with _opened(data, "JPEG", MAX_PIXELS) as picture:
      picture.load()
  try:
    # libjpeg-turbo by way of TensorFlow: nearly twice Pillow's speed, without the interpreter's lock, CMYK handled.
    pixels = np.asarray(tf.io.decode_jpeg(data, channels=3))
  except tf.errors.OpError as error:
    raise BadImage(f"broken jpeg: {one_line(error)}") from error
  return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def one_line(error: Exception) -> str:
  # TensorFlow prefixes "{{function_node ...}}" and suffixes "[Op:...]".
  text = " ".join(str(getattr(error, "message", error)).split())
  return text.rpartition("}} ")[2].partition(" [Op:")[0][:200] or type(error).__name__


@functools.cache
def import_tensorflow():
  import tensorflow as tf

  # Parallelism is over images; splitting operations as well only costs.  The accelerators are JAX's.  TensorFlow that
  # runs already keeps its own settings.
  with contextlib.suppress(RuntimeError):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
  return tf
