"""Your own images: a folder, labeled by subfolder or not at all, at 96 pixels on one machine.

Command:   simclr pretrain --config=configs/folder.py --config.data.train=folder:/my/images --workdir=runs/mine
Hardware:  a GPU for tens of thousands of images; for hundreds of images on a CPU, use `simclr quickstart`, which measures
           what is possible, or add --config.train_epochs=20.0
Expected:  no score without labels: watch contrastive accuracy and the collapse verdict; with labels (subfolders), a tenth
           of every class is held out for kNN and linear scores, which are shown next to those of raw pixels; to score
           other images, name them with --config.data.test=folder:/my/held-out
Source:    the v1 paper's augmentation (arXiv 2002.05709, App. A), antialiased because photos are large; square-root
           scaling for small batches (App. B.1)
Rules:     the values below do not depend on the data set; their reasons tell when to change them.  augment.size=96: photos
           still show shapes, at (96/224)^2 = 0.18 of the cost of 224.  encoder.depth=18 at width 1: for tens of thousands
           of images; larger networks gain more (v1, Figure 7).  train_epochs=200: training sees 2 million images of
           a set of 10,000; with ten times the images, a tenth of the epochs takes the same time.  batch_size=256: the
           smallest in v1, Table B.1
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="folder:NAME_IT", max_bad_fraction=0.01),
      batch_size=256,
      train_epochs=200.0,
      augment=dict(size=96, color_strength=0.5, resize="bicubic_antialias"),
      encoder=dict(depth=18),
      projector=dict(layers=2),
      loss=dict(temperature=0.2, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(base_lr=0.075, lr_scaling="sqrt", warmup_epochs=10.0, weight_decay=1e-6),
      evaluate=dict(batch_size=256, train_examples=20000, every_epochs=10.0, knn_k=20),
      checkpoint=dict(every_epochs=5.0, keep=3),
    )
  )
