"""Several data sets as one: `a.jsonl*0.7 + b.jsonl*0.3`."""

import re

import numpy as np

from ptjax import config
from ptjax.data import order

_PLUS = re.compile(r'\s+\+\s+')
_PART = re.compile(r'(?P<name>.*?)\s*(?:\*\s*(?P<weight>\d[\d.]*(?:e-?\d+)?))?', re.DOTALL)


def parse(name):
  """Takes a data set's name apart.

  Args:
    name: one name, or several with ` + ` between them (the spaces tell it from the plus of
      `arithmetic:operations=+-`), each with an optional `*weight`.
  Returns:
    List of (name, weight); the weight is None where none is given.
  Raises:
    UserError: a weight that is not positive, or a part without a name.
  """
  parts = []
  for part in _PLUS.split(name.strip()):
    match = _PART.fullmatch(part)
    weight = None if match['weight'] is None else float(match['weight'])
    if not match['name']:
      raise config.UserError(f'{name}: a data set without a name; expected e.g. '
                             '"a.jsonl*0.7 + b.jsonl*0.3"')
    if weight is not None and not weight > 0:
      raise config.UserError(f'{name}: the weight of {match["name"]} must be positive')
    parts.append((match['name'], weight))
  return parts


def mixture(parts, weights):
  """Returns the `order.Mixture` of data sets, None where they are simply put together.

  Args:
    parts: list of sequences of rows.
    weights: their weights; None counts as 1 beside others, and where all are None, every row of
      every data set comes once per epoch.
  """
  if len(parts) < 2 or all(weight is None for weight in weights):
    return None
  return order.Mixture(np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
                       tuple(1.0 if weight is None else weight for weight in weights))


class Joined:
  """The rows of several data sets one behind the other, with the columns of all."""

  def __init__(self, parts):
    """Joins `sources.Rows`; a column that a data set does not have is None in its rows."""
    self._parts = parts
    self._ends = np.cumsum([len(part) for part in parts])
    self.column_names = list(dict.fromkeys(name for part in parts for name in part.columns))

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    part, place = self._find(index)
    return self._parts[part][place]

  def __iter__(self):
    for part in self._parts:
      yield from part

  def where(self, index):
    """Names a row as its own data set does."""
    part, place = self._find(index)
    return self._parts[part].where(place)

  def _find(self, index):
    index = range(len(self))[index]
    part = int(np.searchsorted(self._ends, index, side='right'))
    return part, index - int(self._ends[part - 1] if part else 0)
