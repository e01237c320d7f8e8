"""Length rewards peak at the target, in the unit they name."""

import pytest

from ptjax import config
from ptjax.rewards import length


def test_triangle_around_the_target():
  reward = length.make_length(target=10)
  texts = ['x' * n for n in (0, 5, 10, 15, 20, 50)]
  assert reward(None, texts) == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_units():
  text = '\u65e5\u672c \u8a9e'  # 4 characters, 2 words
  assert length.make_length(4, 'characters')(None, [text]) == [1.0]
  assert length.make_length(2, 'words')(None, [text]) == [1.0]
  assert length.make_length(3, 'tokens')(None, [text], completion_ids=[[5, 6, 7]]) == [1.0]


@pytest.mark.parametrize('options', [
    {'target': 0}, {'target': -1}, {'target': float('nan')}, {'target': 'x'}, {'unit': 'bytes'}])
def test_bad_options(options):
  with pytest.raises(config.UserError, match='expected'):
    length.make_length(**options)
