"""The update rule: LARS (or SGD-Nesterov, Adam, AdamW) under linear warm-up and cosine decay.

LARS (You et al., arXiv 1708.03888) rescales each tensor's step by `trust_coefficient * |w| / |g|`, which is what
lets batches of 4,096 and more train at a learning rate of 4.8. The numerics are those of the official
`lars_optimizer.py`: weight decay joins the gradient before the trust ratio, the learning rate sits inside the
momentum buffer, and BatchNorm parameters, biases and the supervised head get plain momentum.
"""

import re

import jax
import jax.numpy as jnp
import optax


def _names(path):
  return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def exclude_from_l2(path) -> bool:
  """True for what SGD and Adam do not decay: scales and biases of BatchNorm and LayerNorm, and a patch projection, which is
  never trained."""
  *modules, leaf = _names(path)
  # The name of the module itself: in an encoder of one's own, a ConvNorm or PreNorm may contain convolutions.
  of_norm = leaf == "bias" and bool(modules) and bool(re.search("norm|bn", modules[-1], re.IGNORECASE))
  return leaf == "scale" or of_norm or "patch_embed" in modules


def exclude_from_lars(path) -> bool:
  """True for what LARS neither adapts nor decays: BatchNorm, every bias, and all of the classifier, as in the official code
  (model.py: batch_normalization|bias|head_supervised); and a patch projection and a class token, which is one vector."""
  *modules, leaf = _names(path)
  return leaf in ("scale", "bias", "class_token") or modules[:1] == ["classifier"] or "patch_embed" in modules


def _mask(keep):
  return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: keep(path), params)


def lars(learning_rate, *, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, exclude=exclude_from_lars):
  """LARS with the official exclusions.

  Per tensor, with g the gradient and w the parameter (f32):
    g <- g + weight_decay * w;  r = trust_coefficient * |w| / |g|, or 1 if either norm is 0
    v <- momentum * v + learning_rate * r * g;  w <- w - v
  Where `exclude(path)` is true there is no decay and r = 1.

  Args:
    learning_rate: a float or an optax schedule.
    exclude: key path (as jax.tree_util gives it) -> bool.

  Source: official lars_optimizer.py; v1 paper section 2.2; arXiv 1708.03888.
  """
  adapted = _mask(lambda path: not exclude(path))
  return optax.lars(
    learning_rate,
    weight_decay=weight_decay,
    weight_decay_mask=adapted,
    trust_coefficient=trust_coefficient,
    trust_ratio_mask=adapted,
    momentum=momentum,
  )


