"""Planning a pod: does a recipe fit, how fast would it be, what must the hosts deliver, what does it cost?

The real train step of the recipe is compiled for the pod (runtime/aot.py), and the program is analyzed.
"""

import dataclasses
import json
import math

import jax
from clu.parameter_overview import count_parameters

from simclr_jax import contrast, data, optimizer, report
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import distill, finetune, pretrain, splits
from simclr_jax.runtime import aot, files, progress
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

PROGRAMS = {"pretrain": pretrain, "finetune": finetune, "distill": distill}
# Of data sets that are planned for before they are at hand: images, classes.
KNOWN = {
  "tfds:imagenet2012:train": (1_281_167, 1000),
  "tfds:imagenet2012_subset/1pct:train": (12_811, 1000),
  "tfds:imagenet2012_subset/10pct:train": (128_116, 1000),
  "tfds:cifar10:train": (50_000, 10),
}
# What makes a step smaller, in the order of what it costs; each is tried on top of the recipe.
FALLBACKS = (
  {"zero1": True},
  {"encoder.remat": "block,block,none,none"},
  {"encoder.remat": "block"},
  {"encoder.remat": "block", "zero1": True},
  {"encoder.remat": "group", "zero1": True},
)
# Images a second that a core makes of JPEGs of 100 kB at 224 pixels: docs/data.md, which says how it was measured.
PER_CORE = {"host": 221, "device": 484, "device_crop": 690}


def size_of(config) -> tuple[int, int]:
  """(number of images that are trained on, classes) of the training set: of the one at hand, or of a known one.

  Raises:
    ValueError: neither, or the labels that training needs are not there.
  """
  try:
    source = _training_images(config)
  except ValueError as error:
    if config.data.train in KNOWN:
      images, classes = KNOWN[config.data.train]
      return trained_on(config, images, classes), classes
    raise UserError(f"{error}; or give --num_examples and --num_classes") from None
  chosen = finetune.choose(source, config.labels) if config.program == "finetune" else source
  return len(chosen), source.num_classes


def _training_images(config):
  # data.test, which may not be at hand, is not opened: with it, nothing is held out.
  held_out = 0.0 if config.data.test else config.data.held_out
  return splits.open_data(dataclasses.replace(config.data, test="", held_out=held_out))[0]


def trained_on(config, images: int, classes: int) -> int:
  """Number of the images of a set that is not at hand that are trained on."""
  if classes and not config.data.test:
    images -= round(images * config.data.held_out)
  if config.program != "finetune":
    return images
  return len(finetune.listed(config.labels)) if config.labels.list else round(images * config.labels.fraction)


def _resident(config) -> bool:
  """Whether the images stay on the devices."""
  return config.program == "pretrain" and config.augment.where == "resident"


def with_canvas(config):
  """The config with the canvas that its images need where they stay on the devices: they are stored in the size of the largest,
  which is taken to be that of the first.  Of a set that is not at hand it stays as it is.

  Raises:
    ValueError: more images than stay on a device.
  """
  if not _resident(config):
    return config
  try:
    source = _training_images(config)
  except ValueError:
    return config
  canvas = config.augment.canvas
  data.check_fits(source, canvas=canvas)
  side = max(source.array_extent) if source.array_extent else min(canvas, max(data.first_readable(source).shape[:2]))
  return config_lib.replace(config, {"augment.canvas": side})


def measure(config, topology: str, num_examples: int, num_classes: int) -> dict:
  """Properties of the compiled step of a config on a pod, see aot.measure, and what follows from them for the run.

  Raises:
    aot.DoesNotFit; ValueError: no such pod, or the batch cannot be split over it.
  """
  chip, devices = aot.topology(topology)
  mesh = mesh_lib.make_mesh(devices)
  _check_batch(config, mesh)
  source = data.AbstractSource(num_examples, num_classes)
  step, arguments = PROGRAMS[config.program].abstract_step(config, mesh, source)
  row = {"topology": topology, "batch_size": config.batch_size, "settings": settings(config, mesh)}
  row["parameters"] = {name: int(count_parameters(tree)) for name, tree in arguments[0].params.items()}
  row |= aot.measure(step, arguments, chip=chip, devices=mesh.size)
  if _resident(config):
    images = min(3 * num_examples * config.augment.canvas**2, data.MAX_BYTES_IN_MEMORY)
    row |= {key: row[key] + images for key in ("arguments_bytes", "peak_bytes")}
    if row["peak_bytes"] > row["hbm_bytes"]:
      raise aot.DoesNotFit(f"the images take {images / aot.GIB:.1f} GiB of it", row["peak_bytes"])
  steps = optimizer.train_steps(config, num_examples)
  row["steps"] = steps
  row["hours"] = steps * row["step_seconds"] / 3600
  row["chip_hours"] = row["hours"] * row["chips"]
  row["images_per_second_per_chip"] = config.batch_size / row["step_seconds"] / row["chips"]
  row["model_flops"] = model_flops(config, source) / mesh.size
  row["mfu"] = row["matmul_seconds"] * row["model_flops"] / row["flops"] / row["step_seconds"]
  row["hosts"] = math.ceil(row["chips"] / chip.per_host)
  row["images_per_second_per_host"] = (
    0.0 if _resident(config) else config.batch_size / row["step_seconds"] / row["hosts"]
  )
  row["host_vcpus"] = chip.host_vcpus
  per_core = PER_CORE.get(config.augment.where) if config.augment.size == 224 else None
  row["vcpus_needed"] = row["images_per_second_per_host"] / per_core if per_core else None
  return row


