"""From bytes to pixels, and the reasons for refusing bytes."""

import struct

import numpy as np
import pytest
from images import encoded, gradient, png
from PIL import Image, PngImagePlugin, features

from simclr_jax import data
from simclr_jax.data.decode import may_be_deep, significant_bits


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG", "TIFF", "AVIF"])
def test_decode_formats(kind):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no avif")
  image = gradient()
  assert data.sniff(encoded(image, kind)) == kind
  options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
  decoded = data.decode(encoded(image, kind, **options))
  assert decoded.shape == image.shape and decoded.dtype == np.uint8
  error = np.abs(decoded.astype(int) - image).max()
  assert error <= {"JPEG": 12, "GIF": 80, "AVIF": 40}.get(kind, 0)


def test_decode_progressive_jpeg():
  decoded = data.decode(encoded(gradient(), "JPEG", quality=95, subsampling=0, progressive=True))
  assert np.abs(decoded.astype(int) - gradient()).max() <= 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_decode_gray(kind):
  gray = gradient()[..., 0]
  decoded = data.decode(encoded(gray, kind, **({"lossless": True} if kind == "WEBP" else {"quality": 95})))
  assert decoded.shape == (*gray.shape, 3)
  assert np.abs(decoded.astype(int) - gray[..., None]).max() <= 4
  assert (decoded[..., 0] == decoded[..., 1]).all() and (decoded[..., 0] == decoded[..., 2]).all()


def test_decode_cmyk_jpeg():
  """Inks as Pillow writes them (Adobe's inverted convention): pure cyan, magenta, yellow, black and bare paper."""
  inks = np.zeros((16, 80, 4), np.uint8)
  for i in range(4):
    inks[:, 16 * i : 16 * (i + 1), i] = 255
  decoded = data.decode(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=95))
  expected = np.array([[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]])
  assert np.abs(decoded[8, 8::16].astype(int) - expected).max() <= 6


def test_decode_cmyk_jpeg_without_adobe_marker():
  """Which TensorFlow makes black; the inks are taken as Adobe's, as Pillow does."""
  for inks in ((0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 128)):
    jpeg = encoded(Image.new("CMYK", (16, 24), inks), "JPEG", quality=95)
    marker = jpeg.index(b"\xff\xee")
    bare = jpeg[:marker] + jpeg[marker + 2 + int.from_bytes(jpeg[marker + 2 : marker + 4], "big") :]
    assert not data.jpeg_header(bare).plain and data.jpeg_header(jpeg).plain
    np.testing.assert_allclose(data.decode(bare), data.decode(jpeg), atol=2)
  with pytest.raises(data.BadImage, match="broken jpeg"):
    data.decode(bare[:-200])


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_decode_16_bit_gray_with_fewer_bits(kind, options):
  values = np.linspace(0, 4095, 24 * 40).reshape(24, 40).astype(np.uint16)
  stored = encoded(values, kind, **options)
  np.testing.assert_array_equal(data.decode(stored, bits=12)[..., 1], values >> 4)
  np.testing.assert_array_equal(data.decode(stored, bits=10)[..., 1], np.minimum(values >> 2, 255))
  assert significant_bits(stored) == 12 and may_be_deep(stored)
  assert significant_bits(encoded(values.astype(np.uint8), kind, **options)) is None


