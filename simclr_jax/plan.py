"""Before a pod is booked: does a recipe fit, how fast would it be, what must the hosts deliver, what does it cost?

The real train step of the recipe is compiled for the pod (runtime/aot.py) and read.
"""

import json
import math

import ml_collections

from simclr_jax import model as model_lib
from simclr_jax import optimizer, pretrain
from simclr_jax.runtime import aot, data, metrics
from simclr_jax.runtime import config as config_lib
from simclr_jax.runtime import mesh as mesh_lib

# Of data sets that are planned for before they are at hand: images, classes.
KNOWN = {"tfds:imagenet2012:train": (1_281_167, 1000), "tfds:cifar10:train": (50_000, 10)}
# What makes a step smaller, in the order of what it costs; each is tried on top of the recipe.
CURES = (
  {"zero1": True},
  {"encoder.remat": "block"},
  {"encoder.remat": "block", "zero1": True},
  {"encoder.remat": "group", "zero1": True},
)


def size_of(config) -> tuple[int, int]:
  """(images, classes) of the training set: of the one at hand, or of a known one.

  Raises:
    ValueError: neither.
  """
  try:
    source = data.open_source(config.data.train, data_dir=config.data.data_dir or None)
    return len(source), source.num_classes
  except ValueError as error:
    if config.data.train in KNOWN:
      return KNOWN[config.data.train]
    raise ValueError(f"{error}; or give --num_examples and --num_classes") from None


def measure(config, topology: str, num_examples: int, num_classes: int) -> dict:
  """What the compiled step of a config says of itself on a pod, see aot.measure, and what follows from it for the run.

  Raises:
    aot.DoesNotFit; ValueError: no such pod, or the batch cannot be split over it.
  """
  chip, devices = aot.topology(topology)
  mesh = mesh_lib.make_mesh(devices)
  mesh_lib.check_divisible(config.batch_size, mesh)
  step, arguments = pretrain.abstract_step(config, mesh, num_examples=num_examples, num_classes=num_classes)
  row = {"topology": topology, "batch_size": config.batch_size}
  row["parameters"] = {name: model_lib.count(tree) for name, tree in arguments[0].params.items()}
  row |= aot.measure(step, arguments, chip=chip, devices=mesh.size)
  steps = optimizer.train_steps(config, num_examples)
  row["steps"] = steps
  row["hours"] = steps * row["step_seconds"] / 3600
  row["chip_hours"] = row["hours"] * row["chips"]
  row["images_per_second_per_chip"] = config.batch_size / row["step_seconds"] / row["chips"]
  row["mfu"] = row["matmul_seconds"] / row["step_seconds"]
  row["hosts"] = math.ceil(row["chips"] / chip.per_host)
  row["images_per_second_per_host"] = config.batch_size / row["step_seconds"] / row["hosts"]
  row["host_vcpus"] = chip.host_vcpus
  return row


def plan(config, topology: str, num_examples: int, num_classes: int, note=print) -> dict:
  """`measure`, of the config as it is or with the first of CURES that makes it fit, named in `changes`."""
  refused = None
  for changes in ({}, *CURES):
    if changes and all(config_lib.flatten(config).get(key) == value for key, value in changes.items()):
      continue
    try:
      return {
        "changes": changes,
        "refused": refused,
        **measure(_with(config, changes), topology, num_examples, num_classes),
      }
    except aot.DoesNotFit as error:
      refused = refused or (f"needs {error.needed / aot.GIB:.1f} GiB" if error.needed else str(error)[:120])
      note(f"{topology}: does not fit with {_text(changes) or 'the recipe as it is'}")
  return {"topology": topology, "batch_size": config.batch_size, "refused": refused, "changes": None}


def _with(config, changes):
  copy = ml_collections.ConfigDict(config)
  with copy.unlocked():
    copy.update_from_flattened_dict(changes)
  return config_lib.check(copy)


def _text(changes):
  return " ".join(f"--config.{key}={value}" for key, value in (changes or {}).items())


def table(row: dict) -> str:
  """A plan for a person."""
  if row["changes"] is None:
    return f"{row['topology']}: does not fit ({row['refused']}), nor with any of {'; '.join(map(_text, CURES))}: take a smaller batch"
  mib, gib = 2**20, aot.GIB
  lines = [
    ("pod", f"{row['topology']}: {row['chips']} chips, {row['hosts']} hosts; batch {row['batch_size']:,}"),
    ("parameters", ", ".join(f"{name} {count:,}" for name, count in row["parameters"].items())),
    (
      "memory",
      f"{row['peak_bytes'] / gib:.2f} of {row['hbm_bytes'] / gib:.1f} GiB a device: state and batch "
      f"{row['arguments_bytes'] / mib:,.0f} MiB, temporaries {row['temporaries_bytes'] / mib:,.0f} MiB",
    ),
    (
      "step",
      f"{1e3 * row['step_seconds']:.1f} ms by the compiler's estimate; at best {1e3 * row['memory_seconds']:.1f} ms by "
      f"memory traffic ({row['bytes_accessed'] / 1e9:.1f} GB), {1e3 * row['matmul_seconds']:.1f} ms by arithmetic "
      f"({row['flops'] / 1e12:.2f} TFLOP a device)",
    ),
    ("speed", f"{row['images_per_second_per_chip']:,.0f} images/s a chip, MFU {100 * row['mfu']:.0f} %"),
    (
      "collectives",
      "; ".join(
        f"{c['count']} {kind}, {c['bytes'] / mib:,.1f} MiB"
        + (f", {c['image_sized']} OF THEM AS LARGE AS IMAGES" if c["image_sized"] else "")
        for kind, c in row["collectives"].items()
      )
      or "none",
    ),
    (
      "hosts",
      f"{row['images_per_second_per_host']:,.0f} images/s each, "
      f"{row['images_per_second_per_host'] / row['host_vcpus']:.1f} on each of {row['host_vcpus']} vCPUs",
    ),
    (
      "run",
      f"{row['steps']:,} steps, {metrics.duration(3600 * row['hours'])} of steps, {row['chip_hours']:,.1f} chip-hours, "
      "without evaluation and checkpoints",
    ),
  ]
  if row["refused"]:
    lines.insert(1, ("fits with", f"{_text(row['changes'])} (as it is, it {row['refused']})"))
  return "\n".join(f"{name:12}{value}" for name, value in lines)


def run(config, topologies, *, num_examples: int = 0, num_classes: int = 0, as_json: bool = False) -> list[dict]:
  """The program `simclr plan`: prints a plan for every topology, one below the other, or all as JSON."""
  if not num_examples:
    num_examples, num_classes = size_of(config)
  rows = []
  for name in topologies:
    aot.topology(name)  # a wrong name is said before minutes of compiling
  for name in topologies:
    rows.append(plan(config, name, num_examples, num_classes, note=(lambda _: None) if as_json else print))
    if not as_json:
      print(table(rows[-1]), end="\n\n", flush=True)
  if as_json:
    print(json.dumps(rows, indent=2))
  return rows
