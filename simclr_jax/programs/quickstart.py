"""`simclr quickstart DIR`: from a folder of images without labels to an encoder, a map and one page, in minutes.

It starts from configs/folder.py and adapts it to the number of images, their size, the accelerator and the minutes,
by timing a few steps instead of guessing.  Then it runs the other programs: pretrain, embed, map.
"""

import dataclasses
import itertools
import json
import os
import time

import jax
import numpy as np
from etils import epath

from simclr_jax import data, report
from simclr_jax.evaluation import features
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import embed, pretrain
from simclr_jax.programs import map as map_lib
from simclr_jax.programs import trained as trained_lib
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import checkpoint, files, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError
from simclr_jax.runtime.progress import BEFORE, duration

RECIPE = "folder"
FEWEST = 16  # images: with fewer there is nothing to tell apart
LOOKED_AT = 200  # images whose sizes are read
REST = 60.0  # seconds that compiling, evaluating and the page take on two CPU cores
AN_IMAGE_ON_THE_MAP = 0.004  # seconds: InfoNC-t-SNE, and the search for near-duplicates and outliers, on two CPU cores
MOST_EPOCHS = 400  # more adds little on a small folder
MINUTES = 6.0


@dataclasses.dataclass(frozen=True)
class Network:
  """A ResNet, or the encoder of `start`, and the side of the views that it sees."""

  size: int
  width: float
  stem: str
  depth: int = 18
  start: str = ""

  @property
  def work(self) -> float:
    """Proportional to the operations of an image, roughly."""
    return self.size**2 * self.width**2 * self.depth * (16 if self.stem == "cifar" else 1)

  def __str__(self):
    if self.start:
      return f"the encoder of {self.start} on views of {self.size} pixels"
    return f"ResNet-{self.depth} of width {self.width:g} on views of {self.size} pixels"


def candidates(short_side: int, on_cpu: bool) -> list[Network]:
  """Networks for images of this shorter side, the best first; the first that is fast enough is taken."""
  if short_side < 48:  # as configs/smoke.py: small images keep their pixels
    size = max(16, round(0.72 * short_side / 4) * 4)
    widths = (0.25,) if on_cpu else (1.0, 0.5)
    return [Network(size, width, "cifar") for width in widths]
  if on_cpu:
    pairs = ((96, 0.5), (64, 0.5), (64, 0.25), (48, 0.25))
    return [Network(size, width, "imagenet") for size, width in pairs if size <= short_side]
  big = [Network(size, 1.0, "imagenet", depth) for size, depth in ((224, 50), (160, 50), (128, 18), (96, 18), (64, 18))]
  return [network for network in big if network.size <= short_side] or [Network(48, 1.0, "imagenet")]


def wanted(images: int, on_cpu: bool) -> int:
  """Images that training should see for its network to be worthwhile: a larger network that sees fewer is no better."""
  return max(30_000, 10 * images) if on_cpu else max(200_000, 100 * images)