@pytest.mark.parametrize("color, channels", [(2, 3), (4, 2), (6, 4)])
def test_decode_16_bit_color_png_with_fewer_bits(color, channels):
  values = np.full((4, 5, channels), 4095, np.uint16)
  values[..., 0] = [0, 16, 32, 48, 4095]
  if channels in (2, 4):  # alpha, opaque
    values[..., -1] = 65535
  stored = png(5, 4, 16, color, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
  assert significant_bits(stored) == 12
  decoded = data.decode(stored, bits=12)
  assert decoded.shape == (4, 5, 3) and decoded[0, :, 0].tolist() == [0, 1, 2, 3, 255]
  assert (decoded[..., 2] == (decoded[..., 0] if channels == 2 else 255)).all()
  for body in (stored[:60], b"\x89PNG\r\n\x1a\n" + bytes(20)):
    with pytest.raises(data.BadImage):
      data.decode(body, bits=12)


def tiff(values) -> bytes:
  """An uncompressed color TIFF with 16 bits a channel, of which Pillow writes none."""
  height, width, channels = values.shape
  entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 150), (259, 3, 1, 1), (262, 3, 1, 2),
             (273, 4, 1, 170), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, values.size * 2)]  # fmt: skip
  header = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
  header += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
  return header.ljust(150) + struct.pack("<3H", 16, 16, 16).ljust(20) + values.astype("<u2").tobytes()


def test_color_tiffs_of_16_bits_are_read_if_they_use_them():
  """Pillow reads the upper 8 bits, which is nothing of an image that uses the lower ones."""
  values = np.linspace(0, 65535, 4 * 5 * 3).reshape(4, 5, 3).astype(np.uint16)
  np.testing.assert_array_equal(data.decode(tiff(values)), values >> 8)
  assert significant_bits(tiff(values)) == 16 and significant_bits(tiff(values >> 4)) == 12
  with pytest.raises(data.BadImage, match="12 bits of 16 in a color tiff.*convert it to png"):
    data.decode(tiff(values >> 4), bits=12)


