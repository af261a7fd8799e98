"""NT-Xent with the whole matrix against NT-Xent in tiles: memory and time of loss, gradient and metrics.

  python -m benchmarks.contrast [--batches=512,1024,2048,4096,8192] [--rounds=5] [--figure=contrast.png]
  python -m benchmarks.contrast --tpu [--topologies=v4:4x4x8,v5e:16x16] [--batches=4096,32768,262144,1048576]

On this CPU, cut into 8 virtual devices: both forms are compiled, then take turns; memory is what the compiled program
says of its temporaries on one device, time the processor time of the process, a ratio the median over rounds.
With --tpu (pip install libtpu, no TPU needed) both are compiled ahead of time for a pod: time is the sum of the
compiler's own estimated cycles, loop bodies times their trips, over the clock: an estimate, not a run.  It counts no
communication; whether a hop of the ring has computation between its start and its end is read from the schedule.
The physical limit is 3 products of 2 (2B)^2 d operations, halved for symmetry, at the peak rate.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import time

DIM = 128
TEMPERATURE = 0.1
FORMS = ("dense", "tiled")
# Peak bfloat16 operations a second and clock in Hz, of one chip, from Google Cloud's system descriptions.
CHIPS = {"v4": (275e12, 1.05e9), "v5e": (197e12, 1.5e9)}


def limit_seconds(batch, operations_per_second):
  return 3 * (2 * (2 * batch) ** 2 * DIM / 2) / operations_per_second


def program(form, batch, mesh, *, metrics=True, precision="highest"):
  """(the jitted step of z, z's shape and sharding)."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import contrast

  def loss(z):
    if form == "dense":
      return contrast.nt_xent(z, TEMPERATURE, precision=precision)
    return contrast.nt_xent_tiled(z, TEMPERATURE, mesh=mesh, precision=precision)

  def step(z):
    if metrics:
      return jax.value_and_grad(loss, has_aux=True)(z)
    return jax.value_and_grad(lambda z: loss(z)[0])(z)

  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  return jax.jit(step), jax.ShapeDtypeStruct((batch, 2, DIM), jnp.float32, sharding=sharding)


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


# ---------------------------------------------------------------------------------------------- this CPU


def measure_cpu(batches, rounds, largest_dense, devices):
  import jax
  import numpy as np

  mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = []
  for batch in batches:
    forms = [f for f in FORMS if f == "tiled" or batch <= largest_dense]
    steps, z = {}, None
    for form in forms:
      step, shape = program(form, batch, mesh)
      steps[form] = step.lower(shape).compile()
      if z is None:
        z = np.random.default_rng(0).normal(size=shape.shape).astype(np.float32)
        z = jax.device_put(z, shape.sharding)
    warm_up = batch <= 8192  # a step of a larger batch takes so long that its first is as good as any
    seconds = {form: [] for form in forms}
    losses = {}
    for _ in range(rounds + 1 if warm_up else 1):
      for form, step in steps.items():
        start = time.process_time()
        (loss, _), _ = jax.block_until_ready(step(z))
        seconds[form].append(time.process_time() - start)
        losses[form] = float(loss)
    for form in forms:
      taken = seconds[form][1:] if warm_up else seconds[form]
      row = {"where": f"CPU, {devices} devices", "batch": batch, "form": form, "loss": losses[form]}
      row |= {"temporaries_mib": temporaries(steps[form]), "seconds": statistics.median(taken)}
      if len(forms) == 2:
        dense = seconds["dense"][1:] if warm_up else seconds["dense"]
        row["of_dense"] = statistics.median(t / d for t, d in zip(taken, dense, strict=True))
      rows.append(row)
      print(line(row), flush=True)
  return rows


def cpu_rate():
  """float32 operations per second of processor time in one large product, the CPU's stand-in for a peak."""
  import jax
  import jax.numpy as jnp

  a = jnp.ones((2048, 2048))
  dot = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
  dot(a).block_until_ready()
  times = []
  for _ in range(5):
    start = time.process_time()
    dot(a).block_until_ready()
    times.append(time.process_time() - start)
  return 2 * 2048**3 / min(times)


# ------------------------------------------------------------------------------------- a pod, ahead of time


def computations(hlo):
  """{name: lines} of a scheduled HLO module; "ENTRY" too."""
  result, name = {}, None
  for text in hlo.splitlines():
    start = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", text)
    if start:
      name = start[2]
      result[name] = []
      if start[1]:
        result["ENTRY"] = result[name]
    elif text == "}":
      name = None
    elif name:
      result[name].append(text)
  return result


class Schedule:
  """What a compiled TPU program says of itself."""

  def __init__(self, hlo):
    self.computations = computations(hlo)
    self.gathers = len(re.findall(r" (?:all-gather|all-gather-start|all-to-all)\(", hlo))
    self.hops, self.overlaps = 0, []  # in loops: hops, and of the asynchronous ones (bytes, cycles they overlap with)
    self.cycles = self._cycles("ENTRY", in_loop=False)

  def _cycles(self, name, in_loop):
    total, started = 0, {}
    for text in self.computations[name]:
      cost = re.search(r'"estimated_cycles":"(\d+)"', text)
      total += int(cost[1]) if cost else 0
      loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", text)
      if loop:
        # Every loop here counts from 0 to the one constant in its condition.
        (trips,) = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(self.computations[loop[1]]))
        total += int(trips) * self._cycles(loop[2], in_loop=True)
      if not in_loop:
        continue
      hop = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) (collective-permute(?:-start|-done)?)\((?:%([\w.\-]+))?", text)
      if hop and hop[3] == "collective-permute-done":
        dtype, dims = re.match(r"(\w+)\[([\d,]*)\]", hop[2]).groups()
        size = math.prod(int(k) for k in dims.split(",")) * {"bf16": 2, "f32": 4}[dtype]
        self.overlaps.append((size, total - started[hop[4]]))
      elif hop:
        self.hops += 1
        started[hop[1]] = total
    return total


def compile_tpu(topologies, batches, forms, metrics, precision):
  import jax
  import numpy as np
  from jax.experimental import topologies as jax_topologies

  rows = []
  for name in topologies:
    peak, clock = CHIPS[name.split(":")[0]]
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}  # a device is a chip
    chips = jax_topologies.get_topology_desc(name, platform="tpu", **options).devices
    mesh = jax.sharding.Mesh(np.array(chips), ("data",))
    for batch in batches:
      for form in forms:
        step, shape = program(form, batch, mesh, metrics=metrics, precision=precision)
        row = {"where": name, "chips": len(chips), "batch": batch, "form": form, "metrics": metrics}
        row["limit_seconds"] = limit_seconds(batch, peak * len(chips))
        try:
          compiled = step.lower(shape).compile()
        except jax.errors.JaxRuntimeError as error:
          needed = re.search(r"HLO temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", str(error))
          row["refused"] = f"needs {needed[1] or needed[2]} GiB" if needed else str(error).splitlines()[0][:100]
        else:
          schedule = Schedule(compiled.as_text())
          row |= {"temporaries_mib": temporaries(compiled), "seconds": schedule.cycles / clock}
          row |= {"gathers": schedule.gathers, "hops_in_loops": schedule.hops}
          row["hops_overlapped"] = sum(cycles > 0 for _, cycles in schedule.overlaps)
          if schedule.overlaps:  # the hop that has the least computation for its size
            size, cycles = min(schedule.overlaps, key=lambda hop: hop[1] / hop[0] if hop[0] > 2**18 else math.inf)
            row |= {"hop_mib": size / 2**20, "hop_overlap_us": cycles / clock * 1e6}
          if rows and rows[-1]["form"] == "dense" and rows[-1]["batch"] == batch and "seconds" in rows[-1]:
            row["of_dense"] = row["seconds"] / rows[-1]["seconds"]
        rows.append(row)
        print(line(row), flush=True)
  return rows


