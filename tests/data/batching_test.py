import numpy as np
import pytest

from ptjax import config
from ptjax.data import batching


def test_buckets_are_few_and_hold_their_length():
  sizes = [batching.bucket(length) for length in range(1, 513)]
  assert sorted(set(sizes)) == [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
  assert all(size >= length for length, size in enumerate(sizes, start=1))


def test_bucket_stops_at_the_limit():
  assert batching.bucket(97, 100) == 100
  assert batching.bucket(3, 5) == 5
  assert batching.bucket(0, 100) == 8


def test_pad_right():
  tokens, lengths = batching.pad_right([[1, 2, 3], [], [4]], 4, fill=9)
  np.testing.assert_array_equal(tokens, [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]])
  np.testing.assert_array_equal(lengths, [3, 0, 1])
  assert tokens.dtype == lengths.dtype == np.int32


def test_each_epoch_uses_each_row_once_whatever_the_batch_size():
  for batch_size in (1, 3, 4, 10, 23):
    order = batching.Order(10, batch_size, seed=3, name='x')
    stream = np.concatenate([order.indices(step) for step in range(60 // batch_size + 1)])
    first, second = stream[:10], stream[10:20]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_order_is_a_pure_function_of_seed_name_and_step():
  order = batching.Order(50, 7, seed=1, name='prompts')
  forwards = [order.indices(step).tolist() for step in range(30)]
  fresh = [batching.Order(50, 7, seed=1, name='prompts').indices(step).tolist()
           for step in reversed(range(30))]
  assert forwards == fresh[::-1]
  assert forwards != [batching.Order(50, 7, seed=2, name='prompts').indices(s).tolist()
                      for s in range(30)]
  assert forwards != [batching.Order(50, 7, seed=1, name='other').indices(s).tolist()
                      for s in range(30)]


def test_order_without_seed_is_the_rows_own():
  order = batching.Order(5, 3, seed=None, name='x')
  assert [order.indices(step).tolist() for step in range(2)] == [[0, 1, 2], [3, 4, 0]]
  assert order.steps_per_epoch == 2
  assert order.epoch(5) == 3.0


def test_negative_seed_is_a_seed_like_any_other():
  orders = [batching.Order(50, 50, seed=seed, name='x').indices(0).tolist() for seed in (-1, 1)]
  assert sorted(orders[0]) == list(range(50)) and orders[0] != orders[1]


def test_occurrences():
  np.testing.assert_array_equal(batching.occurrences([4, 7, 4, 4, 7]), [0, 0, 1, 2, 1])


def _admit(overlong, lengths=(3, 9, 0, 5), limit=5, **part):
  tokens = [list(range(length)) for length in lengths]
  part = batching.Part(what='prompt', tokens=tokens, limit=limit, setting='data.max_prompt_tokens',
                       **{'keep': 'right', **part})
  return batching.admit((part,), overlong=overlong, name='file', missing=2,
                        row_ids=range(10, 10 + len(lengths)))


def test_drop_counts_by_reason():
  kept, (tokens,), intake = _admit('drop')
  assert kept == [0, 3]
  assert tokens == [[0, 1, 2], [0, 1, 2, 3, 4]]
  assert str(intake) == ('6 rows: 2 kept, 4 dropped (3 with an empty prompt, '
                         '1 longer than data.max_prompt_tokens=5)')


def test_truncate_keeps_the_end_and_the_first_token_of_a_text():
  kept, (tokens,), intake = _admit('truncate')
  assert kept == [0, 1, 3]
  assert tokens[1] == [4, 5, 6, 7, 8]
  assert str(intake) == '6 rows: 3 kept (1 truncated), 3 dropped (3 with an empty prompt)'
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
