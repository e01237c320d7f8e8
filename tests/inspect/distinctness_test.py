"""No two rows of the table push the same way by accident."""

import dataclasses

import numpy as np
import pytest

from ptjax import algorithms
from ptjax.inspect import distinctness
from ptjax.inspect import example

TWINS = 1e-9  # a cosine this close to 1 or -1 is no accident of the batch


def twins(names, matrix):
  """Pairs of names with a cosine within TWINS of 1 or -1."""
  places = np.argwhere(np.triu(np.abs(matrix) > 1.0 - TWINS, k=1))
  return [(names[i], names[j]) for i, j in places]


@pytest.mark.slow
def test_every_two_rows_are_distinct_or_declared_the_same(taken_apart):
  names = list(algorithms.TABLE)
  gradients = np.stack([example.pull_back(taken_apart(name).gradients) for name in names])
  idle = [name for name, gradient in zip(names, gradients) if not gradient.any()]
  assert not idle, f'no gradient on the built-in batch, so nothing is compared: {idle}'
  matrix = distinctness.cosines(gradients)
  declared = [set(same) for same, _ in distinctness.SAME]
  accidents = [pair for pair in twins(names, matrix)
               if not any(set(pair) <= same for same in declared)]
  assert not accidents, (f'the same direction: {accidents}; if that is meant, say why in '
                         'ptjax/inspect/distinctness.py')
  for same, _ in distinctness.SAME:
    at = [names.index(name) for name in same]
    assert matrix[np.ix_(at, at)].min() > 1 - TWINS, f'not the same after all: {same}'


def test_a_copy_of_a_row_is_found():
  dpo = algorithms.get('dpo')
  copy = dataclasses.replace(dpo, name='copy', defaults={'label_smoothing': 0.0})
  other = dataclasses.replace(dpo, name='other', defaults={'beta': 0.101})
  names, gradients = distinctness.directions({'dpo': dpo, 'copy': copy, 'other': other})
  assert twins(names, distinctness.cosines(gradients)) == [('dpo', 'copy')]
  opposed = distinctness.cosines(np.stack([gradients[0], -3.0 * gradients[0], 0 * gradients[0]]))
  assert twins('abc', opposed) == [('a', 'b')]


def test_the_list_names_rows_of_the_table():
  listed = [name for same, _ in distinctness.SAME for name in same]
  assert set(listed) <= set(algorithms.TABLE) and len(listed) == len(set(listed))
