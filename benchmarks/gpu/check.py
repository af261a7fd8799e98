"""Everything that has to be measured on a GPU, in one command of about eight minutes; the results are one JSON file.

  python -m benchmarks.gpu.check --data=npz:cifar10.npz --output=gpu.json [--minutes=8]
  python -m benchmarks.gpu.check --tiny --output=cpu.json            # the same on a CPU, at a size that proves nothing

Each stage is a process of its own with a time limit, in the order of what matters: what one loses does not stop the next,
and its result, or its error, is in the file at once.  `--stage=NAME` runs one in this process and prints its result.
No TensorFlow is needed; torch, if it is there, is what ResNet-50 is compared with.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

STAGES = {  # name: the seconds it may take
  "machine": 60,
  "numbers": 90,
  "losses": 60,
  "augmentation": 60,
  "compile": 120,
  "cifar_speed": 90,
  "profile": 60,
  "flags": 150,
  "resnet50": 150,
  "torch_resnet50": 120,
  "largest_batch": 120,
  "cifar_training": 0,  # what is left
}
# XLA's flags that are said to help GPUs; each is timed on its own against none.
FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true", "--xla_gpu_enable_command_buffer=", "--xla_gpu_autotune_level=2",
         "--xla_gpu_triton_gemm_any=true")  # fmt: skip


def source_of(args, size=32, count=None):
  """The images that are trained on: those of --data, or random ones."""
  from simclr_jax import data

  if args.data and size == 32:
    return data.open_source(f"{args.data}:train")
  rng = np.random.default_rng(0)
  count = count or (256 if args.tiny else 8192)
  return data.ArraySource(rng.integers(0, 256, (count, size, size, 3), np.uint8), np.arange(count, dtype=np.int32) % 10)


def recipe(args, name="cifar10_gpu", **changes):
  from simclr_jax.programs import config as config_lib

  tiny = {"batch_size": 32, "encoder.width": 0.0625, "encoder.dtype": "float32", "optimizer.warmup_epochs": 0.1}
  return config_lib.replace(config_lib.load(name), changes | (tiny if args.tiny else {}))


def resnet50(args, batch, microbatches=1):
  size = 32 if args.tiny else 224
  return recipe(
    args,
    **{
      "encoder.depth": 18 if args.tiny else 50, "encoder.stem": "imagenet", "augment.size": size, "augment.canvas": size,
      "batch_size": batch, "microbatches": microbatches, "train_epochs": 100.0,
    },
  )  # fmt: skip


def timed(args, config, source):
  """What `simclr time` measures of a step."""
  from simclr_jax.programs import timing
  from simclr_jax.runtime import mesh as mesh_lib

  began = time.perf_counter()
  step = timing.Step(config, source, mesh_lib.make_mesh())
  compiled = time.perf_counter() - began
  return step, {"compile_seconds": compiled} | step.measure()


# ---- stages ----------------------------------------------------------------------------------------------------------


def machine(args):
  import jax

  device = jax.devices()[0]
  versions = {}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax.checkpoint", "torch", "numpy"):
    try:
      versions[name] = __import__(
        name.partition(".")[0] if name != "orbax.checkpoint" else name, fromlist=["_"]
      ).__version__
    except Exception:
      versions[name] = None
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "memory": (device.memory_stats() or {}).get("bytes_limit"),
    "processor": platform.processor() or platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "versions": versions,
  }


def numbers(args):
  """Loss, h and gradients of one batch against the CPU: float32 with exact products, and bfloat16."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import contrast
  from simclr_jax.encoder import resnet

  rng = np.random.default_rng(0)
  images = rng.random((8 if args.tiny else 64, 2, 32, 32, 3), np.float32)
  found = {}
  for dtype in ("float32", "bfloat16"):
    net = resnet(18, width=0.25, stem="cifar", dtype=dtype)

    def loss(params, stats, x, net=net):
      h, _ = net.apply(
        {"params": params, "batch_stats": stats}, x.reshape(-1, *x.shape[2:]), train=True, mutable=["batch_stats"]
      )
      return contrast.nt_xent(h.reshape(*x.shape[:2], -1), temperature=0.5)[0], h

    answers = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
      with jax.default_device(device), jax.default_matmul_precision("highest"):
        variables = net.init(jax.random.key(0), jnp.asarray(images[:1, 0]))
        answer = jax.jit(jax.value_and_grad(loss, has_aux=True))(
          variables["params"], variables["batch_stats"], jnp.asarray(images)
        )
      answers.append(jax.device_get(answer))
    ((loss_cpu, h_cpu), grads_cpu), ((loss_here, h_here), grads_here) = answers
    flat = [np.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (grads_cpu, grads_here)]
    found[dtype] = {
      "loss": float(abs(loss_here - loss_cpu) / abs(loss_cpu)),
      "h": float(np.linalg.norm(h_here - h_cpu) / np.linalg.norm(h_cpu)),
      "gradients": float(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])),
    }
  return {"relative_differences": found, "asked": {"float32": 1e-4}}


