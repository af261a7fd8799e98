"""The file of features that `simclr embed` writes: h of a data set with the names of its images, in one of three formats."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import safetensors
import safetensors.numpy

from simclr_jax.runtime import files
from simclr_jax.runtime.errors import UserError

FORMATS = (".npz", ".parquet", ".safetensors")
ARRAYS = ("h", "name", "label", "index")
ABOUT = ("encoder", "weights", "data")


@dataclasses.dataclass(frozen=True)
class Features:
  """n readable images of a data set, in its order.

  Attributes:
    h: float32 [n, d].
    name: n strings, the path of a file or set:number.
    label: int32 [n], -1 where there is none.
    index: int64 [n], the position of the image in the data set.
    data, encoder: what was given to `simclr embed`.
    weights: checksum of the encoder, see exporting.checksum.
  """

  h: np.ndarray
  name: np.ndarray
  label: np.ndarray
  index: np.ndarray
  data: str
  encoder: str
  weights: str = ""

  @property
  def about(self) -> dict:
    """The strings next to the arrays; `sha256` covers everything else, because two of the formats do not detect flipped bits."""
    about = {"encoder": self.encoder, "weights": self.weights, "data": self.data}
    sha = hashlib.sha256(json.dumps({key: utf8(value) for key, value in about.items()}, sort_keys=True).encode())
    for key in ("h", "label", "index"):
      array = np.ascontiguousarray(getattr(self, key))
      sha.update(f"{key} {array.dtype.str} {list(array.shape)}\n".encode())
      sha.update(array.data)
    sha.update(json.dumps([utf8(name) for name in self.name.tolist()]).encode())
    return {**about, "sha256": sha.hexdigest()}


def check_output(path):
  """Raises UserError unless a file of this name can be written."""
  suffix = files.absolute(path).suffix
  if suffix not in FORMATS:
    raise UserError(f"--output={path}: expected a file ending in {', '.join(FORMATS)}")
  if suffix == ".parquet":
    _pyarrow()


def write(path, features: Features):
  """Writes the whole file or nothing; the same features give the same bytes."""
  path = files.absolute(path)
  encode = {".npz": _npz, ".parquet": _parquet, ".safetensors": _safetensors}[path.suffix]
  files.write_bytes(path, encode(features))


def load(path) -> Features:
  """Opens a file that `simclr embed` wrote.

  Raises:
    UserError: the file does not exist, is of another kind, or is damaged.
  """
  path = files.absolute(path)
  if not path.exists() or path.is_dir() or path.suffix not in FORMATS:
    raise UserError(f"--features={path}: no such file; `simclr embed` writes one ({', '.join(FORMATS)})")
  decode = {".npz": _from_npz, ".parquet": _from_parquet, ".safetensors": _from_safetensors}[path.suffix]
  try:
    with files.local(path) as local:
      found = decode(local)
    made = Features(
      **{key: np.asarray(found.pop(key)) for key in ARRAYS}, **{key: str(found.pop(key)) for key in ABOUT}
    )
    digest = str(found.pop("sha256", made.about["sha256"]))  # the first version had none
  except Exception as error:  # zipfile.BadZipFile, EOFError, KeyError, pyarrow's own, ...
    raise UserError(f"--features={path}: not a file of simclr embed ({type(error).__name__}: {error})") from None
  if digest != made.about["sha256"] or found.keys() - {"ARROW:schema"}:
    raise UserError(f"--features={path} is damaged: it does not hold what was written; run simclr embed again")
  return made


def _npz(features) -> bytes:
  buffer = io.BytesIO()
  arrays = {key: getattr(features, key) for key in ARRAYS}
  np.savez(buffer, **arrays, **{key: np.asarray(value) for key, value in features.about.items()})
  return buffer.getvalue()


def _from_npz(local):
  with np.load(local, allow_pickle=False) as arrays:
    return dict(arrays)


def _parquet(features) -> bytes:
  arrow, parquet = _pyarrow()
  h = arrow.FixedSizeListArray.from_arrays(arrow.array(features.h.ravel()), features.h.shape[1])
  name = [utf8(name) for name in features.name.tolist()]
  table = arrow.table({"name": name, "label": features.label, "index": features.index, "h": h})
  buffer = io.BytesIO()
  about = {key: value.encode("utf-8", "surrogateescape") for key, value in features.about.items()}
  parquet.write_table(table.replace_schema_metadata(about), buffer)
  return buffer.getvalue()


def utf8(name: str) -> str:
  """A column of strings is UTF-8, which the name of a file need not be."""
  return name.encode("utf-8", "backslashreplace").decode()


def _from_parquet(local):
  table = _pyarrow()[1].read_table(local)
  found = {key: table[key].to_numpy() for key in ("name", "label", "index")}
  found["h"] = table["h"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
  return found | {
    key.decode(): value.decode("utf-8", "surrogateescape") for key, value in table.schema.metadata.items()
  }


def _safetensors(features) -> bytes:
  """There are no strings in the format: names are JSON, in a tensor of bytes, because metadata may have 100 MB at most."""
  tensors = {key: np.ascontiguousarray(getattr(features, key)) for key in ("h", "label", "index")}
  tensors["name"] = np.frombuffer(json.dumps(features.name.tolist()).encode(), np.uint8)
  content = safetensors.numpy.save(tensors, {key: utf8(value) for key, value in features.about.items()})
  # The library writes the metadata in an order that changes from process to process.
  end = 8 + int.from_bytes(content[:8], "little")
  header = json.loads(content[8:end])
  header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
  text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
  return content[:8] + text.ljust(end - 8) + content[end:]


def _from_safetensors(local):
  with safetensors.safe_open(local, "numpy") as file:
    found = {key: file.get_tensor(key) for key in file.keys()} | file.metadata()
  name = found["name"]  # the first versions had it in the metadata
  return found | {"name": np.asarray(json.loads(name if isinstance(name, str) else name.tobytes()))}


def _pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise UserError("parquet needs pyarrow: pip install pyarrow, or write .npz or .safetensors") from None
  return pyarrow, pyarrow.parquet
