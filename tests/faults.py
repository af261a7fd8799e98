"""Faults on real processes: each is inflicted on a small training run, which is then resumed and must end in the same bits.

  python tests/faults.py [--rounds=13] [--kinds=killed]

The runs use the workdirs, the loop, the checkpoints and the guard between processes that every program uses, on a state of
a few arrays, so that a trial takes seconds.  A trial fails if a process outlives the fault by 60 seconds, if the resumed
run ends in another state than one that nothing happened to, if a damaged or foreign checkpoint is loaded, or if a file of
somebody else's is touched.  Exit code 1 if any did.  Damage to single files is tried by tests/damage.py.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

STEPS, SAVE_EVERY, KEEP, EVALUATE_EVERY, ROWS = 12, 2, 2, 3, 8
LIMIT = 60.0  # seconds that a process may outlive the fault of another


@dataclasses.dataclass(frozen=True)
class Options:
  """What is different in one process of a run; a step of 0 is never reached."""

  raise_at: int = 0
  hang_at: int = 0
  keep: int = KEEP
  before_seal: float = 0.0  # seconds between the renaming of a checkpoint and its seal
  flag: str = "--resume"
  steps: int = STEPS
  seed: int = 0
  config: str = "{}"
  data: str = ""
  every: int = 1  # steps between two evaluations or saves, as a multiple of EVALUATE_EVERY and SAVE_EVERY
  stalls: bool = False  # every hundredth batch comes up to ten seconds late
  flip_at: int = 0  # after this step a bit of its copy of the state is flipped
  output: str = ""  # the file that is its standard output, instead of its log


def child(workdir, events, port, count, index, options):
  """One process of a run; what it does stands in the file `events`, a line each."""
  log = open(f"{events}.log", "w", buffering=1)
  os.dup2(log.fileno(), 1)
  os.dup2(log.fileno(), 2)
  sys.stdout = sys.stderr = log
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored in what nohup starts
  if options.output:
    sys.stdout = open(options.output, "w", buffering=1)
  out = open(events, "w", buffering=1)

  import jax
  import jax.numpy as jnp
  import numpy as np

  from simclr_jax.model import TrainState
  from simclr_jax.runtime import checkpoint, loop, output, processes, watchdog
  from simclr_jax.runtime import mesh as mesh_lib

  print("start", file=out)
  save = checkpoint.Checkpoints.save

  def noted(self, step, *rest):
    print(f"save {step}", file=out)
    save(self, step, *rest)

  checkpoint.Checkpoints.save = noted
  seal = checkpoint.seal

  def late(path, step, run):
    print(f"renamed {step}", file=out)
    time.sleep(options.before_seal)
    seal(path, step=step, run=run)

  checkpoint.seal = late

  update = loop.Loop.update

  def flipping(self, batch):
    update(self, batch)
    if self.step == options.flip_at:
      w = self.state.params["encoder"]["w"]
      mine = w.addressable_shards[0]
      copy = np.array(mine.data)
      copy.view(np.uint32)[3, 5] ^= 1 << 22
      copies = [jax.device_put(copy, mine.device)]
      self.state.params["encoder"]["w"] = jax.make_array_from_single_device_arrays(w.shape, w.sharding, copies)

  loop.Loop.update = flipping

  def init(key):
    w = jax.random.normal(key, (64, 256))
    return TrainState(jnp.zeros((), jnp.int32), {"encoder": {"w": w}, "head": {"b": jnp.zeros(64)}}, {}, {"m": 0 * w})

  def step(state, batch):
    w, m = state.params["encoder"]["w"], state.opt_state["m"]
    m = 0.9 * m + jnp.tanh(batch["x"].T @ (batch["x"] @ w)) / ROWS
    params = {"encoder": {"w": w - 0.1 * m}, "head": {"b": state.params["head"]["b"] + batch["x"].mean(0)}}
    return state.replace(step=state.step + 1, params=params, opt_state={"m": m}), {"loss": jnp.mean(jnp.square(w))}

  def stream(first):
    for number in range(first, options.steps):
      print(f"step {number + 1}", file=out)
      time.sleep(0.02)
      if number + 1 == options.raise_at:
        raise OSError("no such disk")
      if options.stalls and number % 100 == 50:
        time.sleep(random.Random(number).uniform(0, 10))
      if number + 1 == options.hang_at:
        time.sleep(10_000)
      x = np.random.default_rng(number).standard_normal((ROWS, 64), np.float32)
      share = ROWS // count
      yield {"x": x[index * share : (index + 1) * share]}

  def evaluate(state):
    print(f"evaluate {int(state.step)}", file=out)
    time.sleep(0.1)
    return {"knn": 0.5}

  code, message = 0, ""
  try:
    if count > 1:
      processes.start(f"localhost:{port}", count, index)
    flags = {"resume": options.flag == "--resume", "overwrite": options.flag == "--overwrite"}
    workdir = checkpoint.claim_workdir(workdir, **flags)
    task = loop.Task(
      init=init,
      step=step,
      stream=stream,
      evaluators={"knn": loop.Evaluator(evaluate, EVALUATE_EVERY * options.every)},
      total_steps=options.steps,
      batch_size=ROWS,
      num_examples=100 * ROWS,
      exports=lambda state: {"encoder": {"params": state.params["encoder"]}},
      data=options.data,
    )
    mesh = mesh_lib.make_mesh()
    with output.kept_going(print):
      state, _ = loop.run(
        task,
        loop.LoopConfig(log_every=1, checkpoint_every=SAVE_EVERY * options.every, keep=options.keep),
        mesh=mesh,
        workdir=workdir,
        config_json=options.config,
        seed=options.seed,
      )
    checkpoint.mark_complete(workdir)
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(state))]
    print("state", hashlib.sha256(b"".join(leaves)).hexdigest(), file=out)
  except Exception as error:
    code, message = getattr(error, "exit_code", 1), str(error)
    print(message, file=log)
    if type(error).__name__ == "JaxRuntimeError":
      watchdog.await_verdict()
  watchdog.leave(code, message)
  sys.exit(code)


class Run:
  """The processes of a run, started from a server that has imported what they need.

  `options` are those of `victim`, `shared` those of all of them.
  """

  def __init__(self, workdir, processes=1, victim=0, shared=(), **options):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="events", dir=SCRATCH))
    context = multiprocessing.get_context("forkserver")
    self.processes = []
    for i in range(processes):
      mine = Options(**dict(shared), **(options if i == victim else {}))
      arguments = (str(workdir), str(self.folder / f"{i}"), port, processes, i, mine)
      self.processes.append(context.Process(target=child, args=arguments, daemon=True))
      self.processes[-1].start()

  def events(self, i=0):
    file = self.folder / f"{i}"
    return file.read_text().splitlines() if file.exists() else []

  def wait_for(self, event, i=0, timeout=180.0):
    """Whether the event came before the process ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
      if event in self.events(i):
        return True
      if self.processes[i].exitcode is not None:
        return False
      time.sleep(0.002)
    raise AssertionError(f"{event} did not come: {self.said()}")

  def ended(self, which=None, timeout=180.0):
    """(exit codes, seconds that it took); processes that are left then are killed and have the code None."""
    began = time.monotonic()
    chosen = [p for i, p in enumerate(self.processes) if which is None or i in which]
    for p in chosen:
      p.join(max(0.0, began + timeout - time.monotonic()))
    took = time.monotonic() - began
    codes = [p.exitcode for p in chosen]
    for p in self.processes:
      p.kill()
      p.join()
    return codes, took

  def state(self):
    """The hash of the final state, or None."""
    found = [line.split()[1] for line in self.events() if line.startswith("state")]
    return found[0] if found else None

  def said(self):
    return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.log")))


