"""t-SimCNE: a two-dimensional map of CIFAR-10 that is a network, so it can also place new images.

Command:   simclr pretrain --config=configs/tsimcne.py --workdir=runs/tsimcne
           simclr map --workdir=runs/tsimcne --method=tsimcne
Hardware:  one GPU; this recipe has not been run yet
Expected:  kNN accuracy in two dimensions 89 % in the paper, with a ResNet-18 after 1,000 + 50 + 450 epochs
Source:    arXiv 2210.09879, section 3 and Appendix: the stages, batch, SGD and its rates.  The paper's head has a hidden
           layer of 1,024 units instead of 512, and no BatchNorm on its output
Data:      a prepared TFDS cifar10 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      method="tsimcne",
      tsimcne=dict(stages=(1000.0, 50.0, 450.0), last_lr=0.001),
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=1024,
      train_epochs=1500.0,
      augment=dict(size=32, color_strength=0.5, blur=False, crop_area=(0.2, 1.0)),
      encoder=dict(depth=18, stem="cifar"),
      projector=dict(layers=2, out_dim=128),
      optimizer=dict(name="sgd", base_lr=0.03, warmup_epochs=10.0, weight_decay=5e-4),
      evaluate=dict(crop=1.0, batch_size=1000, every_epochs=25.0, knn_k=15),
      checkpoint=dict(every_epochs=25.0, keep=3),
      log=dict(every_steps=50),
    )
  )
