"""The reference-policy denominator: which policy π_θ is divided by.

Each function returns `ratio` = π_θ / π_denominator as [B, T], to be read as a constant:
`likelihood.weighted_loss` stops its gradient. Log-ratios are clamped to ±20 before `exp`. Arrays
come in cleaned (`masking.clean`), so the ratio in padding is 1.
"""

import chex
import jax.numpy as jnp

from ptjax.pieces import masking

MAX_LOG_RATIO = 20.0  # nats; e^20 is 5e8, past any ratio that means something


def _bounded_exp(log_ratio):
  return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def current(log_probs):
  """The policy itself: ratio 1. SFT, REINFORCE and every preference loss."""
  return jnp.ones_like(log_probs)


def unit(log_probs):
  """π_denominator = 1: the ratio is the token's probability. DFT, and demonstrations in LUFFY."""
  return jnp.exp(jnp.minimum(log_probs, 0.0))


def old(log_probs, old_log_probs):
  """The policy that drew the tokens: one ratio per token. PPO, GRPO."""
  chex.assert_equal_shape([log_probs, old_log_probs])
  return _bounded_exp(log_probs - old_log_probs)


def sequence_mean(log_probs, old_log_probs, loss_mask):
  """Geometric mean of a sequence's token ratios, the same for all its tokens. GSPO."""
  log_ratio = jnp.sum(log_probs - old_log_probs, axis=1, where=loss_mask)
  log_ratio = log_ratio / masking.lengths(loss_mask, log_probs.dtype)
  return jnp.broadcast_to(_bounded_exp(log_ratio)[:, None], log_probs.shape)


def sequence(log_probs, old_log_probs, loss_mask):
  """Probability ratio of the whole sequence, the same for all its tokens. RLOO."""
  log_ratio = jnp.sum(log_probs - old_log_probs, axis=1, where=loss_mask)
  return jnp.broadcast_to(_bounded_exp(log_ratio)[:, None], log_probs.shape)


def truncated(ratio, *, max_ratio):
  """`ratio` with an absolute cap. CISPO, truncated importance sampling."""
  return jnp.minimum(ratio, max_ratio)
