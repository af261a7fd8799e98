"""Exports of the encoder: a folder with f's variables, and a card that says how to use them.

This package itself reads Orbax and safetensors (`load_encoder`) and starts from them; the other formats are for other
libraries.
Every folder that `simclr export` writes is self-contained.  load.py opens it with the libraries of the format and without
this package, and verify.py runs load.py on 16 images whose h is stored next to it: the exporter does this before it gives
the folder its final name, and anyone can repeat it.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

import simclr_jax
from simclr_jax.exporting import image_check
from simclr_jax.exporting.folder import read_card, save_export, write_card
from simclr_jax.model import make_encoder
from simclr_jax.projector import Projector
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime import config as config_lib
from simclr_jax.runtime.errors import UserError

# Format -> (the module below exporting/, an optional package that writes it, the packages that read it).
FORMATS = {
  "orbax": ("orbax_folder", "", ("jax", "flax", "orbax-checkpoint")),
  "safetensors": ("safetensors_file", "", ("jax", "flax", "safetensors")),
  "torchvision": ("torch_folders", "", ("torch", "torchvision", "safetensors")),
  "timm": ("torch_folders", "", ("torch", "timm", "safetensors")),
  "huggingface": ("torch_folders", "", ("torch", "transformers", "safetensors")),
  "stablehlo": ("stablehlo", "", ("jax",)),
  "onnx": ("onnx_graph", "onnx", ("onnxruntime",)),
  "savedmodel": ("savedmodel", "", ("tensorflow",)),
}
LOADERS = pathlib.Path(__file__).parent / "loaders"

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow")
_RESIZES = {
  "bicubic": "bicubic, half-pixel centers, no antialiasing",
  "bilinear": "bilinear, half-pixel centers, no antialiasing",
  "bicubic_antialias": "bicubic, half-pixel centers, antialiased",
  "bicubic_tf1": "bicubic_tf1: a = -0.75, no half-pixel centers, no antialiasing, as TF1 resizes",
}


class Encoder(NamedTuple):
  """A loaded encoder.

  Attributes:
    apply: images [n, size, size, 3], floats in [0, 1] or uint8 -> h float32 [n, d].
    variables: {"params", "batch_stats"}, nested dicts of numpy arrays, for `simclr_jax.encoder.resnet(...).apply`.
    card: what is known of it: card["feature_dimension"], card["preprocessing"], card["scores"], ...
  """

  apply: Callable[[Any], Any]
  variables: dict
  card: dict

  def __repr__(self):
    net, size = self.card["architecture"], self.card["preprocessing"]["size"]
    known = {"resnet": "ResNet-{depth}, width {width:g}", "vit": "ViT-{size}, patch {patch}"}
    return (
      f"Encoder({known.get(net['name'], net['name']).format(**net)}, "
      f"images [n, {size}, {size}, 3] -> h [n, {self.card['feature_dimension']}], step {self.card.get('step')})"
    )


@dataclasses.dataclass(frozen=True)
class Export:
  """What a format's `write(folder, export)` turns into files.

  Attributes:
    format: a key of FORMATS.
    variables: f's {"params", "batch_stats"}, float32 numpy.
    card: what card.json will hold.
    projector: g's variables, where the head was asked for, else None; card["projector"] has its arguments.
  """

  format: str
  variables: dict
  card: dict
  projector: dict | None = None

  @property
  def size(self) -> int:
    return self.card["preprocessing"]["size"]

  @property
  def architecture(self) -> dict:
    """Keyword arguments of `resnet` or `vit`, computing in float32."""
    return _arguments(self.card) | {"dtype": "float32"}

  @property
  def network(self):
    """f, computing in float32."""
    name = self.card["architecture"]["name"]
    return make_encoder(name, **({} if ":" in name else self.architecture))

  @property
  def names(self) -> tuple:
    """Of the outputs."""
    return ("h", "z") if self.projector else ("h",)

  def trees(self) -> dict:
    """{"encoder": variables}, and "projector" where there is one."""
    return {"encoder": self.variables} | ({"projector": self.projector} if self.projector else {})

  def apply(self, trees, images):
    """Images float32 [n, h, w, 3] in [0, 1] -> (h [n, d],) or (h, z), every product in float32 on every platform."""
    with jax.default_matmul_precision("highest"):
      h = self.network.apply(trees["encoder"], images, train=False)
      return (h, Projector(**self.card["projector"]).apply(trees["projector"], h)) if self.projector else (h,)

  def copy(self, folder, **files):
    """Copies files of loaders/ (or of the package, by an absolute path) into the folder: `name="source"` to name.py."""
    for name, source in files.items():
      shutil.copyfile(LOADERS / source, folder / f"{name}.py")


def make_card(
  variables, config, *, scores: dict, step: int, format: str = "orbax", license: str = "not stated", held_out=None
) -> dict:
  """card.json without the list of files; docs/card.schema.json explains each entry."""
  name = config.encoder.name
  module = make_encoder(name, **config.encoder)
  dtype = getattr(module, "dtype", jnp.dtype(jnp.float32))
  fields = {f.name for f in dataclasses.fields(module)} - {"parent", "name"} if ":" not in name else ()
  shapes = jax.eval_shape(functools.partial(module.apply, train=False), variables, _images(config.augment.size))
  card = {
    "format": format,
    "architecture": {"name": name, **{key: getattr(module, key) for key in fields}, "dtype": jnp.dtype(dtype).name},
    "compute": "float32" + ", trained in bfloat16" * (dtype == jnp.bfloat16),
    "feature_dimension": shapes.shape[-1],
    "preprocessing": {
      "range": "[0, 1], no mean or std is subtracted or divided",
      "size": config.augment.size,
      "center_crop": config.evaluate.crop,
      "resize": _RESIZES[config.augment.resize or "bicubic"],
      "layout": "NCHW, RGB" if format in ("torchvision", "timm", "huggingface", "onnx") else "NHWC, RGB",
    },
    "pretraining": config_lib.to_dict(config),
    "data": config.data.train if hasattr(config, "data") else "not stated",
    "step": step,
    "scores": scores,
    "versions": _versions() | {"simclr_jax": simclr_jax.__version__},
    "license": license,
    "checksum": checksum(variables),
    "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  if held_out:
    card["held_out"] = held_out
  if format == "huggingface":  # which is made to be published
    card |= {key: _without_folders(card[key]) for key in ("data", "pretraining")}
  return card


def _versions() -> dict:
  """{package: version} of those of _PACKAGES that are installed; TensorFlow need not be."""
  return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(name: str) -> str:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(name)
  for other in importlib.metadata.packages_distributions().get(name, ()):  # such as tensorflow-cpu
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      return importlib.metadata.version(other)
  return ""


def _without_folders(value):
  """A value of a card in which paths are their last parts: folder:/home/me/photos becomes folder:photos.

  The slashes of tfds:NAME/CONFIG are no path.
  """
  if isinstance(value, dict):
    return {key: _without_folders(one) for key, one in value.items()}
  is_path = isinstance(value, str) and not value.startswith("tfds:")
  return re.sub(r"[^:]*/(?=.)", "", value) if is_path else value


def checksum(variables) -> str:
  """SHA-256 of f's weights: in the order of their paths, each path, shape and little-endian float32 bytes.

  It identifies the encoder: it is the same in every format.
  """
  sha = hashlib.sha256()
  for path, value in sorted(traverse_util.flatten_dict(variables, sep="/").items()):
    value = np.ascontiguousarray(value, "<f4")
    sha.update(f"{path} {list(value.shape)}\n".encode())
    sha.update(value.data)
  return f"sha256:{sha.hexdigest()}"


def write(
  path, variables, config, *, scores: dict, step: int, heads=None, held_out=None, overwrite: bool = False
) -> epath.Path:
  """Writes the encoder's variables {"params", "batch_stats"} as Orbax, and card.json, to the folder `path`.

  `heads` are variables of what sits on h, by name, kept beside it for fine-tuning: "projector", "classifier".  `held_out` is
  the fingerprint of the images that training did not see, for the card.

  Raises:
    ValueError: the folder is not empty and `overwrite` is not set, or cannot be written.
  """
  card = make_card(jax.tree.map(np.asarray, variables), config, scores=scores, step=step, held_out=held_out)

  def fill(folder):
    checkpoint.save_trees(folder, {"encoder": variables, **(heads or {})})
    write_card(folder, card)

  return save_export(path, fill, overwrite=overwrite)


def why_not(format: str, architecture: dict) -> str:
  """Why no folder of this format can hold the network of a card, and what to do; empty where one can."""
  name = architecture["name"]
  if ":" in name:
    return f"encoder.name={name} is your own: no folder holds it; use load_encoder(RUN/encoder, network=...)"
  if format == "torchvision" and name == "vit" and architecture["pool"] == "mean":
    return (
      "--format=torchvision: torchvision's VisionTransformer returns the class token, and h of encoder.pool=mean is the "
      "mean over the patches: choose timm or huggingface"
    )
  return ""


def write_format(path, export: Export, example: dict, python: str, overwrite: bool):
  """One format: files, proof, card, and a line that says what was found."""
  if reason := why_not(export.format, export.card["architecture"]):
    raise UserError(reason)
  module = importlib.import_module(f"simclr_jax.exporting.{FORMATS[export.format][0]}")
  lines = []

  def fill(folder):
    # The libraries of the formats know local folders only.
    with tempfile.TemporaryDirectory() if "://" in str(folder) else contextlib.nullcontext(folder) as local:
      local = pathlib.Path(local)
      module.write(local, export)
      export.copy(local, verify="verify.py", card_check="card_check.py", image_check=pathlib.Path(image_check.__file__))
      np.savez_compressed(local / "example.npz", **example)
      write_card(epath.Path(local), export.card)  # load.py reads it
      proof, line = prove(local, export, python)
      write_card(epath.Path(local), export.card | {"proof": proof})
      lines.append(line)
      if local != pathlib.Path(folder):
        _upload(local, folder)

  path = save_export(path, fill, overwrite=overwrite)
  print(f"{export.format}: {lines[0].format(path=path)}", flush=True)
  if export.format == "huggingface":
    print(f"upload it with: hf upload NAME/REPOSITORY {path}", flush=True)


def tensorflow_reads_jax() -> bool:
  """Whether there is a TensorFlow here that reads the StableHLO that the JAX here writes.  2.21 stops at "unregistered
  operation vhlo.custom_call_v2" of JAX 0.12."""
  versions = _versions()
  if "tensorflow" not in versions:
    return False
  jax_version, tensorflow = (tuple(map(int, versions[name].split(".")[:2])) for name in ("jax", "tensorflow"))
  return jax_version < (0, 11) or tensorflow > (2, 21)


