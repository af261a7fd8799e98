"""TF SavedModel: the same program inside TensorFlow, with the weights as its variables, for TF Serving and tf.data."""

import tensorflow as tf
from flax import traverse_util
from jax.experimental import jax2tf

from simclr_jax.exporting import stablehlo


def write(folder, export):
  flat = traverse_util.flatten_dict(export.trees(), sep="/")
  names = list(flat)
  module = tf.Module()
  module.weights = [tf.Variable(flat[name], trainable=False, name=name) for name in names]

  def encode(weights, images):
    return export.apply(traverse_util.unflatten_dict(dict(zip(names, weights, strict=True)), sep="/"), images)

  converted = jax2tf.convert(
    encode,
    polymorphic_shapes=(None, "(n, ...)"),
    with_gradient=False,
    native_serialization_platforms=stablehlo.PLATFORMS,
  )
  images = tf.TensorSpec([None, export.size, export.size, 3], tf.float32, name="images")
  module.encode = tf.function(
    lambda images: dict(zip(export.names, converted(module.weights, images), strict=True)),
    input_signature=[images],
    autograph=False,
  )
  tf.saved_model.save(module, str(folder / "model"), signatures={"serving_default": module.encode})
  export.copy(folder, load="load_savedmodel.py")