# --------------------------------------------------------------------------------------------- both


def line(row):
  text = f"{row['where']:>16} B={row['batch']:<8} {row['form']:<6}"
  if "refused" in row:
    return f"{text} does not compile: {row['refused']}"
  text += f" {row['temporaries_mib']:>10.2f} MiB {row['seconds'] * 1e3:>11.3f} ms"
  if "limit_seconds" in row:
    text += f" = {row['seconds'] / row['limit_seconds']:.2f} x limit"
  if row["form"] == "tiled" and "of_dense" in row:
    text += f"  {row['of_dense']:.2f} x dense"
  if row["form"] == "tiled" and "gathers" in row:
    text += f"  {row['gathers']} gathers, {row['hops_overlapped']}/{row['hops_in_loops']} hops overlap"
    text += f", {row['hop_mib']:.2f} MiB with {row['hop_overlap_us']:.0f} us" if "hop_mib" in row else ""
  return text


def draw(rows, path, rate=None):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  places = list(dict.fromkeys(row["where"] for row in rows))
  figure, axes = plt.subplots(2, len(places), figsize=(4.5 * len(places), 7), squeeze=False, sharex="col")
  for column, place in enumerate(places):
    memory, duration = axes[:, column]
    for form, style in (("dense", "o--"), ("tiled", "s-")):
      found = [r for r in rows if r["where"] == place and r["form"] == form and "seconds" in r]
      batches = [r["batch"] for r in found]
      memory.loglog(batches, [r["temporaries_mib"] for r in found], style, label=form)
      duration.loglog(batches, [r["seconds"] * 1e3 for r in found], style, label=form)
    every = sorted({r["batch"] for r in rows if r["where"] == place})
    limits = {r["batch"]: r["limit_seconds"] for r in rows if r["where"] == place and "limit_seconds" in r}
    if rate:
      limits = {b: limit_seconds(b, rate) for b in every}
    duration.loglog(every, [limits[b] * 1e3 for b in every], "k:", label="3 products / 2 at peak")
    memory.loglog(every, [b * 2 * DIM * 4 / 2**20 / _devices(rows, place) for b in every], "k:", label="z itself")
    memory.set_title(place)
    memory.set_ylabel("temporaries a device, MiB")
    duration.set_ylabel("processor time, ms" if rate else "compiler's estimate, ms")
    duration.set_xlabel("images in the global batch")
    memory.legend()
    duration.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  print(f"figure: {path}")