def _upload(local, folder):
  for file in sorted(local.rglob("*")):
    target = folder / file.relative_to(local).as_posix()
    target.mkdir(parents=True, exist_ok=True) if file.is_dir() else epath.Path(file).copy(target)


def make_example(export: Export) -> dict:
  """What example.npz holds: 16 images uint8 [16, size, size, 3] of squares in random colors, their h (and z) float32.

  `rounding` beside them is how far h moves, relative to its largest element, when every pixel does by one part in 2^23.
  """
  rng = np.random.default_rng(0)
  side = -(-export.size // 4)
  images = rng.integers(0, 256, (16, side, side, 3), np.uint8).repeat(4, 1).repeat(4, 2)
  images = images[:, : export.size, : export.size]
  pixels = images.astype(np.float32) / 255
  apply, moved = jax.jit(export.apply), 1 + np.float32(2**-23) * rng.choice([-1, 1], images.shape).astype(np.float32)
  outputs, others = (list(map(np.asarray, apply(export.trees(), x))) for x in (pixels, pixels * moved))
  rounding = max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(outputs, others, strict=True))
  return {"images": images, "rounding": rounding, **dict(zip(export.names, outputs, strict=True))}


def prove(folder, export: Export, python: str):
  """Runs the folder's verify.py in an interpreter that does not see this package: `python`, or where that lacks a library
  this one.

  Returns:
    (proof, line) for the card and for the reader; `line` holds "{path}" where the folder's name belongs.
  Raises:
    ValueError: the folder does not open, or gives another h.
  """
  tried = []
  for interpreter in dict.fromkeys((python, sys.executable)):
    tried.append(_verified_by(interpreter, folder))
    if not _missing(tried[-1]):
      break
  done = tried[-1]
  libraries, remark = FORMATS[export.format][2], ""
  if export.format in ("torchvision", "timm") and (pathlib.Path(folder) / "modeling_simclr.py").exists():
    libraries = ("torch", "safetensors")
    remark = f"; own module, verified with torch; {export.format}, which has no such network, was not used"
  if _missing(done):
    reason = f"not verified: {_missing(tried[0])} is not installed"
    return reason, f"{reason}; to verify: pip install {' '.join(libraries)}, then python {{path}}/verify.py"
  found = re.search(r"largest relative difference .*", done.stdout)
  if found and not done.returncode:
    return found[0] + remark, found[0] + remark
  if found:
    raise UserError(
      f"{export.format}: the written files do not reproduce this encoder, so they are not kept: {found[0]}"
    )
  why = " ".join(((done.stderr or done.stdout).strip() or "it printed nothing").split("\n")[-1].split())[:300]
  raise UserError(f"{export.format}: load.py fails in {interpreter}, so nothing is kept: {why}")


