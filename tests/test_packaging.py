"""The wheel alone, in an empty environment, away from the checkout: help, recipes, and a short run of the smoke recipe."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_builds_from_the_source_distribution(tmp_path):
  def call(*argv, cwd=ROOT):
    done = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

  shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info"))
  call("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=tmp_path / "copy")
  (source,) = tmp_path.glob("*.tar.gz")
  call("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "wheel"), str(source))
  (wheel,) = (tmp_path / "wheel").glob("simclr_jax-*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  assert {"simclr_jax/configs/smoke.py", "simclr_jax/exporting/loaders/verify.py", "simclr_jax/py.typed"} <= set(names)
  assert any(name.endswith(".npz") for name in names)


@pytest.mark.slow
def test_an_installed_wheel_runs_the_smoke_recipe(tmp_path):
  # As a new user's shell: without the checkout, the devices and the cache of programs that tests share.
  ours = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_", "JAX_PERSISTENT_")
  environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

  def call(*argv):
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  venv.create(tmp_path / "venv", with_pip=True)
  python = str(tmp_path / "venv/bin/python")
  call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
  wheel = next(tmp_path.glob("simclr_jax-*.whl"))
  call(python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "requirements-lock.txt"), str(wheel))
  simclr = str(tmp_path / "venv/bin/simclr")
  assert "pretrain" in call(simclr, "--help")
  assert "smoke" in call(simclr, "recipes")
  values = ("train_epochs=0.0", "train_steps=3", "optimizer.warmup_epochs=0.0")
  out = call(simclr, "pretrain", "--config=smoke", "--workdir=run", *(f"--config.{value}" for value in values))
  assert re.search("^h +[0-9]", out, re.M) and (tmp_path / "run/report.html").exists()
  # A resumed run does not compile again, and trusts no program that lies in its workdir.
  assert list((tmp_path / "cache/simclr_jax/compiled").glob("jit_train_step*"))
  assert not (tmp_path / "run/compiled").exists()
  snippet = out.partition("Load the encoder:")[2]
  assert "(4, " in call(python, "-c", snippet)
