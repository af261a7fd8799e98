"""Training speed on a CPU: our encoder against a plain torch one, forward, backward and SGD.

  python -m venv /tmp/torchvenv && /tmp/torchvenv/bin/pip install jax flax optax torch   # CPU wheels
  /tmp/torchvenv/bin/python -m benchmarks.cpu_step [--rounds=5] [--views=256] [--size=32]

Both are ResNet-18 with the CIFAR stem and the official code's projected shortcut in every group: the same
multiplications.  Variants take turns, one step each, so that load from elsewhere hits them alike; a ratio is the median
over turns of (torch float32's time / the variant's time in the same turn).  torch runs in channels_last, bfloat16 as
autocast; ours as `simclr` runs on a CPU, with the XLA flag that runtime/cpu.py sets.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from simclr_jax.runtime import cpu

flags_line = cpu.prepare()  # before jax starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from simclr_jax.encoder import resnet  # noqa: E402

LEARNING_RATE = 1e-3


class TorchBlock(torch.nn.Module):
  """The basic residual block."""

  def __init__(self, channels, filters, stride, project):
    super().__init__()
    self.conv1 = torch.nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
    self.norm1 = torch.nn.BatchNorm2d(filters)
    self.conv2 = torch.nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
    self.norm2 = torch.nn.BatchNorm2d(filters)
    self.shortcut = torch.nn.Identity()
    if project:
      self.shortcut = torch.nn.Sequential(
        torch.nn.Conv2d(channels, filters, 1, stride, bias=False), torch.nn.BatchNorm2d(filters)
      )

  def forward(self, x):
    y = torch.relu(self.norm1(self.conv1(x)))
    return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def torch_resnet18():
  """ResNet-18 with the CIFAR stem: [n, 3, h, w] -> [n, 512]."""
  layers = [torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU()]
  channels = 64
  for filters, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
    layers += [TorchBlock(channels, filters, stride, True), TorchBlock(filters, filters, 1, False)]
    channels = filters
  return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def torch_step(images, bfloat16):
  """A function that does one training step and returns when it is done."""
  model = torch_resnet18().to(memory_format=torch.channels_last)
  sgd = torch.optim.SGD(model.parameters(), LEARNING_RATE)
  x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

  def step():
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
      h = model(x)
    loss = h.float().square().mean()
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    return loss.item()

  return step


def our_step(images, dtype):
  """A function that does one training step and returns when it is done."""
  model = resnet(18, stem="cifar", dtype=dtype)
  x = jnp.asarray(images)
  variables = jax.jit(model.init)(jax.random.key(0), x[:1])

  @jax.jit
  def update(params, batch_stats):
    def loss_fn(params):
      h, new = model.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
      )
      return jnp.mean(jnp.square(h)), new["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients), batch_stats, loss

  state = [variables["params"], variables["batch_stats"]]

  def step():
    *state[:], loss = update(*state)
    jax.block_until_ready(state)
    return float(loss)

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--views", type=int, default=256)
  parser.add_argument("--size", type=int, default=32)
  args = parser.parse_args()

  images = np.random.default_rng(0).random((args.views, args.size, args.size, 3), np.float32)
  variants = {
    "torch float32": torch_step(images, False),
    "torch bfloat16": torch_step(images, True),
    "simclr_jax float32": our_step(images, "float32"),
    "simclr_jax bfloat16": our_step(images, "bfloat16"),
  }
  print(flags_line or f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}")
  print(f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores, {args.rounds} rounds")
  times = {name: [] for name in variants}
  for step in variants.values():
    step()  # compiles
  for _ in range(args.rounds):
    for name, step in variants.items():
      start = time.perf_counter()
      step()
      times[name].append(time.perf_counter() - start)
  print(f"{'':20}{'views/s':>9}{'x torch float32':>17}   (smallest to largest)")
  for name, seconds in times.items():
    ratios = sorted(base / s for base, s in zip(times["torch float32"], seconds, strict=True))
    speed = args.views / statistics.median(seconds)
    print(f"{name:20}{speed:9.1f}{statistics.median(ratios):17.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
  main()
