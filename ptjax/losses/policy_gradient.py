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

import jax.numpy as jnp

from ptjax.losses import terms
from ptjax.pieces import advantage
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
                       max_ratio=None, value_scale=1.0):
  """`clipped_surrogate` for any ratio [B, T]; `value_scale` multiplies the value alone."""
  stable = stabilization.clip_mask(ratio, advantages, low=clip_low, high=clip_high)
  bounded = stabilization.clipped_ratio(ratio, stable, low=clip_low, high=clip_high)
  if max_ratio is not None:
    stable &= stabilization.dual_clip_mask(ratio, advantages, max_ratio=max_ratio)
    bounded = jnp.where(advantages < 0, denominator.truncated(bounded, max_ratio=max_ratio), bounded)
  loss, metrics = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, stable=stable,
      value=bounded * advantages * value_scale, reduce=reduce)
  fraction = lambda mask: reduction.token_mean(mask.astype(log_probs.dtype), loss_mask)
  metrics['clip_ratio/low_mean'] = fraction(
      stabilization.clipped_low(ratio, advantages, low=clip_low))
  metrics['clip_ratio/high_mean'] = fraction(
      stabilization.clipped_high(ratio, advantages, high=clip_high))
  metrics['clip_ratio/region_mean'] = metrics['clip_ratio/low_mean'] + metrics['clip_ratio/high_mean']
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
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  ratio = denominator.truncated(denominator.old(log_probs, old_log_probs), max_ratio=max_ratio)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, reduce=reduction.token_mean)
