"""What a rollout becomes on its way to a batch, with samplers and tokenizers made by hand."""

import threading
import types as python_types

import jax
import numpy as np
import pytest

from ptjax import config as settings
from ptjax import types
from ptjax.data import prompts as prompt_door
from ptjax.pieces import advantage
from ptjax.rewards import combine
from ptjax.training import experience
from ptjax.training import recipes

P, G, T = 3, 2, 4
TOKENIZER = python_types.SimpleNamespace(batch_decode=lambda rows, skip_special_tokens=False: [
    ' '.join(map(str, row)) for row in rows])


class Door:
  """Prompts 0, 1, 2 for the first rollout and 100, 101, ... as spare ones."""

  def batch(self, index):
    return self.take(P * index + np.arange(P))

  def spare(self, index, turn):
    return 100 * (1 + turn) + np.arange(P)

  def epoch(self, index):
    return float(index)

  def take(self, indices):
    ids = np.asarray(indices, np.int32)
    texts = [f'prompt {i}' for i in ids]
    return prompt_door.PromptBatch(
        tokens=ids[:, None], lengths=np.ones(len(ids), np.int32), ids=ids,
        sample_ids=np.tile(np.arange(G, dtype=np.int32), (len(ids), 1)), prompts=texts,
        texts=texts, columns={'number': ids.tolist()})


def sampler(start):
  """Completions [start + 10 * prompt + sample] of lengths 1, 2, ..., T, 1, ..."""
  def draw(params, prompts, key):
    del params, key
    numbers = start + 10 * np.repeat(prompts.ids, G) + prompts.sample_ids.reshape(-1)
    lengths = 1 + np.arange(len(numbers)) % T
    mask = np.arange(T) < lengths[:, None]
    return types.Rollouts(
        tokens=np.where(mask, numbers[:, None], 0), loss_mask=mask,
        log_probs=np.zeros(mask.shape, np.float32), truncated=lengths == T)
  return draw


def collect(recipe, reward=None, **options):
  rewards = None if reward is None else combine.load([reward])
  samplers = {'policy': sampler(0), 'mixture': sampler(5), 'reference': sampler(5),
              'teacher': sampler(7)}
  collector = experience.Collector(
      door=Door(), tokenizer=TOKENIZER, reward_set=rewards, rollout=settings.RolloutSettings(),
      seed=0, recipe=recipes.RECIPES[recipe],
      **{'samplers': samplers, 'estimator': None, **options})
  return collector('params', 0)


def last_digit(prompts, completions, **columns):
  return [float(text.split()[0][-1]) for text in completions]


def test_win_probabilities_are_of_own_completions_against_the_mixtures():
  asked = []
  def judge(prompts, first, second):
    asked.extend(zip(prompts, first, second))
    return np.array([0.9, np.nan, 0.2, 0.5, 1.0, 0.0])
  found = collect('against a mixture', reward=last_digit, judge=judge,
                  estimator=advantage.win_margin)
  numbers = [(prompt, first.split()[0], second.split()[0]) for prompt, first, second in asked]
  assert numbers[:2] == [('prompt 0', '0', '5'), ('prompt 0', '1', '6')]
  assert numbers[4:] == [('prompt 2', '20', '25'), ('prompt 2', '21', '26')]
  assert len(found.batch.tokens) == P * G  # the mixture's own do not train
  np.testing.assert_allclose(found.batch.inputs['advantages'], [0.4, 0, -0.3, 0, 0.5, -0.5],
                             atol=1e-6)
  assert found.metrics['reward'] == 0.5  # of the policy's own: last digits 0 and 1


def test_without_a_judge_rewards_decide():
  found = collect('against the reference', reward=last_digit)
  # Each pair: the reference's completion ends in 5 or 6 and wins.
  assert found.batch.inputs['reference_drew_chosen'].all()
  assert found.batch.tokens[:, 0].tolist() == [5, 0, 6, 1, 15, 10, 16, 11, 25, 20, 26, 21]


