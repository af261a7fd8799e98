"""ONNX, written node by node, so the graph is exactly what is written here.

Images float32 [n, 3, h, w] of any n, h and w.  BatchNorm stays a node of its own, which runtimes fold by themselves.  The
Vision Transformer's nodes are in onnx_vit.py.
"""

import functools
import os

import numpy as np

from simclr_jax.encoder import BN_EPSILON, DEPTHS
from simclr_jax.exporting import onnx_vit, torch_names, torch_vit_names

OPSET, IR_VERSION = 17, 8  # of 2022, read by every onnxruntime since 1.12
PROTOBUF_LIMIT = 2**31 - 2**24


def write(folder, export):
  import onnx

  model = build(export)
  # A protobuf ends at 2 GiB; the weights of larger models go to a file beside it.
  onnx.save(
    model, folder / "model.onnx", save_as_external_data=_bytes(model) > PROTOBUF_LIMIT, location="model.weights"
  )
  onnx.checker.check_model(os.fspath(folder / "model.onnx"))  # of the file: a model in memory must be below 2 GiB
  export.copy(folder, load="load_onnx.py")


def _bytes(model) -> int:
  return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


class Graph:
  """Nodes and weights; every method adds one or a few nodes and returns the name of what comes out."""

  def __init__(self, state: dict):
    self.state, self.nodes, self.weights, self.count = state, [], {}, 0

  def __call__(self, op: str, *inputs: str, **attributes) -> str:
    from onnx import helper

    self.count += 1
    name = f"{op.lower()}_{self.count}"
    self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
    return name

  def constant(self, name: str, value) -> str:
    from onnx import numpy_helper

    self.weights.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
    return name

  def weight(self, name: str) -> str:
    return self.constant(name, self.state[name])

  def conv(self, x, name, stride=1):
    kernel = self.state[f"{name}.weight"]
    bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.state else []
    pad = (kernel.shape[2] - 1) // 2
    return self("Conv", x, self.weight(f"{name}.weight"), *bias, strides=[stride] * 2, pads=[pad] * 4)

  def norm(self, x, name, relu=True):
    names = [self.weight(f"{name}.{leaf}") for leaf in ("weight", "bias", "running_mean", "running_var")]
    y = self("BatchNormalization", x, *names, epsilon=BN_EPSILON)
    return self("Relu", y) if relu else y

  def reshape(self, x, *shape):
    """0 keeps a side, -1 takes what is left."""
    return self("Reshape", x, self.constant("shape_" + "_".join(map(str, shape)), np.array(shape, np.int64)))

  def selective_kernel(self, x, name, stride):
    filters = self.state[f"{name}.conv.weight"].shape[0] // 2
    x = self.norm(self.conv(x, f"{name}.conv", stride), f"{name}.bn")
    # [n, 2 c, 1, 1] -> the sum over the two streams, [n, c, 1, 1].
    axis = self.constant("axis_1", np.array([1], np.int64))
    g = self("ReduceSum", self.reshape(self("GlobalAveragePool", x), 0, 2, filters), axis, keepdims=0)
    g = self.reshape(g, 0, filters, 1, 1)
    g = self.norm(self.conv(g, f"{name}.reduce"), f"{name}.reduce_bn")
    g = self("Softmax", self.reshape(self.conv(g, f"{name}.expand"), 0, 2, filters), axis=1)
    x = self("Mul", x, self.reshape(g, 0, 2 * filters, 1, 1))
    first, second = (self.constant(f"from_{k}_{filters}", np.array([k * filters], np.int64)) for k in (0, 1))
    end, axes = self.constant(f"from_2_{filters}", np.array([2 * filters], np.int64)), axis
    return self("Add", self("Slice", x, first, second, axes), self("Slice", x, second, end, axes))

  def squeeze_excite(self, x, name):
    g = self("Relu", self.conv(self("GlobalAveragePool", x), f"{name}.fc1"))
    return self("Mul", x, self("Sigmoid", self.conv(g, f"{name}.fc2")))

  def block(self, x, name, stride, resnet_d):
    shortcut = x
    if f"{name}.downsample.0.weight" in self.state:
      if resnet_d:
        # The official code counts padding where it strides and not where it does not (encoder.resnet_d_pool).
        pool = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": int(stride > 1)}
        shortcut = self("AveragePool", shortcut, strides=[stride] * 2, **pool)
      shortcut = self.conv(shortcut, f"{name}.downsample.0", 1 if resnet_d else stride)
      shortcut = self.norm(shortcut, f"{name}.downsample.1", relu=False)
    if f"{name}.conv3.weight" not in self.state:
      x = self.norm(self.conv(x, f"{name}.conv1", stride), f"{name}.bn1")
      x = self.norm(self.conv(x, f"{name}.conv2"), f"{name}.bn2", relu=False)
    else:
      x = self.norm(self.conv(x, f"{name}.conv1"), f"{name}.bn1")
      if f"{name}.conv2.conv.weight" in self.state:
        x = self.selective_kernel(x, f"{name}.conv2", stride)
      else:
        x = self.norm(self.conv(x, f"{name}.conv2", stride), f"{name}.bn2")
      x = self.norm(self.conv(x, f"{name}.conv3"), f"{name}.bn3", relu=False)
    if f"{name}.se.fc1.weight" in self.state:
      x = self.squeeze_excite(x, f"{name}.se")
    return self("Relu", self("Add", x, shortcut))


