import numpy as np

from ptjax.data import order


def test_each_epoch_uses_each_row_once_whatever_the_batch_size():
  for batch_size in (1, 3, 4, 10, 23):
    draws = order.Order(10, batch_size, seed=3, name='x')
    stream = np.concatenate([draws.indices(step) for step in range(60 // batch_size + 1)])
    first, second = stream[:10], stream[10:20]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_order_is_a_pure_function_of_seed_name_and_step():
  draws = order.Order(50, 7, seed=1, name='prompts')
  forwards = [draws.indices(step).tolist() for step in range(30)]
  fresh = [order.Order(50, 7, seed=1, name='prompts').indices(step).tolist()
           for step in reversed(range(30))]
  assert forwards == fresh[::-1]
  assert forwards != [order.Order(50, 7, seed=2, name='prompts').indices(s).tolist()
                      for s in range(30)]
  assert forwards != [order.Order(50, 7, seed=1, name='other').indices(s).tolist()
                      for s in range(30)]


def test_order_without_seed_is_the_rows_own():
  draws = order.Order(5, 3, seed=None, name='x')
  assert [draws.indices(step).tolist() for step in range(2)] == [[0, 1, 2], [3, 4, 0]]
  assert draws.steps_per_epoch == 2
  assert draws.epoch(5) == 3.0


def test_negative_seed_is_a_seed_like_any_other():
  orders = [order.Order(50, 50, seed=seed, name='x').indices(0).tolist() for seed in (-1, 1)]
  assert sorted(orders[0]) == list(range(50)) and orders[0] != orders[1]


def test_occurrences():
  np.testing.assert_array_equal(order.occurrences([4, 7, 4, 4, 7]), [0, 0, 1, 2, 1])


def _lengths(count, seed=0):
  return np.random.default_rng(seed).integers(1, 500, (count, 2))


def test_batches_of_similar_length_still_use_each_row_once_per_epoch():
  for batch_size in (1, 4, 7, 100, 300):
    draws = order.Order(203, batch_size, seed=3, name='x', lengths=_lengths(203))
    steps = 3 * 203 // batch_size + 2
    stream = np.concatenate([draws.indices(step) for step in range(steps)])
    for epoch in range(3):
      assert sorted(stream[epoch * 203:(epoch + 1) * 203]) == list(range(203))


def test_batches_of_similar_length_are_similar():
  lengths = _lengths(800)
  def padded(draws):
    return np.mean([lengths[draws.indices(step)].max(0).sum() for step in range(100)])
  plain = padded(order.Order(800, 8, seed=1, name='x'))
  # Also in later epochs, which do not begin with a batch.
  later = order.Order(797, 8, seed=1, name='x', lengths=lengths)
  assert np.mean([lengths[later.indices(step)].max(0).sum() for step in range(101, 198)]) < (
      1.3 * lengths.sum(1).mean())
  grouped = padded(order.Order(800, 8, seed=1, name='x', lengths=lengths))
  exact = lengths.sum(1).mean()
  # Random batches of eight nearly pay for the longest row; grouped ones a tenth over their tokens.
  assert plain > 1.7 * exact and grouped < 1.3 * exact


def test_batches_of_similar_length_come_in_random_order_and_differ_between_epochs():
  lengths = _lengths(160)
  draws = order.Order(160, 8, seed=1, name='x', lengths=lengths)
  batches = [[frozenset(draws.indices(e * 20 + s)) for s in range(20)] for e in range(2)]
  assert set(batches[0]) != set(batches[1])
  sizes = [lengths[list(b)].sum() for b in batches[0]]
  assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
  again = order.Order(160, 8, seed=1, name='x', lengths=lengths)
  assert [frozenset(again.indices(s)) for s in range(19, -1, -1)] == batches[0][::-1]


def test_a_mixture_gives_each_source_its_share():
  sources = np.repeat([0, 1, 2], [10, 200, 790])
  mixture = order.Mixture(sources, (3.0, 1.0, 1.0))
  draws = order.Order(1000, 8, seed=1, name='x', mixture=mixture)
  for epoch in range(3):
    rows = draws.permutation(epoch)
    assert np.bincount(sources[rows]).tolist() == [600, 200, 200]
    assert np.bincount(rows[sources[rows] == 0]).tolist() == [60] * 10  # evenly repeated
    assert sorted(rows[sources[rows] == 1]) == list(range(10, 210))  # once each
    # Mixed, not one after the other: each tenth holds its share, within five deviations.
    for part in np.split(sources[rows], 10):
      assert abs((part == 0).sum() - 60) < 5 * (100 * 0.6 * 0.4)**0.5
  # The large source goes on where the epoch before stopped: all of it is seen.
  large = np.concatenate([draws.permutation(e)[sources[draws.permutation(e)] == 2]
                          for e in range(4)])
  assert len(set(large[:600])) == 600 and len(set(large)) == 790


def test_a_mixture_may_be_grouped_by_length_too():
  sources = np.repeat([0, 1], 100)
  mixture = order.Mixture(sources, (3.0, 1.0))
  lengths = _lengths(200)
  draws = order.Order(200, 8, seed=1, name='x', mixture=mixture, lengths=lengths)
  plain = order.Order(200, 8, seed=1, name='x', mixture=mixture)
  assert sorted(draws.permutation(2)) == sorted(plain.permutation(2))
  assert list(draws.permutation(2)) != list(plain.permutation(2))


def test_shares_sum_and_leave_nobody_out():
  assert order.shares([0.5, 0.3, 0.2], 10).tolist() == [5, 3, 2]
  assert order.shares([1, 1, 1], 10).sum() == 10
  assert order.shares([1e-6, 1.0], 10).tolist() == [1, 9]
  assert order.shares([1, 0, 1], 5).tolist()[1] == 0
