"""What a folder for torchvision, timm or Hugging Face says of a Vision Transformer; see torch_folders.py.

All three have ours: LayerNorm before attention and perceptron with epsilon 1e-6 (transformers' default is another), exact
GELU, biases everywhere, a final LayerNorm.  timm's default puts that after the mean over the patches, fc_norm=False before
it as here; torchvision has no mean.  Positions are the parameters of theirs, so the size of the images is fixed.
"""

from simclr_jax.exporting import torch_vit_names
from simclr_jax.vit import EPSILON, SIZES

_TIMM = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}  # but for model_args


def state(export) -> dict:
  found = torch_vit_names.timm(export.variables, patch=export.architecture["patch"], size=export.size)
  rename = {"huggingface": torch_vit_names.hugging_face, "torchvision": torch_vit_names.torchvision}
  return rename[export.format](found) if export.format in rename else found


def files(export) -> dict:
  return {"load": "load_timm.py" if export.format == "timm" else f"load_{export.format}_vit.py"}


def hugging_face_config(export) -> dict:
  d, blocks, heads = SIZES[export.architecture["size"]]
  return {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "image_size": export.size,
    "patch_size": export.architecture["patch"],
    "num_channels": 3,
    "hidden_size": d,
    "num_hidden_layers": blocks,
    "num_attention_heads": heads,
    "intermediate_size": 4 * d,
    "hidden_act": "gelu",
    "layer_norm_eps": EPSILON,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
  }


def timm_config(export) -> tuple[dict, dict]:
  """(config.json's own entries, those of its pretrained_cfg)."""
  architecture = export.architecture
  pool = {"token": "token", "mean": "avg"}[architecture["pool"]]
  arguments = {
    "img_size": export.size,
    "patch_size": architecture["patch"],
    "num_classes": 0,
    "global_pool": pool,
    "fc_norm": False,
  }
  return (
    {"architecture": _TIMM[architecture["size"]], "global_pool": pool, "model_args": arguments},
    {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"},
  )


def title(export) -> str:
  return "ViT-{size}, patch {patch}".format(**export.architecture)


def usage(export) -> dict:
  """As torch_resnets.usage."""
  h = ".last_hidden_state" + ("[:, 0]" if export.architecture["pool"] == "token" else "[:, 1:].mean(1)")
  return {"before": [], "after": [], "arguments": ", add_pooling_layer=False", "h": h}