def batch_size(images: int, devices: int, on_cpu: bool) -> int:
  """A power of two, or more devices' worth: a quarter of the images at most, so that negatives change from step to step."""
  most = 128 if on_cpu else 512
  return max(devices, min(most, 2 ** int(np.log2(max(images / 4, 8)))) // devices * devices)


def look(source) -> tuple[int, float]:
  """(the median shorter side of LOOKED_AT images, the seconds in which one core reads an image).

  Raises:
    ValueError: none of them can be read.
  """
  sides, last, began = [], None, time.monotonic()
  tried = data.permutation(0, 0, len(source))[:LOOKED_AT]
  for i in tried:
    try:
      sides.append(min(source.read(int(i)).shape[:2]))
    except data.BadImage as reason:
      last = f"{source.name(int(i))}: {reason}"
  if not sides:
    raise UserError(f"none of the {len(tried)} images that were tried can be read; the last is {last}")
  return int(np.median(sides)), (time.monotonic() - began) / len(tried)


def recipe_for(source, spec: str, network: Network, batch: int, steps: int, on_cpu: bool):
  """configs/folder.py, changed."""
  epochs = steps * batch / len(source)
  return config_lib.replace(
    config_lib.load(RECIPE),
    {
      "data.train": spec,
      "data.max_bad_fraction": 0.2,
      "batch_size": batch,
      "train_epochs": 0.0,
      "train_steps": steps,
      "start": network.start,
      "head_epochs": 0.05 * epochs if network.start else 0.0,
      "augment.size": network.size,
      "augment.blur": network.size >= 96,
      "augment.crop_area": (0.2, 1.0),  # the paper's 0.08 is for 224 pixels
      "encoder.depth": network.depth,
      "encoder.width": network.width,
      "encoder.stem": network.stem,
      "encoder.dtype": "float32" if on_cpu else "bfloat16",
      "loss.reduction": "mean",
      "projector.out_dim": 64 if on_cpu else 128,
      "optimizer.name": "adamw",
      "optimizer.base_lr": 2e-3,
      "optimizer.lr_scaling": "none",
      "optimizer.weight_decay": 1e-4,
      "optimizer.warmup_epochs": 0.05 * epochs,
      "evaluate.every_epochs": 0.0,
      "evaluate.every_steps": -(-steps // 4),
      "checkpoint.every_epochs": 0.0,
      "checkpoint.every_steps": -(-steps // 8),
      "checkpoint.keep": 1,
      "log.every_steps": max(1, steps // 100),
      "augment.where": "host" if on_cpu else "device",
    },
  )


def seconds_a_step(config, source, mesh) -> float:
  """Of the real update fed by the real stream, after compiling, measured over five seconds or so."""
  config, start = pretrain.open_start(config)
  task = pretrain.make_task(config, source, mesh=mesh, start=start)
  like = loop.abstract_state(task, mesh)
  placed = jax.tree.map(lambda x: x.sharding, like)
  state = jax.jit(task.init, out_shardings=placed)(jax.random.key(0))
  step, stream = loop.compile_step(task, mesh, like), task.stream(0)
  for _ in range(4):  # the first compiles, and the next batches were made meanwhile
    state, metrics = step(state, mesh_lib.global_batch(mesh, next(stream)))
  jax.block_until_ready(metrics)
  began = time.monotonic()
  for done in itertools.count(1):
    state, metrics = step(state, mesh_lib.global_batch(mesh, next(stream)))
    jax.block_until_ready(metrics)
    spent = time.monotonic() - began
    if spent > 5 or done == 50:
      return spent / done


def choose(source, spec: str, mesh, minutes: float, began: float, start: str = ""):
  """(config, [(what, value, why)]) for the images of a source, the devices at hand and `minutes` since `began`.

  `start` is a run or an exported encoder to start from, which is then the network.
  """
  n, device = len(source), mesh.devices.flat[0]
  on_cpu = device.platform == "cpu"
  side, read = look(source)
  on_map = min(n, map_lib.MOST_ON_A_MAP)
  # Each image is read once more for h, and each on the map for its thumbnail.
  rest = REST + (n + on_map) * read / data.cores() + on_map * AN_IMAGE_ON_THE_MAP
  batch, enough = batch_size(n, mesh.size, on_cpu), wanted(n, on_cpu)
  networks, tried, rate, work = candidates(side, on_cpu), [], 0.0, 0.0
  if start:
    networks = [Network(trained_lib.open_start(start).config.augment.size, 1.0, "imagenet", start=start)]
  for network in networks:
    left = max(60 * minutes - (time.monotonic() - began) - rest, 12 * minutes)
    # At best the rate goes with the work; what is too slow even so is not tried.
    if rate and rate * work / network.work < enough / left and network != networks[-1]:
      continue
    each = seconds_a_step(recipe_for(source, spec, network, batch, 1000, on_cpu), source, mesh)
    rate, work = batch / each, network.work
    tried.append(f"{network}: {rate:,.0f} images/s")
    print(f"measured    {tried[-1]}", flush=True)
    left = max(60 * minutes - (time.monotonic() - began) - rest, 12 * minutes)
    if left * rate >= enough:
      break
  possible, most = int(left / each), MOST_EPOCHS * n // batch
  steps = max(20, min(possible, most))
  given = f"{minutes:g} minute{'' if minutes == 1 else 's'}"
  if possible < steps:
    reason = f"the fewest that make sense; it takes longer than the {given}"
  elif possible > most:
    reason = f"{MOST_EPOCHS} epochs are enough for a set of this size; {given} would allow more"
  elif left == 12 * minutes:
    reason = f"a fifth of the {given}; it takes longer than that, for the rest alone takes about {duration(rest)}"
  else:
    reason = f"what is left of {given} at {each:.3f} s a step, less {duration(rest)} for the rest"
  why = [
    ("images", f"{n:,}, shorter side {side} pixels", f"the median of {min(n, LOOKED_AT)}"),
    ("hardware", f"{mesh.size} x {device.device_kind}", "measured: " + "; ".join(tried)),
    (
      "network",
      str(network),
      "training resumes from it"
      if start
      else f"the largest of {len(networks)} that sees {enough:,} images in the time"
      if left * rate >= enough
      else f"the smallest of {len(networks)}; more --minutes would serve it: {enough:,} images seen would be good",
    ),
    ("batch", f"{batch} images", "a quarter of the set at most: every step has other negatives"),
    (
      "training",
      f"{steps:,} steps, {steps * batch / n:.0f} epochs, about {duration(steps * each)}",
      reason,
    ),
    ("optimizer", "AdamW", "forgiving at small batches; LARS is for large ones"),
  ]
  return recipe_for(source, spec, network, batch, steps, on_cpu), why


def classes(root: str, names) -> tuple[np.ndarray | None, list[str]]:
  """(label of every image, class names) by the first folder below root, or (None, []) unless all are in 2 to 40 such."""
  first = [os.path.relpath(name, root).split(os.sep) for name in names]
  found = sorted({parts[0] for parts in first})
  if any(len(parts) < 2 for parts in first) or not 2 <= len(found) <= 40:
    return None, []
  return np.asarray([found.index(parts[0]) for parts in first], np.int32), found


def still_there(names, source) -> tuple[np.ndarray, np.ndarray]:
  """(positions in `names` [n] of the images that a source still has, their indices in it)."""
  place = {source.name(i): i for i in range(len(source))}
  index = np.array([place.get(name, -1) for name in names])
  rows = np.flatnonzero(index >= 0)
  return rows, index[rows]


def run(
  folder: str | None,
  workdir,
  *,
  minutes: float | None = None,
  start: str = "",
  resume: bool = False,
  overwrite: bool = False,
) -> dict:
  """The program `simclr quickstart`.

  The images are all image files at any depth below `folder`, by default the folder of the resumed run.  `minutes` is the
  approximate time for everything, by default MINUTES; `start` is a run or an exported encoder to start from.

  Returns:
    dict(config, why, chart, found, unreadable): what was chosen and what was found, see map.chart and map.anomalies.

  Raises:
    ValueError: no folder, too few images, too few minutes, or a resumed run was begun with another folder, start or minutes.
  """
  began = time.monotonic()
  if minutes is not None and not minutes > 0:
    raise UserError(f"--minutes={minutes}: expected a number above 0")
  plan = files.absolute(workdir) / "quickstart.json"
  kept = json.loads(files.read_sealed(plan)) if resume and plan.exists() else {}
  if not folder:
    if not kept:
      raise UserError("name a folder of images, or resume a quickstart with --resume --workdir=RUN")
    folder = kept.get("path", kept["folder"])  # "folder", the only one before 0.2, is as the names of its images are
  path = os.path.abspath(os.path.expanduser(folder))
  spec, root = f"files:{path}", files.printable(path)
  source = data.open_source(spec)
  if len(source) < FEWEST:
    raise UserError(
      f"{folder} holds {len(source)} images: quickstart needs {FEWEST} at least, and hundreds to be useful"
    )
  if resume and not kept and checkpoint.folder(workdir).exists():
    raise UserError(f"--workdir={workdir} --resume: that run was not begun by simclr quickstart; name another folder")
  if kept:  # compared before the folder is touched
    if kept["folder"] != root:
      raise UserError(f"--workdir={workdir} is a quickstart of {kept['folder']}: name another folder for {root}")
    config, why = config_lib.from_json(checkpoint.read_config(workdir)), kept["why"]
    planned = kept.get("minutes") or minutes  # not stated before 0.2
    if minutes not in (None, planned):
      raise UserError(
        f"--minutes={minutes:g}: the run in {workdir} was planned for {planned:g}; leave it out to resume"
      )
    if start and start != config.start:
      raise UserError(f"--start={start}: the run in {workdir} started from {config.start or 'random weights'}")
  elif start:
    trained_lib.open_start(start)  # what cannot be opened is found before anything is written
  mesh = mesh_lib.make_mesh()
  workdir = workdir_lib.claim(workdir, resume=resume, overwrite=overwrite, specs=(spec,), starts=(start,))
  if not kept:
    planned = MINUTES if minutes is None else minutes
    config, why = choose(source, spec, mesh, planned, began, start)
  for what, value, reason in why:
    print(f"{what:12}{value} ({reason})")
  checkpoint.write_config(workdir, config_lib.to_json(config))
  kept = {"path": path, "folder": root, "minutes": planned, "why": why}
  files.write_sealed(workdir / "quickstart.json", json.dumps(kept))
  # A folder that grows meanwhile is looked at as it is now.
  config = config_lib.replace(config, {"data.changed": "accept"})
  trained = pretrain.run(config, workdir, resume=True, recipe=RECIPE, complete=False)  # the page is still to come

  print("\nwhat is in the folder")
  table = embed.run(workdir, spec, workdir / "features.npz", overwrite=True)
  made = features.load(table)
  source = data.open_source(spec)  # by now the folder may hold other images than at the start
  rows, index = still_there(made.name, source)
  drawn = np.sort(data.permutation(config.seed, 0, len(rows))[: map_lib.MOST_ON_A_MAP])
  rows, index = rows[drawn], index[drawn]
  if len(rows) < 2:
    raise UserError(f"{folder} still holds {len(rows)} of the {len(made.h)} images that were embedded: a map needs two")
  labels, class_names = classes(root, made.name[rows])
  pictures = map_lib.thumbnails(source, index)
  names = [os.path.relpath(name, root) for name in made.name[rows]]
  chart = map_lib.chart(made.h[rows], pictures, names, labels, class_names, seed=config.seed)
  if len(rows) < len(made.h):
    chart["note"] += f" Map and lists are of {len(rows):,} of the {len(made.h):,} images that were embedded."
  found = map_lib.anomalies(made.h[rows], pictures)
  map_lib.write(workdir / "map", chart, found)
  listed = epath.Path(f"{table}.unreadable.txt")
  unreadable = [line.split("\t") for line in files.read_text(listed).splitlines()] if listed.exists() else []
  took = span(time.monotonic() - began, trained["page"]["seconds"].get(BEFORE, 0.0))
  lost = [(os.path.relpath(name, root), reason) for name, reason in unreadable]
  _page(workdir, trained["page"], root, len(made.h) + len(lost), why, chart, found, lost, listed, took)
  checkpoint.mark_complete(workdir, int(trained["state"].step))
  print(chart["note"])
  map_lib.print_findings(names, found)
  print(f"unreadable  {len(unreadable)}")
  for name, reason in first(unreadable, 5, listed):
    print(f"            {name}: {reason}")
  print(f"time        {took}")
  print(f"\nopen {workdir / 'report.html'}", flush=True)
  return dict(config=config, why=why, chart=chart, found=found, unreadable=unreadable)


def span(seconds: float, before: float) -> str:
  """How long it took, in words: `seconds` since it was begun or resumed, `before` of training until then."""
  if before:
    return f"{duration(seconds)} from resuming to this page, after {duration(before)} of training"
  return f"{duration(seconds)} from the folder to this page"


def first(lost, most: int, listed) -> list[tuple]:
  """The first `most` rows (file, reason) of unreadable files; if there are more, the last says how many, and which file has all."""
  left = len(lost) - most
  return [*lost[:most], *([(f"and {left:,} more", f"all are named in {listed}")] if left > 0 else [])]


def _page(workdir, page, root, n, why, chart, found, lost, listed, took):
  pairs, shown = len(found["duplicates"]), len(chart["names"])
  among = f" among {shown:,} of them" if shown < n - len(lost) else ""
  summary = f"{n:,} images, {took}: {pairs:,} near-duplicate pairs{among}, {len(lost):,} unreadable."
  files = {
    workdir / "features.npz": "h of every image; simclr embed writes parquet and safetensors too",
    workdir / "map": "the points as npz and csv, a picture, near-duplicates and outliers as csv",
    **page["files"],
  }
  report.write_report(
    workdir / "report.html",
    **{
      **page,
      "title": f"What is in {os.path.basename(root)}",
      "summary": summary,
      "files": files,
      "map_of_images": chart,
      "choices": why,
      "unreadable": first(lost, 100, listed.name),
      **map_lib.findings(chart, found),
    },
  )


def main(flags, overrides) -> int:
  run(
    flags.folder,
    flags.workdir,
    minutes=flags.minutes,
    start=flags.start,
    resume=flags.resume,
    overwrite=flags.overwrite,
  )
  return 0