def test_tied_groups_are_drawn_again_until_none_is_left_or_turns_are_over():
  def reward(prompts, completions, number, **columns):
    # Prompt 1 teaches; so does 201, of the second turn.
    return [float(n in (1, 201) and text.split()[0][-1] == '1')
            for n, text in zip(number, completions)]
  options = {'estimator': advantage.group_centred}
  one = collect('own samples', reward, extra_rollouts=1, **options)
  assert one.metrics['resampling/extra_rollouts'] == 1
  assert one.metrics['resampling/replaced_groups'] == 0
  assert one.metrics['resampling/vacant_groups'] == 2
  assert one.batch.loss_mask.any(1).tolist() == [False] * 2 + [True] * 2 + [False] * 2
  two = collect('own samples', reward, extra_rollouts=2, **options)
  assert two.metrics['resampling/extra_rollouts'] == 2
  assert two.metrics['resampling/replaced_groups'] == 1
  assert two.batch.prompt_tokens[:, 0].tolist() == [201, 1, 2]
  assert two.batch.inputs['advantages'].tolist() == [-0.5, 0.5, -0.5, 0.5, 0, 0]
  # What is reported is how the policy did on the prompts it was given.
  assert two.metrics['reward'] == pytest.approx(1 / 6)
  again = collect('own samples', reward, extra_rollouts=2, **options)
  jax.tree.map(np.testing.assert_array_equal, two.batch, again.batch)


def test_the_overlong_penalty_does_not_make_a_group_worth_training_on():
  found = collect('own samples', lambda prompts, completions, **columns: [1.0] * len(completions),
                  estimator=advantage.group_centred, overlong_tokens=2)
  # Lengths 1, 2, 3, 4, 1, 2: the third token costs a half, the fourth another.
  assert found.batch.inputs['advantages'].tolist() == [0, 0, 0.25, -0.25, 0, 0]
  found = collect('own samples', lambda prompts, completions, **columns: [1.0] * len(completions),
                  estimator=advantage.group_centred, overlong_tokens=2, extra_rollouts=1)
  assert found.metrics['resampling/vacant_groups'] == P


def test_a_part_is_scored_while_the_next_is_drawn():
  """Scoring a part and drawing the next wait for each other: one after the other neither ends."""
  meeting, prompts = threading.Barrier(2, timeout=30), []
  def reward(prompts, completions, number, **columns):
    if P - 1 not in number:  # the last part has nothing to be scored beside
      meeting.wait()
    return last_digit(prompts, completions)
  def draw(params, drawn, key):
    prompts.append(drawn.ids.tolist())
    if len(prompts) > 1:
      meeting.wait()
    return sampler(0)(params, drawn, key)
  samplers = {'policy': draw}
  found = collect('own samples', reward, samplers=samplers, overlap=P,
                  estimator=advantage.group_centred)
  assert prompts == [[0], [1], [2]] and not meeting.broken
  np.testing.assert_array_equal(found.batch.inputs['advantages'], [-0.5, 0.5] * P)


def test_a_controllers_factor_reaches_the_advantage():
  def estimator(rewards, *, reward_kl_coefficient=0.5):
    return reward_kl_coefficient * np.ones_like(rewards)
  scaled = experience.with_state(estimator, {'reward_kl_scale': np.float32(1.5)})
  assert scaled(np.zeros(2)).tolist() == [0.75, 0.75]
  assert experience.with_state(estimator, {}) is estimator


def test_samples_of_another_model_are_not_compared_with_the_trainer():
  own = collect('own samples', last_digit)
  assert 'rollout_log_probs' in own.batch.inputs
  foreign = collect("teacher's samples", last_digit)
  assert foreign.batch.tokens[0, 0] == 7 and 'rollout_log_probs' not in foreign.batch.inputs
