"""The official checkpoints (google-research/simclr) as our variables: encoder, projection head, classifier.

It reads TF1 bundles (the released v1 and v2 weights), and checkpoints and SavedModels that the TF2 code writes.  All three
number their convolutions and BatchNorms in the order of creation, which is the order in which our encoder creates its
own (encoder.py): shortcut first, then the block's; selective kernels 3x3, reduce, expand; squeeze-excite last.  So the
k-th convolution there is the k-th here.  Depth, width, stem, selective kernels and squeeze-excite are inferred from the names
and shapes; anything that does not fit is an error that names it.
"""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from simclr_jax.encoder import DEPTHS, resnet
from simclr_jax.runtime.errors import UserError

_LEAVES = {
  "kernel": ("params", "kernel"),
  "bias": ("params", "bias"),
  "gamma": ("params", "scale"),
  "beta": ("params", "bias"),
  "moving_mean": ("batch_stats", "mean"),
  "moving_variance": ("batch_stats", "var"),
}
_LEAF = "(?P<leaf>" + "|".join(_LEAVES) + ")$"
# TF1 scopes base_model, head_contrastive, head_supervised; the TF2 code's variables are called after its layers.
_ENCODER = re.compile(
  r"(?:base_model|resnet)/(?:.*/)?(?:(?P<conv>conv2d)|(?:sync_)?batch_normalization)(?:_(?P<k>\d+))?/" + _LEAF
)
_PROJECTOR = re.compile(
  r"(?:head_contrastive|projection_head)/(?P<kind>nl|l)_(?P<j>\d+)/(?:.*/)?"
  r"(?:(?P<dense>dense)|(?:sync_)?batch_normalization)(?:_\d+)?/" + _LEAF
)
_CLASSIFIER = re.compile(r"head_supervised/(?:.*/)?dense(?:_\d+)?/" + _LEAF)
# Optimizer slots, counters, and the memory bank of v2: nothing that h depends on.
_STATE = re.compile(
  r"(/[Mm]omentum|/Adam(_1)?|/[mv]|global_step|save_counter|beta[12]_power|_CHECKPOINTABLE_OBJECT_GRAPH)$"
  r"|\.OPTIMIZER_SLOT/|^optimizer/|^(ema_model/)?(memory|queue)"
)
_EMA = "ema_model/"


def load(path, *, ema: bool = False):
  """Reads an official checkpoint.

  Args:
    path: the prefix of a TF1 bundle or TF2 checkpoint (`.../model.ckpt-250228`), or the folder of a SavedModel.
    ema: take the moving averages `ema_model/...`, where the checkpoint has them, instead of the weights themselves.

  Returns:
    (encoder, projector, classifier, info): {"params", "batch_stats"} of float32 numpy arrays for `resnet(**info["encoder"])`,
    the same for `Projector(**info["projector"])` or None, {"params": {"kernel", "bias"}} or None; `info` holds further
    source, format ("TF1 bundle", "TF2 checkpoint", "SavedModel"), num_classes, step (or None), has_ema, the side of the
    images (`size`), their central crop (`crop`) and the resize (`resize`, see augment.resize_image) of its training.

  Raises:
    ValueError: no such checkpoint, or a variable unknown, missing, or of a wrong shape; one line that lists them.
  """
  names, read, kind = _open(path)
  has_ema = any(name.startswith(_EMA) for name in names)
  if ema and not has_ema:
    raise UserError(f"{path}: holds no {_EMA} variables: leave --ema out")
  found, left = {"encoder": {}, "projector": {}, "classifier": {}}, []
  for name, shape in names.items():
    if _STATE.search(name) or name.startswith(_EMA) != ema and name.startswith((_EMA, "base_model/", "head_contr")):
      continue
    key = _place(name.removeprefix(_EMA))
    if key is None:
      left.append(name)
    else:
      found[key[0]][key[1:]] = (name, shape)
  if not found["encoder"]:
    raise UserError(f"{path}: holds no variable of a ResNet of google-research/simclr; the first is {_some(names)}")
  encoder_config, wanted = _architecture(found["encoder"])
  problems = [f"unknown {_some(left)}"] if left else []
  problems += _differences(found["encoder"], wanted)
  width = list(wanted.values())[-1][1][-1]  # of h: the last convolution's or BatchNorm's channels
  projector_config, wanted_head = _head(found["projector"], width)
  problems += _differences(found["projector"], wanted_head)
  classes = next((shape[-1] for _, shape in found["classifier"].values()), 0)
  wanted_classifier = {("kernel",): (None, (width, classes)), ("bias",): (None, (classes,))} if classes else {}
  problems += _differences(found["classifier"], wanted_classifier)
  if problems:
    raise UserError(f"{path}: does not fit a {title(encoder_config)}, the nearest network: " + "; ".join(problems))

  def fill(part, wanted):
    flat = {target: np.asarray(read(found[part][key][0]), np.float32) for key, (target, _) in wanted.items()}
    return traverse_util.unflatten_dict(flat)

  classifier = {"params": {key[0]: np.asarray(read(v[0]), np.float32) for key, v in found["classifier"].items()}}
  cifar, tf1 = encoder_config["stem"] == "cifar", any(name.startswith((_EMA, "base_model/")) for name in names)
  info = {
    "source": str(path),
    "format": kind,
    "encoder": encoder_config,
    "projector": projector_config,
    "num_classes": classes,
    "step": int(read("global_step")) if "global_step" in names else None,
    "has_ema": has_ema,
    "size": 32 if cifar else 224,
    "crop": 1.0 if cifar else 0.875,
    "resize": "bicubic_tf1" if tf1 else "bicubic",
  }
  return (
    fill("encoder", wanted),
    fill("projector", wanted_head) if wanted_head else None,
    classifier if classes else None,
    info,
  )