def _verified_by(python: str, folder) -> subprocess.CompletedProcess:
  """verify.py of the folder, run by `python`."""
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  # On the CPU: the accelerator is this process's, and its products may be of less than float32.
  environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
  environment["HF_HUB_OFFLINE"] = "1"
  if os.path.dirname(python):  # else it is looked for in PATH
    python = os.path.abspath(python)
  command = [python, "-B", str(pathlib.Path(folder).resolve() / "verify.py")]
  with tempfile.TemporaryDirectory() as scratch:
    environment["HF_MODULES_CACHE"] = scratch  # where transformers copies modeling_*.py
    try:
      return subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    except OSError as error:
      raise UserError(f"--python={python} does not start ({error.strerror})") from None


def _missing(done: subprocess.CompletedProcess) -> str:
  """The module that verify.py did not find; empty if it found all."""
  found = re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'", done.stderr, re.M)
  return found[1] if found else ""


def load_encoder(path, network=None) -> Encoder:
  """Opens a folder that `simclr export` wrote, or a finished run; nothing else is needed.

  Args:
    network: the Linen module of your own encoder (encoder.name="module:function"), which exports do not contain and which
      is never imported by a name that a folder gives.

  Returns:
    Encoder(apply, variables, card): `apply(images)` maps images [n, size, size, 3], floats in [0, 1] or uint8, to h float32
    [n, d], jitted, in float32 whatever it was trained in, BatchNorm in inference mode; it raises ValueError for images
    of another size or range than the card's, and inside of jit of another size.  `variables` is {"params",
    "batch_stats"} as numpy, for `resnet(...).apply`, which takes any size; `card` is card.json.

  Raises:
    ValueError: the folder is not an export, is damaged, does not match its card, or is in a format for another library.
  """
  path = files.absolute(path)
  if not (path / "card.json").exists() and (path / "encoder/card.json").exists():  # a run
    path = path / "encoder"
  card = read_card(path)
  name, arguments, size = card["architecture"]["name"], _arguments(card), card["preprocessing"]["size"]
  if network is None and ":" in name:
    raise UserError(f"{path} holds a custom encoder: pass its module, load_encoder(..., network={name})")
  try:
    encoder = network or make_encoder(name, **arguments | {"dtype": "float32"})
    like = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), _images(size))
  except (TypeError, ValueError) as error:
    raise UserError(f"{path}: card.json describes no encoder ({error}): export it again") from None
  kind = card.get("format", "orbax")
  if kind == "orbax":
    variables = checkpoint.restore(files.absolute(path) / "encoder", like)
  elif kind == "safetensors":
    variables = read_safetensors(path).get("encoder", {})
    checkpoint.compare(variables, like, path)
  else:
    raise UserError(f"{path} is an export to {kind}: its load.py opens it; load_encoder reads orbax and safetensors")

  @jax.jit
  def jitted(images):
    with jax.default_matmul_precision("highest"):  # of an accelerator float32 products may be of less
      return encoder.apply(variables, jnp.asarray(images, jnp.float32), train=False)

  def apply(images):
    if isinstance(images, jax.core.Tracer):  # values are not known here
      image_check.check_shape(images, size)
      return jitted(images / 255 if images.dtype == jnp.uint8 else images)
    return jitted(image_check.check_images(images, size))

  return Encoder(apply, variables, card)


