"""Output that is lost and signals that stop a run, on small processes."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from simclr_jax import __main__ as cli
from simclr_jax.programs import config as config_lib
from simclr_jax.report import pages
from simclr_jax.runtime import checkpoint, cpu, errors, files, output, signals

CHILD = """
import os, sys
from simclr_jax.runtime import output
output.open_standard_files()
with open(sys.argv[1], "w") as report:
  lost = []
  with output.kept_going(lost.append):
    for i in range(5000):
      print("step", i, flush=i % 7 == 0)
  report.write(f"{len(lost)} {report.fileno()} done")
"""


@pytest.mark.parametrize(
  "how, losses",
  [("| head -n 1", 1), (">/dev/full", 1), (">/dev/null", 0), (">&- <&- 2>&-", 0), (">&-", 0), ("2>&-", 0)],
)
def test_a_program_goes_on_without_its_output(tmp_path, how, losses):
  command = f"set -o pipefail; {sys.executable} -c '{CHILD}' {tmp_path}/report {how}"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
  assert done.returncode == 0 and done.stderr == ""
  count, number, word = (tmp_path / "report").read_text().split()
  assert (int(count), word) == (losses, "done") and int(number) > 2


def test_another_command_whose_output_cannot_be_written_has_failed():
  command = [sys.executable, "-m", "simclr_jax", "recipes"]
  with open("/dev/full", "w") as full:
    done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
  assert done.returncode == 1
  assert done.stderr == "simclr: cannot write to standard output ([Errno 28] No space left on device)\n"


def test_what_is_no_loss_is_raised():
  with output.kept_going(pytest.fail):
    with pytest.raises(TypeError):
      sys.stdout.write(3)  # pyright: ignore[reportArgumentType]
    assert sys.stdout.isatty() in (True, False)


@pytest.mark.parametrize(
  "error, said",
  [
    (
      OSError(errno.ENOSPC, "No space left on device"),
      "the disk is full ([Errno 28] No space left on device); free space",
    ),
    (
      OSError(errno.EDQUOT, "Disk quota exceeded", "/x/events"),
      "quota exceeded: '/x/events'); free space and run the same",
    ),
    (checkpoint.NotSaved("could not save step 4"), "could not save step 4"),
  ],
)
def test_a_full_disk_is_one_line_and_waits_for_no_thread_of_orbax(monkeypatch, capsys, error, said):
  ended = []
  monkeypatch.setattr(cli.os, "_exit", ended.append)
  monkeypatch.setattr(cli, "_run", lambda *_: (_ for _ in ()).throw(error))
  assert cli.main(["recipes"]) == 1
  err = capsys.readouterr().err
  assert said in err and len(err.splitlines()) == 1
  assert ended == ([1] if isinstance(error, checkpoint.NotSaved) else [])


@pytest.mark.parametrize("kind", [errors.Unavailable, checkpoint.NotSavedNow])
def test_a_bucket_that_is_away_ends_a_run_with_the_code_that_is_started_again(monkeypatch, capsys, kind):
  ended = []
  monkeypatch.setattr(cli.os, "_exit", ended.append)
  monkeypatch.setattr(cli, "_run", lambda *_: (_ for _ in ()).throw(kind("b/mine/o: injected, 503")))
  assert cli.main(["recipes"]) == 142
  assert capsys.readouterr().err == "simclr: b/mine/o: injected, 503\n"
  assert ended == ([142] if kind is checkpoint.NotSavedNow else [])


@pytest.mark.parametrize(
  "words, said",
  [
    (["recipes"], "run the same command again"),
    (["claims"], "run the same command again"),
    (["pretrain", "--config=smoke", "--workdir=x"], "resume with --resume"),
  ],
)
def test_a_command_without_the_flag_is_not_resumed_with_it(monkeypatch, capsys, words, said):
  def stopped(*_):
    signals._stop(signal.SIGTERM, None)

  before = {number: signal.getsignal(number) for number in signals.STOPPING}
  monkeypatch.setattr(cli, "_run", stopped)
  monkeypatch.setattr(cli, "COMMANDS", {k: v._replace(prepare=cli.for_training) for k, v in cli.COMMANDS.items()})
  try:
    assert cli.main(words) == 42
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert capsys.readouterr().err == f"simclr: SIGTERM: stopped; what was saved is complete; {said}\n"


@pytest.mark.parametrize(
  "recipe, offered",
  [
    ("smoke", {"microbatches", "encoder.remat"}),
    ("finetune:small", {"encoder.remat"}),
    ("distill:small", {"encoder.remat"}),
    ("transfer", set()),
  ],
)
def test_out_of_memory_recommends_keys_that_the_program_has(recipe, offered):
  config = config_lib.load(recipe)
  said = cli._out_of_memory(MemoryError(), config)
  assert set(re.findall(r"--config\.([\w.]+)", said)) == offered
  assert all(hasattr(config, key.partition(".")[0]) for key in offered)
  assert "evaluate.batch_size" in said


def test_out_of_memory_names_the_batch_size_of_transfer():
  assert "lower finetune.batch_size, or" in cli._out_of_memory(MemoryError(), config_lib.load("transfer"))
  assert "lower batch_size, or" in cli._out_of_memory(MemoryError(), config_lib.load("downstream"))


@pytest.mark.parametrize(
  "error, said",
  [
    (MemoryError(), "out of memory: lower batch_size"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 149146384 bytes.\nBFC allocator\n"),
      "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 149146384 bytes): lower batch_size, or",
    ),
  ],
)
def test_out_of_memory_is_one_line(monkeypatch, capsys, error, said):
  monkeypatch.setattr(cli, "_run", lambda *_: (_ for _ in ()).throw(error))
  assert cli.main(["recipes"]) == 1
  err = capsys.readouterr().err
  assert f"simclr: {said}" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
  "limits, said",
  [
    ("-Sn 64", "256\n"),
    ("-n 64", "may open 64 files at a time and needs 256: raise it"),
    ("-v 3000000", "may use 2.9 GiB of address space and needs 4: raise it"),
  ],
)
def test_limits_are_raised_or_named(limits, said):
  code = "import resource as r; from simclr_jax.runtime import limits; limits.check(); print(r.getrlimit(7)[0])"
  hard = "ulimit -Hn 256; " if "S" in limits else ""
  done = subprocess.run(
    ["bash", "-c", f"ulimit {limits}; {hard}{sys.executable} -c '{code}'"], capture_output=True, text=True
  )
  assert said in done.stdout + done.stderr


def test_a_user_without_a_name_can_be_asked_for_sizes(tmp_path, monkeypatch):
  def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

  monkeypatch.setattr("pwd.getpwuid", nobody)
  (tmp_path / "a").write_text("abc")
  assert files.size(tmp_path / "a") == 3
  assert pages._size(files.absolute(tmp_path)) == "3 B"


SIGNALED = """
import sys, time
from simclr_jax.runtime import signals
code = 0
try:
  with signals.heard():
    signals.during_steps = sys.argv[1] == "steps"
    if sys.argv[1] == "stalled":  # a sign of life is being written
      signals.lock._held["/nowhere/LOCK"] = "{}"
      signals.lock._guard.acquire()
    print("ready", flush=True)
    if sys.argv[1] in ("compiling", "stalled"):  # the main thread is in a function of C
      import hashlib
      hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)
    time.sleep(60)
