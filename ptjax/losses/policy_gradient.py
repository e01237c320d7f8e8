"""Policy gradients with one ratio per token, composed from the four pieces.

Arguments that mean the same everywhere:

  log_probs: [B, T] float32, nats; log π_θ of each completion token. Carries the gradient.
  old_log_probs: [B, T] float32, nats; the same tokens under the policy that drew them.
  advantages: [B] or [B, T] float32.
  loss_mask: [B, T] bool; True where the token belongs to the completion.
  reference_log_probs: [B, T] float32, nats; under the frozen model, for the KL term.
  clip_low, clip_high: distances from ratio 1 past which a token stops pushing.
  kl_coefficient: weight of the k3 term; above 0 it needs reference_log_probs.

Every loss returns (scalar, metrics). The value is the textbook's, the gradient is exact.
"""

import functools

import jax
import jax.numpy as jnp

from ptjax.losses import terms
from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import stabilization


def reinforce_loss(log_probs, *, advantages, loss_mask):
  """REINFORCE: -mean(Â log π) over tokens, no denominator but the policy itself.

  Source: Williams, 1992. The base of GPG, ReMax and OPO, which differ in the advantage.
  """
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, reduce=reduction.token_mean)


def clipped_surrogate(log_probs, old_log_probs, advantages, loss_mask, *, clip_low, clip_high,
                      reduce, max_ratio=None):
  """PPO's -reduce(min(ρÂ, clip(ρ, 1 - low, 1 + high) Â)), the stem of the GRPO family.

  Args:
    log_probs, old_log_probs, advantages, loss_mask, clip_low, clip_high: see the module.
    reduce: `(values [B, T], loss_mask) -> scalar`.
    max_ratio: None, or the ratio past which discouraged tokens stop too (dual clip).
  Returns:
    Scalar loss and metrics, `clip_ratio/...` among them. Source: arXiv:1707.06347, eq. 7.
  """
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  ratio = denominator.old(log_probs, old_log_probs)
  return clipped_ratio_loss(log_probs, ratio, advantages, loss_mask, clip_low=clip_low,
                            clip_high=clip_high, reduce=reduce, max_ratio=max_ratio)


def clipped_ratio_loss(log_probs, ratio, advantages, loss_mask, *, clip_low, clip_high, reduce,
                       max_ratio=None, dropped=None, value_scale=1.0):
  """`clipped_surrogate` for any ratio [B, T].

  Args:
    dropped: None, or [B, T] bool; tokens that neither push nor count in the value.
    value_scale: multiplies the value alone.
    The others: see `clipped_surrogate`.
  """
  masking.non_negative(clip_low=clip_low, clip_high=clip_high)
  stable = stabilization.clip_mask(ratio, advantages, low=clip_low, high=clip_high)
  bounded = stabilization.clipped_ratio(ratio, stable, low=clip_low, high=clip_high)
  if max_ratio is not None:
    bounds.positive(max_ratio=max_ratio)
    stable &= stabilization.dual_clip_mask(ratio, advantages, max_ratio=max_ratio)
    capped = denominator.truncated(bounded, max_ratio=max_ratio)
    bounded = jnp.where(advantages < 0, capped, bounded)
  value = bounded * advantages * value_scale
  if dropped is not None:
    stable &= ~dropped
    value = jnp.where(dropped, 0.0, value)
  loss, metrics = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, stable=stable, value=value,
      reduce=reduce)
  fraction = lambda mask: reduction.token_mean(mask.astype(log_probs.dtype), loss_mask)
  low = fraction(stabilization.clipped_low(ratio, advantages, low=clip_low))
  high = fraction(stabilization.clipped_high(ratio, advantages, high=clip_high))
  metrics.update({'clip_ratio/low_mean': low, 'clip_ratio/high_mean': high,
                  'clip_ratio/region_mean': low + high})
  return loss, metrics


def _with_kl(loss, log_probs, reference_log_probs, loss_mask, kl_coefficient, reduce):
  """Adds the k3 term to a (loss, metrics)."""
  penalty, metrics = terms.kl_penalty(
      log_probs, reference_log_probs, loss_mask, kl_coefficient=kl_coefficient, reduce=reduce)
  return loss[0] + penalty, {**loss[1], **metrics}


def grpo_loss(log_probs, *, old_log_probs, advantages, loss_mask, reference_log_probs=None,
              clip_low=0.2, clip_high=0.2, kl_coefficient=0.0):
  """Group Relative Policy Optimization: clipped surrogate plus k3, averaged per sequence.

  Advantages are the rewards' z-scores within their group. Source: arXiv:2402.03300, eq. 3; the
  paper's kl_coefficient is .04, ours (TRL's) 0.
  """
  loss = clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.sequence_mean)
  return _with_kl(loss, log_probs, reference_log_probs, loss_mask, kl_coefficient,
                  reduction.sequence_mean)


