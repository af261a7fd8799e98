"""Looking at a data set before training on it: `simclr data inspect`, `prepare` and `benchmark`."""

import collections
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import os
import time

import numpy as np

from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.runtime import aot, files
from simclr_jax.runtime.errors import UserError
from simclr_jax.runtime.progress import duration

FLOPS = 49.2e9  # of one ResNet-50 step on the two 224-pixel views of an image, forward and backward
ESTIMATES = {
  "v4": 1375,
  "v5e": 1182,
}  # images a second a chip, by the TPU compiler's estimate of that step: docs/scaling.md


def _threads():
  return concurrent.futures.ThreadPoolExecutor(data.cores())


def _progress(done, total, began, what):
  left = (time.monotonic() - began) * (total - done) / max(done, 1)
  print(f"{what} {done:,} of {total:,}, {duration(left)} left", flush=True)


def _check_outside(output, spec):
  from simclr_jax.programs import workdir  # which imports Orbax

  workdir.check_outside("--output", files.expanded(output), spec)


# ---- inspect ---------------------------------------------------------------------------------------------------


def inspect(spec: str, *, data_dir: str | None = None, limit: int = 0, output: str | None = None) -> dict:
  """Reads and decodes every image (or `limit` of them, drawn at random) and reports what it finds.

  Args:
    output: a PNG file for a contact sheet of 64 images.

  Returns:
    dict(images, classes {name: count}, formats {name: count}, sizes [m, 2], bytes (mean), bad {name: reason}, skipped
    (names of files), bits (see data.Source; 8 where no image has 16), unlabeled (their number)).
  """
  if output:
    _check_outside(output, spec)
  source = data.open_source(spec, data_dir=data_dir)
  chosen = np.arange(len(source))
  if 0 < limit < len(source):
    chosen = np.sort(data.permutation(0, 0, len(source))[:limit])
  sheet = set(chosen[data.permutation(1, 0, len(chosen))[:64]].tolist())

  deep = set()  # 16-bit images

  def look(i):
    try:
      item, _ = source.item(i)
      pixels = source.decode(item)
      kind, length = (data.sniff(item), len(item)) if isinstance(item, bytes) else ("array", pixels.nbytes)
      if isinstance(item, bytes) and data.significant_bits(item):
        deep.add(i)
      return i, kind, length, pixels.shape[:2], pixels if i in sheet else None
    except data.BadImage as reason:
      return i, str(reason), 0, None, None

  bad, formats, sizes, lengths, pictures = {}, collections.Counter(), [], [], {}
  began = last = time.monotonic()
  with _threads() as pool:
    for done, (i, kind, length, size, pixels) in enumerate(pool.map(look, chosen.tolist()), 1):
      if size is None:
        bad[source.name(i)] = kind
        continue
      formats[kind] += 1
      sizes.append(size)
      lengths.append(length)
      if pixels is not None:
        pictures[i] = pixels
      if time.monotonic() - last > 10:
        last = time.monotonic()
        _progress(done, len(chosen), began, "read")
  counts = np.bincount(source.labels[source.labels >= 0], minlength=source.num_classes) if source.num_classes else []
  result = {
    "images": len(source),
    "classes": dict(zip(source.class_names, map(int, counts), strict=True)) if source.num_classes else {},
    "formats": dict(formats),
    "sizes": np.asarray(sizes, int).reshape(-1, 2),
    "bytes": float(np.mean(lengths)) if lengths else 0.0,
    "bad": bad,
    "skipped": source.skipped,
    "bits": source.bits or 16 if deep else 8,
    "unlabeled": int((source.labels < 0).sum()) if source.labels is not None else 0,
  }
  _describe(spec, result, len(chosen))
  if output and pictures:
    _contact_sheet(output, [pictures[i] for i in sorted(pictures)])
    print(f"contact sheet  {output}")
  return result


