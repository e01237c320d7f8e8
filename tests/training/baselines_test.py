"""What rewards are compared with when the policy's own group is not asked: greedy, and V*."""

import numpy as np
import pytest

from ptjax import config as settings
from ptjax import types
from ptjax.data import prompts as prompt_door
from ptjax.data import tokenizer as tokenizers
from ptjax.rewards import combine
from ptjax.training import experience

P, G, T = 2, 2, 6
ROWS = [{'prompt': 'ab'}, {'prompt': 'abc'}, {'prompt': 'abcd'}, {'prompt': 'abcde'}]


class Sampler:
  """Draws completions of a fixed number of letters per prompt, and counts its calls."""

  def __init__(self, letters):
    self.letters, self.calls = letters, []

  def __call__(self, params, prompts, key):
    p, group = prompts.sample_ids.shape
    self.calls.append(np.asarray(prompts.sample_ids))
    lengths = np.concatenate([self.letters(int(row), group) for row in prompts.ids])
    return types.Rollouts(
        tokens=np.full((p * group, T), 5, np.int32), loss_mask=np.arange(T) < lengths[:, None],
        log_probs=np.zeros((p * group, T), np.float32), truncated=np.zeros(p * group, bool))


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.characters('abcde')


def collector(tokenizer, estimator, **samplers):
  letters = combine.Component('letters', lambda prompts, completions: [
      float(len(text)) for text in completions])
  rollout = settings.RolloutSettings(num_prompts=P, group_size=G, max_completion_tokens=T)
  return experience.Collector(
      door=prompt_door.PromptDoor(ROWS, tokenizer, num_prompts=P, group_size=G, seed=None),
      samplers={'policy': Sampler(lambda row, group: np.arange(1, group + 1)), **samplers},
      tokenizer=tokenizer, reward_set=combine.RewardSet([letters]), estimator=estimator,
      rollout=rollout, seed=0)


def test_the_greedy_completion_is_scored_like_any_other(tokenizer):
  greedy = Sampler(lambda row, group: np.full(group, row + 2))
  seen = []

  def estimator(rewards, *, greedy_rewards):
    seen.append(np.asarray(greedy_rewards))
    return rewards - greedy_rewards

  batch = collector(tokenizer, estimator, greedy=greedy)(None, 0).batch
  np.testing.assert_array_equal(seen[0], [2, 2, 3, 3])  # prompts 0 and 1, each for its group
  np.testing.assert_array_equal(batch.inputs['advantages'], [1 - 2, 2 - 2, 1 - 3, 2 - 3])
  assert [call.shape for call in greedy.calls] == [(P, 1)]  # one completion per prompt
  assert batch.tokens.shape == (P * G, T)  # and none of them trains


def test_optimal_values_are_estimated_once_per_prompt(tokenizer):
  reference = Sampler(lambda row, group: row + 1 + np.arange(group))
  collect = collector(
      tokenizer, lambda rewards, *, optimal_values: rewards - optimal_values, reference=reference)
  first, second, again = (collect(None, index).batch for index in (0, 1, 2))

  def expected(rows):
    drawn = np.asarray([[row + 1.0, row + 2.0] for row in rows])
    return 0.5 * np.log(np.mean(np.exp(drawn / 0.5), axis=1))  # V* of the reference's samples
  for batch, rows in ((first, (0, 1)), (second, (2, 3)), (again, (0, 1))):
    np.testing.assert_allclose(
        batch.inputs['advantages'], np.tile([1.0, 2.0], P) - np.repeat(expected(rows), G),
        rtol=1e-6)
  assert len(reference.calls) == 2  # the third rollout has the first one's prompts
  for call in reference.calls:
    np.testing.assert_array_equal(call, np.tile(np.arange(G), (P, 1)))


def test_who_asks_for_neither_draws_neither(tokenizer):
  other = Sampler(lambda row, group: np.ones(group, int))
  collector(tokenizer, lambda rewards, *, group_size: rewards, greedy=other,
            reference=other)(None, 0)
  assert not other.calls