def test_decode_refuses_what_has_no_range():
  for image, reason in (
    (np.ones((4, 4), np.float32), "floating"),
    (np.full((4, 4), 70000, np.int32), "more than 16 bits"),
  ):
    with pytest.raises(data.BadImage, match=f"{reason}.*convert it to 8 or 16 bits"):
      data.decode(encoded(image, "TIFF"))
  np.testing.assert_array_equal(data.decode(encoded(np.full((4, 4), 256, np.int32), "TIFF")), 1)
  pages = [Image.fromarray(gradient())] * 3
  with pytest.raises(data.BadImage, match="tiff of 3 pages"):
    data.decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
  heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
  with pytest.raises(data.BadImage, match="heic, which Pillow does not read here; convert it to jpeg"):
    data.decode(heic)
  assert data.sniff(b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1") == "AVIF" and data.sniff(b"\0\0\0\x18ftypisom") is None


def test_decode_16_bit_gray_png():
  values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
  decoded = data.decode(encoded(values, "PNG"))
  np.testing.assert_array_equal(decoded, np.repeat((values // 256).astype(np.uint8)[..., None], 3, -1))


def test_decode_16_bit_rgb_png():
  image = gradient(4, 5)
  rows = (image.astype(">u2") * 257).reshape(4, -1)
  decoded = data.decode(png(5, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))
  np.testing.assert_array_equal(decoded, image)


def test_decode_palette():
  palette = Image.fromarray(gradient()).quantize(64)
  expected = np.asarray(palette.convert("RGB"))
  np.testing.assert_array_equal(data.decode(encoded(palette, "PNG")), expected)
  np.testing.assert_array_equal(data.decode(encoded(palette, "GIF")), expected)


def test_transparent_pixels_are_laid_over_white():
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[..., 0] = 200
  rgba[:2, :, 3] = 255
  decoded = data.decode(encoded(rgba, "PNG"))
  assert (decoded[:2] == [200, 0, 0]).all() and (decoded[2:] == 255).all()
  palette = Image.fromarray(np.repeat([[0, 1]], 2, 0).astype(np.uint8), "P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  decoded = data.decode(encoded(palette, "PNG", transparency=1))
  assert (decoded[:, 0] == [10, 20, 30]).all() and (decoded[:, 1] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
  """The stored picture is the upright one transformed; the tag says how to turn it back (Exif 2.3, table 6)."""
  upright = gradient()
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: np.rot90(upright, 2),
    4: upright[::-1],
    5: upright.transpose(1, 0, 2),
    6: np.rot90(upright),
    7: np.rot90(upright, 2).transpose(1, 0, 2),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  decoded = data.decode(encoded(np.ascontiguousarray(stored), kind, exif=exif, quality=95, subsampling=0))
  assert decoded.shape == upright.shape
  assert np.abs(decoded.astype(int) - upright).max() <= 12


def exif(order, kind, value):
  """An orientation, stored in some type: 1 byte, 3 SHORT, 4 LONG."""
  body = {1: bytes([value, 0, 0, 0]), 3: struct.pack(order + "HH", value, 0), 4: struct.pack(order + "I", value)}[kind]
  head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIHHHI", 42, 8, 1, 0x0112, kind, 1)
  return b"Exif\0\0" + head + body + bytes(4)


XMP = "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation={} </x:xmpmeta>"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
  "where",
  [{"exif": exif(order, type_, 6)} for order in "<>" for type_ in (1, 3, 4)]
  + [{"xmp": XMP.format(text).encode()} for text in ('"6"', "'6'")]
  + [
    {"xmp": XMP.replace("Orientation=", "Orientation>").format("6<").encode()},
    {"xmp": XMP.format('"6"').encode(), "exif": exif("<", 3, 0)},
  ],
)
def test_orientation_in_any_form(kind, where):
  if kind == "PNG" and "xmp" in where:
    where = {**where, "pnginfo": PngImagePlugin.PngInfo()}
    where["pnginfo"].add_itxt("XML:com.adobe.xmp", where.pop("xmp").decode())
  decoded = data.decode(encoded(np.ascontiguousarray(np.rot90(gradient())), kind, quality=95, **where))
  assert decoded.shape == gradient().shape and np.abs(decoded.astype(int) - gradient()).mean() < 8


@pytest.mark.parametrize(
  "bytes_, reason",
  [
    (b"", "empty file"),
    (b"hello, not an image", "not a jpeg, png.*hello"),
    (b"<html><body>404</body></html>", "not a jpeg"),
    (encoded(gradient(), "TIFF")[:900], "broken tiff"),
    (encoded(gradient(200, 200), "JPEG")[:1500], "broken jpeg"),
    (encoded(gradient(200, 200), "JPEG")[:-2], "broken jpeg"),
    (encoded(gradient(200, 200), "PNG")[:400], "broken png"),
    (encoded(gradient(), "PNG")[:12], "broken png"),
    (encoded(gradient(200, 200), "WEBP", lossless=True)[:300], "broken webp"),
    (encoded(gradient(), "BMP")[:100], "broken bmp"),
    (png(20000, 20000, 8, 2, b"\0"), r"above the limit of 64000000 pixels.*\(400000000 pixels\)"),
    (png(9000, 8000, 8, 2, b"\0"), "9000 x 8000 pixels in its header, above the limit of 64000000"),
  ],
  ids=[
    "empty",
    "text",
    "html",
    "half a tiff",
    "half a jpeg",
    "a jpeg without its end",
    "half a png",
    "a png header",
    "half a webp",
    "half a bmp",
    "png bomb",
    "large png",
  ],
)
def test_bad_images(bytes_, reason):
  with pytest.raises(data.BadImage, match=reason) as raised:
    data.decode(bytes_)
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_jpeg_bomb_is_refused_by_its_header():
  jpeg = bytearray(encoded(gradient(), "JPEG"))
  frame = jpeg.index(b"\xff\xc0")  # start of frame: length, precision, height, width
  jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
  with pytest.raises(data.BadImage, match="above the limit of 64000000"):
    data.decode(bytes(jpeg))
  with pytest.raises(data.BadImage, match="40 x 24 pixels.*limit of 100"):
    data.decode(encoded(gradient(), "JPEG"), max_pixels=100)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused(kind):
  frames = [Image.fromarray(np.roll(gradient(), 5 * i, 1)) for i in range(3)]
  moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
  with pytest.raises(data.BadImage, match=f"animated {kind.lower()} of 3 frames"):
    data.decode(moving)