def dr_grpo_loss(log_probs, *, old_log_probs, advantages, loss_mask, reference_log_probs=None,
                 clip_low=0.2, clip_high=0.2, kl_coefficient=0.0, max_completion_tokens=None):
  """GRPO done right: centred advantages, and a divisor that no completion's length can move.

  `max_completion_tokens` is the configured maximum; None takes the padded length T.
  Source: arXiv:2503.20783, eq. 4.
  """
  reduce = functools.partial(
      reduction.fixed_length_mean, max_completion_tokens=max_completion_tokens)
  loss = clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduce)
  return _with_kl(loss, log_probs, reference_log_probs, loss_mask, kl_coefficient, reduce)


def bnpo_loss(log_probs, *, old_log_probs, advantages, loss_mask, reference_log_probs=None,
              clip_low=0.2, clip_high=0.2, kl_coefficient=0.0):
  """GRPO with every token of the batch weighing the same: TRL's `loss_type='bnpo'`.

  Only a reduction; arXiv:2506.02864, of the same acronym, is another method.
  """
  loss = clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean)
  return _with_kl(loss, log_probs, reference_log_probs, loss_mask, kl_coefficient,
                  reduction.token_mean)


def dapo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=0.2, clip_high=0.28):
  """DAPO: a wider upper clip and the token mean over the global batch, without KL.

  Its other half is data: groups with equal rewards are resampled and overlong completions
  penalised. Source: arXiv:2503.14476, eq. 8.
  """
  return clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean)


def cispo_loss(log_probs, *, old_log_probs, advantages, loss_mask, max_ratio=5.0):
  """CISPO: the ratio is truncated and stopped, so no token is ever dropped.

  `max_ratio` is an absolute cap on the ratio, without a lower bound. Source: MiniMax-M1,
  arXiv:2506.13585, eq. 4; the cap of 5 is ScaleRL's, arXiv:2510.13786.
  """
  bounds.positive(max_ratio=max_ratio)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  ratio = denominator.truncated(denominator.old(log_probs, old_log_probs), max_ratio=max_ratio)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, reduce=reduction.token_mean)


def cispo_oxrl_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=0.2,
                    clip_high=0.2):
  """oxRL's CISPO: the ratio clipped on both sides, times log π - log π_old.

  The value is oxRL's, the gradient that of a two-sided cap. For repeating arXiv:2603.19335.
  """
  masking.non_negative(clip_low=clip_low, clip_high=clip_high)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  ratio = jnp.clip(denominator.old(log_probs, old_log_probs), 1.0 - clip_low, 1.0 + clip_high)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio,
      value=ratio * advantages * (log_probs - old_log_probs), reduce=reduction.token_mean)


def sgrpo_loss(log_probs, *, old_log_probs, advantages, loss_mask, reference_log_probs=None,
               entropy=None, clip_low=0.2, clip_high=0.2, kl_coefficient=0.0,
               entropy_coefficient=0.0):
  """oxRL's default: every token weighs the same, with optional k3 and entropy terms.

  `entropy` [B, T] nats is needed above a coefficient of 0. Source: arXiv:2603.19335.
  """
  loss, metrics = bnpo_loss(
      log_probs, old_log_probs=old_log_probs, advantages=advantages, loss_mask=loss_mask,
      reference_log_probs=reference_log_probs, clip_low=clip_low, clip_high=clip_high,
      kl_coefficient=kl_coefficient)
  bonus, _ = terms.entropy_bonus(entropy, loss_mask, entropy_coefficient=entropy_coefficient)
  return loss + bonus, metrics


def ppo_loss(log_probs, *, values, old_log_probs, old_values, advantages, returns, loss_mask,
             entropy=None, clip_low=0.2, clip_high=0.2, value_clip=0.2, value_coefficient=0.1,
             entropy_coefficient=0.0, max_ratio=None):
  """Proximal Policy Optimization with a critic.

  Args:
    values, old_values, returns: [B, T]; the critic's output now (it carries the critic's gradient),
      its output at the rollout, and the target, from `returns.whitened_gae`.
    entropy: [B, T] nats, needed above an entropy_coefficient of 0.
    value_clip: how far the value may move from old_values, in units of the return.
    value_coefficient, entropy_coefficient: weights of the two added terms.
    max_ratio: None, or the dual clip's cap (`ppo_dual_clip_loss`).
    The others: see the module; advantages are [B, T].
  Source: arXiv:1707.06347, eq. 9; arXiv:2203.02155; TRL's defaults.
  """
  masking.non_negative(value_coefficient=value_coefficient)
  loss, metrics = clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean, max_ratio=max_ratio)
  value, value_metrics = terms.value_loss(
      values, old_values, returns, loss_mask, value_clip=value_clip)
  bonus, _ = terms.entropy_bonus(entropy, loss_mask, entropy_coefficient=entropy_coefficient)
  metrics = {**metrics, **value_metrics, 'value/loss': jax.lax.stop_gradient(value)}
  return loss + value_coefficient * value + bonus, metrics


