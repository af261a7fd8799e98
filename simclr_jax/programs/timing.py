"""`simclr time`: how long a train step takes on the hardware at hand and how fast images arrive, with several settings.

Every row is the step of a run of `simclr pretrain`, compiled and fed as there; nothing is saved.
"""

import dataclasses
import functools
import json
import time

import jax
import numpy as np

from simclr_jax import contrast, report
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import plan, pretrain, splits
from simclr_jax.runtime import aot, cpu, errors, files, loop, processes, watchdog
from simclr_jax.runtime import mesh as mesh_lib

STEPS, SECONDS = (
  20,
  30.0,
)  # of a measurement: steps or batches, and seconds after which three are enough
FORMS = {"dense": contrast.nt_xent, "tiled": contrast.nt_xent_tiled}
SLACK = 0.03  # a change that gains less than this says nothing


def cases(config, mesh, *, packed: bool = False) -> list[tuple[dict, str]]:
  """[(changes to the config, form of NT-Xent or "" for the one that it takes itself)]: the recipe as it is, then one change each.

  Args:
    packed: whether to time the packed arrangement of the encoder where there is no TPU, too.
  """
  found: list[tuple[dict, str]] = [({}, "")]
  if config.encoder.name == "resnet" and (packed or mesh.devices.flat[0].platform == "tpu"):
    found += [({"encoder.arrangement": name}, "") for name in ("plain", "packed") if name != config.encoder.arrangement]
  found += [({"augment.where": where}, "") for where in ("host", "device") if where != config.augment.where]
  if config.method == "simclr" and config.loss.name == "nt_xent":
    found += [({}, form) for form in FORMS if form != plan.settings(config, mesh)["nt_xent"]]
  return found


class Step:
  """The compiled step of a config, and its input.

  Args:
    form: of NT-Xent, one of FORMS, or "".

  Raises:
    ValueError: settings contradict each other, or the batch cannot be split.
  """

  def __init__(self, config, source, mesh, form: str = ""):
    self.config, self.mesh = config, mesh
    with errors.of_the_user():
      pretrain.check_batch(config, mesh)
      pretrain.view_pipeline(config).check()
      self.task = pretrain.make_task(config, source, mesh=mesh)
      if form:
        self.task = _with_form(self.task, config, mesh, form)
      like = loop.abstract_state(self.task, mesh)
    self.init = jax.jit(self.task.init, out_shardings=jax.tree.map(lambda x: x.sharding, like))
    self.stream = self.task.stream(0)
    self.batches = [mesh_lib.global_batch(mesh, next(self.stream)) for _ in range(2)]
    self.compiled = loop.compile_step(self.task, mesh, like).lower(like, self.batches[0]).compile()
    cpu.make_room(aot.peak_bytes(self.compiled))

  def seconds(self) -> np.ndarray:
    """float64 [k]: seconds between the ends of steps, of which one always waits for the one before, as in a run."""
    state = self.init(jax.random.key(self.config.seed))

    def steps(count):
      nonlocal state
      ends, running = [], None
      for i in range(count + 1):
        state, metrics = self.compiled(state, self.batches[i % 2])
        jax.block_until_ready(running)
        ends.append(time.perf_counter())
        running = metrics
      jax.block_until_ready(state)
      return np.diff(ends)

    first = steps(1)[0]
    # All processes make the same steps, or they would wait for each other.
    return steps(processes.run_on_primary(lambda: int(np.clip(SECONDS / first, 3, STEPS))))

  def images_per_second(self) -> float | None:
    """Images of the global batch that arrive per second when nothing else runs, or None if they are on the devices.

    Every process makes its share of them at the same time.
    """
    if self.config.augment.where == "resident":
      return None
    for _ in range(3):  # which were made before they were asked for
      next(self.stream)
    began, count = time.perf_counter(), 0
    while count < STEPS and (count < 3 or time.perf_counter() - began < SECONDS):
      next(self.stream)
      count += 1
    return count * self.config.batch_size / (time.perf_counter() - began)

  def measure(self) -> dict:
    """Times steps, and the images that come for them.

    Returns:
      dict(step_seconds (median), fastest, slowest, spread (between the quartiles, over the median), steps,
      images_per_second, pipeline_images_per_second (None: no pipeline), run_images_per_second (both together),
      program_bytes (of a device, by the compiler's account), estimated_seconds (as `simclr plan` has it; None off TPUs)).
    """
    seconds, pipeline = self.seconds(), self.images_per_second()
    low, quarter, median, three_quarters, high = map(float, np.quantile(seconds, (0, 0.25, 0.5, 0.75, 1)))
    rate = self.config.batch_size / median
    together = rate if pipeline is None else min(rate, pipeline)
    device = self.mesh.devices.flat[0]
    if pipeline is not None and device.platform == "cpu":  # one after the other, on the same cores
      together = 1 / (1 / rate + 1 / pipeline)
    chip = aot.chip_of(device.device_kind)
    return {
      "step_seconds": median,
      "fastest": low,
      "slowest": high,
      "spread": (three_quarters - quarter) / median,
      "steps": len(seconds),
      "images_per_second": rate,
      "pipeline_images_per_second": pipeline,
      "run_images_per_second": together,
      "program_bytes": aot.peak_bytes(self.compiled),
      "estimated_seconds": aot.Schedule(self.compiled.as_text()).cycles / chip.clock or None if chip else None,
    }


