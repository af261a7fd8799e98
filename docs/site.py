"""Hooks of mkdocs.yml: README.md and CONTRIBUTING.md become pages, and the public names a reference of their docstrings."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = {
  "In Python": ("api.pretrain", "api.embed", "api.probe", "exporting.load_encoder", "importing.official.load"),
  "Contrastive losses": ("contrast.nt_xent", "contrast.nt_xent_tiled", "contrast.relatives"),
  "Network": ("encoder.resnet", "projector.Projector", "model.SimCLR"),
  "Training": ("train_step.train_step", "optimizer.lars", "optimizer.learning_rate", "methods.Method"),
  "Augmentation": ("augment", "views.pipeline"),
  "Evaluation": ("evaluation.knn", "evaluation.linear"),
}


def _from_docs(text: str) -> str:
  """The text of a page at the top of the checkout, its links as seen from docs/."""
  return re.sub(r"\]\(docs/", "](", text)


def _reference() -> str:
  lines = ["# Python reference", "", "Shapes are in brackets; n is the global batch, d a width."]
  for title, names in PUBLIC.items():
    lines += ["", f"## {title}", *(f"\n::: simclr_jax.{name}" for name in names)]
  return "\n".join(lines)


def on_files(files, config):
  made = {
    "index.md": _from_docs((ROOT / "README.md").read_text()),
    "contributing.md": _from_docs((ROOT / "CONTRIBUTING.md").read_text()),
    "reference.md": _reference(),
  }
  for name, content in made.items():
    files.append(File.generated(config, name, content=content))
  return files
