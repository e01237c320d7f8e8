"""Demonstrations and rollouts in one objective.

A hybrid batch is prompt-major like any other; a prompt's group holds its rollouts and its
demonstrations, and `demonstration` [B] bool says which rows are which. First a mixing rule, a pure
function of rewards, decides what each row is for; then a loss sums over the two doors.

  log_probs, old_log_probs: [B, T] float32, nats; old_log_probs are not read on demonstrations.
  rewards: [B] float32; a demonstration has that of a correct answer.
  advantages: [B] float32.
  demonstration: [B] bool.
  loss_mask: [B, T] bool.
  entropy: [B, T] nats, attached to the model; needed above an entropy_coefficient of 0.
  max_completion_tokens: the configured maximum length; None takes the padded length T.
"""

import jax
import jax.numpy as jnp

from ptjax.losses import terms
from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction


def success_rate(rewards, *, demonstration, group_size, success_threshold=0.5):
  """Fraction of each prompt's rollouts whose reward reaches the threshold, for each row. [B]."""
  rows = masking.in_groups(rewards, group_size, at_least=2)
  bounds.boolean(rewards.shape, demonstration=demonstration)
  rollouts = ~demonstration.reshape(rows.shape)
  correct = (rollouts & (rows >= success_threshold)).sum(axis=1, keepdims=True)
  rate = correct / jnp.maximum(rollouts.sum(axis=1, keepdims=True), 1)
  return jnp.broadcast_to(rate, rows.shape).reshape(-1).astype(rewards.dtype)


def gate(rewards, *, demonstration, group_size, threshold=0.0, off_policy_threshold=None,
         success_threshold=0.5):
  """HPT's mixing rule: what each prompt trains on, by the policy's own success rate P on it.

  P <= threshold: imitate the demonstration. threshold < P <= off_policy_threshold: the
  demonstration as an off-policy rollout. P above both: the rollouts.

  Args:
    rewards, demonstration: see the module.
    group_size: rows per prompt, rollouts and demonstrations together.
    threshold: γ, a fraction; below 0 nothing is imitated.
    off_policy_threshold: γ_off; None is `threshold`, a rule of two.
    success_threshold: the least reward that counts as a success.
  Returns:
    A dict of `advantages` [B], and `from_rollouts`, `imitated`, `off_policy`, [B] bool each:
    the rows in each part. Rollouts are centred among themselves, demonstrations over the whole
    group. Source: arXiv:2509.04419, eq. 9, and the ablation of its section 5.
  """
  high = threshold if off_policy_threshold is None else off_policy_threshold
  if high < threshold:
    raise ValueError(f'off_policy_threshold={high} is below threshold={threshold}')
  rate = success_rate(rewards, demonstration=demonstration, group_size=group_size,
                      success_threshold=success_threshold)
  among_rollouts = advantage.group_centred(
      jnp.where(demonstration, jnp.nan, rewards), group_size=group_size)
  over_group = advantage.group_centred(rewards, group_size=group_size)
  return {
      'advantages': jnp.where(demonstration, over_group, among_rollouts),
      'from_rollouts': ~demonstration & (rate > high),
      'imitated': demonstration & (rate <= threshold),
      'off_policy': demonstration & (rate > threshold) & (rate <= high)}


def soft_gate(rewards, *, demonstration, group_size, rollout_exponent=1.0, imitation_exponent=1.0,
              success_threshold=0.5):
  """HPT with coefficients in the place of a switch: f(P) on a prompt's rollouts, g(P) on imitation.

  f(P) = P^rollout_exponent rises with the policy's success rate P on the prompt, and g(P) =
  (1 - P)^imitation_exponent falls, so a prompt that never succeeds is only imitated, and one that
  always does only reinforced (where it then has no advantage). An exponent of 0 keeps its part at
  full weight.

  Args:
    rewards, demonstration: see the module.
    group_size: rows per prompt, rollouts and demonstrations together.
    rollout_exponent, imitation_exponent: at least 0.
    success_threshold: the least reward that counts as a success.
  Returns:
    A dict of `advantages` [B], f included; `from_rollouts` and `imitated`, [B] bool: all rollouts
    and all demonstrations; and `imitation_weights` [B], g on demonstrations and 0 elsewhere.
    Source: arXiv:2509.04419, eq. 8, whose f and g are any functions of P; the repository looks its
    own up by the number of correct rollouts, and the paper reports the switch alone.
  """
  masking.non_negative(rollout_exponent=rollout_exponent, imitation_exponent=imitation_exponent)
  rate = success_rate(rewards, demonstration=demonstration, group_size=group_size,
                      success_threshold=success_threshold)
  among_rollouts = advantage.group_centred(
      jnp.where(demonstration, jnp.nan, rewards), group_size=group_size)
  return {
      'advantages': rate**rollout_exponent * among_rollouts,
      'from_rollouts': ~demonstration, 'imitated': demonstration,
      'imitation_weights': jnp.where(demonstration, (1.0 - rate)**imitation_exponent, 0.0)}


