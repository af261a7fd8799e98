"""Distillation (arXiv 2006.10029, section 2.3): a fine-tuned teacher predicts targets for a student that needs no labels.

The student is smaller, or in self-distillation as large as its teacher.  It is trained by the program for fine-tuning
(finetune.py) with the loss of equation 2, or of equation 3 with labels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import data, exporting
from simclr_jax.evaluation import embed, linear
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import finetune, same, splits, trained
from simclr_jax.runtime import checkpoint, errors, files, loop
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError


def distillation(logits, teacher_logits, temperature: float):
  """-sum_y P_T(y | x; t) log P_S(y | x; t), mean over x; both logits [n, classes], P(y | x; t) = softmax(logits / t).

  Source: arXiv 2006.10029, equation 2.
  """
  target = jax.nn.softmax(teacher_logits / temperature)
  return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits / temperature), 1))


def loss(logits, batch, *, temperature: float, alpha: float):
  """(1 - alpha) * cross-entropy of the labeled images + alpha * distillation of all (equation 3; 2 for alpha = 1).

  Each term is a mean over its images of the batch.  The label of an image is -1 where the student may not know it.  The
  metrics of labels are nan in a batch without one, and left out for alpha = 1.
  """
  distilled = distillation(logits, batch.teacher, temperature)
  agreement = jnp.mean(logits.argmax(1) == batch.teacher.argmax(1))
  metrics = {"distillation_loss": distilled, "agreement": agreement}
  if alpha == 1:
    return distilled, metrics
  supervised, of_labels = finetune.cross_entropy(logits, batch)
  of_labels["supervised_loss"] = jnp.where(jnp.any(batch.label >= 0), supervised, jnp.nan)
  return (1 - alpha) * supervised + alpha * distilled, {**of_labels, **metrics}


class Teacher:
  """A fine-tuned network: `apply(variables, images)` -> logits [n, classes]; variables are numpy.  `config` is that of its
  training, which resized images by `resize`.

  Raises:
    ValueError: `path` holds no classifier, or one of which nobody knows what it was on.
  """

  def __init__(self, path: str):
    opened = trained.open_start(path)
    if "classifier" not in opened.variables or not isinstance(opened.config, config_lib.Finetune):
      raise UserError(
        f"config.teacher={path}: holds no classifier of simclr finetune; name a run of it, or its folder encoder"
      )
    self.config, self.resize = opened.config, opened.resize
    self.num_classes = opened.variables["classifier"]["params"]["bias"].shape[0]
    names = ("encoder", "classifier") + ("projector",) * bool(opened.tap)
    self.variables = {
      collection: {name: opened.variables[name][collection] for name in names if opened.variables[name].get(collection)}
      for collection in ("params", "batch_stats")
    }
    self.apply = functools.partial(finetune.create(opened, self.num_classes).apply, train=False)


class AbstractTeacher:
  """The teacher of a plan that names none: a network like the student, of which only the shapes are known."""

  def __init__(self, config, num_classes: int):
    network = finetune.create(config, num_classes)
    images = jnp.zeros((1, config.augment.size, config.augment.size, 3))
    self.num_classes = num_classes
    self.variables = jax.eval_shape(network.init, jax.random.key(0), images)
    self.apply = functools.partial(network.apply, train=False)


def make_task(
  config, start, source, *, mesh, loss, teacher, evaluators=None, bad_file=None, chosen=(), cache=None
) -> loop.Task:
  """The fine-tuning task with a teacher in it.

  Args:
    teacher: a Teacher or an AbstractTeacher.
    chosen: indices of the images whose labels count.
    cache: the teacher's logits [N, classes] of all images, if config.cache.
  """
  task = finetune.make_task(config, start, source, mesh=mesh, loss=loss, evaluators=evaluators, bad_file=bad_file)
  labeled = np.zeros(len(source), bool)
  labeled[np.asarray(chosen, int)] = config.alpha < 1

  def step(state, batch, *variables):
    for frozen in variables:  # none where the logits are cached
      batch = batch.replace(teacher=jax.lax.stop_gradient(teacher.apply(frozen, batch.pixels)))
    return task.step(state, batch)

  def stream(first):
    for batch in task.stream(first):
      batch = batch.replace(label=np.where(labeled[batch.index], batch.label, -1))
      yield batch.replace(teacher=cache[batch.index]) if config.cache else batch

  constants = () if config.cache else (teacher.variables,)
  return dataclasses.replace(task, step=step, stream=stream, constants=constants)


@errors.of_the_user()
def abstract_step(config, mesh, source):
  """As finetune.abstract_step, with a teacher like the student where config.teacher is not there yet."""
  named = files.absolute(config.teacher).exists()
  teacher = Teacher(config.teacher) if named else AbstractTeacher(finetune.resolve(config)[0], source.num_classes)
  student_loss = functools.partial(loss, temperature=config.temperature, alpha=config.alpha)
  make = functools.partial(make_task, teacher=teacher, loss=student_loss)
  logits = jax.ShapeDtypeStruct((config.batch_size, source.num_classes), np.float32)
  return finetune.abstract_step(config, mesh, source, make, logits if config.cache else None)


def _logits(config, teacher, source, mesh):
  """float32 [n, classes]: the teacher's, one a training image, center-cropped."""
  out = embed.embed(jax.jit(teacher.apply), teacher.variables, embed.eval_set(source, config, mesh), mesh)
  if len(out) != len(source):
    raise UserError(
      f"config.cache=True: {len(source) - len(out)} images are unreadable; remove them, or set it to False"
    )
  return out


