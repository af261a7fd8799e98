"""Distillation as SimCLR v2: a fine-tuned teacher's predictions on unlabelled images train a student.

Command:   simclr distill --config=configs/distill.py:r50_1x_sk0 --config.teacher=RUN_OF_FINETUNE --workdir=runs/student
           (:DEPTH_WIDTH_SK is the student; :r152_3x_sk1-self is self-distillation, with its temperature)
           simclr distill --config=configs/distill.py:small --config.teacher=runs/few --workdir=runs/student
Hardware:  as configs/v2.py; :small is for two CPU cores.  Nobody has run this file to its end yet
Expected:  ImageNet top-1 after a teacher fine-tuned on 1 % / 10 %: r50_1x_sk0 73.9 / 77.5, r50_2x_sk1 75.9 / 80.2,
           r152_3x_sk1 from itself 76.6 / 80.9.  small: not measured yet
Source:    arXiv 2006.10029, abstract and section 2.3: temperature 0.1 for self-distillation and 1 from a bigger
           teacher, 400 epochs, batch, learning rate and weight decay of pretraining, crop and flip only
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir; its labels are read for the test score alone
"""

import ml_collections


def get_config(arg="r50_1x_sk0"):
  small = arg == "small"
  network, _, how = ("r18_1x_sk0", "", "") if small else arg.partition("-")
  depth, width, sk = network.split("_")
  return ml_collections.ConfigDict(
    dict(
      program="distill",
      seed=0,
      teacher="NAME_IT",
      temperature={"": 1.0, "self": 0.1}[how],
      alpha=1.0,  # below 1: the rest of the loss is cross-entropy on the share of labels below
      cache=False,  # True: the teacher sees every image once, centre-cropped, before training
      start="",
      tap=0,
      tune_after=-1,
      data=dict(
        train="fashion:train" if small else "tfds:imagenet2012:train",
        test="fashion:test" if small else "tfds:imagenet2012:validation",
        data_dir="",
        max_bad_fraction=0.001,
      ),
      labels=dict(fraction=0.01 if small else 1.0, list="", seed=0),
      batch_size=128 if small else 4096,
      train_epochs=0.0 if small else 400.0,
      train_steps=300 if small else 0,
      augment=dict(size=20 if small else 224, crop_area=(0.4, 1.0) if small else (0.08, 1.0)),
      encoder=dict(
        depth=int(depth[1:]),
        width=0.125 if small else int(width[:-1]),
        stem="cifar" if small else "imagenet",
        sk_ratio={"sk0": 0.0, "sk1": 0.0625}[sk],
        se_ratio=0.0,
        dtype="float32" if small else "bfloat16",
      ),
      projector=dict(kind="none"),
      optimizer=dict(
        name="adamw" if small else "lars",
        base_lr=4e-3 if small else 0.1,
        lr_scaling="none" if small else "sqrt",
        warmup_epochs=0.0 if small else 20.0,
        momentum=0.9,
        weight_decay=1e-4,
      ),
      evaluate=dict(crop=1.0 if small else 0.875, batch_size=500, every_steps=0, every_epochs=0.0),
      checkpoint=dict(every_steps=0, every_epochs=0.0 if small else 1.0, keep=2),
      log=dict(every_steps=20),
    )
  )
