"""The Vision Transformer as nodes of an ONNX graph, for images of any sides that are multiples of the patch."""

import numpy as np

from simclr_jax.vit import EPSILON, SIZES, positions

LONGEST = 1024  # patches along a side for which the graph has positions


def features(graph, architecture) -> str:
  """h [n, d] of "images"; the weights of `graph` are named as timm names them."""
  d, blocks, heads = SIZES[architecture["size"]]
  weights = [graph.weight(f"patch_embed.proj.{leaf}") for leaf in ("weight", "bias")]
  x = graph("Conv", "images", *weights, strides=[architecture["patch"]] * 2)  # [n, d, rows, columns]
  x = graph("Add", x, _positions(graph, x, d))
  x = graph("Transpose", graph.reshape(x, 0, d, -1), perm=[0, 2, 1])
  n = graph("Shape", x, end=1)
  sizes = graph("Concat", n, _integers(graph, 1, d), axis=0)
  x = graph("Concat", graph("Expand", graph.weight("cls_token"), sizes), x, axis=1)
  for i in range(blocks):
    x = _block(graph, x, f"blocks.{i}", d, heads)
  x = _norm(graph, x, "norm")
  if architecture["pool"] == "token":
    return graph("Gather", x, graph.constant("first", np.int64(0)), axis=1)
  patches = graph("Slice", x, _integers(graph, 1), _integers(graph, 2**62), _integers(graph, 1))
  return graph("ReduceMean", patches, axes=[1], keepdims=0)


def _positions(graph, x, d: int) -> str:
  """[d, rows, columns]: a table of sines, cut to the sides of x [n, d, rows, columns], for columns and for rows."""
  table = graph.constant("sines", positions(1, LONGEST, d)[:, : d // 2].T)
  rows, columns = (graph("Shape", x, start=axis, end=axis + 1) for axis in (2, 3))
  sizes = graph("Concat", _integers(graph, d // 2), rows, columns, axis=0)
  halves = []
  for count, shape in ((columns, (0, 1, -1)), (rows, (0, -1, 1))):
    sines = graph("Slice", table, _integers(graph, 0), count, _integers(graph, 1))
    halves.append(graph("Expand", graph.reshape(sines, *shape), sizes))
  return graph("Concat", *halves, axis=0)


def _block(graph, x, name, d, heads):
  qkv = graph.reshape(_dense(graph, _norm(graph, x, f"{name}.norm1"), f"{name}.attn.qkv"), 0, 0, 3, heads, d // heads)
  qkv = graph("Transpose", qkv, perm=[2, 0, 3, 1, 4])  # [3, n, heads, tokens, d / heads]
  q, k, v = (graph("Gather", qkv, graph.constant(f"number_{i}", np.int64(i)), axis=0) for i in range(3))
  q = graph("Mul", q, graph.constant("attention_scale", np.float32((d // heads) ** -0.5)))
  weights = graph("Softmax", graph("MatMul", q, graph("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
  mixed = graph("Transpose", graph("MatMul", weights, v), perm=[0, 2, 1, 3])
  x = graph("Add", x, _dense(graph, graph.reshape(mixed, 0, 0, d), f"{name}.attn.proj"))
  hidden = _gelu(graph, _dense(graph, _norm(graph, x, f"{name}.norm2"), f"{name}.mlp.fc1"))
  return graph("Add", x, _dense(graph, hidden, f"{name}.mlp.fc2"))


def _norm(graph, x, name):
  names = [graph.weight(f"{name}.{leaf}") for leaf in ("weight", "bias")]
  return graph("LayerNormalization", x, *names, axis=-1, epsilon=EPSILON)


def _dense(graph, x, name):
  kernel = graph.constant(f"{name}.kernel", np.ascontiguousarray(graph.state[f"{name}.weight"].T))
  return graph("Add", graph("MatMul", x, kernel), graph.weight(f"{name}.bias"))


def _gelu(graph, x):
  """x (1 + erf(x / sqrt(2))) / 2."""
  root, one, half = (graph.constant(f"gelu_{i}", np.float32(v)) for i, v in enumerate((2**0.5, 1, 0.5)))
  return graph("Mul", graph("Mul", x, graph("Add", graph("Erf", graph("Div", x, root)), one)), half)


def _integers(graph, *values) -> str:
  return graph.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))
