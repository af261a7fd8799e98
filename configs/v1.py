"""SimCLR v1 on ImageNet: ResNet-50 of width 1, 2 or 4, batch 4,096, 100 or 1,000 epochs.

Command:   simclr pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/v1      (or :2x, :4x, :1x-100ep, :1x-broader)
Hardware:  v4:4x4x8, 128 chips, by docs/plans.md 2.0 (1x), 4.9 (2x) and 14.4 (4x) hours of steps for 1,000 epochs; the
           paper used 128 TPU v3 cores, 1.5 hours for 100 epochs of 1x; nobody has run this file at that scale yet
Expected:  linear evaluation top-1 on ImageNet 69.3 (1x), 74.2 (2x), 76.5 (4x) after 1,000 epochs, 64.6 (1x) after 100;
           with broader augmentation 70.0 (1x), 74.4 (2x), 76.8 (4x)
Source:    arXiv 2002.05709: Table 6, Table B.1, section 2.2 and App. A and B.6; additive brightness as in the paper
Data:      a prepared TFDS imagenet2012 in --config.data.data_dir
"""

import ml_collections


def get_config(arg="1x"):
  width, _, epochs = arg.partition("-")
  # The paper names these four and not how often they are applied: a tenth of the views each is a guess.
  broader = (("sobel", 0.1), ("equalize", 0.1), ("solarize", 0.1), ("motion_blur", 0.1))
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      data=dict(
        train="tfds:imagenet2012:train", test="tfds:imagenet2012:validation", data_dir="", max_bad_fraction=0.001
      ),
      batch_size=4096,
      microbatches=1,
      microbatch_norm="microbatch",
      zero1=False,
      train_epochs={"": 1000.0, "100ep": 100.0, "broader": 1000.0}[epochs],
      train_steps=0,
      augment=dict(
        where="host" if epochs == "broader" else "device",
        canvas=512,
        size=224,
        color_strength=1.0,
        blur=True,
        crop_sampler="official",
        brightness="v1",
        crop_area=(0.08, 1.0),
        **({"extra": broader} if epochs == "broader" else {}),
      ),
      encoder=dict(
        depth=50,
        width={"1x": 1.0, "2x": 2.0, "4x": 4.0}[width],
        stem="imagenet",
        sk_ratio=0.0,
        se_ratio=0.0,
        dtype="bfloat16",
      ),
      projector=dict(kind="nonlinear", layers=2, out_dim=128),
      # The official code sums the losses of both directions; LARS hides the factor 2 everywhere but in BatchNorm.
      loss=dict(temperature=0.1, normalize=True, reduction="official_sum", precision="highest"),
      optimizer=dict(
        name="lars", base_lr=0.3, lr_scaling="linear", warmup_epochs=10.0, momentum=0.9, weight_decay=1e-6
      ),
      evaluate=dict(
        crop=0.875,
        batch_size=1024,
        train_examples=50000,
        every_steps=0,
        every_epochs=0.0,
        knn_k=200,
        knn_temperature=0.1,
      ),
      checkpoint=dict(every_steps=0, every_epochs=1.0, keep=5),
      log=dict(every_steps=100),
      probe=dict(method="sgd", train_epochs=90.0, batch_size=4096, base_lr=0.1),
    )
  )
