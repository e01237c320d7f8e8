"""The column names people already have, and what to say when a door does not find its own.

A recognised format adds columns to a row; it removes none, so a reward function still sees every
column of the file by its name.
"""

import math
import re

import numpy as np

from ptjax import config
from ptjax.data import choices

_QUESTION_PAIRS = (('answer_matching_behavior', 'answer_not_matching_behavior'),
                   ('response_j', 'response_k'))
_NUMBER = re.compile(r'-?\d[\d,]*(\.\d+)?')
# Door -> the sets of columns of which it needs one.
FORMATS = {
    'prompts': (('prompt',), ('messages',)),
    'demonstrations': (('prompt', 'completion'), ('messages',)),
    'preferences': (('chosen', 'rejected'),),
    'unpaired': (('prompt', 'completion', 'label'), ('messages', 'label')),
    'stepwise': (('prompt', 'completions', 'labels'),),
    'ranked': (('prompt', 'completions', 'ranks'), ('prompt', 'completions', 'scores')),
    'text': (('text',), ('prompt', 'completion')),
}
_DOORS = {'unpaired': 'labelled completions', 'stepwise': 'labelled steps', 'text': 'texts',
          'ranked': 'ranked completions'}
# Where people keep a prompt or a completion under another name: for the hint in an error.
_ALIASES = {
    'prompt': ('question', 'query', 'problem', 'instruction', 'input', 'text', 'conversations',
               'sentence1'),
    'completion': ('answer', 'output', 'response', 'solution', 'target', 'text'),
    'chosen': ('preferred', 'winner', 'response_chosen'),
    'rejected': ('dispreferred', 'loser', 'response_rejected'),
    'completions': ('steps',),
    'labels': ('ratings',),
    'label': ('labels', 'is_desirable', 'rating'),
    'text': ('content', 'document'),
}
_SCORES = {'reward', 'score'}
# The words that people have for a label.
_LABELS = {'true': True, '1': True, '1.0': True, 'yes': True,
           'false': False, '0': False, '0.0': False, 'no': False}


def recognise(columns):
  """Returns how to make our columns from those of a known format.

  GSM8K: `question` becomes `prompt`, the worked `answer` becomes `completion`, and `answer` is
  what stands behind `####`, without thousands separators. Alpaca: `prompt` is `instruction`, a
  blank line and `input`, if there is any; `completion` is `output`. ShareGPT: `conversations` are
  `messages`, or, beside `chosen` and `rejected`, the `prompt`. Behaviour evaluations: `question`,
  with `answer_matching_behavior` as `chosen` and `answer_not_matching_behavior` as `rejected`.
  Ranked answers: `question`, with `response_j` as `chosen` and `response_k` as `rejected`. MATH:
  `problem` becomes `prompt`, the worked `solution` `completion`, and, without an `answer` of its
  own, `answer` too. Step-DPO: `initial_reason_steps` beside a pair becomes `prefix`. Answers to
  choose from: see `choices`.

  Args:
    columns: names present.
  Returns:
    Dict of column name -> function of a row; empty where nothing is recognised.
  """
  columns = set(columns)
  with_choices = choices.recognise(columns)
  if with_choices:
    return with_choices
  if {'prompt', 'chosen', 'rejected', 'initial_reason_steps'} <= columns:
    return {'prefix': _cell('initial_reason_steps')}
  if columns & {'prompt', 'messages'}:
    return {}
  if 'problem' in columns and columns & {'solution', 'answer'}:
    # The maths rewards take the answer out of a solution's last box.
    answer = _cell('answer' if 'answer' in columns else 'solution')
    worked = {'completion': _cell('solution')} if 'solution' in columns else {}
    return {'prompt': _cell('problem'), **worked, 'answer': answer}
  for chosen, rejected in _QUESTION_PAIRS:
    if {'question', chosen, rejected} <= columns:
      return {'prompt': _cell('question'), 'chosen': _cell(chosen), 'rejected': _cell(rejected)}
  if {'question', 'answer'} <= columns:
    return {'prompt': _cell('question'), 'completion': _cell('answer'), 'answer': _final_answer}
  if {'instruction', 'output'} <= columns:
    return {'prompt': _instruction, 'completion': _cell('output')}
  if 'conversations' in columns:
    return {'prompt' if {'chosen', 'rejected'} <= columns else 'messages': _cell('conversations')}
  return {}


def flatten(rows):
  """Unfolds Self-Instruct's `instances` (a list of input and output) into one row each.

  Args:
    rows: list of dicts.
  Returns:
    The rows themselves where there is nothing to unfold.
  """
  def folded(row):
    return (isinstance(row.get('instances'), list) and 'instruction' in row
            and all(isinstance(instance, dict) for instance in row['instances']))
  if not rows or not all(folded(row) for row in rows):
    return rows
  return [{**{k: v for k, v in row.items() if k != 'instances'}, **instance}
          for row in rows for instance in row['instances']]


