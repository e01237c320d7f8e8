"""The text door: documents, every token of which is to be predicted."""

import dataclasses

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import examples
from ptjax.data import intake

_DEFAULT_TOKENS = 1024


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=(), tokens=None):
  """Reads and tokenises documents.

  A document begins as the tokenizer begins texts and ends with an end token. A longer one is cut
  into pieces of at most L tokens; a piece begins with the last token of the one before, so that
  every token of a document but its first is a target exactly once.

  Args:
    rows: `sources.Rows` or a list of dicts, with `text`; or `prompt` and `completion`, texts that
      make up the document.
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits; nothing is dropped or truncated for its length.
    end_ids: ids that end a text; None asks the tokenizer.
    want: names of numeric columns that become inputs.
    tokens: L, tokens of a piece; None: the limits of prompt and completion together, or 1024.
  Returns:
    Examples whose prompt is a piece's first token and whose completion is the rest.
  Raises:
    UserError: no column `text`, a cell that is no text, or nothing left.
  """
  reader = examples.Reader(rows, 'text', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows, names = reader.rows, reader.format
  if tokens is None:
    both = (limits.max_prompt_tokens, limits.max_completion_tokens)
    tokens = _DEFAULT_TOKENS if None in both else sum(both)
  texts = []
  for i, row in enumerate(rows):
    cells = [row[name] for name in names if row[name] is not None]
    for cell in cells:
      if not isinstance(cell, str):
        raise config.UserError(f'{reader.row_name(i)}: expected text, not {type(cell).__name__}')
    if reader.keep(i, ''.join(cells), parts=('text',)):
      texts.append(''.join(cells))
  documents = [np.array(chat.end(ids, reader.end_ids, cut=False), np.int32)
               for ids in chat.encode(tokenizer, texts, [True] * len(texts))]
  pieces, owners = [], []
  for row_id, document in zip(reader.kept, documents):
    for start in range(0, len(document) - 1, tokens - 1):
      pieces.append(document[start:start + tokens])
      owners.append(row_id)
  summary = intake.Intake(rows=len(rows), kept=len(set(owners)), truncated=0,
                          dropped=dict(reader.dropped), pieces=len(pieces))
  if not pieces:
    raise intake.NothingLeft(f'{rows.name}: nothing left to train on: {summary}')
  return examples.Examples(
      prompts=[piece[:1] for piece in pieces], completions=[(piece[1:],) for piece in pieces],
      row_ids=owners, intake=summary, inputs=reader.numbers(owners),
      limits=dataclasses.replace(limits, max_prompt_tokens=None, max_completion_tokens=None),
      mixture=None if rows.mixture is None else rows.mixture.take(owners))
