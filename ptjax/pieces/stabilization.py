"""The stabilization mask: which tokens may still push the policy.

Masks are [B, T] bool, True means keep, and are kept at equality: on the first step every ratio is
exactly 1, and a kink there must not halve the gradient.
"""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import masking
from ptjax.pieces import reduction


def clip_mask(ratio, advantages, *, low, high):
  """False where PPO's clip is active: the ratio has left [1 - low, 1 + high] the way Â pushes it.

  Args:
    ratio: [B, T]; policy over denominator.
    advantages: [B, T].
    low, high: distances from ratio 1.
  """
  chex.assert_equal_shape([ratio, advantages])
  return ~(clipped_high(ratio, advantages, high=high) | clipped_low(ratio, advantages, low=low))


def clipped_high(ratio, advantages, *, high):
  """True where an encouraged token is already more than `high` above ratio 1. [B, T] bool."""
  return (advantages > 0) & (ratio > 1.0 + high)


def clipped_low(ratio, advantages, *, low):
  """True where a discouraged token is already more than `low` below ratio 1. [B, T] bool."""
  return (advantages < 0) & (ratio < 1.0 - low)


def clipped_ratio(ratio, stable, *, low, high):
  """The ratio whose product with Â is min(ρÂ, clip(ρ)Â): ρ where stable, else its bound."""
  return jnp.where(stable, ratio, jnp.clip(ratio, 1.0 - low, 1.0 + high))


def dual_clip_mask(ratio, advantages, *, max_ratio):
  """False where a discouraged token's ratio exceeds `max_ratio` (dual-clip PPO, 1912.09729)."""
  return ~((advantages < 0) & (ratio > max_ratio))


def soft_gate(ratio, advantages, *, temperature_positive, temperature_negative):
  """SAPO's gate (2511.20347): a smooth mask in [0, 1], 1 at ratio 1.

  Returns:
    gate: [B, T] float, 4 σ(z) σ(-z) with z = τ (ratio - 1), the factor on the token's weight.
    value: [B, T] float, (4 / τ) σ(z), whose derivative by the ratio is the gate.
  """
  temperature = jnp.where(advantages > 0, temperature_positive, temperature_negative)
  temperature = temperature.astype(ratio.dtype)
  z = temperature * (ratio - 1.0)
  gate = 4.0 * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
  return gate, 4.0 / temperature * jax.nn.sigmoid(z)


def gamma_gate(log_ratio, advantages, *, shape_positive, rate_positive, shape_negative,
               rate_negative):
  """VESPO's gate φ(W) / W with φ(W) = W^k exp(λ (1 - W)), 1 at ratio 1 (2602.10693).

  Unlike a mask it may exceed 1, where φ sits above the ratio W itself.

  Args:
    log_ratio: [B, T] nats, log W, clamped by the caller.
    advantages: [B, T]; their sign chooses between the two pairs (k, λ).
  """
  k = jnp.where(advantages >= 0, shape_positive, shape_negative).astype(log_ratio.dtype)
  rate = jnp.where(advantages >= 0, rate_positive, rate_negative).astype(log_ratio.dtype)
  return jnp.exp(rate + (k - 1.0) * log_ratio - rate * jnp.exp(log_ratio))


def covariance(advantages, log_probs, loss_mask):
  """(Â - mean Â)(log π - mean log π) of each token, means over the mask; no gradient. [B, T]."""
  log_probs = jax.lax.stop_gradient(log_probs)
  centred = lambda x: x - reduction.token_mean(x, loss_mask)
  return centred(advantages) * centred(log_probs)


def largest(scores, loss_mask, *, fraction):
  """True for the max(1, floor(fraction · N)) tokens on the mask with the largest finite scores.

  Of equal scores the earlier token goes first. [B, T] bool; N counts the tokens on the mask.
  """
  count = jnp.maximum((fraction * loss_mask.sum().astype(scores.dtype)).astype(jnp.int32), 1)
  most = max(int(fraction * scores.size), 1)  # static, and no smaller than count
  values, indices = jax.lax.top_k(jnp.where(loss_mask, scores, -jnp.inf).reshape(-1), most)
  chosen = (jnp.arange(most, dtype=count.dtype) < count) & jnp.isfinite(values)
  return jnp.zeros(scores.size, bool).at[indices].set(chosen).reshape(scores.shape)


def off_policy_mask(log_probs, rollout_log_probs, advantages, loss_mask, *, threshold):
  """False for discouraged sequences that have drifted: mean_t (ℓʳ - ℓ) > threshold. [B, T] bool.

  Source: DeepSeek-V3.2, arXiv:2512.02556.
  """
  drift = jnp.sum(rollout_log_probs - log_probs, axis=1, keepdims=True, where=loss_mask)
  drift = drift / masking.lengths(loss_mask, log_probs.dtype)[:, None]
  return (advantages >= 0) | (drift <= threshold)


def top_entropy_mask(entropy, loss_mask, *, fraction):
  """True for tokens from the (1 - fraction) quantile of the batch's entropies on. [B, T] bool.

  Source: arXiv:2506.01939, where the fraction is .2.
  """
  total = loss_mask.sum()
  rank = jnp.ceil((1.0 - fraction) * (total - 1).astype(jnp.float32)).astype(total.dtype)
  bits = _ordered_bits(entropy, loss_mask)
  return loss_mask & (bits >= _kth_largest(bits, total - rank))


def _ordered_bits(values, loss_mask):
  """Non-negative numbers as int32 of the same order; -1 off the mask."""
  values = jax.lax.stop_gradient(jnp.where(loss_mask, values, 0.0))
  bits = jax.lax.bitcast_convert_type(jnp.maximum(values, 0.0).astype(jnp.float32), jnp.int32)
  return jnp.where(loss_mask, bits, -1)


def _kth_largest(bits, k):
  """The k-th largest of non-negative int32, bit by bit: on CPU ten times faster than a sort."""
  def settle(i, found):
    candidate = found | jnp.left_shift(jnp.int32(1), jnp.int32(30) - i)
    return jnp.where((bits >= candidate).sum() >= k, candidate, found)
  return jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), settle, jnp.int32(0))
