"""CIFAR-10 as in the official README: ResNet-18 with the CIFAR stem, batch 512, 1,000 epochs, no blur.

Command:   simclr pretrain --config=configs/cifar10.py --workdir=runs/cifar10
Hardware:  one GPU; this recipe has not been run to its end yet
Expected:  linear evaluation about 91 %
Source:    google-research/simclr README, "Pretraining on CIFAR-10"; temperature and strength: arXiv 2002.05709, App. B.9
Data:      a prepared TFDS cifar10 in --config.data.data_dir
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=512,
      train_epochs=1000.0,
      augment=dict(size=32, color_strength=0.5, blur=False),
      encoder=dict(depth=18, stem="cifar"),
      loss=dict(temperature=0.5, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(base_lr=1.0, warmup_epochs=10.0, weight_decay=1e-4),
      evaluate=dict(crop=1.0, batch_size=1000, every_epochs=10.0),
      checkpoint=dict(every_epochs=10.0, keep=3),
      log=dict(every_steps=50),
      probe=dict(method="sgd", train_epochs=100.0, batch_size=512),
    )
  )
