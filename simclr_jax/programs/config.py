"""The configs of all programs: every key with its type, default, range and meaning.

    python -m simclr_jax.programs.config > docs/config.md

Importing this costs nothing: no JAX and no TensorFlow.  Where a section goes to a science function as keyword arguments,
defaults and choices are those of that function; tests/test_config.py compares them.
"""

import contextlib
import dataclasses
import json
import re

from simclr_jax.programs.flags import RESIZES
from simclr_jax.runtime.config import (
  REQUIRED,
  Section,
  build,
  check_same,
  describe,
  difference,
  every,
  expected,
  explain,
  find_recipe,
  flatten,
  frozen,
  help_text,
  key,
  merge,
  override,
  parse,
  read_config,
  read_recipe,
  recipe_folder,
  replace,
  section,
  to_dict,
  to_json,
)
from simclr_jax.runtime.errors import UserError

__all__ = [
  "about_run",
  "build",
  "check_same",
  "describe",
  "difference",
  "every",
  "explain",
  "find_recipe",
  "flatten",
  "from_dict",
  "from_json",
  "help_text",
  "load",
  "of_run",
  "override",
  "parse",
  "read_recipe",
  "recipe_folder",
  "replace",
  "to_dict",
  "to_json",
]


LAST_EPOCH = 1e9  # beyond any training, and small enough for whole numbers of steps
LAST_SEED = 2**32 - 1  # JAX draws the same weights from a seed of 2**32 as from 0
RENAMED = {"shares": "fractions", "distill_share": "distill_fraction"}  # keys at the top of the configs of older runs

# ---- sections, which programs share ----------------------------------------------------------------------------------


@frozen
class Data(Section):
  train: str = key(
    REQUIRED, "training images, such as folder:/my/images or tfds:cifar10:train",
    needed="a data set such as fashion:train",
  )  # fmt: skip
  test: str = key("", "labeled images to score; empty: see held_out")
  held_out: float = key(
    0.1, "fraction of every class to hold out of training and score if test is empty; 0: nothing is scored",
    at_least=0, below=1,
  )  # fmt: skip
  data_dir: str = key("", "where prepared TensorFlow Datasets are; empty: their own default")
  max_bad_fraction: float = key(
    0.001, "fraction of unreadable images above which the run stops; one is always allowed, unless it is 0",
    at_least=0, at_most=1,
  )  # fmt: skip
  changed: str = key(
    "refuse", "what resuming does if the data has changed since the run began", choices=("refuse", "accept")
  )


def _draws_no_crop(low: float, high: float) -> bool:
  """Whether crop_sampler=official mostly gives whole images for a range of areas: its boxes have whole pixels for sides, of which
  almost none has an area in the range, and it knows no area below a tenth."""
  return low < 0.99 and high < max(low, 0.1) + 0.009


@frozen
class Crop(Section):
  """The geometric half of the augmentation: arguments of augment.one_view."""

  size: int = key(REQUIRED, "side of the views, in pixels", at_least=1)
  crop_sampler: str = key("official", "rule for drawing the crop boxes", choices=("official", "torchvision"))
  crop_area: tuple[float, float] = key(
    (0.08, 1.0), "smallest and largest area of a crop, as fractions of the image", above=0, at_most=1
  )
  flip: bool = key(True, "mirror views left-right with probability 1/2")
  resize: str = key("bicubic", "interpolation of crops", choices=RESIZES)

  def check(self):
    if self.crop_area[0] > self.crop_area[1]:
      raise UserError(f"crop_area={self.crop_area}: expected the smaller value first, such as (0.08, 1.0)")
    if self.crop_sampler == "official" and _draws_no_crop(*self.crop_area):
      raise UserError(
        f"crop_area={self.crop_area}: crop_sampler=official draws no crop below a tenth of the image, and whole images "
        "where the range is narrower than about 0.01; use torchvision"
      )


# The names in augment_extra.EXTRA, which cannot be imported without TensorFlow.
EXTRA = (
  "sobel", "solarize", "equalize", "motion_blur", "cutout", "rotate", "noise", "crop", "color", "blur", "autoaugment",
)  # fmt: skip


