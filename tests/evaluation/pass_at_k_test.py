"""pass@k and maj@k against the enumeration of every subset."""

import collections
import itertools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from ptjax.evaluation import pass_at_k


@pytest.mark.parametrize('n', [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_subsets(n):
  for c, k in itertools.product(range(n + 1), range(1, n + 1)):
    right = [True] * c + [False] * (n - c)
    expected = np.mean([any(subset) for subset in itertools.combinations(right, k)])
    assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_takes_arrays_and_large_n():
  np.testing.assert_allclose(pass_at_k.pass_at_k(4, np.array([[0, 1], [2, 4]]), 2),
                             [[0, 0.5], [5 / 6, 1]])
  n, c, k = 10_000, 3, 5_000
  expected = 1 - math.comb(n - c, k) / math.comb(n, k)  # exact in integers
  assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-10)


def _majority_of(subset):
  """The share of right answers among the most frequent votes of (vote, is right) pairs."""
  counts = collections.Counter(vote for vote, _ in subset if vote is not None)
  if not counts:
    return 0.0
  top = max(counts.values())
  winners = [vote for vote, count in counts.items() if count == top]
  return sum(vote == 'right' or vote == 'also right' for vote in winners) / len(winners)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(['right', 'also right', 'a', 'b', 'c', None]),
                min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_subsets(votes, data):
  k = data.draw(st.integers(1, len(votes)))
  correct = [vote in ('right', 'also right') for vote in votes]
  pairs = list(zip(votes, correct))
  expected = np.mean([_majority_of(subset) for subset in itertools.combinations(pairs, k)])
  assert pass_at_k.maj_at_k(votes, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('votes, expected', [
    (['right', 'right', 'a'], 1.0), (['right', 'a', 'a'], 0.0), (['right', 'a'], 0.5),
    (['right', 'a', 'b', None], 1 / 3), ([None, None], 0.0), (['right', None, None], 1.0)])
def test_majority_of_all_samples(votes, expected):
  correct = [vote == 'right' for vote in votes]
  assert pass_at_k.maj_at_k(votes, correct, len(votes)) == pytest.approx(expected)


def test_majority_of_one_is_the_accuracy():
  votes = ['right'] * 3 + ['a'] * 4 + [None]
  assert pass_at_k.maj_at_k(votes, [v == 'right' for v in votes], 1) == pytest.approx(3 / 8)


def test_maj_at_k_of_many_samples_stays_finite():
  votes = ['right'] * 40 + ['a'] * 30 + list(range(30))
  value = pass_at_k.maj_at_k(votes, [vote == 'right' for vote in votes], 50)
  assert 0.85 < value < 1
  rare = ['right'] * 10 + [None] * 990  # about 1e299 subsets, as many as there can be
  expected = 1 - math.comb(990, 500) / math.comb(1000, 500)
  assert pass_at_k.maj_at_k(rare, [vote == 'right' for vote in rare], 500) == pytest.approx(
      expected, rel=1e-12)


@pytest.mark.parametrize('k', [0, 4])
def test_k_outside_the_samples(k):
  with pytest.raises(ValueError, match=f'k={k}: expected 1 to 3'):
    pass_at_k.pass_at_k(3, 1, k)
  with pytest.raises(ValueError, match=f'k={k}: expected 1 to 3'):
    pass_at_k.maj_at_k(['a'] * 3, [True] * 3, k)


def test_too_many_samples_to_count():
  with pytest.raises(ValueError, match='at most 1000'):
    pass_at_k.maj_at_k(['a'] * 1001, [True] * 1001, 2)
