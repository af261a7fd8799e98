"""Training speed on a CPU: our encoder against a plain torch one, forward, backward and SGD.

  python -m venv /tmp/torchvenv && /tmp/torchvenv/bin/pip install numpy torch   # a CPU wheel
  python -m benchmarks.cpu_step --torch_python=/tmp/torchvenv/bin/python [--rounds=7] [--views=256] [--size=32]

Both are ResNet-18 with the CIFAR stem and the official code's projected shortcut in every group: the same
multiplications.  torch runs in channels_last, in bfloat16 as autocast; ours as `simclr` does on a CPU, with what
runtime/cpu.py sets, and a third time without that.  Each variant is a process of its own that sleeps between its
turns.  They take turns, one step each, so that load from elsewhere hits them alike; a ratio is the median over rounds
of (torch float32's time / the variant's time in the same round).  The last column is the same ratio of CPU time.  On a
machine that does other things too, use --cores=1 and read that column: with more cores, torch's threads spin while
they wait for one that was interrupted.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

LEARNING_RATE = 1e-3
VARIANTS = ("torch float32", "torch bfloat16", "ours float32", "ours bfloat16", "ours float32, unprepared")


def torch_resnet18():
  """ResNet-18 with the CIFAR stem: [n, 3, h, w] -> [n, 512]."""
  from torch import nn

  class Block(nn.Module):
    def __init__(self, channels, filters, stride, project):
      super().__init__()
      self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
      self.norm1 = nn.BatchNorm2d(filters)
      self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
      self.norm2 = nn.BatchNorm2d(filters)
      self.shortcut = nn.Identity()
      if project:
        convolution = nn.Conv2d(channels, filters, 1, stride, bias=False)
        self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(filters))

    def forward(self, x):
      y = self.norm1(self.conv1(x)).relu()
      return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()

  layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
  channels = 64
  for filters, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
    layers += [Block(channels, filters, stride, True), Block(filters, filters, 1, False)]
    channels = filters
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def torch_step(images, variant):
  """(a function that does one training step and returns when it is done, what it runs on)."""
  import torch

  model = torch_resnet18().to(memory_format=torch.channels_last)
  sgd = torch.optim.SGD(model.parameters(), LEARNING_RATE)
  x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

  def step():
    with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in variant):
      h = model(x)
    loss = h.float().square().mean()
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    return loss.item()

  return step, f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def our_step(images, variant):
  """The same of our encoder."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from simclr_jax.runtime import cpu

  prepared = None if "unprepared" in variant else cpu.prepare()

  import jax
  import jax.numpy as jnp

  from simclr_jax.encoder import resnet

  model = resnet(18, stem="cifar", dtype="bfloat16" if "bfloat16" in variant else "float32")
  x = jnp.asarray(images)
  variables = jax.jit(model.init)(jax.random.key(0), x[:1])

  @jax.jit
  def update(params, batch_stats):
    def loss_fn(params):
      variables = {"params": params, "batch_stats": batch_stats}
      h, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
      return jnp.mean(jnp.square(h)), new["batch_stats"]

    (loss, new), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients), new, loss

  state = [variables["params"], variables["batch_stats"]]

  def step():
    *state[:], loss = update(*state)
    jax.block_until_ready(state)
    return float(loss)

  return step, f"jax {jax.__version__}. {prepared or ''}"


def work(variant, args):
  """In a process of its own: one step, timed, for each line of standard input."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.cores :])
  images = np.random.default_rng(0).random((args.views, args.size, args.size, 3), np.float32)
  build = torch_step if variant.startswith("torch") else our_step
  step, version = build(images, variant)
  step()  # compiles
  step()
  print(version, flush=True)
  for _ in sys.stdin:
    start, cpu_start = time.perf_counter(), time.process_time()
    step()
    print(time.perf_counter() - start, time.process_time() - cpu_start, flush=True)


def measure(args):
  """{variant: [(seconds, CPU seconds) of a step, for each round]}."""
  workers = {}
  for variant in VARIANTS:
    python = args.torch_python if variant.startswith("torch") else sys.executable
    options = [f"--worker={variant}", f"--views={args.views}", f"--size={args.size}", f"--cores={args.cores}"]
    command = [python, "-m", "benchmarks.cpu_step", *options]
    workers[variant] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(f"{variant}: {read(workers[variant])}", flush=True)
  seconds = {variant: [] for variant in VARIANTS}
  for _ in range(args.rounds):
    for variant, worker in workers.items():
      print(file=worker.stdin, flush=True)
      seconds[variant].append(tuple(map(float, read(worker).split())))
  for worker in workers.values():
    worker.communicate()
  return seconds


def read(worker):
  line = worker.stdout.readline()
  if not line:
    raise SystemExit(f"{' '.join(worker.args)} ended early: see its message above")
  return line.strip()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--torch_python", default=sys.executable, help="a Python that has torch")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--views", type=int, default=256)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(args.worker, args)
    return
  seconds = measure(args)
  print(f"\n{platform.processor() or platform.machine()}, {args.cores} cores, {args.rounds} rounds,", end=" ")
  print(f"{args.views} views of {args.size} pixels\n")
  print(f"{'':26}{'views/s':>9}{'x torch float32':>17}{'smallest, largest':>20}{'CPU time':>11}")
  for variant, steps in seconds.items():
    pairs = list(zip(seconds["torch float32"], steps, strict=True))
    wall, cpu = (sorted(base[i] / ours[i] for base, ours in pairs) for i in (0, 1))
    speed = args.views / statistics.median(step[0] for step in steps)
    spread = f"{wall[0]:.2f}, {wall[-1]:.2f}"
    print(f"{variant:26}{speed:9.1f}{statistics.median(wall):17.2f}{spread:>20}{statistics.median(cpu):11.2f}")


if __name__ == "__main__":
  main()
