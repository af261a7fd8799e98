"""Our variables under the names and in the layouts of PyTorch's Vision Transformers.

Positions, which vit.py computes, are a tensor there: that of square images of one size, 0 for the class token.
"""

import re

import numpy as np
from flax import traverse_util

from simclr_jax.vit import positions

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_MODULES = {
  "patch_embed": "patch_embed.proj",
  "qkv": "attn.qkv",
  "proj": "attn.proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}
_HUGGING_FACE = (
  (r"^cls_token", "embeddings.cls_token"),
  (r"^pos_embed", "embeddings.position_embeddings"),
  (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
  (r"^norm", "layernorm"),
  (r"^blocks\.", "encoder.layer."),
  (r"norm1", "layernorm_before"),
  (r"norm2", "layernorm_after"),
  (r"attn\.proj", "attention.output.dense"),
  (r"mlp\.fc1", "intermediate.dense"),
  (r"mlp\.fc2", "output.dense"),
)
_TORCHVISION = (
  (r"^cls_token", "class_token"),
  (r"^pos_embed", "encoder.pos_embedding"),
  (r"^patch_embed\.proj", "conv_proj"),
  (r"^norm", "encoder.ln"),
  (r"^blocks\.", "encoder.layers.encoder_layer_"),
  (r"norm(\d)", r"ln_\1"),
  (r"attn\.qkv\.", "self_attention.in_proj_"),
  (r"attn\.proj", "self_attention.out_proj"),
  (r"mlp\.fc1", "mlp.0"),
  (r"mlp\.fc2", "mlp.3"),
)


def timm(variables: dict, *, patch: int, size: int) -> dict:
  """f's state dict as timm names it, for images of `size` pixels a side: numpy, float32, matrices [out, in]."""
  out = {}
  for path, value in traverse_util.flatten_dict(variables["params"], sep="/").items():
    *modules, leaf = path.split("/")
    if path == "class_token":
      out["cls_token"] = value
    elif path == "patch_embed/kernel":
      out["patch_embed.proj.weight"] = value.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    else:
      block = "" if len(modules) == 1 else f"blocks.{int(modules[0].removeprefix('block')) - 1}."
      out[f"{block}{_MODULES.get(modules[-1], modules[-1])}.{_LEAVES[leaf]}"] = value.T if leaf == "kernel" else value
  side, d = size // patch, out["cls_token"].shape[-1]
  out["pos_embed"] = np.concatenate([np.zeros((1, d), np.float32), positions(side, side, d)])[None]
  return {name: np.ascontiguousarray(value) for name, value in sorted(out.items())}


def hugging_face(state: dict) -> dict:
  """The same under the names of transformers.ViTModel up to version 4, which version 5 renames as it loads them."""
  out = {}
  for name, value in state.items():
    if "attn.qkv" in name:
      for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
        out[_renamed(name.replace("attn.qkv", f"attention.attention.{part}"), _HUGGING_FACE)] = third.copy()
    else:
      out[_renamed(name, _HUGGING_FACE)] = value
  return out


def torchvision(state: dict) -> dict:
  """The same under the names of torchvision's VisionTransformer without its classifier."""
  return {_renamed(name, _TORCHVISION): value for name, value in state.items()}


def _renamed(name: str, rules) -> str:
  for pattern, new in rules:
    name = re.sub(pattern, new, name)
  return name