def accuracy(config, teacher, test, mesh) -> float:
  """Top-1 of the teacher on the labeled test images that can be read."""
  images = embed.eval_set(test, config, mesh, labeled=True)
  return linear.top_1(embed.embed(jax.jit(teacher.apply), teacher.variables, images, mesh), images.labels())


def check_classes(config, source):
  """Raises UserError if the classes of the teacher, where its folder names them, are not those of the training images."""
  taught = same.classes_of(config.teacher)
  if taught and not np.array_equal(data.match_classes(taught, source.class_names), np.arange(len(taught))):
    first = next(i for i, (a, b) in enumerate(zip(taught, source.class_names, strict=True)) if a != b)
    raise UserError(
      f"config.teacher={config.teacher}: its class {first} is {taught[first]}, that of data.train={config.data.train} is"
      f" {source.class_names[first]}: name the data it was fine-tuned on"
    )


def run(config, workdir, *, resume: bool = False, overwrite: bool = False) -> dict:
  """The program `simclr distill`: prints the student's and the teacher's test accuracy; returns what finetune.run does.

  Raises:
    ValueError: a mistake in the config or the data, on one line.
  """
  mesh = mesh_lib.make_mesh()
  mesh_lib.check_divisible(config.batch_size, mesh)
  begun = same.begun(workdir, resume)
  config, start = finetune.resolve(config, begun)
  teacher = Teacher(config.teacher)
  if not config.augment.resize:  # pixels as the teacher knows them
    resize = config_lib.from_json(checkpoint.read_config(begun)).augment.resize if begun else teacher.resize
    config = config_lib.replace(config, {"augment.resize": resize})
  source, test = splits.check_labeled(config.data, *splits.open_data(config.data))
  if teacher.num_classes != source.num_classes:
    raise UserError(
      f"config.teacher={config.teacher} knows {teacher.num_classes} classes, data.train={config.data.train} has "
      f"{source.num_classes}: name the data it was fine-tuned on"
    )
  check_classes(config, source)
  trained.check_unseen(config.data, test, config.teacher, teacher.config)
  if start:
    trained.check_unseen(config.data, test, config.start, start.config)
  held_out = None if config.data.test else test
  chosen = finetune.choose(source, config.labels, held_out) if config.alpha < 1 else np.zeros(0, int)
  finetune.check(config, finetune.make_task(config, start, source, mesh=mesh))
  with errors.of_the_user():  # a teacher that takes no images of this size
    jax.eval_shape(teacher.apply, teacher.variables, jnp.zeros((1, config.augment.size, config.augment.size, 3)))
  starts = (config.start, config.teacher)
  made_by = {"teacher": exporting.checksum(teacher.variables)}
  if begun:  # before the folder is touched
    same.check_result(files.absolute(workdir) / "teacher.json", made_by, f"the run in {workdir}")
  logits = functools.cache(lambda: _logits(config, teacher, source, mesh))
  if config.cache and overwrite:  # an unreadable image ends it before the older run is deleted
    logits()
  # A file of labels.list may have been edited.
  labeled = {"labels": data.Selection(source, chosen)} if config.alpha < 1 else {}
  again = {"resume": resume, "overwrite": overwrite}
  config, workdir = same.claim(config, workdir, source, test, **again, starts=starts, more=labeled)
  same.check_result(workdir / "teacher.json", made_by, f"the run in {workdir}")
  cache = logits() if config.cache else None
  make = functools.partial(make_task, teacher=teacher, chosen=chosen, cache=cache)
  student_loss = functools.partial(loss, temperature=config.temperature, alpha=config.alpha)
  result = finetune.train(config, start, source, test, workdir, mesh=mesh, loss=student_loss, make=make)
  result["teacher"] = accuracy(config, teacher, test, mesh)
  if not jax.process_index():
    print(
      f"{splits.describe(config.data, test)}: top-1 {100 * result['scores']['accuracy']:.2f} %, its teacher"
      f" {100 * result['teacher']:.2f} %; {result['workdir']}"
    )
  return result


def main(flags, overrides) -> int:
  run(flags.config, flags.workdir, resume=flags.resume, overwrite=flags.overwrite)
  return 0
