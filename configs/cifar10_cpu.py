"""CIFAR-10 on a CPU in an hour or two: a ResNet-18 of a quarter of its width, views of 20 pixels.

Command:   simclr pretrain --config=configs/cifar10_cpu.py --workdir=runs/cifar10_cpu
Hardware:  two CPU cores: 340 to 520 images/s, so 64 to 98 minutes of training; one core beside another such run: about
           275 images/s, 2 hours
Expected:  CIFAR-10 (JPEG), means of seeds 0, 1 and 2: kNN 65.3, linear 65.6, with 1 % of the labels 56.5; raw pixels
           36.2, 41.4 and 31.1; an untrained encoder 26.1, 32.2 and 24.2 (docs/results.md)
Source:    arXiv 2002.05709, App. B.9.  Optimizer, learning rate, temperature, crops and batch were compared on 5,000
           training images that were held out, after 3 epochs each: benchmarks/trials.py
Data:      a prepared TFDS cifar10 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=256,
      train_epochs=40.0,
      augment=dict(
        size=20, canvas=32, where="resident", color_strength=0.5, color_order="fixed", blur=False, crop_area=(0.2, 1.0)
      ),
      encoder=dict(depth=18, width=0.25, stem="cifar"),
      projector=dict(layers=2, out_dim=128),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="lars", base_lr=2.0, lr_scaling="none", warmup_epochs=1.0, weight_decay=1e-4),
      evaluate=dict(crop=1.0, batch_size=500, every_epochs=10.0, knn_k=20),
      checkpoint=dict(every_epochs=1.0, keep=1),
    )
  )
