"""How a step would run on a pod: it is compiled ahead of time for a named TPU topology, on a machine without a TPU.

The TPU compiler comes with the package libtpu.  What it reports about its program is exact: memory, operations (it counts
those in loops once, and `products` adds what loops repeat), collectives, the schedule.  Its estimate of the time is a
model: the cycles it attributes to each operation of the schedule, divided by the clock rate, without collectives that
nothing hides (docs/scaling.md says how far to trust it).
"""

import ctypes
import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
import numpy as np

from simclr_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Data of one chip, from Google Cloud's system descriptions; a v2 or v3 chip is two devices, any other chip is one."""

  flops: float  # peak bfloat16 operations a second
  hbm_bytes: float
  hbm_bandwidth: float  # bytes a second
  clock: float  # Hz, of the estimate's cycles
  per_host: int  # chips
  host_vcpus: int
  ici: float | None = (
    None  # bytes a second that a chip sends in an all-reduce, all its links together; None: not published
  )
  devices: int = 1
  options: tuple = ()


GIB = 2**30
# ici: the all-reduce bandwidth of a pod over its chips (v3: 340 TB/s, 1,024; v4: 1.1 PB/s, 4,096; v5e: 51.2 TB/s, 256; v6e:
# 102.4 TB/s, 256), for v5p half of the 1,200 GB/s that a chip's links carry in both directions: cloud.google.com/tpu/docs/v3
# and v4, v5e, v5p, v6e, read on 2026-11-28.
CHIPS = {
  "v2": Chip(45e12, 16 * GIB, 700e9, 0.70e9, 4, 96, devices=2),
  "v3": Chip(123e12, 32 * GIB, 900e9, 0.94e9, 4, 96, 332e9, devices=2),
  "v4": Chip(275e12, 32 * GIB, 1228e9, 1.05e9, 4, 240, 269e9, options=(("chip_config_name", "megacore"),)),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 1.50e9, 4, 112, 200e9),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 1.75e9, 4, 208, 600e9, options=(("chip_config_name", "megacore"),)),
  "v6e": Chip(918e12, 32 * GIB, 1640e9, 1.75e9, 4, 180, 400e9),
}


