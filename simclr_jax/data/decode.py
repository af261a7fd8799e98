"""From the bytes of a file to pixels."""

import contextlib
import functools
import io
import re
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 30  # of a stored image: more than MAX_PIXELS take without compression
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


# Folders that systems and file servers make beside what people keep; hidden ones begin with a dot.
JUNK = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class BadImage(Exception):
  """One image cannot be used; the message is the reason, in a few words."""


class ReadError(BadImage):
  """Bytes cannot be read at the moment; the image may be intact."""


_FIRST_BYTES = (
  (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"),
  (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
)  # fmt: skip
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_EXIF_ORIENTATION = 0x0112
_BITS = 258  # the tag of a TIFF with the bits of each channel
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
  """Whether a file or folder `name` in `folder`, a relative path, is hidden or made by a system: never a class or an image."""
  return any(part in JUNK or (part.startswith(".") and part != ".") for part in (*folder.split("/"), name))


def sniff(data: bytes) -> str | None:
  """The image format according to the first bytes, since file names cannot be trusted."""
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "WEBP"
  if data[4:8] == b"ftyp":  # a brand and a minor version, then the brands that the file is compatible with
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = {bytes(data[i : i + 4]) for i in (8, *range(16, size, 4))}
    return "AVIF" if brands & {b"avif", b"avis"} else "HEIC" if brands & _HEIC else None
  return next((kind for magic, kind in _FIRST_BYTES if data.startswith(magic)), None)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, bits: int = 16) -> np.ndarray:
  """Decodes one JPEG, PNG, WebP, BMP, TIFF, AVIF or single-frame GIF to uint8 [h, w, 3], upright.

  Gray, palette and CMYK images become RGB; transparent pixels are laid over white; the orientation in EXIF or XMP is
  applied.  The size in the header is checked before a pixel is decoded, because a PNG of one megabyte can unfold to a
  gigabyte.

  Args:
    bits: how many of the 16 bits of each channel of a 16-bit image are used: 12 if all values are below 4096.  Values from
      0 to 2^bits - 1 become 0 to 255, larger ones 255.  This is a property of the set, not of one image; see `Source.bits`.

  Raises:
    BadImage: empty, not an image, truncated, animated, of several pages, or more than `max_pixels` pixels.
  """
  from PIL import Image

  if not data:
    raise BadImage("empty file")
  kind = sniff(data)
  if kind is None:
    raise BadImage(f"not a jpeg, png, webp, bmp, gif, tiff or avif: it begins with {bytes(data[:12])!r}")
  if kind == "JPEG":
    return _decode_jpeg(data, jpeg_header(data, max_pixels=max_pixels))
  with _loaded(data, kind, max_pixels) as picture:
    orientation = _orientation(picture)
    if (values := _deep(picture, data)) is not None:
      if bits < 16 and values.ndim == 3 and kind == "TIFF":
        raise BadImage(f"{bits} bits of 16 in a color tiff, of which Pillow reads the upper 8; convert it to png")
      small = np.minimum(values >> (bits - 8), 255)
      if _has_alpha(values):  # opaque at 2^16 - 1, whatever the colors use
        small[..., -1] = values[..., -1] >> 8
      picture = Image.fromarray(small.astype(np.uint8))
    if picture.has_transparency_data:
      picture = picture.convert("RGBA")
      picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    pixels = np.asarray(picture.convert("RGB"))
  return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def may_be_deep(data: bytes) -> bool:
  """Whether an image may have 16 bits per channel, judging by its first bytes."""
  return sniff(data) == "TIFF" or (sniff(data) == "PNG" and data[24:25] == b"\x10")


def significant_bits(data: bytes) -> int | None:
  """The number of bits of the largest value of a 16-bit image, 1 to 16; None for other images and broken ones."""
  kind = sniff(data)
  if not may_be_deep(data):
    return None
  with contextlib.suppress(BadImage), _loaded(data, kind, MAX_PIXELS) as picture:
    values = _deep(picture, data)
    if values is None:
      return None
    colors = values[..., :-1] if _has_alpha(values) else values
    return int(colors.max()).bit_length() or 1
  return None


def _has_alpha(values) -> bool:
  return values.ndim == 3 and values.shape[2] in (2, 4)


def _deep(picture, data) -> np.ndarray | None:
  """The values of a 16-bit image, uint16 [h, w] or [h, w, channels]; None of another."""
  if picture.mode == "F":
    raise BadImage("floating-point pixels; convert it to 8 or 16 bits")
  if picture.mode.startswith("I"):  # gray, whatever its byte order
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
      raise BadImage("more than 16 bits a pixel; convert it to 8 or 16 bits")
    return values.astype(np.uint16)
  if picture.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):  # of color Pillow keeps the upper 8 bits
    tf = import_tensorflow()
    try:
      return np.asarray(tf.io.decode_png(data, dtype=tf.uint16))
    except tf.errors.OpError as error:
      raise BadImage(f"broken png: {one_line(error)}") from error
  if picture.format == "TIFF" and picture.mode in ("RGB", "RGBA") and max(picture.tag_v2.get(_BITS, (8,))) == 16:
    return np.asarray(picture).astype(np.uint16) << 8
  return None