def _open(path):
  """({name: shape}, name -> array, format).  A TF2 file calls its variables by their place in the object graph; their
  names proper are kept beside it."""
  import tensorflow as tf
  from tensorflow.core.protobuf import trackable_object_graph_pb2 as object_graph

  saved_model = (pathlib.Path(path) / "saved_model.pb").exists()
  try:
    reader = tf.train.load_checkpoint(f"{path}/variables/variables" if saved_model else str(path))
  except (tf.errors.OpError, ValueError, RuntimeError):
    raise UserError(
      f"{path}: no checkpoint; give the part before .index of a checkpoint's files, or a folder with saved_model.pb"
    ) from None
  shapes = {key: tuple(shape) for key, shape in reader.get_variable_to_shape_map().items()}
  keys = {key: key for key in shapes}
  if "_CHECKPOINTABLE_OBJECT_GRAPH" in shapes:
    graph = object_graph.TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    for node in graph.nodes:
      for a in node.attributes:
        # Not for counters and the optimizer's own, whose names say nothing.
        if a.full_name and a.checkpoint_key in shapes and a.checkpoint_key.startswith(("model/", "trainable_", "var")):
          del keys[a.checkpoint_key]
          keys[a.full_name] = a.checkpoint_key
    keys = {re.sub(r"/\.ATTRIBUTES/VARIABLE_VALUE$", "", name): key for name, key in keys.items()}
  kind = "SavedModel" if saved_model else "TF2 checkpoint" if "_CHECKPOINTABLE_OBJECT_GRAPH" in shapes else "TF1 bundle"

  def read(name):
    try:
      return reader.get_tensor(keys[name])
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
      # A file of the data is missing, or was not copied to its end.
      why = " ".join(str(error).split())[:200]
      raise UserError(f"{path}: {name} cannot be read ({why}): copy the checkpoint again, with all its files") from None

  return {name: shapes[key] for name, key in keys.items()}, read, kind


def _place(name):
  """Where a variable belongs: ("encoder", "conv" or "norm", number, leaf), ("projector", kind, layer, "dense" or "norm",
  leaf), ("classifier", leaf), or None."""
  if m := _ENCODER.match(name):
    return "encoder", "conv" if m["conv"] else "norm", int(m["k"] or 0), m["leaf"]
  if m := _PROJECTOR.match(name):
    return "projector", m["kind"], int(m["j"]), "dense" if m["dense"] else "norm", m["leaf"]
  if m := _CLASSIFIER.match(name):
    return "classifier", m["leaf"]
  return None


def _architecture(found):
  """(keyword arguments of `resnet`, {(kind, number, leaf): (our path, shape)}) of the network nearest to what is there."""
  shapes = {key: shape for key, (_, shape) in found.items()}
  first = {kind: min((k for kk, k, _ in shapes if kk == kind), default=0) for kind in ("conv", "norm")}
  stem_kernel = shapes.get(("conv", first["conv"], "kernel"), (7, 7, 3, 64))
  squeezed = any(kind == "conv" and leaf == "bias" for kind, _, leaf in shapes)
  kernels = sum(leaf == "kernel" for _, _, leaf in shapes)
  candidates = []
  for (depth, (blocks, bottleneck)), sk, stem in itertools.product(
    DEPTHS.items(), (False, True), ("imagenet", "cifar")
  ):
    deep_stem = sk and stem == "imagenet"
    width = stem_kernel[-1] / (32 if deep_stem else 64)
    if (stem_kernel[0] == 7) != (stem == "imagenet" and not sk):
      continue
    per_block = (5 if sk and bottleneck else 3 if bottleneck else 2) + 2 * squeezed
    convs = (3 if deep_stem else 1) + 4 + per_block * sum(blocks)  # 4: the shortcuts
    last, filters = first["conv"] + convs - 1, int(512 * width)
    # Below 32 channels the official code takes 32, so any smaller ratio gives the same network: say that of SimCLRv2.
    sk_ratio = 0.0625 * sk
    if sk and bottleneck:
      reduced = shapes.get(("conv", last - 2 * squeezed - 2, "kernel"), (0,))[-1]
      if reduced <= filters and reduced not in (0, max(int(filters * 0.0625), 32)):
        sk_ratio = reduced / filters
    reduced = shapes.get(("conv", last - 1, "bias"), (0,))[0]
    se_ratio = reduced / filters if 0 < reduced <= filters else 0.0
    width = int(width) if width == int(width) else width
    config = dict(depth=depth, width=width, sk_ratio=sk_ratio, se_ratio=se_ratio, stem=stem, dtype="float32")
    candidates.append((abs(convs - kernels), config))
  if not candidates:
    raise UserError(f"the first convolution is {list(stem_kernel)}: expected 3x3 or 7x7")
  nearest = min(distance for distance, _ in candidates)
  fits = []
  for config in (config for distance, config in candidates if distance == nearest):
    wanted = _in_order(config, first)
    wrong = sum(shapes.get(key) != shape for key, (_, shape) in wanted.items()) + len(shapes.keys() - wanted.keys())
    fits.append((wrong, config, wanted))
  return min(fits, key=lambda fit: fit[0])[1:]


