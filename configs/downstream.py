"""Pretraining and all downstream tasks on data included in the package: Fashion-MNIST, then textures, with three seeds.

Command:   simclr downstream --config=configs/downstream.py --workdir=runs/downstream
           (--resume resumes it; --config.seeds="(0,)" runs one seed)
Hardware:  two CPU cores; at most 12 minutes per seed
Expected:  accuracy in %, mean (min–max) of the three seeds; settings are not tuned.  Fashion-MNIST, 1 % of the labels:
           fine-tuned 68.5 (67.0 to 69.5), from scratch 62.6 (62.1 to 63.5); 10 %: fine-tuned 76.9 (76.6 to 77.3), from
           scratch 72.2 (71.2 to 73.6), a student of half the width 75.0 (74.5 to 75.8), that student from scratch 62.3
           (61.9 to 62.6).  Linear classifier on textures: h 28.4 (25.8 to 31.6), supervised 22.3, untrained 20.6
Source:    arXiv 2002.05709, section 6; arXiv 2006.10029, Figures 1 and 2 and section 2.3
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      program="downstream",
      seeds=(0, 1, 2),
      pretrain="smoke",
      pretrain_epochs=8.0,
      finetune="finetune:small",
      fractions=(0.01, 0.1),
      distill="distill:small",
      distill_fraction=0.1,  # fraction of the labels on which the teacher was fine-tuned
      transfer="transfer:small",
    )
  )
