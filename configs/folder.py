"""Your own images: a folder, labelled by sub-folder or not at all, at 96 pixels on one machine.

Command:   simclr pretrain --config=configs/folder.py --config.data.train=folder:/my/images --workdir=runs/mine
Hardware:  a GPU for tens of thousands of images; a CPU for hundreds (then add --config.train_epochs=20.0)
Expected:  no score without labels: watch contrastive accuracy and the collapse verdict; with labels, name held-out images
           with --config.data.test=folder:/my/held-out for kNN and linear scores beside those of raw pixels
Source:    v1 paper's augmentation (arXiv 2002.05709, App. A); square-root scaling for small batches (App. B.1)
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      data=dict(train="folder:NAME_IT", test="", data_dir="", max_bad_fraction=0.01),
      batch_size=256,
      microbatches=1,
      microbatch_norm="microbatch",
      zero1=False,
      train_epochs=200.0,
      train_steps=0,
      augment=dict(
        where="host",
        canvas=512,
        size=96,
        color_strength=0.5,
        blur=True,
        crop_sampler="official",
        brightness="v2",
        crop_area=(0.08, 1.0),
      ),
      encoder=dict(depth=18, width=1.0, stem="imagenet", sk_ratio=0.0, se_ratio=0.0, dtype="float32"),
      projector=dict(kind="nonlinear", layers=2, out_dim=128),
      loss=dict(temperature=0.2, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(
        name="lars", base_lr=0.075, lr_scaling="sqrt", warmup_epochs=10.0, momentum=0.9, weight_decay=1e-6
      ),
      evaluate=dict(
        crop=0.875,
        batch_size=256,
        train_examples=20000,
        every_steps=0,
        every_epochs=10.0,
        knn_k=20,
        knn_temperature=0.1,
      ),
      checkpoint=dict(every_steps=0, every_epochs=5.0, keep=3),
      log=dict(every_steps=20),
      probe=dict(method="lbfgs", train_epochs=90.0, batch_size=256, base_lr=0.1),
    )
  )