def _devices(rows, place):
  return next(r.get("chips", 8) for r in rows if r["where"] == place)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  split = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
  parser.add_argument("--tpu", action="store_true", help="compile for pods instead of running on this CPU")
  parser.add_argument("--batches", type=split(int), help="global batches, in images")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--largest_dense", type=int, default=8192, help="largest batch run in the dense form on the CPU")
  parser.add_argument("--topologies", type=split(str), default=["v4:4x4x8", "v5e:16x16"])
  parser.add_argument("--forms", type=split(str), default=list(FORMS))
  parser.add_argument("--no_metrics", action="store_true", help="with --tpu: loss and gradient only")
  parser.add_argument("--precision", default="default", help="with --tpu: of the products")
  parser.add_argument("--figure", help="write a PNG here")
  parser.add_argument("--json", action="store_true", help="print the rows as JSON in the last line")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  if args.tpu:
    if importlib.util.find_spec("libtpu") is None:
      sys.exit("--tpu needs the TPU compiler: pip install libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    batches = args.batches or [4096, 32768, 262144, 1048576]
    rows = compile_tpu(args.topologies, batches, args.forms, not args.no_metrics, args.precision)
    rate = None
  else:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    rows = measure_cpu(args.batches or [512, 1024, 2048, 4096, 8192], args.rounds, args.largest_dense, 8)
    rate = cpu_rate() if args.figure else None
  if args.figure:
    draw(rows, args.figure, rate)
  if args.json:
    print(json.dumps(rows))


if __name__ == "__main__":
  main()