def _describe(spec, result, looked):
  print(f"{spec}: {result['images']:,} images" + (f", {looked:,} of them read" if looked < result["images"] else ""))
  print("formats        " + ", ".join(f"{kind} {count:,}" for kind, count in result["formats"].items()))
  if len(result["sizes"]):
    low, middle, high = (np.quantile(result["sizes"], q, axis=0).astype(int) for q in (0, 0.5, 1))
    print(f"height, width  {low[0]} x {low[1]} to {high[0]} x {high[1]}, median {middle[0]} x {middle[1]}")
    print(f"stored         {result['bytes'] / 1000:,.1f} kB per image")
  if result["bits"] > 8:
    print(f"16-bit images  scaled from {result['bits']} bits, 0 to {2 ** result['bits'] - 1:,}, to 0 to 255")
  classes = result["classes"]
  if classes:
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    print(f"classes        {len(classes):,}, {ordered[-1][1]:,} to {ordered[0][1]:,} images each")
    shown = ordered if len(ordered) <= 20 else ordered[:10] + ordered[-10:]
    print("               " + ", ".join(f"{name} {count:,}" for name, count in shown))
    empty = [name for name, count in ordered if not count]
    if empty:
      print(f"               {len(empty)} without an image, such as {empty[0]}")
    if result["unlabeled"]:
      print(f"               {result['unlabeled']:,} images without a label, which count in no score")
  else:
    print("classes        none: no labels, so no kNN and no linear evaluation")
  print(f"skipped        {data.skipped_text(result['skipped']) or 'no file'}")
  fraction = len(result["bad"]) / looked
  print(f"unreadable     {len(result['bad']):,} ({fraction:.3%}); a run stops above data.max_bad_fraction")
  for name, reason in itertools.islice(result["bad"].items(), 20):
    print(f"               {name}: {reason}")
  if len(result["bad"]) > 20:
    print(f"               and {len(result['bad']) - 20:,} more")


