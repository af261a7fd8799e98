"""The input pipeline against the official one, PIL-based ones and bare JPEG decoding: images a second and core.

  git clone https://github.com/google-research/simclr /tmp/simclr
  python -m benchmarks.input_pipeline --official=/tmp/simclr/tf2 [--torch_python=/tmp/torchvenv/bin/python] [--rounds=5]

One source image is two 224-pixel views.  Time is the processor time of the whole process, all threads, so a busy
machine disturbs it little; everything takes turns, one pass over the set each, and a ratio is the median over rounds
of the official pipeline's time in the same round.  The files of tf2/ (data.py, data_util.py) run unchanged, over a
prepared TensorFlow Datasets set of the same TFRecord shards that we read; with blur, as its model.py does it on the
device, here on the host.  --torch_python names a Python with torch, torchvision and lightly (none is needed).

The pictures are made here: 1/f noise in correlated colors with sensor noise, 500 x 375 and 375 x 500, JPEGs of
quality 90 and about 100 kB, as ImageNet's.  The second table is of 32-pixel arrays in memory.
"""

import argparse
import functools
import io
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

BATCH = 64


def jpeg(seed, height, width):
  """A picture with the statistics of a photograph, about 100 kB at 500 x 375."""
  from PIL import Image

  rng = np.random.default_rng(seed)
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  amplitude = 1 / np.maximum(frequency, 1 / max(height, width)) ** 1.2
  phase = [np.exp(2j * np.pi * rng.random(amplitude.shape)) for _ in range(3)]
  x = np.stack([np.fft.irfft2(amplitude * p, (height, width)) for p in phase], -1)
  x = x / x.std((0, 1)) @ np.array([[1, 1, 1], [0.5, 0, -0.5], [-0.25, 0.5, -0.25]]) * 40 + 128
  x = x + 8 * rng.normal(size=(height, width, 1))
  buffer = io.BytesIO()
  Image.fromarray(np.clip(x, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def prepare(folder, count):
  """A TensorFlow Datasets set of `count` JPEGs in 8 TFRecord shards; returns its builder."""
  import tensorflow_datasets as tfds

  class Photos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
      features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=8),
      }
      features = tfds.features.FeaturesDict(features)
      return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(count):
        size = (500, 375) if i % 4 == 0 else (375, 500)
        yield i, {"image": io.BytesIO(jpeg(i, *size)), "label": i % 8}

  builder = Photos(data_dir=folder)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=8))
  return builder


def endless(batches):
  """A function that takes a given number of images from an endless stream."""

  def take(images):
    for _ in range(images // BATCH):
      next(batches)

  return take


# ---- the official pipeline ---------------------------------------------------------------------------------------


def bounded(dataset):
  """The same pipeline with at most 4 batches in its buffers, so that what one turn makes the next does not take."""
  import tensorflow as tf

  options = tf.data.Options()
  options.autotune.ram_budget = 4 * BATCH * 2 * 224 * 224 * 3 * 4
  return endless(dataset.with_options(options).as_numpy_iterator())


def official(path, size):
  """(data module, data_util module) of tf2/, with their flags set."""
  from absl import flags

  sys.path.insert(0, str(path))
  if "image_size" not in flags.FLAGS:
    flags.DEFINE_integer("image_size", size, "")
    flags.DEFINE_float("color_jitter_strength", 1.0, "")
    flags.DEFINE_string("train_mode", "pretrain", "")
    flags.DEFINE_string("train_split", "train", "")
    flags.DEFINE_string("eval_split", "train", "")
    flags.DEFINE_bool("cache_dataset", False, "")
    flags.FLAGS(["benchmark"])
  flags.FLAGS.image_size = size
  import data
  import data_util

  return data, data_util


def official_jpegs(path, builder, blur):
  import tensorflow as tf

  data, data_util = official(path, 224)
  dataset = data.build_input_fn(builder, BATCH, None, True)(tf.distribute.InputContext())
  if blur:

    def blurred(features, labels):
      views = data_util.batch_random_blur(tf.split(features, 2, axis=-1), 224, 224)
      return tf.concat(views, -1), labels

    dataset = dataset.map(blurred, num_parallel_calls=tf.data.AUTOTUNE)
  return bounded(dataset)


def official_arrays(path, images):
  """What data.py maps over the images, over images that are decoded already."""
  import tensorflow as tf

  data, _ = official(path, 32)
  preprocess = data.get_preprocess_fn(True, is_pretrain=True)
  dataset = tf.data.Dataset.from_tensor_slices(images).shuffle(50 * BATCH).repeat()
  dataset = dataset.map(lambda x: tf.concat([preprocess(x), preprocess(x)], -1), num_parallel_calls=tf.data.AUTOTUNE)
  return bounded(dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE))


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(source, transform):
  from simclr_jax import data

  return endless(data.train_stream(source, transform, batch_size=BATCH, seed=0))