@frozen
class Augment(Crop):
  """The augmentation family: arguments of augment_extra.two_views, and where each half of it runs."""

  where: str = key(
    "host", "where views are made: host; device: the host crops, the device does color and blur; device_crop: the host only "
    "decodes; resident: the images stay on the devices", choices=("host", "device", "device_crop", "resident"), option=False,
  )  # fmt: skip
  canvas: int = key(
    512, "side in pixels of the canvas that holds an image for device_crop and resident", at_least=1, option=False
  )
  views: int = key(
    2,
    "views of each image; more than 2 are compared in all pairs and need method=simclr with nt_xent",
    at_least=2,
    option=False,
  )
  color_strength: float = key(
    1.0, "strength of the color distortion; 0 also turns grayscale off", at_least=0, at_most=1.25
  )
  blur: bool = key(True, "blur views with probability blur_prob")
  brightness: str = key("v2", "brightness jitter: v2 multiplies, v1 adds", choices=("v2", "v1"))
  color_jitter_prob: float = key(0.8, "probability of color jitter", at_least=0, at_most=1)
  grayscale_prob: float = key(0.2, "probability of grayscale", at_least=0, at_most=1)
  blur_prob: float = key(0.5, "probability of blur", at_least=0, at_most=1)
  color_order: str = key("random", "order of the four color operations", choices=("random", "fixed"))
  extra: tuple[tuple[str, float], ...] = key(
    (),
    f"more operators with probabilities, such as (('sobel', 0.1),), applied after the color distortion, which color moves to its "
    f"place among them; the operators: {', '.join(EXTRA)}",
  )
  one_sided: bool = key(
    False, "both views share crop and flip; only the first gets the other operations (v1, Figure 5)"
  )

  def check(self):
    super().check()
    for name, prob in self.extra:
      if name not in EXTRA:
        raise UserError(f"extra={name!r}: expected one of {', '.join(EXTRA)}")
      if not 0 <= prob <= 1:
        raise UserError(f"extra: {name} with probability {prob}: expected 0 to 1")
    if "color" in dict(self.extra) and self.color_strength == 0:
      raise UserError("extra: color is the color distortion, and needs color_strength above 0")


@frozen
class TuneAugment(Augment):
  """Crops and flips, unless color distortion is requested."""

  where: str = key("host", "where views are made", choices=("host",), option=False)
  views: int = key(2, "views of each image, only one of which is used", choices=(2,), option=False)
  canvas: int = key(512, "of no effect where the host makes views", choices=(512,), option=False)
  resize: str | None = key(None, "interpolation of crops; None: as in the training of the start", choices=RESIZES)
  color_strength: float | None = key(
    None, "strength of the color distortion; None: only crops and flips", at_least=0, at_most=1.25
  )
  one_sided: bool = key(False, "of no effect on a single view", choices=(False,), option=False)

  def check(self):
    super().check()
    if self.color_strength is None:
      for name in set(self.keys()) - set(Crop(size=1).keys()):
        if self[name] != self.__dataclass_fields__[name].default:
          raise UserError(f"{name}={self[name]}: needs config.augment.color_strength")


RESNET = ("depth", "width", "stem", "sk_ratio", "se_ratio", "dtype", "remat", "pool_padding", "arrangement")
ENCODERS = {"resnet": RESNET, "vit": ("size", "patch", "pool", "dtype", "remat")}  # the keys that each encoder takes


