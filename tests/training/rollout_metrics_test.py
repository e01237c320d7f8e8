"""Statistics of a rollout, by hand."""

import numpy as np
import pytest

from ptjax import types
from ptjax.rewards import combine
from ptjax.training import rollout_metrics

G, T = 2, 5
LENGTHS = np.array([5, 2, 1, 5, 3, 4, 5, 2])
B = len(LENGTHS)


@pytest.fixture
def rollouts():
  return types.Rollouts(
      tokens=np.zeros((B, T), np.int32), loss_mask=np.arange(T) < LENGTHS[:, None],
      log_probs=np.zeros((B, T), np.float32), truncated=np.arange(B) % 4 == 0)


def test_rollout_metrics_by_hand(rollouts):
  values = np.array([[1.0, 0], [0, 0], [np.nan, 1], [3, 1], [2, 2], [2, 2], [np.nan, np.nan],
                     [np.nan, np.nan]])
  scored = ~np.isnan(values).all(1)
  table = combine.RewardTable(
      names=('a', 'b'), values=values, total=np.where(scored, np.nansum(values, 1), np.nan),
      scored=scored, report={}, seconds={})
  metrics = rollout_metrics.of(table, rollouts, G)
  totals = np.array([[1, 0], [1, 4], [4, 4]])
  deviations = totals.std(1, ddof=1)
  assert metrics['reward'] == pytest.approx(totals.mean())
  assert metrics['reward_std'] == pytest.approx(deviations.mean())
  assert metrics['frac_reward_zero_std'] == pytest.approx(1 / 3)
  assert metrics['rewards/a/mean'] == pytest.approx(8 / 5)
  assert metrics['rewards/b/std'] == pytest.approx(np.std([0, 0, 1, 1, 2, 2], ddof=1))
  assert metrics['completions/mean_length'] == LENGTHS.mean()
  assert (metrics['completions/min_length'], metrics['completions/max_length']) == (1, 5)
  assert metrics['completions/clipped_ratio'] == 0.25


def test_no_reward_metric_where_nothing_was_scored(rollouts):
  table = combine.RewardTable(
      names=('a',), values=np.full((B, 1), np.nan), total=np.full(B, np.nan),
      scored=np.zeros(B, bool), report={}, seconds={})
  assert not [n for n in rollout_metrics.of(table, rollouts, G) if n.startswith('reward')]


def test_a_gates_trace_counts_prompts():
  found = {'advantages': np.ones(4), 'returns': np.ones((4, 2)),
           'imitated': np.array([False, True, False, False]),
           'imitation_weights': np.array([0.0, 0.25, 0.0, 0.5])}
  assert rollout_metrics.of_gate(found, 2) == {
      'gate/imitated': 0.5, 'gate/imitation_weights': 0.375}


def test_demonstrations_do_not_count(rollouts):
  values = np.arange(8.0)[:, None]
  table = combine.RewardTable(names=('a',), values=values, total=values[:, 0],
                              scored=np.ones(B, bool), report={}, seconds={})
  table, own = rollout_metrics.without(np.arange(B) % 2 == 1, table, rollouts)
  np.testing.assert_array_equal(table.total, [0, 2, 4, 6])
  np.testing.assert_array_equal(own.loss_mask.sum(1), LENGTHS[::2])
