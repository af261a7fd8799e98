"""The ablations of the SimCLR v1 paper: each is one row of a table, ResNet-50 on ImageNet, 100 epochs unless noted.

Command:   simclr pretrain --config=configs/ablations.py:temperature-0.05 --workdir=gs://BUCKET/temperature-0.05
           batch-B-EPOCHSep-linear or -sqrt (Table B.1), temperature-T, no_l2-T (Table 5), loss-NAME (Table 4),
           color-S and autoaugment (Table 1, without blur), no_flip, head-none, head-linear-D, head-nonlinear-D
           (Figure 8), compose-FIRST-SECOND (Figure 5; names of augment_extra.EXTRA, applied to one branch only)
           small-ROW runs any of these rows in minutes on two CPU cores, as `simclr claims` does: ResNet-18 of an
           eighth of the width with the CIFAR stem, views of 16 pixels from crops of at least 20 %, no blur, brightness
           as in v2, AdamW with its own learning rate, warm-up and weight decay; batches are divided by 32, epochs by
           16 and color strengths by 2 (App. B.9); the rest is as in the row
Hardware:  the paper used 128 TPU v3 cores, 1.5 hours for 100 epochs at batch 4,096; these rows have not been run yet.
           small-ROW: two CPU cores; docs/claims.md has scores
Expected:  linear evaluation top-1 on ImageNet: TOP_1 below; head-nonlinear is 3 points above head-linear, and both are
           more than 10 above head-none, for every D; Figure 5 is a picture, whose best cell is crop with color
Source:    arXiv 2002.05709: Tables 1, 4, 5 and B.1, Figure 8, section 3.2.  Not published: learning rate and margin
           of the losses of Table 4, tuned over 0.01, 0.1, 0.3, 0.5, 1 and 0, 0.4, 0.8, 1.6 (App. B.10)
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir; small-ROW: textures, included in the package, or any
           images of about 32 pixels, as --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections

EPOCHS = (100, 200, 400, 800)
TABLE_B1 = {  # batch: top-1 after EPOCHS, linear and sqrt scaling of the learning rate
  256: ((57.5, 61.9, 64.7, 66.6), (62.8, 64.3, 65.7, 66.5)),
  512: ((60.7, 64.0, 66.2, 67.8), (63.8, 65.6, 66.7, 67.4)),
  1024: ((62.8, 65.3, 67.2, 68.5), (64.3, 66.1, 67.2, 68.3)),
  2048: ((64.0, 66.1, 68.1, 68.9), (64.7, 66.8, 67.9, 68.8)),
  4096: ((64.6, 66.5, 68.2, 68.9), (64.5, 66.8, 68.0, 69.1)),
  8192: ((64.8, 66.6, 67.8, 69.0), (64.8, 67.0, 68.3, 69.1)),
}
TOP_1 = {
  "temperature-0.05": 59.7,
  "temperature-0.1": 64.4,
  "temperature-0.5": 60.7,
  "temperature-1": 58.0,
  "no_l2-10": 57.2,
  "no_l2-100": 57.0,
  "loss-margin_triplet": 50.9,
  "loss-nt_logistic": 51.6,
  "loss-margin_triplet_semi_hard": 57.5,
  "loss-nt_logistic_semi_hard": 57.9,
  "loss-nt_xent": 63.9,
  "color-0.125": 59.6,
  "color-0.25": 61.0,
  "color-0.5": 62.6,
  "color-1": 63.2,
  "autoaugment": 61.1,
  "no_flip": 63.4,
  **{
    f"batch-{batch}-{epochs}ep-{scaling}": scores[k][i]
    for batch, scores in TABLE_B1.items()
    for k, scaling in enumerate(("linear", "sqrt"))
    for i, epochs in enumerate(EPOCHS)
  },
}


FIGURE_5 = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")  # FIRST and SECOND


SHRINK = dict(batch=32, epochs=16)  # batches and epochs of small-ROW


def get_config(arg="temperature-0.1"):
  row = arg.removeprefix("small-")
  return _small(_paper(row)) if row != arg else _paper(row)


def _small(config):
  """A row of the paper, scaled down to CIFAR-10 images and two CPU cores."""
  on_host, by_sqrt = bool(config.augment.extra), config.optimizer.lr_scaling == "sqrt"
  config.data = dict(train="textures:train", test="textures:test")
  config.batch_size //= SHRINK["batch"]
  config.train_epochs /= SHRINK["epochs"]
  config.augment.update(
    where="host" if on_host else "resident",
    canvas=32,
    size=16,
    color_strength=config.augment.color_strength / 2,
    blur=False,
    crop_area=(0.2, 1.0),
    brightness="v2",
  )
  config.encoder = dict(depth=18, width=0.125, stem="cifar")
  # Of AdamW; with both rules 8e-3 at batch 128.
  config.optimizer.update(
    name="adamw", base_lr=8e-3 / 128**0.5 if by_sqrt else 1.6e-2, warmup_epochs=1.0, weight_decay=1e-4
  )
  config.evaluate = dict(crop=1.0, batch_size=500, knn_k=20)
  config.checkpoint = dict(keep=1)
  config.log = dict(every_steps=20)
  config.probe = dict(method="lbfgs")
  return config


def _paper(arg):
  what, *values = arg.split("-")
  composed = what == "compose" and len(values) == 2 and set(values) <= set(FIGURE_5)
  if arg not in TOP_1 and what != "head" and not composed:
    raise ValueError(
      f"expected head-KIND-D, compose-FIRST-SECOND with two of {', '.join(FIGURE_5)}, or one of {', '.join(TOP_1)}; or "
      "small- before one of them"
    )
  extra = {"autoaugment": ("autoaugment",), "compose": tuple(dict.fromkeys(values))}.get(what, ())
  batch_size, epochs, scaling = values if what == "batch" else (4096, "100ep", "linear")
  loss = dict(temperature=0.1, normalize=True, reduction="official_sum", precision="highest")
  if what == "temperature":
    loss["temperature"] = float(values[0])
  elif what == "no_l2":
    loss |= dict(temperature=float(values[0]), normalize=False)
  elif what == "loss" and values[0] != "nt_xent":
    loss = dict(name=values[0], **({"margin": 0.8} if "margin" in values[0] else {"temperature": 0.1}))
  head = values if what == "head" else ("nonlinear", "128")
  projector = dict(kind="none") if head[0] == "none" else dict(kind=head[0], out_dim=int(head[1]))
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:imagenet2012:train", test="tfds:imagenet2012:validation"),
      batch_size=int(batch_size),
      train_epochs=float(epochs.removesuffix("ep")),
      augment=dict(
        where="host" if extra else "device",
        size=224,
        color_strength=float(values[0]) if what == "color" else float(not extra or "color" in extra),
        blur=what != "color" and not extra,
        flip=what != "no_flip",
        brightness="v1",
        extra=tuple((name, 1.0) for name in extra),
        one_sided=composed,
      ),
      encoder=dict(depth=50, dtype="bfloat16"),
      projector=projector | (dict(layers=2) if projector["kind"] == "nonlinear" else {}),
      loss=loss,
      optimizer=dict(
        base_lr=0.075 if scaling == "sqrt" else 0.3, lr_scaling=scaling, warmup_epochs=10.0, weight_decay=1e-6
      ),
      evaluate=dict(batch_size=1024, train_examples=50000),
      checkpoint=dict(every_epochs=1.0, keep=5),
      log=dict(every_steps=100),
      probe=dict(method="sgd", batch_size=4096),
    )
  )