@frozen
class Encoder(Section):
  """Arguments of encoder.resnet or vit.vit; your own function takes none."""

  name: str = key(
    "resnet", "resnet; vit; or module:function, your own function that returns a Linen module", option=False
  )
  depth: int | None = key(None, "resnet: depth; required", choices=(18, 34, 50, 101, 152, 200))
  width: float = key(1.0, "multiplies the channels of every convolution", at_least=1 / 64)
  stem: str = key(
    "imagenet",
    "imagenet: 7x7 convolution of stride 2 and a max-pool; cifar: 3x3 convolution",
    choices=("imagenet", "cifar"),
  )
  sk_ratio: float = key(0.0, "reduction of selective kernels, such as 0.0625; 0: none", at_least=0, at_most=1)
  se_ratio: float = key(0.0, "reduction of squeeze-excite; 0: none", at_least=0, at_most=1)
  dtype: str = key("float32", "type of the activations", choices=("float32", "bfloat16"))
  remat: str = key(
    "none", "what the backward pass recomputes: none, block or group, or four of these separated by commas"
  )
  pool_padding: str = key("official", "padding of the stem's max-pool", choices=("official", "torch"))
  arrangement: str = key(
    "plain", "plain: the network as in the paper; packed: the same network and numbers, arranged for a TPU", choices=("plain", "packed"),
    option=False,
  )  # fmt: skip
  size: str | None = key(None, "vit: Ti, S or B; required", choices=("Ti", "S", "B"))
  patch: int | None = key(None, "vit: side of a patch in pixels; required", at_least=1)
  pool: str | None = key(None, "vit: h is the class token, or the mean over the patches", choices=("token", "mean"))

  def keys(self):
    return [key for key in super().keys() if key in ENCODERS.get(self.name, ())]

  def check(self):
    if self.name not in ENCODERS and not re.fullmatch(r"[\w.]+:\w+", self.name):
      raise UserError(f"name={self.name!r}: expected {', '.join(ENCODERS)}, or module:function")
    takes = ENCODERS.get(self.name, ())
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in takes and field.metadata["meaning"].endswith("required") and value is None:
        raise UserError(f"{field.name} is missing: expected {expected(field)}")
      if field.name not in (*takes, "name") and value != field.default:
        taken = f"takes {', '.join(takes)}" if takes else "takes nothing"
        raise UserError(f"{field.name}={value!r}: encoder.name={self.name} {taken}")
    parts = self.remat.split(",")
    if len(parts) not in (1, 4) or not set(parts) <= {"none", "block", "group"}:
      raise UserError(f"remat={self.remat!r}: expected none, block or group, or four of them separated by commas")
    if self.name == "vit" and self.remat not in ("none", "block"):
      raise UserError(f"remat={self.remat!r}: encoder.name=vit takes none or block")
    if self.sk_ratio and self.stem == "imagenet" and self.width < 1 / 32:
      raise UserError(f"width={self.width:g}: with encoder.sk_ratio the stem has half the channels; expected >= 1/32")


@frozen
class Projector(Section):
  """Arguments of projector.Projector."""

  kind: str = key("nonlinear", "kind of projection head", choices=("none", "linear", "nonlinear"))
  layers: int = key(3, "layers of the nonlinear head: 2 in SimCLR v1, 3 in v2", at_least=1)
  out_dim: int = key(128, "dimension of z", at_least=1)


@frozen
class Loss(Section):
  """Arguments of the function `name` of contrast.LOSSES; None means the default of that function."""

  name: str = key(
    "nt_xent", "name of the contrastive loss", option=False,
    choices=("nt_xent", "decoupled", "debiased", "cauchy", "nt_logistic", "nt_logistic_semi_hard", "margin_triplet",
             "margin_triplet_semi_hard"),
  )  # fmt: skip
  temperature: float | None = key(None, "temperature of the softmax; needed by most losses and methods", above=0)
  normalize: bool | None = key(None, "use cosine similarity; None: True")
  reduction: str | None = key(
    None,
    "of NT-Xent; mean: over all views; official_sum: the sum of both directions, as in the official code; None: mean",
    choices=("mean", "official_sum"),
  )
  precision: str | None = key(
    None, "precision of the similarity products; None: highest", choices=("highest", "high", "default")
  )
  tile: int | None = key(None, "nt_xent: largest number of images along the side of a tile", at_least=1)
  class_prior: float | None = key(
    None, "debiased: probability that a negative has the same class; None: 0.1", at_least=0, below=1
  )
  margin: float | None = key(None, "margin of the triplet losses; None: 0.8", at_least=0)
  semi_hard: bool | None = key(None, "nt_logistic, margin_triplet: use semi-hard negatives only")

  def check(self):
    if self.name == "debiased" and self.normalize is False:
      raise UserError("normalize=False: config.loss.name=debiased is for cosine similarity; leave it out")
    if self.name.endswith("_semi_hard") and self.semi_hard is False:
      raise UserError(f"semi_hard=False: config.loss.name={self.name} uses them; use {self.name[: -len('_semi_hard')]}")


@frozen
class Memory(Section):
  """SimCLRv2's memory: arguments of methods/memory.py."""

  size: int = key(65536, "method=memory: number of projections in the memory bank", at_least=1)
  decay: float = key(0.999, "method=memory: decay of the moving average of the weights", at_least=0, below=1)