# ---- the faults: each gets a random generator and a workdir, and returns (expected codes met, seconds, note) ------------


def killed(rng, workdir, when):
  run = Run(workdir)
  happened = run.wait_for(when)
  time.sleep(rng.uniform(0, 0.12))
  run.processes[0].kill()
  codes, took = run.ended()
  return codes[0] in (-signal.SIGKILL, 0) and happened, took, f"after {when}"


def killed_in_step(rng, workdir):
  return killed(rng, workdir, f"step {rng.randint(1, STEPS - 1)}")


def killed_in_save_or_delete(rng, workdir):
  return killed(rng, workdir, f"save {SAVE_EVERY * rng.randint(1, STEPS // SAVE_EVERY - 1)}")


def told_to_stop(rng, workdir, when, number=signal.SIGTERM, allowed=(42,)):
  run = Run(workdir)
  happened = run.wait_for(when)
  time.sleep(rng.uniform(0, 0.05))
  os.kill(run.processes[0].pid, number)
  codes, took = run.ended()
  return codes[0] in allowed and happened, took, f"after {when}: exit code {codes[0]}"


def sigterm_in_start(rng, workdir):  # before there is anything to save it may just die
  return told_to_stop(rng, workdir, "start", allowed=(42, -signal.SIGTERM))


