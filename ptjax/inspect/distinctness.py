"""How far each two algorithms of the table point the same way, and which are meant to coincide."""

import jax
import numpy as np

from ptjax import algorithms
from ptjax.inspect import example
from ptjax.inspect import weights

# The sets of rows whose gradients have one direction on any batch, or on this one, and why.
SAME = (
    (('sft', 'cpt', 'seqkd', 'ssd', 'raft'), 'one loss on other text'),
    (('online_dpo', 'spin', 'dpo', 'tr_dpo'), 'one loss on other pairs or another reference'),
    (('rlhf', 'rlaif'), 'one loss on rewards from another judge'),
    (('dr_grpo', 'sft_then_grpo'), 'one loss after another start'),
    (('prm', 'math_shepherd'), 'one loss on labels from another source'),
    (('gspo', 'gspo_token'), 'equal while a sequence has one advantage'),
    (('bnpo', 'sgrpo'), 'another guard of the standard deviation, 1e-4 and 1e-8'),
    (('reinforce', 'gpg'), "times B / (B - M), M completions being in groups of equal rewards"),
    (('cdpo', 'robust_dpo_oxrl'), 'times 1 / (1 - 2 label_smoothing)'),
    (('drdpo', 'focalpo_oxrl'), 'the softmax of log σ(h) is σ(h) over its sum: times a constant'),
)


def directions(rows=None):
  """The gradient of each algorithm by all parameters of the built-in model, float64.

  Args:
    rows: {name: algorithms.Algorithm}, by default the whole table.
  Returns:
    The names, and [len(names), N] float64.
  """
  rows = algorithms.TABLE if rows is None else rows
  with jax.enable_x64(True):
    gradients = [example.pull_back(weights.inspect_loss(row, example.batch(row.loss)).gradients)
                 for row in rows.values()]
  return list(rows), np.stack(gradients)


def cosines(gradients):
  """[K, K] cosines between the rows of [K, N]; 0 for a row of zeros."""
  sizes = np.linalg.norm(gradients, axis=1, keepdims=True)
  unit = gradients / np.where(sizes > 0, sizes, 1.0)
  return unit @ unit.T