def ours_arrays(source, *, crop):
  """Images as they are; with `crop`, the crops that the step would make are made on this CPU by the same code."""
  import jax

  from simclr_jax import augment_on_device, data

  stream = data.train_stream(source, None, batch_size=BATCH * 8, seed=0)
  crops = jax.jit(functools.partial(augment_on_device.random_crops, size=32))

  def take(images):
    for _ in range(images // (BATCH * 8)):
      batch = next(stream)
      if crop:
        crops(batch["views"]["image"], batch["views"]["extent"], batch["seed"]).block_until_ready()

  return take


def resident(source):
  from simclr_jax import data

  return endless(map(data.draws(source, batch_size=BATCH, seed=0), itertools.count()))


def decoding(source):
  """tf.data that decodes and does nothing else."""
  import tensorflow as tf

  files = [source.item(i)[0] for i in range(len(source))]
  dataset = tf.data.Dataset.from_tensor_slices(files).repeat()
  dataset = dataset.map(lambda x: tf.shape(tf.io.decode_jpeg(x, channels=3)), num_parallel_calls=os.cpu_count())
  return endless(dataset.batch(BATCH).prefetch(2).as_numpy_iterator())


# ---- torch -------------------------------------------------------------------------------------------------------


def torch_child(folder, kind):
  """In the other Python: answers every line, a number of images, with the processor seconds they took."""
  import torch
  from PIL import Image
  from torch.utils.data import DataLoader, Dataset

  torch.set_num_threads(1)
  files = sorted(pathlib.Path(folder).glob("*.jpg"))
  if kind == "lightly":
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=224)
    load = lambda path: transform(Image.open(path).convert("RGB"))  # noqa: E731
  else:
    from torchvision.io import decode_jpeg, read_file
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])
    distort = v2.Compose(
      [
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(23)], p=0.5),
        v2.ToDtype(torch.float32, scale=True),
      ]
    )
    one = (lambda x: distort(crop(x))) if kind == "torchvision" else crop
    load = lambda path: [one(x) for x in [decode_jpeg(read_file(str(path)))] for _ in range(2)]  # noqa: E731

  class Photos(Dataset):
    def __len__(self):
      return len(files)

    def __getitem__(self, i):
      return load(files[i])

  loader = DataLoader(Photos(), batch_size=BATCH, shuffle=True)
  for line in sys.stdin:
    count, start = 0, time.process_time()
    for batch in loader:
      count += len(batch[0])
      if count >= int(line):
        break
    print((time.process_time() - start) / count, flush=True)


class Torch:
  """A pipeline in another Python, which sleeps between its turns."""

  def __init__(self, python, folder, kind):
    command = [python, str(pathlib.Path(__file__).resolve()), f"--child={kind}", f"--folder={folder}"]
    self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def seconds(self, images):
    self._child.stdin.write(f"{images}\n")
    self._child.stdin.flush()
    return float(self._child.stdout.readline())


# ---- turns -------------------------------------------------------------------------------------------------------


def settle():
  """Waits until the threads that work ahead have filled their buffers, as they were when the turn began."""
  before = -1.0
  while time.process_time() - before > 2e-3:
    before = time.process_time()
    time.sleep(0.1)


