"""Everything after pretraining, on data inside the package: Fashion-MNIST, then textures, over three seeds.

Command:   simclr downstream --config=configs/downstream.py --workdir=runs/downstream
           (--resume goes on with it; --config.seeds="(0,)" for one seed)
Hardware:  two CPU cores
Expected:  not measured yet, and the settings are not tuned: it prints a table and leaves a figure
Source:    arXiv 2002.05709, section 6; arXiv 2006.10029, Figures 1 and 2 and section 2.3
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    dict(
      program="downstream",
      seeds=(0, 1, 2),
      pretrain="smoke.py",
      pretrain_epochs=8.0,
      finetune="finetune.py:small",
      shares=(0.01, 0.1),
      distill="distill.py:small",
      distill_share=0.1,  # of the labels, that the teacher was fine-tuned on
      transfer="transfer.py:small",
    )
  )