def sigterm_in_training(rng, workdir):
  return told_to_stop(rng, workdir, f"step {rng.randint(2, STEPS - 2)}")


def sigterm_in_evaluation(rng, workdir):
  return told_to_stop(rng, workdir, f"evaluate {EVALUATE_EVERY * rng.randint(1, STEPS // EVALUATE_EVERY - 1)}")


def raised(rng, workdir):
  run = Run(workdir, raise_at=rng.randint(2, STEPS))
  codes, took = run.ended()
  return codes == [1] and "no such disk" in run.said(), took, "exit code 1"


def sighup_in_training(rng, workdir):
  return told_to_stop(rng, workdir, f"step {rng.randint(2, STEPS - 2)}", signal.SIGHUP)


def killed_before_the_seal(rng, workdir):
  """With one step kept, between the renaming of the second or a later one and its seal; the step before must be there."""
  step = SAVE_EVERY * rng.randint(2, STEPS // SAVE_EVERY - 1)
  run = Run(workdir, keep=1, before_seal=0.3)
  happened = run.wait_for(f"renamed {step}")
  time.sleep(rng.uniform(0, 0.2))
  run.processes[0].kill()
  codes, took = run.ended()
  kept = (workdir / "checkpoints" / str(step - SAVE_EVERY) / "manifest.json").exists()
  return (
    codes == [-signal.SIGKILL] and happened and kept,
    took,
    f"step {step - SAVE_EVERY} is {'kept' if kept else 'gone'}",
  )


def output_lost(rng, workdir):
  run = Run(workdir, output="/dev/full")
  codes, took = run.ended()
  return codes == [0], took, f"exit code {codes[0]}"


def second_run(rng, workdir):
  """Another run in the workdir of one that trains: told who is there, whatever it asks for."""
  flag = rng.choice(("--resume", "--overwrite"))
  run = Run(workdir)
  happened = run.wait_for(f"step {rng.randint(1, 4)}")
  second = Run(workdir, flag=flag)
  codes, took = second.ended()
  told = f"is in use by process {run.processes[0].pid} on {socket.gethostname()}, started" in second.said()
  first, _ = run.ended()
  return happened and codes == [1] and told and first == [0], took, f"{flag}: exit code {codes[0]}"


def folder_of_photos(rng, workdir):
  """Somebody's files under --workdir, perhaps with a config.json among them."""
  photos = pathlib.Path(f"{workdir}_photos")
  content = {f"{i}.jpg": rng.randbytes(rng.randint(1, 100)) for i in range(8)}
  if rng.random() < 0.5:
    content["config.json"] = b'{"theme": "dark"}'
  photos.mkdir()
  for name, body in content.items():
    (photos / name).write_bytes(body)
  flag = rng.choice(("--resume", "--overwrite"))
  run = Run(photos, flag=flag)
  codes, took = run.ended()
  same = {path.name: path.read_bytes() for path in photos.iterdir()} == content
  shutil.rmtree(photos)
  return codes == [1] and "is not a run" in run.said() and same, took, f"{flag}: {'untouched' if same else 'TOUCHED'}"


def disk_full(rng, workdir):
  """The file system is filled to the last 40 kB at a random step."""
  workdir.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(workdir)], capture_output=True)
  if mounted.returncode:
    return None, 0.0, "no file system can be mounted here"
  run = Run(workdir)
  run.wait_for(f"step {rng.randint(3, STEPS - 2)}")
  with contextlib.suppress(OSError), open(workdir / "filler", "wb") as file:  # a save may be writing beside it
    file.write(bytes(max(0, os.statvfs(workdir).f_bavail * os.statvfs(workdir).f_frsize - 40_000)))
  codes, took = run.ended()
  (workdir / "filler").unlink()
  return codes == [1] and "the disk is full" in run.said(), took, "exit code 1, the disk is full"


