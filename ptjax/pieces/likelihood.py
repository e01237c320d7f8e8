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

# The list that `pieces_of` collects in, None outside it; no result depends on it.
_RECORD = contextvars.ContextVar('record', default=None)


def weighted_loss(log_probs, loss_mask, *, advantages, ratio=None, stable=None, value=None, reduce):
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
  if (record := _RECORD.get()) is not None:
    pieces['reduction'] = jax.grad(reduce)(jnp.zeros_like(log_probs), loss_mask)
    record.append(jax.lax.stop_gradient(pieces))
  if value is None:
    objective = weights * log_probs
  else:
    objective = weights * (log_probs - jax.lax.stop_gradient(log_probs))
    objective = objective + jax.lax.stop_gradient(value)
  return -reduce(objective, loss_mask), jax.lax.stop_gradient(metrics)


def pieces_of(loss, *args, **kwargs):
  """Runs `loss(*args, **kwargs)` and returns the pieces of each `weighted_loss` inside it.

  The product of a part's arrays is its weight on every token; the sum over parts is
  -∂loss/∂log_probs, terms over the whole vocabulary aside.

  Args:
    loss: any function that calls `weighted_loss`, once or more, outside a `jit` of its own.
  Returns:
    A list of dicts, one per call in order, of [B, T] arrays: `advantages`, `reduction` (the factor
    the reduction puts on a token), and `ratio` and `stable` where the call has them.
  """
  record = []
  token = _RECORD.set(record)
  try:
    loss(*args, **kwargs)
  finally:
    _RECORD.reset(token)
  return record
