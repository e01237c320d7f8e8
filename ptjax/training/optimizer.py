"""Optimizer recipes: AdamW with its schedule, clipping and decay mask."""

import jax
import optax

# Last path components of the leaves that do not decay unless the user asks for it: shrinking a
# norm's scale, a bias or DoRA's magnitudes regularises nothing, and an embedding row decays on
# every step although its token is rarely seen.
_NOT_DECAYED = ('scale', 'bias', 'embedding', 'magnitude')


def make_optimizer(settings, total_steps, params_shapes):
  """AdamW after clipping by the global norm.

  The update is `-lr * (m_hat / (sqrt(v_hat) + epsilon) + weight_decay * w)`, decoupled weight
  decay as in arXiv:1711.05101 and torch.optim.AdamW. Moments have the parameters' dtype.

  Args:
    settings: config.OptimizerSettings.
    total_steps: optimizer steps at which the schedule reaches its end.
    params_shapes: tree with the parameters' structure; only its paths are read.
  Returns:
    The optax transformation and its schedule, `update count -> learning rate`, for the metrics.
  """
  schedule = make_schedule(settings, total_steps)
  adamw = optax.adamw(
      schedule, b1=settings.beta1, b2=settings.beta2, eps=settings.epsilon,
      weight_decay=settings.weight_decay,
      mask=None if settings.decay_all else decay_mask(params_shapes))
  if settings.max_grad_norm is None:
    return adamw, schedule
  return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw), schedule


def make_schedule(settings, total_steps):
  """Returns `update count -> learning rate`; the first update has count 0.

  With w warm-up steps, update t has rate * (t + 1) / w while t < w: the first update already
  moves and the w-th has the full rate. Afterwards p = (t - w) / (total_steps - w) runs from 0
  towards 1, which the last update does not quite reach, and with e = `end_fraction` the factor is
  1 (constant), 1 - p (1 - e) (linear) or e + (1 - e) (1 + cos(pi p)) / 2 (cosine).
  """
  rate, warmup = settings.learning_rate, settings.warmup_steps
  decay_steps = max(total_steps - warmup, 1)
  after = {
      'constant': optax.constant_schedule(rate),
      'linear': optax.linear_schedule(rate, rate * settings.end_fraction, decay_steps),
      'cosine': optax.cosine_decay_schedule(rate, decay_steps, alpha=settings.end_fraction),
  }[settings.schedule]
  if not warmup:
    return after
  # One warm-up step has nothing to rise over: linear_schedule then stays at its first value.
  rise = optax.linear_schedule(rate / warmup, rate, warmup - 1)
  return optax.join_schedules([rise, after], [warmup])


def decay_mask(params_shapes):
  """True for leaves that weight decay shrinks: matrices other than embeddings.

  Decided by name, since layers are stacked and a norm's scale therefore has two dimensions.
  """
  def decays(path, leaf):
    del leaf
    return jax.tree_util.keystr(path[-1:], simple=True) not in _NOT_DECAYED
  return jax.tree_util.tree_map_with_path(decays, params_shapes)