def losses(args):
  """NT-Xent dense, tiled, and over an encoder in parts, on this device."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import contrast
  from simclr_jax.runtime import mesh as mesh_lib

  n = 256 if args.tiny else 4096
  z = jax.random.normal(jax.random.key(0), (n, 2, 128))
  mesh = mesh_lib.make_mesh()
  forms = {
    "dense": functools.partial(contrast.nt_xent, temperature=0.1),
    "tiled": functools.partial(contrast.nt_xent_tiled, temperature=0.1, mesh=mesh, tile=n // 4),
  }
  values = {}
  for name, form in forms.items():
    value, gradient = jax.jit(jax.value_and_grad(lambda z, form=form: form(z)[0]))(z)
    values[name] = float(value), np.asarray(gradient)
  a, b = values["dense"], values["tiled"]
  return {
    "value": abs(a[0] - b[0]) / a[0],
    "gradient": float(jnp.linalg.norm(a[1] - b[1]) / jnp.linalg.norm(a[1])),
    "n": n,
  }


def augmentation(args):
  """Crops, colors and blur of the same seeds on this device and on the CPU."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import augment_on_device

  rng = np.random.default_rng(0)
  n, side, size = (4, 32, 32) if args.tiny else (32, 256, 224)
  image = rng.integers(0, 256, (n, side, side, 3), np.uint8)
  extent, seed = np.full((n, 2), side, np.int32), np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32)
  make = jax.jit(functools.partial(augment_on_device.two_views, size=size, precision="highest"))
  views = []
  for device in (jax.devices("cpu")[0], jax.devices()[0]):
    with jax.default_device(device):
      views.append(np.asarray(make(jnp.asarray(image), jnp.asarray(extent), jnp.asarray(seed))))
  difference = np.abs(views[1] - views[0])
  return {"largest": float(difference.max()), "mean": float(difference.mean())}


def compile(args):
  """Seconds until the first step of the recipe is done: cold, and with the programs of the run before kept."""
  seconds = []
  with tempfile.TemporaryDirectory() as cache:
    for _ in ("cold", "warm"):
      env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
      done = run_stage(args, "cifar_compile", 100, env)
      seconds.append(done.get("compile_seconds", done.get("error")))
  return dict(zip(("cold", "warm"), seconds, strict=True))


def cifar_compile(args):
  return {"compile_seconds": timed(args, recipe(args), source_of(args))[1]["compile_seconds"]}


def cifar_speed(args):
  """Seconds an epoch of the recipe, the host's time a step, and the memory that the compiler and the device account for."""
  import jax

  source = source_of(args)
  config = recipe(args)
  step, measured = timed(args, config, source)
  began, count = time.perf_counter(), 50
  for _ in range(count):
    next(step.stream)
  host = (time.perf_counter() - began) / count
  stats = jax.devices()[0].memory_stats() or {}
  epoch = measured["step_seconds"] * len(source) / config.batch_size
  return measured | {
    "seconds_an_epoch": epoch, "epoch_images": len(source), "host_seconds_a_step": host,
    "peak_bytes": stats.get("peak_bytes_in_use"), "goal_seconds_an_epoch": 2.5,
  }  # fmt: skip


