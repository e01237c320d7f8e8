"""Additive terms that several losses share. Each returns (scalar, metrics).

A coefficient of 0 switches a term off; above 0 it needs the array it works on, else a ValueError.
"""

import jax
import jax.numpy as jnp

from ptjax.pieces import denominator
from ptjax.pieces import divergence
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction


def _k3(log_probs, reference_log_probs):
  penalty = divergence.k3(log_probs, reference_log_probs)
  return penalty, denominator.old(reference_log_probs, log_probs) - 1.0


def _k2(log_probs, reference_log_probs):
  penalty = divergence.k2(log_probs, reference_log_probs)
  return penalty, -divergence.k1(log_probs, reference_log_probs)


def _k1(log_probs, reference_log_probs):
  penalty = divergence.k1(log_probs, reference_log_probs)
  return penalty, -jnp.ones_like(penalty)


# name -> (the estimate [B, T], the advantage its gradient amounts to under ratio 1). That of k1 is
# a constant: right in value, but on average it pushes nowhere.
ESTIMATORS = {'k3': _k3, 'k2': _k2, 'k1': _k1}


def kl_penalty(log_probs, reference_log_probs, loss_mask, *, kl_coefficient, reduce,
               estimator='k3'):
  """β KL(π || π₀), as a policy gradient of ratio 1: its advantage is minus the estimate's slope.

  For k3 that is β (π₀ / π - 1), for k2 -β log(π / π₀).

  Args:
    log_probs, reference_log_probs: [B, T] nats.
    loss_mask: [B, T] bool.
    kl_coefficient: β; not negative. A controller's may be an array.
    reduce: `(values, loss_mask) -> scalar`.
    estimator: a key of ESTIMATORS.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f'kl_estimator={estimator!r}: expected one of {", ".join(ESTIMATORS)}')
  if not isinstance(kl_coefficient, jax.Array):
    masking.non_negative(kl_coefficient=kl_coefficient)
    if kl_coefficient == 0.0:
      return 0.0, {}
  masking.required(reference_log_probs, 'reference_log_probs', f'kl_coefficient={kl_coefficient}')
  log_probs, reference_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
  penalty, advantages = ESTIMATORS[estimator](log_probs, reference_log_probs)
  term, _ = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=kl_coefficient * advantages,
      value=-kl_coefficient * penalty, reduce=reduce, name='kl')
  return term, {'kl': jax.lax.stop_gradient(reduction.token_mean(penalty, loss_mask))}


def corrected_kl_penalty(log_probs, old_log_probs, reference_log_probs, loss_mask, *,
                         kl_coefficient, reduce):
  """β ρ k3: the estimate on tokens of the old policy, corrected by the ratio (DeepSeek-V3.2).

  Its gradient is that of ratio ρ and advantage -β log(π / π₀). Source: arXiv:2512.02556; TRL's
  `use_bias_correction_kl`.
  """
  masking.non_negative(kl_coefficient=kl_coefficient)
  log_probs, old_log_probs, reference_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs,
      reference_log_probs=reference_log_probs)
  ratio = denominator.old(log_probs, old_log_probs)
  penalty = ratio * divergence.k3(log_probs, reference_log_probs)
  term, _ = likelihood.weighted_loss(
      log_probs, loss_mask, ratio=ratio, value=-kl_coefficient * penalty, reduce=reduce,
      advantages=-kl_coefficient * divergence.k1(log_probs, reference_log_probs), name='kl')
  return term, {'kl': jax.lax.stop_gradient(reduction.token_mean(penalty, loss_mask))}


def entropy_bonus(entropy, loss_mask, *, entropy_coefficient):
  """-c mean_t H_t: a term over the whole vocabulary, no weight on the sampled token.

  Args:
    entropy: [B, T] nats, attached to the model.
    loss_mask: [B, T] bool.
    entropy_coefficient: weight of the mean entropy per token.
  """
  masking.non_negative(entropy_coefficient=entropy_coefficient)
  if entropy_coefficient == 0.0:
    return 0.0, {}
  masking.required(entropy, 'entropy', f'entropy_coefficient={entropy_coefficient}')
  entropy = masking.clean(loss_mask, entropy=entropy)
  return -entropy_coefficient * reduction.token_mean(entropy, loss_mask), {}


def value_loss(values, old_values, returns, loss_mask, *, value_clip):
  """½ mean_t max((V - R)², (clip(V, V_old ± ε) - R)²): the critic's regression, no policy gradient.

  Args:
    values: [B, T]; the critic's output, carries its gradient.
    old_values: [B, T]; the same when the rollout was made.
    returns: [B, T]; what they should have been.
    loss_mask: [B, T] bool.
    value_clip: ε, in units of the return.
  Source: the PPO implementation of OpenAI baselines, as in TRL and verl.
  """
  masking.non_negative(value_clip=value_clip)
  values, old_values, returns = masking.clean(
      loss_mask, values=values, old_values=old_values, returns=returns)
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  change = values - old_values
  inside = jnp.abs(change) <= value_clip
  clipped = jnp.where(inside, values, old_values + jnp.sign(change) * value_clip)
  error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
  worse = jnp.where(clipped_error > error, clipped_error, error)
  clip_fraction = reduction.token_mean((clipped_error > error).astype(values.dtype), loss_mask)
  return 0.5 * reduction.token_mean(worse, loss_mask), {'value/clip_fraction': clip_fraction}
