"""Fine-tuning with 1, 10 or 100 % of the labels as in SimCLR v1 and v2, and supervised training from scratch.

Command:   simclr finetune --config=configs/finetune.py:v2_10pct --config.start=RUN_OR_ENCODER --workdir=runs/v2_10pct
           (or :v2_1pct, :v2_100pct, each with -wide for widths above 1 and selective kernels; :v1_1pct, :v1_10pct;
           :supervised needs no start: also -1pct, -10pct, -4x, -500ep, -1000ep, -color and -color_blur, as in
           -4x-500ep-color)
           simclr finetune --config=configs/finetune.py:small --config.start=runs/smoke --workdir=runs/few
Hardware:  one accelerator for ResNet-50; :small is for two CPU cores.  The ImageNet rows have not been run yet
Expected:  ImageNet top-1 of ResNet-50.  v1 48.3 (1 %), 65.6 (10 %); 58.5, 71.7 at 2x; 63.0, 74.4 at 4x (Table 7).
           v2 57.9 (1 %), 68.4 (10 %), 76.3 (100 %); with selective kernels 64.5, 72.1, 78.7; ResNet-152 3x with selective
           kernels 74.9, 80.1, 83.1 (Table 1).  Supervised with 1 % 25.4, with 10 % 56.4 (v1; 12.3 and 52.0 in v2); with
           all labels after 90, 500, 1,000 epochs (v1, Table B.3): crops 76.5, 76.2, 75.8; -color 75.6, 76.5, 75.2;
           -color_blur 75.3, 76.7, 76.4; the same three at 4x 78.4, 78.3, 77.9; 78.9, 78.4, 78.2; 78.7, 78.5, 78.3
           small: the table in docs/downstream.md
Source:    arXiv 2002.05709, section 6 and App. B.5; arXiv 2006.10029, section 2.2, Table 1 and App. A (learning rate
           0.005 * sqrt(batch) for ResNet-50, 0.002 * sqrt(batch) for wider ones and selective kernels); head layer and
           epochs: google-research/simclr, README and released checkpoints; supervised: its released baselines
Data:      prepared TFDS imagenet2012 and imagenet2012_subset in --config.data.data_dir
"""

import ml_collections

# name: (tap, optimizer, base_lr, lr_scaling, weight_decay, batch, epochs)
PROTOCOLS = {
  "v1_1pct": (0, "sgd", 0.05, "linear", 0.0, 4096, 60.0),
  "v1_10pct": (0, "sgd", 0.05, "linear", 0.0, 4096, 30.0),
  "v2_1pct": (1, "lars", 0.005, "sqrt", 0.0, 1024, 60.0),
  "v2_10pct": (1, "lars", 0.005, "sqrt", 0.0, 1024, 30.0),
  "v2_100pct": (0, "lars", 0.005, "sqrt", 0.0, 1024, 30.0),
  "supervised": (0, "sgd", 0.1, "linear", 1e-4, 4096, 90.0),
  "small": (0, "adamw", 1e-3, "none", 1e-4, 64, 0.0),
}
SETS = {"1pct": "imagenet2012_subset/1pct", "10pct": "imagenet2012_subset/10pct"}


def get_config(arg="v2_10pct"):
  protocol, *options = arg.split("-")
  tap, name, base_lr, lr_scaling, weight_decay, batch_size, epochs = PROTOCOLS[protocol]
  possible = {"supervised": ("1pct", "10pct", "4x", "500ep", "1000ep", "color", "color_blur")}.get(
    protocol, ("wide",) * protocol.startswith("v2")
  )
  if set(options) - set(possible):
    raise ValueError(f"after {protocol} expected {', '.join(possible) or 'nothing'}, not {'-'.join(options)}")
  if "wide" in options:
    base_lr = 0.002
  epochs = next((float(option.removesuffix("ep")) for option in options if option.endswith("ep")), epochs)
  color = dict(color_strength=1.0, blur="color_blur" in options) if {"color", "color_blur"} & set(options) else {}
  small = protocol == "small"
  subset = next((option for option in options if option in SETS), protocol.partition("_")[2])
  train = f"tfds:{SETS.get(subset, 'imagenet2012')}:train"
  return ml_collections.ConfigDict(
    dict(
      program="finetune",
      tap=tap,  # layer of the projection head to classify from: 0 is h
      data=dict(
        train="fashion:train" if small else train,
        test="fashion:test" if small else "tfds:imagenet2012:validation",
      ),
      labels=dict(fraction=0.01 if small else 1.0),
      batch_size=batch_size,
      train_epochs=epochs,
      train_steps=300 if small else 0,
      augment=dict(size=20 if small else 224, crop_area=(0.4, 1.0) if small else (0.08, 1.0), **color),
      # The network to train from scratch; a start brings its own.
      encoder=dict(
        depth=18 if small else 50,
        width=0.25 if small else 4.0 if "4x" in options else 1.0,
        stem="cifar" if small else "imagenet",
        dtype="float32" if small else "bfloat16",
      ),
      optimizer=dict(name=name, base_lr=base_lr, lr_scaling=lr_scaling, weight_decay=weight_decay),
      evaluate=dict(crop=1.0 if small else 0.875),
      checkpoint=dict(every_epochs=0.0 if small else 5.0),
    )
  )
