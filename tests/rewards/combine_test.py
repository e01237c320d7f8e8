"""Specs, sums, and every way in which a reward function can go wrong."""

import asyncio
import math
import os
import pathlib
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import config
from ptjax.rewards import combine
from ptjax.rewards import math_answers
from ptjax.rewards import pool as pool_lib

_PROMPTS = ['p'] * 4
_TEXTS = ['a', 'bb', 'ccc', 'dddd']


def _lengths(prompts, completions, **columns):
  return [len(text) for text in completions]


def _score(function, on_error='raise', **options):
  with combine.load([function], on_error, **options) as rewards:
    return rewards.score(_PROMPTS, _TEXTS)


# --- specs -----------------------------------------------------------------------------------


def test_weights_options_and_user_files(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'def odd(prompts, completions, answer, **columns):\n'
      '  return [len(c) % 2 + a for c, a in zip(completions, answer)]\n')
  rewards = combine.load(
      ['length(target=2)*0.5', f'{tmp_path}/mine.py:odd*2', 'regex(pattern="[a*b:()]+")*-1'])
  assert rewards.names == ('length', 'odd', 'regex')
  table = rewards.score(_PROMPTS, _TEXTS, {'answer': [0, 1, 0, 1], 'other': [0] * 4})
  np.testing.assert_array_equal(
      table.values, [[0.5, 1, 1], [1, 1, 1], [0.5, 1, 0], [0, 1, 0]])
  np.testing.assert_allclose(table.total, [1.25, 1.5, 2.25, 2])
  assert table.scored.all() and table.report == {}
  assert set(table.seconds) == set(rewards.names)


@pytest.mark.parametrize('spec, message', [
    ('arithmatic', "no built-in 'arithmatic'; did you mean arithmetic"),
    ('zzz', 'known: arithmetic, .*path/to/file.py:function'),
    ('arithmetic*two', "weight 'two' is not a finite number"),
    ('arithmetic*', "weight '' is not a finite number"),
    ('arithmetic*nan', 'not a finite number'),
    ('arithmetic*inf', 'not a finite number'),
    ('arithmetic(x=1)', "no option 'x'; it has none"),
    ('length(taget=3)', "no option 'taget'; did you mean target?"),
    ('length(3)', 'cannot read the options'),
    ('length(target=__import__("os"))', 'cannot read the options'),
    ('length(target=)', 'cannot read the options'),
    ('length(target=-1)', 'expected a positive number'),
    ('regex', r'say regex\(pattern=...\)'),
    ('no_such_file.py:f', 'no such file'),
    ('no_such_file.py', 'expected name, name.option=value., path/to/file.py:function'),
    ('', 'expected name'),
])
def test_bad_specs(spec, message):
  with pytest.raises(config.UserError, match=message):
    combine.load([spec])


def test_no_reward_and_bad_on_error():
  with pytest.raises(config.UserError, match='no reward'):
    combine.load([])
  with pytest.raises(config.UserError, match="on_error='ignore': expected raise or zero"):
    combine.load(['arithmetic'], 'ignore')


def test_equal_names_get_numbers():
  rewards = combine.load(['length(target=1)', 'length(target=2)', _lengths])
  assert rewards.names == ('length', 'length_2', '_lengths')


def test_every_task_default_loads():
  for task in combine.TASK_DEFAULTS:
    assert combine.load(combine.default_specs(task)).names
  assert combine.default_specs('no such task') is None


def test_missing_columns_are_found_before_anything_runs():
  rewards = combine.load(['length', 'gsm8k'])
  rewards.check_columns({'answer', 'question'})
  with pytest.raises(config.UserError, match="'gsm8k' needs the column 'answer'; found: question"):
    rewards.check_columns({'question'})
  with pytest.raises(config.UserError, match='data.columns.answer='):
    rewards.score(['p'], ['c'], {})