# What JAX calls the devices of these chips: its jax/_src/cloud_tpu_init.py and mesh_utils.py.
KINDS = {
  "TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
  "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a JAX device's `device_kind`, or None if it is not a TPU or not in the table."""
  return CHIPS.get(KINDS.get(device_kind, ""))


class DoesNotFit(Exception):
  """The compiler refuses the program; `needed` is in bytes, or None if the compiler does not say."""

  def __init__(self, message, needed):
    super().__init__(message)
    self.needed = needed


def prepare():
  """Sets the environment that the TPU compiler needs, and puts JAX on the CPU; call it before JAX is used.

  Raises:
    ValueError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("compiling for TPUs needs the package libtpu, but no TPU: pip install libtpu")
  jax.config.update("jax_platforms", "cpu")  # JAX has read JAX_PLATFORMS when it was imported
  quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
  alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
  os.environ |= {**quiet, **alone}


def topology(name: str):
  """(Chip, devices) of a name such as v4:4x4x8, v5e:16x16 or v3:8x8.

  Raises:
    ValueError: the name has another form, or there is no pod of that shape.
  """
  from jax.experimental import topologies

  generation, _, shape = name.partition(":")
  if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise UserError(f"--topology={name}: expected {', '.join(CHIPS)} and a shape, such as v4:4x4x8 or v5e:16x16")
  chip = CHIPS[generation]
  try:
    return chip, topologies.get_topology_desc(name, platform="tpu", **dict(chip.options)).devices
  except Exception as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"--topology={name}: the compiler does not know this pod ({reason})") from None


def compile_for(jitted, *arguments):
  """The compiled program.  Raises DoesNotFit if a device has too little memory for it."""
  try:
    return jitted.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "hbm" not in text.lower():
      raise
    used = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT])\w* of", text)
    needed = float(used[1] or used[3]) * 1024 ** " KMGT".index(used[2] or used[4]) if used else None
    raise DoesNotFit(" ".join(text.split())[:300], needed) from None


def forget():
  """Returns the memory of earlier compiled programs to the system: gigabytes each, most of which malloc would keep."""
  jax.clear_caches()
  if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc, which libtpu is built for
    trim(0)


@functools.lru_cache(1)
def computations(hlo: str) -> dict:
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


def _loop(text: str, found: dict):
  """(body, trip count) of a `while` in a line of one of the computations `found`, or None."""
  loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", text)
  if not loop:
    return None
  # Every loop here counts from 0 to the one constant in its condition.
  (trips,) = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(found[loop[1]]))
  return loop[2], int(trips)


@functools.lru_cache(1)
def executions(hlo: str) -> dict:
  """{name: times} of the computations that a run of a module executes: of a loop's body, and of all that it calls, as often
  as the loop's trip count says."""
  found, times = computations(hlo), {}

  def visit(name, count):
    if times.get(name, 0) >= count:
      return
    times[name] = count
    for text in found[name]:
      body, trips = _loop(text, found) or (None, 1)
      for called in re.findall(r"%([\w.\-]+)", " ".join(_CALLS.findall(text))):
        if called in found:
          visit(called, count * (trips if called == body else 1))

  visit("ENTRY", 1)
  return times


class Schedule:
  """What a compiled TPU program says about itself.

  Attributes:
    cycles: the compiler's estimate, with loop bodies multiplied by their trip counts.
    hops, overlaps: in loops, the collective-permutes, and of the asynchronous ones (bytes, cycles they overlap with).
  """

  def __init__(self, hlo: str):
    self.computations = computations(hlo)
    self.hops, self.overlaps = 0, []
    self.cycles = self._cycles("ENTRY", in_loop=False)

  def _cycles(self, name, in_loop):
    total, started = 0, {}
    for text in self.computations[name]:
      total += _cost(text)
      if loop := _loop(text, self.computations):
        body, trips = loop
        total += trips * self._cycles(body, in_loop=True)
      if not in_loop:
        continue
      hop = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) (collective-permute(?:-start|-done)?)\((?:%([\w.\-]+))?", text)
      if hop and hop[3] == "collective-permute-done":
        self.overlaps.append((_bytes(hop[2]), total - started[hop[4]]))
      elif hop:
        self.hops += 1
        started[hop[1]] = total
    return total


def traffic(hlo: str) -> int:
  """Bytes that the operations of a compiled module read from and write to HBM, each array once, and of an array of which a
  slice is read or written, as of the microbatches of a loop, that slice; arrays that the compiler keeps in faster memory
  (`S(1)` and the like in their layout) do not count, as they do in cost_analysis()."""
  found, total = computations(hlo), 0
  for name, times in executions(hlo).items():
    size: dict[str, int] = {}
    for made in _operations(found[name]):
      if made[3] in ("copy-start", "slice-start"):  # from the one memory to the other
        total += times * min(_size(*shape) for shape in _shapes(made[2])[:2])
        continue
      size[made[1]] = _sum(_FASTER.sub("", made[2]))
      if '"estimated_cycles"' in made.string:
        read = _read(made, found)
        total += times * sum(min(size.get(name, 0), read.get(i, math.inf)) for i, name in enumerate(_operands(made)))
        total += times * max(0, size[made[1]] - _kept(made, size, found))
  return int(total)


def _operations(lines):
  """Matches of name, result, kind and operands of the operations in some lines."""
  return filter(None, map(_MADE.match, lines))


def _operands(made):
  return re.findall(r"%([\w.\-]+)", made[4])


def _inside(made, found):
  """The operations of the computation that an operation calls, if any."""
  called = re.search(r"calls=%([\w.\-]+)", made.string)
  return _operations(found[called[1]]) if called else ()


def _read(made, found) -> dict:
  """{i: bytes} that an operation reads of its operand i; what is read whole may be missing."""
  if made[3] in ("dynamic-slice", "dynamic-update-slice"):
    return {0: _sum(made[2]) if made[3] == "dynamic-slice" else 0}
  number, read = {}, {}
  for inner in _inside(made, found):
    operands = _operands(inner)
    if inner[3] == "parameter":
      number[inner[1]] = int(inner[4])
    elif inner[3] == "bitcast" and operands[0] in number:
      number[inner[1]] = number[operands[0]]
    else:
      portions = _read(inner, found)
      for i, name in enumerate(operands):
        if name in number:
          read[number[name]] = read.get(number[name], 0) + portions.get(i, math.inf)
  return read


def _kept(made, size, found) -> int:
  """Bytes of an operation's results that it leaves as they are, of arrays of which it writes a slice."""
  kept, size = 0, dict(size)
  for inner in _inside(made, found) if made[3] == "fusion" else (made,):
    size[inner[1]] = _sum(_FASTER.sub("", inner[2]))
    if inner[3] == "dynamic-update-slice":
      kept += max(0, size[inner[1]] - size.get(_operands(inner)[1], 0))
  return kept


def products(hlo: str) -> float:
  """FLOPs of the matrix products and convolutions that loops repeat after their first trip, which cost_analysis() leaves out.

  As there, products with padding and with the zeros of a dilation are no operations.
  """
  found, total = computations(hlo), 0
  for name, times in executions(hlo).items():
    shape = {}
    for made in _operations(found[name]) if times > 1 else ():
      shape[made[1]] = _shapes(made[2])[0][1] if _shapes(made[2]) else []
      if made[3] == "convolution":
        total += 2 * (times - 1) * _multiplications(made, *(shape[name] for name in _operands(made)))
  return total


def _multiplications(made, left, right) -> int:
  """Of a convolution, which the compiler makes of a matrix product too; `left` and `right` are the shapes of its operands."""
  ((of_left, of_right, of_out),) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", made.string)
  groups = re.search(r"batch_group_count=(\d+)", made.string)
  window = re.search(r"window=\{([^}]*)\}", made.string)
  window = {key: values.split("x") for key, values in re.findall(r"(\w+)=(\S+)", window[1])} if window else {}
  out = _shapes(made[2])[0][1]
  count = right[of_right.index("i")] * right[of_right.index("o")] * left[of_left.index("b")]
  count //= int(groups[1]) if groups else 1
  for axis, size in enumerate(map(int, window.get("size", ()))):
    step, dilation, zeros, padding = (
      window[key][axis] if key in window else default
      for key, default in (("stride", "1"), ("rhs_dilate", "1"), ("lhs_dilate", "1"), ("pad", "0_0"))
    )
    place = np.arange(out[of_out.index(str(axis))])[:, None] * int(step) + np.arange(size) * int(dilation)
    place -= int(padding.partition("_")[0])
    inside = (place >= 0) & (place < left[of_left.index(str(axis))] * int(zeros))
    count *= int(np.sum(inside & (place % int(zeros) == 0)))
  return count


def parts(hlo: str) -> dict:
  """{what: cycles} of a compiled train step's schedule: where the compiler's estimate of its time goes.

  An operation that contains a convolution counts as one, with all that the compiler fused into it, including statistics.
  """
  total: dict[str, int] = dict.fromkeys(PARTS, 0)
  found = computations(hlo)
  for computation, times in executions(hlo).items():
    for text in found[computation]:
      name = re.search(r'op_name="([^"]*)"', text)
      name = name[1] if name else ""
      direction = "backward" if "transpose(jvp(" in name else "forward" if _FORWARD.search(name) else None
      kind = "convolutions" if re.search(r"conv_general_dilated|dot_general", name) else "passes over activations"
      total[f"{kind}, {direction}" if direction else "outside the network"] += times * _cost(text)
  return total


def _cost(text: str) -> int:
  """The cycles that the compiler attributes to the operation in a line."""
  cycles = re.search(r'"estimated_cycles":"(\d+)"', text)
  return int(cycles[1]) if cycles else 0


PARTS = (
  "convolutions, forward",
  "convolutions, backward",
  "passes over activations, forward",
  "passes over activations, backward",
  "outside the network",
)
_MADE = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=(%[\w.\-]+|\{[^}]*\})")
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
# A module of the network, which may be in loops over microbatches.
_FORWARD = re.compile(r"jvp\(\w+\)|jvp\(\)(/while/body)+/closed_call/\w+/")
_FASTER = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([^}]*\}")  # an array outside of HBM
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def _shapes(result: str):
  return [(kind, [int(d) for d in dims.split(",") if d]) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)]


