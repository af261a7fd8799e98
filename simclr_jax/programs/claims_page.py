"""docs/claims.md, from the list of claims and, where runs of `simclr claims` are named, from their claims.json.

python -m simclr_jax.programs.claims_page [FOLDER ...] > docs/claims.md
"""

import json
import sys

from simclr_jax.programs import claims, experiments
from simclr_jax.runtime import files

HEADER = """# What is said of SimCLR, measured

`simclr claims` measures on your machine what the papers say of SimCLR: small runs, three seeds, a 95 % interval of each
difference, and a verdict.

    simclr claims --plan                                  # lists the runs and what they will take; runs nothing
    simclr claims --workdir=runs/claims                   # textures, which is in the package
    simclr claims --data=npz:cifar10.npz --data=fashion   # NAME:train and NAME:test of each
    simclr claims --budget=full                           # longer runs, more images, more claims
    simclr claims --budget=methods                        # SimCLR beside MoCo, BYOL, InstDisc, SupCon and an autoencoder

Killed at any moment and given again, the command resumes: a run that has ended is in `claims.json` at once and
is not repeated. The results are `claims.html`, a table in the terminal, and `claims.json`.

- **Runs.** Each is a row of `configs/ablations.py` at its small scale: ResNet-18 of an eighth of the width, views of 16 pixels,
  AdamW. `quick` trains 8 epochs on 5,000 images, `full` 20 on 10,000, `methods` 10 on 20,000. Views of 16 pixels are too small to be blurred, so
  blur in the matrix of pairs changes nothing.
- **Scores** are accuracies of a linear classifier on test images unless said. Where the best of several settings is taken, it
  is the best on held-out training images.
- **Intervals** are Student's t over differences of runs with the same seed. With three seeds they are wide, and they say nothing
  of other data, other networks or other learning rates. Of intervals of 95 %, one in twenty excludes zero by chance.
- **Verdicts.** *Supported*: all of the interval agrees with the claim. *Contrary*: all of it contradicts the claim. *Not
  supported*: neither. That something does not matter is supported where all of the interval is within 2 points of zero.
- **The paper's numbers** are for ResNet-50 on ImageNet after 100 to 1,000 epochs; what a claim shares with them is its
  direction. The paper reads transformations with nonlinear classifiers, and pretrains with rotation, noise or Sobel where it
  reads these; here the readout is linear and pretraining is the same for all.
- **At equal compute.** The autoencoder and supervised training see as many views in as many steps; an autoencoder's step takes
  about twice the arithmetic, for it has a decoder. With fewer labels, supervised training makes as many steps on fewer images.

## The claims
"""


def page(*folders: str) -> str:
  """The page, with the results of the runs of `simclr claims` in `folders`."""
  out = [HEADER, "| claim | in words | source | the paper's difference |", "|---|---|---|---|"]
  for claim in experiments.CLAIMS:
    paper = "" if claim.paper is None else f"{claim.paper:+.1f}"
    out.append(
      f"| {claim.name}{'' if 'quick' in claim.groups else f' ({claim.groups[0]})'} | {claim.says} | {claim.source} | {paper} |"
    )
  return (
    "\n".join(out)
    + "\n"
    + "".join(results(json.loads(files.read_text(files.absolute(folder) / claims.FILE))) for folder in folders)
  )


def results(kept: dict) -> str:
  """The section of results of what claims.json holds."""
  out = ["", "## Measured", "", kept["summary"]]
  for data in dict.fromkeys(row["data"] for row in kept["findings"]):
    out += ["", f"### {data}", "", "| claim | paper | here | 95 % interval | verdict |", "|---|---|---|---|---|"]
    for row in (row for row in kept["findings"] if row["data"] == data):
      digits = 1 if row["unit"] else 3
      here, interval = "", ""
      if row["interval"]:
        mean, low, high = (f"{value:+.{digits}f}" for value in row["interval"])
        here, interval = mean, f"{low} to {high}"
      paper = "" if row["paper"] is None else f"{row['paper']:+.1f}"
      verdict = f"**{row['verdict']}**" if row["verdict"] == "contrary" else row["verdict"]
      out.append(f"| {row['name']} | {paper} | {here} | {interval} | {verdict} |")
    if rows := kept["standings"].get(data):
      heading, *lines = claims.standings_table(rows)
      out += ["", "Accuracy in %, mean (lowest to highest) of the seeds; kNN with k = 20, and linear classifiers:", ""]
      out += [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *lines)]
  return "\n".join(out) + "\n"


if __name__ == "__main__":
  print(page(*sys.argv[1:]), end="")
