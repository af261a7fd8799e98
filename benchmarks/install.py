"""Time and size of an installation with each extra, in a fresh environment, downloads included.

python -m benchmarks.install [EXTRA ...]      # those of setup.py; "" is none, "arrays" the one without TensorFlow
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTRAS = ("", "arrays", "cuda12", "cuda13", "tpu", "export", "gcs", "test", "docs")


def commands(pip: str, extra: str) -> list[str]:
  """What is typed; for "arrays" the two lines of README.md."""
  if extra != "arrays":
    return [f"{pip} install '.[{extra}]'" if extra else f"{pip} install ."]
  lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
  return [line.replace("pip install", f"{pip} install") for line in lines if line.startswith(("grep -v tensorflow", "pip install --no-deps"))]  # fmt: skip


def measure(extra: str) -> tuple[float, float]:
  """(seconds, megabytes of the environment above an empty one)."""
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    empty, began = size(folder), time.monotonic()
    for command in commands(f"{folder}/bin/pip --no-cache-dir -q", extra):
      subprocess.run(command, shell=True, check=True, cwd=ROOT)
    return time.monotonic() - began, size(folder) - empty


def size(folder) -> float:
  """Megabytes on the disk."""
  done = subprocess.run(["du", "-sm", folder], check=True, capture_output=True, text=True)
  return float(re.match(r"\d+", done.stdout)[0])


if __name__ == "__main__":
  print("| extra | seconds | MB |\n|---|---|---|")
  for name in sys.argv[1:] or EXTRAS:
    seconds, megabytes = measure(name)
    print(f"| {name or 'none'} | {seconds:.0f} | {megabytes:,.0f} |", flush=True)
