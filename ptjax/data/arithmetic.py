"""The built-in task: sums modulo 10, with no file, no network and a checkable answer.

Train and test rows never share a problem: a hash of the problem itself says which side it is on,
whatever the seed, and `3+5` and `5+3` count as one problem.
"""

import dataclasses

import numpy as np

from ptjax import config

ALPHABET = '0123456789+-*='  # every character of its prompts and answers
SPLITS = ('train', 'test')
_OPERATIONS = {'+': np.add, '-': np.subtract, '*': np.multiply}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
  """How hard the task is."""
  max_operand: int = 99  # operands are 0..max_operand
  modulus: int = 10  # the answer is the result modulo this; 0 for the result itself
  operations: str = '+'  # any of + - *, each equally often
  careless: float = 0.0  # fraction of demonstrations that are one too high
  test_fraction: float = 0.1  # of the problems, kept for evaluation

  def __post_init__(self):
    if not 1 <= self.max_operand <= 999:
      raise config.UserError(f'arithmetic: max_operand={self.max_operand} must lie in 1..999')
    if self.modulus != 0 and self.modulus < 2:
      raise config.UserError(
          f'arithmetic: modulus={self.modulus}: expected at least 2, or 0 for none')
    if not self.operations or set(self.operations) - set(_OPERATIONS):
      raise config.UserError(f'arithmetic: operations={self.operations!r}: expected some of '
                             f'{" ".join(_OPERATIONS)}, e.g. +-')
    if not 0 <= self.careless <= 1:
      raise config.UserError(f'arithmetic: careless={self.careless} must lie between 0 and 1')
    if not 0 < self.test_fraction < 1:
      raise config.UserError(
          f'arithmetic: test_fraction={self.test_fraction} must lie between 0 and 1')


def rows(split='train', *, seed=0, count=None, settings=Arithmetic()):
  """Makes the task's rows.

  Args:
    split: `train` or `test`.
    seed: picks and orders the rows; which problems belong to the split does not depend on it.
    count: rows at most; None for every problem of the split.
    settings: the difficulty.
  Returns:
    List of dicts of text: `prompt` ('37+48='), `answer` ('5', modulo 10) and `completion` (the
    demonstration, which is the answer but where the teacher was careless).
  Raises:
    UserError: a split of another name.
  """
  if split not in SPLITS:
    raise config.UserError(f'arithmetic has no split {split!r}' + config.near_names(split, SPLITS))
  signs = sorted(set(settings.operations))
  side = settings.max_operand + 1
  operation, left, right = np.unravel_index(
      np.arange(len(signs) * side * side), (len(signs), side, side))
  # The operation enters by its character, so adding another one moves no problem across.
  characters = np.array([ord(sign) for sign in signs])[operation]
  test = _hash(characters, left, right) < settings.test_fraction
  chosen = np.flatnonzero(test if split == 'test' else ~test)
  rng = np.random.default_rng([seed % 2**63, SPLITS.index(split)])
  chosen = rng.permutation(chosen)[:count]
  slips = rng.random(len(chosen)) < settings.careless
  return [_row(signs[operation[i]], int(left[i]), int(right[i]), settings.modulus, int(slip))
          for i, slip in zip(chosen, slips)]


def _row(sign, left, right, modulus, slip):
  result = int(_OPERATIONS[sign](left, right))
  answer, shown = (str(r % modulus if modulus else r) for r in (result, result + slip))
  return {'prompt': f'{left}{sign}{right}=', 'answer': answer, 'completion': shown}


def _hash(characters, left, right):
  """Maps problems to [0, 1); the order of the operands does not matter."""
  low, high = np.minimum(left, right), np.maximum(left, right)
  x = (characters.astype(np.uint64) << np.uint64(40)) | (
      low.astype(np.uint64) << np.uint64(20)) | high.astype(np.uint64)
  # The finalizer of splitmix64 (Steele, Lea and Flood, 2014); products wrap around on purpose.
  x += np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
