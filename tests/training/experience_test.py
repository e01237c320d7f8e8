"""From a rollout to a batch: who trains, with which advantage, and in which piece."""

import functools

import numpy as np
import pytest

from ptjax import types
from ptjax.pieces import advantage
from ptjax.pieces import returns
from ptjax.training import experience

P, G, S, T = 4, 2, 3, 5
B = P * G
LENGTHS = np.array([5, 2, 1, 5, 3, 4, 5, 2])
TRUNCATED = np.array([True, False, False, False, False, False, True, False])


@pytest.fixture
def prompts():
  rng = np.random.default_rng(0)
  return types.Prompts(
      tokens=rng.integers(4, 9, (P, S)).astype(np.int32), lengths=np.array([1, 3, 2, 3], np.int32),
      ids=np.arange(P, dtype=np.int32), sample_ids=np.tile(np.arange(G, dtype=np.int32), (P, 1)))


@pytest.fixture
def rollouts():
  rng = np.random.default_rng(1)
  return types.Rollouts(
      tokens=rng.integers(4, 9, (B, T)).astype(np.int32), loss_mask=np.arange(T) < LENGTHS[:, None],
      log_probs=-rng.random((B, T)).astype(np.float32), truncated=TRUNCATED)


def test_every_generated_token_trains_the_stop_token_included(prompts, rollouts):
  batch = experience.assemble(prompts, rollouts, scored=np.ones(B, bool))
  np.testing.assert_array_equal(batch.loss_mask.sum(1), LENGTHS)
  assert batch.on_policy and set(batch.inputs) == {'rollout_log_probs'}


def test_completions_without_a_reward_do_not_train(prompts, rollouts):
  scored = np.arange(B) != 3
  batch = experience.assemble(prompts, rollouts, scored=scored)
  np.testing.assert_array_equal(batch.loss_mask.sum(1), np.where(scored, LENGTHS, 0))
  batch = experience.assemble(prompts, rollouts, scored=scored, mask_truncated=True)
  np.testing.assert_array_equal(
      batch.loss_mask.sum(1), np.where(scored & ~TRUNCATED, LENGTHS, 0))


def test_advantages_ignore_what_was_not_scored():
  rewards = np.array([1.0, 0.0, np.nan, 3.0, 2.0, 2.0, np.nan, np.nan])
  found = experience.estimate_advantages(
      advantage.group_centred, rewards, ~np.isnan(rewards), group_size=2)['advantages']
  # A lone opinion has nothing to compare with: its group's mean is itself.
  np.testing.assert_allclose(found, [0.5, -0.5, 0, 0, 0, 0, 0, 0])
  assert found.dtype == np.float32


def test_estimators_get_the_arrays_they_name():
  rewards, scored = np.arange(4.0), np.array([True, True, True, False])
  def estimator(rewards, *, loss_mask, scale=1.0):
    return scale * loss_mask * rewards[:, None]
  found = experience.estimate_advantages(
      functools.partial(estimator, scale=2.0), rewards, scored, group_size=2,
      loss_mask=np.ones((4, 3), np.float32), unused=None)['advantages']
  np.testing.assert_allclose(found, 2 * np.array([0, 1, 2, 0.0])[:, None] * np.ones((4, 3)))
  found = experience.estimate_advantages(
      returns.whitened_to_go, rewards, np.ones(4, bool), group_size=2,
      loss_mask=np.ones((4, 3), bool), old_log_probs=np.zeros((4, 3)),
      reference_log_probs=np.zeros((4, 3)), rollout_log_probs=None)['advantages']
  assert found.shape == (4, 3)


def test_texts_stop_where_the_mask_stops(rollouts):
  class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
      assert skip_special_tokens
      return [' '.join(map(str, row)) for row in rows]
  found = experience.texts(rollouts, Tokenizer())
  assert [len(text.split()) for text in found] == LENGTHS.tolist()
  assert found[1] == f'{rollouts.tokens[1, 0]} {rollouts.tokens[1, 1]}'
