"""The stabilization mask: which tokens may still push the policy.

Masks are [B, T] bool, True means keep, and are kept at equality: on the first step every ratio is
exactly 1, and a kink there must not halve the gradient.
"""

import chex
import jax
import jax.numpy as jnp


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
