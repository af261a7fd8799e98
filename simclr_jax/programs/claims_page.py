"""docs/claims.md, from the list of claims and, where runs of `simclr claims` are named, from their claims.json.

python -m simclr_jax.programs.claims_page benchmarks/claims/* > docs/claims.md

A file remarks.md beside claims.json, if there is one, follows the results.
"""

import json
import sys

from simclr_jax.programs import claims, experiments
from simclr_jax.runtime import files

REMARKS = "remarks.md"
HEADER = """# The claims about SimCLR, measured

`simclr claims` tests on your machine what the papers claim about SimCLR. It trains small runs with three seeds and reports a
95 % interval of each difference and a verdict.

    simclr claims --plan                                  # lists the runs and how long they will take; runs nothing
    simclr claims --workdir=runs/claims                   # textures, which is in the package
    simclr claims --data=npz:cifar10.npz --data=fashion   # NAME:train and NAME:test of each
    simclr claims --data=folder:photos                    # photos/train/CLASS/ and photos/test/CLASS/
    simclr claims --budget=full --workdir=runs/full       # more claims and more data sets
    simclr claims --budget=methods --workdir=runs/methods # SimCLR next to MoCo, BYOL, InstDisc, SupCon and an autoencoder

The command can be killed at any moment; started again, it resumes. A finished run is recorded in `claims.json` at once and
is not repeated. Several such commands with one workdir divide the runs among themselves. The results are `claims.html`, a
table in the terminal, and `claims.json`. The page also draws alignment, uniformity and effective rank of h and z through
training, and their spectra, for SimCLR and for training without negatives. Each command overwrites the page in its folder,
so give each budget a folder of its own. A file under another name counts as another data set.

![The top of claims.html: each claim with the interval of the difference and its verdict](claims.png)

- **Runs.** Each is a row of `configs/ablations.py` at its small scale: a ResNet-18 of an eighth of the width, views of 16
  pixels, AdamW. Training takes 8 epochs of 5,000 images (`quick`), 10,000 (`full`) or 20,000 (`methods`), of which a tenth is
  held out; a claim about longer or shorter training says how much, pairs of transformations train for half as long, and
  batches of 2,048 for twice as long. Crops take 20 % of the image or more, but 8 % or more where a pair crops once more.
  Colors are distorted at half the paper's strength; on textures half of these views are gray, as in the recipe `textures`,
  where a fifth costs 14 points on held-out training images ([results.md](results.md)). Raw pixels and histograms are read at
  32 pixels. The untrained encoder keeps its initial weights and BatchNorm statistics.
- **Scores** are accuracies of a linear classifier on test images unless noted; of supervised training, the accuracy of the
  classifier that it trained. Where a claim takes the best of several settings, that setting is chosen on held-out training
  images.
- **Intervals** are Student's t intervals over differences between runs with the same seed. With three seeds they are wide. All
  seeds share the same images, so the intervals say nothing about other test images (2,000 images leave a standard error of
  1.1 points in a score near 50 %, 5,000 of 0.7 and 10,000 of 0.5, less in a difference), other networks or other learning
  rates. One in twenty 95 % intervals excludes zero by chance.
- **Verdicts.** *Supported*: the whole interval agrees with the claim. *Contrary*: the whole interval contradicts it. *Not
  supported*: neither. A claim that something does not matter is supported if the whole interval is within 2 points of zero.
  A claim that one pair is better than each of k others is supported if all k intervals agree, and contrary only if an
  interval at the level 1 - 0.05 / k (Bonferroni) contradicts it; the interval shown is that against the strongest rival.
  Where both scores of a difference are at chance the claim was not tested, and *not supported* says nothing about it.
- **The paper's numbers** are for ResNet-50 on ImageNet after 100 to 1,000 epochs; only their direction can be compared with
  the measurements here. The paper predicts transformations with nonlinear classifiers, here they are linear; chance for
  color is 50 % here and 80 % there, and h and z, here 64 and 128 wide, are both 2,048 wide there. A *sanity check* is what
  any useful method must pass; *after* a source means that it suggests the claim, or measured it in another way.
- **Equal compute.** The autoencoder and supervised training see as many views in as many steps as SimCLR. A step of the
  autoencoder takes about twice the arithmetic, because it has a decoder; methods with a moving average pass each view through
  it as well. With fewer labels, supervised training takes as many steps on fewer images.

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
  text = "\n".join(out) + "\n"
  for folder in map(files.absolute, folders):
    text += results(folder.name, json.loads(files.read_text(folder / claims.FILE)))
    if (folder / REMARKS).exists():
      text += "\n" + files.read_text(folder / REMARKS)
  return text


def results(name: str, kept: dict) -> str:
  """The section of results, of a name, of what claims.json holds."""
  sets = list(dict.fromkeys(row["data"] for row in kept["findings"]))
  out = ["", f"## Measured: {name}, on {', '.join(sets)}", "", kept["summary"]]
  for data in sets:
    out += ["", f"### {data}"] if len(sets) > 1 else []
    out += ["", "| claim | paper | here | 95 % interval | verdict |", "|---|---|---|---|---|"]
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
      out += ["", "Accuracy in %, mean (min–max) of the seeds; kNN with k = 20, and linear classifiers:", ""]
      out += [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *lines)]
  return "\n".join(out) + "\n"


if __name__ == "__main__":
  print(page(*sys.argv[1:]), end="")