def sgd_nesterov(learning_rate, *, momentum=0.9, weight_decay=0.0):
  """SGD with Nesterov momentum and L2 on everything but BatchNorm, the learning rate inside the velocity.

  v <- momentum * v + lr * g;  w <- w - (lr * g + momentum * v).  Source: Keras SGD as the official model.py uses it.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_mask(lambda path: not exclude_from_l2(path))),
    optax.scale_by_learning_rate(learning_rate),
    optax.trace(decay=momentum, nesterov=True),
  )


def adam(learning_rate, *, momentum=0.9, weight_decay=0.0):
  """Adam with L2 in the gradient, as the official model.py adds it to the loss; `momentum` is b1."""
  decay = optax.add_decayed_weights(weight_decay, mask=_mask(lambda path: not exclude_from_l2(path)))
  return optax.chain(decay, optax.adam(learning_rate, b1=momentum, eps=1e-7))  # eps: Keras's default


def adamw(learning_rate, *, momentum=0.9, weight_decay=0.0):
  """AdamW (arXiv 1711.05101): decay outside the adaptive step, on what LARS would decay; `momentum` is b1."""
  mask = _mask(lambda path: not exclude_from_lars(path))
  return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=mask)


OPTIMIZERS = {"lars": lars, "sgd": sgd_nesterov, "adam": adam, "adamw": adamw}


def train_steps(config, num_examples: int) -> int:
  """Number of updates: `config.train_steps`, or if that is 0 the official N * epochs // B + 1 (model.py)."""
  return config.train_steps or int(num_examples * config.train_epochs // config.batch_size) + 1


def learning_rate(config, num_examples: int):
  """The schedule step -> learning rate (f32): linear warm-up from 0, then cosine to 0 at the last step.

  peak = base_lr * batch_size / 256 (lr_scaling="linear"), base_lr * sqrt(batch_size) ("sqrt"), or base_lr ("none").
  The first step's rate is exactly 0 whenever there is warm-up.

  Args:
    config: needs batch_size, train_epochs, train_steps and optimizer.{base_lr, lr_scaling, warmup_epochs}.
    num_examples: N, the size of the training set.

  Raises:
    ValueError: unknown lr_scaling.
  Source: official model.py WarmUpAndCosineDecay; v1 paper section 2.2 and App. B.1 (square-root scaling).
  """
  c = config.optimizer
  scale = {"linear": config.batch_size / 256, "sqrt": config.batch_size**0.5, "none": 1.0}
  if c.lr_scaling not in scale:
    raise ValueError(f"optimizer.lr_scaling={c.lr_scaling!r}: expected one of {', '.join(scale)}")
  peak = c.base_lr * scale[c.lr_scaling]
  total = train_steps(config, num_examples)
  warmup = int(round(c.warmup_epochs * num_examples // config.batch_size))
  if warmup > total:
    raise ValueError(
      f"optimizer.warmup_epochs={c.warmup_epochs} is {warmup} steps, more than the {total} of the schedule: "
      "shorten the warm-up or train longer"
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
    cosine = 0.5 * peak * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup, step / max(warmup, 1) * peak, cosine)

  return schedule


def create(config, num_examples: int):
  """(optax transformation, schedule) for `config.optimizer`: name, base_lr, lr_scaling, warmup_epochs,
  momentum, weight_decay.

  Raises:
    ValueError: unknown optimizer name.
  """
  schedule = learning_rate(config, num_examples)
  return rule(config, schedule), schedule


def rule(config, schedule):
  """The optax transformation of `config.optimizer` (name, momentum, weight_decay) with the learning rate of a schedule.

  Raises:
    ValueError: unknown optimizer name.
  """
  c = config.optimizer
  if c.name not in OPTIMIZERS:
    raise ValueError(f"optimizer.name={c.name!r}: expected one of {', '.join(OPTIMIZERS)}")
  return OPTIMIZERS[c.name](schedule, momentum=c.momentum, weight_decay=c.weight_decay)


def staged(tx, trains):
  """`tx`, which trains some parts of a network only at times: while a part waits, it and its moments stay.

  Without gradients Adam would count on, and its next steps would be several times too long; LARS would gather the decay
  of the weights.  The learning rate is that of all updates.

  Args:
    trains: {part: int32 number of updates done -> bool}, where parts are top-level names of the parameters; those that are
      not named are always trained.
  """

  def label(params):
    return {name: name if name in trains else "" for name in params}

  def at_times(now):
    def begin(params):
      # Of the type that is counted on below, so that transformations of this kind may contain each other.
      return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), tx.init(params)

    def update(updates, state, params=None):
      clock, before = state
      updates, after = tx.update(updates, before, params)
      moves = now(clock.count)

      def kept(old, new):
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(moves, new, old)

      after = jax.tree.map(kept, before, after, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
      clock = optax.ScaleByScheduleState(clock.count + 1)
      return jax.tree.map(lambda u: jnp.where(moves, u, 0), updates), (clock, after)

    return optax.GradientTransformation(begin, update)

  return optax.partition({"": tx, **{part: at_times(now) for part, now in trains.items()}}, label)


def classifier_decay(config) -> float:
  """The weight decay of the classifier that is left to `classifier_l2`: that of `config.optimizer` with LARS, else 0."""
  return config.optimizer.weight_decay if config.optimizer.name == "lars" else 0.0


def classifier_l2(params, weight_decay):
  """weight_decay * |kernel|^2 / 2 over the classifier, the one decay term LARS leaves to the loss.

  Source: official model.py add_weight_decay (head_supervised kernels only).
  """
  kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _names(path)[-1] != "bias"]
  return weight_decay * 0.5 * sum(jnp.sum(jnp.square(k)) for k in kernels)