def turns(pipelines, rounds, images, title, base="official"):
  seconds = {name: [] for name in pipelines}
  for number in range(rounds + 1):
    for name, pipeline in pipelines.items():
      few = images // 8 if name.startswith(("lightly", "torchvision, all")) else images
      if isinstance(pipeline, Torch):
        taken = pipeline.seconds(max(BATCH, few))
      else:
        start = time.process_time()
        pipeline(images)
        settle()
        taken = (time.process_time() - start) / images
      if number:  # the first round warms up
        seconds[name].append(taken)
  print(f"\n{title}: {rounds} rounds of {images} images")
  print(f"{'':48}{'img/s/core':>11}{'ms/img':>9}{'x official':>12}   (rounds)")
  rows = []
  for name, taken in seconds.items():
    ratios = [b / t for b, t in zip(seconds[base], taken, strict=True)]
    row = {"pipeline": name, "rate": 1 / statistics.median(taken), "ratio": statistics.median(ratios), "ratios": ratios}
    rows.append(row)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{name:48}{row['rate']:>11,.0f}{1e3 / row['rate']:>9.3f}{row['ratio']:>12.2f}   {spread}", flush=True)
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--official", help="folder tf2/ of a checkout of google-research/simclr")
  parser.add_argument("--torch_python", help="a Python with torch, torchvision and lightly")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--images", type=int, default=512)
  parser.add_argument("--folder", help="keep the pictures here")
  parser.add_argument("--skip_arrays", action="store_true", help="without the second table")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--json", action="store_true", help="print the rows as JSON in the last line")
  args = parser.parse_args()
  if args.child:
    return torch_child(args.folder, args.child)
  if not args.official or not (pathlib.Path(args.official) / "data_util.py").exists():
    parser.error("--official must name the folder tf2/ of a checkout of google-research/simclr")
  os.environ["JAX_PLATFORMS"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""
  from simclr_jax import augment, data

  folder = args.folder or tempfile.mkdtemp()
  builder = prepare(folder, args.images)
  source = data.open_source("tfds:photos", data_dir=folder)
  data.train_stream(source, None, batch_size=1, seed=0)  # sets TensorFlow's threads as `simclr` does, for all
  crop = functools.partial(augment.two_crops, size=224)
  pipelines = {
    "official": official_jpegs(args.official, builder, blur=False),
    "official, blur on the host": official_jpegs(args.official, builder, blur=True),
    "ours, where=host (blur included)": ours(source, functools.partial(augment.two_views, size=224)),
    "ours, where=device, bicubic": ours(source, crop),
    "ours, where=device, bilinear": ours(source, functools.partial(crop, resize="bilinear")),
    "ours, where=device_crop": ours(source, None),
    "JPEG decoding alone (tf.data)": decoding(source),
  }
  if args.torch_python:
    files = pathlib.Path(folder) / "files"
    files.mkdir(exist_ok=True)
    for i in range(len(source)):
      (files / f"{i:05}.jpg").write_bytes(source.item(i)[0])
    pipelines |= {
      "lightly SimCLRTransform (PIL)": Torch(args.torch_python, files, "lightly"),
      "torchvision, all on tensors": Torch(args.torch_python, files, "torchvision"),
      "torchvision, decode and crops alone": Torch(args.torch_python, files, "crops"),
    }
  rows = turns(pipelines, args.rounds, args.images, "two 224-pixel views of JPEGs of about 100 kB")
  if args.skip_arrays:
    return print(json.dumps(rows)) if args.json else None
  pixels = np.random.default_rng(0).integers(0, 256, (10_240, 32, 32, 3), np.uint8)
  arrays = data.ArraySource(pixels)
  pipelines = {
    "official": official_arrays(args.official, pixels),
    "ours, where=host": ours(arrays, functools.partial(augment.two_views, size=32)),
    "ours, where=device": ours(arrays, functools.partial(augment.two_crops, size=32)),
    "ours, where=device_crop, its crops on this CPU": ours_arrays(arrays, crop=True),
    "ours, where=device_crop": ours_arrays(arrays, crop=False),
    "ours, where=resident": resident(arrays),
  }
  rows += turns(pipelines, args.rounds, 10_240, "two 32-pixel views of arrays in memory")
  if args.json:
    print(json.dumps(rows))


if __name__ == "__main__":
  main()
