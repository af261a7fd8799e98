"""The color shortcut (v1 paper, section 3.1) in miniature: 5,000 procedural images whose color is independent of the class.

Command:   simclr pretrain --config=configs/textures.py --workdir=runs/textures
           simclr pretrain --config=configs/textures.py:crop_only --workdir=runs/crop_only
Hardware:  two CPU cores; 2 to 3 minutes of training each
Expected:  kNN (k=20) / linear evaluation / linear with 10 labels per class, in %, at 400 steps, mean (min–max) of
           seeds 0, 1, 2.  Crop and color:
           h 82.8 (80.0 to 85.3) / 85.3 (82.3 to 86.9) / 73.8 (70.4 to 76.6), contrastive accuracy 55,
           z 84.8 (83.1 to 86.3) / 85.8 (81.6 to 89.0) / 76.6 (74.0 to 78.6): color, which is noise for these classes,
           is removed from z.  Crops alone: h 11.2 (11.0 to 11.4) / 13.4 (13.1 to 13.7) / 10.3 (9.9 to 10.6), contrastive
           accuracy over 99: the network recognizes crops by their colors and learns nothing else.
           Raw pixels 25.7 / 18.5 / 16.0, untrained encoder 13.1 / 19.0 / 11.5, histogram of 64 colors
           9.8 / 10.1 / 9.7, chance 10
Source:    arXiv 2002.05709, Figure 5 and Table 1; frequent grayscale, views of 24 pixels and the learning rate were
           tuned on this set, and compared anew on held-out images (docs/results.md)
"""

import ml_collections


def get_config(arg=""):
  strength = {"": 0.5, "crop_only": 0.0}[arg]
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="textures:train", test="textures:test"),
      batch_size=128,
      train_steps=400,
      augment=dict(size=24, color_strength=strength, grayscale_prob=0.5, blur=False, crop_area=(0.35, 1.0)),
      encoder=dict(depth=18, width=0.25, stem="cifar"),
      projector=dict(layers=2, out_dim=64),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=8e-3, lr_scaling="none", warmup_epochs=1.0, weight_decay=1e-4),
      evaluate=dict(crop=1.0, every_steps=200, knn_k=20),
      checkpoint=dict(every_steps=200),
    )
  )
