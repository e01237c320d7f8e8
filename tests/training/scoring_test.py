"""Rewards of rollouts: functions and programs together, judges of groups, errors everywhere."""

import numpy as np
import pytest

from ptjax import config as settings
from ptjax.rewards import combine
from ptjax.training import scoring


def test_scores_come_with_every_column():
  def judge(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]
  with combine.load([judge]) as rewards:
    table = scoring.score(rewards, ['p'] * 3, ['1', '2', '3'], {'answer': ['1', '1', '3']})
  np.testing.assert_array_equal(table.total, [1, 0, 1])
  def down(prompts, completions):
    raise OSError('down')
  with combine.load([down]) as rewards, pytest.raises(settings.UserError, match='down'):
    scoring.score(rewards, ['p'], ['1'], {})


class _Program:
  """A reward that all processes compute together, with a reward for each step."""
  collective = True

  def __call__(self, prompts, completions, **columns):
    self.rows = len(completions)
    return [None if c == '' else len(c) for c in completions]

  def take_steps(self):
    return [[(0, 0.5)]] * self.rows


def test_programs_and_functions_share_a_table(monkeypatch):
  seen = []
  def host(prompts, completions):
    seen.append(list(completions))
    return [1.0] * len(completions)
  program = _Program()
  monkeypatch.setattr(scoring.sharding, 'local_rows', lambda count: slice(0, 2))
  monkeypatch.setattr(scoring.sharding, 'gather_rows',
                      lambda local, count: np.concatenate([local, np.zeros_like(local)])[:count])
  components = [combine.Component('program', program, 2.0), combine.Component('host', host)]
  with combine.load(components) as rewards:
    table = scoring.score(rewards, ['p'] * 3, ['a', 'bb', ''], {})
  assert seen == [['a', 'bb']] and program.rows == 3  # own rows; all rows
  assert table.names == ('program', 'host') and table.steps == {'program': [[(0, 0.5)]] * 3}
  np.testing.assert_array_equal(table.values, [[1, 1], [2, 1], [np.nan, 0]])
  np.testing.assert_array_equal(table.total, [3, 5, 0])
  assert table.report == {'program/none': 1} and set(table.seconds) == {'program', 'host'}


def test_steps_become_an_array_and_the_rest_the_outcome():
  components = [combine.Component('program', _Program(), 2.0),
                combine.Component('host', lambda prompts, completions: [1.0, None], 0.5)]
  with combine.load(components) as rewards:
    table = scoring.score(rewards, ['p'] * 2, ['a', 'bb'], {})
    found = scoring.step_inputs(table, rewards, (2, 3))
  nan = np.nan
  np.testing.assert_array_equal(found['step_rewards'], [[1.0, nan, nan], [1.0, nan, nan]])
  np.testing.assert_array_equal(found['outcome_rewards'], [0.5, 0.0])


@pytest.mark.parametrize('collective', [False, True])
def test_judges_are_asked_by_each_process_or_by_all(collective, monkeypatch):
  class Longer:
    def compare(self, prompts, first, second):
      self.rows = len(prompts)
      return np.array([float(len(a) > len(b)) for a, b in zip(first, second)])
  judge = Longer()
  judge.collective = collective
  monkeypatch.setattr(scoring.sharding, 'local_rows', lambda count: slice(2, 3))
  monkeypatch.setattr(scoring.sharding, 'gather_rows',
                      lambda local, count: np.concatenate([[1.0, 0.0], local]))
  chances = scoring.Compare(judge)(['p'] * 3, ['aa', 'b', 'cc'], ['a', 'bb', 'c'])
  np.testing.assert_array_equal(chances, [1, 0, 1])
  assert judge.rows == (3 if collective else 1)


def test_an_error_on_another_process_is_raised_here_too(monkeypatch):
  monkeypatch.setattr(scoring.sharding, 'gather_json', lambda value: [value, 'down elsewhere'])
  judge = type('Judge', (), {'collective': False,
                             'compare': lambda self, p, a, b: np.zeros(len(p))})()
  with pytest.raises(settings.UserError, match='down elsewhere'):
    scoring.Compare(judge)(['p'], ['a'], ['b'])
