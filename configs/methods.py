"""The methods that SimCLR is compared with: on CIFAR-10 as configs/cifar10.py, and on ImageNet as in their papers.

Command:   simclr pretrain --config=configs/methods.py:byol --workdir=runs/byol
           (or moco, moco_v3, instdisc, supcon, autoencoder, alignment, which collapses, or the controls supervised and
           oracle, which use labels; the first four and byol also exist with -imagenet, as in :byol-imagenet)
Hardware:  one GPU for CIFAR-10; the ImageNet rows need as much as configs/v1.py:1x.  These recipes have not been run yet
Expected:  CIFAR-10: not measured yet; InstDisc's paper has kNN 80.4 with 4,096 negatives and 80.8 with the softmax over
           all images.  alignment: "COLLAPSED" at the first evaluation, after 977 steps.
           Linear evaluation top-1 on ImageNet, ResNet-50: moco 71.1 after 800 epochs (67.5 after 200), moco_v3 74.6
           after 1,000 (68.9 after 100, 72.8 after 300), byol 74.3 after 1,000; instdisc 54.0, kNN 46.5; supcon 78.7,
           with AutoAugment and with labels
Source:    arXiv 1911.05722 and 2003.04297 (moco); 2104.02057 and the authors' CONFIG.md (moco_v3); 2006.07733,
           section 3.3 (byol); 1805.01978, Tables 1 and 2, and the authors' README (instdisc); 2004.11362, Table 2 (supcon);
           Hinton and Salakhutdinov, Science 313 (autoencoder).  All use SimCLR's head and augmentation here; only the crops are
           the papers'.  The learning rate of supcon on ImageNet, and on CIFAR-10 everything except InstDisc's loss, are not
           from the papers and not tuned
Data:      a prepared TFDS cifar10 or imagenet2012 in --config.data.data_dir, or arrays:
           --config.data.train=npz:FILE:train --config.data.test=npz:FILE:test
"""

import ml_collections

SGD = dict(name="sgd", base_lr=0.03, warmup_epochs=10.0, weight_decay=5e-4)
LARS = dict(base_lr=1.0, warmup_epochs=10.0, weight_decay=1e-4)
ADAMW = dict(name="adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=10.0, weight_decay=1e-4)
CIFAR10 = {
  "moco": dict(moco=dict(size=4096, decay=0.99), loss=dict(temperature=0.1), optimizer=SGD),
  "moco_v3": dict(moco_v3=dict(decay=0.99), loss=dict(temperature=0.2), optimizer=LARS),
  "byol": dict(byol=dict(decay=0.996), optimizer=LARS),
  "instdisc": dict(
    instdisc=dict(negatives=4096, decay=0.5), loss=dict(temperature=0.07), projector=dict(kind="linear"), optimizer=SGD
  ),
  "supcon": dict(loss=dict(temperature=0.1), optimizer=LARS),
  # Without a head z is h, so the scores are of the bottleneck, and of what collapses.
  "autoencoder": dict(projector=dict(kind="none"), optimizer=ADAMW),
  "alignment": dict(projector=dict(kind="none"), optimizer=ADAMW),
  # The controls of `simclr claims`.
  "supervised": dict(projector=dict(kind="none"), optimizer=ADAMW),
  "oracle": dict(loss=dict(temperature=0.5), optimizer=LARS),
}
IMAGENET = {  # batch, epochs, the smallest area of a crop, and everything else
  "moco": (256, 800.0, 0.2, dict(
    moco=dict(size=65536, decay=0.999), loss=dict(temperature=0.2), projector=dict(layers=2, out_dim=128),
    optimizer=dict(name="sgd", base_lr=0.03, weight_decay=1e-4),
  )),
  "moco_v3": (4096, 1000.0, 0.2, dict(
    moco_v3=dict(decay=0.996, hidden=4096), loss=dict(temperature=1.0), projector=dict(layers=2, out_dim=256),
    optimizer=dict(base_lr=0.3, warmup_epochs=10.0, weight_decay=1.5e-6),
  )),
  "byol": (4096, 1000.0, 0.08, dict(
    byol=dict(decay=0.996, hidden=4096), projector=dict(layers=2, out_dim=256),
    optimizer=dict(base_lr=0.2, warmup_epochs=10.0, weight_decay=1.5e-6),
  )),
  "instdisc": (256, 200.0, 0.2, dict(
    instdisc=dict(negatives=4096, decay=0.5), loss=dict(temperature=0.07), projector=dict(kind="linear", out_dim=128),
    optimizer=dict(name="sgd", base_lr=0.03, weight_decay=1e-4),
  )),
  "supcon": (6144, 350.0, 0.08, dict(
    loss=dict(temperature=0.1), projector=dict(layers=2, out_dim=128),
    optimizer=dict(base_lr=0.3, warmup_epochs=10.0, weight_decay=1e-6),
  )),
}  # fmt: skip


def get_config(arg="byol"):
  method, _, size = arg.partition("-")
  if size not in ("", "imagenet") or method not in (IMAGENET if size else CIFAR10):
    known = [*CIFAR10, *(f"{name}-imagenet" for name in IMAGENET)]
    raise ValueError(f"expected one of {', '.join(known)}")
  return ml_collections.ConfigDict(dict(method=method, **(imagenet if size else cifar10)(method)))


def cifar10(method):
  return dict(
    data=dict(train="tfds:cifar10:train", test="tfds:cifar10:test"),
    batch_size=512,
    train_epochs=1000.0,
    augment=dict(size=32, color_strength=0.5, blur=False),
    encoder=dict(depth=18, stem="cifar"),
    evaluate=dict(crop=1.0, batch_size=1000, every_epochs=10.0),
    checkpoint=dict(every_epochs=10.0, keep=3),
    log=dict(every_steps=50),
    probe=dict(method="sgd", train_epochs=100.0, batch_size=512),
    **CIFAR10[method],
  )


def imagenet(method):
  batch_size, epochs, least, rest = IMAGENET[method]
  return dict(
    data=dict(train="tfds:imagenet2012:train", test="tfds:imagenet2012:validation"),
    batch_size=batch_size,
    train_epochs=epochs,
    augment=dict(where="device", size=224, crop_area=(least, 1.0)),
    encoder=dict(depth=50, dtype="bfloat16"),
    evaluate=dict(batch_size=1024, train_examples=50000),
    checkpoint=dict(every_epochs=1.0, keep=5),
    log=dict(every_steps=100),
    probe=dict(method="sgd", batch_size=4096),
    **rest,
  )