def _imitation(log_probs, rows, loss_mask, weights):
  """Mean over the tokens of `rows` [B] of -weights · log π; ratio 1."""
  return likelihood.weighted_loss(
      log_probs, loss_mask & rows[:, None], advantages=weights, reduce=reduction.token_mean,
      name='imitation')


def _from_rollouts(log_probs, old_log_probs, advantages, rows, loss_mask, reduce):
  """-reduce(ρ Â) over the tokens of `rows` [B], without a clip."""
  loss_mask = loss_mask & rows[:, None]
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  ratio = denominator.old(log_probs, old_log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, value=ratio * advantages,
      reduce=reduce, name='rollouts')


def _shaped(log_probs, advantages, rows, loss_mask, reduce, shaping):
  """-reduce(f(π) Â) over `rows` [B] with f(π) = π / (π + γ): denominator 1, shaped.

  The slope f'(π) = γ / (π + γ)² gates the ratio, π itself.
  """
  bounds.positive(shaping=shaping)
  loss_mask = loss_mask & rows[:, None]
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  probability = denominator.unit(log_probs)
  advantages = advantage.per_token(advantages, loss_mask, log_probs.dtype)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=probability,
      stable=shaping / jnp.square(probability + shaping),
      value=probability / (probability + shaping) * advantages, reduce=reduce, name='off_policy')


def _per_rollout(rows, max_completion_tokens):
  """Sum over tokens / (number of `rows` · max_completion_tokens)."""
  def reduce(values, loss_mask):
    mean = reduction.fixed_length_mean(
        values, loss_mask, max_completion_tokens=max_completion_tokens)
    return mean * rows.size / jnp.maximum(rows.sum(), 1).astype(mean.dtype)
  return reduce


def _per_length(max_completion_tokens):
  """Sum over all tokens / max_completion_tokens, whatever the number of rows."""
  return lambda values, loss_mask: values.shape[0] * reduction.fixed_length_mean(
      values, loss_mask, max_completion_tokens=max_completion_tokens)


def _together(*parts):
  """Adds (loss, metrics) of named parts; each one's value becomes a metric `hybrid/<name>`."""
  total = sum(loss for _, (loss, _) in parts)
  return total, {f'hybrid/{name}': jax.lax.stop_gradient(loss) for name, (loss, _) in parts}


def hpt_loss(log_probs, *, old_log_probs, advantages, demonstration, from_rollouts, imitated,
             loss_mask, off_policy=None, imitation_weights=None, entropy=None, sft_coefficient=1.0,
             shaping=0.1, entropy_coefficient=1e-3, max_completion_tokens=None):
  """Hybrid Post-Training: SFT where the policy fails, RL where it succeeds.

  Which rows are which is `gate`'s. Rollouts take Dr. GRPO's reduction without a clip, over all
  rollouts of the batch, also those the gate removed; imitated demonstrations the token mean;
  off-policy demonstrations, in the variants hpt_off and hpt_mix, LUFFY's shaped row.

  Args:
    from_rollouts, imitated, off_policy: [B] bool; None for off_policy is none.
    imitation_weights: [B], of each imitated row in that mean, None for 1; `soft_gate`'s.
    sft_coefficient: weight of the imitated part; 1, or .3 at 1.5B.
    shaping: γ of the shaped row.
    The others: see the module.
  Source: arXiv:2509.04419, algorithm 1. Departs from the repository, which divides by the padded
  length and averages over micro-batches: here each part has its whole-batch normalizer.
  """
  masking.non_negative(sft_coefficient=sft_coefficient)
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  bounds.boolean(loss_mask.shape[:1], demonstration=demonstration, from_rollouts=from_rollouts,
                 imitated=imitated, **({} if off_policy is None else {'off_policy': off_policy}))
  reduce = _per_rollout(~demonstration, max_completion_tokens)
  weights = sft_coefficient if imitation_weights is None else sft_coefficient * imitation_weights
  parts = [
      ('rollouts', _from_rollouts(
          log_probs, old_log_probs, advantages, from_rollouts, loss_mask, reduce)),
      ('imitation', _imitation(log_probs, imitated, loss_mask, weights))]
  trained = from_rollouts | imitated
  if off_policy is not None:
    parts.append(('off_policy', _shaped(
        log_probs, advantages, off_policy, loss_mask, reduce, shaping)))
    trained |= off_policy
  if entropy_coefficient:
    parts.append(('entropy', terms.entropy_bonus(
        entropy, loss_mask & trained[:, None], entropy_coefficient=entropy_coefficient)))
  return _together(*parts)


