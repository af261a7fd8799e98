"""The methods that SimCLR is compared with, on CIFAR-10 with the network, data and budget of configs/cifar10.py.

Command:   simclr pretrain --config=configs/methods.py:autoencoder --workdir=runs/autoencoder
Hardware:  one GPU; nobody has run this file yet
Expected:  not measured yet
Source:    autoencoder: Hinton and Salakhutdinov, Science 313 (2006), with the encoder's ResNet and its mirror image
Data:      a prepared TFDS cifar10 in --config.data.data_dir, or --config.data.train=npz:FILE:train ...test=npz:FILE:test
"""

import ml_collections

ADAMW = dict(name="adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=10.0, weight_decay=1e-4)
METHODS = {
  # The bottleneck is h itself, which is what the scores are of.
  "autoencoder": dict(projector=dict(kind="none"), optimizer=ADAMW),
}


def get_config(arg="autoencoder"):
  if arg not in METHODS:
    raise ValueError(f"expected one of {', '.join(METHODS)}")
  return ml_collections.ConfigDict(
    dict(
      method=arg,
      data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
      batch_size=512,
      train_epochs=1000.0,
      augment=dict(size=32, color_strength=0.5, blur=False),
      encoder=dict(depth=18, stem="cifar"),
      evaluate=dict(crop=1.0, batch_size=1000, every_epochs=10.0),
      checkpoint=dict(every_epochs=10.0, keep=3),
      log=dict(every_steps=50),
      probe=dict(method="sgd", train_epochs=100.0, batch_size=512),
      **METHODS[arg],
    )
  )
