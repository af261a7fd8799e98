"""A stranger's first hour, in a terminal: the commands of README.md as they stand, from a clone to the encoder in PyTorch.

  python tests/first_hour.py [--folder=DIR] [--photos=DIR]

Clones this checkout, types the commands into bash in a terminal of 80 columns, and checks after each that it ended well and
that no line was wider than the terminal, which would leave broken lines behind a progress line.  A short run in terminals of
110 and 200 columns follows.  60 photos are taken from --photos, or drawn.  What was seen is kept in DIR/terminal_COLUMNS.txt.
pip install pexpect; about 20 minutes on two cores.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pexpect
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH, OTHER_WIDTHS = 80, (110, 200)
SHORT_RUN = "simclr pretrain --config=smoke --workdir=runs/columns --overwrite --config.train_epochs=1.0 --config.evaluate.every_epochs=0.5"
END = "did-it-end"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].*?\x07")


def commands(page: str, *beginnings: str) -> list[str]:
  """The indented lines of a page that begin so, their comments dropped, in the order of the arguments."""
  lines = [line.strip() for line in (ROOT / page).read_text().splitlines() if line.startswith("    ")]
  return [next(line for line in lines if line.startswith(beginning)).split(" #")[0] for beginning in beginnings]


def photos(folder: pathlib.Path, source: str):
  """60 image files: copies of those in `source`, or textures."""
  folder.mkdir()
  if source:
    for path in sorted(p for p in pathlib.Path(source).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[
      :60
    ]:
      shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    return
  rng = np.random.default_rng(0)
  for i in range(60):
    small = Image.fromarray(rng.integers(0, 256, (4 + i % 5, 4 + i % 5, 3), np.uint8))
    small.resize((96, 80)).save(folder / f"{i}.png")


class Terminal:
  """bash in a terminal; `run` types a command."""

  def __init__(self, folder, columns: int):
    self.columns, self.record = columns, open(folder / f"terminal_{columns}.txt", "w")
    self.bash = pexpect.spawn(
      "bash", ["--norc"], cwd=str(folder), dimensions=(40, columns), encoding="utf-8", timeout=1800
    )
    self.bash.sendline("PS1='$ '; bind 'set enable-bracketed-paste off'")
    self.bash.expect(r"\$ ")

  def run(self, command: str):
    print(f"$ {command}", flush=True)
    self.bash.sendline(f"{command}\necho {END[:3]}''{END[3:]} $?")
    self.bash.expect(rf"{END} (\d+)")
    seen, code = ESCAPES.sub("", self.bash.before), int(self.bash.match[1])
    self.record.write(f"$ {command}\n{seen}\n")
    self.record.flush()
    assert code == 0, f"{command} ended with {code}:\n{seen[-3000:]}"
    again = [part for line in seen.split("\n") for part in line.rstrip("\r").split("\r")[:-1]]  # written over later
    wide = [part for part in again if len(part) > self.columns]
    assert not wide, f"{command}: {len(wide)} lines that are written over are wider than {self.columns}: {wide[0]!r}"
    return seen


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", default="")
  parser.add_argument("--photos", default="")
  args = parser.parse_args()
  folder = pathlib.Path(args.folder or tempfile.mkdtemp())
  photos(folder / "photos", args.photos)
  terminal = Terminal(folder, WIDTH)
  clone, local, activate = commands("README.md", "git clone REPOSITORY", "bash launch/local.sh", ". .venv/bin/activate")
  (quickstart,) = commands("README.md", "simclr quickstart")
  (export,) = commands("docs/python.md", "simclr export --encoder=runs/mine/encoder")
  (torch,) = commands("docs/python.md", "pip install torch")
  terminal.run(clone.replace("REPOSITORY", f"{ROOT} simclr_jax"))
  for command in (local, activate, quickstart.replace("/my/photos", str(folder / "photos"))):
    terminal.run(command)
  terminal.run(torch)
  terminal.run(export.replace("runs/mine", "runs/photos"))
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.S)
  (block,) = (code for code in blocks if "for_torch" in code)
  (folder / "simclr_jax/in_torch.py").write_text(block)
  assert "torch.Size([4, " in terminal.run("python in_torch.py")
  for columns in OTHER_WIDTHS:
    other = Terminal(folder, columns)
    for command in ("cd simclr_jax", activate, SHORT_RUN):
      other.run(command)
  head = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()
  print(
    f"every command of the pages ended well in {WIDTH} columns, and a short run in {OTHER_WIDTHS}, at {head}; seen: {folder}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
