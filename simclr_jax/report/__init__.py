"""Presentation of a run, a map and a comparison of runs: pages, pictures, charts, and tables for a terminal.

It takes numpy arrays and plain Python data, knows nothing about networks or losses, and computes no results. A page is one
self-contained HTML file: style.css and the scripts are inside it. A file appears completely or not at all.

Scores and fractions (`knn`, `contrastive_accuracy`, `data_wait`, …) are in [0, 1] and shown in percent.
"""

from simclr_jax.report.charts import accuracy_against_labels_svg, step_times_svg
from simclr_jax.report.map import map_png, thumbnail_side
from simclr_jax.report.pages import SPECTRUM, write_claims, write_map, write_report, write_runs
from simclr_jax.report.pictures import neighbors_png, view_pairs_png
from simclr_jax.report.tables import Link, aligned, score_table

__all__ = [
  "SPECTRUM",
  "Link",
  "accuracy_against_labels_svg",
  "aligned",
  "map_png",
  "neighbors_png",
  "score_table",
  "step_times_svg",
  "thumbnail_side",
  "view_pairs_png",
  "write_claims",
  "write_map",
  "write_report",
  "write_runs",
]
