import operator
import re

import pytest

from ptjax import config
from ptjax.data import arithmetic

_COMPUTE = {'+': operator.add, '-': operator.sub, '*': operator.mul}


def _problem(row):
  left, sign, right = re.fullmatch(r'(\d+)([-+*])(\d+)=', row['prompt']).groups()
  return int(left), sign, int(right)


@pytest.mark.parametrize('operations', ['+', '+-', '*-+'])
def test_every_problem_comes_once_with_its_answer(operations):
  settings = arithmetic.Arithmetic(max_operand=20, operations=operations, modulus=0)
  rows = arithmetic.rows('train', settings=settings) + arithmetic.rows('test', settings=settings)
  assert len({row['prompt'] for row in rows}) == len(rows) == 21 * 21 * len(operations)
  for row in rows:
    left, sign, right = _problem(row)
    assert row['answer'] == row['completion'] == str(_COMPUTE[sign](left, right))
    assert set(row['prompt'] + row['answer']) <= set(arithmetic.ALPHABET)


def test_train_and_test_share_no_problem_not_even_mirrored():
  keys = []
  for split, seed in (('train', 1), ('test', 2)):
    keys.append({(sign, *sorted((left, right))) for left, sign, right in map(
        _problem, arithmetic.rows(split, seed=seed,
                                  settings=arithmetic.Arithmetic(operations='+-')))})
  assert not keys[0] & keys[1]
  assert 0.08 < len(keys[1]) / (len(keys[0]) + len(keys[1])) < 0.12  # asked for: 0.1


def test_a_problem_keeps_its_side_when_the_task_grows():
  small = arithmetic.Arithmetic(max_operand=30)
  large = arithmetic.Arithmetic(max_operand=60, operations='-+')
  test = {row['prompt'] for row in arithmetic.rows('test', settings=small)}
  assert test < {row['prompt'] for row in arithmetic.rows('test', settings=large)}


def test_rows_depend_on_the_seed_and_on_nothing_else():
  first = arithmetic.rows('train', seed=4, count=50)
  assert first == arithmetic.rows('train', seed=4, count=50)
  assert len(first) == 50
  assert first != arithmetic.rows('train', seed=5, count=50)
  assert first == arithmetic.rows('train', seed=4, count=80)[:50]


def test_known_rows_stay_as_they_are():
  # Published numbers refer to these held-out problems; a change of the hash would leak some.
  settings = arithmetic.Arithmetic(max_operand=9)
  assert sorted(row['prompt'] for row in arithmetic.rows('test', settings=settings)) == [
      '1+9=', '3+9=', '4+4=', '6+8=', '6+9=', '8+6=', '9+1=', '9+3=', '9+6=']


@pytest.mark.parametrize('settings, message', [
    ({'max_operand': 0}, r'max_operand=0 must lie in 1..999'),
    ({'max_operand': 1000}, r'max_operand=1000 must lie in 1..999'),
    ({'operations': '+/'}, r"operations='\+/': expected some of \+ - \*"),
    ({'operations': ''}, r"operations='': expected some of"),
    ({'test_fraction': 1.0}, r'test_fraction=1.0 must lie between 0 and 1')])
def test_unusable_settings(settings, message):
  with pytest.raises(config.UserError, match=message):
    arithmetic.Arithmetic(**settings)


def test_unknown_split():
  with pytest.raises(config.UserError, match="no split 'tset'; did you mean test?"):
    arithmetic.rows('tset')


def test_answers_are_modulo_the_modulus():
  for modulus in (2, 10, 97):
    settings = arithmetic.Arithmetic(operations='+-*', max_operand=30, modulus=modulus)
    for row in arithmetic.rows('test', settings=settings):
      assert int(row['answer']) == eval(row['prompt'][:-1]) % modulus  # of digits and a sign alone
  with pytest.raises(config.UserError, match='modulus=1: expected at least 2, or 0 for none'):
    arithmetic.Arithmetic(modulus=1)


def test_a_careless_teacher_is_one_too_high():
  settings = arithmetic.Arithmetic(careless=0.6)
  rows = arithmetic.rows('train', settings=settings)
  slips = [(int(row['completion']) - int(row['answer'])) % 10 for row in rows]
  assert set(slips) == {0, 1} and abs(sum(slips) / len(slips) - 0.6) < 0.02
  clean = arithmetic.rows('train')
  assert [row['prompt'] for row in clean] == [row['prompt'] for row in rows]
  assert all(row['answer'] == row['completion'] for row in clean)
  with pytest.raises(config.UserError, match='careless=2.0 must lie between 0 and 1'):
    arithmetic.Arithmetic(careless=2.0)
