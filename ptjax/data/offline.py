"""The offline door: examples in, one batch per optimizer step out."""

import numpy as np

from ptjax import types
from ptjax.data import batching
from ptjax.data import order as order_lib


class OfflineDoor:
  """Batches of examples, a prompt and its G completions per row, in a reproducible order.

  `batch` is a pure function of the step, so the step is all that a checkpoint must hold. Batches
  are padded to a few sizes (chosen from the examples), so few programs compile.
  """

  def __init__(self, examples, *, batch_size, seed=0, fill=0, bucket=True, sizes=4,
               name='demonstrations', shapes=None):
    """Sets the batches up.

    Args:
      examples: examples.Examples.
      batch_size: P, prompts per batch; may exceed the number of examples, which then repeat.
      seed: of the order; None keeps the order of the examples.
      fill: id that fills padding; never read.
      bucket: whether batches are made of examples of similar length (order.Order, `lengths`).
        Every example still comes exactly once per epoch.
      sizes: to how many sizes batches are padded at most.
      name: of the order's random stream.
      shapes: batching.Shapes of (prompt, completion) sizes to share with other doors; None
        chooses them.
    """
    self.examples = examples
    self._fill, self._bucket, self._name, self._sizes = fill, bucket, name, sizes
    self._per_token = dict(examples.per_token)
    self._prompt_lengths, lengths = examples.lengths()
    self._completion_lengths = lengths.max(1)  # [N]
    self.order = order_lib.Order(
        len(examples), batch_size, seed, name, mixture=examples.mixture,
        lengths=np.stack([self._completion_lengths, self._prompt_lengths], 1) if bucket else None)
    self.shapes = self._choose_shapes() if shapes is None else shapes

  def like(self, examples, *, seed):
    """Returns a door to other examples whose batches have the sizes of this one's."""
    return OfflineDoor(examples, batch_size=self.order.batch_size, seed=seed, fill=self._fill,
                       bucket=self._bucket, sizes=self._sizes, name=self._name,
                       shapes=self.shapes)

  def __len__(self):
    return len(self.examples)

  @property
  def intake(self):
    """What became of the rows."""
    return self.examples.intake

  @property
  def steps_per_epoch(self):
    """Steps after which every example has come at least once."""
    return self.order.steps_per_epoch

  def epoch(self, step):
    """Returns how often the examples have been passed when `step` begins, with its fraction."""
    return self.order.epoch(step)

  def rows(self, step):
    """Returns the numbers of the data set's rows that make up a step, a list of P."""
    return [self.examples.row_ids[i] for i in self.order.indices(step)]

  def in_turn(self):
    """Returns all places [N] in an order in which batches of neighbours cost little."""
    if self._bucket:
      return self.by_length()
    return np.random.default_rng(0).permutation(len(self))  # the file itself may be sorted

  def by_length(self):
    """Returns all places [N] ordered by length: batches of neighbours hold little padding."""
    return np.lexsort((self._prompt_lengths, self._completion_lengths))

  def digest(self):
    """Returns a hex digest of all token ids and which of them train, in example order."""
    return self.examples.digest()

  def attach(self, name, values):
    """Adds an array per token to every completion, e.g. cached reference log-probs.

    Args:
      name: the loss's name for it.
      values: N * G arrays [T], in the order of the examples, completions of one together.
    Raises:
      ValueError: another number of arrays, or one of another length than its completion.
    """
    self._per_token[name] = grouped(self.examples, name, values)

  def batch(self, step):
    """Returns the batch of a step: a `types.TokenBatch` of NumPy arrays."""
    return self.take(self.order.indices(step))

  def widest(self):
    """Returns a batch as wide as any: with the longest completion and the longest prompt."""
    places = self.by_length()[::-1]
    longest = places[np.argmax(self._prompt_lengths[places])]
    first = [places[0], *([longest] if self.order.batch_size > 1 else [])]
    return self.take(np.resize([*first, *places[1:]], self.order.batch_size))

  def take(self, indices):
    """Returns the batch of chosen examples, places among the kept ones."""
    indices = np.asarray(indices, np.int64)
    examples = self.examples
    prompt_size, size = self.shapes.cover((self._prompt_lengths[indices].max(),
                                           self._completion_lengths[indices].max()))
    prompt_tokens, prompt_lengths = batching.pad_right(
        [examples.prompts[i] for i in indices], prompt_size, self._fill)
    which = [(i, g) for i in indices for g in range(examples.group_size)]
    tokens, _ = batching.pad_right(
        [examples.completions[i][g] for i, g in which], size, self._fill)
    loss_mask = stacked([examples.mask(i, g) for i, g in which], size)
    inputs = {name: flat(values[indices], examples.group_size)
              for name, values in examples.inputs.items()}
    for name, values in self._per_token.items():
      inputs[name] = stacked([values[i][g] for i, g in which], size)
    return types.TokenBatch(
        prompt_tokens=prompt_tokens, prompt_lengths=prompt_lengths, tokens=tokens,
        loss_mask=loss_mask, on_policy=np.bool_(False), inputs=inputs)

  def _choose_shapes(self):
    """Looks at the batches of the first epoch; all others must fit as well."""
    lengths = np.stack([self._prompt_lengths, self._completion_lengths], 1)  # [N, 2]
    size, group = self.order.batch_size, self.examples.group_size
    places = np.resize(self.order.permutation(0), self.order.steps_per_epoch * size)
    needs = lengths[places].reshape(-1, size, 2).max(1)  # [batches, 2]
    limits = self.examples.limits
    return batching.Shapes(
        np.concatenate([needs, lengths.max(0)[None]]), lambda s: s[..., 0] + group * s[..., 1],
        most=self._sizes, caps=(limits.max_prompt_tokens, limits.max_completion_tokens))


def grouped(examples, name, values):
  """Arranges N * G arrays [T] as N tuples of G, checked against the completions."""
  group = examples.group_size
  if len(values) != len(examples) * group:
    raise ValueError(f'{name}: {len(values)} arrays for {len(examples)} x {group} completions')
  values = [np.asarray(value) for value in values]
  for i, value in enumerate(values):
    expected = (len(examples.completions[i // group][i % group]),)
    if value.shape != expected:
      raise ValueError(f'{name}[{i}] has shape {value.shape}, its completion {expected}')
  return [tuple(values[i:i + group]) for i in range(0, len(values), group)]


def stacked(values, size):
  """Pads arrays [T] on the right with zeros (False): [B, size], of their own kind."""
  result = zeros(values[0], (len(values), size))
  for row, value in zip(result, values):
    row[:len(value)] = value
  return result


def zeros(like, shape):
  """Returns zeros of the kind of `like`, as devices have it: bool, int32 or float32."""
  dtype = {'b': bool, 'i': np.int32, 'u': np.int32}.get(like.dtype.kind, np.float32)
  return np.zeros(shape, dtype)


def flat(values, group_size):
  """[P] stays; [P, G] becomes [B]. Numbers are float32, int32 or bool."""
  if values.ndim == 2 and values.shape[1] == group_size:
    values = values.reshape(-1)
  kinds = {'f': np.float32, 'i': np.int32, 'u': np.int32}
  return values.astype(kinds.get(values.dtype.kind, values.dtype))
