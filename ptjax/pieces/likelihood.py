"""The likelihood gradient: every policy gradient is weighted maximum likelihood.

As ∇π = π ∇log π, the unified estimator `stable · Â / π_denominator · ∇π_θ` (arXiv:2509.04419) puts
the constant weight `stable · ratio · Â` on each token's log π_θ. `weighted_loss` is that sentence.
"""

import contextvars
import functools

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import advantage
from ptjax.pieces import masking
from ptjax.pieces import reduction

# What `pieces_of` collects in, None outside it; no result depends on it.
_RECORD = contextvars.ContextVar('record', default=None)


def weighted_loss(log_probs, loss_mask, *, advantages, ratio=None, stable=None, value=None, reduce,
                  name='policy'):
  """Composes the four pieces into a loss, `-reduce(sg(stable · ratio · Â) · log π)`.

  The gradient is exact, -∂loss/∂log_probs = stable · ratio · Â · (the reduction's factor). The
  value is the textbook's if `value` says what that is per token; it never touches the gradient.

  Args:
    log_probs: [B, T] nats; log π_θ of the target tokens. Carries the gradient.
    loss_mask: [B, T] bool; True where the token counts.
    advantages: [B] or [B, T], or a number.
    ratio: [B, T], policy over denominator; None is the current policy, ratio 1.
    stable: [B, T] bool, or a soft gate of floats; None keeps all.
    value: [B, T]; the objective to report, e.g. min(ρÂ, clip(ρ)Â). None reports weight · log π.
    reduce: `(values [B, T], loss_mask) -> scalar`, see `reduction`.
    name: what `pieces_of` calls this part of a loss that has several.
  Returns:
    Scalar loss, and the metrics `pieces/...` of the pieces given. `pieces_of` finds the pieces
    again in any loss composed so.
  """
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  pieces = {'advantages': advantages}
  metrics = {'pieces/advantage_abs_mean': reduction.token_mean(jnp.abs(advantages), loss_mask)}
  if ratio is not None:
    chex.assert_equal_shape([log_probs, ratio])
    pieces['ratio'] = ratio
    metrics['pieces/ratio_mean'] = reduction.token_mean(ratio, loss_mask)
  if stable is not None:
    chex.assert_equal_shape([log_probs, stable])
    pieces['stable'] = stable.astype(log_probs.dtype)
    metrics['pieces/mask_fraction'] = reduction.token_mean(1.0 - pieces['stable'], loss_mask)
  weights = jax.lax.stop_gradient(functools.reduce(jnp.multiply, pieces.values()))
  probe = 0.0
  if (record := _RECORD.get()) is not None:
    pieces['reduction'] = jax.grad(reduce)(jnp.zeros_like(log_probs), loss_mask)
    probe = record.add(name, jax.lax.stop_gradient(pieces))
  if value is None:
    objective = weights * log_probs
  else:
    objective = weights * (log_probs - jax.lax.stop_gradient(log_probs))
    objective = objective + jax.lax.stop_gradient(value)
  return probe - reduce(objective, loss_mask), jax.lax.stop_gradient(metrics)


def pieces_of(loss, *args, **kwargs):
  """Runs `loss(*args, **kwargs)` and returns the pieces of each `weighted_loss` inside it.

  The product of a part's arrays is its weight on every token; the sum over parts is
  -∂loss/∂log_probs, terms over the whole vocabulary aside.

  Args:
    loss: any function that calls `weighted_loss`, once or more, outside a `jit` of its own, and
      returns a scalar or a tuple that begins with one.
  Returns:
    A dict from the name of each call to its pieces, a dict of [B, T] arrays: `advantages`,
    `reduction` (the factor the reduction, and the coefficient of the part in the loss, put on a
    token), and `ratio` and `stable` where the call has them. A name used again gets a number.
  """
  order = []  # of the calls; a dict loses it on its way through jax.grad

  def recorded(probes):
    record = _Record(probes)
    token = _RECORD.set(record)
    try:
      result = loss(*args, **kwargs)
    finally:
      _RECORD.reset(token)
    order[:] = record.parts
    return result[0] if isinstance(result, tuple) else result, record.parts

  shapes = jax.eval_shape(lambda: recorded({})[1])
  probes = {name: jnp.zeros((), part['reduction'].dtype) for name, part in shapes.items()}
  if not probes:
    return {}
  coefficients, parts = jax.grad(recorded, has_aux=True)(probes)
  return {name: {**parts[name], 'reduction': parts[name]['reduction'] * coefficients[name]}
          for name in order}


class _Record:
  """The parts of a loss by name, and a zero added to each one's value.

  The derivative of the whole by that zero is the coefficient of the part in it.
  """

  def __init__(self, probes):
    self.parts = {}
    self._probes = probes

  def add(self, name, pieces):
    count = 1 + sum(known.partition(' ')[0] == name for known in self.parts)
    name = name if count == 1 else f'{name} {count}'
    self.parts[name] = pieces
    return self._probes.get(name, 0.0)
