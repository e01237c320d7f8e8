"""Advantage estimates: golden values, loops in float64, ties, missing rewards, bad groups."""

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import advantage

G, P = 4, 5
B = G * P
rng = np.random.default_rng(0)
REWARDS = rng.normal(size=B).astype(np.float32)
LENGTHS = rng.integers(1, 9, B)
MASK = np.arange(8)[None] < LENGTHS[:, None]
GROUPED = dict(group_size=G)
GROUP_BASELINES = {
    'group_centred': GROUPED, 'group_normalized': GROUPED, 'leave_one_out': GROUPED,
    'batch_normalized': GROUPED, 'informative_group_scaled': GROUPED, 'pass_at_k': GROUPED,
    'optimal_length_baseline': dict(GROUPED, loss_mask=MASK)}
CENTRED = ('group_centred', 'group_normalized', 'leave_one_out', 'batch_normalized',
           'informative_group_scaled')


def call(name, rewards):
  return np.asarray(getattr(advantage, name)(jnp.asarray(rewards), **GROUP_BASELINES[name]))


def by_loops(name, rewards):
  """The textbook, one group at a time, in float64; members without a reward are left out."""
  rewards = np.asarray(rewards, np.float64)
  groups = rewards.reshape(-1, G)
  spread = np.nanstd(rewards, ddof=1)
  alive = sum(len(set(g[~np.isnan(g)])) > 1 for g in groups)
  out = np.zeros_like(rewards)
  for p, group in enumerate(groups):
    rows = p * G + np.nonzero(~np.isnan(group))[0]
    R, n = rewards[rows], LENGTHS[rows]
    if len(R) < 2:
      continue
    others = np.array([np.delete(R, i).mean() for i in range(len(R))])
    top = np.sort(R)[::-1]
    out[rows] = {
        'group_centred': R - R.mean(),
        'group_normalized': (R - R.mean()) / (R.std(ddof=1) + 1e-4),
        'leave_one_out': R - others,
        'batch_normalized': (R - R.mean()) / (spread + 1e-4),
        'informative_group_scaled': (R - R.mean()) * len(groups) / max(alive, 1),
        'pass_at_k': np.where(R == top[0], (top[0] - top[1]) / (R.std(ddof=1) + 1e-6), 0.0),
        'optimal_length_baseline': R - (n * R).sum() / n.sum()}[name]
  return out


