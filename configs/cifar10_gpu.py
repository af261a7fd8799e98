"""CIFAR-10 on one GPU in minutes: the images stay on the device, which crops and distorts them; bfloat16.

Command:   simclr pretrain --config=configs/cifar10_gpu.py --workdir=runs/cifar10_gpu
           (:100ep trains for a fifth of the epochs)
Hardware:  one GPU with 16 GB or more; not measured yet on a GPU (python -m benchmarks.gpu.check measures it)
Expected:  kNN about 90 % after 500 epochs and about 83 % after 100, reported by dkobak/simclr-cifar10 with the same
           network, batch, temperature and schedule; this recipe itself has not been run to its end yet
Source:    arXiv 2002.05709, App. B.9, with the SGD learning rates and weight decay of dkobak/simclr-cifar10, whose head
           is wider
Data:      a prepared TFDS cifar10 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections

EPOCHS = {"": 500.0, "100ep": 100.0}


def get_config(arg=""):
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=512,
      train_epochs=EPOCHS[arg],
      augment=dict(size=32, color_strength=0.5, blur=False, where="resident", canvas=32, color_order="fixed"),
      encoder=dict(depth=18, stem="cifar", dtype="bfloat16"),
      projector=dict(layers=2, out_dim=128),
      loss=dict(temperature=0.5, normalize=True, reduction="mean", precision="default"),
      optimizer=dict(name="sgd", base_lr=0.03 if not arg else 0.06, warmup_epochs=10.0, weight_decay=5e-4),
      evaluate=dict(crop=1.0, batch_size=1000, every_epochs=25.0, knn_k=10),
      checkpoint=dict(every_epochs=50.0, keep=1),
      log=dict(every_steps=100),
    )
  )
