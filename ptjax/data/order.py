"""Who comes when: the order of rows, a pure function of (seed, epoch).

A resumed run needs to remember nothing but its step.
"""

import dataclasses
import functools
import math
import zlib

import numpy as np

_WINDOW_BATCHES = 64  # sorted together, where batches are made of rows of similar length


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several data sets in one, each with its share of the rows that are drawn."""
  sources: np.ndarray  # [N] int; the data set of each row
  weights: tuple  # one share per data set, positive; only their ratios matter

  def take(self, places):
    """Returns the mixture of chosen rows."""
    return Mixture(self.sources[np.asarray(places, np.int64)], self.weights)


class Order:
  """Which rows make up the batch of a step.

  The epochs form one endless row of permutations, each drawn from (seed, name, epoch) alone, and
  step n takes rows `n * batch_size` onwards. So every row is used exactly once per epoch, no
  remainder is dropped, and a batch at the seam may hold a row twice.

  With `lengths`, batches are made of rows that are alike: a permutation is sorted within windows
  of 64 batches, and its batches are shuffled. Every row still comes once per epoch; a batch at the
  seam of two epochs stays unsorted.

  With a `mixture`, an epoch is still N rows long, but each data set gives its share of them (to
  the nearest row, at least one), from its own endless permutations: a large one needs several
  epochs to be passed once, and a small one is passed several times in one.
  """

  def __init__(self, num_rows, batch_size, seed, name, *, lengths=None, mixture=None):
    """Sets the order.

    Args:
      num_rows: N, rows in an epoch, at least 1.
      batch_size: rows per step.
      seed: int, or None to keep the rows' own order (then nothing is sorted or mixed either).
      name: what the order is for; two names give independent orders for one seed.
      lengths: [N, 2] array of what rows of a batch should be alike in, or None.
      mixture: `Mixture` of the N rows, or None.
    """
    self.num_rows = num_rows
    self.batch_size = batch_size
    self._seed = seed
    self._stream = zlib.crc32(name.encode())
    self._lengths = lengths
    self._members = self._shares = None
    if mixture is not None and len(mixture.weights) > 1:
      self._members = [np.flatnonzero(mixture.sources == i) for i in range(len(mixture.weights))]
      self._shares = shares([w if len(m) else 0 for w, m in zip(mixture.weights, self._members)],
                            num_rows)
    self._permutation = functools.lru_cache(maxsize=2)(self._draw)

  @property
  def steps_per_epoch(self):
    """Steps after which every row has come at least once."""
    return math.ceil(self.num_rows / self.batch_size)

  def epoch(self, step):
    """Returns how often the data set has been passed when `step` begins, with its fraction."""
    return step * self.batch_size / self.num_rows

  def indices(self, step):
    """Returns the [batch_size] int row numbers of `step`."""
    places = step * self.batch_size + np.arange(self.batch_size)
    epochs, places = np.divmod(places, self.num_rows)
    return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places)], np.int64)

  def permutation(self, epoch):
    """Returns the [N] int row numbers of an epoch, in their order."""
    return self._permutation(epoch)

  def generator(self, use, epoch):
    """Returns a NumPy generator for a further use in an epoch, e.g. to shuffle batches."""
    return self._rng(epoch, use)

  def _draw(self, epoch):
    if self._seed is None:
      return np.arange(self.num_rows)
    if self._members is None:
      rows = self._rng(epoch).permutation(self.num_rows)
    else:
      rows = self._rng(epoch).permutation(np.concatenate([
          self._from_source(i, epoch) for i in range(len(self._members))]))
    return rows if self._lengths is None else self._grouped(rows, epoch)

  def _rng(self, *numbers):
    return np.random.default_rng([self._seed % 2**63, self._stream, *numbers])

  def _from_source(self, source, epoch):
    """The rows that a data set gives to an epoch: the next of its own permutations."""
    members, share = self._members[source], self._shares[source]
    if not share:
      return members[:0]
    passes, places = np.divmod(epoch * share + np.arange(share), len(members))
    return np.concatenate([
        members[self._rng(source + 1, int(turn)).permutation(len(members))[places[passes == turn]]]
        for turn in np.unique(passes)])

  def _grouped(self, rows, epoch):
    """Sorts within windows, then shuffles batches; rows shared with another epoch stay."""
    size = self.batch_size
    head = -epoch * self.num_rows % size  # they fill up the last batch of the epoch before
    whole = max(0, (self.num_rows - head) // size) * size
    if not whole:
      return rows
    middle = rows[head:head + whole]
    window = _WINDOW_BATCHES * size
    parts = [middle[i:i + window] for i in range(0, whole, window)]
    rng = self.generator(1, epoch)
    # Lengths count a tenth more or less, or a small data set would give the same batches always.
    about = lambda part: self._lengths[part] * rng.uniform(0.9, 1.1, (len(part), 2))
    middle = np.concatenate([part[alike(about(part), size)] for part in parts]).reshape(-1, size)
    middle = rng.permutation(middle).reshape(-1)
    return np.concatenate([rows[:head], middle, rows[head + whole:]])


def alike(lengths, size):
  """Orders rows so that batches of neighbours are alike in two lengths at once.

  Strips of equally many rows by the first length, each sorted by the second; with as many strips
  as a strip has batches. Measured on chat preference pairs in batches of 8: 69 % of a batch are
  tokens, 58 % when sorted by one length and then the other, 42 % in random order.

  Args:
    lengths: [N, 2] array.
    size: rows per batch.
  Returns:
    [N] int places.
  """
  by_first = np.argsort(lengths[:, 0], kind='stable')
  batches = max(1, len(lengths) // size)
  strip = math.ceil(batches / max(1, round(math.sqrt(batches)))) * size
  parts = [by_first[i:i + strip] for i in range(0, len(lengths), strip)]
  return np.concatenate([part[np.argsort(lengths[part, 1], kind='stable')] for part in parts])


def shares(weights, count):
  """Splits `count` rows by weight: integers with that sum, off by less than one row each.

  Every weight above 0 gets at least one row where `count` allows it.
  """
  weights = np.asarray(weights, np.float64)
  exact = weights / weights.sum() * count
  counts = np.floor(exact).astype(np.int64)
  counts[(weights > 0) & (counts == 0)] = 1
  order = np.argsort(-(exact - counts), kind='stable')
  for i in range(count - int(counts.sum())):
    counts[order[i % len(order)]] += 1
  while counts.sum() > count:
    counts[np.argmax(counts)] -= 1
  return counts


def occurrences(indices):
  """Numbers the repeats: `[4, 7, 4]` gives `[0, 0, 1]`."""
  seen = {}
  counts = []
  for index in indices:
    counts.append(seen.get(int(index), 0))
    seen[int(index)] = counts[-1] + 1
  return np.array(counts, np.int32)
