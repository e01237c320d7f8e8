"""Policy gradients with one ratio per sequence, the same for all its tokens.

The arguments mean what they mean in `policy_gradient`; advantages are [B] unless said otherwise.
"""

import math

import jax
import jax.numpy as jnp

from ptjax.losses import policy_gradient
from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import divergence
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import stabilization


def _clean(log_probs, old_log_probs, advantages, loss_mask):
  if advantages.shape != loss_mask.shape[:1]:
    raise ValueError(f'advantages have shape {advantages.shape}: a sequence loss takes one per '
                     f'sequence, {loss_mask.shape[:1]}')
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  return log_probs, old_log_probs, advantage.per_token(advantages, loss_mask, log_probs.dtype)


def rloo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=0.2, clip_high=0.2):
  """REINFORCE leave-one-out: the clipped ratio of the whole sequence, summed over its tokens.

  On the first update the ratio is 1 and this is the paper's REINFORCE; the clip serves further
  ones. Source: arXiv:2402.14740; TRL's RLOOTrainer for the clip.
  """
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence(log_probs, old_log_probs, loss_mask), advantages, loss_mask,
      clip_low=clip_low, clip_high=clip_high, reduce=reduction.sequence_sum,
      value_scale=1.0 / masking.lengths(loss_mask, log_probs.dtype)[:, None])


def gspo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=3e-4, clip_high=4e-4):
  """Group Sequence Policy Optimization: the clipped geometric mean of the token ratios.

  The clip range is small because the mean of many log-ratios is. Source: arXiv:2507.18071, eq. 5.
  """
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence_mean(log_probs, old_log_probs, loss_mask), advantages,
      loss_mask, clip_low=clip_low, clip_high=clip_high, reduce=reduction.sequence_mean)


def gspo_token_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=3e-4,
                    clip_high=4e-4):
  """GSPO with an advantage per token; with one per sequence it is `gspo_loss`.

  `advantages` are [B, T] or [B]. Source: arXiv:2507.18071, eq. 13.
  """
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence_mean(log_probs, old_log_probs, loss_mask),
      advantage.per_token(advantages, loss_mask, log_probs.dtype), loss_mask, clip_low=clip_low,
      clip_high=clip_high, reduce=reduction.sequence_mean)


def luspo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=3e-4, clip_high=4e-4):
  """Length-unbiased GSPO: each sequence times its length. Source: arXiv:2602.05261."""
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence_mean(log_probs, old_log_probs, loss_mask), advantages,
      loss_mask, clip_low=clip_low, clip_high=clip_high, reduce=reduction.sequence_sum)


def vespo_loss(log_probs, *, old_log_probs, advantages, loss_mask, shape_positive=2.0,
               rate_positive=3.0, shape_negative=3.0, rate_negative=2.0):
  """VESPO: the whole-sequence ratio W tamed to φ(W) = W^k exp(λ (1 - W)), stopped.

  `shape_*` are k and `rate_*` λ for advantages from 0 on and below. Source: arXiv:2602.10693;
  TRL's clamps, ±20 nats per token and 1e-8 for W.
  """
  bounds.positive(shape_positive=shape_positive, rate_positive=rate_positive,
                  shape_negative=shape_negative, rate_negative=rate_negative)
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  limit = denominator.MAX_LOG_RATIO
  log_ratio = jnp.clip(log_probs - old_log_probs, -limit, limit).sum(axis=1, keepdims=True)
  log_ratio = jnp.clip(log_ratio, math.log(1e-8), limit)
  log_ratio = jnp.broadcast_to(log_ratio, log_probs.shape)
  gate = stabilization.gamma_gate(
      log_ratio, advantages, shape_positive=shape_positive, rate_positive=rate_positive,
      shape_negative=shape_negative, rate_negative=rate_negative)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=jnp.exp(log_ratio), stable=gate,
      reduce=reduction.token_mean)


