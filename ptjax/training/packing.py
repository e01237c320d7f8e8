"""Rows for the forward pass: completions of different lengths side by side, hardly any padding.

Losses read one row of outputs per completion, [B, T]. The forward pass need not run on such rows:
a prompt and some of its completions, then another prompt and its own, fill a row of W tokens, and
what the model says of each token is put back where the loss looks for it (`PackedRows.places`).
"""

import math

import numpy as np

from ptjax import types
from ptjax.data import batching
from ptjax.data import packing

_SAVES = 1.15  # times the packed cost, that rows as they are must cost before they are packed
# A shape that is compiled already is taken up to so many times the cost of the cheapest one. A
# smaller one is compiled beside it so often at most, and a larger one with room for larger batches
# (in rows; and, as the longest of many varies most, thrice over in width): so fifty batches of
# geometric lengths take two or three shapes, most often all within the first ten.
_NEAR, _SMALLER_SHAPES = 1.3, 1
_ROOM, _ROOM_POWER = 1.2, 3
# Of the batches of a data set, the share that the usual shape holds; another for all is compiled
# where it costs so many times more, and has so many spare rows, as a share.
_USUAL, _NEAR_USUAL, _SPARE = 0.9, 1.1, 0.05
_KNOWN_EXAMPLES, _KNOWN_BATCHES = 4096, 8  # of a data set, looked at to choose its shapes


