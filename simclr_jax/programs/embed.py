"""`simclr embed`: h of every image of a data set, in one file.

The images are worked off in parts, each written whole to OUTPUT.parts and never made again: a run that was stopped
goes on there.  Part k belongs to process k modulo the number of processes, which need nothing from each other until
process 0 joins the parts.  A part is a function of the encoder and its images alone, so the file has the same bytes
however often and wherever the work was interrupted.
"""

import dataclasses
import functools
import io
import json
import os
import time

import jax
import numpy as np
from etils import epath

from simclr_jax import data, exporting
from simclr_jax.encoder import resnet
from simclr_jax.evaluation import embed
from simclr_jax.programs import trained
from simclr_jax.runtime import checkpoint, processes
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.metrics import duration

FORMATS = (".npz", ".parquet", ".safetensors")
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Features:
  """What a file of features holds: n readable images of the data set named `data`, in its order.

  h float32 [n, d]; name: n strings, the path of a file or set:number; label int32 [n], -1 where there is none; index
  int64 [n], its number in the data set.
  """

  h: np.ndarray
  name: np.ndarray
  label: np.ndarray
  index: np.ndarray
  data: str
  encoder: str


def run(
  encoder, spec: str, output, *, data_dir: str | None = None, images_per_part: int = 2048, overwrite: bool = False
) -> epath.Path:
  """The program `simclr embed`: h of all readable images of `spec` by a run's or an export's encoder, into `output`.

  Images are centre-cropped as the encoder's own evaluation does it; BatchNorm is in inference mode.  Unreadable images
  are left out and named in OUTPUT.unreadable.txt.  A call that was stopped is gone on with by the same call.

  Raises:
    ValueError: the output's ending is none of FORMATS, it exists already, its parts are of another encoder or data set,
      or there is no encoder or no data.
  """
  output = checkpoint.absolute(output)
  if output.suffix not in FORMATS:
    raise ValueError(f"--output={output}: expected a file ending in {', '.join(FORMATS)}")
  if output.suffix == ".parquet":
    _pyarrow()
  if images_per_part < 1:
    raise ValueError(f"--images_per_part={images_per_part}: expected at least 1")
  if output.exists() and not overwrite:
    raise ValueError(f"--output={output} exists: add --overwrite or name another file")
  if not any((epath.Path(encoder) / name).exists() for name in ("card.json", "config.json")):
    raise ValueError(f"--encoder={encoder}: neither a run (config.json) nor an export (card.json)")
  start = trained.open_start(encoder)
  source = data.open_source(spec, data_dir=data_dir)
  mesh = mesh_lib.make_mesh(jax.local_devices())
  work = _Work(start, source, mesh)
  count = -(-len(source) // images_per_part)
  folder = output.parent / f"{output.name}.parts"
  settings = {
    "encoder": str(encoder), "weights": exporting.checksum(start.variables["encoder"]), "data": spec, "images": len(source),
    "images_per_part": images_per_part,
  }  # fmt: skip
  processes.on_first(lambda: _claim(folder, settings))
  began, mine = time.monotonic(), [k for k in range(count) if k % jax.process_count() == jax.process_index()]
  todo = [k for k in mine if not (folder / f"part-{k:05}.npz").exists()]
  if len(todo) < len(mine):
    print(f"{len(mine) - len(todo):,} of {len(mine):,} parts are there already")
  for done, k in enumerate(todo, 1):
    rows = work.part(k * images_per_part, min((k + 1) * images_per_part, len(source)))
    _save(folder / f"part-{k:05}.npz", rows)
    left = (time.monotonic() - began) / done * (len(todo) - done)
    print(f"part {k + 1:,} of {count:,}, {len(rows['h']):,} images, {duration(left)} left", flush=True)
  processes.meet("parts")
  processes.on_first(lambda: _join(output, folder, count, settings))
  return output


def _claim(folder, settings):
  plan = folder / "embed.json"
  if plan.exists() and json.loads(plan.read_text()) != settings:
    raise ValueError(f"{folder} holds parts of other settings ({plan.read_text()}): delete it or name another --output")
  folder.mkdir(parents=True, exist_ok=True)
  checkpoint.write_text(plan, json.dumps(settings))


class _Work:
  """The encoder on this process's devices."""

  def __init__(self, start: trained.Start, source, mesh):
    self._source, self._mesh, self._variables = source, mesh, start.variables["encoder"]
    self._crop = embed.crop_of(start.config)
    self._apply = jax.jit(functools.partial(resnet(**start.encoder).apply, train=False))
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


def _save(path, arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  checkpoint.write_bytes(path, buffer.getvalue())


def _join(output, folder, count, settings):
  """Writes the file, then deletes the parts."""
  parts = []
  for k in range(count):
    with (folder / f"part-{k:05}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      parts.append(dict(arrays))
  bad = np.concatenate([part.pop("bad") for part in parts]).tolist()
  whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  about = {key: settings[key] for key in ("encoder", "weights", "data")}
  checkpoint.write_bytes(
    output, {".npz": _npz, ".parquet": _parquet, ".safetensors": _safetensors}[output.suffix](whole, about)
  )
  unreadable = output.parent / f"{output.name}.unreadable.txt"
  if bad:
    checkpoint.write_text(unreadable, "".join(f"{line}\n" for line in bad))
  elif unreadable.exists():
    unreadable.unlink()
  folder.rmtree()
  n, d = whole["h"].shape
  print(f"{n:,} images, h of {d:,} dimensions: {output}")
  if bad:
    print(
      f"{len(bad):,} unreadable images left out, named in {unreadable}; the first is {bad[0].replace(chr(9), ': ')}"
    )


def _npz(arrays, about) -> bytes:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays, **{key: np.asarray(value) for key, value in about.items()})
  return buffer.getvalue()


def _parquet(arrays, about) -> bytes:
  arrow, parquet = _pyarrow()
  h = arrow.FixedSizeListArray.from_arrays(arrow.array(arrays["h"].ravel()), arrays["h"].shape[1])
  table = arrow.table({"name": arrays["name"].tolist(), "label": arrays["label"], "index": arrays["index"], "h": h})
  buffer = io.BytesIO()
  parquet.write_table(table.replace_schema_metadata({**about}), buffer)
  return buffer.getvalue()


def _safetensors(arrays, about) -> bytes:
  """8 bytes little-endian with the length of the header, a JSON header, the data (github.com/huggingface/safetensors).

  There are no strings in the format: names stand in the metadata, as JSON.
  """
  header, end = {"__metadata__": {**about, "name": json.dumps(arrays["name"].tolist())}}, 0
  tensors = {"h": arrays["h"], "index": arrays["index"], "label": arrays["label"]}
  for name, x in tensors.items():
    kind = {"float32": "F32", "int32": "I32", "int64": "I64"}[x.dtype.name]
    header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [end, end := end + x.nbytes]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return b"".join([len(text).to_bytes(8, "little"), text, *(x.tobytes() for x in tensors.values())])


def _pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ValueError("parquet needs pyarrow: pip install pyarrow, or write .npz or .safetensors") from None
  return pyarrow, pyarrow.parquet


def load(path) -> Features:
  """Opens a file that `simclr embed` wrote.

  Raises:
    ValueError: there is none, or it is something else.
  """
  path = checkpoint.absolute(path)
  if not path.is_file() or path.suffix not in FORMATS:
    raise ValueError(f"--features={path}: no such file; `simclr embed` writes one ({', '.join(FORMATS)})")
  try:
    if path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as arrays:
        found = dict(arrays)
    elif path.suffix == ".parquet":
      table = _pyarrow()[1].read_table(os.fspath(path))
      found = {key: table[key].to_numpy() for key in ("name", "label", "index")}
      found["h"] = table["h"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
      found |= {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    else:
      content = path.read_bytes()
      end = 8 + int.from_bytes(content[:8], "little")
      header = json.loads(content[8:end])
      found = header.pop("__metadata__")
      found["name"] = np.asarray(json.loads(found["name"]))
      for name, one in header.items():
        kind = {"F32": np.float32, "I32": np.int32, "I64": np.int64}[one["dtype"]]
        first, last = one["data_offsets"]
        found[name] = np.frombuffer(content[end + first : end + last], kind).reshape(one["shape"])
    return Features(
      *(np.asarray(found[key]) for key in ("h", "name", "label", "index")), str(found["data"]), str(found["encoder"])
    )
  except Exception as error:  # zipfile.BadZipFile, EOFError, KeyError, pyarrow's own, ...
    raise ValueError(f"--features={path}: not a file of simclr embed ({type(error).__name__}: {error})") from None
