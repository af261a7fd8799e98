"""Maps in the plane of the test images of a t-SimCNE run: kNN accuracy (k = 15) and silhouette of the classes.

  python -m benchmarks.maps --workdir=runs/tsimcne --output=benchmarks/maps.json [--images=10000]

t-SimCNE is the run's own network; PCA, t-SNE (scikit-learn) and InfoNC-t-SNE (`simclr map`) are of the h of the same encoder.
Every image is classified by its 15 nearest other images; no map has seen a label.
"""

import argparse
import json
import pathlib

import numpy as np
from sklearn.manifold import TSNE

from simclr_jax import data
from simclr_jax.evaluation import embed, maps
from simclr_jax.programs import trained


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--images", type=int, default=10_000)
  args = parser.parse_args()
  run = trained.TrainedRun(args.workdir)
  chosen = np.sort(data.permutation(0, 0, len(run.test_source))[: args.images])
  part = embed.eval_set(data.Selection(run.test_source, chosen), run.config, run.mesh)
  h, labels = run.encode(part), part.labels()
  near = maps.neighbors(h)
  planar = {
    "t-SimCNE": run.on_the_map(h),
    "InfoNC-t-SNE of h": maps.infonc_tsne(h, near, seed=0),
    "t-SNE of h": TSNE(random_state=0, init="pca").fit_transform(h),
    "PCA of h": maps.pca(h),
  }
  rows = {"h itself": {"knn": maps.accuracy_of_h(near, labels)}}
  for name, xy in planar.items():
    rows[name] = {"knn": maps.accuracy(xy, labels), "silhouette": maps.silhouette(xy, labels)}
  args.output.write_text(json.dumps({"images": len(h), "maps": rows}, indent=1) + "\n")
  print("| map | kNN, % | silhouette |\n|---|---|---|")
  for name, row in rows.items():
    print(f"| {name} | {100 * row['knn']:.1f} | {row['silhouette']:.2f} |" if "silhouette" in row else f"| {name} | {100 * row['knn']:.1f} | |")  # fmt: skip


if __name__ == "__main__":
  main()
