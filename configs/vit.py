"""A Vision Transformer as the encoder: ViT-Ti on CIFAR-10, ViT-S and -B on ImageNet, with the settings of MoCo v3.

Command:   simclr pretrain --config=configs/vit.py --workdir=runs/vit
           (:s16 and :b16 for ImageNet: add --config.data.data_dir=gs://BUCKET/tfds; :textures needs no data)
Hardware:  one GPU for CIFAR-10, a pod for ImageNet, neither run yet; a CPU for textures, 37 minutes on one core
Expected:  textures: kNN 48.5, linear 58.5 (untrained 10.5, 40.6), seed 0.  The others are not measured yet; SimCLR with a
           ViT-S/16 at batch 1,024 and 300 epochs reaches 69.0 % linear accuracy in MoCo v3, Table 4
Source:    arXiv 2104.02057, sections 4 and 5: AdamW, long warm-up, weight decay 0.1, fixed sines, fixed patch projection;
           the head is SimCLR's
Data:      a prepared TFDS cifar10 or imagenet2012 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections

SIZES = {"": ("Ti", 4, 32), "s16": ("S", 16, 224), "b16": ("B", 16, 224)}  # network, patch, view


def get_config(arg=""):
  if arg == "textures":
    return _textures()
  network, patch, view = SIZES[arg]
  small = view == 32
  return ml_collections.ConfigDict(
    dict(
      data=dict(
        train="tfds:cifar10:train" if small else "tfds:imagenet2012:train",
        test="tfds:cifar10:test" if small else "tfds:imagenet2012:validation",
      ),
      batch_size=512 if small else 4096,
      train_epochs=300.0,
      augment=dict(
        size=view,
        color_strength=0.5 if small else 1.0,
        blur=not small,
        where="resident" if small else "device",
        canvas=32 if small else 512,
      ),
      encoder=dict(name="vit", size=network, patch=patch, dtype="bfloat16"),
      projector=dict(layers=3, out_dim=128 if small else 256),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=1.5e-4, lr_scaling="linear", warmup_epochs=40.0, weight_decay=0.1),
      evaluate=dict(batch_size=1000, every_epochs=10.0, **(dict(crop=1.0) if small else dict(train_examples=50000))),
      checkpoint=dict(every_epochs=5.0, keep=3),
      log=dict(every_steps=100),
    )
  )


def _textures():
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="textures:train", test="textures:test"),
      batch_size=128,
      train_steps=300,
      augment=dict(
        size=24, color_strength=0.5, grayscale_prob=0.5, blur=False, crop_area=(0.35, 1.0), where="resident", canvas=32
      ),
      encoder=dict(name="vit", size="Ti", patch=4),
      projector=dict(layers=2, out_dim=64),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=2.0, weight_decay=0.1),
      evaluate=dict(crop=1.0, every_steps=100, knn_k=20),
      checkpoint=dict(every_steps=50),
      log=dict(every_steps=20),
    )
  )
