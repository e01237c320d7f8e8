"""Reductions of `[B, T]` token values to a scalar; the normalizer is the array's own.

Losses see the whole optimizer batch, so these normalizers are the global ones: the trainer takes
the gradient with respect to the log-probs of the whole batch and feeds it back in micro-batches.
"""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import masking


def token_mean(values, loss_mask):
  """Sum over tokens / number of tokens; every token weighs the same. 0 for an empty mask."""
  values = masking.clean(loss_mask, values=values)
  return values.sum() / jnp.maximum(loss_mask.sum(), 1).astype(values.dtype)


def sequence_mean(values, loss_mask):
  """Mean over sequences of each one's token mean; an empty sequence counts as 0."""
  values = masking.clean(loss_mask, values=values)
  return (values.sum(axis=1) / masking.lengths(loss_mask, values.dtype)).mean()


def sequence_sum(values, loss_mask):
  """Mean over sequences of each one's token sum."""
  return masking.clean(loss_mask, values=values).sum(axis=1).mean()


def fixed_length_mean(values, loss_mask, *, max_completion_tokens=None):
  """Sum over tokens / (B * max_completion_tokens), a divisor no completion can move (Dr. GRPO).

  `max_completion_tokens` None takes the padded length T.
  """
  if max_completion_tokens is not None:
    bounds.positive(max_completion_tokens=max_completion_tokens)
  values = masking.clean(loss_mask, values=values)
  length = values.shape[1] if max_completion_tokens is None else max_completion_tokens
  return values.sum() / (values.shape[0] * length)


def log_sum_exp(values, *, temperature=1.0):
  """Soft maximum `temperature * log(mean(exp(values / temperature)))` of [B] values (Dr. DPO)."""
  chex.assert_rank(values, 1)
  return temperature * (
      jax.nn.logsumexp(values / temperature) - jnp.log(jnp.asarray(values.size, values.dtype)))
