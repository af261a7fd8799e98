"""h of this folder with TensorFlow alone: images float32 [n, size, size, 3] in [0, 1], any n -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import tensorflow as tf

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("tensorflow",)


def load():
  model = tf.saved_model.load(str(HERE / "model"))

  def encode(images):
    outputs = model.signatures["serving_default"](images=tf.convert_to_tensor(images))
    return tuple(outputs[name].numpy() for name in ("h", "z")) if "z" in outputs else outputs["h"].numpy()

  encode.model = model  # its variables live as long as it does
  return encode