def damaged(rng, workdir, how):
  """A file of the newest step; it must be found, or the file be one that nothing is read from."""
  run = Run(workdir)
  run.wait_for(f"step {rng.randint(6, STEPS - 1)}")
  run.processes[0].kill()
  run.ended()
  steps = sorted(int(p.name) for p in workdir.glob("checkpoints/[0-9]*") if (p / "manifest.json").exists())
  files = sorted(f for f in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if f.is_file() and f.stat().st_size)
  file = rng.choice(files)
  content = bytearray(file.read_bytes())
  place = rng.randrange(len(content))
  if how == "cut":
    file.write_bytes(content[:place])
  elif how == "deleted":
    file.unlink()
  elif how == "zeroed":
    content[place : place + 512] = bytes(len(content[place : place + 512]))
    file.write_bytes(content)
  else:
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
  return True, 0.0, f"{how} {file.relative_to(workdir / 'checkpoints')}"


def bit_flipped(rng, workdir):
  return damaged(rng, workdir, "flipped")


def file_cut(rng, workdir):
  return damaged(rng, workdir, "cut")


def file_deleted(rng, workdir):
  return damaged(rng, workdir, "deleted")


def file_zeroed(rng, workdir):
  return damaged(rng, workdir, "zeroed")


def stopped_late(rng, workdir):
  """The steps of a run that was killed, oldest first; two at least."""
  run = Run(workdir)
  run.wait_for(f"step {rng.randint(7, STEPS - 1)}")  # the save after step 6 has waited for the seal of step 4
  run.processes[0].kill()
  run.ended()
  return sorted(
    (p for p in workdir.glob("checkpoints/[0-9]*") if (p / "manifest.json").exists()), key=lambda p: int(p.name)
  )


def step_renamed(rng, workdir):
  newest = stopped_late(rng, workdir)[-1]
  name = int(newest.name) + rng.randint(1, 3)
  shutil.rmtree(newest.parent / str(name), ignore_errors=True)  # what was not sealed
  newest.rename(newest.parent / str(name))
  return True, 0.0, f"{newest.name} to {name}"


def steps_swapped(rng, workdir):
  older, newest = stopped_late(rng, workdir)[-2:]
  aside = newest.parent / "aside"
  newest.rename(aside)
  older.rename(newest)
  aside.rename(older)
  return True, 0.0, f"{older.name} and {newest.name}"


def step_of_another_run(rng, workdir):
  newest = stopped_late(rng, workdir)[-1]
  other = pathlib.Path(f"{workdir}_other")
  Run(other, seed=1).ended()
  stranger = max(other.glob("checkpoints/[0-9]*"), key=lambda p: int(p.name))
  shutil.copytree(stranger, newest.parent / stranger.name, dirs_exist_ok=True)
  shutil.rmtree(other)
  return True, 0.0, f"{stranger.name} beside {newest.name}"