def profile(args):
  """The device's time of ten steps by operation, from the profiler's own file."""
  import jax

  step, _ = timed(args, recipe(args), source_of(args))
  state = step.init(jax.random.key(0))
  with tempfile.TemporaryDirectory() as folder:
    jax.profiler.start_trace(folder)
    for i in range(10):
      state, metrics = step.compiled(state, step.batches[i % 2])
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    seconds, busy = {}, 0.0
    for plane in planes:
      if "/device:GPU" not in plane.name:
        continue
      for line in plane.lines:
        if "Stream" in line.name:
          for event in line.events:
            name = event.name.split(".")[0]
            seconds[name] = seconds.get(name, 0.0) + event.duration_ns / 1e9
            busy += event.duration_ns / 1e9
  top = sorted(seconds.items(), key=lambda item: -item[1])[:25]
  return {"planes": [plane.name for plane in planes], "busy_seconds": busy, "top": top, "steps": 10}


def flags(args):
  """The step with each of XLA's flags on its own, as a fraction of the step without."""
  rows = {}
  for flag in ("", *FLAGS[: 1 if args.tiny else None]):
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
    done = run_stage(args, "cifar_step", 60, env)
    rows[flag or "none"] = done.get("step_seconds", done.get("error"))
  base = rows["none"]
  fractions = {
    flag: value / base for flag, value in rows.items() if isinstance(value, float) and isinstance(base, float)
  }
  return {"step_seconds": rows, "of_none": fractions}


def cifar_step(args):
  return {"step_seconds": timed(args, recipe(args), source_of(args))[1]["step_seconds"]}


def resnet50_speed(args):
  """Images a second of ResNet-50 at 224 pixels by batch; color and blur in the step."""
  rows = {}
  for batch, microbatches in ((64, 2),) if args.tiny else ((256, 1), (512, 1), (1024, 2), (4096, 8)):
    source = source_of(args, size=32 if args.tiny else 224, count=max(batch, 256 if args.tiny else 2048))
    try:
      _, measured = timed(args, resnet50(args, batch, microbatches), source)
    except Exception as error:
      measured = {"error": str(error).splitlines()[0][:300]}
    rows[f"{batch} in {microbatches}"] = measured
  return rows


def torch_resnet50(args):
  """Two views of a batch of images through torchvision's ResNet-50: compiled, channels last, bfloat16, forward, backward, SGD."""
  import torch
  import torchvision

  device = "cuda" if torch.cuda.is_available() else "cpu"
  rows = {}
  for batch in (4,) if args.tiny else (256, 512):
    net = torchvision.models.resnet50().to(device, memory_format=torch.channels_last)
    net.fc = torch.nn.Identity()
    compiled = net if args.tiny else torch.compile(net)
    sgd = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    x = torch.rand(2 * batch, 3, *([32, 32] if args.tiny else [224, 224]), device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def step(compiled=compiled, sgd=sgd, x=x):
      with torch.autocast(device, torch.bfloat16):
        loss = compiled(x).float().square().mean()
      sgd.zero_grad(set_to_none=True)
      loss.backward()
      sgd.step()
      if device == "cuda":
        torch.cuda.synchronize()

    for _ in range(3):
      step()
    seconds = []
    for _ in range(3 if args.tiny else 10):
      began = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - began)
    rows[f"{batch}"] = {
      "step_seconds": statistics.median(seconds),
      "images_per_second": batch / statistics.median(seconds),
    }
  return rows


