"""The unpaired door: completions with a label each, good or bad."""

import dataclasses

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import demonstrations
from ptjax.data import examples
from ptjax.data import formats


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=(), mismatched=False):
  """Reads and tokenises labelled completions.

  Args:
    rows: `sources.Rows` or a list of dicts, with `prompt` and `completion`, or `messages` (the last
      assistant turn is the completion), and `label`: true or false, 1 or 0.
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits.
    end_ids: ids that end a completion; None asks the tokenizer.
    want: names of further numeric columns that become inputs.
    mismatched: whether each prompt has a second completion, that of the next kept row (the first
      row's, for the last one): a fixed pairing, from which KTO estimates its reference point.
  Returns:
    Examples with one completion (or two) each and the input `labels`, [N] bool.
  Raises:
    UserError: a missing column, a cell of the wrong kind, an overlong row under `error`, nothing
      left, or labels of one kind only.
  """
  reader = examples.Reader(rows, 'unpaired', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows = reader.rows
  questions, answers, labels = [], [], []
  for i, row in enumerate(rows):
    label = formats.label(row['label'], f'{reader.row_name(i)}: label')
    question, answer = demonstrations.last_turn(row)
    if label is None:
      reader.drop('without a label')
    elif reader.keep(i, question, answer, parts=('prompt', 'completion')):
      questions.append(question)
      answers.append((answer,))
      labels.append(label)
  _, prompts, completions = chat.groups(
      tokenizer, questions, answers, end_ids=reader.end_ids, where=reader.where)
  found = reader.admit(prompts, completions, names=('completion',), inputs={'labels': labels})
  kinds = set(found.inputs['labels'].tolist())
  if len(kinds) == 1:
    raise config.UserError(f'{rows.name}: every completion that is left is labelled '
                           f'{str(kinds.pop()).lower()}; there must be both kinds ({found.intake})')
  if not mismatched:
    return found
  others = np.roll(np.arange(len(found)), -1)
  return dataclasses.replace(found, completions=[
      (own, found.completions[other][0]) for (own,), other in zip(found.completions, others)])