@frozen
class MoCo(Section):
  """Arguments of methods/moco.py."""

  size: int = key(65536, "method=moco: number of keys in the queue", at_least=1)
  decay: float = key(0.999, "method=moco: decay of the momentum encoder", at_least=0, below=1)


@frozen
class MoCoV3(Section):
  """Arguments of methods/moco_v3.py."""

  decay: float = key(
    0.99, "method=moco_v3: initial decay of the momentum encoder, which rises to 1", at_least=0, below=1
  )
  hidden: int = key(4096, "method=moco_v3: width of the hidden layer of the predictor", at_least=1)


@frozen
class BYOL(Section):
  """Arguments of methods/byol.py."""

  decay: float = key(0.996, "method=byol: initial decay of the target network, which rises to 1", at_least=0, below=1)
  hidden: int = key(4096, "method=byol: width of the hidden layer of the predictor", at_least=1)


@frozen
class InstDisc(Section):
  """Arguments of methods/instdisc.py."""

  negatives: int = key(
    4096, "method=instdisc: rows of the memory bank that NCE draws for each batch; 0: softmax over all", at_least=0
  )
  decay: float = key(0.5, "method=instdisc: decay of the rows of the memory bank", at_least=0, below=1)
  proximal: float = key(
    0.0, "method=instdisc: weight of the squared distance of z from its row of the memory bank", at_least=0
  )


@frozen
class TSimCNE(Section):
  """Arguments of methods/tsimcne.py."""

  stages: tuple[float, float, float] = key(
    (1000.0, 50.0, 450.0),
    "method=tsimcne: relative lengths of the stages: many dimensions, only the two-dimensional output layer, all",
    above=0,
  )
  last_lr: float = key(
    0.001, "method=tsimcne: learning rate of the last stage, as a fraction of the rate of the others", above=0
  )


@frozen
class Optimizer(Section):
  name: str = key("lars", "name of the update rule", choices=("lars", "sgd", "adam", "adamw"))
  base_lr: float = key(REQUIRED, "learning rate before scaling with the batch size", above=0)
  lr_scaling: str = key(
    "linear", "peak learning rate: linear: base_lr * batch / 256; sqrt: base_lr * sqrt(batch); none: base_lr",
    choices=("linear", "sqrt", "none"),
  )  # fmt: skip
  warmup_epochs: float = key(
    0.0, "epochs of linear warm-up; then the rate decays to 0 along a cosine", at_least=0, at_most=LAST_EPOCH
  )
  momentum: float = key(0.9, "momentum, or b1 of Adam", at_least=0, below=1)
  weight_decay: float = key(
    0.0, "weight decay; not applied to BatchNorm, nor, with LARS and AdamW, to biases, nor, with AdamW, to the classifier",
    at_least=0,
  )  # fmt: skip


@frozen
class Every(Section):
  every_steps: int = key(0, "interval in steps; 0: see every_epochs", at_least=0)
  every_epochs: float = key(
    0.0, "interval in epochs; if this and every_steps are 0, only at the end", at_least=0, at_most=LAST_EPOCH
  )

  def check(self):
    if self.every_steps and self.every_epochs:
      both = f"every_steps={self.every_steps} and every_epochs={self.every_epochs}"
      raise UserError(f"{both}: set one and leave the other 0")


@frozen
class CenterCrop(Section):
  crop: float = key(
    0.875, "side of the center crop of evaluation, as a fraction of the shorter side", above=0, at_most=1
  )
  batch_size: int = key(500, "images that evaluation encodes at once", at_least=1)


@frozen
class Evaluate(CenterCrop, Every):
  """Evaluation between and after training."""


@frozen
class EvaluateFeatures(Evaluate):
  train_examples: int = key(0, "training images that evaluation uses, except for probe.method=sgd; 0: all", at_least=0)
  knn_k: int = key(200, "number of neighbors of kNN", at_least=1)
  knn_temperature: float = key(0.1, "temperature of the votes of kNN", above=0)


@frozen
class Checkpoint(Every):
  keep: int = key(2, "number of checkpoints to keep", at_least=1)


@frozen
class Log(Section):
  every_steps: int = key(20, "interval in steps", at_least=1)
  wandb: str = key("", "project of Weights & Biases to also log to; empty: none")
  profile_steps: int = key(0, "number of steps that the profiler traces; 0: none", at_least=0)