def _size(kind: str, dims) -> int:
  return math.prod(dims) * _WIDTH.get(kind, 4)


def _bytes(result: str) -> int:
  return max((_size(*shape) for shape in _shapes(result)), default=0)


def _sum(result: str) -> int:
  return sum(_size(*shape) for shape in _shapes(result))


def collectives(hlo: str) -> dict:
  """{kind: {"count", "bytes", "image_sized"}} of a run of a compiled module, so those in a loop count once for every trip.

  `image_sized` counts operands [n, ..., side, side, channels] with a side of at least 7: images and activations, which
  a data-parallel step never sends.
  """
  found, lines = {}, computations(hlo)
  for name, times in executions(hlo).items():
    for result, kind in _COLLECTIVE.findall("\n".join(lines[name])):
      row = found.setdefault(kind, {"count": 0, "bytes": 0, "image_sized": 0})
      row["count"] += times
      for dtype, dims in _shapes(result):
        row["bytes"] += times * _size(dtype, dims)
        row["image_sized"] += times * any(dims[i] == dims[i + 1] >= 7 for i in range(1, len(dims) - 2))
  return found


# How many times as long as the data sheets the estimate takes for programs that follow from them, over v3 to v6e: products of
# matrices 1.03 to 1.71, passes over HBM 2.12 to 2.75 (docs/scaling.md, benchmarks/calibration.py).
PRODUCTS, PASSES = (1.03, 1.71), (2.12, 2.75)
SENT = {
  "all-reduce": 2,
  "reduce-scatter": 1,
  "all-gather": 1,
  "all-to-all": 1,
  "collective-permute": 1,
}  # x bytes, at least