def resnet_features(graph, architecture) -> str:
  """h [n, d] of "images"."""
  resnet_d = architecture["sk_ratio"] > 0
  x = "images"
  if architecture["stem"] == "imagenet":
    if resnet_d:
      x = graph.norm(graph.conv(x, "conv1.0", 2), "conv1.1")
      x = graph.norm(graph.conv(x, "conv1.3"), "conv1.4")
      x = graph.norm(graph.conv(x, "conv1.6"), "bn1")
    else:
      x = graph.norm(graph.conv(x, "conv1", 2), "bn1")
    official = architecture["pool_padding"] == "official"
    padding = {"auto_pad": "SAME_UPPER"} if official else {"pads": [1, 1, 1, 1]}
    x = graph("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], **padding)
  else:
    x = graph.norm(graph.conv(x, "conv1"), "bn1")
  for i, count in enumerate(DEPTHS[architecture["depth"]][0]):
    for j in range(count):
      x = graph.block(x, f"layer{i + 1}.{j}", 2 if i and not j else 1, resnet_d)
  return graph("Flatten", graph("GlobalAveragePool", x))


def build(export):
  """The model: input "images", outputs "h" float32 [n, d] and, with the head, "z"."""
  from onnx import TensorProto, helper

  architecture = export.architecture
  if export.card["architecture"]["name"] == "vit":
    graph = Graph(torch_vit_names.timm(export.variables, patch=architecture["patch"], size=export.size))
    outputs = [onnx_vit.features(graph, architecture)]
  else:
    graph = Graph(torch_names.encoder(export.variables))
    outputs = [resnet_features(graph, architecture)]
  if export.projector:
    graph.state = torch_names.projector(export.projector)
    layers = len(graph.state) // 6  # six arrays a layer
    x = outputs[0]
    for i in range(layers):
      x = graph("Gemm", x, graph.weight(f"{3 * i}.weight"), transB=1)
      x = graph.norm(x, str(3 * i + 1), relu=i < layers - 1)
    outputs.append(x)
  nodes = graph.nodes + [
    helper.make_node("Identity", [output], [name]) for output, name in zip(outputs, export.names, strict=True)
  ]
  value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
  proto = helper.make_graph(
    nodes,
    "simclr",
    [value("images", shape=["n", 3, "height", "width"])],
    [value(name, shape=["n", None]) for name in export.names],
    list(graph.weights.values()),
  )
  opset = [helper.make_opsetid("", OPSET)]
  return helper.make_model(proto, ir_version=IR_VERSION, opset_imports=opset, producer_name="simclr_jax")
