"""Algorithm 1 of SimCLR (arXiv 2002.05709), one update: augment, encode, project, contrast, update.

`train_step` is all of it.  The differences between methods are in a `Method` (methods/).  The differences between machines
are passed in: `views` and `network` are the plain functions, or those that encode a large batch in microbatches.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from simclr_jax import accumulate, optimizer
from simclr_jax.model import TrainState, cross_entropy
from simclr_jax.views import Batch


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  views: Callable,
  network: Callable,
  method,
  tx,
  schedule,
  weight_decay: float = 0.0,
):
  """One update.

  Args:
    views: Batch -> what `network` takes: float32 [n, 2, h, w, 3] in [0, 1], t(x) and t'(x) of n images x, or more than 2
      views of each; n is the global batch size.
    network: ({"params", "batch_stats"}, views) -> (model.Outputs, updated batch_stats).
    method: a methods.Method, which defines the loss.
    tx, schedule: what optimizer.create returns.
    weight_decay: on the online classifier's kernel, which LARS leaves alone.

  Returns:
    (next state, metrics as float32 scalars).

  Negatives span the global batch for any number of devices, and so do BatchNorm statistics unless the
  network comes from `of_devices`.
  """
  x = views(batch)

  def objective(params):
    outputs, batch_stats = network({"params": params, "batch_stats": state.batch_stats}, x)
    loss, metrics, updates = method.loss(outputs, state.extra, functools.partial(network, views=x), batch)
    online_loss, online_metrics = online_classifier(outputs.logits, batch.label)
    return loss + online_loss, ({"loss": loss, **metrics, **online_metrics}, batch_stats, updates)

  (_, (metrics, batch_stats, updates)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  if "classifier" in grads and weight_decay:
    decay = jax.grad(optimizer.classifier_l2)(state.params["classifier"], weight_decay)
    grads = {**grads, "classifier": jax.tree.map(jnp.add, grads["classifier"], decay)}
  steps, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, steps)
  extra = method.after({"params": params, "batch_stats": batch_stats}, state.extra, updates)
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  return TrainState(state.step + 1, params, batch_stats, opt_state, extra), metrics


def online_classifier(logits, label):
  """(loss, metrics) of the linear classifier that watches h without touching it.

  Args:
    logits: [n, views, classes], or None without labels.
    label: int32 [n], -1 for images without a label, which do not count.
  """
  if logits is None:
    return jnp.zeros(()), {"online_loss": jnp.zeros(())}
  loss, accuracy = cross_entropy(logits, label)
  return loss, {"online_loss": loss, "online_accuracy": accuracy}


def unsplit(model, device: Callable):
  """(views, network) of `train_step` for a batch that is encoded at once; `device` as in views.ViewPipeline."""

  def network(variables, views, train=True):
    outputs, updated = model.apply(variables, views, train=train, mutable=["batch_stats"])
    return outputs, updated.get("batch_stats", {})

  return device, network


def in_microbatches(model, device: Callable, *, microbatches: int, devices: int, batch_norm: str):
  """(views, network) of `train_step` that encode the batch a part at a time (accumulate.py); `views` then passes the Batch on
  and `network` makes the views."""
  _, encode = unsplit(model, device)

  def moments(variables, batch):
    _, seen = model.apply(variables, device(batch), train=False, mutable=[accumulate.MOMENTS])
    return seen[accumulate.MOMENTS]

  network = accumulate.in_parts(
    lambda variables, batch, train: encode(variables, device(batch), train),
    parts=microbatches,
    devices=devices,
    batch_norm=batch_norm,
    moments=moments,
  )
  return (lambda batch: batch), lambda variables, views, train=True: network(variables, views, train)


def of_devices(network: Callable, groups: int):
  """`network` with BatchNorm per device: each of `groups` devices normalizes both views of its images by its own
  statistics, and the moving statistics are those of all devices.

  Device k of `groups` has the k-th block of n / groups images, so one real device is enough.  Synchronized BatchNorm
  exists to prevent this: the statistics distinguish a pair from the images of other devices (arXiv 2002.05709,
  section 2.2).
  """

  def apply(variables, views, train=True):
    if not train:
      return network(variables, views, train)
    split = views.reshape(groups, len(views) // groups, *views.shape[1:])
    outputs, updated = jax.vmap(lambda part: network(variables, part, train))(split)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return outputs, accumulate.merge(updated, accumulate.momenta(network, variables, split[0]))

  return apply
