"""SimCLR v1 on ImageNet: ResNet-50 of width 1, 2 or 4, batch 4,096, 100 or 1,000 epochs.

Command:   simclr pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/v1      (or :2x, :4x, :1x-100ep, :1x-broader)
Hardware:  v4:4x4x8, 128 chips, an estimated 2.0 (1x), 4.9 (2x) and 14.4 (4x) hours of steps for 1,000 epochs
           (docs/plans.md); the paper used 128 TPU v3 cores, 1.5 hours for 100 epochs of 1x; this recipe has not been
           run at that scale yet
Expected:  linear evaluation top-1 on ImageNet 69.3 (1x), 74.2 (2x), 76.5 (4x) after 1,000 epochs, 64.6 (1x) after 100;
           with broader augmentation 70.0 (1x), 74.4 (2x), 76.8 (4x)
Source:    arXiv 2002.05709: Table 6, Table B.1, section 2.2 and App. A and B.6; additive brightness as in the paper
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir
"""

import ml_collections


def get_config(arg="1x"):
  width, _, epochs = arg.partition("-")
  # The paper names these four but not how often they are applied; a tenth of the views each is a guess.
  broader = (("sobel", 0.1), ("equalize", 0.1), ("solarize", 0.1), ("motion_blur", 0.1))
  return ml_collections.ConfigDict(
    dict(
      data=dict(train="tfds:imagenet2012:train", test="tfds:imagenet2012:validation"),
      batch_size=4096,
      train_epochs={"": 1000.0, "100ep": 100.0, "broader": 1000.0}[epochs],
      augment=dict(size=224, brightness="v1", **(dict(extra=broader) if epochs == "broader" else dict(where="device"))),
      encoder=dict(depth=50, width={"1x": 1.0, "2x": 2.0, "4x": 4.0}[width], dtype="bfloat16"),
      projector=dict(layers=2),
      # The official code sums the losses of both directions; LARS hides the factor 2 everywhere but in BatchNorm.
      loss=dict(temperature=0.1, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(base_lr=0.3, warmup_epochs=10.0, weight_decay=1e-6),
      evaluate=dict(batch_size=1024, train_examples=50000),
      checkpoint=dict(every_epochs=1.0, keep=5),
      log=dict(every_steps=100),
      probe=dict(method="sgd", batch_size=4096),
    )
  )
