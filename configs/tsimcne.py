"""t-SimCNE: a two-dimensional map of CIFAR-10 that is a network, so it can also place new images.

Command:   simclr pretrain --config=configs/tsimcne.py --workdir=runs/tsimcne      (:cpu for two CPU cores)
           simclr map --workdir=runs/tsimcne --method=tsimcne
Hardware:  one GPU, not run yet; for cpu, 72 minutes on one of two CPU cores beside other work
Expected:  kNN accuracy in two dimensions 89 % in the paper, with a ResNet-18 after 1,000 + 50 + 450 epochs; for cpu 32.4 on
           CIFAR-10 (JPEG), where t-SNE of h has 40.1 and PCA 28.1 (seed 0).  This was measured when the steps of the output
           layer were several times too long in the second stage, and not again since
Source:    arXiv 2210.09879, section 3 and Appendix: the stages, batch, SGD and its rates.  The paper's head has a hidden
           layer of 1,024 units instead of 512, and no BatchNorm on its output.  cpu is the recipe cifar10_cpu with AdamW
Data:      a prepared TFDS cifar10 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections


def get_config(arg=""):
  config = ml_collections.ConfigDict(
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
  return {"": config, "cpu": _cpu()}[arg]


def _cpu():
  return ml_collections.ConfigDict(
    dict(
      method="tsimcne",
      tsimcne=dict(stages=(9.0, 1.0, 3.0), last_lr=0.05),
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=256,
      train_epochs=13.0,
      augment=dict(
        size=20, canvas=32, where="resident", color_strength=0.5, color_order="fixed", blur=False, crop_area=(0.2, 1.0)
      ),
      encoder=dict(depth=18, width=0.25, stem="cifar"),
      projector=dict(layers=2, out_dim=128),
      loss=dict(temperature=0.2, normalize=True, reduction="mean", precision="highest"),
      optimizer=dict(name="adamw", base_lr=4e-3, lr_scaling="none", warmup_epochs=0.5, weight_decay=1e-4),
      evaluate=dict(crop=1.0, batch_size=500, every_epochs=3.0, knn_k=20),
      checkpoint=dict(every_epochs=1.0, keep=1),
    )
  )
