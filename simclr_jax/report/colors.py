"""Colors and shapes that tell groups apart."""

import colorsys

# Chosen by search: under normal vision and the three kinds of color blindness (matrices of Machado et al. 2009) any two are
# at least 28 apart in CIE L*a*b*, and each has a contrast of at least 1.9 with the light and the dark page.
EIGHT = ("#2b6cb0", "#e79823", "#c99ca5", "#9c2d11", "#75bff0", "#833eea", "#854754", "#8ca960")
SHAPES = (  # polygons in the unit circle; the first, without corners, is the circle
  (),
  ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
  ((0.0, -1.15), (1.05, 0.75), (-1.05, 0.75)),
  ((0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)),
  (
    *((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4)),
    *((0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)),
  ),
)


def colors(count: int) -> list[str]:
  """`count` colors as #rrggbb, as distinct as that many can be."""
  if count <= len(EIGHT):
    return list(EIGHT[: max(count, 1)])
  # The hues are a golden angle apart, so that classes with consecutive numbers differ, at three levels of brightness.
  hues = [(0.6 + 0.381966 * i) % 1.0 for i in range(count)]
  rgb = [colorsys.hls_to_rgb(hue, (0.42, 0.56, 0.34)[i % 3], 0.6) for i, hue in enumerate(hues)]
  return ["#" + "".join(f"{round(255 * v):02x}" for v in one) for one in rgb]


def marks(count: int) -> list[tuple[str, tuple]]:
  """`count` pairs (color, shape of SHAPES) for points, at least one; the first forty are distinct."""
  return [(EIGHT[i % len(EIGHT)], SHAPES[i // len(EIGHT) % len(SHAPES)]) for i in range(max(count, 1))]