def gmpo_loss(log_probs, *, old_log_probs, advantages, loss_mask, log_clip=0.4):
  """Geometric-mean PO: token log-ratios clipped one-sidedly, then averaged into one ratio.

  `log_clip` is in nats, either way. Source: arXiv:2507.20673, eq. 6.
  """
  masking.non_negative(log_clip=log_clip)
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  log_ratio = log_probs - old_log_probs
  stable = ~(((advantages > 0) & (log_ratio > log_clip))
             | ((advantages < 0) & (log_ratio < -log_clip)))
  bounded = jnp.where(stable, log_ratio, jnp.clip(log_ratio, -log_clip, log_clip))
  ratio = denominator.sequence_mean(bounded, jnp.zeros_like(bounded), loss_mask)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, stable=stable,
      value=ratio * advantages, reduce=reduction.sequence_mean)


def a_star_po_loss(log_probs, *, reference_log_probs, advantages, loss_mask, beta=1e-3):
  """A*-PO: regress β s on the optimal advantage R - V*, one on-policy sample per prompt.

  mean (β s - Â)², with s the sequence's log-ratio to the reference in nats; as a policy gradient
  the advantage is 2β (Â - β s). `advantages` [B] are `advantage.minus_optimal_value`. Source:
  arXiv:2505.20686, eq. 4; β is the paper's β₂.
  """
  bounds.positive(beta=beta)
  log_probs, reference_log_probs, advantages = _clean(
      log_probs, reference_log_probs, advantages, loss_mask)
  log_ratio = (log_probs - reference_log_probs).sum(axis=1, keepdims=True)
  residual = advantages - beta * log_ratio
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=2.0 * beta * residual, reduce=reduction.sequence_sum,
      value=-jnp.square(residual) / masking.lengths(loss_mask, log_probs.dtype)[:, None])


def rebel_loss(log_probs, *, old_log_probs, rewards, loss_mask, eta=1.0):
  """REBEL: regress the difference of two completions' log-ratios on that of their rewards.

  mean over prompts ((s₁ - s₂) / η - (R₁ - R₂))², rows 2p and 2p + 1 answering prompt p; as a policy
  gradient the advantages are ±(2/η)(ΔR - Δs/η).

  Args:
    rewards: [B] float32, not centred.
    eta: η, the step size of the mirror descent behind it; above 0.
    The others: see `policy_gradient`.
  Source: arXiv:2404.16767, eq. 2.
  """
  bounds.positive(eta=eta)
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  scores = (log_probs - old_log_probs).sum(axis=1)  # [B] nats
  rewards = bounds.per_row(scores.shape, scores.dtype, rewards=rewards)
  masking.in_groups(rewards, 2)
  partner = jnp.arange(rewards.size) ^ 1  # 2p <-> 2p + 1
  residual = (rewards - rewards[partner]) - (scores - scores[partner]) / eta  # [B], signed
  counts = loss_mask.sum(axis=1).astype(log_probs.dtype)
  per_token = 2.0 / jnp.maximum(counts + counts[partner], 1.0)  # the pair's value, over its tokens
  return likelihood.weighted_loss(  # B / 2 prompts, so twice the mean over sequences
      log_probs, loss_mask, advantages=4.0 / eta * residual, reduce=reduction.sequence_sum,
      value=jnp.broadcast_to((-jnp.square(residual) * per_token)[:, None], loss_mask.shape))


def nash_md_loss(log_probs, *, reference_log_probs, advantages, loss_mask, kl_coefficient=0.1):
  """Nash-MD: beat a mixture of policy and reference in a judge's eyes, held near the reference.

  The weight of token t is (P - ½) - β (ℓ_t - ℓ⁰_t); `advantages` [B] are `advantage.win_margin`, P
  being the probability of beating a sample of the mixture. Source: arXiv:2312.00886, eq. 8.
  """
  masking.non_negative(kl_coefficient=kl_coefficient)
  log_probs, reference_log_probs, advantages = _clean(
      log_probs, reference_log_probs, advantages, loss_mask)
  penalty = divergence.k1(log_probs, reference_log_probs)
  loss, metrics = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages - kl_coefficient * penalty,
      reduce=reduction.sequence_sum)
  return loss, {**metrics, 'kl': jax.lax.stop_gradient(reduction.token_mean(penalty, loss_mask))}
