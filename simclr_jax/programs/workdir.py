"""The folder of a run: what the programs write to it, and where their data must not be."""

import os

from etils import epath

from simclr_jax import data
from simclr_jax.runtime import checkpoint, files, processes
from simclr_jax.runtime.errors import UserError

WRITES = (  # beside checkpoint.WRITES: patterns of names at the top of a workdir
  "run.json", "data.json*", "scores.json*", "teacher.json*", "views.png", "neighbors.png", "report.html", "encoder",
  "encoder_torch", "export", "map", "probe",
  "unreadable*.txt", "quickstart.json*", "features.npz", "features.npz.parts", "features.npz.unreadable.txt",
  "downstream.*", "seed[0-9]*", "transfer", "transfer.*", "runs.html",
  ".encoder*.tmp", ".export*.tmp",  # where a process was killed while it replaced one
)  # fmt: skip
ON_DISK = tuple(kind for kind, row in data.KINDS.items() if row.is_path)  # data sets KIND:PATH


def claim(workdir, *, resume: bool, overwrite: bool, specs=(), starts=(), writes=()) -> epath.Path:
  """checkpoint.claim_workdir for a program.

  Args:
    specs: the data sets that the run reads, as in `config.data`; those on a disk must not be in the workdir.
    starts: runs and exports that it starts from, which --overwrite must not delete.
    writes: more names that the program writes in the workdir.
  """
  for start in starts if overwrite else ():
    if start and f"{os.path.realpath(start)}/".startswith(f"{os.path.realpath(workdir)}/"):
      raise UserError(
        f"--workdir={workdir} --overwrite would delete {start}, which this starts from: name another folder"
      )
  of_data = [path for spec in specs for path in paths(spec)]
  return checkpoint.claim_workdir(
    str(workdir), resume=resume, overwrite=overwrite, writes=(*WRITES, *writes), data=of_data
  )


def check_outside(flag: str, output, spec: str):
  """Raises UserError where a program would write its output, which `flag` names, into the data set that it reads, of which
  it would become an image or a class."""
  for path in paths(spec):
    if files.is_within(output, path):
      raise UserError(f"{flag}={output} is in the data set {path}, of which it would become a part: name another place")


def unreadable(workdir) -> str:
  """The file of a run that lists the unreadable training images that this process met."""
  name = f"unreadable_{processes.process_index()}.txt" if processes.is_multiprocess() else "unreadable.txt"
  return str(epath.Path(workdir) / name)


def paths(spec: str) -> list[str]:
  """The paths that a data set such as folder:/my/images is read from; none for one that is in no place of the user's."""
  kind, _, rest = spec.partition(":")
  if kind not in ON_DISK:
    return []
  return [os.path.expanduser(data.split_npz(rest)[0] if kind == "npz" else rest)]