except KeyboardInterrupt:
  code = 130
except signals.Stopped as error:
  code = error.exit_code
  print(error, flush=True)
sys.exit(code)
"""


def heed_signals():
  """A test that runs in the background, or under nohup, has inherited that they are ignored."""
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


def signaled(phase, *numbers, before=""):
  process = subprocess.Popen(
    ["bash", "-c", f"{before} exec {sys.executable} -c '{SIGNALED}' {phase}"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals,
  )  # fmt: skip
  assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
  time.sleep(0.3 if phase in ("compiling", "stalled") else 0.0)  # until it is in there
  said = []
  for number in numbers:
    os.kill(process.pid, number)
    said.append(process.stderr.readline())
  return process, said


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 42), (signal.SIGHUP, 42), (signal.SIGINT, 130)])
def test_a_signal_outside_of_the_steps_ends_with_its_code_and_is_answered(number, code):
  process, said = signaled("report", number)
  assert process.wait(timeout=20) == code
  name = signal.Signals(number).name
  assert said == [f"simclr: {name}: stopping as soon as possible; a second signal stops at once\n"]
  assert process.stderr.read() == ""


def test_a_signal_is_answered_while_the_program_compiles_and_a_second_one_ends_it():
  process, said = signaled("compiling", signal.SIGINT, signal.SIGINT)
  assert process.wait(timeout=5) == 130
  assert said[1] == "simclr: SIGINT: stopped at once; what was saved before is complete; resume with --resume\n"
  assert process.stderr.read() == ""
  process, said = signaled("steps", signal.SIGTERM, signal.SIGTERM)
  assert process.wait(timeout=5) == 42 and "SIGTERM: stopping after this step; a second" in said[0]


def test_a_second_signal_does_not_wait_for_a_disk_or_bucket_that_does_not_answer():
  process, said = signaled("stalled", signal.SIGTERM, signal.SIGTERM)
  assert process.wait(timeout=20) == 42 and "stopped at once" in said[1]


def test_a_run_under_nohup_outlives_its_terminal():
  process, _ = signaled("report", before="trap '' HUP;")
  os.kill(process.pid, signal.SIGHUP)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=0.5)
  process.kill()
  process.wait()


@pytest.mark.parametrize(
  "shown, given, chosen",
  [((), None, "cpu"), (("/dev/accel*",), None, None), (("/dev/dxg",), None, None), ((), "tpu", "tpu"), ((), "", "cpu")],
)
def test_without_an_accelerator_jax_looks_for_none(monkeypatch, shown, given, chosen):
  """Or a plugin that is installed, such as libtpu, complains of what is missing."""
  monkeypatch.setattr(cpu.glob, "glob", lambda pattern: [pattern] * (pattern in shown))
  if given is None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  else:
    monkeypatch.setenv("JAX_PLATFORMS", given)
  assert cpu.choose_platform() == (chosen == "cpu")
  assert os.environ.get("JAX_PLATFORMS") == chosen