def ppo_dual_clip_loss(log_probs, *, values, old_log_probs, old_values, advantages, returns,
                       loss_mask, entropy=None, clip_low=0.2, clip_high=0.2, value_clip=0.2,
                       value_coefficient=0.1, entropy_coefficient=0.0, max_ratio=3.0):
  """PPO whose discouraged tokens stop pushing past `max_ratio` too.

  Arguments as `ppo_loss`. Source: arXiv:1912.09729, eq. 5; the cap of 3 is verl's.
  """
  return ppo_loss(
      log_probs, values=values, old_log_probs=old_log_probs, old_values=old_values,
      advantages=advantages, returns=returns, loss_mask=loss_mask, entropy=entropy,
      clip_low=clip_low, clip_high=clip_high, value_clip=value_clip,
      value_coefficient=value_coefficient, entropy_coefficient=entropy_coefficient,
      max_ratio=max_ratio)


def reinforce_pp_baseline_loss(log_probs, *, old_log_probs, advantages, loss_mask,
                               reference_log_probs=None, clip_low=0.2, clip_high=0.2,
                               kl_coefficient=1e-2):
  """REINFORCE++ with a group baseline: PPO's clip, the token mean and a k2 term in the loss.

  Source: arXiv:2501.03262.
  """
  loss, metrics = clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean)
  penalty, kl_metrics = terms.kl_penalty(
      log_probs, reference_log_probs, loss_mask, kl_coefficient=kl_coefficient,
      reduce=reduction.token_mean, estimator='k2')
  return loss + penalty, {**metrics, **kl_metrics}


def sapo_loss(log_probs, *, old_log_probs, advantages, loss_mask, temperature_positive=1.0,
              temperature_negative=1.05):
  """Soft Adaptive Policy Optimization: a smooth gate instead of a clip, sharper for Â < 0.

  Source: arXiv:2511.20347, eq. 5.
  """
  bounds.positive(temperature_positive=temperature_positive,
                  temperature_negative=temperature_negative)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  ratio = denominator.old(log_probs, old_log_probs)
  gate, value = stabilization.soft_gate(
      ratio, advantages, temperature_positive=temperature_positive,
      temperature_negative=temperature_negative)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, stable=gate,
      value=value * advantages, reduce=reduction.sequence_mean)


def clip_cov_loss(log_probs, *, old_log_probs, advantages, loss_mask, key, clip_low=0.2,
                  clip_high=0.2, covariance_low=1.0, covariance_high=5.0, fraction=2e-4):
  """Clip-Cov: PPO's clip, and a few tokens of high covariance dropped at random.

  Among the unclipped tokens whose covariance of advantage and log-prob lies between the two bounds,
  max(1, floor(fraction · tokens)) are drawn with `key` and neither push nor count in the value.
  Source: arXiv:2505.22617, eq. 10.
  """
  bounds.fraction(fraction=fraction)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  ratio = denominator.old(log_probs, old_log_probs)
  covariance = stabilization.covariance(advantages, log_probs, loss_mask)
  stable = stabilization.clip_mask(ratio, advantages, low=clip_low, high=clip_high)
  candidates = (loss_mask & stable
                & (covariance > covariance_low) & (covariance < covariance_high))
  lottery = jnp.where(candidates, jax.random.uniform(key, ratio.shape, ratio.dtype), -jnp.inf)
  dropped = stabilization.largest(lottery, loss_mask, fraction=fraction)
  return clipped_ratio_loss(
      log_probs, ratio, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean, dropped=dropped)


def kl_cov_loss(log_probs, *, old_log_probs, advantages, loss_mask, penalty_coefficient=1.0,
                fraction=2e-4):
  """KL-Cov: no clip; the tokens of highest covariance pay c · |log π - log π_old|.

  max(1, floor(fraction · tokens)) tokens pay; c is `penalty_coefficient`.
  Source: arXiv:2505.22617, eq. 12.
  """
  masking.non_negative(penalty_coefficient=penalty_coefficient)
  bounds.fraction(fraction=fraction)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  ratio = denominator.old(log_probs, old_log_probs)
  loss, metrics = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, value=ratio * advantages,
      reduce=reduction.token_mean)
  covariance = stabilization.covariance(advantages, log_probs, loss_mask)
  paying = stabilization.largest(covariance, loss_mask, fraction=fraction)
  log_ratio = log_probs - old_log_probs
  penalty, _ = likelihood.weighted_loss(
      log_probs, loss_mask, stable=paying, advantages=-penalty_coefficient * jnp.sign(log_ratio),
      value=jnp.where(paying, -penalty_coefficient * jnp.abs(log_ratio), 0.0),
      reduce=reduction.token_mean, name='kl')
  return loss + penalty, metrics