def mapping(columns, wanted, name):
  """Returns the user's column mapping as functions of a row.

  Args:
    columns: names present.
    wanted: dict of our name -> the data set's name.
    name: of the data set, for errors.
  Raises:
    UserError: a mapping from a column that is not there.
  """
  for ours, theirs in wanted.items():
    if theirs not in columns:
      raise config.UserError(f'data.columns.{ours}={theirs}: {name} has no column {theirs!r}'
                             + config.near_names(theirs, columns))
  return {ours: _cell(theirs) for ours, theirs in wanted.items()}


def fits(rows, door):
  """Returns whether a data set has the columns a door needs."""
  return any(set(names) <= set(rows.columns) for names in FORMATS[door])


def require(rows, door):
  """Checks that a data set has the columns a door needs.

  Args:
    rows: `sources.Rows`.
    door: a key of FORMATS.
  Returns:
    The first of the door's formats that is there in full.
  Raises:
    UserError: none is; says what was expected, what was found and how to map it.
  """
  alternatives = FORMATS[door]
  for names in alternatives:
    if set(names) <= set(rows.columns):
      return names
  expected = ' or '.join(' and '.join(f'{name!r}' for name in names) for names in alternatives)
  missing = [name for name in alternatives[0] if name not in rows.columns]
  hints = []
  for name in missing:
    known = [alias for alias in _ALIASES.get(name, ()) if alias in rows.columns]
    hints.append(f'--set data.columns.{name}={known[0] if known else "<your column>"}')
  remedy = f'map yours with {" ".join(hints)}'
  if door == 'preferences' and 'prompt' in rows.columns and _SCORES & set(rows.columns):
    remedy = ('scored completions become pairs with scripts/make_preferences.py --pairs=scored '
              f'--dataset={rows.name} --out=pairs.jsonl')
  raise config.UserError(
      f'{rows.name}: {_DOORS.get(door, door)} need the columns {expected}; found '
      f'{", ".join(repr(name) for name in rows.columns) or "none"}; {remedy}')


def number_column(rows, name):
  """Finds the column that holds `name`: `margins` may also be called `margin`, and
  `chosen_scores` `chosen_score` or `score_chosen`.

  Raises:
    UserError: there is none.
  """
  words = name.split('_')
  singular = '_'.join(words)[:-1] if name.endswith('s') else name
  if name.endswith('ies'):
    singular = name[:-3] + 'y'
  swapped = '_'.join(reversed(singular.split('_')))
  for candidate in (name, singular, swapped):
    if candidate in rows.columns:
      return candidate
  raise config.UserError(
      f'{rows.name}: the loss needs the column {name!r}; found '
      f'{", ".join(map(repr, rows.columns))}; map yours with --set data.columns.{name}='
      '<your column>')


def numbers(rows, wanted):
  """Reads the numeric columns that a loss asks for.

  Args:
    rows: `sources.Rows`.
    wanted: names of arrays.
  Returns:
    Dict of name -> [rows] float64; NaN where a cell is empty or holds no finite number.
  Raises:
    UserError: no such column, or a cell that is no number.
  """
  columns = {name: number_column(rows, name) for name in wanted}
  if not columns:
    return {}
  values = {name: np.full(len(rows), np.nan) for name in wanted}
  for place, row in enumerate(rows):
    for name, column in columns.items():
      values[name][place] = number(row[column], f'{rows.where(place)}: {column}')
  return values


def number(cell, where):
  """Reads a number; NaN where the cell is empty or holds no finite one.

  Raises:
    UserError: a cell that is no number.
  """
  if cell is None or cell == '':
    return math.nan
  try:
    value = float(cell)
  except (TypeError, ValueError):
    raise config.UserError(f'{where}: expected a number, found {cell!r}') from None
  return value if math.isfinite(value) else math.nan


def label(cell, where):
  """Reads a truth value: true, false, 1, 0 or those words; None where the cell is empty.

  Raises:
    UserError: anything else.
  """
  if cell is None or cell == '':
    return None
  found = _LABELS.get(str(cell).strip().lower())
  if found is None:
    raise config.UserError(f'{where}: expected true or false (1 or 0), found {cell!r}')
  return found


def _cell(name):
  return lambda row: row[name]


def _instruction(row):
  if not isinstance(row['instruction'], str) or not row.get('input'):
    return row['instruction']
  return f"{row['instruction']}\n\n{row['input']}"


def _final_answer(row):
  answer = row['answer']
  if not isinstance(answer, str) or '####' not in answer:
    return answer
  final = answer.rpartition('####')[2].strip()
  return final.replace(',', '') if _NUMBER.fullmatch(final) else final