class JpegHeader(NamedTuple):
  """What the header of a JPEG says.

  Attributes:
    height, width: as it is stored.
    orientation: 1 to 8, of EXIF or XMP.
    plain: whether TensorFlow decodes it correctly.
  """

  height: int
  width: int
  orientation: int
  plain: bool


def jpeg_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> JpegHeader:
  """The header of a JPEG, without decoding it.

  Raises:
    BadImage: more than `max_pixels` pixels, or no header that gives a size.
  """
  with _opened(data, "JPEG", max_pixels) as picture:
    width, height = picture.size
    # TensorFlow makes black of inks without Adobe's marker; Pillow takes them as Adobe's.
    plain = picture.mode != "CMYK" or "adobe" in picture.info
    return JpegHeader(height, width, _orientation(picture), plain)


def _orientation(picture) -> int:
  """1 to 8, of EXIF or XMP, which may store it as any type; after a damaged tag 1, as the pixels are not bad."""
  value = None
  with contextlib.suppress(Exception):
    value = picture.getexif().get(_EXIF_ORIENTATION)
    value = value[0] if isinstance(value, bytes | tuple) else value
  if value in _UPRIGHT or value == 1:
    return int(value)
  text = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
  text = text.encode() if isinstance(text, str) else text
  found = re.search(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""", text)
  return int(found[1]) if found else 1


@contextlib.contextmanager
def _loaded(data, kind, max_pixels):
  """A single image with its pixels, as Pillow decodes it."""
  from PIL import features

  if kind == "HEIC" or (kind == "AVIF" and not features.check("avif")):
    raise BadImage(f"{kind.lower()}, which Pillow does not read here; convert it to jpeg")
  with _opened(data, kind, max_pixels) as picture:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
      raise BadImage(f"tiff of {frames} pages" if kind == "TIFF" else f"animated {kind.lower()} of {frames} frames")
    picture.load()
    yield picture


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


def _decode_jpeg(data: bytes, header: JpegHeader) -> np.ndarray:
  tf = import_tensorflow()
  # Cut off: TensorFlow would find out too, but writes to stderr that it did.
  if not header.plain or b"\xff\xd9" not in data[-1024:]:
    with _opened(data, "JPEG", MAX_PIXELS) as picture:
      pixels = np.asarray(picture.convert("RGB"))
  if header.plain:
    try:
      # libjpeg-turbo by way of TensorFlow: nearly twice Pillow's speed, without the interpreter's lock, CMYK handled.
      pixels = np.asarray(tf.io.decode_jpeg(data, channels=3))
    except tf.errors.OpError as error:
      raise BadImage(f"broken jpeg: {one_line(error)}") from error
  upright = _UPRIGHT.get(header.orientation)
  return np.ascontiguousarray(upright(pixels)) if upright else pixels


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
