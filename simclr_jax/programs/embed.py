"""`simclr embed`: h of every image of a data set, in one file.

The images are processed in parts, each written completely to OUTPUT.parts and only once: a stopped run resumes from these
parts, and repeats a part that is damaged or does not match its name.  Part k belongs to process k modulo the number of
processes, which need nothing from each other until process 0 joins the parts.  A part depends only on the encoder and its
images, so the file has the same bytes however often and wherever the work was interrupted.
"""

import contextlib
import functools
import hashlib
import io
import json
import time

import jax
import numpy as np
from etils import epath

from simclr_jax import data, exporting
from simclr_jax.evaluation import embed, features
from simclr_jax.model import make_encoder
from simclr_jax.programs import trained
from simclr_jax.programs import workdir as workdir_lib
from simclr_jax.runtime import errors, files, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError
from simclr_jax.runtime.progress import duration

BATCH = 256


def run(
  encoder, spec: str, output, *, data_dir: str | None = None, images_per_part: int = 2048, overwrite: bool = False
) -> epath.Path:
  """The program `simclr embed`: h of all readable images of `spec` by a run's or an export's encoder, into `output`.

  Images are center-cropped as the encoder's own evaluation does it; BatchNorm is in inference mode.  Unreadable images
  are left out and named in OUTPUT.unreadable.txt.  Repeating a call that was stopped resumes it.

  Raises:
    ValueError: the output's ending is none of features.FORMATS, it exists already, its parts are of another encoder or data set,
      or there is no encoder or no data.
  """
  output = files.absolute(output)
  features.check_output(output)
  workdir_lib.check_outside("--output", output, spec)
  if images_per_part < 1:
    raise UserError(f"--images_per_part={images_per_part}: expected at least 1")
  if output.exists() and not overwrite:
    raise UserError(f"--output={output} exists: add --overwrite or name another file")
  if not any((files.absolute(encoder) / name).exists() for name in ("card.json", "config.json")):
    raise UserError(f"--encoder={encoder}: neither a run (config.json) nor an export (card.json)")
  start = trained.open_start(encoder)
  source = data.open_source(spec, data_dir=data_dir)
  mesh = mesh_lib.make_mesh(jax.local_devices())
  work = _Work(start, source, mesh)
  count = -(-len(source) // images_per_part)
  folder = output.parent / f"{output.name}.parts"
  settings = {
    "encoder": str(encoder), "weights": exporting.checksum(start.variables["encoder"]), "data": spec,
    "images_per_part": images_per_part, "fingerprint": source.fingerprint(),
  }  # fmt: skip
  processes.run_on_primary(lambda: _claim(folder, settings, overwrite))
  began, mine = time.monotonic(), [k for k in range(count) if k % jax.process_count() == jax.process_index()]
  todo = [k for k in mine if _read(folder, k, settings) is None]
  if len(todo) < len(mine):
    print(f"{len(mine) - len(todo):,} of {len(mine):,} parts are already there")
  for done, k in enumerate(todo, 1):
    rows = work.part(k * images_per_part, min((k + 1) * images_per_part, len(source)))
    _save(folder / f"part-{k:05}.npz", {**rows, "stamp": np.asarray(_stamp(k, settings))})
    left = (time.monotonic() - began) / done * (len(todo) - done)
    print(f"part {k + 1:,} of {count:,}, {len(rows['h']):,} images, {duration(left)} left", flush=True)
  processes.barrier("parts")
  processes.run_on_primary(lambda: _join(output, folder, count, settings))
  return output


def _claim(folder, settings, overwrite):
  plan = folder / "embed.json"
  before = settings
  if plan.exists():
    with contextlib.suppress(ValueError):  # damaged; each part knows what it is of
      before = json.loads(files.read_text(plan))
  if before != settings:
    other = ", ".join(key for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key))
    if not overwrite:
      raise UserError(f"{folder} holds parts of other settings ({other}): add --overwrite or name another --output")
    print(f"{folder} holds parts of other settings ({other}): they are made again")
    folder.rmtree()
  folder.mkdir(parents=True, exist_ok=True)
  files.write_text(plan, json.dumps(settings))


class _Work:
  """The encoder on this process's devices."""

  @errors.of_the_user()
  def __init__(self, start: trained.Start, source, mesh):
    self._source, self._mesh, self._variables = source, mesh, start.variables["encoder"]
    self._crop = embed.crop_of(start.config)
    self._apply = jax.jit(functools.partial(make_encoder(start.encoder.name, **start.encoder).apply, train=False))
    self._batch = -(-min(BATCH, len(source)) // mesh.size) * mesh.size

  def part(self, begin: int, end: int) -> dict:
    """The arrays of Features for images `begin` to before `end`, and `bad`, lines about the unreadable ones."""
    h, label, index, bad = [], [], [], []
    batches = self._crop.batches(self._source, batch_size=self._batch, max_bad_fraction=1.0, begin=begin, end=end)
    for batch in batches:
      out = np.asarray(self._apply(self._variables, mesh_lib.global_batch(self._mesh, batch["image"])))
      keep = batch["mask"]
      h.append(out[keep])
      label.append(batch["label"][keep])
      index.append(batch["index"][keep].astype(np.int64))
      bad += [self._reason(int(i)) for i in batch["index"][~keep] if i >= 0]
    index = np.concatenate(index)
    name = np.asarray([self._source.name(int(i)) for i in index], str)
    return dict(h=np.concatenate(h), name=name, label=np.concatenate(label), index=index, bad=np.asarray(bad, str))

  def _reason(self, i):
    try:
      self._source.read(i)
    except data.BadImage as reason:
      return f"{self._source.name(i)}\t{reason}"
    return f"{self._source.name(i)}\tcould not be read once"


def _stamp(k: int, settings: dict) -> str:
  return hashlib.sha256(json.dumps([k, settings], sort_keys=True).encode()).hexdigest()


def _read(folder, k: int, settings: dict) -> dict | None:
  """The arrays of part k; None where it is not there, damaged (its checksums are those of zip), or another part."""
  try:
    with (folder / f"part-{k:05}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      part = dict(arrays)
    return part if str(part.pop("stamp", "")) == _stamp(k, settings) else None
  except Exception:  # OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, ...
    return None


def _save(path, arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  files.write_bytes(path, buffer.getvalue())


def _join(output, folder, count, settings):
  """Writes the file, then deletes the parts."""
  parts = []
  for k in range(count):
    part = _read(folder, k, settings)
    if part is None:
      raise OSError(f"{folder}/part-{k:05}.npz cannot be read: run the same command again, which makes that part again")
    parts.append(part)
  bad = np.concatenate([part.pop("bad") for part in parts]).tolist()
  whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  features.write(output, features.Features(**whole, **{key: settings[key] for key in ("encoder", "weights", "data")}))
  unreadable = output.parent / f"{output.name}.unreadable.txt"
  if bad:
    files.write_text(unreadable, "".join(f"{line}\n" for line in bad))
  elif unreadable.exists():
    unreadable.unlink()
  folder.rmtree()
  n, d = whole["h"].shape
  print(f"{n:,} images, h of {d:,} dimensions: {output}")
  if bad:
    print(
      f"{len(bad):,} unreadable images left out, named in {unreadable}; the first is {bad[0].replace(chr(9), ': ')}"
    )


def main(flags, overrides) -> int:
  options = {name: getattr(flags, name) for name in ("data_dir", "images_per_part", "overwrite")}
  run(flags.encoder, flags.data, flags.output, **options)
  return 0
