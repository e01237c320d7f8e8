"""Returns and advantages in time, against loops over tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import returns

B, T = 4, 6
rng = np.random.default_rng(0)
MASK = np.arange(T)[None] < np.array([[6], [3], [1], [5]])
MASK[0, 2] = False  # a hole: the environment's token
REWARDS = np.array([1.0, -0.5, 2.0, 0.0], np.float32)
TOKEN, VALUES, OLD, REFERENCE = rng.normal(size=(4, B, T)).astype(np.float32)


def loop(token_rewards, values, gamma, lam):
  """GAE over the tokens on the mask, as if the others were not there."""
  out = np.zeros((B, T))
  for i in range(B):
    where = np.nonzero(MASK[i])[0]
    advantage = next_value = 0.0
    for t in where[::-1]:
      delta = token_rewards[i, t] + gamma * next_value - values[i, t]
      advantage = delta + gamma * lam * advantage
      next_value, out[i, t] = values[i, t], advantage
  return out


def whitened(x):
  tokens = x[MASK]
  return np.where(MASK, (x - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8), 0.0)


def poison(x):
  return jnp.asarray(np.where(MASK, x, np.nan), jnp.float32)


def test_gae():
  got, target = returns.gae(poison(TOKEN), poison(VALUES), MASK, discount=0.9, gae_lambda=0.8)
  want = loop(TOKEN, VALUES, 0.9, 0.8)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.asarray(target)[MASK], (want + VALUES)[MASK], rtol=1e-5, atol=1e-6)


def test_gae_golden():
  got, target = returns.gae(
      jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.2, -0.1]]), jnp.ones((1, 3), bool),
      discount=0.99, gae_lambda=0.95)
  np.testing.assert_allclose(got[0], [0.389785, 0.735550, 1.1], atol=6e-7)
  np.testing.assert_allclose(target[0], [0.889785, 0.935550, 1.0], atol=6e-7)


def test_to_go():
  got = returns.to_go(poison(TOKEN), MASK, discount=0.9)
  np.testing.assert_allclose(got, loop(TOKEN, np.zeros((B, T)), 0.9, 1.0), rtol=1e-5, atol=1e-6)


def test_reward_sits_on_the_last_token_and_the_kl_on_every_one():
  last = np.asarray(returns.last_token(MASK))
  np.testing.assert_array_equal(np.nonzero(last), [[0, 1, 2, 3], [5, 2, 0, 4]])
  got = returns.token_rewards(jnp.asarray(REWARDS), MASK, old_log_probs=poison(OLD),
                              reference_log_probs=poison(REFERENCE), reward_kl_coefficient=0.1)
  want = np.where(MASK, last * REWARDS[:, None] - 0.1 * (OLD - REFERENCE), 0.0)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_whiten():
  got = np.asarray(returns.whiten(poison(TOKEN), MASK))
  np.testing.assert_allclose(got, whitened(TOKEN.astype(np.float64)), rtol=1e-4, atol=1e-6)
  constant = returns.whiten(jnp.ones((B, T)), MASK)
  np.testing.assert_array_equal(constant, 0.0)
  one = np.zeros_like(MASK)
  one[1, 0] = True
  np.testing.assert_array_equal(returns.whiten(poison(TOKEN), one), 0.0)


def test_ppo_advantages_reach_back_to_the_first_token():
  got = returns.whitened_gae(
      jnp.asarray(REWARDS), old_values=poison(VALUES), loss_mask=MASK, old_log_probs=poison(OLD),
      reference_log_probs=poison(REFERENCE), reward_kl_coefficient=0.1, discount=0.99)
  last = np.asarray(returns.last_token(MASK))
  token = np.where(MASK, last * REWARDS[:, None] - 0.1 * (OLD - REFERENCE), 0.0)
  want = loop(token, VALUES, 0.99, 0.95)
  np.testing.assert_allclose(got['advantages'], whitened(want), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
      np.asarray(got['returns'])[MASK], (want + VALUES)[MASK], rtol=1e-4, atol=1e-5)


def test_reinforce_pp_is_the_whitened_return_to_go():
  got = returns.whitened_to_go(jnp.asarray(REWARDS), loss_mask=MASK, reward_kl_coefficient=0.0)
  want = whitened(np.where(MASK, REWARDS[:, None].astype(np.float64), 0.0))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_remax_subtracts_the_greedy_completions_reward():
  greedy = np.array([0.5, 0.5, 1.0, 1.0], np.float32)
  got = returns.minus_greedy(jnp.asarray(REWARDS), greedy_rewards=greedy, loss_mask=MASK)
  np.testing.assert_allclose(got, np.where(MASK, (REWARDS - greedy)[:, None], 0.0), rtol=1e-6)


def test_optimal_token_baseline():
  squares = rng.uniform(0.1, 0.9, (B, T)).astype(np.float32)
  got = np.asarray(returns.optimal_token_baseline(
      jnp.asarray(REWARDS), group_size=2, loss_mask=MASK, old_log_probs=poison(-np.abs(OLD)),
      sum_squared_probabilities=poison(squares)))
  want = np.zeros((B, T))
  for p in range(2):
    rows = range(2 * p, 2 * p + 2)
    weight = {i: np.cumsum(np.where(MASK[i], 1 - 2 * np.exp(-np.abs(OLD[i])) + squares[i], 0.0))
              for i in rows}
    for t in range(T):
      alive = [i for i in rows if MASK[i, t]]
      if alive:
        total = sum(weight[i][t] for i in alive)
        baseline = sum(weight[i][t] * REWARDS[i] for i in alive) / total
        for i in alive:
          want[i, t] = REWARDS[i] - baseline
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_completions_without_a_reward_stay_out():
  rewards = jnp.asarray(REWARDS).at[1].set(jnp.nan)
  got = returns.whitened_gae(rewards, old_values=poison(VALUES), loss_mask=MASK,
                             reward_kl_coefficient=0.0)
  assert not np.asarray(got['advantages'])[1].any()
  np.testing.assert_array_equal(np.asarray(got['returns'])[1][MASK[1]], VALUES[1][MASK[1]])
  others = np.asarray(got['advantages'])[[0, 2, 3]][MASK[[0, 2, 3]]]
  np.testing.assert_allclose([others.mean(), others.std(ddof=1)], [0.0, 1.0], atol=1e-5)


def test_missing_arrays_are_named():
  with pytest.raises(ValueError, match='reward_kl_coefficient=0.01 needs old_log_probs'):
    returns.whitened_to_go(jnp.asarray(REWARDS), loss_mask=MASK)


def test_gae_is_compiled_once():
  from ptjax.training import compilations
  counter = compilations.Compilations()
  arrays = [jnp.ones((3, 5)), jnp.ones((3, 5)), jnp.ones((3, 5), bool)]
  returns.gae(*arrays)
  first = counter.count
  returns.gae(*arrays)
  assert counter.count == first
