"""Who may import whom: science stands on top and never imports the runtime; the runtime never imports science."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "simclr_jax"
LIBRARIES_OF = {
  "augment": {"tensorflow", "numpy"},
  "augment_on_device": {"jax", "flax", "optax", "numpy"},
  "encoder": {"jax", "flax", "optax", "numpy", "typing"},
  "projector": {"jax", "flax", "optax", "numpy", "typing"},
  "contrast": {"jax", "flax", "optax", "numpy"},
  "optimizer": {"jax", "flax", "optax", "numpy"},
  "diagnostics": {"jax", "flax", "optax", "numpy"},
}
STANDARD = {"re", "math", "functools", "typing", "dataclasses", "collections", "itertools"}


def imports(path):
  """Every dotted module that a file imports, also inside functions; `from a import b` counts as a and a.b."""
  out = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      out |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom):
      # transformers wants one in what it loads from a folder.
      assert node.level == 0 or path.parent.name == "loaders", f"{path}: relative import"
      out |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
  return out


@pytest.mark.parametrize("module", LIBRARIES_OF)
def test_science_stands_alone(module):
  roots = {name.partition(".")[0] for name in imports(PACKAGE / f"{module}.py")}
  assert roots <= LIBRARIES_OF[module] | STANDARD, f"{module} imports {roots - LIBRARIES_OF[module] - STANDARD}"


def test_model_imports_only_encoder_and_projector():
  ours = {name for name in imports(PACKAGE / "model.py") if name.count(".") == 1 and name.startswith("simclr_jax")}
  assert ours == {"simclr_jax.encoder", "simclr_jax.projector"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "runtime").glob("*.py")), ids=lambda p: p.stem)
def test_runtime_never_imports_science(path):
  ours = {name for name in imports(path) if name.startswith("simclr_jax")}
  assert all(name.startswith("simclr_jax.runtime") for name in ours), f"{path.stem} imports {ours}"


SIMCLRS_OWN = re.compile(
  r"ntxent|nt_xent|nt-xent|contrastive|knn|views|augment|encoder|projection|resnet|batchnorm", re.I
)


@pytest.mark.parametrize(
  "path",
  [p for p in sorted((PACKAGE / "runtime").glob("*.py")) if p.stem not in ("config", "loop")],
  ids=lambda p: p.stem,
)
def test_runtime_knows_nothing_of_what_is_trained(path):
  assert not SIMCLRS_OWN.findall(path.read_text())


def test_files_imports_only_libraries():
  """What data and report may import of runtime."""
  assert not {name for name in imports(PACKAGE / "runtime" / "files.py") if name.startswith("simclr_jax")}


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_import_nothing_of_ours(path):
  assert imports(path) <= {"ml_collections"}


def test_nothing_unpickles():
  """Checkpoints and arrays are data, never code."""
  for path in PACKAGE.rglob("*.py"):
    found = {name.partition(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert not found and "allow_pickle=True" not in path.read_text(), path