@frozen
class Rollback(Section):
  """What to do when training diverges."""

  times: int = key(
    0, "how often a run may return to its newest checkpoint and skip the batches that followed it", at_least=0
  )
  spike: float = key(
    0.0, "standard deviations above the mean of the last 128 losses that count as divergence; 0: none", at_least=0
  )


# loop.Task.advice, of programs with a section `rollback` and an optimizer.
IF_IT_DIVERGES = (
  "resume with rollback.times=3, or begin again with a lower optimizer.base_lr or a longer optimizer.warmup_epochs"
)


@frozen
class Probe(Section):
  """Linear evaluation by `simclr probe`."""

  method: str = key(
    "lbfgs", "lbfgs: logistic regression on features; lbfgs_45: the same with the paper's 45 penalties; sgd: the paper's SGD on crops and flips",
    choices=("lbfgs", "lbfgs_45", "sgd"),
  )  # fmt: skip
  train_epochs: float = key(90.0, "epochs of SGD", above=0, at_most=LAST_EPOCH)
  batch_size: int = key(256, "batch size of SGD", at_least=1)
  base_lr: float = key(0.1, "learning rate of SGD, which is multiplied by batch_size / 256", above=0)


@frozen
class Labels(Section):
  """Which labels a program may use."""

  fraction: float = key(1.0, "class-balanced fraction of the labels", above=0, at_most=1)
  list: str = key(
    "", "file with the names of the labeled images, one per line, as name or class/name; replaces fraction"
  )
  seed: int = key(0, "seed for drawing the labeled images", at_least=0, at_most=LAST_SEED)


# ---- programs --------------------------------------------------------------------------------------------------------


@frozen
class Training(Section):
  """Keys of every program that trains an encoder."""

  seed: int = key(0, "seed of weights, order and augmentation", at_least=0, at_most=LAST_SEED)
  data: Data
  batch_size: int = key(REQUIRED, "images in the global batch", at_least=1)
  train_epochs: float = key(0.0, "epochs of training; 0: see train_steps", at_least=0, at_most=LAST_EPOCH)
  train_steps: int = key(0, "number of updates; above 0, it replaces train_epochs", at_least=0)
  encoder: Encoder
  optimizer: Optimizer
  checkpoint: Checkpoint = section(Checkpoint)
  log: Log = section(Log)
  rollback: Rollback = section(Rollback)

  def check(self):
    if not self.train_epochs and not self.train_steps:
      raise UserError("train_epochs=0 and config.train_steps=0: set one of them")
    if self.rollback.times and not (self.checkpoint.every_steps or self.checkpoint.every_epochs):
      raise UserError(
        f"rollback.times={self.rollback.times}: there is no checkpoint to return to before the end; set "
        "config.checkpoint.every_steps or every_epochs"
      )


# Sections of methods that have options: present when the method is chosen, and refused otherwise.
SECTIONS = {
  "memory": Memory,
  "moco": MoCo,
  "moco_v3": MoCoV3,
  "byol": BYOL,
  "instdisc": InstDisc,
  "tsimcne": TSimCNE,
}


