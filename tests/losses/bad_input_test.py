"""What every row of the table, and every modifier, says of input that cannot be right.

Losses are traced, not run: all these errors come before a compilation. A clear one is a ValueError
that we raise, which says what came and what was expected; JAX's own speak of broadcasting.
"""

import dataclasses
import functools
import inspect
import pathlib
import traceback

import chex
import jax
import numpy as np
import pytest

from ptjax import algorithms
from ptjax.inspect import bound as bounds
from ptjax.inspect import example
from ptjax.losses import modifiers

NAMES = (*algorithms.TABLE, *(f'grpo+{name}' for name in modifiers.MODIFIERS))
every_row = pytest.mark.parametrize('name', NAMES)

OURS = tuple(str(pathlib.Path(module.__file__).parent) for module in (algorithms, chex))
SOFT = {'step_labels'}  # may be probabilities, and so numbers
# Numbers below 0 that mean something, or that the loss at its defaults does not read.
SIGNED = {
    **dict.fromkeys(('reward_threshold', 'success_threshold', 'threshold', 'covariance_low',
                     'covariance_high', 'margin', 'margin_per_beta'),
                    'compared with, or added to, what has a sign'),
    'alpha': {name: 'a power of the probability, which may be negative'
              for name in ('alphapo', 'alphapo_oxrl')} | {
                  'fdpo': 'of one variant, which is not the default'},
    'max_ratio': {'ppo': 'None, the default, switches it off; tested for ppo_dual_clip'},
    'shaping': {'hpt_soft': 'of off-policy rows, of which its gate makes none'},
    'student_fraction': {'gkd': 'read between steps; tests/losses/distillation_test.py'},
    'reference_mixup': {'tr_dpo': 'read between steps; tests/pieces/following_test.py'},
    'reference_sync_steps': {'tr_dpo': 'read between steps; tests/pieces/following_test.py'}}


def batch_for(row):
  return {'key': jax.random.key(0), **example.batch(row.loss)}


@functools.lru_cache(None)
def bound_row(name):
  """The row's loss on the batch; a divergence is an array like others, as a head hands it in."""
  row = algorithms.get(name)
  bound = bounds.bind(row, batch_for(row), {})
  outputs = {n: x for n, x in bound.outputs.items() if n != 'logits'}
  return dataclasses.replace(bound, divergence=None, outputs=outputs)


def traced(bound, arguments=None, outputs=None):
  """Traces a loss whose arguments, or outputs of the model, are these."""
  bound = dataclasses.replace(bound, arguments=bound.arguments if arguments is None else arguments)
  jax.eval_shape(lambda: bound(bound.outputs if outputs is None else outputs))


def unread(name, place):
  """Whether the row at its defaults leaves an array alone, so that nothing can be wrong with it."""
  row = algorithms.get(name)
  return ('reference_log_probs' in place and 'reference' not in row.models_for({})
          or place == "['entropy']" and row.hyperparameters().get('entropy_coefficient') == 0.0
          or place == "['reference_log_probs']" and name == 'reinforce_pp'  # its advantage does
          or name == 'gkd' and place == "['log_probs']")  # its divergence says all


def leaves(name):
  """(where, its leaf, how to trace the loss with another) for each array that the row reads."""
  bound = bound_row(name)
  inner = {'chosen', 'rejected', 'responses'} & set(bound.outputs)
  arguments = {n: x for n, x in bound.arguments.items() if n not in bound.outputs and n != 'key'}
  for part, tree in (('arguments', arguments), ('outputs', bound.outputs)):
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    for i, (path, leaf) in enumerate(paths):
      place = jax.tree_util.keystr(path)
      if np.ndim(leaf) == 0 or inner and place.endswith('].log_probs') or (
          inner and place.endswith(('.chosen.log_probs', '.rejected.log_probs'))):
        continue
      if unread(name, place):
        continue
      def trace(changed, i=i, part=part, structure=structure, paths=paths):
        tree = structure.unflatten([changed if i == j else x for j, (_, x) in enumerate(paths)])
        traced(bound, **{part: {**getattr(bound, part), **tree}})
      yield place, leaf, trace


@every_row
def test_arrays_of_another_shape_or_type_are_named(name):
  with jax.enable_x64(True):
    for place, leaf, trace in leaves(name):
      trace(leaf)
      wrong = {'one short': leaf[..., :-1]}
      if leaf.dtype == bool and not any(soft in place for soft in SOFT):
        wrong |= {'numbers': leaf.astype(np.float32), 'integers': leaf.astype(np.int32)}
      for what, changed in wrong.items():
        try:
          trace(changed)
        except ValueError as error:
          *_, last = traceback.extract_tb(error.__traceback__)
          assert last.filename.startswith(OURS), (place, what, str(error))
        else:
          pytest.fail(f'{name}: {place} with {what} goes unnoticed')


@every_row
def test_numbers_below_zero_are_named(name):
  row = algorithms.get(name)
  for key, default in row.hyperparameters().items():
    if isinstance(default, (str, bool)) or key == 'reward_weights':
      continue
    exempt = SIGNED.get(key)
    if isinstance(exempt, str) or exempt and name in exempt:
      continue
    with jax.enable_x64(True), pytest.raises(ValueError, match=f'{key}='):
      traced(bounds.bind(row, batch_for(row), {key: -2.0}))
      pytest.fail(f'{name}: {key}=-2.0 goes unnoticed')


GROUPED = [name for name in NAMES if 'group_size' in inspect.signature(
    algorithms.get(name).advantage or algorithms.get(name).loss).parameters]


@pytest.mark.parametrize('name', GROUPED)
def test_partial_groups_are_named(name):
  row = algorithms.get(name)
  with pytest.raises(ValueError, match='24 completions do not split into groups of group_size=5'):
    bounds.bind(row, {**batch_for(row), 'group_size': 5}, {})


def test_what_compares_completions_has_groups():
  assert len(GROUPED) > 40 and {'grpo', 'hpt', 'rloo', 'grpo_process'} <= set(GROUPED)
