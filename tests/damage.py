"""Damage to every file that a program reads again: it must be read as what was written, or be named in one line.

  python tests/damage.py [--rounds=100] [--kinds=features]

In a trial one file is damaged at random: a bit flipped, cut, emptied, deleted, 64 bytes zeroed, or the content of another
file of the same kind put in its place.  A trial fails if something else is read ("silent"), or if anything but a ValueError
or an OSError of one line comes of it ("crash").  Exit code 1 if any did.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import os
import pathlib
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

ACCIDENTS = ("a bit flipped", "cut", "emptied", "deleted", "zeroed", "exchanged")


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file.

  Attributes:
    make: (folder, number) -> the folder's file or folder; files with other numbers have other contents.
    read: what `make` returned -> bytes, equal where the same was read.
    accidents: those of ACCIDENTS that it can notice.
  """

  make: Callable[[pathlib.Path, int], pathlib.Path]
  read: Callable[[pathlib.Path], bytes]
  accidents: tuple = ACCIDENTS


def kinds() -> dict[str, Kind]:
  import jax
  import numpy as np
  import tiny
  from images import encoded

  import simclr_jax
  from simclr_jax import data, exporting
  from simclr_jax.data import shards
  from simclr_jax.evaluation import features
  from simclr_jax.model import make_encoder
  from simclr_jax.programs import same
  from simclr_jax.runtime import checkpoint, files, lock, loop

  def digest(*arrays):
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
      found.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())
    return found.digest()

  def sealed(name, text, read):
    def make(folder, number):
      files.write_sealed(folder / name, text(number))
      return folder

    return Kind(make, lambda folder: repr(read(folder)).encode())

  def embedded(ending):
    def make(folder, number):
      rng = np.random.default_rng(number)
      names = np.asarray([f"images/{number}/{i}.png" for i in range(8)])
      h = rng.normal(size=(8, 4)).astype(np.float32)
      made = features.Features(h, names, np.arange(8, dtype=np.int32), np.arange(8), "files:x", "e", "w")
      features.write(folder / f"h{ending}", made)
      return folder / f"h{ending}"

    def read(path):
      found = features.load(path)
      return digest(found.h, found.label, found.index) + repr((found.name.tolist(), found.about)).encode()

    return Kind(make, read, ACCIDENTS[:-1])  # another whole file is another file

  def data_set(kind, make):
    """Read as a run reads it that is resumed, and compares its data with those that it began with."""
    begun = {}

    def read(path):
      source = data.open_source(f"{kind}:{path}")
      pixels = [source.read(i) for i in range(len(source))]
      number = 1 if "one" in str(path.relative_to(path.parents[1])) else 2
      changed = same.difference(begun.setdefault(number, source.fingerprint()), source.fingerprint())
      if changed:
        raise ValueError(changed)
      return digest(*pixels, source.labels)

    return Kind(make, read)

  def pictures(number):
    return np.random.default_rng(number).integers(0, 256, (4, 6, 6, 3), np.uint8)

  def npz(folder, number):
    np.savez(folder / "a.npz", images=pictures(number), labels=np.arange(4))
    return folder / "a.npz"

  def tfrecord(folder, number):
    rows = [(encoded(image, "PNG"), i, f"{number}/{i}") for i, image in enumerate(pictures(number))]
    shards.write_tfrecord(str(folder / "a.tfrecord"), rows)
    return folder / "a.tfrecord"

  def tar(folder, number):
    with tarfile.open(folder / "a.tar", "w") as file:
      for i, image in enumerate(pictures(number)):
        for ending, content in (("png", encoded(image, "PNG")), ("cls", f"{i}".encode())):
          member = tarfile.TarInfo(f"{number}/{i}.{ending}")
          member.size = len(content)
          file.addfile(member, io.BytesIO(content))
    return folder / "a.tar"

  def png(folder, number):
    for i, image in enumerate(pictures(number)):
      (folder / "a" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
      (folder / "a" / f"{i % 2}" / f"{i}.png").write_bytes(encoded(image, "PNG"))
    return folder / "a"

  config = tiny.config()

  def variables(number):
    shapes = jax.eval_shape(
      make_encoder(config.encoder.name, **config.encoder).init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)
    )
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)

  def export(folder, number):
    exporting.write(folder / "encoder", variables(number), config, scores={}, step=number)
    return folder / "encoder"

  def load_encoder(folder):
    _, read, card = simclr_jax.load_encoder(folder)
    return digest(*jax.tree.leaves(read)) + repr(card).encode()

  def step(folder, number):
    checkpoint.claim_workdir(folder / "run", resume=True, overwrite=False)
    manager = checkpoint.Checkpoints(folder / "run")
    manager.save(number, {"w": np.full((8, 8), number)}, {}, "{}", {"recent_losses": [float(number)]})
    manager.close()
    lock.release(folder / "run")
    return folder / "run"

  def read_step(folder):
    """As a run that is resumed, which writes RUN again from what the steps say where somebody has deleted it."""
    try:
      checkpoint.claim_workdir(folder, resume=True, overwrite=False)
    finally:
      lock.release(folder)
    return checkpoint.run_id(folder).encode() + digest(*jax.tree.leaves(checkpoint.read_run_state(folder)))

  return {
    "config.json of a run": sealed("config.json", lambda i: f'{{"seed": {i}}}', checkpoint.read_config),
    "skipped.json of a run": sealed("skipped.json", lambda i: f"[[{i}, 7]]", lambda f: loop._Skipped(f)._rows),
    "RUN and a step of a run": Kind(step, read_step),
    "an exported folder": Kind(export, load_encoder),
    "features, .npz": embedded(".npz"),
    "features, .safetensors": embedded(".safetensors"),
    "features, .parquet": embedded(".parquet"),
    "data, .npz": data_set("npz", npz),
    "data, .tfrecord": data_set("tfrecord", tfrecord),
    "data, .tar": data_set("webdataset", tar),
    "data, folder of .png": data_set("folder", png),
  }


