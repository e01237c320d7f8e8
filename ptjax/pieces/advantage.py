"""Advantage estimates that give one number per completion.

Completions come prompt-major: rows `p * group_size ... (p + 1) * group_size - 1` answer prompt p.
A group whose rewards are all equal gets exactly 0. A reward of NaN is a reward function's "no
opinion": that completion gets 0 and stays out of its group's statistics. `returns` has the
estimators that run in time.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import returns


def per_token(advantages, loss_mask, dtype=jnp.float32):
  """Spreads advantages ([B], [B, T] or a number) over the tokens; 0 off the mask. [B, T]."""
  advantages = jnp.asarray(advantages, dtype)
  if advantages.shape not in ((), loss_mask.shape[:1], loss_mask.shape):
    raise ValueError(f'advantages have shape {advantages.shape}: expected [B] or [B, T] of '
                     f'loss_mask, {loss_mask.shape}')
  if advantages.ndim == 1:
    advantages = advantages[:, None]
  return jnp.where(loss_mask, jnp.broadcast_to(advantages, loss_mask.shape), 0.0)


def _mean(groups):
  scored = ~jnp.isnan(groups)
  total = groups.sum(axis=1, keepdims=True, where=scored)
  return total / jnp.maximum(scored.sum(axis=1, keepdims=True), 1).astype(groups.dtype)


def _std(groups):
  """Standard deviation with ddof 1 of the scored members, [P, 1]; 0 for fewer than two."""
  scored = ~jnp.isnan(groups)
  squares = jnp.square(groups - _mean(groups)).sum(axis=1, keepdims=True, where=scored)
  count = scored.sum(axis=1, keepdims=True)
  return jnp.sqrt(squares / jnp.maximum(count - 1, 1).astype(groups.dtype))


def _tied(groups):
  """True for groups whose scored members are all equal, [P, 1]: exact where a std is rounded."""
  scored = ~jnp.isnan(groups)
  highest = groups.max(axis=1, keepdims=True, where=scored, initial=-jnp.inf)
  return highest <= groups.min(axis=1, keepdims=True, where=scored, initial=jnp.inf)


def _minus(groups, baseline):
  """groups - baseline; 0 for tied groups and for completions without a reward."""
  return jnp.where(jnp.isnan(groups) | _tied(groups), 0.0, groups - baseline)


def _centred(groups):
  return _minus(groups, _mean(groups))


def constant(rewards):
  """1 for every completion: imitation. [B]."""
  return jnp.ones_like(rewards)


def given(rewards):
  """The rewards themselves, without a baseline. [B]."""
  return jnp.nan_to_num(rewards)


def group_centred(rewards, *, group_size):
  """Reward minus its group's mean. [B]. Source: Dr. GRPO, arXiv:2503.20783."""
  return _centred(masking.in_groups(rewards, group_size, at_least=2)).reshape(-1)


def group_normalized(rewards, *, group_size, epsilon=1e-4):
  """Group z-score: (R - mean) / (std + epsilon), std with ddof 1. [B].

  Source: GRPO, arXiv:2402.03300; `epsilon` 1e-4 is TRL's, verl takes 1e-6, oxRL 1e-8.
  """
  masking.non_negative(epsilon=epsilon)
  groups = masking.in_groups(rewards, group_size, at_least=2)
  return (_centred(groups) / (_std(groups) + epsilon)).reshape(-1)


def last_token_normalized(rewards, *, loss_mask, group_size, epsilon=1e-8):
  """oxRL's group z-score, placed on the last response token alone. [B, T].

  For repeating arXiv:2603.19335, whose shipped configurations set `reward.broadcast=False`.
  """
  scores = group_normalized(rewards, group_size=group_size, epsilon=epsilon)
  return jnp.where(returns.last_token(loss_mask), scores[:, None], 0.0)


def whitened_group_centred(rewards, *, loss_mask, group_size):
  """REINFORCE++ with a baseline: centred per group, then whitened over the batch's tokens. [B, T].

  Source: arXiv:2501.03262.
  """
  centred = group_centred(rewards, group_size=group_size)
  mask = returns.scored(rewards, loss_mask)
  return returns.whiten(jnp.broadcast_to(centred[:, None], mask.shape), mask)