def collective_seconds(found: dict, chips: int, chip: Chip) -> float | None:
  """Seconds that the collectives of a step take on the links, if nothing hides them; `found` is as from `collectives`.

  Every chip sends each byte of an all-reduce twice.  Latencies are not included.  None: the chip's bandwidth is not published.
  """
  if chip.ici is None:
    return None
  return sum(SENT[kind] * row["bytes"] for kind, row in found.items()) * (chips - 1) / chips / chip.ici


def step_range(row: dict, chip: Chip) -> tuple[float, float]:
  """(seconds, seconds) between which a step is expected, from the result of `measure` under two assumptions.

  The first is for a chip as fast as its data sheet wherever the estimate is known to be slower, by the largest
  factors above.  The second is for a chip as slow as the estimate, with all collectives on top.
  """
  products = sum(seconds for name, seconds in row["parts_seconds"].items() if name.startswith("convolutions"))
  estimate = row["step_seconds"]
  low = products / PRODUCTS[1] + (estimate - products) / PASSES[1]
  high = estimate + (collective_seconds(row["collectives"], row["chips"], chip) or 0.0)
  return max(low, row["memory_seconds"], row["matmul_seconds"]), high


def peak_bytes(compiled) -> int | None:
  """Bytes that a compiled program needs on a device; donated arguments and results share.  None: its backend does not say."""
  memory = compiled.memory_analysis()
  return memory and (
    memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  )


def measure(jitted, arguments, *, chip: Chip, devices: int) -> dict:
  """Compiles a step and returns what is known about it, per device unless a key says chip; times are in seconds.

  Raises:
    DoesNotFit.
  """
  compiled = compile_for(jitted, *arguments)
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis()
  hlo = compiled.as_text()
  flops, moved = cost["flops"] + products(hlo), traffic(hlo)
  per_chip = chip.devices
  return {
    "devices": devices,
    "chips": devices // per_chip,
    "arguments_bytes": memory.argument_size_in_bytes,
    "temporaries_bytes": memory.temp_size_in_bytes,
    "peak_bytes": peak_bytes(compiled),
    "hbm_bytes": chip.hbm_bytes / per_chip,
    "flops": flops,
    "hbm_traffic": moved,
    "matmul_seconds": flops / (chip.flops / per_chip),
    "memory_seconds": moved / (chip.hbm_bandwidth / per_chip),
    "step_seconds": Schedule(hlo).cycles / chip.clock,
    "parts_seconds": {name: cycles / chip.clock for name, cycles in parts(hlo).items()},
    "collectives": collectives(hlo),
  }
