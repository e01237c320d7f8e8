"""Divergences: per-token estimators from sampled tokens, and exact ones over the vocabulary."""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import denominator


def k1(log_probs, reference_log_probs):
  """log π - log π₀ in nats: unbiased for KL(π || π₀); belongs in the reward, not in the loss."""
  chex.assert_equal_shape([log_probs, reference_log_probs])
  return log_probs - reference_log_probs


def k2(log_probs, reference_log_probs):
  """½ (log π - log π₀)²: biased in value, the right reverse-KL gradient when on-policy."""
  return 0.5 * jnp.square(k1(log_probs, reference_log_probs))


def k3(log_probs, reference_log_probs):
  """π₀/π - log(π₀/π) - 1: unbiased, never negative (Schulman's note, *Approximating KL*, 2020)."""
  log_ratio = -k1(log_probs, reference_log_probs)
  bounded = jnp.clip(log_ratio, -denominator.MAX_LOG_RATIO, denominator.MAX_LOG_RATIO)
  return jnp.exp(bounded) - log_ratio - 1.0