def _with_form(task: loop.Task, config, mesh, form: str) -> loop.Task:
  """The task with NT-Xent in this form, whatever the size of its matrix."""
  options = {name: value for name, value in dict(config.loss).items() if form == "tiled" or name != "tile"}
  options |= {"mesh": mesh} if form == "tiled" else {}
  method = dataclasses.replace(task.step.keywords["method"], contrastive=functools.partial(FORMS[form], **options))  # pyright: ignore
  return dataclasses.replace(task, step=functools.partial(task.step, method=method))


def advice(rows: list[dict], drift: float = 0.0) -> str:
  """One or two sentences on what to set.

  Args:
    rows: as of `run`, the recipe's first.
    drift: by how much the recipe's own step differs when it is timed again at the end, as a fraction.
  """
  recipe, *others = [row for row in rows if "refused" not in row]

  def gain(row):
    return row["run_images_per_second"] / recipe["run_images_per_second"] - 1

  noise = max(SLACK, recipe["spread"], drift)
  better = [row for row in others if row["changes"] and gain(row) > noise]
  if better:
    best = max(better, key=gain)
    text = f"Set {best['what']}: {gain(best):.0%} more images/s than with the recipe as it is."
  else:
    best = recipe
    text = f"Keep the recipe's settings: no other is faster by more than {noise:.0%}, which is the noise here."
  pipeline = best["pipeline_images_per_second"]
  if pipeline and pipeline < best["images_per_second"]:
    waiting = 1 - pipeline / best["images_per_second"]
    text += f" Images come slower than the step could take them: where it does not share their CPUs, it waits {waiting:.0%} of the time."
  for row in others:
    if row["form"] and gain(row) > noise:
      text += f" NT-Xent chooses its form by the batch; the {row['form']} one is {gain(row):.0%} faster here."
  return text


def _short(value: float | None, scale: float = 1.0) -> str:
  """A number in three digits or more; a dash for None."""
  if value is None:
    return "-"
  return f"{scale * value:,.0f}" if scale * value >= 100 else f"{scale * value:.3g}"


COLUMNS = {
  "": lambda row: row["what"],
  "step, ms (min-max)": lambda row: "{} ({}-{})".format(
    *(_short(row[key], 1e3) for key in ("step_seconds", "fastest", "slowest"))
  ),
  "images/s": lambda row: _short(row["images_per_second"]),
  "input images/s": lambda row: _short(row["pipeline_images_per_second"]),
  "together": lambda row: _short(row["run_images_per_second"]),
  "GiB": lambda row: _short(row["program_bytes"], 1 / aot.GIB),
  "estimate, ms": lambda row: _short(row["estimated_seconds"], 1e3),
  "measured/estimate": lambda row: _short(row["estimated_seconds"] and row["step_seconds"] / row["estimated_seconds"]),
}


