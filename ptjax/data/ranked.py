"""The ranked door: prompts with several completions each, in order of preference."""

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import examples
from ptjax.data import formats

_NO_ORDER = 'without two completions of different rank'


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=()):
  """Reads and tokenises ranked completions.

  Args:
    rows: `sources.Rows` or a list of dicts, with `prompt` (text or messages), `completions` (a
      list) and as many numbers: `ranks`, of which smaller are better, or `scores`, of which larger
      are. Equal ones state no preference; a completion without one is left out.
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits; under `drop` a row with one completion that is too long goes whole.
    end_ids: ids that end a completion; None asks the tokenizer.
    want: names of further numeric columns that become inputs.
  Returns:
    Examples with K completions each, as many as the longest row has, and the input `ranks` [N, K]
    int32, from 0 for the best. Rows that have fewer are filled up with a completion of which no
    token trains, whose rank is -1.
  Raises:
    UserError: a missing column, a cell of the wrong kind, an overlong row under `error`, or nothing
      left.
  """
  reader = examples.Reader(rows, 'ranked', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows, column = reader.rows, reader.format[-1]
  questions, answers, ranks = [], [], []
  for i, row in enumerate(rows):
    texts, own = _ranked(row, column, reader.row_name(i))
    if len(set(own)) < 2:
      reader.drop(_NO_ORDER)
    elif reader.keep(i, row['prompt'], parts=('prompt',)):
      questions.append(row['prompt'])
      answers.append(texts)
      ranks.append(own)
  most = max(map(len, answers), default=1)
  _, prompts, completions = chat.groups(
      tokenizer, questions, answers, end_ids=reader.end_ids, where=reader.where)
  nothing = [reader.end_ids[0]]
  filled = [group + (nothing,) * (most - len(group)) for group in completions]
  masks = [tuple([g < len(own)] * len(ids) for g, ids in enumerate(group))
           for own, group in zip(ranks, filled)]
  return reader.admit(
      prompts, filled, names=('completion',) * most, masks=masks,
      inputs={'ranks': [own + [-1] * (most - len(own)) for own in ranks]})


def _ranked(row, column, where):
  """The completions of a row that have a rank, and their ranks from 0 for the best."""
  completions, values = row['completions'], row[column]
  if completions is None or values is None:
    return (), []
  for name, cell in (('completions', completions), (column, values)):
    if isinstance(cell, str) or not hasattr(cell, '__len__'):
      raise config.UserError(f'{where}: {name}: expected a list, found {cell!r}')
  if len(completions) != len(values):
    raise config.UserError(f'{where}: {len(completions)} completions, but {len(values)} {column}; '
                           'expected one each')
  sign = -1.0 if column == 'scores' else 1.0
  numbers = [sign * formats.number(value, f'{where}: {column}') for value in values]
  kept = [(text, number) for text, number in zip(completions, numbers)
          if text and not np.isnan(number)]
  order = sorted({number for _, number in kept})
  return tuple(text for text, _ in kept), [order.index(number) for _, number in kept]