def largest_batch(args):
  """One step each of ever larger batches with all their negatives, in microbatches of 512."""
  rows = {}
  for batch in (128,) if args.tiny else (16384, 65536):
    source = source_of(args, size=32 if args.tiny else 96, count=256 if args.tiny else 2048)
    config = resnet50(args, batch, batch // (64 if args.tiny else 512))
    from simclr_jax.programs import config as config_lib

    config = config_lib.replace(
      config, {"batch_size": batch, "augment.size": source.read(0).shape[0], "augment.canvas": source.read(0).shape[0]}
    )
    try:
      rows[f"{batch}"] = timed(args, config, source)[1]
    except Exception as error:
      rows[f"{batch}"] = {"error": str(error).splitlines()[0][:300]}
      break
  return rows


def cifar_training(args):
  """As many epochs of the recipe as fit into the rest of the time, with kNN and linear evaluation at their end."""
  from simclr_jax.programs import pretrain

  epoch = args.seconds_an_epoch or 3.0
  reserve = 5 if args.tiny else 45  # start, compile, evaluation
  epochs = max(1.0, (args.limit - reserve) / (1.05 * epoch))
  changes = (
    {"train_epochs": 0.0, "train_steps": 4}
    if args.tiny
    else {
      "train_epochs": float(int(epochs)),
      "data.train": f"{args.data}:train",
      "data.test": f"{args.data}:test",
      "optimizer.base_lr": 0.06,
    }
  )
  config = recipe(args, **changes)
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    if args.tiny:
      images = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 32, 3), np.uint8)
      labels = np.arange(64) % 10
      np.savez(f"{folder}/a.npz", images=images[0], labels=labels, test_images=images[1], test_labels=labels)
      from simclr_jax.programs import config as config_lib

      config = config_lib.replace(
        config,
        {
          "data.train": f"npz:{folder}/a.npz",
          "data.test": f"npz:{folder}/a.npz:test",
          "evaluate.every_epochs": 0.0,
          "checkpoint.every_epochs": 0.0,
        },
      )
    result = pretrain.run(config, f"{folder}/run")
    rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
  return {
    "epochs": config.train_epochs,
    "seconds": time.perf_counter() - began,
    "scores": result["scores"],
    "curve": [{key: row[key] for key in ("step", "seconds", "knn", "loss") if key in row} for row in rows],
  }


# ---- the whole -------------------------------------------------------------------------------------------------------

RUN = {
  "machine": machine, "numbers": numbers, "losses": losses, "augmentation": augmentation, "compile": compile,
  "cifar_speed": cifar_speed, "profile": profile, "flags": flags, "resnet50": resnet50_speed,
  "torch_resnet50": torch_resnet50, "largest_batch": largest_batch, "cifar_training": cifar_training,
  "cifar_compile": cifar_compile, "cifar_step": cifar_step,
}  # fmt: skip


def run_stage(args, stage, limit, env=None) -> dict:
  """The result of a stage in a process of its own, or dict(error)."""
  command = [
    sys.executable,
    "-m",
    "benchmarks.gpu.check",
    f"--stage={stage}",
    f"--limit={limit}",
    f"--data={args.data}",
  ]
  command += [f"--seconds_an_epoch={args.seconds_an_epoch}"] + ["--tiny"] * args.tiny
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit + 20, env=env)
  except subprocess.TimeoutExpired:
    return {"error": f"took more than {limit + 20:.0f} s"}
  lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
  if done.returncode or not lines:
    return {"error": f"exit code {done.returncode}: {done.stderr[-1500:]}"}
  return json.loads(lines[-1].removeprefix("RESULT "))


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", default="", help="a data set with the splits train and test, such as npz:cifar10.npz")
  parser.add_argument("--output", default="gpu.json")
  parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
  parser.add_argument("--tiny", action="store_true", help="a rehearsal on any machine")
  parser.add_argument("--stage", choices=RUN, help=argparse.SUPPRESS)
  parser.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
  parser.add_argument("--seconds_an_epoch", type=float, default=0.0, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.stage:
    print(f"RESULT {json.dumps(RUN[args.stage](args))}", flush=True)
    return 0
  began, results = time.monotonic(), {"date": time.strftime("%Y-%m-%d"), "tiny": args.tiny}
  for stage, most in STAGES.items():
    left = 60 * args.minutes - (time.monotonic() - began)
    # The training at the end is what all the rest is for: two minutes stay for it.
    limit = min(most, left - 120) if most else left - 15
    if limit < 10 and not args.tiny:
      results[stage] = {"error": "no time was left"}
    else:
      start = time.monotonic()
      results[stage] = run_stage(args, stage, max(limit, 60.0) if args.tiny else limit)
      results[stage]["stage_seconds"] = time.monotonic() - start
    args.seconds_an_epoch = results.get("cifar_speed", {}).get("seconds_an_epoch", 0.0)
    pathlib.Path(args.output).write_text(json.dumps(results, indent=1))
    print(f"{stage:16}{results[stage].get('error', 'done')[:300]}", flush=True)
  return int(any("error" in value for value in results.values() if isinstance(value, dict)))


if __name__ == "__main__":
  sys.exit(main())