def strays_beside_steps(rng, workdir):
  newest = stopped_late(rng, workdir)[-1]
  shutil.copytree(newest, newest.parent / f"{newest.name} (copy)")
  shutil.copytree(newest, newest.parent / f"0{newest.name}")
  (newest.parent / "notes.txt").write_text("mine")
  return True, 0.0, f"beside {newest.name}"


def one_of_two_differs(rng, workdir):
  """In its config, seed, data or number of steps: both say the same line, and no step is made."""
  what, value = rng.choice(
    (("config", '{"temperature": 0.2}'), ("seed", 1), ("data", "other images"), ("steps", STEPS + 3))
  )
  victim = rng.randrange(2)
  run = Run(workdir, 2, victim=victim, **{what: value})
  began = time.monotonic()
  codes, _ = run.ended(timeout=LIMIT + 30)
  name = {"config": "config (SHA-256)"}.get(what, what)
  logs = [file.read_text() for file in sorted(run.folder.glob("*.log"))]
  named = all(f"process 1 has {name}=" in log for log in logs)
  began_to_train = any(event.startswith("step") for i in range(2) for event in run.events(i))
  took = time.monotonic() - began
  return codes == [1, 1] and named and not began_to_train and took < LIMIT, took, f"{what} of process {victim}: {codes}"


def of_two(rng, workdir, act, expected, **options):
  """A fault of one of two processes: the other must go within LIMIT, and say who is gone."""
  victim = rng.randrange(2)
  run = Run(workdir, 2, victim=victim, **options)
  run.wait_for(f"step {rng.randint(2, 6)}", victim)
  act(run.processes[victim])
  codes, took = run.ended({1 - victim}, LIMIT + 30)
  said = (run.folder / f"{1 - victim}.log").read_text()
  named = codes[0] == -signal.SIGABRT or f"process {victim} of 2" in said
  return codes[0] in expected and named and took < LIMIT, took, f"process {victim}; the other ended with {codes[0]}"


def one_of_two_killed(rng, workdir):
  return of_two(rng, workdir, lambda p: p.kill(), (142, -signal.SIGABRT))


def one_of_two_stopped(rng, workdir):
  return of_two(rng, workdir, lambda p: os.kill(p.pid, signal.SIGSTOP), (142, -signal.SIGABRT))


def one_of_two_raises(rng, workdir):
  return of_two(rng, workdir, lambda p: None, (1, -signal.SIGABRT), raise_at=8)


def one_of_two_hangs(rng, workdir):
  return of_two(rng, workdir, lambda p: None, (142, -signal.SIGABRT), hang_at=8)


def one_of_two_has_a_flipped_bit(rng, workdir):
  """In its copy of the parameters: found before the next checkpoint is written."""
  at = rng.randint(1, STEPS - 1)
  run = Run(workdir, 2, victim=rng.randrange(2), flip_at=at)
  codes, took = run.ended(timeout=LIMIT + 30)
  named = "the state is not the same on all 2 devices" in run.said()
  later = [p.name for p in workdir.glob("checkpoints/[0-9]*") if int(p.name) >= at]
  return set(codes) <= {1, 142} and 1 in codes and named and not later, took, f"after step {at}: {codes}"


def one_of_two_gets_sigterm(rng, workdir):
  return of_two(rng, workdir, lambda p: os.kill(p.pid, signal.SIGTERM), (42,))


def stalls(workdir):
  """(exit codes, what was said) of 1,000 steps of two processes, of which one waits for its data now and then."""
  run = Run(workdir, 2, victim=1, shared={"steps": 1000, "every": 100}, stalls=True)
  codes, _ = run.ended(timeout=600)
  return codes, run.said()