def damage(rng, whole, other, how):
  """The bytes of a file after an accident; `other` is another file of its kind.  None: there is no file any more."""
  content = bytearray(whole)
  place = rng.randrange(len(content))
  if how == "a bit flipped":
    content[place] ^= 1 << rng.randrange(8)
  elif how == "cut":
    del content[place:]
  elif how == "zeroed":
    content[place : place + 64] = bytes(len(content[place : place + 64]))
  return {"emptied": b"", "deleted": None, "exchanged": other}.get(how, bytes(content))


def trial(rng, kind, folder, caches):
  """(how a file was damaged, its name, "same", "named", "silent: …" or "crash: …")."""
  for name in caches:
    shutil.rmtree(name, ignore_errors=True)
  folders = [folder / "one", folder / "two"]
  for old in folders:
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder / f"{old.name}.whole", old)
  files = sorted(p for p in folders[0].rglob("*") if p.is_file() and p.stat().st_size)
  file, how = rng.choice(files), rng.choice(kind.accidents)
  other = folders[1] / file.relative_to(folders[0])
  other = other.read_bytes() if other.exists() else b"?"
  content = damage(rng, file.read_bytes(), other, how)
  file.unlink() if content is None else file.write_bytes(content)
  return how, str(file.relative_to(folders[0])), folders[0]


def judge(kind, path, expected):
  from simclr_jax.data import BadImage

  try:
    found = kind.read(path)
  except (ValueError, OSError, BadImage) as error:
    return "named" if "\n" not in str(error).strip() else f"crash: {str(error)[:200]!r}"
  except Exception as error:
    return f"crash: {type(error).__name__} {str(error)[:200]!r}"
  return "same" if found == expected else "silent"


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=100, help="trials of every kind")
  parser.add_argument("--kinds", default="", help="those whose name contains this")
  args = parser.parse_args(argv)
  here = pathlib.Path(__file__).resolve().parent
  sys.path[:0] = [str(here), str(here.parent)]
  os.environ["JAX_PLATFORMS"] = "cpu"
  failed, slowest = 0, 0.0
  print("| file | trials | read as written | named | silent | crash |\n|---|---|---|---|---|---|")
  with tempfile.TemporaryDirectory() as scratch:
    os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
    for name, kind in kinds().items():
      if args.kinds not in name:
        continue
      folder = pathlib.Path(scratch) / "kind"
      made = []
      for i, whole in enumerate(("one.whole", "two.whole"), 1):
        (folder / whole).mkdir(parents=True)
        made.append(kind.make(folder / whole, i))
      expected = [kind.read(path) for path in made]
      count = collections.Counter()
      for seed in range(args.rounds):
        rng = random.Random(f"{name} {seed}")
        how, file, where = trial(rng, kind, folder, [f"{scratch}/cache"])
        began = time.monotonic()
        verdict = judge(kind, where / made[0].relative_to(folder / "one.whole"), expected[0])
        slowest = max(slowest, time.monotonic() - began)
        count[verdict.partition(":")[0]] += 1
        if verdict not in ("same", "named"):
          print(f"FAIL {name}, seed {seed}: {file} {how}: {verdict}", file=sys.stderr)
      failed += count["silent"] + count["crash"]
      print(
        f"| {name} | {args.rounds} | " + " | ".join(str(count[k]) for k in ("same", "named", "silent", "crash")), "|"
      )
      shutil.rmtree(folder)
  print(f"\n{failed} failed; the longest took {slowest:.1f} s")
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