@frozen
class Pretrain(Training):
  """`simclr pretrain`."""

  program: str = key("pretrain", "program that the recipe is for", choices=("pretrain",))
  batch_size: int = key(REQUIRED, "images in the global batch; the negatives are the others", at_least=2)
  # No choices here: methods.create refuses unknown names.
  method: str = key(
    "simclr",
    "how the encoder is trained: simclr, memory, moco, moco_v3, byol, instdisc, supcon, autoencoder, alignment or tsimcne, or "
    "the controls supervised and oracle; a config with a section memory implies memory",
  )
  removed_negatives: float = key(
    1.0, "method=oracle: fraction of the negatives of the same class that are left out", at_least=0, at_most=1
  )
  start: str = key(
    "", "a run, or a folder written by simclr import, or by simclr export as orbax or safetensors: training starts from its "
    "encoder, whose architecture replaces the recipe's; empty: random weights",
  )  # fmt: skip
  keep_head: bool = key(False, "with start: also start from its projection head")
  head_epochs: float = key(
    0.0, "with start: number of epochs at the beginning that train only the head", at_least=0, at_most=LAST_EPOCH
  )
  microbatches: int = key(
    1, "number of parts in which the batch is computed; the loss still sees all negatives", at_least=1
  )
  microbatch_norm: str = key(
    "microbatch",
    "statistics of BatchNorm: microbatch: of each part; exact: of the whole batch",
    choices=("microbatch", "exact"),
  )
  norm_scope: str = key(
    "global", "images that BatchNorm spans: global: the batch; device: the part of the batch on one device, for the "
    "experiment on what this leaks", choices=("global", "device"),
  )  # fmt: skip
  norm_devices: int = key(
    0,
    "norm_scope=device: number of devices over which the batch is divided for BatchNorm; 0: the actual number",
    at_least=0,
  )
  zero1: bool = key(False, "split the optimizer's state over the devices")
  augment: Augment
  projector: Projector = section(Projector)
  memory: Memory | None = None
  moco: MoCo | None = None
  moco_v3: MoCoV3 | None = None
  byol: BYOL | None = None
  instdisc: InstDisc | None = None
  tsimcne: TSimCNE | None = None
  loss: Loss = section(Loss)
  evaluate: EvaluateFeatures = section(EvaluateFeatures)
  probe: Probe = section(Probe)

  def check(self):
    super().check()
    if self.norm_scope == "device" and self.microbatches > 1:
      raise UserError(
        f"norm_scope=device: config.microbatches={self.microbatches} also divides the batch for BatchNorm; set it to 1"
      )
    if self.norm_scope == "global" and self.norm_devices:
      raise UserError(f"norm_devices={self.norm_devices} is only for config.norm_scope=device")
    if self.removed_negatives != 1 and self.method != "oracle":
      raise UserError(f"method={self.method!r}: config.removed_negatives is only for config.method=oracle")
    if self.memory and self.method == "simclr":
      object.__setattr__(self, "method", "memory")
    for name, kind in SECTIONS.items():
      if self[name] and self.method != name:
        raise UserError(f"method={self.method!r}: config.{name} is only for config.method={name}")
      if self.method == name and not self[name]:
        object.__setattr__(self, name, kind())


@frozen
class Finetune(Training):
  """`simclr finetune`."""

  program: str = key("finetune", "program that the recipe is for", choices=("finetune",))
  start: str = key(
    "", "a run, or a folder written by simclr import, or by simclr export as orbax or safetensors; empty: from scratch"
  )  # fmt: skip
  tap: int = key(0, "layer of the projection head to classify from; 0: h itself", at_least=0)
  tune_after: int = key(
    -1, "last frozen group of blocks; 0: only the stem; -1: nothing is frozen", at_least=-1, at_most=4
  )
  labels: Labels = section(Labels)
  augment: TuneAugment
  projector: Projector = section(Projector, kind="none")
  evaluate: Evaluate = section(Evaluate)


@frozen
class Distill(Finetune):
  """`simclr distill`."""

  program: str = key("distill", "program that the recipe is for", choices=("distill",))
  teacher: str = key(
    REQUIRED, "a run of simclr finetune, or its folder encoder", needed="the folder of a run of simclr finetune"
  )
  temperature: float = key(1.0, "temperature of teacher and student", above=0)
  alpha: float = key(
    1.0, "weight of the teacher's predictions; the rest is cross-entropy on the labels", above=0, at_most=1
  )
  cache: bool = key(False, "the teacher sees every image only once, center-cropped, before training")

  def check(self):
    super().check()
    if self.alpha == 1 and (self.labels.list or self.labels.fraction != 1):
      which = "list" if self.labels.list else "fraction"
      raise UserError(
        f"labels.{which}={self.labels[which]}: with config.alpha=1 no labels are used; lower it, or leave this out"
      )


@frozen
class Downstream(Section):
  """`simclr downstream`."""

  program: str = key("downstream", "program that the recipe is for", choices=("downstream",))
  seeds: tuple[int, ...] = key(
    REQUIRED,
    "seeds; each one runs all the programs",
    at_least=0,
    at_most=LAST_SEED,
    needed="at least one seed, such as (0,)",
  )
  pretrain: str = key(REQUIRED, "recipe of pretraining")
  pretrain_epochs: float = key(REQUIRED, "epochs of pretraining", above=0, at_most=LAST_EPOCH)
  finetune: str = key(REQUIRED, "recipe of fine-tuning, and of training from scratch")
  fractions: tuple[float, ...] = key(
    REQUIRED, "fractions of the labels", above=0, at_most=1, needed="fractions of the labels, such as (0.01, 0.1)"
  )
  distill: str = key(REQUIRED, "recipe of distillation")
  distill_fraction: float = key(
    REQUIRED, "fraction of the labels that the teacher was trained with, one of fractions", above=0, at_most=1
  )
  transfer: str = key(REQUIRED, "recipe of transfer")

  def check(self):
    if self.distill_fraction not in self.fractions:
      raise UserError(f"distill_fraction={self.distill_fraction}: expected one of config.fractions={self.fractions}")


