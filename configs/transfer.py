"""Transfer of an encoder to twelve data sets, linear and fine-tuned, next to the numbers of SimCLR v1.

Command:   simclr transfer --config=configs/transfer.py --config.start=RUN_OR_ENCODER --workdir=runs/transfer
           (:linear leaves out fine-tuning; :small uses one data set of the package; for other data sets see
           docs/downstream.md)
Hardware:  linear: one accelerator for ResNet-50.  Fine-tuning takes 57 runs of 20,000 steps and, for random weights, 57 of
           40,000 per data set, and another 57 of 20,000 if `supervised` is given; one run of each is kept on the disk.
           :small is for two CPU cores.  This recipe has not been run to its end yet
Expected:  the printed table shows the paper's numbers next to ours.  small: docs/downstream.md
Source:    arXiv 2002.05709, App. B.8: 45 penalties, 7 learning rates x 8 weight decays, twice the steps and a grid of
           their own for random weights, splits and metrics; Table 8
Data:      prepared TFDS sets in --config.data_dir; Birdsnap and FGVC Aircraft are not in TFDS: give folders with
           --config.rows.birdsnap.train and .test, --config.rows.aircraft.train, .validation and .test
"""

import ml_collections

TOP_1, MEAN, MAP = "top_1", "mean_per_class", "mean_average_precision"
# name: (train, validation, test, metric); without a validation split, a tenth of train is held out.
SETS = {
  "food101": ("tfds:food101:train", "", "tfds:food101:validation", TOP_1),
  "cifar10": ("tfds:cifar10:train", "", "tfds:cifar10:test", TOP_1),
  "cifar100": ("tfds:cifar100:train", "", "tfds:cifar100:test", TOP_1),
  "birdsnap": ("folder:NAME_IT/birdsnap/train", "", "folder:NAME_IT/birdsnap/test", TOP_1),
  "sun397": ("tfds:sun397/standard-part1-120k:train", "", "tfds:sun397/standard-part1-120k:test", TOP_1),
  "cars": ("tfds:cars196:train", "", "tfds:cars196:test", TOP_1),
  "aircraft": ("folder:NAME_IT/aircraft/train", "folder:NAME_IT/aircraft/val", "folder:NAME_IT/aircraft/test", MEAN),
  "voc2007": ("tfds:voc/2007:train", "tfds:voc/2007:validation", "tfds:voc/2007:test", MAP),
  "dtd": ("tfds:dtd:train", "tfds:dtd:validation", "tfds:dtd:test", TOP_1),
  "pets": ("tfds:oxford_iiit_pet:train", "", "tfds:oxford_iiit_pet:test", MEAN),
  "caltech101": ("tfds:caltech101:train", "", "tfds:caltech101:test", MEAN),
  "flowers": (
    "tfds:oxford_flowers102:train",
    "tfds:oxford_flowers102:validation",
    "tfds:oxford_flowers102:test",
    MEAN,
  ),
}
SMALL = {"textures": ("textures:train", "", "textures:test", TOP_1)}


def get_config(arg=""):
  small = arg == "small"
  rows = {
    name: dict(train=train, validation=validation, test=test, metric=metric)
    for name, (train, validation, test, metric) in (SMALL if small else SETS).items()
  }
  # 7 from 1e-4 to 1e-1 and 7 from 1e-6 to 1e-3, log-spaced, and no decay; from scratch 1e-3 to 1 and 1e-5 to 10^-1.5.
  rates, scratch_rates = (tuple(10 ** (first + i / 2) for i in range(7)) for first in (-4, -3))
  decays, scratch_decays = (0.0, *(10 ** (-6 + i / 2) for i in range(7))), tuple(10 ** (-5 + i / 2) for i in range(8))
  return ml_collections.ConfigDict(
    dict(
      program="transfer",
      start="NAME_IT",  # a run, or a folder written by simclr export or simclr import
      methods=("linear",) if arg in ("linear", "small") else ("linear", "finetune"),
      rows=rows,
      augment=dict(size=20 if small else 224, crop_area=(0.4, 1.0) if small else (0.08, 1.0)),
      # Of the linear score: shorter side to 224, then its center.  Fine-tuned networks have the crop of finetune.recipe.
      evaluate=dict(crop=1.0),
      finetune=dict(
        recipe="finetune:small" if small else "finetune:supervised",
        train_steps=300 if small else 20000,
        batch_size=64 if small else 256,
        base_lrs=(0.03, 0.1) if small else rates,
        weight_decays=(0.0,) if small else decays,
      ),
      from_scratch=dict(
        train_steps=300 if small else 40000,
        base_lrs=(0.03, 0.1) if small else scratch_rates,
        weight_decays=(0.0,) if small else scratch_decays,
      ),
    )
  )