def _contact_sheet(path, pictures, side=96, columns=8):
  from PIL import Image

  rows = -(-len(pictures) // columns)
  sheet = Image.new("RGB", (columns * side, rows * side), "white")
  for k, pixels in enumerate(pictures):
    small = Image.fromarray(pixels)
    small.thumbnail((side - 4, side - 4))
    sheet.paste(small, (k % columns * side + 2, k // columns * side + 2))
  buffer = io.BytesIO()
  sheet.save(buffer, "PNG")
  files.write_bytes(path, buffer.getvalue())


# ---- prepare ---------------------------------------------------------------------------------------------------


def prepare(
  spec: str, output: str, *, data_dir: str | None = None, images_per_shard: int = 1000, short_side: int = 0
) -> int:
  """Writes a data set as TFRecord shards that `tfrecord:OUTPUT` reads; resumes an earlier call.

  Every image is decoded once on the way; unreadable ones are left out and listed in unreadable.txt.  Class names go to
  classes.json.

  Args:
    short_side: if above 0, larger images are re-encoded as JPEGs of that shorter side, which decode faster but make small
      crops blurrier.

  Returns:
    The number of images written, by this call and earlier ones.

  Raises:
    ValueError: the folder holds shards with other settings, or of a set that has changed since.
  """
  source = data.open_source(spec, data_dir=data_dir)
  folder = files.expanded(output)
  plan = folder / "prepare.json"
  if (
    folder.exists()
    and not plan.exists()
    and (there := sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
  ):
    raise UserError(f"--output={output} holds {there[0]} and no prepared shards: name an empty or a new folder")
  _check_outside(output, spec)
  folder.mkdir(parents=True, exist_ok=True)
  count = -(-len(source) // images_per_shard)
  settings = {
    "spec": spec, "images": len(source), "images_per_shard": images_per_shard, "short_side": short_side
  }  # fmt: skip
  made_of = source.fingerprint()
  if plan.exists():
    from simclr_jax.programs import same  # which imports Orbax

    kept = json.loads(files.read_text(plan))
    before = kept.pop("fingerprint", made_of)
    if kept != settings:
      raise UserError(f"{folder} holds shards with other settings ({json.dumps(kept)}); use another --output")
    if what := same.difference(before, made_of):
      raise UserError(f"{spec} is not what {folder} was begun with: {what}; use another --output")
  files.write_text(plan, json.dumps({**settings, "fingerprint": made_of}))
  if source.num_classes:
    files.write_text(folder / shards.CLASSES, json.dumps(list(source.class_names)))

  def load(i):
    try:
      item, label = source.item(i)
      pixels = source.decode(item)
      if short_side and min(pixels.shape[:2]) > short_side:
        item = _encoded(_shrunk(pixels, short_side), "JPEG", quality=95)
      elif not isinstance(item, bytes) or (short_side and data.significant_bits(item)):
        item = _encoded(pixels, "PNG")  # with 8 bits, as those that were shrunk, by which the new set's are not told
      return item, label, source.name(i)
    except data.ReadError as reason:
      raise UserError(
        f"{source.name(i)} cannot be read now ({reason}): make it readable and run the same command again, which keeps the "
        "shards that are there"
      ) from None
    except data.BadImage as reason:
      return None, str(reason), source.name(i)

  written, began = 0, time.monotonic()
  with _threads() as pool:
    for k in range(count):
      name, unreadable = f"images-{k:05}-of-{count:05}.tfrecord", folder / f"unreadable-{k:05}.txt"
      mine = range(k * images_per_shard, min((k + 1) * images_per_shard, len(source)))
      if not (folder / name).exists():
        loaded = list(pool.map(load, mine))
        bad = [f"{where}\t{reason}\n" for item, reason, where in loaded if item is None]
        # Before the shard: one that is there is finished in every respect.
        files.write_text(unreadable, "".join(bad))
        try:
          shards.write_tfrecord(os.fspath(folder / name), (row for row in loaded if row[0] is not None))
        except Exception as error:  # TensorFlow has types of its own for a full disk
          if not files.disk_is_full(error, folder):
            raise
          raise OSError(
            f"could not write {folder / name}: the disk is full; free space and run the same command again, which keeps the "
            "shards that are there"
          ) from None
        _progress(k + 1, count, began, "shard")
      written += len(mine) - len(files.read_text(unreadable).splitlines())
  lists = sorted(folder.glob("unreadable-*.txt"))
  bad = "".join(map(files.read_text, lists))
  files.write_text(folder / "unreadable.txt", bad)
  print(f"{written:,} images in {count:,} shards, {len(bad.splitlines()):,} unreadable ones listed in unreadable.txt")
  print(f"train on them with --config.data.train=tfrecord:{folder}")
  return written


def _shrunk(pixels, short_side):
  from PIL import Image

  height, width = pixels.shape[:2]
  scale = short_side / min(height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


def _encoded(pixels, kind, **options):
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()


# ---- benchmark -------------------------------------------------------------------------------------------------


def benchmark(
  spec: str, *, data_dir: str | None = None, size: int = 224, resize: str = "bicubic", seconds: float = 5.0
) -> dict:
  """Images per second per core of every stage, on this machine and these images; what chips need; what to change.

  Times are processor seconds of the whole process, so they are also valid on a busy machine; every stage includes the
  ones before it.

  Returns:
    {stage: images per second per core}.
  """
  from simclr_jax import augment  # TensorFlow, which looking at a set may do without

  source = data.open_source(spec, data_dir=data_dir)
  crop = dict(size=size, resize=resize)
  batch = max(8, min(64, len(source)))
  paths = {
    "device_crop": None,
    "device": functools.partial(augment.two_crops, **crop),
    "host": functools.partial(augment.two_views, **crop),
  }
  rates = {}
  if not isinstance(source, data.ArraySource):
    rates["read"] = _rate(source.item, len(source), seconds / 5)
  for where, transform in paths.items():
    stream = data.train_stream(source, transform, batch_size=batch, seed=0, max_bad_fraction=1.0)
    for _ in range(3):
      next(stream)
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
      next(stream)
      count += batch
    rates[where] = count / (time.process_time() - start)
  cores = data.cores()
  print(f"{spec}, views of {size} pixels, {cores} cores here; images per second per core (an image means two views)")
  for stage, rate in rates.items():
    label = {"read": "reading alone"}.get(stage, f"augment.where={stage}")
    print(f"  {label:28}{rate:>10,.0f}")
  print(advice(rates, size))
  return rates


def _rate(work, n, seconds):
  start, count = time.process_time(), 0
  while time.process_time() - start < seconds:
    with contextlib.suppress(data.BadImage):
      work(count % n)
    count += 1
  return count / (time.process_time() - start)


def advice(rates: dict, size: int) -> str:
  """A few lines on which `augment.where` is fast enough for a ResNet-50 on TPU hosts, from images per second per core."""
  lines = ["what a ResNet-50 wants, and the first setting that feeds it with half as much again to spare:"]
  scale = (224 / size) ** 2  # the network's work goes with the area
  for name in ("v4", "v5e", "v6e"):
    chip = aot.CHIPS[name]
    wants = {"half of the peak rate": chip.flops / 2 / FLOPS}
    if name in ESTIMATES:
      wants = {"the compiler's estimate of the step": ESTIMATES[name], **wants}
    for what, rate in wants.items():
      need = rate * scale * chip.per_host / chip.host_vcpus
      enough = next((where for where in ("host", "device", "device_crop") if rates[where] >= 1.5 * need), None)
      cure = f"augment.where={enough}" if enough else "none: smaller files (simclr data prepare --short_side=256)"
      host = f"{name:4} {chip.per_host} chips, {chip.host_vcpus} CPUs"
      lines.append(f"  {host}, {what:36}{need:>7,.0f} a CPU: {cure}")
  lines.append("a CPU of a TPU host is a hyper-thread: take half of the figure of a core of this machine")
  return "\n".join(lines)


def main(flags, overrides) -> int:
  options = {name: value for name, value in vars(flags).items() if name not in ("command", "action")}
  {"inspect": inspect, "prepare": prepare, "benchmark": benchmark}[flags.action](**options)
  return 0
