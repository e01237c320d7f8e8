"""The stepwise door: solutions in steps with a label each, for process reward models."""

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import examples
from ptjax.data import formats


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=(), separator='\n'):
  """Reads and tokenises labelled steps.

  A completion is its steps, each with the separator behind it; the step's label stands at the last
  token of that, so that judging a step always happens at the same kind of token. Steps are encoded
  one by one, as TRL does.

  Args:
    rows: `sources.Rows` or a list of dicts, with `prompt` (text or messages), `completions` (a list
      of texts, the steps) and `labels` (as many: true or false, or numbers in [0, 1], such as the
      fraction of continuations that succeed).
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits; a solution that is cut loses its last steps.
    end_ids: ids that end a completion; None asks the tokenizer. A solution gets none.
    want: names of further numeric columns that become inputs.
    separator: text behind each step.
  Returns:
    Examples with one completion each and the per-token inputs `step_labels` (float32) and
    `step_mask` (bool, True at the token that ends a step).
  Raises:
    UserError: a missing column, a cell of the wrong kind, an overlong row under `error`, nothing
      left, or labels of one kind only.
  """
  reader = examples.Reader(rows, 'stepwise', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows = reader.rows
  questions, solutions, labels = [], [], []
  for i, row in enumerate(rows):
    steps, own = _steps(row, reader.row_name(i))
    if reader.keep(i, row['prompt'], steps, parts=('prompt', 'completion')):
      questions.append(row['prompt'])
      solutions.append(steps)
      labels.append(own)
  _, prompts = chat.prompts(tokenizer, questions, where=reader.where)
  completions, step_labels, step_masks = [], [], []
  for (completion, ends), own in zip(encode(tokenizer, solutions, separator), labels):
    completions.append((completion,))
    step_masks.append(([step >= 0 for step in ends],))
    step_labels.append(([own[step] if step >= 0 else 0.0 for step in ends],))
  found = reader.admit(
      prompts, completions, names=('completion',),
      per_token={'step_labels': (step_labels, np.float32), 'step_mask': (step_masks, bool)},
      refuse=lambda place, group: None if any(step_masks[place][0][:len(group[0])])
      else 'with no step left')
  kinds = {float(value) for (mask,), (values,) in zip(
      found.per_token['step_mask'], found.per_token['step_labels']) for value in values[mask]}
  if len(kinds) == 1:
    raise config.UserError(f'{rows.name}: every step that is left is labelled {kinds.pop():g}; '
                           f'there must be good ones and bad ones ({found.intake})')
  return found


def encode(tokenizer, solutions, separator='\n'):
  """Encodes solutions in steps.

  Args:
    tokenizer: a Hugging Face tokenizer.
    solutions: lists of texts, the steps.
    separator: text behind each step.
  Returns:
    Per solution its ids and, as many, the number of the step that ends with the token, or -1.
  """
  ids = iter(chat.continuations(tokenizer, [step for steps in solutions for step in steps]))
  between = chat.continuation_ids(tokenizer, separator)
  found = []
  for steps in solutions:
    completion, ends = [], []
    for number in range(len(steps)):
      step = next(ids) + between
      completion += step
      ends += ([-1] * (len(step) - 1) + [number])[:len(step)]
    found.append((completion, ends))
  return found


def _steps(row, where):
  """The steps of a row and their labels as numbers in [0, 1]."""
  steps, labels = row['completions'], row['labels']
  if steps is None or labels is None:
    return [], []
  if isinstance(steps, str) or not all(isinstance(step, str) for step in steps):
    raise config.UserError(f'{where}: completions: expected a list of texts, one per step')
  if isinstance(labels, str) or len(labels) != len(steps):
    count = 'no list' if isinstance(labels, str) else len(labels)
    raise config.UserError(f'{where}: {len(steps)} steps in completions, but {count} in labels; '
                           'expected one label per step')
  values = []
  for label in labels:
    if isinstance(label, float) and 0.0 <= label <= 1.0:
      values.append(label)
    else:
      value = formats.label(label, f'{where}: labels')
      if value is None:
        raise config.UserError(f'{where}: labels: a step without a label')
      values.append(float(value))
  return list(steps), values