def test_uneven_lists_are_the_callers_fault():
  with pytest.raises(ValueError, match='2 completions, but 1 answer'):
    combine.load(['arithmetic']).score(['p'] * 2, ['c'] * 2, {'answer': [1]})


# --- calling conventions ---------------------------------------------------------------------


def test_functions_take_what_they_name():
  seen = {}

  def by_completions(completions, answer, **rest):
    seen['rest'] = sorted(rest)
    return [0.0] * len(completions)

  def only_completions(completions):
    return [1.0] * len(completions)

  def by_position(questions, texts, answer=None):
    assert questions == ['p', 'q'] and answer == [5, 6]
    return [2.0] * len(texts)

  def everything(**given):
    return [float(len(given))] * 2

  table = combine.load([by_completions, only_completions, by_position, everything]).score(
      ['p', 'q'], ['c', 'd'], {'answer': [5, 6], 'level': [1, 2]})
  np.testing.assert_array_equal(table.values, [[0, 1, 2, 4]] * 2)
  assert seen['rest'] == ['level', 'prompts']


@pytest.mark.parametrize('result', [
    [1, 2.5, True, None], (1, 2.5, np.True_, None),
    [np.float32(1), np.float64(2.5), np.int8(1), None],
    [jnp.float32(1), np.array(2.5), True, None], np.array([1, 2.5, 1, None], dtype=object)])
def test_numbers_of_every_kind(result):
  table = _score(lambda p, c: result)
  np.testing.assert_array_equal(table.values[:, 0], [1, 2.5, 1, np.nan])
  assert table.report == {'<lambda>/none': 1}


def test_arrays_and_generators():
  np.testing.assert_array_equal(_score(lambda p, c: np.arange(4.)).total, np.arange(4))
  np.testing.assert_array_equal(_score(lambda p, c: jnp.arange(4.)).total, np.arange(4))
  np.testing.assert_array_equal(_score(lambda p, c: (len(x) for x in c)).total, [1, 2, 3, 4])


def test_no_opinion_is_left_out_of_the_sum():
  table = combine.load([
      combine.Component('first', lambda p, c: [1, None, 3, None], 2.0),
      combine.Component('second', lambda p, c: [10, 20, None, None], 1.0)]).score(_PROMPTS, _TEXTS)
  np.testing.assert_array_equal(table.total, [12, 20, 6, np.nan])
  assert table.scored.tolist() == [True, True, True, False]
  assert table.report == {'first/none': 2, 'second/none': 2}


# --- async -----------------------------------------------------------------------------------


def test_async_functions_run_at_the_same_time():
  meeting = threading.Barrier(2)  # passes only if both wait at once

  async def first(prompts, completions, **columns):
    await asyncio.get_running_loop().run_in_executor(None, meeting.wait, 10)
    return [1.0] * len(completions)

  async def second(prompts, completions, **columns):
    await asyncio.get_running_loop().run_in_executor(None, meeting.wait, 10)
    return [2.0] * len(completions)

  table = combine.load([first, _lengths, second]).score(_PROMPTS, _TEXTS)
  np.testing.assert_array_equal(table.total, [4, 5, 6, 7])


def test_async_functions_keep_their_loop_and_work_in_a_notebook():
  loops = []

  async def remembers(prompts, completions, **columns):
    loops.append(asyncio.get_running_loop())
    return [1.0] * len(completions)

  rewards = combine.load([remembers])

  async def notebook():  # a loop already runs in this thread
    return rewards.score(_PROMPTS, _TEXTS).total.tolist()

  assert asyncio.run(notebook()) == rewards.score(_PROMPTS, _TEXTS).total.tolist() == [1.0] * 4
  assert loops[0] is loops[1]
  rewards.close()
  assert rewards.score(_PROMPTS, _TEXTS).scored.all()