def _check_batch(config, mesh):
  """Raises UserError if the batch, or what it is split into, cannot be split over the devices."""
  if config.program == "pretrain":
    pretrain.check_batch(config, mesh)
  else:
    mesh_lib.check_divisible(config.batch_size, mesh)


def settings(config, mesh) -> dict:
  """What the config chooses of the step for its speed and memory."""
  flat = config_lib.flatten(config)
  chosen = {
    "activations": flat["encoder.dtype"],
    **({"arrangement": flat["encoder.arrangement"]} if config.encoder.name == "resnet" else {}),
    "remat": flat["encoder.remat"],
    "zero1": flat.get("zero1", False),
    "microbatches": flat.get("microbatches", 1),
  }
  if config.program == "pretrain" and (config.method, config.loss.name) == ("simclr", "nt_xent"):
    chosen["nt_xent"] = contrast.choose(config.batch_size, mesh.size, mesh.devices.flat[0].platform, config.loss.tile)
  return chosen


def model_flops(config, source) -> float:
  """Operations of a step of the whole batch, without what a pod adds: recomputation, and zeros in packed kernels."""
  once = {"encoder.arrangement": "plain", "encoder.remat": "none", "microbatches": 1}
  flat = config_lib.flatten(config)
  config = config_lib.replace(config, {key: value for key, value in once.items() if key in flat})
  step, arguments = PROGRAMS[config.program].abstract_step(config, mesh_lib.make_mesh(jax.devices("cpu")[:1]), source)
  return step.lower(*arguments).cost_analysis()["flops"]


TIGHT = 0.8  # of a chip's memory: beyond, the compiler has begun to compute things again by itself, at any price


def plan(config, topology: str, num_examples: int, num_classes: int, note=print) -> dict:
  """`measure` of the fastest variant.  It compiles the config in both arrangements of the encoder (see model.ARRANGEMENTS).
  If neither leaves memory to spare, it tries FALLBACKS on the better one until one does.  If none fits, it takes the largest
  half, quarter, ... of the batch that fits with the last of them.

  Returns:
    the row, with `changes` to the config, or None if nothing fits; `refused`, why the recipe does not fit as it is, or
    None; and `tried`, {changes as text: milliseconds a step and GiB, or None where it does not fit}.
  """
  chip, devices = aot.topology(topology)
  hbm = chip.hbm_bytes / chip.devices
  refused, needed, best, tried = None, 0.0, None, {}

  def has_room(changes) -> bool:
    """Whether it fits with memory to spare."""
    nonlocal refused, needed, best
    aot.forget()
    name = changes_text(changes) or "the recipe as it is"
    try:
      row = measure(config_lib.replace(config, changes), topology, num_examples, num_classes)
    except aot.DoesNotFit as error:
      needed = error.needed or 0.0
      tried[changes_text(changes)] = None
      if not changes:
        refused = f"needs {needed / aot.GIB:.1f} GiB" if needed else str(error)[:120]
      note(f"{topology}: does not fit with {name}")
      return False
    tried[changes_text(changes)] = [1e3 * row["step_seconds"], row["peak_bytes"] / aot.GIB]
    if best is None or row["step_seconds"] < best["step_seconds"]:
      best = {**row, "changes": changes}
    room = row["peak_bytes"] < TIGHT * row["hbm_bytes"]
    if not room:
      note(f"{topology}: {name} barely fits, {1e3 * row['step_seconds']:.0f} ms a step")
    return room

  flat = config_lib.flatten(config)
  fallbacks = [
    c for c in FALLBACKS if c.keys() <= flat.keys() and any(flat[k] != c[k] for k in c) and _possible(config, c)
  ]
  own = flat["encoder.arrangement"]
  both = [{} if name == own else {"encoder.arrangement": name} for name in ("plain", "packed")]
  both = [changes for changes in both if _possible(config, changes)]  # a Vision Transformer has one
  roomy = [has_room(changes) for changes in both]
  base = best["changes"] if best else both[-1]  # the packed one needs less memory
  for fallback in () if any(roomy) else fallbacks:
    if fallback == {"zero1": True} and (best or needed - hbm > _optimizer_bytes(config, num_classes)):
      continue  # minutes of compiling for what cannot be enough
    if has_room({**base, **fallback}):
      break
  batch = config.batch_size
  while best is None and batch % (2 * len(devices) * flat.get("microbatches", 1)) == 0:
    batch //= 2
    if batch * needed <= config.batch_size * hbm:  # else it cannot fit: what does not grow with the batch comes on top
      has_room({**base, **(fallbacks[-1] if fallbacks else {}), "batch_size": batch})
  if best is None:
    best = {"topology": topology, "batch_size": config.batch_size, "changes": None}
  return {**best, "refused": refused, "tried": tried}


