"""Smoke run: Fashion-MNIST (10,000 gray 28-pixel images included in the package), a ResNet-18 of a quarter of its width.

Command:   simclr pretrain --config=configs/smoke.py --workdir=runs/smoke      (bash launch/local.sh sets up first)
Hardware:  two CPU cores; 5 to 6 minutes of training (420 to 540 images/s)
Expected:  kNN (k=20) / linear evaluation / linear with 10 labels per class, in %, mean (min–max) of seeds 0, 1, 2:
           h 82.3 (82.1 to 82.5) / 86.1 (85.2 to 87.2) / 73.9 (73.4 to 74.6),
           z 81.8 (81.6 to 82.0) / 83.1 (82.7 to 83.5) / 71.7 (71.4 to 71.9), raw pixels 81.0 / 84.9 / 70.5,
           untrained encoder 54.5 / 60.8 / 39.1, histogram of 64 gray levels 44.0 / 40.7 / 28.5
Source:    arXiv 2002.05709 with its CIFAR stem (App. B.9); gentler crops, views of 20 pixels and the learning rate were
           tuned on this set, and compared anew on held-out images (docs/results.md)
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="fashion:train", test="fashion:test"),
      batch_size=128,
      train_epochs=16.0,
      augment=dict(size=20, color_strength=0.8, blur=False, crop_area=(0.4, 1.0)),
      encoder=dict(depth=18, width=0.25, stem="cifar"),
      projector=dict(layers=2, out_dim=64),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=4e-3, lr_scaling="none", warmup_epochs=1.0, weight_decay=1e-4),
      evaluate=dict(crop=1.0, every_epochs=5.0, knn_k=20),
      checkpoint=dict(every_epochs=5.0),
    )
  )