def read_safetensors(path) -> dict:
  from simclr_jax.exporting import safetensors_file

  return safetensors_file.read(files.absolute(path) / safetensors_file.WEIGHTS)


def _arguments(card) -> dict:
  return {key: value for key, value in card["architecture"].items() if key != "name"}


def _images(size):
  return jax.ShapeDtypeStruct((1, size, size, 3), np.float32)


def snippet(path, size: int, name: str = "resnet") -> str:
  """Python that loads an export and uses it; `name` is that of the encoder in its card."""
  module, own, function = name.partition(":")
  return "\n".join(
    (
      "import numpy as np",
      *([f"from {module} import {function}"] if own else []),
      "from simclr_jax import load_encoder",
      "",
      f'encode, variables, card = load_encoder("{path}"{f", network={function}()" if own else ""})',
      f"images = np.random.rand(4, {size}, {size}, 3)  # yours: floats in [0, 1], RGB, not standardized",
      "h = encode(images)",
      "print(h.shape)",
    )
  )


def torch_snippet(path, size: int, name: str = "resnet") -> str:
  """The same in PyTorch, after the command of its first line."""
  library = "torchvision" if name == "resnet" else "timm"
  return "\n".join(
    (
      f"# once: simclr export --encoder={shlex.quote(str(path))} --output={shlex.quote(f'{path}_torch')} --format={library}",
      "import sys",
      "",
      "import torch",
      "",
      f'sys.path.insert(0, "{path}_torch")',
      "from load import load_model",
      "",
      "model = load_model()  # a torch.nn.Module; this package is not needed",
      f"images = torch.rand(4, 3, {size}, {size})  # yours: floats in [0, 1], RGB, not standardized",
      "print(model(images).shape)",
    )
  )