def _possible(config, changes) -> bool:
  """Whether the encoder takes these changes."""
  try:
    config_lib.replace(config, changes)
  except UserError:
    return False
  return True


def _optimizer_bytes(config, num_classes):
  """Bytes of the optimizer's state, which ZeRO-1 spreads."""
  source = data.AbstractSource(config.batch_size, num_classes)
  _, (state, _) = PROGRAMS[config.program].abstract_step(config, mesh_lib.make_mesh(), source)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


def changes_text(changes) -> str:
  """Changes to a config as the flags that make them."""
  return " ".join(f"--config.{key}={value}" for key, value in (changes or {}).items())


def _chip(row) -> aot.Chip:
  return aot.CHIPS[row["topology"].partition(":")[0]]


def step_range(row) -> tuple[float, float]:
  """Seconds between which a step is expected, see aot.step_range."""
  return aot.step_range(row, _chip(row))


def table(row: dict) -> str:
  """A plan as text."""
  if row["changes"] is None:
    others = "; ".join(filter(None, row["tried"])) or "anything else"
    return f"{row['topology']}: does not fit ({row['refused']}), nor with any of {others}: take a larger topology or a smaller network"
  mib, gib = 2**20, aot.GIB
  low, high = (seconds / row["step_seconds"] for seconds in step_range(row))
  alone = aot.collective_seconds(row["collectives"], row["chips"], _chip(row))
  lines = [
    ("pod", f"{row['topology']}: {row['chips']} chips, {row['hosts']} hosts; batch {row['batch_size']:,}"),
    ("parameters", ", ".join(f"{name} {count:,}" for name, count in row["parameters"].items())),
    ("settings", ", ".join(f"{name} {value}" for name, value in row["settings"].items())),
    (
      "memory",
      f"{row['peak_bytes'] / gib:.2f} of {row['hbm_bytes'] / gib:.1f} GiB a device: state and batch "
      f"{row['arguments_bytes'] / mib:,.0f} MiB, temporaries {row['temporaries_bytes'] / mib:,.0f} MiB",
    ),
    (
      "step",
      f"{1e3 * row['step_seconds']:.1f} ms by the compiler's estimate; at best {1e3 * row['memory_seconds']:.1f} ms by "
      f"memory traffic ({row['hbm_traffic'] / 1e9:.1f} GB), {1e3 * row['matmul_seconds']:.1f} ms by arithmetic "
      f"({row['flops'] / 1e12:.2f} TFLOP a device, {row['model_flops'] / 1e12:.2f} of them the model's)",
    ),
    (
      "range",
      f"{1e3 * low * row['step_seconds']:.1f} ms if the chips are as fast as their data sheet, "
      f"{1e3 * high * row['step_seconds']:.1f} ms if as slow as the estimate and nothing hides the collectives; no bounds, "
      "see docs/scaling.md: measure with simclr time",
    ),
    ("speed", f"estimate {row['images_per_second_per_chip']:,.0f} images/s a chip, MFU {100 * row['mfu']:.0f} %"),
    (
      "collectives",
      "; ".join(
        f"{c['count']} {kind}, {c['bytes'] / mib:,.1f} MiB"
        + (f", {c['image_sized']} OF THEM AS LARGE AS IMAGES" if c["image_sized"] else "")
        for kind, c in row["collectives"].items()
      )
      + (f"; {1e3 * alone:.2f} ms on the links alone" if alone else "")
      or "none",
    ),
    (
      "hosts",
      f"deliver {row['images_per_second_per_host']:,.0f} images/s each at the estimated step, up to "
      f"{row['images_per_second_per_host'] / low:,.0f} at the fastest; the former is "
      f"{row['images_per_second_per_host'] / row['host_vcpus']:.1f} on each of {row['host_vcpus']} vCPUs"
      + (f"; JPEGs of 100 kB keep {row['vcpus_needed']:.0f} of them busy" if row["vcpus_needed"] else ""),
    ),
    (
      "time goes to",
      ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in row["parts_seconds"].items() if seconds),
    ),
    (
      "run",
      f"{row['steps']:,} steps, estimate {progress.duration(3600 * row['hours'])} of steps, "
      f"{row['chip_hours']:,.1f} chip-hours ({low * row['chip_hours']:,.1f} to {high * row['chip_hours']:,.1f} by the range), "
      "without evaluation and checkpoints",
    ),
  ]
  if len(row["tried"]) > 1:
    others = (
      f"{text or 'as it is'}: " + ("does not fit" if cost is None else f"{cost[0]:.0f} ms, {cost[1]:.1f} GiB")
      for text, cost in row["tried"].items()
    )
    lines.insert(1, ("best with", f"{changes_text(row['changes']) or 'the recipe as it is'} ({'; '.join(others)})"))
  if not row["images_per_second_per_host"]:
    lines = [(name, text) for name, text in lines if name != "hosts"]
  return "\n".join(f"{name:14}{value}" for name, value in lines)