def test_async_objects_and_functions_that_hand_on_a_coroutine():
  async def inner(completions):
    return [3.0] * len(completions)

  class Judge:
    async def __call__(self, prompts, completions, **columns):
      return await inner(completions)

  np.testing.assert_array_equal(_score(Judge()).total, [3] * 4)
  np.testing.assert_array_equal(_score(lambda p, c: inner(c)).total, [3] * 4)


# --- failures --------------------------------------------------------------------------------


def _raises_on_three(prompts, completions, **columns):
  if 'ccc' in completions:
    raise KeyError('no score')
  return [len(text) for text in completions]


async def _async_raises_on_three(prompts, completions, **columns):
  return _raises_on_three(prompts, completions)


@pytest.mark.parametrize('function', [_raises_on_three, _async_raises_on_three])
def test_an_exception_names_function_place_and_completion(function):
  with pytest.raises(combine.RewardError) as caught:
    _score(function)
  message = str(caught.value)
  assert message.startswith(f"reward '{function.__name__}': raised KeyError: ")
  assert 'no score' in message and 'at combine_test.py:' in message
  assert message.endswith("completion 2: 'ccc'")
  assert caught.value.index == 2
  assert isinstance(caught.value, config.UserError)
  assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize('function', [_raises_on_three, _async_raises_on_three])
def test_zero_costs_only_the_completion_that_failed(function, caplog):
  table = _score(function, 'zero')
  np.testing.assert_array_equal(table.total, [1, 2, 0, 4])
  assert table.scored.all() and table.report == {f'{function.__name__}/errors': 1}
  assert 'failed on 1 of 4 completions' in caplog.text


@pytest.mark.parametrize('value, problem', [
    (float('nan'), 'returned nan; expected a finite number'),
    (math.inf, 'returned inf'), (-math.inf, 'returned -inf'), (10**400, 'returned inf'),
    (np.float32('nan'), 'returned nan'),
    ('1.0', "returned '1.0' of type str"), ([1.0], r'returned \[1.0\] of type list'),
    (np.ones(1), 'of type ndarray'), (1j, 'of type complex'), ({}, 'of type dict')])
def test_values_that_are_no_reward(value, problem):
  def bad(prompts, completions, **columns):
    return [1.0, 2.0, value, 4.0]

  with pytest.raises(combine.RewardError, match=f"reward 'bad': .*{problem}.*completion 2: 'ccc'"):
    _score(bad)
  table = _score(bad, 'zero')
  np.testing.assert_array_equal(table.total, [1, 2, 0, 4])
  assert table.report == {'bad/errors': 1}


@pytest.mark.parametrize('result, problem', [
    ([1.0] * 3, 'returned 3 values for 4 completions'), ([], 'returned 0 values for 4'),
    ([1.0] * 5, 'returned 5 values for 4'), (None, 'of type NoneType; expected a list of 4'),
    (1.0, 'of type float'), ('1111', 'of type str'), ({0: 1.0}, 'of type dict'),
    (np.float64(3), 'of type float64'), (np.array(3.0), 'of type ndarray')])
def test_results_that_are_no_list_of_the_right_length(result, problem):
  def bad(prompts, completions, **columns):
    return result

  with pytest.raises(combine.RewardError, match=f"reward 'bad': .*{problem}"):
    _score(bad)
  table = _score(bad, 'zero')
  np.testing.assert_array_equal(table.total, [0] * 4)
  assert table.report == {'bad/errors': 4}


def test_a_failure_of_the_batch_alone():
  def needs_one(prompts, completions, **columns):
    if len(completions) > 1:
      raise RuntimeError('too many')
    return [7.0]

  with pytest.raises(combine.RewardError, match='on the batch of 4, though not on any of its'):
    _score(needs_one)
  np.testing.assert_array_equal(_score(needs_one, 'zero').total, [7] * 4)


