"""The demonstration door: prompts with the completions to imitate, as training batches."""

import numpy as np

from ptjax import types
from ptjax.data import batching
from ptjax.data import chat
from ptjax.data import formats
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

FORMATS = (('prompt', 'completion'), ('messages',))


class DemonstrationDoor:
  """Demonstrations, tokenised once, in an order that depends on the seed alone.

  `batch` is a pure function of the step. `intake` counts what was dropped and truncated, and
  `row_ids` says which of the data set's rows were kept.
  """

  def __init__(self, rows, tokenizer, *, batch_size, max_prompt_tokens=None,
               max_completion_tokens=None, overlong='drop', seed=0, end_ids=None):
    """Reads and tokenises every row.

    Args:
      rows: `sources.Rows` or a list of dicts, with `prompt` and `completion`, or `messages`, of
        which the last assistant turn is the completion and what stands before it the prompt.
      tokenizer: a Hugging Face tokenizer.
      batch_size: B, demonstrations per batch.
      max_prompt_tokens: longest prompt, None for no limit.
      max_completion_tokens: longest completion with its end token, None for no limit.
      overlong: what becomes of a longer one: `drop`, `truncate` or `error`. A prompt loses its
        left end. A completion loses its right end and with it the end token: where the text
        was cut, stopping is not taught.
      seed: of the order; None keeps the order of the rows.
      end_ids: ids that end a completion; None asks the tokenizer.
    Raises:
      UserError: a missing column, a cell of the wrong kind, messages without a chat template, an
        overlong row under `error`, a tokenizer without an end token, or no row left.
    """
    rows = sources.as_rows(rows)
    names = formats.require(rows, FORMATS, 'demonstrations')
    end_ids = tokenizers.eos_ids(tokenizer) if end_ids is None else tuple(end_ids)
    values = [_split(row['messages']) if names == ('messages',)
              else (row['prompt'], row['completion']) for row in rows]
    present = [i for i, pair in enumerate(values) if all(pair)]
    _, prompts, completions = chat.pairs(
        tokenizer, [values[i][0] for i in present], [values[i][1] for i in present],
        end_ids=end_ids, where=lambda place: f'{rows.name}, row {present[place] + 1}')
    prompt = batching.Part(what='prompt', tokens=prompts, limit=max_prompt_tokens, keep='right',
                           setting='data.max_prompt_tokens', bos=tokenizer.bos_token_id)
    completion = batching.Part(what='completion', tokens=completions, keep='left',
                               limit=max_completion_tokens,
                               setting='rollout.max_completion_tokens')
    kept, (self._prompts, self._completions), self.intake = batching.admit(
        (prompt, completion), overlong=overlong, name=rows.name, row_ids=present,
        missing=len(values) - len(present))
    self.row_ids = [present[i] for i in kept]
    self._limits = max_prompt_tokens, max_completion_tokens
    self._fill = tokenizers.pad_id(tokenizer)
    self.order = batching.Order(len(kept), batch_size, seed, 'demonstrations')

  def __len__(self):
    return len(self._prompts)

  @property
  def steps_per_epoch(self):
    """Steps after which every demonstration has come at least once."""
    return self.order.steps_per_epoch

  def epoch(self, step):
    """Returns how often the rows have been passed when `step` begins, with its fraction."""
    return self.order.epoch(step)

  def batch(self, step):
    """Returns the batch of a step: a `types.TokenBatch` of NumPy arrays, one prompt each."""
    return self.take(self.order.indices(step))

  def take(self, indices):
    """Returns the batch of chosen demonstrations, places among the kept ones."""
    prompts = [self._prompts[int(i)] for i in indices]
    completions = [self._completions[int(i)] for i in indices]
    prompt_size = batching.bucket(max(map(len, prompts)), self._limits[0])
    size = batching.bucket(max(map(len, completions)), self._limits[1])
    prompt_tokens, prompt_lengths = batching.pad_right(prompts, prompt_size, self._fill)
    tokens, lengths = batching.pad_right(completions, size, self._fill)
    return types.TokenBatch(
        prompt_tokens=prompt_tokens, prompt_lengths=prompt_lengths, tokens=tokens,
        loss_mask=np.arange(size)[None] < lengths[:, None],  # [B, T]; by length, not by id
        on_policy=np.bool_(False), inputs={})


def _split(value):
  """Splits a conversation at its last assistant turn; (None, None) where there is none."""
  conversation = chat.messages(value)
  if conversation is None:
    return value, value  # not messages: the encoder says so, with the row
  for i in reversed(range(len(conversation))):
    if conversation[i]['role'] == 'assistant':
      return conversation[:i], conversation[i:i + 1]
  return None, None
