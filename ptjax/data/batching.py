"""Fixed shapes and a fixed order: buckets, right padding, and who comes when.

Everything here is a pure function of its arguments, so a resumed run needs to remember nothing
but its step.
"""

import collections
import dataclasses
import functools
import math
import zlib

import numpy as np

from ptjax import config


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


class Order:
  """Which rows make up the batch of a step.

  The epochs form one endless row of permutations, each drawn from (seed, name, epoch) alone, and
  step n takes rows `n * batch_size` onwards. So every row is used exactly once per epoch, no
  remainder is dropped, and a batch at the seam may hold a row twice.
  """

  def __init__(self, num_rows, batch_size, seed, name):
    """Sets the order.

    Args:
      num_rows: rows in an epoch, at least 1.
      batch_size: rows per step.
      seed: int, or None to keep the rows' own order.
      name: what the order is for; two names give independent orders for one seed.
    """
    self.num_rows = num_rows
    self.batch_size = batch_size
    permutation = functools.partial(_permutation, num_rows, seed, zlib.crc32(name.encode()))
    self._permutation = functools.lru_cache(maxsize=2)(permutation)

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


def _permutation(num_rows, seed, stream, epoch):
  if seed is None:
    return np.arange(num_rows)
  return np.random.default_rng([seed % 2**63, stream, epoch]).permutation(num_rows)


def occurrences(indices):
  """Numbers the repeats: `[4, 7, 4]` gives `[0, 0, 1]`."""
  seen = {}
  counts = []
  for index in indices:
    counts.append(seen.get(int(index), 0))
    seen[int(index)] = counts[-1] + 1
  return np.array(counts, np.int32)


@dataclasses.dataclass(frozen=True)
class Intake:
  """What a door did with its rows; `str()` of it is the line to log."""
  rows: int  # read
  kept: int
  truncated: int  # kept, but shortened
  dropped: dict  # reason -> rows

  def __str__(self):
    text = f'{self.rows} rows: {self.kept} kept'
    if self.truncated:
      text += f' ({self.truncated} truncated)'
    if self.dropped:
      reasons = ', '.join(f'{count} {reason}' for reason, count in self.dropped.items())
      text += f', {sum(self.dropped.values())} dropped ({reasons})'
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One part of every row (its prompt, say) and how long it may be."""
  what: str  # 'prompt' or 'completion'
  tokens: list  # one list of ids per row
  limit: int | None  # tokens
  setting: str  # the name of that limit in the settings
  keep: str  # which end survives truncation: 'left' or 'right'
  bos: int | None = None  # a first token that survives too


def admit(parts, *, overlong, name, row_ids, missing):
  """Applies the length limits to rows made of parts, and counts.

  Args:
    parts: tuple of `Part` over the same rows.
    overlong: `drop`, `truncate` or `error`.
    name: of the data set, for errors.
    row_ids: the data set's row of each entry, counted from 0.
    missing: rows that never came this far, as a cell of theirs is empty.
  Returns:
    Places of the rows kept, one list of token lists per part, and the `Intake`.
  Raises:
    UserError: an overlong row under `error`, or no row left.
  """
  kept, truncated = [], 0
  dropped = collections.Counter({'with an empty ' + ' or '.join(p.what for p in parts): missing})
  for place, row_id in enumerate(row_ids):
    reasons = [f'longer than {p.setting}={p.limit}' for p in parts
               if p.limit is not None and len(p.tokens[place]) > p.limit]
    if not all(p.tokens[place] for p in parts):
      dropped[next(iter(dropped))] += 1
    elif reasons and overlong == 'error':
      lengths = ', '.join(f'{p.what} {len(p.tokens[place])} tokens' for p in parts)
      raise config.UserError(
          f'{name}, row {row_id + 1}: {reasons[0]} ({lengths}); raise the limit, or set '
          'data.overlong to drop or truncate')
    elif reasons and overlong == 'drop':
      dropped[reasons[0]] += 1
    else:
      truncated += bool(reasons)
      kept.append(place)
  intake = Intake(rows=len(row_ids) + missing, kept=len(kept), truncated=truncated,
                  dropped={reason: count for reason, count in dropped.items() if count})
  if not kept:
    remedy = ''.join(f'; raise {p.setting} or set data.overlong=truncate' for p in parts
                     if any(p.setting in reason for reason in intake.dropped))
    raise config.UserError(f'{name}: nothing left to train on: {intake}{remedy}')
  return kept, [[_shorten(p, p.tokens[place]) for place in kept] for p in parts], intake


def _shorten(part, tokens):
  if part.limit is None or len(tokens) <= part.limit:
    return tokens
  if part.keep == 'left':
    return tokens[:part.limit]
  if part.bos is not None and tokens[0] == part.bos:
    return tokens[:1] + tokens[len(tokens) - part.limit + 1:]
  return tokens[len(tokens) - part.limit:]
