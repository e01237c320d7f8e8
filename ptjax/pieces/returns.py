"""Advantage estimates that run in time: one number per token, from rewards per token.

Masks may have holes (tool output inside a completion): a token off the mask is skipped, neither
discounted over nor given a value. A completion whose reward is NaN ("no opinion") is off the mask.
"""

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import masking


def scored(rewards, loss_mask):
  """The mask without the completions that have no reward. [B, T] bool."""
  return loss_mask & ~jnp.isnan(rewards)[:, None]


def last_token(loss_mask):
  """True at each sequence's last token on the mask. [B, T] bool."""
  remaining = jnp.cumsum(loss_mask[:, ::-1], axis=1)[:, ::-1]
  return loss_mask & (remaining == 1)


def kl_in_reward(loss_mask, old_log_probs, reference_log_probs, reward_kl_coefficient):
  """β k1 of every token, [B, T], as PPO and RLOO subtract it from the reward; no gradient."""
  reason = f'reward_kl_coefficient={reward_kl_coefficient}'
  masking.non_negative(reward_kl_coefficient=reward_kl_coefficient)
  old_log_probs, reference_log_probs = masking.clean(
      loss_mask, old_log_probs=masking.required(old_log_probs, 'old_log_probs', reason),
      reference_log_probs=masking.required(reference_log_probs, 'reference_log_probs', reason))
  return reward_kl_coefficient * jax.lax.stop_gradient(old_log_probs - reference_log_probs)


def token_rewards(rewards, loss_mask, *, old_log_probs=None, reference_log_probs=None,
                  reward_kl_coefficient=0.0):
  """R_t = [t = n] R - β k1_t: the reward [B] on the last token, the KL on every one. [B, T]."""
  token = jnp.where(last_token(loss_mask), rewards[:, None], 0.0)
  if not reward_kl_coefficient:
    return token
  return token - kl_in_reward(loss_mask, old_log_probs, reference_log_probs, reward_kl_coefficient)


def to_go(token_rewards_, loss_mask, *, discount=1.0):
  """Discounted return to go, G_t = R_t + γ G_{t+1}, over tokens on the mask; 0 off it. [B, T]."""
  values = jnp.zeros_like(token_rewards_)
  advantages, _ = gae(token_rewards_, values, loss_mask, discount=discount, gae_lambda=1.0)
  return advantages


def gae(token_rewards_, values, loss_mask, *, discount=1.0, gae_lambda=0.95):
  """Generalized advantage estimation.

  δ_t = R_t + γ V_{t+1} - V_t and Â_t = δ_t + γ λ Â_{t+1}, V past the end being 0.

  Args:
    token_rewards_: [B, T].
    values: [B, T]; the critic's estimate of the return from token t on.
    loss_mask: [B, T] bool.
    discount: γ per token.
    gae_lambda: λ.
  Returns:
    advantages [B, T], not whitened, and returns [B, T] = advantages + values. Source:
    arXiv:1506.02438, eq. 16.
  """
  bounds.fraction(discount=discount, gae_lambda=gae_lambda)
  rewards, values = masking.clean(loss_mask, token_rewards=token_rewards_, values=values)
  advantages = _backwards(rewards, values, loss_mask, discount, gae_lambda)
  return advantages, advantages + values


@jax.jit  # outside of any other program a scan over a new closure is compiled at every call
def _backwards(rewards, values, loss_mask, discount, gae_lambda):
  """The recursion of `gae`, from the last token to the first; [B, T]."""
  def step(carry, column):
    next_value, next_advantage = carry
    reward, value, on_mask = column
    advantage = reward + discount * next_value - value + discount * gae_lambda * next_advantage
    carry = (jnp.where(on_mask, value, next_value),
             jnp.where(on_mask, advantage, next_advantage))
    return carry, jnp.where(on_mask, advantage, 0.0)

  start = (jnp.zeros_like(values, shape=len(values)),) * 2
  columns = jax.tree.map(jnp.transpose, (rewards, values, loss_mask))
  _, advantages = jax.lax.scan(step, start, columns, reverse=True)
  return advantages.T