def table(rows: list[dict]) -> str:
  """The rows as text, with the estimates of `simclr plan` if there are any."""
  rows = [row for row in rows if "refused" not in row]
  shown = {
    name: cell
    for name, cell in COLUMNS.items()
    if "estimate" not in name or any(row["estimated_seconds"] for row in rows)
  }
  return report.aligned([list(shown), *([cell(row) for cell in shown.values()] for row in rows)])


def run(config, *, packed: bool = False, json_file: str = "") -> dict:
  """The program `simclr time`: measures every one of `cases` and prints a table and the advice.

  Args:
    packed: see `cases`.
    json_file: where to write all of it, if anywhere.

  Returns:
    dict(device, devices, batch_size, rows, drift, advice, peak_bytes).  A row has what `Step.measure` returns, or `refused`, and `what`,
    `changes` and `form`; `drift`: see `advice`; `peak_bytes` is the largest memory of a device so far by the backend's own account, or None.

  Raises:
    ValueError: the settings of the recipe itself contradict each other.
  """
  mesh = mesh_lib.make_mesh()
  device = mesh.devices.flat[0]
  source, _ = splits.open_data(config.data)
  config = pretrain.from_random_weights(config)
  rows: list[dict] = []
  recipe: Step | None = None

  def note(text):
    if not jax.process_index():
      print(text, flush=True)

  note(f"devices     {mesh.size} x {device.device_kind}; batch {config.batch_size:,}")
  for changes, form in cases(config, mesh, packed=packed):
    what = plan.changes_text(changes) or (f"NT-Xent {form}" if form else "the recipe as it is")
    row = {"what": what, "changes": changes, "form": form}
    watchdog.set_phase("compile")  # of several processes: every row may take as long as compiling a run's step
    try:
      step = Step(config_lib.replace(config, changes), source, mesh, form)
      rows.append(row | step.measure())
      recipe = recipe or step
    except (ValueError, RuntimeError, MemoryError) as error:
      no_room = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
      if not rows or not (no_room or isinstance(error, ValueError)):
        raise
      rows.append(row | {"refused": "out of memory" if no_room else str(error)})
    found = (
      f"not possible, {rows[-1]['refused']}" if "refused" in rows[-1] else f"{_short(rows[-1]['step_seconds'], 1e3)} ms"
    )
    note(f"timed       {what}: {found}")
  again = float(np.median(recipe.seconds())) if recipe else 0.0
  drift = abs(again / rows[0]["step_seconds"] - 1)
  statistics = jax.local_devices()[0].memory_stats() or {}  # those of other processes cannot be asked
  result = {
    "device": device.device_kind,
    "devices": mesh.size,
    "batch_size": config.batch_size,
    "rows": rows,
    "drift": drift,
    "advice": advice(rows, drift),
    "peak_bytes": statistics.get("peak_bytes_in_use"),
  }
  note("\n" + table(rows) + "\n")
  note(
    f"noise       the recipe's step, timed again after the others, took {again / rows[0]['step_seconds']:.2f} times as long as at first"
  )
  if result["peak_bytes"]:
    note(f"memory      {result['peak_bytes'] / aot.GIB:.2f} GiB at most on a device, over all rows")
  if not any(row.get("estimated_seconds") for row in rows):
    note(f"estimate    none: `simclr plan` only knows TPUs, and this is {device.device_kind}")
  note(f"advice      {result['advice']}")
  if json_file and not jax.process_index():
    files.write_text(files.absolute(json_file), json.dumps(result, indent=2))
  return result


def main(flags, overrides) -> int:
  run(flags.config, packed=flags.packed, json_file=flags.json)
  return 0