def test_a_function_that_is_down_is_not_retried_for_ever():
  calls = []

  def down(prompts, completions, **columns):
    calls.append(len(completions))
    raise ConnectionError('no route')

  table = combine.load([down], 'zero').score(['p'] * 100, ['c'] * 100)
  assert table.report == {'down/errors': 100} and not table.total.any()
  assert calls == [100] + [1] * 8


def test_exit_in_a_reward_function_does_not_end_the_trainer():
  def leaves(prompts, completions, **columns):
    raise SystemExit(3)

  with pytest.raises(combine.RewardError, match='raised SystemExit'):
    _score(leaves)


def test_one_failing_function_leaves_the_others_values():
  table = combine.load([_lengths, _raises_on_three], 'zero').score(_PROMPTS, _TEXTS)
  np.testing.assert_array_equal(table.values, [[1, 1], [2, 2], [3, 0], [4, 4]])


def test_time_outs_of_plain_and_async_functions():
  release = threading.Event()

  def stuck(prompts, completions, **columns):
    release.wait(30)
    return [1.0] * len(completions)

  async def stuck_async(prompts, completions, **columns):
    await asyncio.sleep(30)

  try:
    for function in (stuck, stuck_async):
      start = time.monotonic()
      with pytest.raises(combine.RewardError, match='gave no answer within 0.1 s'):
        _score(function, function_timeout_seconds=0.1)
      table = _score(function, 'zero', function_timeout_seconds=0.1)
      assert table.report == {f'{function.__name__}/errors': 4}
      assert time.monotonic() - start < 25  # that is, nobody waited for it to end
  finally:
    release.set()
  assert _score(_lengths, function_timeout_seconds=10).total.tolist() == [1, 2, 3, 4]


def test_a_time_out_the_function_raised_itself_is_found_per_completion():
  async def remote(prompts, completions, **columns):
    if 'bb' in completions:
      raise TimeoutError('remote')
    return [1.0] * len(completions)

  np.testing.assert_array_equal(
      _score(remote, 'zero', function_timeout_seconds=10).total, [1, 0, 1, 1])


def test_long_and_odd_completions_are_shortened_in_messages():
  texts = ['x' * 10**6 + '\ud800']

  def fails(prompts, completions, **columns):
    return [float('nan')]

  with pytest.raises(combine.RewardError) as caught:
    combine.load([fails]).score(['p'], texts)
  message = str(caught.value)
  assert len(message) < 600 and 'characters)' in message and '\n' not in message
  message.encode('utf-8')


def test_killed_maths_workers_leave_the_set_usable(tmp_path):
  path = tmp_path / 'dies.py'
  path.write_text('import os, signal\ndef equal(gold, answer):\n'
                  '  if answer == "die": os.kill(os.getpid(), signal.SIGKILL)\n  return True\n')
  reward = math_answers.MathReward('boxed', 'strict', pool=pool_lib.WorkerPool(path, 'equal'))
  with combine.load([combine.Component('math', reward)]) as rewards:
    columns = {'answer': ['z'] * 3}
    texts = ['\\boxed{x}', '\\boxed{die}', 'nothing']
    for _ in range(2):
      table = rewards.score(['p'] * 3, texts, columns)
      np.testing.assert_array_equal(table.total, [1, np.nan, 0])
      assert table.scored.tolist() == [True, False, True]
      assert table.report == {'math/none': 1, 'math/died': 1}


def test_maths_workers_start_only_when_spelling_does_not_decide():
  with combine.load(['gsm8k', 'math_flexible']) as rewards:
    table = rewards.score(['p'], ['#### 72 \\boxed{72}'], {'answer': ['so #### 72']})
    assert table.total.tolist() == [2.0]
    assert not _children(pathlib.Path('/proc') / str(os.getpid()))


def _children(process):
  children = process / 'task' / str(os.getpid()) / 'children'
  names = [int(name) for name in children.read_text().split()] if children.exists() else []
  return [name for name in names
          if b'math_equality' in (pathlib.Path('/proc') / str(name) / 'cmdline').read_bytes()]