def whiten(values, loss_mask, *, epsilon=1e-8):
  """(x - mean) / sqrt(var + epsilon) over all tokens on the mask, var with ddof 1. [B, T]."""
  values = masking.clean(loss_mask, values=values)
  count = jnp.maximum(loss_mask.sum(), 1).astype(values.dtype)
  centred = jnp.where(loss_mask, values - values.sum() / count, 0.0)
  variance = jnp.square(centred).sum() / jnp.maximum(count - 1.0, 1.0)
  return centred * jax.lax.rsqrt(variance + epsilon)


def whitened_gae(rewards, *, old_values, loss_mask, old_log_probs=None, reference_log_probs=None,
                 reward_kl_coefficient=0.05, discount=1.0, gae_lambda=0.95):
  """PPO's advantages and returns of rewards [B] under the critic's recorded values.

  Returns:
    A dict of `advantages` [B, T], whitened over the batch's tokens, and `returns` [B, T].
    Source: arXiv:1707.06347 and, for the KL in the reward, arXiv:2203.02155; TRL's defaults.
  """
  loss_mask = scored(rewards, loss_mask)
  token = token_rewards(rewards, loss_mask, old_log_probs=old_log_probs,
                        reference_log_probs=reference_log_probs,
                        reward_kl_coefficient=reward_kl_coefficient)
  advantages, returns = gae(token, old_values, loss_mask, discount=discount, gae_lambda=gae_lambda)
  return {'advantages': whiten(advantages, loss_mask),
          'returns': jnp.where(loss_mask, returns, old_values)}


def whitened_to_go(rewards, *, loss_mask, old_log_probs=None, reference_log_probs=None,
                   reward_kl_coefficient=1e-2, discount=1.0):
  """REINFORCE++: return to go with the KL in the reward, whitened over the batch. [B, T].

  Source: arXiv:2501.03262.
  """
  loss_mask = scored(rewards, loss_mask)
  token = token_rewards(rewards, loss_mask, old_log_probs=old_log_probs,
                        reference_log_probs=reference_log_probs,
                        reward_kl_coefficient=reward_kl_coefficient)
  return whiten(to_go(token, loss_mask, discount=discount), loss_mask)


def minus_greedy(rewards, *, greedy_rewards, loss_mask, old_log_probs=None,
                 reference_log_probs=None, reward_kl_coefficient=0.0):
  """ReMax: return to go minus the reward of the prompt's greedy completion. [B, T].

  `greedy_rewards` is [B]: the same number for all completions of a prompt. Source:
  arXiv:2310.10505.
  """
  loss_mask = scored(rewards, loss_mask)
  token = token_rewards(rewards, loss_mask, old_log_probs=old_log_probs,
                        reference_log_probs=reference_log_probs,
                        reward_kl_coefficient=reward_kl_coefficient)
  return jnp.where(loss_mask, to_go(token, loss_mask) - greedy_rewards[:, None], 0.0)


def optimal_token_baseline(rewards, *, group_size, loss_mask, old_log_probs,
                           sum_squared_probabilities, discount=1.0):
  """Return to go minus, per position, the group's variance-optimal baseline. [B, T].

  B_t = Σ_i G_it W_it / Σ_i W_it over the group, with the accumulated squared size of the score
  function W_it = Σ_{u <= t} (1 - 2 π_u + Σ_v π_uv²).

  Args:
    rewards: [B].
    group_size: completions per prompt.
    loss_mask: [B, T] bool.
    old_log_probs: [B, T] nats; log π of the sampled tokens.
    sum_squared_probabilities: [B, T]; Σ_v π_v² over the vocabulary.
    discount: γ per token.
  Source: verl, `optimal_token_baseline`.
  """
  loss_mask = scored(rewards, loss_mask)
  old_log_probs, squared = masking.clean(
      loss_mask, old_log_probs=old_log_probs, sum_squared_probabilities=sum_squared_probabilities)
  size = jnp.where(loss_mask, 1.0 - 2.0 * jnp.exp(old_log_probs) + squared, 0.0)
  weights = jnp.where(loss_mask, jnp.cumsum(size, axis=1), 0.0)
  gain = to_go(token_rewards(rewards, loss_mask), loss_mask, discount=discount)
  grouped = lambda x: x.reshape(*masking.in_groups(rewards, group_size).shape, -1)
  total = grouped(weights).sum(axis=1, keepdims=True)
  baseline = grouped(weights * gain).sum(axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
  return jnp.where(loss_mask, (grouped(gain) - baseline).reshape(gain.shape), 0.0)
