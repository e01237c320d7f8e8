"""The table of algorithms, printed: for a terminal and as JSON."""

import json
import textwrap

from ptjax import algorithms
from ptjax.losses import modifiers


def as_json():
  """Returns the table as JSON, one object per row."""
  return json.dumps([_as_dict(row) for row in algorithms.TABLE.values()], indent=2)


def _as_dict(row):
  function_name = lambda f: None if f is None else f'{f.__module__}.{f.__name__}'
  return {
      'name': row.name, 'family': row.family, 'door': row.door, 'models': list(row.models),
      'loss': function_name(row.loss), 'advantage': function_name(row.advantage),
      'divergence': function_name(row.divergence),
      'hyperparameters': row.hyperparameters(), 'source': _title(row),
      'tested_against': row.tested_against, 'data': row.data}


def _title(row):
  return f'arXiv:{row.source}' if row.source[:4].isdigit() else row.source


def as_text():
  """Returns the table for a terminal, aligned columns."""
  header = ('name', 'family', 'data', 'models', 'source')
  lines = [header] + [
      (row.name, row.family, row.door, ', '.join(row.models) or '-', _title(row))
      for row in algorithms.TABLE.values()]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
  text = '\n'.join(
      '  '.join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[-1]])
      for line in lines)
  notes = (f'modifiers, as in grpo+tis: {", ".join(modifiers.MODIFIERS)}; reward_kl',
           f'advantages, as in grpo+batch_normalized: {", ".join(algorithms.ADVANTAGES)}')
  return '\n'.join([text, '', *(
      line for note in notes for line in textwrap.wrap(note, 100, subsequent_indent='  '))])
