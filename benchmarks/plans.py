"""`simclr plan` of every ImageNet recipe of the two papers on one pod, kept in docs/plans.json and shown in docs/plans.md.

  python -m benchmarks.plans [--topology=v4:4x4x8] [--only=v2]     (pip install libtpu, no TPU needed)

A recipe takes minutes to compile, the largest an hour on two cores; one whose plan is there already is not compiled again.
Delete a row of docs/plans.json to have it made anew.
"""

import argparse
import json
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent.parent / "docs"
RECIPES = (
  *(f"v1:{width}" for width in ("1x", "2x", "4x")),
  *(f"v2:r{depth}_{width}x_sk{sk}" for depth in (50, 101, 152) for width in (1, 2, 3) for sk in (0, 1)),
)
HEAD = """# Every recipe of the papers on 128 TPU v4 chips

The v1 paper used 128 TPU v3 cores, which are 64 chips, the v2 paper "128 Cloud TPUs"; here the recipes are compiled for a v4
pod slice of 128 chips. **All times are a compiler's estimates; no TPU has run these recipes here.** [scaling.md](scaling.md)
explains the columns, the range, and how far to trust them. All rows use the packed arrangement of the encoder: "as it is"
means the recipe with `encoder.arrangement=packed` and no other change. Hours and chip-hours cover the epochs of the recipe,
without evaluation and checkpoints. `python -m benchmarks.plans` makes this page from `docs/plans.json` and adds missing
recipes, which takes minutes to an hour each.

| recipe | batch | encoder, M | as it is | with | GiB per chip | est. ms per step | range | est. images/s/chip | est. MFU | est. hours | est. chip-hours |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def line(key, row) -> str:
  from simclr_jax.programs import plan

  recipe = f"`{key.split(' ')[0]}`"
  if row["changes"] is None:
    return f"| {recipe} | {row['batch_size']:,} | | {row['refused']} | nothing helps | | | | | | | |"
  changes = ", ".join(f"`{name}={value}`" for name, value in row["changes"].items())
  as_it_is = row["refused"] or "fits"
  if row["changes"] and row["tried"].get(""):
    as_it_is = "fits: {:.0f} ms, {:.1f} GiB".format(*row["tried"][""])
  low, high = (1e3 * seconds for seconds in plan.step_range(row))
  return (
    f"| {recipe} | {row['batch_size']:,} | {row['parameters']['encoder'] / 1e6:.1f} | {as_it_is} "
    f"| {changes} | {row['peak_bytes'] / 2**30:.1f} | {1e3 * row['step_seconds']:.0f} | {low:.0f} to {high:.0f} "
    f"| {row['images_per_second_per_chip']:,.0f} | {100 * row['mfu']:.0f} % | {row['hours']:,.1f} "
    f"| {row['chip_hours']:,.0f} |"
  )


def markdown(rows) -> str:
  return HEAD + "".join(f"{line(key, row)}\n" for key, row in rows.items())


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v4:4x4x8")
  parser.add_argument("--only", default="", help="recipes whose name contains this")
  parser.add_argument("--batch_size", type=int, action="append", default=[], help="default: 4096, and for v1 8192")
  args = parser.parse_args()
  from simclr_jax.runtime import aot, files

  try:
    aot.prepare()
  except ValueError as error:
    sys.exit(str(error))
  from simclr_jax.programs import config, plan

  kept = DOCS / "plans.json"

  def read():
    return json.loads(kept.read_text()) if kept.exists() else {}

  for recipe in RECIPES:
    for batch in args.batch_size or ((4096, 8192) if recipe.startswith("v1") else (4096,)):
      rows = read()
      key = f"{recipe} {batch} {args.topology}"
      if args.only in recipe and key not in rows:
        case = config.load(recipe, [f"--config.batch_size={batch}"])
        row = plan.plan(case, args.topology, *plan.KNOWN[case.data.train])
        rows = {**read(), key: row}  # read again: another process may have added some meanwhile
        order = [f"{r} {b} {args.topology}" for r in RECIPES for b in (4096, 8192)]
        rows = dict(sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order)))
        files.write_text(kept, json.dumps(rows, indent=1))
        files.write_text(DOCS / "plans.md", markdown(rows))
      if key in rows:
        print(line(key, rows[key]), flush=True)


if __name__ == "__main__":
  main()