def leave_one_out(rewards, *, group_size):
  """Reward minus the mean of the group's others. [B]. Source: RLOO, arXiv:2402.14740."""
  groups = masking.in_groups(rewards, group_size, at_least=2)
  scored = (~jnp.isnan(groups)).sum(axis=1, keepdims=True).astype(rewards.dtype)
  return (_centred(groups) * scored / jnp.maximum(scored - 1.0, 1.0)).reshape(-1)


def batch_normalized(rewards, *, group_size, epsilon=1e-4):
  """Centred per group, divided by the whole batch's std (ddof 1). [B]. Source: arXiv:2508.08221."""
  masking.non_negative(epsilon=epsilon)
  std = _std(rewards[None])[0]
  return group_centred(rewards, group_size=group_size) / (std + epsilon)


def optimal_length_baseline(rewards, *, loss_mask, group_size):
  """Reward minus its group's length-weighted mean reward. [B]. Source: OPO, arXiv:2505.23585."""
  groups = masking.in_groups(rewards, group_size, at_least=2)
  scored = ~jnp.isnan(groups)
  weights = jnp.where(scored, masking.lengths(loss_mask, rewards.dtype).reshape(groups.shape), 0.0)
  total = (weights * groups).sum(axis=1, keepdims=True, where=scored)
  return _minus(groups, total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)).reshape(-1)


def informative_groups(rewards, *, group_size):
  """False for groups whose rewards are all equal, which teach nothing; DAPO resamples them. [P]."""
  return ~_tied(masking.in_groups(rewards, group_size))[:, 0]


def informative_group_scaled(rewards, *, group_size):
  """GPG: centred, scaled by B / (B - M), M counting members of groups that are all equal. [B].

  Source: arXiv:2504.02546. verl's code counts rewards of 0 for M; the paper is followed here.
  """
  informative = informative_groups(rewards, group_size=group_size)
  scale = informative.size / jnp.maximum(informative.sum(), 1).astype(rewards.dtype)
  return scale * group_centred(rewards, group_size=group_size)


def pass_at_k(rewards, *, group_size, epsilon=1e-6):
  """Only the group's best: (best - second) / (std + epsilon), the others 0. [B].

  Of several best ones none stands out, and the group gets 0. Source: arXiv:2503.19595.
  """
  masking.non_negative(epsilon=epsilon)
  groups = masking.in_groups(rewards, group_size, at_least=2)
  ordered = jnp.sort(jnp.where(jnp.isnan(groups), -jnp.inf, groups), axis=1)
  gain = (ordered[:, -1:] - ordered[:, -2:-1]) / (_std(groups) + epsilon)
  return jnp.where((groups == ordered[:, -1:]) & ~_tied(groups), gain, 0.0).reshape(-1)


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


def step_normalized(rewards, *, step_rewards, loss_mask, group_size, outcome_rewards=None,
                    epsilon=1e-4):
  """Process supervision: each token earns the z-scored rewards of its step and those after. [B, T].

  A step's reward is z-scored over all steps of its group, whichever completion they are of, as
  `group_normalized` does with completions. A group whose steps are all equal gets 0 for them.

  Args:
    rewards: [B]; completions without one (NaN) get 0 and stay out of the statistics.
    step_rewards: [B, T]; at the token that ends a step its reward, NaN elsewhere.
    loss_mask: [B, T] bool; steps that end off it do not count.
    group_size: completions per prompt.
    outcome_rewards: [B] or None; rewards of whole completions, whose `group_normalized` is added.
    epsilon: guard of the standard deviations (ddof 1).
  Source: DeepSeekMath, arXiv:2402.03300, section 4.1.3, which has no outcome beside the process.
  """
  chex.assert_equal_shape([step_rewards, loss_mask])
  masking.non_negative(epsilon=epsilon)
  masking.in_groups(rewards, group_size)
  length = loss_mask.shape[1]
  ends = returns.scored(rewards, loss_mask) & ~jnp.isnan(step_rewards)
  steps = jnp.where(ends, step_rewards, jnp.nan).reshape(-1, group_size * length)
  normalized = (_centred(steps) / (_std(steps) + epsilon)).reshape(-1, length)
  to_go = jnp.cumsum(jnp.where(ends, normalized, 0.0)[:, ::-1], axis=1)[:, ::-1]
  if outcome_rewards is not None:
    outcome = group_normalized(outcome_rewards, group_size=group_size, epsilon=epsilon)
    to_go = to_go + outcome[:, None]
  return jnp.where(returns.scored(rewards, loss_mask), to_go, 0.0)


