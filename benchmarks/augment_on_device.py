"""What the device's half of the augmentation costs, compiled ahead of time for TPUs: cycles beside a ResNet-50's step.

  python -m benchmarks.augment_on_device [--topologies=v4:2x2x1,v5e:2x2] [--step]     (pip install libtpu, no TPU needed)

Every program is compiled for all devices of the topology with 32 images, 64 views of 224 pixels, on each; its cost is
the sum of the compiler's own estimated cycles: an estimate, not a run.  The step, forward and backward of a ResNet-50
with its head on 64 views, takes minutes to compile: without --step its figures are those of an earlier call.
"""

import argparse
import functools
import json
import sys

from simclr_jax.runtime import aot

IMAGES = 32  # on one device
SIZE = 224
STEP = {"v4": 973_145, "v5e": 884_744}  # cycles a view of forward and backward


def programs(canvas):
  """{name: (function, shapes and dtypes of its arguments but for the leading axis)}; all return bfloat16 views."""
  import jax.numpy as jnp

  from simclr_jax import augment_on_device as device

  crops, whole = ((2, SIZE, SIZE, 3), jnp.uint8), ((canvas, canvas, 3), jnp.uint8)
  seed, extent = ((2,), jnp.int32), ((2,), jnp.int32)

  def views(fn):
    return lambda *x: fn(*x).astype(jnp.bfloat16)

  def blur_alone(x, seed):
    x = x.reshape(-1, *x.shape[2:]).astype(jnp.float32) / 255
    _, sigma = device.sample_blur(device.view_keys(seed, "blur"))
    return device.gaussian_blur(x, kernel_size=SIZE // 10, sigma=sigma, precision="default")

  color = functools.partial(device.color_and_blur, blur=False)
  fixed = functools.partial(device.color_and_blur, color_order="fixed")
  precise = functools.partial(device.color_and_blur, precision="highest")
  return {
    "cast alone": (views(lambda x: x.astype(jnp.float32) / 255), [crops]),
    "color, any order": (views(color), [crops, seed]),
    "blur alone, banded matmul": (views(blur_alone), [crops, seed]),
    "color and blur (where=device)": (views(device.color_and_blur), [crops, seed]),
    "color in fixed order and blur": (views(fixed), [crops, seed]),
    "color and blur, float32 products": (views(precise), [crops, seed]),
    f"crop from {canvas} x {canvas}": (
      views(functools.partial(device.random_crops, size=SIZE)),
      [whole, extent, seed],
    ),
    f"crop, color, blur from {canvas} (where=device_crop)": (
      views(functools.partial(device.two_views, size=SIZE)),
      [whole, extent, seed],
    ),
  }


def step_program():
  """Forward and backward of a ResNet-50 with its head and NT-Xent on bfloat16 views."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import contrast
  from simclr_jax import model as model_lib
  from simclr_jax.programs import config as config_lib

  config = config_lib.load("configs/v1.py")
  model = model_lib.create(config, 0)
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 2, SIZE, SIZE, 3))
  )

  def step(variables, views):
    def loss(params):
      (_, z, _), new = model.apply({**variables, "params": params}, views, train=True, mutable=["batch_stats"])
      return contrast.nt_xent(z, 0.1)[0], new

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  return step, variables, ((2, SIZE, SIZE, 3), jnp.bfloat16)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topologies", default="v4:2x2x1,v5e:2x2")
  parser.add_argument("--canvas", type=int, default=512)
  parser.add_argument("--step", action="store_true", help="compile the ResNet-50 step too")
  parser.add_argument("--only", default="", help="programs whose name contains this")
  parser.add_argument("--json", action="store_true", help="print the rows as JSON in the last line")
  args = parser.parse_args()
  try:
    aot.prepare()
  except ValueError as error:
    sys.exit(str(error))
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  rows = []
  for name in args.topologies.split(","):
    chips = topologies.get_topology_desc(name, platform="tpu").devices
    mesh = Mesh(np.array(chips), ("data",))
    split, copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def batch(spec, split=split, n=IMAGES * mesh.size):  # noqa: B008
      return jax.ShapeDtypeStruct((n, *spec[0]), spec[1], sharding=split)

    def cycles(fn, *arguments):
      return aot.Schedule(jax.jit(fn).lower(*arguments).compile().as_text()).cycles / (2 * IMAGES)

    step = STEP[name.split(":")[0]]
    if args.step:
      fn, variables, views = step_program()
      variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copied), variables)  # noqa: B023
      step = cycles(fn, variables, batch(views))
    print(f"{name}: the step {step:,.0f} cycles a view{'' if args.step else ' (earlier call)'}", flush=True)
    for title, (fn, specs) in programs(args.canvas).items():
      if args.only not in title:
        continue
      cost = cycles(fn, *(batch(spec) for spec in specs))
      rows.append({"topology": name, "program": title, "cycles": cost, "fraction": cost / step})
      print(f"  {title:56}{cost:>12,.0f}{cost / step:>8.2%}", flush=True)
  if args.json:
    print(json.dumps(rows))


if __name__ == "__main__":
  main()
