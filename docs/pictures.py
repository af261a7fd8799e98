"""Makes the pictures of these pages from runs of this machine.

  python docs/pictures.py [--runs=runs/pictures] [report map quickstart runs claims]

Runs that are not there are made: `smoke` and a quickstart, about a quarter of an hour on two cores, and for `report` the
recipe cifar10_cpu, an hour or two.  `claims` is drawn from the numbers in benchmarks/claims.  It needs chromium.
pictures.json keeps what each picture was drawn with, and tests/test_docs.py says when that has changed since.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
REPORT = ROOT / "simclr_jax/report"
KEPT = DOCS / "pictures.json"
CLAIMS = ROOT / "benchmarks/claims/full/claims.json"
# Picture -> the files that draw what it shows.
DRAWN_WITH = {
  "report": (
    "templates/base.html",
    "templates/macros.html",
    "templates/report.html",
    "style.css",
    "charts.py",
    "colors.py",
  ),
  "map": ("map.py", "colors.py"),
  "quickstart": (
    "templates/base.html",
    "templates/macros.html",
    "templates/report.html",
    "style.css",
    "map.py",
    "colors.py",
  ),
  "runs": (
    "templates/base.html",
    "templates/macros.html",
    "templates/runs.html",
    "style.css",
    "charts.py",
    "colors.py",
  ),
  "claims": (
    "templates/base.html",
    "templates/macros.html",
    "templates/claims.html",
    "style.css",
    "charts.py",
    "colors.py",
  ),
}


def drawn_with(picture: str) -> str:
  """A hash of the files that draw a picture."""
  total = hashlib.sha256()
  for name in DRAWN_WITH[picture]:
    total.update((REPORT / name).read_bytes())
  return total.hexdigest()[:16]


def simclr(*words):
  subprocess.run([sys.executable, "-m", "simclr_jax", *words], cwd=ROOT, check=True)


def screenshot(page: pathlib.Path, picture: str, width: int, height: int):
  with tempfile.TemporaryDirectory() as profile:
    command = [
      "chromium",
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--hide-scrollbars",
      f"--user-data-dir={profile}",
    ]
    size = [f"--window-size={width},{height}", "--virtual-time-budget=5000"]
    shot = f"--screenshot={DOCS / picture}.png"
    subprocess.run([*command, *size, shot, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)


def photos(runs: pathlib.Path) -> pathlib.Path:
  folder = runs.resolve() / "photos"
  if not folder.exists():
    import images

    images.folder(folder)
  return folder


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--runs", default="runs/pictures", metavar="DIR")
  parser.add_argument("pictures", nargs="*", default=list(DRAWN_WITH), metavar="PICTURE")
  args = parser.parse_args()
  runs, kept = ROOT / args.runs, json.loads(KEPT.read_text()) if KEPT.exists() else {}
  smoke, quickstart, photographs = (runs / name for name in ("smoke", "quickstart", "photographs"))
  runs.mkdir(parents=True, exist_ok=True)
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  for recipe, run, shown in (("cifar10_cpu", photographs, {"report"}), ("smoke", smoke, {"map", "runs"})):
    if not (run / "COMPLETE").exists() and shown & set(args.pictures):
      simclr("pretrain", f"--config={recipe}", f"--workdir={run}", "--resume")
  if not (quickstart / "COMPLETE").exists() and {"quickstart", "runs"} & set(args.pictures):
    simclr("quickstart", str(photos(runs)), f"--workdir={quickstart}", "--resume")
  for picture in args.pictures:
    if picture == "report":
      screenshot(photographs / "report.html", "report", 880, 1775)
    elif picture == "map":
      simclr("map", f"--workdir={smoke}")
      shutil.copy(smoke / "map/map.png", DOCS / "map.png")
    elif picture == "quickstart":
      screenshot(quickstart / "report.html", "quickstart", 1000, 1960)
      screenshot(quickstart / "report.html", "quickstart_phone", 500, 1700)
    elif picture == "claims":
      from simclr_jax.programs import claims

      claims.write_page(runs / "claims.html", json.loads(CLAIMS.read_text()))
      screenshot(runs / "claims.html", "claims", 1000, 1500)
    else:
      simclr("runs", str(runs))
      screenshot(runs / "runs.html", "runs", 1100, 1000)
    kept[picture] = drawn_with(picture)
    KEPT.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"docs/{picture}.png", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
