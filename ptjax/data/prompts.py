"""The prompt door: rows in, the prompts of each rollout out."""

import dataclasses
import functools
from typing import Any

import numpy as np

from ptjax.data import batching
from ptjax.data import chat
from ptjax.data import formats
from ptjax.data import intake
from ptjax.data import order
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

# A reward function has these as arguments of its own.
_NOT_COLUMNS = ('prompt', 'prompts', 'completions')


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """The prompts of one rollout, on the host."""
  tokens: Any  # [P, S] int32, padded on the right to a bucket
  lengths: Any  # [P] int32
  ids: Any  # [P] int32; rows of the data set
  sample_ids: Any  # [P, G] int32; a prompt that comes twice in a batch goes on counting
  prompts: list  # P texts or message lists, as the data set has them
  texts: list  # P texts as the model sees them: templates rendered, overlong prompts cut
  columns: dict  # name -> P cells; every column but the prompt, for the reward functions
  demonstrations: list | None = None  # P id arrays, where the door was given some

  def take(self, places):
    """Returns the batch of some of its prompts, in the same shapes but for P."""
    def pick(values):
      return [values[i] for i in places] if isinstance(values, list) else values[places]
    return dataclasses.replace(
        self, columns={name: pick(values) for name, values in self.columns.items()},
        **{field.name: pick(getattr(self, field.name)) for field in dataclasses.fields(self)
           if field.name != 'columns' and getattr(self, field.name) is not None})


class PromptDoor:
  """Prompts, tokenised once, in an order that depends on the seed alone.

  `batch` is a pure function of the step, so the step is all that a checkpoint must hold.
  `intake` counts what was dropped and truncated.
  """

  def __init__(self, rows, tokenizer, *, num_prompts, group_size=1, max_prompt_tokens=None,
               overlong='drop', seed=0, demonstrations=None):
    """Reads and tokenises every row.

    Args:
      rows: `sources.Rows` or a list of dicts, with `prompt` (text or messages) or `messages`
        (whose closing assistant turn, if any, is left out).
      tokenizer: a Hugging Face tokenizer.
      num_prompts: P, prompts per batch; may exceed the number of rows, which then repeat.
      group_size: G, completions per prompt.
      max_prompt_tokens: longest prompt, None for no limit.
      overlong: what becomes of a longer one: `drop`, `truncate` (its left end goes) or `error`.
      seed: of the order; None keeps the order of the rows.
      demonstrations: None, or the ids of a completion for every row, to go along with its prompt.
    Raises:
      UserError: a missing column, a prompt that is neither text nor messages, messages without a
        chat template, an overlong prompt under `error`, or no prompt left.
    """
    rows = sources.as_rows(rows)
    self._rows = rows
    self._column, = formats.require(rows, 'prompts')
    self._group_size = group_size
    self._demonstrations = demonstrations
    self._limit = max_prompt_tokens
    self._fill = tokenizers.pad_id(tokenizer)
    values = [_question(row[self._column]) if self._column == 'messages' else row[self._column]
              for row in rows]
    present = [i for i, value in enumerate(values) if value not in (None, '', [])]
    where = lambda place: rows.where(present[place])
    texts, ids = chat.prompts(tokenizer, [values[i] for i in present], where=where)
    part = intake.Part(what='prompt', tokens=ids, limit=max_prompt_tokens, keep='right',
                       setting='data.max_prompt_tokens', bos=tokenizer.bos_token_id)
    kept, (self._tokens,), self.intake = intake.admit(
        (part,), overlong=overlong, name=rows.name, where=where,
        dropped={intake.empty('prompt'): len(values) - len(present)})
    self._row_ids = [present[i] for i in kept]
    self._prompts = [values[i] for i in self._row_ids]
    self._texts = [texts[i] if len(tokens) == len(ids[i]) else tokenizer.decode(tokens)
                   for i, tokens in zip(kept, self._tokens)]
    mixture = None if rows.mixture is None else rows.mixture.take(self._row_ids)
    self._order = functools.cache(
        lambda name: order.Order(len(kept), num_prompts, seed, name, mixture=mixture))
    self.order = self._order('prompts')

  def __len__(self):
    return len(self._tokens)

  @property
  def steps_per_epoch(self):
    """Steps after which every prompt has come at least once."""
    return self.order.steps_per_epoch

  def epoch(self, step):
    """Returns how often the prompts have been passed when `step` begins, with its fraction."""
    return self.order.epoch(step)

  def batch(self, step):
    """Returns the `PromptBatch` of a step."""
    return self.take(self.order.indices(step))

  def widest(self):
    """Returns a `PromptBatch` as wide as any: with the longest prompt and demonstration."""
    places = np.argsort([-len(tokens) for tokens in self._tokens], kind='stable')
    places = np.resize(places, self.order.batch_size)
    if self._demonstrations is not None and len(places) > 1:
      places[-1] = np.argmax([len(self._demonstrations[i]) for i in self._row_ids])
    return self.take(places)

  def spare(self, step, turn):
    """Returns further places for `take`, num_prompts of them, in an order of each turn's own."""
    return self._order(f'spare prompts {turn}').indices(step)

  def take(self, indices):
    """Returns the `PromptBatch` of chosen prompts.

    Args:
      indices: places among the kept prompts, 0..len(self)-1.
    """
    indices = [int(i) for i in indices]
    sequences = [self._tokens[i] for i in indices]
    size = batching.bucket(max(map(len, sequences)), self._limit)
    tokens, lengths = batching.pad_right(sequences, size, self._fill)
    row_ids = [self._row_ids[i] for i in indices]
    rows = [self._rows[i] for i in row_ids]
    first = order.occurrences(indices) * self._group_size  # [P]
    names = [name for name in self._rows.columns if name not in _NOT_COLUMNS]
    return PromptBatch(
        tokens=tokens, lengths=lengths, ids=np.array(row_ids, np.int32),
        sample_ids=first[:, None] + np.arange(self._group_size, dtype=np.int32)[None],
        prompts=[self._prompts[i] for i in indices], texts=[self._texts[i] for i in indices],
        columns={name: [row[name] for row in rows] for name in names},
        demonstrations=None if self._demonstrations is None else [
            self._demonstrations[i] for i in row_ids])


def _question(value):
  """Leaves out the answer that closes a conversation."""
  conversation = chat.messages(value)
  while conversation and conversation[-1]['role'] == 'assistant':
    conversation = conversation[:-1]
  return value if conversation is None else conversation