FAULTS = (
  *(killed_in_step, killed_in_save_or_delete, sigterm_in_start, sigterm_in_training, sigterm_in_evaluation),
  *(sighup_in_training, killed_before_the_seal, output_lost, second_run, folder_of_photos),
  *(raised, disk_full, bit_flipped, file_cut, file_deleted, file_zeroed),
  *(step_renamed, steps_swapped, step_of_another_run, strays_beside_steps, one_of_two_differs),
  one_of_two_has_a_flipped_bit,
  *(one_of_two_killed, one_of_two_stopped, one_of_two_raises, one_of_two_hangs, one_of_two_gets_sigterm),
)
SCRATCH = None  # set by `prepare`


def prepare(folder):
  """Makes the server that trials are started from, and returns {processes: hash of the state without a fault}."""
  global SCRATCH
  SCRATCH = str(folder)
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  here = pathlib.Path(__file__).resolve().parent
  sys.path[:0] = [str(here), str(here.parent)]
  os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
  multiprocessing.set_forkserver_preload(["tensorflow", "simclr_jax.runtime.loop", "simclr_jax.model", "faults"])
  straight = {}
  for processes in (1, 2):
    run = Run(pathlib.Path(folder) / f"straight{processes}", processes)
    codes, _ = run.ended()
    assert codes == [0] * processes, run.said()
    straight[processes] = run.state()
  return straight


def trial(fault, seed, straight, folder):
  """dict(fault, note, seconds, ok): inflicts it, resumes, compares; ok is None where it cannot be tried."""
  rng = random.Random(f"{fault.__name__} {seed}")
  workdir = pathlib.Path(folder) / f"{fault.__name__}_{seed}"
  processes = 2 if "of_two" in fault.__name__ else 1
  met, seconds, note = fault(rng, workdir)
  if met is not None:
    resumed = Run(workdir, processes)
    codes, _ = resumed.ended()
    equal = codes == [0] * processes and resumed.state() == straight[processes]
    note += "" if equal else f"; resumed with {codes}, {resumed.said()}"
    met = met and equal
  subprocess.run(["umount", str(workdir)], capture_output=True)
  shutil.rmtree(workdir, ignore_errors=True)
  return {"fault": fault.__name__.replace("_", " "), "seed": seed, "note": note, "seconds": seconds, "ok": met}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=13, help="of every kind of fault")
  parser.add_argument("--first", type=int, default=0, help="number of the first round, to go on with others")
  parser.add_argument("--kinds", default="", help="those whose name contains this")
  parser.add_argument("--stalls", action="store_true", help="only whether stalls of ten seconds are taken for hangs")
  parser.add_argument("--json", default="", help="file for one line a trial")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    straight = prepare(folder)
    import faults  # the same module under the name by which the server knows it

    faults.SCRATCH = SCRATCH
    if args.stalls:
      codes, said = faults.stalls(pathlib.Path(folder) / "stalls")
      print(f"two processes, 1,000 steps, ten stalls of up to 10 s: {codes}" + ("" if codes == [0, 0] else f"\n{said}"))
      return int(codes != [0, 0])
    rows = []
    for seed in range(args.first, args.first + args.rounds):
      for fault in faults.FAULTS:
        if args.kinds in fault.__name__:
          rows.append(faults.trial(fault, seed, straight, folder))
          print(f"{'ok  ' if rows[-1]['ok'] else 'none' if rows[-1]['ok'] is None else 'FAIL'} {rows[-1]}", flush=True)
          if args.json:
            with open(args.json, "a") as file:
              file.write(json.dumps(rows[-1]) + "\n")
  tried = [row for row in rows if row["ok"] is not None]
  print("\n| fault | trials | same bits after resuming | longest time until all were gone |\n|---|---|---|---|")
  for name in dict.fromkeys(row["fault"] for row in tried):
    of = [row for row in tried if row["fault"] == name]
    print(f"| {name} | {len(of)} | {sum(row['ok'] for row in of)} | {max(row['seconds'] for row in of):.1f} s |")
  print(f"\n{len(tried)} faults, {sum(not row['ok'] for row in tried)} failed")
  return int(any(not row["ok"] for row in tried))


if __name__ == "__main__":
  sys.exit(main())
