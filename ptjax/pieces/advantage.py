"""Advantage estimates that give one number per completion.

Completions come prompt-major: rows `p * group_size ... (p + 1) * group_size - 1` answer prompt p.
A group whose rewards are all equal gets exactly 0. `returns` has the estimators that run in time.
"""

import chex
import jax.numpy as jnp

from ptjax.pieces import masking


def per_token(advantages, loss_mask, dtype=jnp.float32):
  """Spreads advantages ([B], [B, T] or a number) over the tokens; 0 off the mask. [B, T]."""
  advantages = jnp.asarray(advantages, dtype)
  if advantages.ndim == 1:
    chex.assert_shape(
        advantages, loss_mask.shape[:1], custom_message='advantages must be [B] or [B, T]')
    advantages = advantages[:, None]
  elif advantages.ndim == 2:
    chex.assert_shape(
        advantages, loss_mask.shape, custom_message='advantages must be [B] or [B, T]')
  return jnp.where(loss_mask, jnp.broadcast_to(advantages, loss_mask.shape), 0.0)


def in_groups(rewards, group_size, *, at_least=1):
  """Reshapes [B] to [B / group_size, group_size]; `at_least` is the size a baseline needs."""
  chex.assert_rank(rewards, 1)
  if group_size < at_least:
    raise ValueError(
        f'group_size={group_size} leaves no other completion to compare with, and this advantage '
        f'needs at least {at_least}; set rollout.group_size={at_least} or more.')
  if rewards.shape[0] % group_size:
    raise ValueError(
        f'{rewards.shape[0]} completions do not split into groups of group_size={group_size}; '
        'set rollout.group_size to a divisor, or rollout.num_prompts so that it divides.')
  return rewards.reshape(-1, group_size)


def _tied(groups):
  """True for groups whose members are all equal, [P, 1]; rounding of the mean does not matter."""
  return (groups == groups[:, :1]).all(axis=1, keepdims=True)


def _centred(groups):
  return jnp.where(_tied(groups), 0.0, groups - groups.mean(axis=1, keepdims=True))


def constant(rewards):
  """1 for every completion: imitation. [B]."""
  return jnp.ones_like(rewards)


def given(rewards):
  """The rewards themselves, without a baseline. [B]."""
  return rewards


def group_centred(rewards, *, group_size):
  """Reward minus its group's mean. [B]. Source: Dr. GRPO, arXiv:2503.20783."""
  return _centred(in_groups(rewards, group_size, at_least=2)).reshape(-1)


def group_normalized(rewards, *, group_size, epsilon=1e-4):
  """Group z-score: (R - mean) / (std + epsilon), std with ddof 1. [B].

  Source: GRPO, arXiv:2402.03300; `epsilon` 1e-4 is TRL's, verl takes 1e-6, oxRL 1e-8.
  """
  groups = in_groups(rewards, group_size, at_least=2)
  return (_centred(groups) / (groups.std(axis=1, ddof=1, keepdims=True) + epsilon)).reshape(-1)


def leave_one_out(rewards, *, group_size):
  """Reward minus the mean of the group's others. [B]. Source: RLOO, arXiv:2402.14740."""
  return group_centred(rewards, group_size=group_size) * (group_size / (group_size - 1))


def batch_normalized(rewards, *, group_size, epsilon=1e-4):
  """Centred per group, divided by the whole batch's std (ddof 1). [B]. Source: arXiv:2508.08221."""
  return group_centred(rewards, group_size=group_size) / (rewards.std(ddof=1) + epsilon)


def optimal_length_baseline(rewards, *, loss_mask, group_size):
  """Reward minus its group's length-weighted mean reward. [B]. Source: OPO, arXiv:2505.23585."""
  groups = in_groups(rewards, group_size, at_least=2)
  lengths = in_groups(masking.lengths(loss_mask, rewards.dtype), group_size)
  baseline = (lengths * groups).sum(axis=1, keepdims=True) / lengths.sum(axis=1, keepdims=True)
  return jnp.where(_tied(groups), 0.0, groups - baseline).reshape(-1)


def informative_group_scaled(rewards, *, group_size):
  """GPG: centred, scaled by B / (B - M), M counting members of groups that are all equal. [B].

  Source: arXiv:2504.02546. verl's code counts rewards of 0 for M; the paper is followed here.
  """
  groups = in_groups(rewards, group_size, at_least=2)
  informative = (~_tied(groups)).sum().astype(rewards.dtype)
  scale = groups.shape[0] / jnp.maximum(informative, 1.0)
  return (scale * _centred(groups)).reshape(-1)


def pass_at_k(rewards, *, group_size, epsilon=1e-6):
  """Only the group's best: (best - second) / (std + epsilon), the others 0. [B].

  Of several best ones none stands out, and the group gets 0. Source: arXiv:2503.19595.
  """
  groups = in_groups(rewards, group_size, at_least=2)
  ordered = jnp.sort(groups, axis=1)
  gain = (ordered[:, -1:] - ordered[:, -2:-1]) / (groups.std(axis=1, ddof=1, keepdims=True) + epsilon)
  return jnp.where(groups == ordered[:, -1:], gain, 0.0).reshape(-1)


def component_normalized(reward_components, *, group_size, reward_weights=None, epsilon=1e-4):
  """GDPO: each reward z-scored in its group, summed with weights, then whitened over the batch.

  Args:
    reward_components: [B, C]; one column per reward function.
    group_size: completions per prompt.
    reward_weights: C numbers, None for all 1.
    epsilon: guard of both standard deviations (ddof 1).
  Returns:
    [B]. Source: arXiv:2601.05242; TRL `multi_objective_aggregation='normalize_then_sum'`.
  """
  chex.assert_rank(reward_components, 2)
  weights = reward_weights or (1.0,) * reward_components.shape[1]
  if len(weights) != reward_components.shape[1]:
    raise ValueError(
        f'{len(weights)} reward_weights for {reward_components.shape[1]} reward components.')
  total = sum(
      weight * group_normalized(column, group_size=group_size, epsilon=epsilon)
      for weight, column in zip(weights, reward_components.T))
  return (total - total.mean()) / (total.std(ddof=1) + epsilon)


def reward_minus_penalty(
    rewards, *, loss_mask, old_log_probs, reference_log_probs, reward_kl_coefficient):
  """Folds the k1 KL of the whole completion into its reward, R - β Σ_t (ℓᵒ_t - ℓ⁰_t). [B]."""
  old_log_probs, reference_log_probs = masking.clean(
      loss_mask, old_log_probs=old_log_probs, reference_log_probs=reference_log_probs)
  return rewards - reward_kl_coefficient * (old_log_probs - reference_log_probs).sum(axis=1)


def leave_one_out_with_kl(
    rewards, *, group_size, loss_mask=None, old_log_probs=None, reference_log_probs=None,
    reward_kl_coefficient=0.05):
  """RLOO's advantage: leave-one-out of the reward less the KL to the reference. [B].

  Source: arXiv:2402.14740; `reward_kl_coefficient` .05 is TRL's, 0 needs no reference model.
  """
  if reward_kl_coefficient:
    rewards = reward_minus_penalty(
        rewards, loss_mask=loss_mask, old_log_probs=old_log_probs,
        reference_log_probs=masking.required(
            reference_log_probs, 'reference_log_probs',
            f'reward_kl_coefficient={reward_kl_coefficient}'),
        reward_kl_coefficient=reward_kl_coefficient)
  return leave_one_out(rewards, group_size=group_size)
