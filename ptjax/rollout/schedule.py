"""Which completions a chunk decodes, and how wide: decided on the host between chunks.

Every program is compiled for a number of slots and a window, so there are few of either. The
slots of a chunk are the smallest such number that holds all live completions, its window the
smallest that holds the longest of them; once a run is under way, the programs there are must do
where they can. What is drawn does not depend on any of it.
"""

from typing import NamedTuple

import numpy as np

_FIRST_WINDOW = 64  # tokens; windows double from here
_HALVINGS = 3  # of the slots, while fewer and fewer completions live


class Turn(NamedTuple):
  """What a chunk decodes; indices count within each of X shards (see decoding.run_chunk)."""
  slots: np.ndarray  # [X, n] int32
  rows: np.ndarray  # [X, n] int32; the completion in each of these slots
  window: int  # tokens


def window_sizes(tokens):
  """Widths at which a completion's own cache is attended to: 64, 128, ... and what holds `tokens`.

  Attention costs as much as the window is wide, and every window is a compiled program.
  """
  last = max(8, -(-tokens // 8) * 8)
  sizes = []
  size = _FIRST_WINDOW
  while size * 4 / 3 <= last:  # a window hardly smaller than the last is not worth a program
    sizes.append(size)
    size *= 2
  return [*sizes, last]


def slot_counts(slots):
  """Numbers of slots that are decoded together: all, half, a quarter, an eighth."""
  return sorted({-(-slots // 2**i) for i in range(_HALVINGS + 1)})


class Schedule:
  """Hands each free slot the next completion that waits, and closes ranks once none waits.

  Each shard has its own queue, in the order of its completions, and all shards run the same number
  of slots.
  """

  def __init__(self, shards, completions, slots, windows, steps, compiled=(), active=None):
    """Puts the first completions into the slots.

    Args:
      shards: X.
      completions: N, of each shard.
      slots: M, of each shard; at most N.
      windows: widths, ascending.
      steps: K, tokens that a chunk adds to each live completion.
      compiled: (slots of all shards, window) of the programs to choose from, where one will do.
      active: slots of each shard that are used, one of `slot_counts`; None: all.
    """
    self._compiled = [(count // shards, window) for count, window in compiled]
    slots, self._counts = active or slots, slot_counts(slots)
    self._windows = windows
    self._steps = steps
    self._rows = np.tile(np.arange(slots, dtype=np.int32), (shards, 1))  # of each slot
    self._waiting = [list(range(completions - 1, slots - 1, -1)) for _ in range(shards)]

  def turn(self, lengths, done):
    """Returns the next Turn, None when all completions are done.

    Args:
      lengths: [X * N] int; tokens of each completion.
      done: [X * N] bool.
    """
    if done.all():
      return None
    shards, slots = self._rows.shape
    lengths, done = (x.reshape(shards, -1) for x in (lengths, done))
    for shard in range(shards):
      for slot in np.flatnonzero(done[shard, self._rows[shard]]):
        while self._waiting[shard]:
          row = self._waiting[shard].pop()
          if not done[shard, row]:  # its first token may have ended it
            self._rows[shard, slot] = row
            break
    live = ~np.take_along_axis(done, self._rows, axis=1)  # [X, M]
    # The newest token is not in the cache yet.
    longest = np.take_along_axis(lengths, self._rows, axis=1)[live].max() - 1
    count, window = self._program(live.sum(1).max(), longest + self._steps)
    chosen = np.tile(np.arange(slots, dtype=np.int32), (shards, 1))
    if count < slots:  # the live ones, and as many others as fill up
      chosen = np.sort(np.argsort(~live, axis=1, kind='stable')[:, :count]).astype(np.int32)
    return Turn(chosen, np.take_along_axis(self._rows, chosen, axis=1), window)

  def _program(self, live, tokens):
    """The least (slots, window) for so many completions of so many tokens."""
    enough = [(count, window) for count, window in self._compiled
              if live <= count <= self._rows.shape[1] and window >= tokens]
    if enough:  # a slot costs about as much as 500 tokens of its window
      return min(enough, key=lambda program: program[0] * (512 + program[1]))
    return (next(count for count in self._counts if count >= live),
            next(window for window in self._windows if window >= tokens))
