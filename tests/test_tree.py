"""Who may import whom: commands stand on programs, programs on science; plumbing lies beside science and knows nothing
of it.  The rules are functions of a folder, so that each is also shown to catch a planted violation.
"""

import ast
import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "simclr_jax"

SCIENCE = {
  "augment", "augment_extra", "augment_on_device", "views", "encoder", "encoder_tpu", "vit", "projector", "model", "contrast",
  "methods", "optimizer", "accumulate", "diagnostics", "train_step",
}  # fmt: skip
EVALUATION, FLOORS = {"evaluation"}, {"data", "runtime", "report"}
TAKEAWAY = {"exporting", "importing"}
# A room -> the rooms that it may import; what is not here is a program, or the command.
MAY = {
  **{room: SCIENCE for room in SCIENCE},
  "augment": set(), "encoder": set(), "vit": set(), "contrast": {"contrast"}, "augment_on_device": set(), "projector": set(),
  "optimizer": set(), "accumulate": set(), "diagnostics": set(),
  "augment_extra": {"augment"}, "encoder_tpu": {"encoder"},
  "evaluation": SCIENCE | {"evaluation", "data", "runtime"},
  "data": {"data", "runtime.files", "runtime.errors", "runtime.watchdog"},  # none of which needs JAX
  "report": {"report", "runtime.files", "runtime.errors"},
  "runtime": {"runtime"},
  "exporting": SCIENCE | {"exporting", "runtime"},
  "importing": SCIENCE | {"importing", "exporting", "runtime"},
  "programs": SCIENCE | EVALUATION | FLOORS | TAKEAWAY | {"programs"},
  "api": SCIENCE | EVALUATION | FLOORS | TAKEAWAY | {"programs"},
  "__main__": {"programs", "runtime"},
  "__init__": {"api", "runtime.cpu"},
}  # fmt: skip
LIFTABLE = {  # these go into another repository alone: their libraries
  "augment": {"tensorflow", "numpy"},
  "augment_on_device": {"jax", "numpy"},
  "encoder": {"jax", "flax", "numpy"},
  "vit": {"jax", "flax", "numpy"},
  "projector": {"jax", "flax", "numpy"},
  "contrast": {"jax", "numpy"},
  "optimizer": {"jax", "optax", "numpy"},
  "accumulate": {"jax", "flax", "numpy"},
  "diagnostics": {"jax", "numpy"},
}
STANDARD = {"re", "math", "functools", "typing", "dataclasses", "collections", "itertools"}
# Words that would mean that the runtime knows what is trained.
SCIENCE_WORDS = re.compile(
  r"nt[-_ ]?xent|contrastive|projector\.|projection head|\bknn\b|\bviews?\b|augment|resnet|simclr(?!_jax|_HANG|[/:]| [a-z]+`)|base_lr"
  r"|\bz\b|temperature",
  re.IGNORECASE,
)


def files(package):
  return sorted(p for p in package.rglob("*.py") if "loaders" not in p.parts)


