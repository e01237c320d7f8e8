"""Additive terms that several losses share. Each returns (scalar, metrics)."""

import jax

from ptjax.pieces import denominator
from ptjax.pieces import divergence
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction


def kl_penalty(log_probs, reference_log_probs, loss_mask, *, kl_coefficient, reduce):
  """β k3(π || π₀), as a policy gradient: ratio 1, advantage β (π₀ / π - 1).

  Without a coefficient the term is 0; with one and no `reference_log_probs` a ValueError.
  """
  masking.non_negative(kl_coefficient=kl_coefficient)
  if kl_coefficient == 0.0:
    return 0.0, {}
  masking.required(reference_log_probs, 'reference_log_probs', f'kl_coefficient={kl_coefficient}')
  log_probs, reference_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
  penalty = divergence.k3(log_probs, reference_log_probs)
  advantages = kl_coefficient * (denominator.old(reference_log_probs, log_probs) - 1.0)
  term, _ = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, value=-kl_coefficient * penalty, reduce=reduce)
  return term, {'kl': jax.lax.stop_gradient(reduction.token_mean(penalty, loss_mask))}


def entropy_bonus(entropy, loss_mask, *, entropy_coefficient):
  """-c mean_t H_t: a term over the whole vocabulary, no weight on the sampled token.

  Args:
    entropy: [B, T] nats, attached to the model; may be None when the coefficient is 0.
    loss_mask: [B, T] bool.
    entropy_coefficient: weight of the mean entropy per token.
  """
  masking.non_negative(entropy_coefficient=entropy_coefficient)
  if entropy_coefficient == 0.0:
    return 0.0, {}
  masking.required(entropy, 'entropy', f'entropy_coefficient={entropy_coefficient}')
  return -entropy_coefficient * reduction.token_mean(entropy, loss_mask), {}
