"""preprocessing.center_crop as an image processor: AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)."""

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .preprocessing import center_crop


class SimCLRImageProcessor(BaseImageProcessor):
  """The keys of preprocessor_config.json: `side` in pixels, `proportion` of the shorter side, `interpolation`."""

  model_input_names = ["pixel_values"]

  def __init__(self, side=224, proportion=0.875, interpolation="bicubic", **kwargs):
    super().__init__(**kwargs)
    self.side, self.proportion, self.interpolation = side, proportion, interpolation

  def preprocess(self, images, return_tensors=None, **kwargs):
    """PIL images, or arrays [h, w, 3] uint8 or in [0, 1]; one or a list -> pixel_values float32 [n, 3, side, side]."""
    crops = [self._crop(image) for image in (images if isinstance(images, list | tuple) else [images])]
    return BatchFeature({"pixel_values": np.stack(crops)}, tensor_type=return_tensors)

  def _crop(self, image):
    if hasattr(image, "convert"):  # PIL: photos lie as the camera was held, and what is transparent is white
      image = ImageOps.exif_transpose(image)
      if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      image = image.convert("RGB")
    options = {"size": self.side, "proportion": self.proportion, "resize": self.interpolation}
    return center_crop(np.asarray(image), **options).transpose(2, 0, 1)
