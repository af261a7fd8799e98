"""How long training stands still while a checkpoint is written: arrays copied, then written and hashed in the background.

  python -m benchmarks.checkpoints [--millions=28,800] [--rounds=3] [--folder=/tmp]

A state of `--millions` million float32 parameters and as many of momentum (ResNet-50 with its head: 28; ResNet-152 3x with
selective kernels: 800), and the parameters once more as the encoder, in arrays of 4 M.  `stands still` is the time until
`save` returns, during which a loop makes no step; `sealed` the time until the checkpoint is complete, which is how long a
loop would wait that writes in the foreground.
"""

import argparse
import pathlib
import shutil
import tempfile
import time

import jax

from simclr_jax.runtime import checkpoint, cpu

ARRAY = 4  # millions


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--millions", default="28,800")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", default=None, help="on the disk that is measured")
  args = parser.parse_args()
  cpu.prepare()
  print("| million parameters | GB written | stands still | sealed | a step after it |\n|---|---|---|---|---|")
  for millions in map(int, args.millions.split(",")):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
      measure(millions, args.rounds, pathlib.Path(folder))


def measure(millions, rounds, folder):
  def init():
    return {f"{i}": jax.random.normal(jax.random.key(i), (ARRAY * 1000, 1000)) for i in range(millions // ARRAY)}

  state = {"params": init(), "momentum": init()}  # random, for checkpoints are compressed
  step = jax.jit(lambda state: jax.tree.map(lambda x: 0.9 * x, state), donate_argnums=0)
  state = jax.block_until_ready(step(state))
  rows = []
  with checkpoint.Checkpoints(folder, keep=1) as saved:
    for number in range(1, rounds + 1):
      began = time.monotonic()
      saved.save(number, state, {"encoder": state["params"]}, "{}")
      still = time.monotonic() - began
      state = jax.block_until_ready(step(state))
      after = time.monotonic() - began - still
      saved.wait()
      rows.append((still, time.monotonic() - began, after))
      size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
  shutil.rmtree(folder / "checkpoints")
  still, sealed, after = (sorted(row[k] for row in rows)[rounds // 2] for k in range(3))
  print(f"| {millions} | {size:.2f} | {still:.2f} s | {sealed:.1f} s | {after:.2f} s |", flush=True)


if __name__ == "__main__":
  main()
