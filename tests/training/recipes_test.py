"""Who draws, and how rows lie: by hand, on completions that tell whose they are."""

import types as python_types

import jax
import numpy as np
import pytest

from ptjax import types
from ptjax.data import prompts as prompt_door
from ptjax.training import recipes

P, G, T = 2, 2, 3
KEY = jax.random.key(0)


def drawn(**changes):
  return prompt_door.PromptBatch(**{
      'tokens': np.zeros((P, 4), np.int32), 'lengths': np.array([2, 4], np.int32),
      'ids': np.arange(P, dtype=np.int32),
      'sample_ids': np.tile(np.arange(G, dtype=np.int32), (P, 1)), 'prompts': ['a', 'b'],
      'texts': ['a', 'b'], 'columns': {}, 'demonstrations': [[7, 8], [9]], **changes})


def sampler(start, calls):
  """Completions of one token, `start` and the row's number."""
  def draw(params, prompts, key):
    calls.append((params, key))
    rows = prompts.sample_ids.size
    return types.Rollouts(
        tokens=np.repeat(start + np.arange(rows, dtype=np.int32)[:, None], T, 1),
        loss_mask=np.ones((rows, T), bool), log_probs=np.full((rows, T), -float(start)),
        truncated=np.zeros(rows, bool))
  return draw


def draw(name):
  calls = []
  samplers = {who: sampler(start, calls) for who, start in (
      ('policy', 100), ('reference', 200), ('mixture', 300), ('teacher', 400))}
  rollouts, known = recipes.RECIPES[name].draw(samplers, 'params', drawn(), KEY)
  return rollouts, known, calls


def batch(rows, **inputs):
  """A batch whose first token is the row's number."""
  return types.TokenBatch(
      prompt_tokens=np.zeros((P, 4), np.int32), prompt_lengths=np.ones(P, np.int32),
      tokens=np.arange(rows)[:, None] + np.zeros((1, T), int), loss_mask=np.ones((rows, T), bool),
      on_policy=np.asarray(True), inputs=inputs)


def arrange(name, earned, **inputs):
  rewards = np.asarray(earned, float)
  given, before = (batch(len(rewards), **inputs) for _ in range(2))
  got = recipes.RECIPES[name].arrange(given, rewards, ~np.isnan(rewards))
  jax.tree.map(np.testing.assert_array_equal, given, before)  # what it is given stays as it is
  return got, got.tokens[:, 0].tolist(), got.loss_mask.any(1).tolist()


@pytest.mark.parametrize('name, rival', [
    ('against the reference', 200), ('against a mixture', 300)])
def test_rivals_stand_behind_the_policys_own(name, rival):
  rollouts, known, calls = draw(name)
  assert rollouts.tokens[:, 0].tolist() == [100, 101, rival, rival + 1,
                                            102, 103, rival + 2, rival + 3]
  assert known['rival'].tolist() == [False, False, True, True] * 2
  keys = [jax.random.key_data(key).tolist() for _, key in calls]
  assert keys[0] != keys[1]  # else the same weights would draw the same completions


def test_each_demonstration_meets_every_opponent():
  rollouts, known, calls = draw('demonstration against opponent')
  assert rollouts.tokens[:, 0].tolist() == [7, 200, 7, 201, 9, 202, 9, 203]
  assert known['demonstration'].tolist() == [True, False] * 4
  assert rollouts.loss_mask.sum(1).tolist() == [2, 3, 2, 3, 1, 3, 1, 3]
  assert len(calls) == 1  # the policy itself draws nothing


def test_the_demonstration_is_the_last_of_its_group():
  rollouts, known, _ = draw('own samples and demonstration')
  assert rollouts.tokens[:, 0].tolist() == [100, 101, 7, 102, 103, 9]
  assert known['demonstration'].tolist() == [False, False, True] * 2


def test_best_against_worst():
  _, rows, trains = arrange('best against worst', [0, 1, 2, 5, 3, 3, 3, 3])
  assert rows == [3, 0, 4, 4] and trains == [True, True, False, False]


def test_best_of_group_passes_over_what_has_no_reward():
  nan = np.nan
  _, rows, trains = arrange('best of group', [0, nan, 2, 1, nan, nan, nan, nan])
  assert rows == [2, 4] and trains == [True, False]


def test_the_better_of_own_and_rival_is_chosen():
  rival = np.array([False, False, True, True] * 2)
  wins = [1, 0.25, 0, 0.75, 0.5, 0.9, 0.5, 0.1]
  got, rows, trains = arrange('against the reference', wins, rival=rival)
  assert rows == [0, 2, 3, 1, 4, 6, 5, 7]
  assert trains == [True] * 4 + [False] * 2 + [True] * 2
  assert got.inputs['reference_drew_chosen'].tolist() == [False, True, False, False]


def test_a_mixtures_samples_do_not_train():
  rival = np.array([False, False, True, True] * 2)
  got, rows, trains = arrange('against a mixture', np.ones(8), rival=rival,
                              advantages=np.arange(8.0))
  assert rows == [0, 1, 4, 5] and all(trains)
  assert got.inputs['advantages'].tolist() == [0, 1, 4, 5]


def test_pairs_need_two_rewards():
  got, rows, trains = arrange('two by two', [1, np.nan, 2, 3], rewards=np.zeros(4))
  assert rows == [0, 1, 2, 3] and trains == [False, False, True, True]
  assert got.inputs['rewards'].tolist() == [0, 0, 2, 3]


def test_a_success_is_shown_to_the_others_of_its_group():
  texts, inputs = recipes.shown_a_success(
      drawn(), ['p', 'q', 'r', 's'], np.array([0.5, 1.0, np.nan, 0.9]), None)
  assert texts == ['q', None]
  assert inputs['shown'].tolist() == [True, False, False, False]


def test_the_demonstration_is_shown_as_text():
  tokenizer = python_types.SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: [
      '+'.join(map(str, row)) for row in rows])
  assert recipes.shown_the_demonstration(drawn(), [], None, tokenizer) == (['7+8', '9'], {})
