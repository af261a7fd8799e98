"""Colors that tell groups apart."""

import colorsys

TEN = ("#2b6cb0", "#e08a2c", "#2f9e6e", "#c9413f", "#8e63b8", "#8c6239", "#d671ae", "#70777f", "#a9a62b", "#2bb1c4")


def colors(count: int) -> list[str]:
  """`count` colors as #rrggbb, as distinct as that many can be."""
  if count <= len(TEN):
    return list(TEN[: max(count, 1)])
  # The hues are a golden angle apart, so that classes with consecutive numbers differ, at three levels of brightness.
  hues = [(0.6 + 0.381966 * i) % 1.0 for i in range(count)]
  rgb = [colorsys.hls_to_rgb(hue, (0.42, 0.56, 0.34)[i % 3], 0.6) for i, hue in enumerate(hues)]
  return ["#" + "".join(f"{round(255 * v):02x}" for v in one) for one in rgb]
