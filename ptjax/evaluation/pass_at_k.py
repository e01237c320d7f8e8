"""pass@k and maj@k from n samples per prompt, both exact expectations over the k-subsets."""

import collections
import math

import numpy as np

_MAX_SAMPLES = 1000  # C(n, n / 2) must stay within float64


def pass_at_k(num_samples, num_correct, k):
  """Returns the chance that at least one of k samples is right, unbiased.

  Args:
    num_samples: n, samples drawn.
    num_correct: c, how many are right; int or array [...].
    k: how many of the n one may draw, 1 <= k <= n.
  Returns:
    1 - C(n - c, k) / C(n, k), float64 [...].
  Source: Chen et al., arXiv:2107.03374, eq. 1.
  """
  _check_k(num_samples, k)
  wrong = num_samples - np.asarray(num_correct, np.float64)
  drawn = np.arange(k)
  return 1.0 - np.prod(np.maximum(wrong[..., None] - drawn, 0) / (num_samples - drawn), axis=-1)


def maj_at_k(votes, correct, k):
  """Returns the chance that the majority of k of the samples is right, unbiased.

  A subset of k samples answers with its most frequent vote; among equally frequent ones each is
  as likely. The expectation over all subsets is exact: it counts them by the votes of each answer.

  Args:
    votes: list of n hashable answers, None for a sample that gives none.
    correct: list of n bool; samples with the same vote are right or wrong together.
    k: 1 <= k <= n <= 1000.
  Returns:
    float in [0, 1].
  """
  _check_k(len(votes), k)
  if len(votes) > _MAX_SAMPLES:
    raise ValueError(f'{len(votes)} samples: maj@k counts subsets of at most {_MAX_SAMPLES}')
  sizes = collections.Counter(vote for vote in votes if vote is not None)
  right = {vote for vote, is_right in zip(votes, correct, strict=True) if is_right}
  classes = [(size, vote in right) for vote, size in sizes.items()]
  abstaining = len(votes) - sum(sizes.values())
  wins = sum(_wins(classes, abstaining, k, top)
             for top in range(1, min(k, max(sizes.values(), default=0)) + 1))
  return float(wins / math.comb(len(votes), k))


def _wins(classes, abstaining, k, top):
  """Returns how many k-subsets with `top` votes for the winners go right, ties as shares.

  ways[used, ties] counts choices so far that take `used` samples and hold `ties` answers with
  `top` votes; right_winners sums, over the same choices, how many of those answers are right.
  """
  max_ties = min(k // top, sum(size >= top for size, _ in classes))
  ways = np.zeros((k + 1, max_ties + 1))
  ways[0, 0] = 1.0
  right_winners = np.zeros_like(ways)
  for size, is_right in classes:
    new_ways, new_right = np.zeros_like(ways), np.zeros_like(ways)
    for taken in range(min(size, top) + 1):
      choices = math.comb(size, taken)
      tie = int(taken == top)
      source = np.s_[:k + 1 - taken, :max_ties + 1 - tie]
      target = np.s_[taken:, tie:]
      new_ways[target] += choices * ways[source]
      new_right[target] += choices * right_winners[source]
      if tie and is_right:
        new_right[target] += choices * ways[source]
    ways, right_winners = new_ways, new_right
  shares = right_winners[:, 1:] / np.arange(1, max_ties + 1)  # a tie is broken at random
  fill = [math.comb(abstaining, k - used) for used in range(k + 1)]  # the rest abstain
  return float(np.dot(fill, shares.sum(axis=-1)))


def _check_k(num_samples, k):
  if not 1 <= k <= num_samples:
    raise ValueError(f'k={k}: expected 1 to {num_samples}, the number of samples')
