"""Faults of whole programs: a command is killed, told to stop or its files are damaged, and it is given again until it ends.

  python tests/program_faults.py [--rounds=10] [--kinds=finetune]

Commands are run as a user gives them, on a tiny network and 96 images.  A trial fails if the command, given again with
--resume, ends with other results than one that nothing happened to, or if it ends with anything but success or one line that
names a damaged file.  Exit code 1 if any did.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LIMIT = 60.0  # seconds until a command that was told to stop has gone
ENDED = {signal.SIGKILL: (-9,), signal.SIGTERM: (42, -15), signal.SIGHUP: (42, -1), signal.SIGINT: (130, -2)}


def commands(scratch: pathlib.Path) -> dict:
  """{program: (its arguments but for the folder, whether the folder is --workdir)}; makes what they read."""
  import jax
  import tiny
  from test_finetune import filled

  from simclr_jax import exporting, model
  from simclr_jax.programs import config as config_lib
  from simclr_jax.programs import finetune
  from simclr_jax.runtime import mesh as mesh_lib

  spec = tiny.npz(scratch / "tiny.npz")
  config = config_lib.replace(config_lib.load("finetune:small"), {"augment.size": 16, "encoder.width": 0.0625})
  task = finetune.make_task(config, None, tiny.source(), mesh=mesh_lib.make_mesh())
  state = filled(jax.eval_shape(task.init, jax.random.key(0)))
  start = scratch / "start"
  heads = {"classifier": model.variables_of(state, "classifier")}
  exporting.write(start, model.keep_encoder(state), config, scores={}, step=1, heads=heads)
  (scratch / "photos").mkdir()
  from PIL import Image

  for i in range(24):
    Image.fromarray(tiny.source().read(i)).save(scratch / "photos" / f"{i}.png")
  (scratch / "rows.py").write_text(
    "from configs import transfer\n\ndef get_config():\n  config = transfer.get_config('small')\n"
    f"  rows = dict(a=dict(train={spec!r}, validation='', test={spec + ':test'!r}, metric='top_1'))\n"
    "  rows['b'] = dict(rows['a'], metric='mean_per_class')\n  config.rows = rows\n  return config\n"
  )
  data = [f"--config.data.train={spec}", f"--config.data.test={spec}:test"]
  small = ["--config.augment.size=16", "--config.evaluate.batch_size=32", "--config.batch_size=16"]
  saving = ["--config.train_epochs=0", "--config.train_steps=20", "--config.checkpoint.every_steps=3"]
  narrow = ["--config.encoder.width=0.0625"]
  pretrained = [*data, *small, *narrow, "--config.checkpoint.every_epochs=0", "--config.evaluate.every_epochs=0"]
  tuned = [*data, *small, "--config.train_steps=20", "--config.checkpoint.every_steps=3"]
  tuned += ["--config.train_epochs=0", "--config.labels.fraction=1.0"]
  return {
    "pretrain": (["pretrain", "--config=smoke", *pretrained, *saving], "--workdir"),
    "finetune": (["finetune", "--config=finetune:small", *tuned, f"--config.start={start}"], "--workdir"),
    "distill": (["distill", "--config=distill:small", *tuned, *narrow, f"--config.teacher={start}"], "--workdir"),
    "transfer": (
      ["transfer", f"--config={scratch / 'rows.py'}", f"--config.start={start}", "--config.augment.size=16"],
      "--workdir",
    ),
    "embed": (["embed", f"--encoder={start}", f"--data={spec}", "--images_per_part=8"], "--output"),
    "quickstart": (["quickstart", str(scratch / "photos"), "--minutes=0.2"], "--workdir"),
  }


def begin(command, folder, flag, resume):
  where = folder / "h.npz" if flag == "--output" else folder
  more = ["--resume"] if resume and flag == "--workdir" else []
  folder.parent.mkdir(exist_ok=True)
  with open(f"{folder}.log", "wb") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "simclr_jax", *command, f"{flag}={where}", *more], stdout=log, stderr=log
    )


def said(folder):
  return pathlib.Path(f"{folder}.log").read_text(errors="replace")


def result(program, folder) -> str:
  """What has to be the same: trained arrays and scores, or the bytes of a file."""
  found = hashlib.sha256()
  if program == "embed":
    return hashlib.sha256((folder / "h.npz").read_bytes()).hexdigest()
  if not (folder / "COMPLETE").exists():
    return "incomplete"
  if program == "quickstart":  # chooses by the speed that it measures
    from simclr_jax import load_encoder

    load_encoder(folder / "encoder")
    return "complete" if (folder / "report.html").exists() else "without a page"
  if program == "transfer":
    return json.dumps(json.loads((folder / "transfer.json").read_text()), sort_keys=True)
  from simclr_jax.exporting import load_encoder as load

  _, variables, card = load(folder / "encoder")
  import jax
  import numpy as np

  for leaf in jax.tree.leaves(variables):
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest() + json.dumps(card["scores"], sort_keys=True)


def damage_one(rng, folder):
  """Damages a file that the command has left, at random; its name."""
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import damage

  files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size)
  if not files:
    return ""
  file, how = rng.choice(files), rng.choice(damage.ACCIDENTS[:-1])
  content = damage.damage(rng, file.read_bytes(), b"", how)
  file.unlink() if content is None else file.write_bytes(content)
  return f"{file.relative_to(folder)} {how}"


def trial(program, command, flag, seconds, expected, seed, scratch):
  """dict(program, fault, note, seconds, ok): up to three accidents, then the command once more."""
  rng = random.Random(f"{program} {seed}")
  folder = scratch / f"{program}_{seed}"
  number = rng.choice(list(ENDED))
  damaging = rng.random() < 0.4
  notes, slowest, ok = [], 0.0, True
  for attempt in range(rng.randint(1, 3)):
    process = begin(command, folder, flag, attempt > 0)
    time.sleep(rng.uniform(0.3, 1.0) * seconds)
    began = time.monotonic()
    process.send_signal(number)
    try:
      code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
      process.kill()
      code, ok = process.wait(), False
    slowest = max(slowest, time.monotonic() - began)
    notes.append(f"{code}")
    ok = ok and code in (0, *ENDED[number])
    if code == 0:
      break
  what = f"{signal.Signals(number).name}"
  if damaging and folder.exists():
    what = "a file damaged"
    notes.append(damage_one(rng, folder))
  done = folder / "h.npz"
  if not (program == "embed" and done.exists()):  # a file that is there is not made again
    code = begin(command, folder, flag, True).wait(300)
  if code == 0:
    found = result(program, folder)
    same = found == expected
    if not same:
      notes.append(f"{found[:80]} instead of {expected[:80]}")
    ok = ok and same
  else:
    lines = [line for line in said(folder).splitlines() if line.startswith("simclr: ")]
    named = damaging and code == 1 and len(lines) == 1 and "Traceback" not in said(folder)
    notes.append("refused: " + lines[-1][:300] if named else f"{code}: {said(folder)[-1500:]}")
    ok = ok and named
  if ok:
    shutil.rmtree(folder, ignore_errors=True)
  return {"program": program, "fault": what, "seed": seed, "note": "; ".join(notes), "seconds": slowest, "ok": ok}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=10, help="of every program")
  parser.add_argument("--kinds", default="", help="programs whose name contains this")
  parser.add_argument("--json", default="", help="file for one line a trial")
  args = parser.parse_args()
  here = pathlib.Path(__file__).resolve().parent
  sys.path[:0] = [str(here), str(here.parent)]
  os.chdir(here.parent)
  os.environ["JAX_PLATFORMS"] = "cpu"
  for number in (signal.SIGHUP, signal.SIGINT):  # which what runs in the background has inherited as ignored
    signal.signal(number, signal.SIG_DFL)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    scratch = pathlib.Path(folder)
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    straight = {}
    for program, (command, flag) in commands(scratch).items():
      if args.kinds not in program:
        continue
      for warm in ("cold", "straight"):  # the second finds the compiled programs
        began = time.monotonic()
        where = scratch / f"{program}_{warm}"
        assert begin(command, where, flag, False).wait() == 0, said(where)
        straight[program] = command, flag, time.monotonic() - began, result(program, where)
    for seed in range(args.rounds):
      for program, about in straight.items():
        rows.append(trial(program, *about, seed, scratch))
        print("ok  " if rows[-1]["ok"] else "FAIL", rows[-1], flush=True)
        if args.json:
          with open(args.json, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
  print(
    "\n| program | trials | same results, or a damaged file named | longest time until it was gone |\n|---|---|---|---|"
  )
  for program in straight:
    of = [row for row in rows if row["program"] == program]
    print(f"| {program} | {len(of)} | {sum(row['ok'] for row in of)} | {max(row['seconds'] for row in of):.1f} s |")
  print(f"\n{len(rows)} faults, {sum(not row['ok'] for row in rows)} failed")
  return int(any(not row["ok"] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
