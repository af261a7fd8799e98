"""h of this folder with onnxruntime: images float32 [n, h, w, 3] in [0, 1], any n, h and w -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head

model.onnx itself takes "images" float32 [n, 3, h, w].
"""

import pathlib

import onnxruntime

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("onnxruntime",)


def load():
  session = onnxruntime.InferenceSession(str(HERE / "model.onnx"))

  def encode(images):
    outputs = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    return tuple(outputs) if len(outputs) > 1 else outputs[0]

  return encode