@frozen
class TransferRow(Section):
  """One data set to transfer to."""

  train: str = key(REQUIRED, "training images", needed="a data set such as textures:train")
  validation: str = key("", "validation images; empty: a tenth of train")
  test: str = key(REQUIRED, "test images", needed="a data set such as textures:test")
  metric: str = key(
    "top_1",
    "score, also used to choose settings",
    choices=("top_1", "mean_per_class", "mean_average_precision"),
  )


@frozen
class Grid(Section):
  """The values that fine-tuning tries."""

  train_steps: int = key(REQUIRED, "number of updates of each run", at_least=1)
  base_lrs: tuple[float, ...] = key(REQUIRED, "learning rates", above=0, needed="at least one learning rate")
  weight_decays: tuple[float, ...] = key(
    REQUIRED,
    "weight decays, before they are divided by the learning rate",
    at_least=0,
    needed="at least one weight decay, such as (0.0,)",
  )


@frozen
class TuneGrid(Grid):
  recipe: str = key(REQUIRED, "recipe for all other values")
  batch_size: int = key(REQUIRED, "batch size of fine-tuning", at_least=1)


@frozen
class Transfer(Section):
  """`simclr transfer`."""

  program: str = key("transfer", "program that the recipe is for", choices=("transfer",))
  seed: int = key(0, "seed of training", at_least=0, at_most=LAST_SEED)
  start: str = key(
    REQUIRED, "a run, or a folder written by simclr import, or by simclr export as orbax or safetensors",
    needed="the folder of a run or an encoder",
  )  # fmt: skip
  supervised: str = key("", "the same kind of folder, with an encoder trained with labels; empty: left out")
  methods: tuple[str, ...] = key(
    ("linear", "finetune"), "how encoders are scored; images with several labels are scored by linear only",
    choices=("linear", "finetune"), needed="linear, finetune or both",
  )  # fmt: skip
  rows: dict[str, TransferRow]
  data_dir: str = key("", "where prepared TensorFlow Datasets are; empty: their own default")
  samples: int = key(100_000, "samples of the permutation test", at_least=1)
  augment: TuneAugment
  evaluate: CenterCrop = section(CenterCrop)
  finetune: TuneGrid
  from_scratch: Grid


@frozen
class ImportAugment(Section):
  size: int = key(REQUIRED, "side of the images, in pixels", at_least=1)
  resize: str = key("bicubic", "interpolation", choices=RESIZES)


@frozen
class Import(Section):
  """What `simclr import` knows about the training of an official checkpoint; there is no recipe."""

  program: str = key("import", "program that wrote the encoder", choices=("import",))
  source: dict[str, object]
  encoder: Encoder
  projector: Projector = section(Projector, kind="none")
  augment: ImportAugment
  evaluate: CenterCrop = section(CenterCrop)


PROGRAMS = {
  "pretrain": Pretrain,
  "finetune": Finetune,
  "distill": Distill,
  "transfer": Transfer,
  "downstream": Downstream,
  "import": Import,
}


def load(recipe: str, overrides=()):
  """The config of a recipe with overrides such as `--config.batch_size=512` applied.

  Raises:
    UserError: unknown recipe or key, value of the wrong type, impossible value; always one line.
  """
  values = read_recipe(recipe)
  return from_dict(merge(values, parse(overrides), class_of(values)))


def load_part(key: str, recipe: str, program: str):
  """The config of the recipe for `program` that a config names at `key`.

  Raises:
    UserError: as for `load`, or it is for another program.
  """
  found = load(recipe)
  if found.program != program:
    raise UserError(f"config.{key}={recipe}: a recipe for simclr {found.program}; expected one for simclr {program}")
  return found


