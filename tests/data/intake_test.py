import pytest

from ptjax import config
from ptjax.data import intake


def _admit(overlong, lengths=(3, 9, 0, 5), limit=5, **part):
  tokens = [list(range(length)) for length in lengths]
  part = intake.Part(what='prompt', tokens=tokens, limit=limit, setting='data.max_prompt_tokens',
                     **{'keep': 'right', **part})
  return intake.admit((part,), overlong=overlong, name='file',
                      where=lambda place: f'file, row {11 + place}',
                      dropped={intake.empty('prompt'): 2})


def test_drop_counts_by_reason():
  kept, (tokens,), found = _admit('drop')
  assert kept == [0, 3]
  assert tokens == [[0, 1, 2], [0, 1, 2, 3, 4]]
  assert str(found) == ('6 rows: 2 kept, 4 dropped (3 with an empty prompt, '
                         '1 longer than data.max_prompt_tokens=5)')


def test_truncate_keeps_the_end_and_the_first_token_of_a_text():
  kept, (tokens,), found = _admit('truncate')
  assert kept == [0, 1, 3]
  assert tokens[1] == [4, 5, 6, 7, 8]
  assert str(found) == '6 rows: 3 kept (1 truncated), 3 dropped (3 with an empty prompt)'
  assert _admit('truncate', bos=0)[1][0][1] == [0, 5, 6, 7, 8]
  assert _admit('truncate', bos=0, limit=1)[1][0][1] == [0]
  assert _admit('truncate', keep='left')[1][0][1] == [0, 1, 2, 3, 4]


def test_overlong_is_an_error_when_asked():
  with pytest.raises(config.UserError, match=(
      r'file, row 12: longer than data.max_prompt_tokens=5 \(prompt 9 tokens\); raise the limit, '
      'or set data.overlong to drop or truncate')):
    _admit('error')


def test_nothing_left_says_what_happened():
  with pytest.raises(config.UserError, match=(
      r'file: nothing left to train on: 4 rows: 0 kept, 4 dropped \(2 with an empty prompt, 2 '
      r'longer than data.max_prompt_tokens=5\); raise data.max_prompt_tokens or set '
      'data.overlong=truncate')):
    _admit('drop', lengths=(6, 7))
