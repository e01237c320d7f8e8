"""Few shapes: buckets, right padding, and the sizes worth compiling a program for."""

import numpy as np

_WORTH_A_SIZE = 0.02  # of all work: what a further padded size must save to be worth a compilation


def bucket(length, limit=None):
  """Rounds a length up to one of few sizes, so that few shapes are compiled.

  The sizes are 8, 16, 32, 48, 64, 96, 128, 192, 256, ...: from 32 on at most a third is padding.

  Args:
    length: tokens, at least 0.
    limit: the largest size allowed, itself a size; None for no limit.
  Returns:
    The smallest size that holds `length`.
  """
  size = 8
  while size < length:
    power_of_two = size & (size - 1) == 0
    size = size * 2 if size < 32 else size * 3 // 2 if power_of_two else size * 4 // 3
  return size if limit is None else max(min(size, limit), length)


def pad_right(sequences, length, fill):
  """Stacks token sequences into one array.

  Args:
    sequences: B lists or arrays of ints, none longer than `length`.
    length: S, tokens per row of the result.
    fill: id that stands past the end of each sequence; never read, as lengths say where it starts.
  Returns:
    [B, S] int32 tokens and [B] int32 lengths.
  """
  tokens = np.full((len(sequences), length), fill, np.int32)  # [B, S]
  for row, sequence in zip(tokens, sequences):
    row[:len(sequence)] = sequence
  return tokens, np.array([len(sequence) for sequence in sequences], np.int32)


class Shapes:
  """The few sizes that batches are padded to, so that few programs are compiled.

  They are chosen from what batches need: the needs themselves, rounded up to multiples of 8; then,
  as long as there are too many or one is of little use, the two whose joining costs least become
  one.
  """

  def __init__(self, needs, cost, *, most=4, caps=None):
    """Chooses the sizes.

    Args:
      needs: [batches, K] int; what each of some typical batches needs (S and T, say).
      cost: function of [..., K] sizes -> [...]; what a batch of such a size costs.
      most: sizes at most.
      caps: K largest sizes allowed, each an int or None; a need beyond it is kept as it is.
    """
    self._cost = cost
    self._caps = caps
    needs = np.asarray(needs, np.int64)
    rounded = self._round(needs, _multiple_of_8)
    if len(np.unique(rounded, axis=0)) > 128:  # joining is cubic
      rounded = self._round(needs, bucket)
    sizes, counts = np.unique(rounded, axis=0, return_counts=True)
    self._sizes = _join(sizes, counts.astype(np.float64), cost, most)

  @property
  def sizes(self):
    """The chosen sizes, tuples of K ints."""
    return [tuple(map(int, size)) for size in self._sizes]

  def cover(self, need):
    """Returns the cheapest size that holds `need`; one beyond all of them gets one of its own.

    That is not remembered: a batch is of the same size whichever came before it.
    """
    need = np.asarray(need, np.int64)
    fits = (self._sizes >= need).all(-1)
    if not fits.any():
      return tuple(map(int, np.maximum(self._sizes.max(0), self._round(need[None], bucket)[0])))
    costs = np.where(fits, self._cost(self._sizes), np.inf)
    return tuple(map(int, self._sizes[int(np.argmin(costs))]))

  def _round(self, needs, rounding):
    caps = self._caps or (None,) * needs.shape[1]
    return np.stack([[rounding(int(n), cap) for n in column]
                     for column, cap in zip(needs.T, caps)], axis=1)


def _multiple_of_8(length, limit=None):
  size = max(8, -(-length // 8) * 8)
  return size if limit is None else max(min(size, limit), length)


def _join(sizes, counts, cost, most):
  """Joins sizes [n, K], used `counts` [n] times, until few are left that are worth having."""
  total = float((counts * cost(sizes)).sum())
  while len(sizes) > 1:
    joined = np.maximum(sizes[:, None], sizes[None])  # [n, n, K]
    new, old = cost(joined), cost(sizes)
    added = counts[:, None] * (new - old[:, None]) + counts[None] * (new - old[None])
    added[np.tril_indices(len(sizes))] = np.inf
    i, j = np.unravel_index(np.argmin(added), added.shape)
    if len(sizes) <= most and added[i, j] > _WORTH_A_SIZE * total:
      break
    sizes = np.concatenate([np.delete(sizes, [i, j], 0), joined[i, j][None]])
    counts = np.append(np.delete(counts, [i, j]), counts[i] + counts[j])
  return sizes
