"""Sentences that readers stumbled over do not come back."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
INSTEAD = {  # regular expression: what to write
  r"head is thrown away": "After training, discard the projection head and keep the encoder.",
  r"without a label and in": "with no labels, the encoder features reach",
  r"right here that usually": "Correctness guarantees",
  r"image on the wire": "no images in cross-device traffic",
  r"ends in the same bits": "Resuming a killed run is bit-exact.",
  r"follows by its rule": "the learning rate rescales automatically",
  r"before you book": "Before reserving a pod, estimate its cost.",
  r"what one does with h": "Downstream tasks",
  r"(is|are) worked off": "is split into `microbatches` chunks",
  r"in the place of the state": "Restores the latest checkpoint and skips the batches that followed it.",
  r"turned round": "flipped",
  r"\b(goes|go|going|went) on where": "resumes",
  r"(?<!there )is no (export|run|folder|file|image|number|plain|multiple|checkpoint|data set)": "is not a ...",
  r"\bno plain tar": "not a plain tar file",
  r"\ba share of|which share\b": "a fraction of",
  r"least to most": "(min–max)",
  r"\bso many\b": "the name of the number",
}


def prose():
  """(file, text) of pages, recipes, scripts, and the sources with their messages and docstrings."""
  folders = [ROOT / name for name in ("benchmarks", "configs", "docs", "launch", "simclr_jax")]
  for path in sorted([*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]):
    if path.suffix in (".md", ".py", ".sh", ".yml", ".yaml", ".html", ".js", ".sbatch"):
      yield path.relative_to(ROOT), re.sub(r"\s*\n[ #]*", " ", path.read_text())


def test_sentences_that_were_replaced_do_not_come_back():
  found = [
    f"{name}: ...{text[max(0, match.start() - 40) : match.end() + 40]}...  Write: {better}"
    for name, text in prose()
    for pattern, better in INSTEAD.items()
    for match in re.finditer(pattern, text, re.IGNORECASE)
  ]
  assert not found, "\n".join(found)