def luffy_loss(log_probs, *, old_log_probs, advantages, demonstration, loss_mask, entropy=None,
               shaping=0.1, entropy_coefficient=1e-3, max_completion_tokens=None):
  """LUFFY: demonstrations as off-policy rollouts under a shaped unit denominator.

  `advantages` are centred over rollouts and demonstrations of a prompt together. Both parts are
  summed over tokens and divided by the maximum length. Source: arXiv:2504.14945, eq. 7.
  """
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  bounds.boolean(loss_mask.shape[:1], demonstration=demonstration)
  reduce = _per_length(max_completion_tokens)
  parts = [
      ('rollouts', _from_rollouts(
          log_probs, old_log_probs, advantages, ~demonstration, loss_mask, reduce)),
      ('off_policy', _shaped(log_probs, advantages, demonstration, loss_mask, reduce, shaping))]
  if entropy_coefficient:
    parts.append(('entropy', terms.entropy_bonus(
        entropy, loss_mask, entropy_coefficient=entropy_coefficient)))
  return _together(*parts)


def srft_loss(log_probs, *, advantages, rewards, demonstration, loss_mask, entropy,
              sft_coefficient=0.5, positive_coefficient=0.1, shaping=0.1, success_threshold=0.5,
              max_completion_tokens=None):
  """SRFT: SFT and RL at once, weighed by each sequence's own mean entropy H, a constant.

  Demonstrations: sft_coefficient · e^{-H} times the NLL (token mean), and LUFFY's shaped row.
  Rollouts: +positive_coefficient · e^{H} on correct ones and -1 on wrong ones, times log π, summed
  and divided by the maximum length; no ratio and no baseline.

  Args:
    advantages: [B]; centred over rollouts and demonstrations together, for the shaped row.
    entropy: [B, T] nats; read as a constant.
    success_threshold: the least reward of a correct rollout.
    The others: see the module.
  Source: arXiv:2506.19767, eq. 11. The authors' code weighs the NLL by e^{+H}; the paper, and this,
  by e^{-H}.
  """
  masking.non_negative(sft_coefficient=sft_coefficient, positive_coefficient=positive_coefficient)
  log_probs, entropy = masking.clean(  # entropy enters weights alone: no gradient
      loss_mask, log_probs=log_probs, entropy=entropy)
  bounds.boolean(loss_mask.shape[:1], demonstration=demonstration)
  rewards = bounds.per_row(loss_mask.shape[:1], log_probs.dtype, rewards=rewards)
  mean_entropy = entropy.sum(axis=1) / masking.lengths(loss_mask, entropy.dtype)  # [B]
  reduce = _per_length(max_completion_tokens)
  rollout_weights = jnp.where(
      rewards >= success_threshold, positive_coefficient * jnp.exp(mean_entropy), -1.0)
  return _together(
      ('imitation', _imitation(
          log_probs, demonstration, loss_mask, sft_coefficient * jnp.exp(-mean_entropy))),
      ('rollouts', likelihood.weighted_loss(
          log_probs, loss_mask & ~demonstration[:, None], advantages=rollout_weights,
          reduce=reduce, name='rollouts')),
      ('off_policy', _shaped(log_probs, advantages, demonstration, loss_mask, reduce, shaping)))
