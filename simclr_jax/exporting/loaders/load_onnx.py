"""h of this folder with onnxruntime: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head

model.onnx itself takes "images" float32 [n, 3, h, w], of any size.
"""

import pathlib

import onnxruntime
from card_check import checked, read_card

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("onnxruntime",)


def load():
  card = read_card()
  session = onnxruntime.InferenceSession(str(HERE / "model.onnx"))

  def encode(images):
    outputs = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    return tuple(outputs) if len(outputs) > 1 else outputs[0]

  return checked(encode, card)
