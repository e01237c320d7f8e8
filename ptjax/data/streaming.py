"""Batches of data that is not held in memory: rows are read and tokenised window by window."""

import concurrent.futures
import dataclasses

from absl import logging
import numpy as np

from ptjax.data import order as order_lib


class StreamingDoor:
  """An offline or packed door over part of the rows at a time.

  The rows of an epoch are shuffled as a whole (by number: eight bytes a row) and cut into windows.
  A window is read, tokenised, and made into batches by a door of its own, while a thread prepares
  the next one. In memory are at most three windows: the first is kept, as it says how many steps
  a window takes. So `batch` is a pure function of the step, and a resumed run reads two windows,
  wherever it stands.

  What holds: every row is read exactly once per epoch. An example comes once, too, but where a
  window keeps fewer rows than the first one did, or packs into fewer batches, some of its examples
  come twice, and where it keeps more, some are left out until the next epoch, which cuts other
  windows.
  """

  def __init__(self, rows, read, open_door, *, window=8192, seed=0, name='windows'):
    """Opens the first window.

    Args:
      rows: `sources.Rows`, best loaded with `lazy`.
      read: `read(rows) -> Examples`, e.g. a door's `read` with its arguments bound.
      open_door: `open_door(examples) -> door`, an OfflineDoor or a PackedDoor with its settings.
        All windows take its shapes, so the width of packed rows must be given.
      window: rows read at a time.
      seed: of the order of rows, and within windows; None keeps the rows' own order.
      name: of the order's random stream.
    Raises:
      UserError: what `read` finds wrong with the rows of a window; at once for the first, else
        when its turn comes.
    """
    self._all, self._read, self._seed = rows, read, seed
    self._order = order_lib.Order(len(rows), min(window, len(rows)), seed, name,
                                  mixture=rows.mixture)
    self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='tokenise')
    self._coming = {}  # window -> future
    self._windows = {}  # window -> (door, row numbers)
    self.intake = None  # of all windows read so far
    found = self._load(0)
    self._first = open_door(found)
    self._windows[0] = self._finish(0, found)
    self.steps_per_window = self._windows[0].steps_per_epoch

  def __len__(self):
    """Rows in an epoch."""
    return len(self._all)

  @property
  def order(self):
    """The order within the first window, whose batches are as large as any."""
    return self._first.order

  @property
  def steps_per_epoch(self):
    """Steps after which every row has been read, about."""
    return round(self.steps_per_window * len(self._all) / self._order.batch_size)

  def epoch(self, step):
    """Returns how often the rows have been passed when `step` begins, with its fraction."""
    return step / self.steps_per_window * self._order.batch_size / len(self._all)

  def batch(self, step):
    """Returns the batch of a step, as the door of its window makes it."""
    number, place = divmod(step, self.steps_per_window)
    return self._window(number).batch(place)

  def widest(self):
    """Returns a batch as wide as any of the first window."""
    return self._first.widest()

  def rows(self, step):
    """Returns the numbers of the data set's rows that make up a step."""
    number, place = divmod(step, self.steps_per_window)
    numbers = self._order.indices(number)
    return [int(numbers[i]) for i in self._window(number).rows(place)]

  def _window(self, number):
    """The door of a window; the next one is prepared in the background."""
    if number not in self._windows:
      future = self._coming.pop(number, None)
      found = self._load(number) if future is None else future.result()
      for other in set(self._windows) - {0}:
        del self._windows[other]
      self._windows[number] = self._finish(number, found)
      logging.info('window %d: %s', number, found.intake)
    if number + 1 not in self._coming and number + 1 not in self._windows:
      self._coming = {number + 1: self._executor.submit(self._load, number + 1)}
    return self._windows[number]

  def _load(self, number):
    # A window's rows are of the sources that the order chose; they are not mixed again.
    return dataclasses.replace(
        self._read(self._all.select(self._order.indices(number))), mixture=None)

  def _finish(self, number, found):
    self.intake = found.intake if self.intake is None else self.intake + found.intake
    seed = None if self._seed is None else int(
        np.random.SeedSequence([self._seed % 2**63, number]).generate_state(1)[0])
    return self._first.like(found, seed=seed)
