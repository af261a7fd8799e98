"""CIFAR-10 as the official README: ResNet-18 with the CIFAR stem, batch 512, 1,000 epochs, no blur.

Command:   simclr pretrain --config=configs/cifar10.py --workdir=runs/cifar10
Hardware:  one GPU; nobody has run this file to its end yet
Expected:  linear evaluation about 91 %
Source:    google-research/simclr README, "Pretraining on CIFAR-10"; temperature and strength: arXiv 2002.05709, App. B.9
Data:      a prepared TFDS cifar10 in --config.data.data_dir
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test", data_dir="", max_bad_fraction=0.001),
      batch_size=512,
      microbatches=1,
      microbatch_norm="microbatch",
      zero1=False,
      train_epochs=1000.0,
      train_steps=0,
      augment=dict(
        where="host",
        size=32,
        color_strength=0.5,
        blur=False,
        crop_sampler="official",
        brightness="v2",
        crop_area=(0.08, 1.0),
      ),
      encoder=dict(depth=18, width=1.0, stem="cifar", sk_ratio=0.0, se_ratio=0.0, dtype="float32"),
      projector=dict(kind="nonlinear", layers=3, out_dim=128),
      loss=dict(temperature=0.5, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(
        name="lars", base_lr=1.0, lr_scaling="linear", warmup_epochs=10.0, momentum=0.9, weight_decay=1e-4
      ),
      evaluate=dict(
        crop=1.0,
        batch_size=1000,
        train_examples=0,
        every_steps=0,
        every_epochs=10.0,
        knn_k=200,
        knn_temperature=0.1,
      ),
      checkpoint=dict(every_steps=0, every_epochs=10.0, keep=3),
      log=dict(every_steps=50),
      probe=dict(method="sgd", train_epochs=100.0, batch_size=512, base_lr=0.1),
    )
  )
