"""Compiled programs are read from a folder that only this user can write, and never from a workdir."""

import os
import sys
import time

import pytest

from simclr_jax.runtime import compiled

NAME = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(autouse=True)
def before_jax(monkeypatch, tmp_path):
  monkeypatch.delitem(sys.modules, "jax", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv(NAME, "")  # restored afterwards
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "")
  del os.environ[NAME]


def test_the_folder_is_the_users_own_and_old_programs_are_deleted(tmp_path):
  compiled.prepare()
  folder = tmp_path / "simclr_jax/compiled"
  assert os.environ[NAME] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
  for name, days in (("old", 31), ("new", 29)):
    (folder / name).write_text("")
    os.utime(folder / name, times=2 * (time.time() - 86400 * days,))
  del os.environ[NAME]
  compiled.prepare()
  assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
  (tmp_path / "simclr_jax/compiled").mkdir(parents=True)
  (tmp_path / "simclr_jax").chmod(0o775)
  compiled.prepare()
  assert os.environ.pop(NAME) and (tmp_path / "simclr_jax").stat().st_mode & 0o777 == 0o700
  (tmp_path / "simclr_jax/compiled").chmod(0o777)
  compiled.prepare()
  assert NAME not in os.environ


def test_another_users_folder_is_not_used(monkeypatch):
  monkeypatch.setattr(os, "geteuid", lambda: 12345)
  compiled.prepare()
  assert NAME not in os.environ


def test_a_user_without_a_home_is_no_error(monkeypatch, tmp_path):
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a uid without an entry in passwd
  monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
  compiled.prepare()
  assert os.environ[NAME].startswith(f"{tmp_path}/cache-{os.geteuid()}/simclr_jax")


def test_what_the_user_names_is_left_alone(monkeypatch):
  monkeypatch.setenv(NAME, "gs://mine/compiled")
  compiled.prepare()
  assert os.environ[NAME] == "gs://mine/compiled"