def _in_order(config, first):
  """{(kind, number, leaf): (our path, shape)} of a ResNet, numbered in the order of creation from `first[kind]` on."""
  order = []

  def init(x):
    variables = resnet(**config).init(jax.random.key(0), x)
    order.extend(traverse_util.flatten_dict(variables["params"]))  # a dict inside jit: in order of creation
    return variables

  shapes = traverse_util.flatten_dict(jax.eval_shape(init, jnp.zeros((1, 32, 32, 3))))
  number, modules, out = dict(first), {}, {}
  for *module, _ in order:
    module = tuple(module)
    if module not in modules:
      kind = "norm" if "norm" in module[-1] else "conv"
      modules[module] = kind, number[kind]
      number[kind] += 1
  for module, (kind, k) in modules.items():
    for leaf, (collection, ours) in _LEAVES.items():
      path = (collection, *module, ours)
      if path in shapes and (leaf in ("kernel", "bias")) == (kind == "conv"):
        out[kind, k, leaf] = path, shapes[path].shape
  return out


def _head(found, width):
  """(keyword arguments of Projector or None, {(kind, layer, part, leaf): (our path, shape)})."""
  if not found:
    return None, {}
  kinds = {kind for kind, *_ in found}
  kind = "nl" if "nl" in kinds else "l"
  layers = 1 + max(j for k, j, *_ in found if k == kind)
  out_dim = found.get((kind, layers - 1, "dense", "kernel"), (None, (width, 128)))[1][-1]
  wanted = {}
  for j in range(layers):
    out = out_dim if j == layers - 1 else width
    wanted[kind, j, "dense", "kernel"] = ("params", f"dense{j}", "kernel"), (width, out)
    for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
      if leaf != "beta" or j < layers - 1:
        collection, ours = _LEAVES[leaf]
        wanted[kind, j, "norm", leaf] = (collection, f"norm{j}", ours), (out,)
  return dict(kind={"nl": "nonlinear", "l": "linear"}[kind], layers=layers, out_dim=out_dim), wanted


def _differences(found, wanted) -> list[str]:
  """What is too much, missing, or of another shape, in words."""
  unknown = [found[key][0] for key in found.keys() - wanted.keys()]
  missing = [_official_name(*key) for key in wanted.keys() - found.keys()]
  wrong = [
    f"{found[key][0]} is {list(found[key][1])} and should be {list(shape)}"
    for key, (_, shape) in wanted.items()
    if key in found and found[key][1] != tuple(shape)
  ]
  out = [f"unknown {_some(unknown)}"] if unknown else []
  out += [f"missing {_some(missing)}"] if missing else []
  return out + [f"{wrong[0]}" + f" ({len(wrong)} of a wrong shape)" * (len(wrong) > 1)] if wrong else out


def _official_name(kind, *rest) -> str:
  """What TF1 calls the variable of a key that `_place` gives, without its scope."""
  if kind in ("conv", "norm"):
    module = {"conv": "conv2d", "norm": "batch_normalization"}[kind] + (f"_{rest[0]}" if rest[0] else "")
    return f"{module}/{rest[1]}"
  if not rest:
    return f"linear_layer/dense/{kind}"
  return f"{kind}_{rest[0]}/{ {'dense': 'dense', 'norm': 'batch_normalization'}[rest[1]] }/{rest[2]}"


def _some(names) -> str:
  names = sorted(names, key=str)
  return ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def title(config) -> str:
  extra = " with selective kernels" * (config["sk_ratio"] > 0) + " with squeeze-excite" * (config["se_ratio"] > 0)
  return f"ResNet-{config['depth']} {config['width']}x{extra}, {config['stem']} stem"
