"""The colour shortcut (v1 paper, section 3.1) in miniature: 5,000 procedural images, colour independent of the class.

Command:   simclr pretrain --config=configs/textures.py --workdir=runs/textures
           simclr pretrain --config=configs/textures.py:crop_only --workdir=runs/crop_only
Hardware:  two CPU cores; 100 to 160 CPU-seconds of training each
Expected:  kNN (k=20) / linear evaluation, in %, at 400 steps.  Crop and colour, one seed: h 79.3 / 82.0, z 82.5 / 84.4,
           contrastive accuracy 48.  Crops alone, seeds 0 and 1: h 11.6 / 12.4 and 11.6 / 13.4, contrastive accuracy
           over 99: two crops are told apart by their colours, and nothing is learned.
           Histogram of 64 colours 9.8 / 10.1, chance 10
Source:    arXiv 2002.05709, Figure 5 and Table 1; frequent greyscale, views of 24 pixels and the learning rate were
           tuned on this set
"""

import ml_collections


def get_config(arg=""):
  strength = {"": 0.5, "crop_only": 0.0}[arg]
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      data=dict(train="textures:train", test="textures:test", data_dir="", max_bad_fraction=0.001),
      batch_size=128,
      microbatches=1,
      microbatch_norm="microbatch",
      zero1=False,
      train_epochs=0.0,
      train_steps=400,
      augment=dict(
        where="host",
        size=24,
        color_strength=strength,
        grayscale_prob=0.5,
        blur=False,
        crop_sampler="official",
        brightness="v2",
        crop_area=(0.35, 1.0),
      ),
      encoder=dict(depth=18, width=0.125, stem="cifar", sk_ratio=0.0, se_ratio=0.0, dtype="float32"),
      projector=dict(kind="nonlinear", layers=2, out_dim=64),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=8e-3, lr_scaling="none", warmup_epochs=1.0, momentum=0.9, weight_decay=1e-4),
      evaluate=dict(
        crop=1.0, batch_size=500, train_examples=0, every_steps=200, every_epochs=0.0, knn_k=20, knn_temperature=0.1
      ),
      checkpoint=dict(every_steps=200, every_epochs=0.0, keep=2),
      log=dict(every_steps=20),
      probe=dict(method="lbfgs", train_epochs=90.0, batch_size=256, base_lr=0.1),
    )
  )
