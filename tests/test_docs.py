"""What the pages say: every command is one that the program takes, and runs; every Python block runs; every link leads somewhere.

Commands and blocks are taken from the pages themselves.  What they name stands in for itself on a small scale: STAND_INS maps
a path of the pages to one of a few images, and SHORTER makes a training command end after a few steps.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from simclr_jax import __main__ as cli
from simclr_jax.programs import config as config_lib

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
  """(page, words) of every `simclr ...` of an indented block, continued lines joined, comments dropped."""
  found = []
  for page in PAGES:
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.S)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
      if re.match(r" {4,}simclr ", line):
        found.append((page.name, shlex.split(line, comments=True)[1:]))
  return found


def blocks():
  """(page, source) of every Python block."""
  return [
    (page.name, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
  ]


COMMANDS, BLOCKS = commands(), blocks()


def test_something_is_found():
  assert len(COMMANDS) > 30 and {words[0] for _, words in COMMANDS} >= set(cli.COMMANDS) - {"map"}
  assert len(BLOCKS) >= 5


@pytest.mark.parametrize("page, words", COMMANDS, ids=[f"{page}-{' '.join(words)[:50]}" for page, words in COMMANDS])
def test_every_command_is_one_that_the_program_takes(page, words):
  overrides = [word for word in words if word.startswith("--config.")]
  flags = cli.parser().parse_args([word for word in words if not word.startswith("--config.")])
  if getattr(flags, "config", None):
    config_lib.load(flags.config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text())):
    if "://" not in target:
      assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_script_that_a_page_names_exists():
  for page in PAGES:
    for path in re.findall(r"(?:bash |`)((?:launch|tests|configs|benchmarks)/[\w./]+\.\w+)", page.read_text()):
      assert (ROOT / path).exists(), f"{page.name}: {path}"
    for module in re.findall(r"python -m (benchmarks[.\w]+)", page.read_text()):
      assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


# ---- and run ---------------------------------------------------------------------------------------------------------

TINY = (
  *("batch_size=16", "train_epochs=0.0", "train_steps=2", "augment.size=16", "encoder.width=0.0625"),
  *("evaluate.batch_size=32", "checkpoint.every_epochs=0.0", "log.every_steps=1"),
)
TINY_PRETRAIN = (*TINY, "projector.out_dim=16", "optimizer.warmup_epochs=0.0", "evaluate.every_epochs=0.0")
SHORTER = {
  "pretrain": TINY_PRETRAIN,
  "time": TINY_PRETRAIN,
  "finetune": (*TINY, "labels.fraction=1.0"),
  "distill": (*TINY, "labels.fraction=1.0"),
  "transfer": ("samples=100",),
}
ELSEWHERE = ("gs://", "--topology")  # a bucket, and libtpu


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
  """A folder with what the pages speak of, and the names that it has there."""
  from test_importing import case_of, tf1_variables, write_bundle

  here = tmp_path_factory.mktemp("pages")
  spec = tiny.npz(here / "tiny.npz")
  source = tiny.source(60)
  for i in range(60):
    file = here / "images" / str(source.labels[i] % 3) / f"{i}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source.read(i)).resize((40, 40)).save(file)
  np.save(here / "images.npy", np.stack([source.read(i) for i in range(60)]))
  np.save(here / "labels.npy", source.labels)
  names, _ = tf1_variables(case_of(18, 0.25, size=32), classes=0)
  write_bundle(here / "model.ckpt-250228", names)
  write_bundle(here / "another.ckpt-1", names)
  recipe = here / "rows.py"
  recipe.write_text(
    "from configs.transfer import get_config as base\n\n\ndef get_config():\n  config = base('small')\n"
    f"  config.rows = dict(again=dict(train={spec!r}, validation='', test={spec + ':test'!r}, metric='top_1'))\n"
    "  config.augment.size = 16\n  config.methods = ('linear',)\n  return config\n"
  )
  stand_ins = {
    "folder:/my/images": f"folder:{here / 'images'}",
    "/my/photos": str(here / "images"),
    "/my/shards": str(here / "shards"),
    "RUN_OR_ENCODER": "runs/smoke",
    "=RUN": "=runs/smoke",
    "fashion:test": spec,
    "saved_model/": "another.ckpt-1",
    "configs/finetune.py:v2_10pct": "finetune:small",
    "configs/distill.py:r50_1x_sk0": "distill:small",
    "configs/transfer.py": str(recipe),
    "configs/textures.py": "smoke",
    "npz:cifar10.npz": "textures",
  }
  return here, stand_ins, spec


def shortened(words, stand_ins, spec):
  line = "\0".join(words)
  for name, other in stand_ins.items():
    line = line.replace(name, other)
  words = line.split("\0")
  extra = [f"--config.{value}" for value in SHORTER.get(words[0], ())]
  if words[0] in ("finetune", "distill", "time") or (words[0] == "pretrain" and "folder:" not in line):
    extra += [f"--config.data.train={spec}", f"--config.data.test={spec}:test"]
  if "tsimcne.py" in line and words[0] == "pretrain":
    extra += ["--config.train_steps=4", "--config.tsimcne.stages=(1.0, 1.0, 2.0)"]
  if words[0] in ("pretrain", "finetune", "distill"):
    words += ["--overwrite"]
  if words[0] == "claims":  # test_claims.py runs it
    words += ["--plan"]
  if words[0] == "quickstart":
    words += ["--minutes=1", "--overwrite"]
  if "--config.probe.method=sgd" in words:
    extra += ["--config.probe.train_epochs=1.0", "--config.probe.batch_size=16"]
  return [*words, *extra]


@pytest.mark.release
def test_every_command_and_block_runs(sandbox, monkeypatch):
  """In the order of the pages, README first, so that what one leaves the next can use."""
  here, stand_ins, spec = sandbox
  monkeypatch.chdir(here)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  done = []
  for page, words in COMMANDS:
    line = " ".join(word for word in words if word != "--config.seed=0")  # the default: the same run
    if (
      line in done or any(mark in line for mark in ELSEWHERE) or words[0] == "downstream"
    ):  # test_downstream.py runs it
      continue
    if "for_torch" in line and not (here / "runs/mine/encoder").exists():
      continue  # with the blocks of its page, below
    argv = shortened(words, stand_ins, spec)
    if argv[0] in ("export", "embed", "import") and "--overwrite" not in argv:
      argv.append("--overwrite")
    assert cli.main(argv) == 0, f"{page}: simclr {line}"
    done.append(line)
  assert len(done) > 25
  for page, code in BLOCKS:
    needs = {name.split(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", code, re.M)}
    if "load" in needs and not (here / "for_torch").exists() and "for_torch" in code:
      continue
    if any(importlib.util.find_spec(name) is None for name in needs - {"load"}):
      ast.parse(code)
      continue
    for name, other in stand_ins.items():
      code = code.replace(name, other)
    tiny_values = ", ".join(f"{key!r}: {_value(value)}" for key, value in (v.split("=") for v in TINY_PRETRAIN))
    code = code.replace("train_epochs=20.0, batch_size=64", f"overwrite=True, **{{{tiny_values}}}")
    with monkeypatch.context() as block:
      block.setattr(sys, "path", list(sys.path))
      before = set(sys.modules)
      exec(compile(code, page, "exec"), {})
    for name in set(sys.modules) - before:  # the load.py of one folder is not that of the next
      if str(here) in str(getattr(sys.modules[name], "__file__", "")):
        del sys.modules[name]


def _value(text):
  return text if text.replace(".", "").isdigit() else repr(text)


def test_importing_the_package_and_its_help_wait_for_nothing_heavy():
  """`simclr --help` imports neither JAX nor TensorFlow."""
  code = (
    "import sys, simclr_jax.__main__ as m; m.parser(); print(sorted({'jax', 'tensorflow', 'numpy'} & set(sys.modules)))"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, cwd=ROOT)
  assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_the_tests_that_the_pages_name_exist():
  for page in (ROOT / "docs").glob("*.md"):
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
      text = (ROOT / "tests" / file).read_text()
      assert not name or f"def {name}(" in text, f"{page.name}: {file}::{name}"


def test_pictures_are_of_the_pages_as_they_are_drawn_now():
  """`python docs/pictures.py` makes them again."""
  spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
  pictures = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(pictures)
  kept = json.loads(pictures.KEPT.read_text())
  assert kept == {name: pictures.drawn_with(name) for name in pictures.DRAWN_WITH}, pictures.__doc__
