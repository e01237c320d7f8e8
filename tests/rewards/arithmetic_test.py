"""Exact integers: strict wants the answer alone, flexible the last number."""

import pytest

from ptjax.rewards import arithmetic


@pytest.mark.parametrize('completion, strict, flexible', [
    ('17', 1, 1), (' 17\n', 1, 1), ('017', 0, 1), ('+17', 0, 1), ('17.0', 0, 1), ('17.', 0, 1),
    ('it is 17', 0, 1), ('17 or 18', 0, 0), ('12+5=17', 0, 1), ('-17', 0, 0), ('', 0, 0),
    ('1 7', 0, 0), ('170', 0, 0), ('9' * 10_000, 0, 0), ('\u0661\u0667', 0, 0),
])
def test_scores(completion, strict, flexible):
  for gold in (17, '17', ' 17'):
    assert arithmetic.strict(None, [completion], answer=[gold]) == [strict]
    assert arithmetic.flexible(None, [completion], answer=[gold]) == [flexible]


def test_negative_and_missing_answers():
  assert arithmetic.strict(None, ['-3', '3', 'x'], answer=[-3, -3, None]) == [1.0, 0.0, None]
  assert arithmetic.flexible(None, ['4-7=-3', 'x'], answer=['-3', None]) == [1.0, None]


def test_an_answer_that_is_no_integer_is_an_error():
  with pytest.raises(ValueError, match="'2.5' is not an integer"):
    arithmetic.strict(None, ['2'], answer=['2.5'])


def test_votes_are_canonical():
  assert arithmetic.vote('so 017.') == arithmetic.vote('17') == '17'
  assert arithmetic.vote('none') is None