def packers(door, **arguments):
  """The Packers of a stage: 'update', and 'pass' for scoring, which online takes whole rollouts.

  Args:
    door: data.offline.OfflineDoor of the rows, whose batches are known beforehand; None: rollouts.
    **arguments: see Packer.
  """
  if door is None:
    return {'update': Packer(**arguments), 'pass': Packer(**arguments)}
  packer = Packer(always=True, **arguments)
  count = max(_KNOWN_BATCHES, _KNOWN_EXAMPLES // door.order.batch_size)
  packer.settle(map(door.batch, range(min(door.steps_per_epoch, count))), door.widest())
  return {'update': packer, 'pass': packer}


class Packer:
  """Packs batches into rows of few shapes, each of which is a program to compile.

  A batch takes the cheapest of the shapes so far that holds it, unless a new one is cheaper by
  much; so a run has its shapes after a few steps. The layout depends on the batch and on `shapes`,
  which a checkpoint keeps, and on nothing else.
  """

  def __init__(self, *, width, multiple=1, always=False):
    """Starts without shapes.

    Args:
      width: of the model, in comparison to which attention over long rows is dear.
      multiple: what the number of rows must be a multiple of (devices x micro-batches).
      always: whether to pack also where it is not cheaper.
    """
    self.shapes = []  # (R rows, W tokens in each, M targets in each)
    self._width, self._multiple, self._always = width, multiple, always
    self._settled = False

  @property
  def memory(self):
    """The shapes, as JSON has them."""
    return [list(shape) for shape in self.shapes]

  @memory.setter
  def memory(self, found):
    self.shapes = [tuple(shape) for shape in found]

  def settle(self, batches, widest):
    """Chooses three shapes of one width and keeps to them: layouts then depend on the batch alone.

    For data sets, whose batches are known before they come: one shape for most batches, one for
    all that were seen, and one, hardly ever compiled, for the widest that could come.

    Args:
      batches: types.TokenBatches as a run will see them.
      widest: the batch of the longest rows.
    """
    lengths = [_Lengths(batch) for batch in batches]
    choices = []
    for width in _widths(_Lengths(widest)):
      needs = [_need(one, width)[1:] for one in lengths]
      counts = sorted(count for count, _ in needs)
      usual = counts[math.ceil(_USUAL * len(counts)) - 1]
      most = max(most for _, most in needs)
      shapes = [self._shape(width, usual, most),
                self._shape(width, counts[-1] * (1 + _SPARE), most),
                self._shape(width, *_need(_Lengths(widest), width)[1:])]
      if self._cost(shapes[1]) < _NEAR_USUAL * self._cost(shapes[0]):
        del shapes[0]
      choices.append((_USUAL * self._cost(shapes[0]) + (1 - _USUAL) * self._cost(shapes[-2]),
                      shapes))
    self.shapes = min(choices)[1]
    self._settled = True

  def __call__(self, batch):
    """Returns the batch, a `types.TokenBatch` of NumPy arrays, with its `packed` rows if any.

    The tokens then stand in those alone, so that how wide prompts were padded is no new shape.
    """
    found = self._choose(_Lengths(batch))
    if found is None:
      return batch
    return batch.replace(packed=_lay(batch, *found), prompt_tokens=None, tokens=None)

  def _choose(self, lengths):
    """(rows of completions, shape) of the cheapest way to pack, or None."""
    fits = {}

    def need(width):
      if width not in fits:
        fits[width] = _need(lengths, width)
      return fits[width]

    known = []
    for shape in self.shapes:
      if shape[1] >= lengths.longest:
        _, count, most = need(shape[1])
        if count <= shape[0] and most <= shape[2]:
          known.append(shape)
    shape = min(known, key=self._cost, default=None)
    if self._settled and shape is not None:
      return need(shape[1])[0], shape
    cheapest = self._cheapest(lengths, need)
    if shape is None:
      grows = bool(self.shapes) and not self._settled
      shape = self._cheapest(lengths, need, room=_ROOM) if grows else cheapest
    elif len(self.shapes) <= _SMALLER_SHAPES and self._cost(shape) > _NEAR * self._cost(cheapest):
      shape = cheapest
    if not self._always and self._plain_cost(lengths) < _SAVES * self._cost(shape):
      return None
    if shape not in self.shapes and not self._settled:
      self.shapes.append(shape)
    return need(shape[1])[0], shape

  def _cheapest(self, lengths, need, room=1.0):
    shapes = []
    for width in _widths(lengths, room):
      _, count, most = need(width)
      shapes.append(self._shape(width, count * room, most * room))
    return min(shapes, key=self._cost)

  def _shape(self, width, count, most):
    """(R, W, M) of rows of a width, given how many and how many targets in one there must be."""
    eighth = max(1, width // 8)
    return self._rows(count), width, min(width, math.ceil(most / eighth) * eighth)

  def _rows(self, count):
    """A number of rows for batches that need about `count`; few different ones come out."""
    count = math.ceil(count)
    step = max(1, 1 << max(count.bit_length() - 4, 0))
    step = -(-step // self._multiple) * self._multiple
    return -(-count // step) * step

  def _cost(self, shape):
    rows, width, _ = shape
    return rows * width * self._token_cost(width)

  def _plain_cost(self, lengths):
    (p, s), (b, t) = lengths.plain
    return p * s * self._token_cost(s) + b * t * self._token_cost(s + t)

  def _token_cost(self, length):
    """Of a token of a row, in units of one that attends to nothing.

    Measured on two CPU cores: 546, 570 and 668 us of an update at width 256 in rows of 417, 544
    and 1088 tokens; by FLOPs attention over L keys costs L / (11 width) of a layer's products.
    """
    return 1.0 + length / (10.0 * self._width)


class _Lengths:
  """What packing must know of a batch.

  Attributes:
    prompts: [P] int, tokens.
    completions: [P, G] int, tokens up to the last that trains; 0 where none does.
    targets: [B] int, tokens that train.
    plain: the shapes of the batch as it is, ((P, S), (B, T)).
    longest: tokens of the longest prompt with completion.
  """

  def __init__(self, batch):
    mask = np.asarray(batch.loss_mask)
    (p, _), (b, t) = self.plain = batch.prompt_tokens.shape, mask.shape
    self.prompts = np.asarray(batch.prompt_lengths)
    self.completions = np.where(mask, np.arange(1, t + 1), 0).max(1).reshape(p, b // p)
    self.targets = mask.sum(1)
    whole = np.where(self.completions > 0, self.prompts[:, None] + self.completions, 1)
    self.longest = int(whole.max())


def _widths(lengths, room=1.0):
  """Widths of rows worth a look: from just above the longest sequence to about twice that."""
  (_, s), (_, t) = lengths.plain
  first = batching.bucket(min(math.ceil(lengths.longest * room**_ROOM_POWER), s + t))
  found = {first, batching.bucket(first + 1), batching.bucket(batching.bucket(first + 1) + 1)}
  return sorted(found | {s + t})


def _need(lengths, width):
  """(rows of completions, their number, most targets in one) at a width."""
  rows = _fit(lengths, width)
  most = max((int(lengths.targets[row].sum()) for row in rows), default=1)
  return rows, max(len(rows), 1), most


def _fit(lengths, width):
  """Rows of completions: arrays of their numbers, those of a prompt side by side.

  The completions of each prompt are packed behind it, as few prompts as can be; what comes of it
  is packed once more.
  """
  pieces, sizes = [], []
  for prompt, own in enumerate(lengths.completions):
    trained = np.flatnonzero(own)
    for some in packing.fit(own[trained], width - int(lengths.prompts[prompt])):
      pieces.append(prompt * len(own) + trained[some])
      sizes.append(int(lengths.prompts[prompt] + own[trained[some]].sum()))
  return [np.concatenate([pieces[i] for i in row]) for row in packing.fit(sizes, width)]


def _lay(batch, rows, shape):
  """The `types.PackedRows` of a batch, its completions in `rows`."""
  r, w, m = shape
  mask, tokens = np.asarray(batch.loss_mask), np.asarray(batch.tokens)
  (b, t), group = mask.shape, len(mask) // len(batch.prompt_lengths)
  laid, segments, positions, branches = np.zeros((4, r, w), np.int32)
  targets, predictors = np.zeros((2, r, m), np.int32)
  places = np.full((r, m), b * t, np.int32)
  used = np.zeros(r, np.int32)
  for row, completions in enumerate(rows):
    end = done = segment = branch = 0
    last = None  # the prompt of the completion before
    for i in completions:
      prompt = int(i) // group
      length = int(batch.prompt_lengths[prompt])
      if prompt != last:
        start, end = end, end + length
        laid[row, start:end] = batch.prompt_tokens[prompt, :length]
        positions[row, start:end] = np.arange(length)
        segment, branch, last = segment + 1, 0, prompt
        segments[row, start:end] = segment
      trained = np.flatnonzero(mask[i])
      own = slice(end, end + int(trained[-1]) + 1)
      branch += 1
      laid[row, own] = tokens[i, :own.stop - own.start]
      positions[row, own] = length + np.arange(own.stop - own.start)
      segments[row, own], branches[row, own] = segment, branch
      at = slice(done, done + len(trained))
      targets[row, at] = tokens[i, trained]
      predictors[row, at] = np.where(trained, own.start + trained - 1, start + length - 1)
      places[row, at] = i * t + trained
      end, done = own.stop, at.stop
    used[row] = end
  return types.PackedRows(
      rows=types.TokenBatch(
          prompt_tokens=laid, prompt_lengths=used, tokens=targets, loss_mask=places < b * t,
          on_policy=np.asarray(False), inputs={},
          packing=types.Packing(segments=segments, positions=positions, predictors=predictors,
                                branches=branches)),
      places=places)