def module_of(path, package):
  parts = path.relative_to(package).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path):
  """[(line, dotted module)] of all imports of a file, inside functions and through importlib too."""
  out = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      out += [(node.lineno, name.name) for name in node.names]
    elif isinstance(node, ast.ImportFrom):
      out += [(node.lineno, "." * node.level + (node.module or "") + "." + name.name) for name in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
      argument = node.args[0]
      if isinstance(argument, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "*" for part in argument.values)
      else:
        text = argument.value if isinstance(argument, ast.Constant) else "*"
      out.append((node.lineno, text))
  return out


def ours(path, package):
  """[(line, module of this package without its name)] that a file imports."""
  known = {module_of(p, package) for p in files(package)}
  found = []
  for line, name in imports(path):
    root, _, rest = name.partition(".")
    if root != "simclr_jax":
      continue
    if rest == "__version__":
      continue
    # `from a import b`: b is a module or a name of a.
    found.append((line, rest if rest in known or "*" in rest else rest.rpartition(".")[0] or rest))
  return found


def allowed(room, module):
  return any(module == one or module.startswith(f"{one}.") for one in MAY[room])


def wrong_imports(package):
  faults = []
  for path in files(package):
    room = module_of(path, package).partition(".")[0]
    for line, module in ours(path, package):
      if not module or module == "__init__":
        continue  # the package itself: its version
      if room not in MAY or not allowed(room, module):
        faults.append(f"{path.relative_to(package)}:{line} imports {module}")
  return faults


def relative_imports(package):
  return [f"{p.name}:{line}" for p in files(package) for line, name in imports(p) if name.startswith(".")]


def circles(package):
  """The modules that import each other in a circle, at whatever place in the file."""
  known = {module_of(p, package): p for p in files(package)}
  edges = {name: {m for _, m in ours(path, package) if m in known and m != name} for name, path in known.items()}
  edges.pop("__init__", None)

  def reaches(start):
    seen, todo = set(), [start]
    while todo:
      for follower in edges.get(todo.pop(), ()):
        if follower not in seen:
          seen.add(follower)
          todo.append(follower)
    return seen

  return sorted(name for name in edges if name in reaches(name))


def foreign_libraries(package):
  faults = []
  for room, libraries in LIFTABLE.items():
    paths = files(package / room) if (package / room).is_dir() else [package / f"{room}.py"]
    for path in paths:
      roots = {name.partition(".")[0] for _, name in imports(path)} - {"simclr_jax"}
      faults += [f"{room} imports {name}" for name in sorted(roots - libraries - STANDARD)]
  return faults


def science_in_the_runtime(package):
  faults = []
  for path in files(package / "runtime"):
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if found := SCIENCE_WORDS.search(line):
        faults.append(f"{path.name}:{number} {found[0]!r}: {line.strip()}")
  return faults


def unpickling(package):
  faults = []
  for path in package.rglob("*.py"):
    roots = {name.partition(".")[0] for _, name in imports(path)}
    if roots & {"pickle", "dill", "cloudpickle", "joblib", "shelve"} or "allow_pickle=True" in path.read_text():
      faults.append(str(path))
  return faults


def defaults_in_science(package):
  """`config.get(key, default)` and the like: a default outside of the typed config."""
  pattern = re.compile(r"\b(config|c)(\.\w+)*\.get\(")
  rooms = [p for p in files(package) if module_of(p, package).partition(".")[0] in SCIENCE | {"programs", "evaluation"}]
  return [f"{p.name}: {m[0]}" for p in rooms if module_of(p, package) != "programs.runs" for m in pattern.finditer(p.read_text())]  # fmt: skip


RULES = {
  wrong_imports: ("contrast/nt_xent.py", "from simclr_jax.runtime import mesh\n"),
  relative_imports: ("data/order.py", "from . import sources\n"),
  circles: ("data/sources.py", "def late():\n  from simclr_jax.data import shards\n"),
  foreign_libraries: ("encoder.py", "import optax\n"),
  science_in_the_runtime: ("runtime/mesh.py", "# Lower optimizer.base_lr if NT-Xent diverges.\n"),
  unpickling: ("report/charts.py", "import pickle\n"),
  defaults_in_science: ("optimizer.py", 'def f(config):\n  return config.optimizer.get("momentum", 0.9)\n'),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
  assert rule(PACKAGE) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_planted_violation_is_found(rule, tmp_path):
  copy = tmp_path / "simclr_jax"
  shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
  file, text = RULES[rule]
  (copy / file).write_text((copy / file).read_text() + text)
  assert rule(copy)


@pytest.mark.parametrize(
  "file, text",
  [
    ("augment.py", "from simclr_jax import data\n"),
    ("methods/simclr.py", "def late():\n  import importlib\n  return importlib.import_module('simclr_jax.report')\n"),
    ("runtime/loop.py", "from simclr_jax import contrast\n"),
    ("data/order.py", "from simclr_jax.runtime import mesh\n"),
    ("report/charts.py", "from simclr_jax import data\n"),
    ("evaluation/knn.py", "from simclr_jax.programs import pretrain\n"),
    ("evaluation/knn.py", "from simclr_jax import report\n"),
    ("exporting/__init__.py", "import simclr_jax.programs.export\n"),
    ("encoder.py", "from simclr_jax import projector\n"),
  ],
)
def test_every_floor_is_watched(file, text, tmp_path):
  copy = tmp_path / "simclr_jax"
  shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
  (copy / file).write_text((copy / file).read_text() + text)
  assert len(wrong_imports(copy)) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_import_nothing_of_ours(path):
  assert {name.partition(".")[0] for _, name in imports(path)} <= {"ml_collections"}


def test_every_room_has_a_rule():
  rooms = {module_of(p, PACKAGE).partition(".")[0] for p in files(PACKAGE)}
  assert rooms <= set(MAY), rooms - set(MAY)
