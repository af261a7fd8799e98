"""Distillation as in SimCLR v2: a fine-tuned teacher's predictions on unlabeled images train a student.

Command:   simclr distill --config=configs/distill.py:r50_1x_sk0 --config.teacher=RUN_OF_FINETUNE --workdir=runs/student
           (:DEPTH_WIDTH_SK is the student; :r152_3x_sk1-self is self-distillation, with its own temperature;
           -labels_1pct or -labels_10pct adds the loss on labels, -only_1pct or -only_10pct uses no other images).
           The labels of -labels_1pct and -labels_10pct have to be those of the teacher, which are not in the official
           subset that configs/finetune.py names, or both together see twice as many.  Fine-tune the teacher with
           --config.data.train=tfds:imagenet2012:train --config.labels.fraction=0.01 (or 0.1); or give both
           --config.data.train=folder:/imagenet/train --config.labels.list=FILE, an official list
           simclr distill --config=configs/distill.py:small --config.teacher=runs/few --workdir=runs/student
Hardware:  as for configs/v2.py; :small is for two CPU cores.  The ImageNet recipes have not been run to their end yet
Expected:  ImageNet top-1 after a teacher fine-tuned on 1 % / 10 %: r50_1x_sk0 73.9 / 77.5, r50_2x_sk1 75.9 / 80.2,
           r152_3x_sk1 from itself 76.6 / 80.9.  r50_1x_sk0 with different targets (Table 2): labels alone 12.3 / 52.0
           (configs/finetune.py:supervised-1pct, -10pct), -only 23.6 / 66.2, -labels 69.0 / 75.1, no labels 68.9 / 74.3.
           small: 75.0 from a teacher with 10 % (docs/downstream.md)
Source:    arXiv 2006.10029, abstract, section 2.3, Table 2: temperature 0.1 for self-distillation and 1 for a bigger
           teacher, 400 epochs, batch, learning rate and weight decay as in pretraining, crop and flip only.  Not
           published: alpha of Table 2
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir (for -only also imagenet2012_subset); without -labels and
           -only its labels are used only for the test score
"""

import ml_collections

TARGETS = [("", ""), ("self", "")] + [
  (targets, labeled) for targets in ("labels", "only") for labeled in ("1pct", "10pct")
]


def get_config(arg="r50_1x_sk0"):
  small = arg == "small"
  network, _, how = ("r18_1x_sk0", "", "") if small else arg.partition("-")
  depth, width, sk = network.split("_")
  targets, _, labeled = how.partition("_")
  if (targets, labeled) not in TARGETS:
    raise ValueError(f"after {network} expected {', '.join('_'.join(x).rstrip('_') for x in TARGETS[1:])}, not {how}")
  subset = f"tfds:imagenet2012_subset/{labeled}:train"
  return ml_collections.ConfigDict(
    dict(
      program="distill",
      teacher="NAME_IT",
      temperature=0.1 if how == "self" else 1.0,
      alpha=0.5 if labeled else 1.0,  # below 1: the rest of the loss is cross-entropy on the fraction of labels below
      data=dict(
        train="fashion:train" if small else subset if targets == "only" else "tfds:imagenet2012:train",
        test="fashion:test" if small else "tfds:imagenet2012:validation",
      ),
      labels=dict(fraction={"1pct": 0.01, "10pct": 0.1}[labeled] if targets == "labels" else 1.0),
      batch_size=128 if small else 4096,
      train_epochs=0.0 if small else 400.0,
      train_steps=300 if small else 0,
      augment=dict(size=20 if small else 224, crop_area=(0.4, 1.0) if small else (0.08, 1.0)),
      encoder=dict(
        depth=int(depth[1:]),
        width=0.125 if small else float(width[:-1]),
        stem="cifar" if small else "imagenet",
        sk_ratio={"sk0": 0.0, "sk1": 0.0625}[sk],
        dtype="float32" if small else "bfloat16",
      ),
      optimizer=dict(
        name="adamw" if small else "lars",
        base_lr=4e-3 if small else 0.1,
        lr_scaling="none" if small else "sqrt",
        warmup_epochs=0.0 if small else 20.0,
        weight_decay=1e-4,
      ),
      evaluate=dict(crop=1.0 if small else 0.875),
      checkpoint=dict(every_epochs=0.0 if small else 1.0),
    )
  )