def leave_one_out_with_kl(
    rewards, *, group_size, loss_mask=None, old_log_probs=None, reference_log_probs=None,
    reward_kl_coefficient=0.05):
  """RLOO's advantage: leave-one-out of R - β Σ_t (ℓᵒ_t - ℓ⁰_t), the reward less the whole KL. [B].

  Source: arXiv:2402.14740; β .05 is TRL's, and 0 needs neither reference nor old log-probs.
  """
  if reward_kl_coefficient:
    penalty = returns.kl_in_reward(
        loss_mask, old_log_probs, reference_log_probs, reward_kl_coefficient)
    rewards = rewards - penalty.sum(axis=1)
  return leave_one_out(rewards, group_size=group_size)


def less_kl(estimator):
  """Returns `estimator` of R - β Σ_t (ℓᵒ_t - ℓ⁰_t): of rewards less the whole KL.

  Args:
    estimator: `estimator(rewards, *, arrays, hyperparameters)`.
  Returns:
    A function with its arguments and those of the KL, `reward_kl_coefficient` (.05) among them.
  """
  own = inspect.signature(estimator).parameters

  def modified(rewards, *, loss_mask, old_log_probs=None, reference_log_probs=None,
               reward_kl_coefficient=0.05, **inputs):
    if reward_kl_coefficient:
      rewards = rewards - returns.kl_in_reward(
          loss_mask, old_log_probs, reference_log_probs, reward_kl_coefficient).sum(axis=1)
    offered = dict(inputs, loss_mask=loss_mask, old_log_probs=old_log_probs,
                   reference_log_probs=reference_log_probs)
    return estimator(rewards, **{name: x for name, x in offered.items() if name in own})

  added = {name: p for name, p in inspect.signature(modified).parameters.items()
           if p.kind is not p.VAR_KEYWORD}
  modified.__signature__ = inspect.Signature(
      sorted({**own, **added}.values(), key=lambda p: (p.kind, p.default is not p.empty)))
  modified.__name__ = f'{estimator.__name__}+reward_kl'
  modified.__doc__ = estimator.__doc__
  return modified


def win_margin(rewards):
  """P(y beats y') - ½, where the reward is a judge's win probability. [B]. Nash-MD."""
  return jnp.nan_to_num(rewards - 0.5)


def minus_optimal_value(rewards, *, optimal_values):
  """R - V*, where V* [B] is `optimal_value` of the completion's prompt. A*-PO, arXiv:2505.20686."""
  return jnp.nan_to_num(rewards - optimal_values)


def optimal_value(reference_rewards, *, temperature=0.5):
  """V*(x) = β₁ log mean_k exp(R_k / β₁) of [P, K] rewards of the reference's own samples. [P].

  Source: A*-PO, arXiv:2505.20686, stage 1; β₁ is `temperature`.
  """
  chex.assert_rank(reference_rewards, 2)
  return jax.vmap(
      functools.partial(reduction.log_sum_exp, temperature=temperature))(reference_rewards)


def overlong_penalty(lengths, *, max_completion_tokens, cache_tokens):
  """DAPO's soft penalty, added to the reward: 0, then linear to -1 over the last `cache_tokens`.

  `lengths` [B] in tokens; at `max_completion_tokens` the penalty is -1. Source: arXiv:2503.14476,
  eq. 13.
  """
  if not 0 < cache_tokens <= max_completion_tokens:
    raise ValueError(f'cache_tokens={cache_tokens}: expected 1 to max_completion_tokens='
                     f'{max_completion_tokens}')
  start = max_completion_tokens - cache_tokens
  return -jnp.clip((jnp.asarray(lengths, jnp.float32) - start) / cache_tokens, 0.0, 1.0)
