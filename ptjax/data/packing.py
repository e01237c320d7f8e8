"""Packed batches: rows of one width that hold several whole examples, hardly any padding."""

import bisect
import collections
import functools
import math

import numpy as np

from ptjax import config
from ptjax import types
from ptjax.data import batching
from ptjax.data import offline
from ptjax.data import order as order_lib

_FILLED = 0.9  # of its rows, below which a wider row is tried
_WIDEST = 512  # tokens, up to which that is worth it: attention inside a row is dense


class PackedDoor:
  """Batches of examples with one completion each, packed.

  An epoch is packed as a whole: examples from the longest to the shortest, each into the fullest
  row that still has room (so the number of rows is the same in every epoch); which of several
  equally long examples come together, and which rows form a batch, is drawn from (seed, epoch).
  So every example comes exactly once per epoch and `batch` is a pure function of the step. Rows
  that are too few for a last batch are made up for by taking some apart.

  Under a mixture, epochs differ in their rows, and `batch` packs those before it, too.
  """

  def __init__(self, examples, *, batch_size=None, tokens_per_batch=None, tokens=None, multiple=1,
               seed=0, fill=0, name='demonstrations', shapes=None):
    """Sets the batches up.

    Args:
      examples: examples.Examples with one completion each, and no inputs but per token.
      batch_size: examples per batch, on average; None where `tokens_per_batch` says it.
      tokens_per_batch: tokens per batch at most (but one row at least), padding included.
      tokens: S, width of a row; None: just above the longest example, or, where that leaves much
        room, twice that, and so on up to 512 while there are rows enough for every step.
      multiple: what the number of rows must be a multiple of (devices x micro-batches).
      seed: of the order; None keeps the order of equally long examples.
      fill: id that fills padding; never read.
      name: of the order's random stream.
      shapes: batching.Shapes of the number of targets, to share with other doors; None chooses.
    Raises:
      UserError: an example longer than a row.
      ValueError: examples with several completions, or inputs that a packed row cannot hold.
    """
    if examples.group_size != 1 or examples.inputs:
      raise ValueError('packed rows hold examples of one completion without inputs of their own; '
                       f'these have {examples.group_size} and {list(examples.inputs)}')
    if (batch_size is None) == (tokens_per_batch is None):
      raise ValueError('give batch_size or tokens_per_batch')
    self.examples = examples
    self._fill, self._seed, self._name, self._multiple = fill, seed, name, multiple
    self._per_token = dict(examples.per_token)
    prompts, completions = examples.lengths()
    self._lengths = prompts + completions[:, 0]  # [N]
    self._targets = [np.flatnonzero(examples.mask(i, 0)) for i in range(len(examples))]
    self._num_targets = np.array([len(t) for t in self._targets])
    longest = int(self._lengths.max())
    if tokens is not None and longest > tokens:
      row = examples.row_ids[int(self._lengths.argmax())] + 1
      raise config.UserError(f'data.packed_tokens={tokens}: row {row} has {longest} tokens; raise '
                             'it, or lower data.max_prompt_tokens or rollout.max_completion_tokens')
    steps = 1 if batch_size is None else math.ceil(len(examples) / batch_size)
    self.width = tokens or _choose_width(self._lengths, least=steps * multiple)
    self._order = order_lib.Order(len(examples), 1, seed, name, mixture=examples.mixture)
    self._shuffle = functools.partial(self._order.generator, 2)
    rows = len(fit(self._lengths[self._order.permutation(0)], self.width))
    if tokens_per_batch is not None:
      self.rows_per_batch = max(multiple, tokens_per_batch // self.width // multiple * multiple)
    else:
      self.rows_per_batch = math.ceil(rows / steps / multiple) * multiple
    self._starts = [0]  # first step of each epoch, as far as known
    self._plan = functools.lru_cache(maxsize=2)(self._pack)
    self.shapes = self._choose_shapes() if shapes is None else shapes

  def like(self, examples, *, seed):
    """Returns a door to other examples whose batches have the sizes of this one's."""
    return PackedDoor(examples, tokens_per_batch=self.width * self.rows_per_batch,
                      tokens=self.width, multiple=self._multiple, seed=seed, fill=self._fill,
                      name=self._name, shapes=self.shapes)

  def __len__(self):
    return len(self.examples)

  @property
  def intake(self):
    """What became of the rows."""
    return self.examples.intake

  @property
  def steps_per_epoch(self):
    """Steps of the first epoch; of every one, but for mixtures."""
    return len(self._plan(0))

  def epoch(self, step):
    """Returns how often the examples have been passed when `step` begins, with its fraction."""
    epoch, place = self._locate(step)
    return epoch + place / len(self._plan(epoch))

  def rows(self, step):
    """Returns the numbers of the data set's rows that make up a step."""
    epoch, place = self._locate(step)
    return [self.examples.row_ids[i] for row in self._plan(epoch)[place] for i in row]

  def attach(self, name, values):
    """Adds an array per token to every completion (see offline.OfflineDoor.attach)."""
    self._per_token[name] = offline.grouped(self.examples, name, values)

  def batch(self, step):
    """Returns the batch of a step: a `types.TokenBatch` of NumPy arrays, with its `packing`."""
    epoch, place = self._locate(step)
    return self._assemble(self._plan(epoch)[place])

  def widest(self):
    """Returns the batch of the first epoch that has most targets in a row."""
    return self._assemble(max(self._plan(0), key=self._most_targets))

  def take(self, indices):
    """Returns chosen examples packed into as few rows as hold them."""
    indices = np.asarray(indices, np.int64)
    return self._assemble([indices[row] for row in fit(self._lengths[indices], self.width)])

  # --- the plan of an epoch

  def _locate(self, step):
    """The epoch of a step and the step's place in it."""
    if self.examples.mixture is None:
      return divmod(step, len(self._plan(0)))
    while self._starts[-1] <= step:
      self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
    epoch = bisect.bisect_right(self._starts, step) - 1
    return epoch, step - self._starts[epoch]

  def _pack(self, epoch):
    """The batches of an epoch: lists of rows, each an array of places among the examples."""
    places = self._order.permutation(epoch)
    rows = [places[row] for row in fit(self._lengths[places], self.width)]
    size = self.rows_per_batch
    missing = -len(rows) % size
    while missing:  # take the rows with most examples apart
      rows.sort(key=len)
      if len(rows[-1]) < 2:
        break
      whole = rows.pop()
      rows += [whole[0::2], whole[1::2]]
      missing -= 1
    rows += [places[:0]] * missing
    if self._seed is not None:
      rows = [rows[i] for i in self._shuffle(epoch).permutation(len(rows))]
    return [rows[i:i + size] for i in range(0, len(rows), size)]

  def _most_targets(self, rows):
    return max(int(self._num_targets[row].sum()) for row in rows)

  def _choose_shapes(self):
    needs = [[self._most_targets(rows)] for rows in self._plan(0)]
    return batching.Shapes(np.array(needs), lambda s: s[..., 0], caps=(self.width,))

  # --- from rows to arrays

  def _assemble(self, rows):
    examples, b, s = self.examples, len(rows), self.width
    t, = self.shapes.cover([self._most_targets(rows)])
    tokens = np.full((b, s), self._fill, np.int32)
    segments, positions = np.zeros((b, s), np.int32), np.zeros((b, s), np.int32)
    targets = np.full((b, t), self._fill, np.int32)
    predictors, loss_mask = np.zeros((b, t), np.int32), np.zeros((b, t), bool)
    lengths = np.zeros(b, np.int32)
    inputs = {name: offline.zeros(values[0][0], (b, t))
              for name, values in self._per_token.items()}
    for r, row in enumerate(rows):
      start = done = 0
      for number, i in enumerate(row, start=1):
        prompt, (completion,) = examples.prompts[i], examples.completions[i]
        own = slice(start, start + len(prompt) + len(completion))
        tokens[r, own] = np.concatenate([prompt, completion])
        segments[r, own] = number
        positions[r, own] = np.arange(own.stop - own.start)
        trained = self._targets[i]
        at = slice(done, done + len(trained))
        targets[r, at] = completion[trained]
        predictors[r, at] = start + len(prompt) + trained - 1
        for name, values in self._per_token.items():
          inputs[name][r, at] = values[i][0][trained]
        start, done = own.stop, at.stop
      lengths[r] = start
      loss_mask[r, :done] = True
    return types.TokenBatch(
        prompt_tokens=tokens, prompt_lengths=lengths, tokens=targets, loss_mask=loss_mask,
        on_policy=np.bool_(False), inputs=inputs,
        packing=types.Packing(segments=segments, positions=positions, predictors=predictors))


def fit(lengths, width):
  """Packs lengths [n], none above `width`, into rows: from long to short, each into the fullest
  row with room. Returns one [k] int array of places per row."""
  rows, open_rows, rooms = [], collections.defaultdict(list), []  # rooms: sizes with open rows
  for place in np.argsort(-np.asarray(lengths), kind='stable'):
    length = int(lengths[place])
    at = bisect.bisect_left(rooms, length)
    if at == len(rooms):
      row, room = len(rows), width
      rows.append([])
    else:
      room = rooms[at]
      row = open_rows[room].pop()
      if not open_rows[room]:
        del rooms[at]
    rows[row].append(place)
    left = room - length
    if left:
      if not open_rows[left]:
        bisect.insort(rooms, left)
      open_rows[left].append(row)
  return [np.array(row, np.int64) for row in rows]


def _choose_width(lengths, least):
  """The width of rows, such that there are at least so many if there are so many examples."""
  width = -(-int(lengths.max()) // 8) * 8
  while width * 2 <= _WIDEST and lengths.sum() < _FILLED * width * len(fit(lengths, width)) and (
      len(fit(lengths, width * 2)) >= least):
    width *= 2
  return width