def of_run(workdir, overrides=()):
  """(the name of the recipe, the config) of the run in a folder, with overrides applied; the name is empty if the run
  does not state it or the recipe no longer exists.  The recipe is not run: the folder may come from elsewhere.

  Raises:
    UserError: there is no run or its config is damaged; otherwise as for `load`.
  """
  config = override(from_json(read_config(workdir)), overrides)
  recipe = about_run(workdir).get("recipe", "")
  with contextlib.suppress(UserError):
    return find_recipe(recipe) and recipe, config
  return "", config


def about_run(workdir) -> dict:
  """run.json of a run, in which pretrain.run says what it is made of; {} if there is none, or something else."""
  from simclr_jax.runtime import files

  file = files.absolute(workdir) / "run.json"
  with contextlib.suppress(OSError, ValueError):
    found = json.loads(files.read_text(file))
    return found if isinstance(found, dict) else {}
  return {}


def from_dict(values: dict):
  """The config that nested dicts describe.

  Raises:
    UserError: as for `load`.
  """
  return build(class_of(values), values)


def class_of(values: dict):
  """The class of the config that nested dicts describe; recipes and older runs of pretraining do not name the program.

  Raises:
    UserError: no such program.
  """
  made_by = values.get("program", "import" if "source" in values else "pretrain")
  if made_by not in PROGRAMS:
    raise UserError(f"config.program={made_by!r}: expected one of {', '.join(PROGRAMS)}")
  return PROGRAMS[made_by]


def from_json(text: str):
  """The config of a run from its config.json; resuming and exporting read this and never the recipe.

  Raises:
    UserError: as for `load`.
  """
  return from_saved(json.loads(text))


def from_saved(values: dict):
  """The config that a run or the card of its encoder has kept.

  Raises:
    UserError: as for `load`.
  """
  values = {RENAMED.get(key, key): value for key, value in values.items()}
  part = values.get("data", {})
  if part and not part.get("test") and "held_out" not in part:  # a run before 0.2, which trained on all images
    values["data"] = {**part, "held_out": 0.0}
  if values.get("program") in ("finetune", "distill", "transfer"):  # what had no effect, and is refused since 0.2
    values["augment"] = {k: value for k, value in values.get("augment", {}).items() if k not in ("canvas", "one_sided")}
  if values.get("augment"):
    with contextlib.suppress(
      AttributeError, TypeError, ValueError
    ):  # what is damaged is refused with its key, by from_dict
      values["augment"] = _drawn_alike(values["augment"])
  saves = values.get("checkpoint", {})
  if not (saves.get("every_steps") or saves.get("every_epochs")) and "rollback" in values:
    values["rollback"] = {key: value for key, value in values["rollback"].items() if key != "times"}
  if values.get("program") == "distill" and values.get("alpha", 1.0) == 1.0:
    values["labels"] = {
      key: value for key, value in values.get("labels", {}).items() if key not in ("list", "fraction")
    }
  return from_dict(values)


def _drawn_alike(augment: dict) -> dict:
  """The section of a run before 0.2 in today's terms, so that its views stay the same."""
  if "color" in dict(augment.get("extra", ())) and not augment.get("color_strength"):  # it was of fixed strength
    fixed = dict(color_strength=1.0, brightness="v2", color_jitter_prob=0.8, grayscale_prob=0.2, color_order="random")
    augment = augment | fixed
  low, high = augment.get("crop_area", (0.0, 1.0))
  if augment.get("crop_sampler", "official") == "official" and _draws_no_crop(low, high):  # so it had whole images
    augment = augment | {"crop_area": (1.0, 1.0)}
  return augment


def page() -> str:
  """docs/config.md."""
  out = [HEADER]
  for name, kind in PROGRAMS.items():
    if name == "import":
      continue
    out.append(f"\n## simclr {name}\n\n| key | type | default | meaning |\n|---|---|---|---|")
    out += [
      "| " + " | ".join((f"`{row.key}`", row.type, f"`{row.default}`", row.meaning)) + " |" for row in describe(kind)
    ]
  return "\n".join(out) + "\n"


HEADER = """# Every key of every config

This page is generated by `python -m simclr_jax.programs.config > docs/config.md` from the same descriptions as `simclr
PROGRAM --help`.  A recipe sets only the keys that it chooses; all others have the defaults below.  Any key can be changed on
the command line, as in `--config.encoder.width=2`.  `required` means that a recipe must set the key.
"""

if __name__ == "__main__":
  print(page(), end="")
