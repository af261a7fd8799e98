"""h of this folder with TensorFlow alone: images [n, size, size, 3], floats in [0, 1] or uint8 -> h [n, d].

encode = load()
h = encode(images)          # or h, z where the folder has the head
"""

import pathlib

import tensorflow as tf
from card_check import checked, read_card

HERE = pathlib.Path(__file__).resolve().parent
LIBRARIES = ("tensorflow",)


def load():
  card = read_card()
  model = tf.saved_model.load(str(HERE / "model"))

  def encode(images):
    outputs = model.signatures["serving_default"](images=tf.convert_to_tensor(images))
    return tuple(outputs[name].numpy() for name in ("h", "z")) if "z" in outputs else outputs["h"].numpy()

  encode.model = model  # its variables live as long as it does
  return checked(encode, card)
