"""SimCLR v2 on ImageNet: ResNet-50, 101 or 152, width 1 to 3, with or without selective kernels, 800 epochs.

Command:   simclr pretrain --config=configs/v2.py:r50_1x_sk0 --workdir=gs://BUCKET/v2      (... :r152_3x_sk1;
           :r50_1x_sk0-memory adds the momentum encoder and the memory bank)
Hardware:  v4:4x4x8, 128 chips, an estimated 1.6 (r50_1x_sk0) to 33.5 (r152_3x_sk1) hours of steps
           (docs/plans.md); the paper used 128 Cloud TPUs; this recipe has not been run at that scale yet
Expected:  linear evaluation top-1 on ImageNet about 71.1 for r50_1x_sk0 (the paper's 71.7 used a momentum encoder and
           a memory bank); 74.6 for r50_1x_sk1 and 79.8 for r152_3x_sk1 in the paper, both with that memory
Source:    arXiv 2006.10029: Table 1 and App. A; google-research/simclr README (learning rate, weight decay)
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir
"""

import ml_collections


def get_config(arg="r50_1x_sk0"):
  network, _, memory = arg.partition("-")
  depth, width, sk = network.split("_")
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:imagenet2012:train", test="tfds:imagenet2012:validation"),
      batch_size=4096,
      train_epochs=800.0,
      augment=dict(where="device", size=224),
      encoder=dict(
        depth=int(depth[1:]), width=float(width[:-1]), sk_ratio={"sk0": 0.0, "sk1": 0.0625}[sk], dtype="bfloat16"
      ),
      **({"memory": dict(size=65536, decay=0.999)} if memory == "memory" else {}),
      loss=dict(temperature=0.1, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(base_lr=0.1, lr_scaling="sqrt", warmup_epochs=40.0, weight_decay=1e-4),
      evaluate=dict(batch_size=1024, train_examples=50000),
      checkpoint=dict(every_epochs=1.0, keep=5),
      log=dict(every_steps=100),
      probe=dict(method="sgd", batch_size=4096),
    )
  )
