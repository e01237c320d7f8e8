"""Batches of a data set, and those of which some are the policy's own completions."""

import jax
import numpy as np

from ptjax import types
from ptjax.data import examples as examples_lib
from ptjax.data import intake
from ptjax.data import offline as door_lib
from ptjax.losses import distillation
from ptjax.training import offline

P, T = 4, 3


def make_door():
  ids = lambda *values: np.array(values, np.int32)
  return door_lib.OfflineDoor(examples_lib.Examples(
      prompts=[ids(1, i) for i in range(8)], completions=[(ids(5, i),) for i in range(8)],
      row_ids=[10 * i for i in range(8)], intake=intake.Intake(8, 8, 0, {})), batch_size=P)


def draw(params, prompts, key):
  """Says in the tokens what it was asked: parameters, prompt and key."""
  number = np.asarray(jax.random.key_data(key)).sum() % 97
  tokens = np.stack([np.full(P, params), np.asarray(prompts.ids), np.full(P, number)], 1)
  return types.Rollouts(tokens=tokens.astype(np.int32), loss_mask=np.arange(T) < [[2]] * P,
                        log_probs=np.zeros((P, T), np.float32), truncated=np.zeros(P, bool))


def mixed(turn, seed=0):
  return offline.MixedSource(make_door(), draw, turn, seed=seed)


def test_own_turns_hold_the_policys_completions_of_the_same_prompts():
  plain, own = offline.OfflineSource(make_door()), mixed(lambda key: True)
  for step in range(3):
    wanted, _, _ = plain.batch(None, step)
    batch, metrics, _ = own.batch(7, step)
    np.testing.assert_array_equal(batch.prompt_tokens, wanted.prompt_tokens)
    np.testing.assert_array_equal(batch.tokens[:, 0], np.full(P, 7))  # the newest parameters
    np.testing.assert_array_equal(batch.tokens[:, 1], 10 * np.asarray(batch.prompt_tokens[:, 1]))
    assert metrics['train_tokens'] == int(batch.loss_mask.sum()) == 2 * P
    assert metrics['distillation/own_samples'] == 1.0
  first, second = (own.batch(7, step)[0].tokens[0, 2] for step in (0, 1))
  assert first != second  # every batch draws anew
  assert own.waits_for_params and not plain.waits_for_params


def test_other_turns_are_the_data_sets():
  plain, other = offline.OfflineSource(make_door()), mixed(lambda key: False)
  for step in range(3):
    wanted, _, _ = plain.batch(None, step)
    batch, metrics, _ = other.batch(7, step)
    np.testing.assert_array_equal(batch.tokens, wanted.tokens)
    np.testing.assert_array_equal(batch.loss_mask, wanted.loss_mask)
    assert metrics['distillation/own_samples'] == 0.0


def test_turns_follow_from_seed_and_step_alone():
  turns = lambda source, steps: [
      source.batch(0, step)[1]['distillation/own_samples'] for step in steps]
  whole = turns(mixed(distillation.student_turn), range(64))
  assert turns(mixed(distillation.student_turn), range(32, 64)) == whole[32:]
  assert turns(mixed(distillation.student_turn, seed=1), range(64)) != whole
  assert 20 <= sum(whole) <= 44  # of 64 fair draws: three standard deviations either way