COLUMNS = {
  "pod": lambda r: r["topology"],
  "batch": lambda r: f"{r['batch_size']:,}",
  "fits": lambda r: changes_text(r["changes"]) or "yes",
  "GiB": lambda r: f"{r['peak_bytes'] / aot.GIB:.1f} of {r['hbm_bytes'] / aot.GIB:.0f}",
  "TFLOP": lambda r: f"{r['model_flops'] / 1e12:.2f}",
  "est. ms": lambda r: f"{1e3 * r['step_seconds']:.1f}",
  "range": lambda r: "{:.1f}-{:.1f}".format(*(1e3 * seconds for seconds in step_range(r))),
  "img/s/chip": lambda r: f"{r['images_per_second_per_chip']:,.0f}",
  "MFU": lambda r: f"{100 * r['mfu']:.0f} %",
  "est. hours": lambda r: f"{r['hours']:,.1f}",
  "est. chip-hours": lambda r: f"{r['chip_hours']:,.0f}",
}


def comparison(rows) -> str:
  """Plans as the rows of one table."""
  cells = [list(COLUMNS)]
  for row in rows:
    if row["changes"] is None:
      cells.append([row["topology"], f"{row['batch_size']:,}", f"no ({row['refused']})"] + [""] * (len(COLUMNS) - 3))
    else:
      cells.append([cell(row) for cell in COLUMNS.values()])
  return report.aligned(cells)


def run(config, topologies, *, batches=(), num_examples=0, num_classes=0, as_json=False, picture="") -> list[dict]:
  """The program `simclr plan`: prints a plan for every topology and batch, several also side by side, or all as JSON.

  Args:
    batches: global batches instead of the recipe's.
    picture: an SVG to draw, of where the time of each step goes.

  Raises:
    ValueError: an unknown topology or data set, or a batch that cannot be split, before anything is compiled.
  """
  if num_classes and not num_examples:
    raise UserError(f"--num_classes={num_classes}: give --num_examples too")
  if num_examples:
    num_examples = trained_on(config, num_examples, num_classes)
  else:
    num_examples, num_classes = size_of(config)
    config = with_canvas(config)
  if not num_classes and config.program != "pretrain":
    raise UserError(f"simclr {config.program} learns classes: give --num_examples and --num_classes")
  if config.program == "pretrain":
    config = pretrain.from_random_weights(config)
  cases = []
  for name in topologies:
    _, devices = aot.topology(name)
    for batch in batches or (config.batch_size,):
      cases.append((name, config_lib.replace(config, {"batch_size": batch})))
      _check_batch(cases[-1][1], mesh_lib.make_mesh(devices))
  rows = []
  for name, case in cases:
    rows.append(plan(case, name, num_examples, num_classes, note=(lambda _: None) if as_json else print))
    if not as_json:
      print(table(rows[-1]), end="\n\n", flush=True)
  if as_json:
    print(json.dumps(rows, indent=2))
  elif len(rows) > 1:
    print(comparison(rows))
  if picture:
    draw(picture, rows)
  return rows


def draw(path, rows):
  """An SVG of what bounds each step, of the plans that fit."""
  rows = [row for row in rows if row["changes"] is not None]
  if not rows:
    raise UserError(f"--picture={path}: nothing fits, so there is no step to draw")
  report.step_times_svg(files.absolute(path), rows)


def main(flags, overrides) -> int:
  run(
    flags.config, flags.topology, batches=flags.batch_size, num_examples=flags.num_examples,
    num_classes=flags.num_classes, as_json=flags.json, picture=flags.picture,
  )  # fmt: skip
  return 0