@pytest.mark.parametrize('name', GROUP_BASELINES)
def test_against_loops(name):
  np.testing.assert_allclose(call(name, REWARDS), by_loops(name, REWARDS), rtol=2e-5, atol=1e-6)
  binary = (REWARDS > 0.5).astype(np.float32)
  binary[:G] = 1.0  # one group that teaches nothing
  np.testing.assert_allclose(call(name, binary), by_loops(name, binary), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name', CENTRED)
def test_centred_estimates_sum_to_zero_in_each_group(name):
  assert np.abs(call(name, REWARDS).reshape(P, G).sum(1)).max() < 1e-4


@pytest.mark.parametrize('name', GROUP_BASELINES)
def test_equal_rewards_give_exactly_zero(name):
  tied = np.full(B, 0.1, np.float32)  # whose mean is not 0.1 in float32
  np.testing.assert_array_equal(call(name, tied), 0.0)


@pytest.mark.parametrize('name', GROUP_BASELINES)
def test_missing_rewards_stay_out(name):
  rewards = REWARDS.copy()
  rewards[[1, 4, 5, 6, 7, 8, 9, 10]] = np.nan  # one, all, and all but one of a group
  got = call(name, rewards)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got[[1, 4, 5, 6, 7, 8, 9, 10, 11]], 0.0)
  np.testing.assert_array_equal(np.isnan(rewards) & (got != 0), False)
  np.testing.assert_allclose(got, by_loops(name, rewards), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', GROUP_BASELINES)
def test_wrong_groups_are_named(name):
  arguments = {**GROUP_BASELINES[name], 'group_size': 1}
  with pytest.raises(ValueError, match='group_size=1 leaves no other.*at least 2'):
    getattr(advantage, name)(jnp.asarray(REWARDS), **arguments)
  arguments['group_size'] = 3
  with pytest.raises(ValueError, match='20 completions do not split into groups of group_size=3'):
    getattr(advantage, name)(jnp.asarray(REWARDS), **arguments)


def test_golden_values():
  one_right = jnp.array([1.0, 0.0, 0.0, 0.0])
  mask = jnp.arange(8)[None] < jnp.array([3, 5, 4, 8])[:, None]
  golden = [
      (advantage.group_normalized, dict(epsilon=1e-4), (1.499700, -0.499900)),
      (advantage.group_normalized, dict(epsilon=1e-6), (1.499997, -0.499999)),
      (advantage.leave_one_out, {}, (1.0, -1 / 3)),
      (advantage.group_centred, {}, (0.75, -0.25)),
      (advantage.optimal_length_baseline, dict(loss_mask=mask), (0.85, -0.15)),
      (advantage.pass_at_k, {}, (1.999996, 0.0)),
      (advantage.informative_group_scaled, {}, (0.75, -0.25))]
  for estimator, hyper, (first, rest) in golden:
    got = estimator(one_right, group_size=4, **hyper)
    np.testing.assert_allclose(got, [first, rest, rest, rest], atol=1.5e-6)


def test_components_are_normalised_before_they_are_summed():
  components = rng.normal(size=(B, 2)).astype(np.float32) * np.array([1.0, 100.0], np.float32)
  got = advantage.component_normalized(
      jnp.asarray(components), group_size=G, reward_weights=(1.0, 0.5))
  z = lambda R: (R - R.mean()) / (R.std(ddof=1) + 1e-4)
  total = np.concatenate([
      z(g[:, 0]) + 0.5 * z(g[:, 1]) for g in components.astype(np.float64).reshape(P, G, 2)])
  np.testing.assert_allclose(
      got, (total - total.mean()) / (total.std(ddof=1) + 1e-4), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match='3 reward_weights for 2'):
    advantage.component_normalized(components, group_size=G, reward_weights=(1.0, 1.0, 1.0))


def test_rloo_takes_the_whole_kl_off_the_reward():
  old, reference = rng.normal(size=(2, B, 8)).astype(np.float32)
  got = advantage.leave_one_out_with_kl(
      jnp.asarray(REWARDS), group_size=G, loss_mask=MASK, reward_kl_coefficient=0.1,
      old_log_probs=np.where(MASK, old, np.nan), reference_log_probs=reference)
  kl = np.where(MASK, old - reference, 0.0).sum(1)
  np.testing.assert_allclose(got, by_loops('leave_one_out', REWARDS - 0.1 * kl), rtol=1e-4,
                             atol=1e-5)
  np.testing.assert_allclose(
      advantage.leave_one_out_with_kl(
          jnp.asarray(REWARDS), group_size=G, reward_kl_coefficient=0.0),
      by_loops('leave_one_out', REWARDS), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match='reward_kl_coefficient=0.05 needs reference_log_probs'):
    advantage.leave_one_out_with_kl(
        jnp.asarray(REWARDS), group_size=G, loss_mask=MASK, old_log_probs=old)


def test_last_token_alone_gets_the_oxrl_advantage():
  got = np.asarray(advantage.last_token_normalized(
      jnp.asarray(REWARDS), loss_mask=MASK, group_size=G))
  assert ((got != 0).sum(1) == 1).all()
  np.testing.assert_allclose(
      got[np.arange(B), LENGTHS - 1],
      advantage.group_normalized(jnp.asarray(REWARDS), group_size=G, epsilon=1e-8), rtol=1e-6)


def test_whitened_group_centred_is_whitened_over_tokens():
  got = np.asarray(advantage.whitened_group_centred(
      jnp.asarray(REWARDS), loss_mask=MASK, group_size=G))
  np.testing.assert_allclose(got[MASK].mean(), 0.0, atol=1e-6)
  np.testing.assert_allclose(got[MASK].std(ddof=1), 1.0, rtol=1e-5)
  assert not got[~MASK].any()


def test_simple_estimates():
  np.testing.assert_array_equal(advantage.constant(REWARDS), 1.0)
  with_gap = jnp.array([0.7, jnp.nan])
  np.testing.assert_allclose(advantage.given(with_gap), [0.7, 0.0], rtol=1e-6)
  np.testing.assert_allclose(advantage.win_margin(with_gap), [0.2, 0.0], rtol=1e-5)
  np.testing.assert_allclose(
      advantage.minus_optimal_value(with_gap, optimal_values=jnp.array([0.5, 0.5])), [0.2, 0.0],
      rtol=1e-5)
  np.testing.assert_array_equal(
      advantage.informative_groups(jnp.array([1.0, 1.0, 0.0, 1.0]), group_size=2), [False, True])


def test_optimal_value_lies_between_mean_and_maximum():
  rewards = jnp.array([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
  got = advantage.optimal_value(rewards, temperature=0.5)
  want = 0.5 * np.log(np.exp(np.asarray(rewards, np.float64) / 0.5).mean(1))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_overlong_penalty():
  got = advantage.overlong_penalty(
      jnp.array([10, 80, 90, 100, 120]), max_completion_tokens=100, cache_tokens=20)
  np.testing.assert_allclose(got, [0.0, 0.0, -0.5, -1.0, -1.0], atol=1e-7)
  with pytest.raises(ValueError, match='cache_tokens=0'):
    advantage.overlong_penalty(jnp.ones(1), max_completion_tokens=10, cache_tokens=0)


def test_per_token_spreads_and_masks():
  got = advantage.per_token(REWARDS, MASK)
  np.testing.assert_array_equal(got, np.where(MASK, REWARDS[:, None], 0.0))
  poisoned = np.where(MASK, 2.0, np.nan).astype(np.float32)
  np.testing.assert_array_equal(advantage.per_token(poisoned, MASK), np.where(MASK, 2.0, 0.0))


def test_step_rewards_by_loops():
  steps = np.where(MASK & (np.arange(8) % 3 == 2) | (np.arange(8) == LENGTHS[:, None] - 1),
                   rng.uniform(size=MASK.shape), np.nan)
  steps[2 * G:3 * G] = np.where(np.isnan(steps[2 * G:3 * G]), np.nan, 0.5)  # all equal: 0
  steps[~MASK] = 7.0  # a step that ends off the mask is none
  rewards = REWARDS.astype(np.float64).copy()
  rewards[1] = np.nan
  expected = np.zeros(MASK.shape)
  for first in range(0, B, G):
    places = [(i, t) for i in range(first, first + G) for t in range(8)
              if MASK[i, t] and not np.isnan(steps[i, t]) and not np.isnan(rewards[i])]
    values = np.array([steps[place] for place in places])
    if len(set(values)) > 1:
      for (i, end), z in zip(places, (values - values.mean()) / (values.std(ddof=1) + 1e-4)):
        expected[i, :end + 1] += z
  arguments = dict(step_rewards=jnp.asarray(steps, jnp.float32), loss_mask=MASK, group_size=G)
  got = advantage.step_normalized(jnp.asarray(rewards, jnp.float32), **arguments)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(expected).max() > 1 and not expected[2 * G:3 * G].any()
  outcome = by_loops('group_normalized', REWARDS)
  both = advantage.step_normalized(jnp.asarray(rewards, jnp.float32), **arguments,
                                   outcome_rewards=jnp.asarray(REWARDS))
  alive = MASK & ~np.isnan(rewards)[:, None]
  np.testing.assert_allclose(both, np.where(alive, expected + outcome[:, None], 0.0), rtol=1e-4,
                             atol=1e-5)


def test_less_kl_takes_the_whole_kl_off_the_reward():
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=6).astype(np.float32)
  old, reference = -rng.random((2, 6, 4)).astype(np.float32)
  mask = np.arange(4) < np.array([4, 2, 1, 3, 4, 2])[:, None]
  estimator = advantage.less_kl(advantage.group_centred)
  got = estimator(jnp.asarray(rewards), group_size=3, loss_mask=jnp.asarray(mask),
                  old_log_probs=jnp.asarray(old), reference_log_probs=jnp.asarray(reference),
                  reward_kl_coefficient=0.5)
  less = (rewards - 0.5 * np.where(mask, old - reference, 0).sum(1)).reshape(2, 3)
  np.testing.assert_allclose(got, (less - less.mean(1, keepdims=True)).reshape(-1), rtol=1e-5)
  plain = estimator(jnp.asarray(rewards), group_size=3, loss_mask=jnp.asarray(mask),
                    reward_kl_coefficient=0.0)
  np.testing.assert_allclose(
      plain, advantage.group_centred(jnp.asarray(rewards), group_size=3), rtol=1e-6)
  # It has the arguments of both, and the KL of RLOO's own estimator is the same one.
  named = advantage.less_kl(advantage.leave_one_out)
  offered = dict(group_size=3, loss_mask=jnp.asarray(mask), old_log_probs=jnp.asarray(old),
                 reference_log_probs=jnp.asarray(reference), reward_kl_coefficient=0.05)
  np.testing.assert_allclose(
      named(jnp.asarray(rewards), **offered),
      advantage.leave_one_out_with_kl(jnp.asarray(rewards), **offered), rtol=1e-6)
