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
import json
import math
import os
import statistics
import sys
import time

DIM = 128
TEMPERATURE = 0.1
FORMS = ("dense", "tiled")


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


def compile_tpu(topologies, batches, forms, metrics, precision):
  from simclr_jax.runtime import aot
  from simclr_jax.runtime import mesh as mesh_lib

  rows = []
  for name in topologies:
    chip, devices = aot.topology(name)
    mesh = mesh_lib.make_mesh(devices)
    for batch in batches:
      for form in forms:
        step, shape = program(form, batch, mesh, metrics=metrics, precision=precision)
        row = {"where": name, "chips": mesh.size // chip.devices, "batch": batch, "form": form, "metrics": metrics}
        row["limit_seconds"] = limit_seconds(batch, chip.flops * row["chips"])
        try:
          compiled = aot.compile_for(step, shape)
        except aot.DoesNotFit as error:
          row["refused"] = f"needs {error.needed / aot.GIB:.1f} GiB" if error.needed else str(error)[:100]
        else:
          hlo = compiled.as_text()
          schedule, found = aot.Schedule(hlo), aot.collectives(hlo)
          row |= {"temporaries_mib": temporaries(compiled), "seconds": schedule.cycles / chip.clock}
          row["gathers"] = sum(found[kind]["count"] for kind in ("all-gather", "all-to-all") if kind in found)
          row["hops_in_loops"] = schedule.hops
          row["hops_overlapped"] = sum(cycles > 0 for _, cycles in schedule.overlaps)
          if schedule.overlaps:  # the hop that has the least computation for its size
            size, cycles = min(schedule.overlaps, key=lambda hop: hop[1] / hop[0] if hop[0] > 2**18 else math.inf)
            row |= {"hop_mib": size / 2**20, "hop_overlap_us": cycles / chip.clock * 1e6}
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
    from simclr_jax.runtime import aot

    try:
      aot.prepare()
    except ValueError as error:
      sys.exit(f"--tpu: {error}")
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
