"""The likelihood gradient: every policy gradient is weighted maximum likelihood.

As ∇π = π ∇log π, the unified estimator `stable · Â / π_denominator · ∇π_θ` (arXiv:2509.04419) puts
the constant weight `stable · ratio · Â` on each token's log π_θ. `weighted_loss` is that sentence.
"""

import chex
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from ptjax.pieces import advantage
from ptjax.pieces import masking
from ptjax.pieces import reduction


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
    Scalar loss, and the metrics `pieces/...` of the pieces given.
  """
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  metrics = {'pieces/advantage_abs_mean': reduction.token_mean(jnp.abs(advantages), loss_mask)}
  weights = ad_checkpoint.checkpoint_name(advantages, 'pieces/advantages')
  if ratio is not None:
    chex.assert_equal_shape([log_probs, ratio])
    metrics['pieces/ratio_mean'] = reduction.token_mean(ratio, loss_mask)
    weights = weights * ad_checkpoint.checkpoint_name(ratio, 'pieces/ratio')
  if stable is not None:
    chex.assert_equal_shape([log_probs, stable])
    stable = ad_checkpoint.checkpoint_name(stable.astype(log_probs.dtype), 'pieces/stable')
    metrics['pieces/mask_fraction'] = reduction.token_mean(1.0 - stable, loss_mask)
    weights = weights * stable
  weights = jax.lax.stop_gradient(weights)
  if value is None:
    objective = weights * log_probs
  else:
    objective = weights * (log_probs - jax.lax.stop_gradient(log_probs))
    objective = objective + jax.lax.stop_gradient(value)
  return -reduce(objective, loss_mask), jax.lax.stop_gradient(metrics)
