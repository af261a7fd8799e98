"""The compiler's estimate against programs whose time follows from a chip's data sheet: large products, and plain passes.

  python -m benchmarks.calibration [--topologies=v4:2x2x1,v5e:2x2]     (pip install libtpu, no TPU needed)

A product of bfloat16 matrices cannot take less than its operations at the peak, x + 1 of a large array not less than its
bytes at the full bandwidth.  What the compiler estimates beside these is how far `simclr plan` is from the data sheet, on
the optimistic side where it is below 1.
"""

import argparse
import sys

from simclr_jax.runtime import aot


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topologies", default="v3:2x2,v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2")
  args = parser.parse_args()
  try:
    aot.prepare()
  except ValueError as error:
    sys.exit(str(error))
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  print("| chip | program | data sheet, ms | estimated, ms | ratio |\n|---|---|---|---|---|")
  for name in args.topologies.split(","):
    chip, devices = aot.topology(name)
    place = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

    def estimate(fn, *shapes, place=place, chip=chip):
      arguments = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes)
      return 1e3 * aot.Schedule(jax.jit(fn).lower(*arguments).compile().as_text()).cycles / chip.clock

    def row(title, sheet, estimated, name=name):
      generation = name.partition(":")[0]
      print(f"| {generation} | {title} | {sheet:.3f} | {estimated:.3f} | {estimated / sheet:.2f} |", flush=True)

    for n in (2048, 8192):
      sheet = 1e3 * 2 * n**3 / (chip.flops / chip.devices)
      row(f"product of {n:,} x {n:,} matrices", sheet, estimate(jnp.matmul, (n, n), (n, n)))
    n = 2**28
    sheet = 1e3 * 4 * n / (chip.hbm_bandwidth / chip.devices)
    row("x + 1 of 268 M numbers", sheet, estimate(lambda x: x + 1, (n // 1024, 1024)))


if __name__ == "__main__":
  main()
