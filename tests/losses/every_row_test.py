"""What holds for every row of the algorithm table and every modifier, whoever wrote its loss.

On the inspector's built-in batch, advantages estimated as the row says, in float64. Values and
gradients themselves are held against closed forms elsewhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import algorithms
from ptjax.inspect import bound as bounds
from ptjax.inspect import example
from ptjax.losses import modifiers

QUICK = ('sft', 'kd', 'grpo', 'ppo', 'gspo', 'dpo', 'kto', 'hpt', 'reward_bt', 'prm')
NAMES = (*algorithms.TABLE, *(f'grpo+{name}' for name in modifiers.MODIFIERS))
every_row = pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES])

OF_POLICY = ('log_probs', 'responses', 'chosen', 'rejected', 'demonstration_log_probs',
             'corrupted_log_probs', 'mismatched_log_probs')
ORDER = np.array([2, 0, 3, 1])  # of the four prompts
STATIC = ('group_size', 'key')  # the same for all variants; a group size is no array


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def mask_name(name):
  """Which mask says where an array's padding is."""
  if name == 'step_logits':
    return 'step_mask'
  prefix = name.partition('_')[0]
  return {'mismatched': 'mismatched_loss_mask', 'demonstration': 'demonstration_loss_mask',
          'corrupted': 'chosen_mask', 'chosen': 'chosen_mask', 'rejected': 'rejected_mask'}.get(
              prefix, 'loss_mask')


def flat(batch):
  """The batch without its structs: their arrays by names of their own."""
  pair, side = batch['pair'], batch['side']
  arrays = {n: np.asarray(x) for n, x in batch.items() if n not in ('pair', 'side', *STATIC)}
  for name, one in (('chosen', pair.chosen), ('rejected', pair.rejected), ('responses', side)):
    arrays.update({name: np.asarray(one.log_probs), f'{name}_mask': np.asarray(one.loss_mask),
                   f'{name}_reference_log_probs': np.asarray(one.reference_log_probs)})
  return arrays


def structured(batch, arrays):
  """Undoes `flat`."""
  def side(name, like):
    return like.replace(log_probs=arrays[name], loss_mask=arrays[f'{name}_mask'],
                        reference_log_probs=arrays[f'{name}_reference_log_probs'])
  pair = batch['pair'].replace(chosen=side('chosen', batch['pair'].chosen),
                               rejected=side('rejected', batch['pair'].rejected))
  return {**arrays, 'pair': pair, 'side': side('responses', batch['side']),
          **{n: batch[n] for n in STATIC if n in batch}}


def poisoned(arrays):
  """NaN wherever a mask says padding; logits excepted, which a model always has."""
  def poison(name, x):
    mask = arrays[mask_name(name)]
    if x.dtype != float or x.ndim < 2 or 'logits' in name and name != 'step_logits' or (
        x.shape[:2] != mask.shape):
      return x
    return np.where(mask[..., None] if x.ndim == 3 else mask, x, np.nan)
  return {n: poison(n, x) for n, x in arrays.items()}


def reordered(x):
  """Prompts in another order: every array has its rows prompt by prompt."""
  return x if np.ndim(x) == 0 else x.reshape(example.P, -1, *x.shape[1:])[ORDER].reshape(x.shape)


def lowered(arrays, which):
  """50 nats off every log-prob of the policy, or of all the other models."""
  is_log_probs = lambda n: n in OF_POLICY or n.endswith('log_probs')
  return {n: x - 50.0 if is_log_probs(n) and (n in OF_POLICY) == (which == 'policy') else x
          for n, x in arrays.items()}


def variants(arrays):
  masks = {n: x for n, x in arrays.items() if n.endswith('mask')}
  first = lambda x: x & (np.cumsum(x, axis=1) == 1)
  some = lambda x: x & (np.arange(len(x)) >= len(x) // example.P)[:, None]
  return {
      'plain': arrays, 'poisoned': poisoned(arrays),
      'reordered': {n: reordered(x) for n, x in arrays.items()},
      'policy far below': lowered(arrays, 'policy'), 'policy far above': lowered(arrays, 'others'),
      'one token each': {**arrays, **{n: first(x) for n, x in masks.items()}},
      'a prompt of empty responses': {**arrays, **{n: some(x) for n, x in masks.items()}},
      'equal rewards': {**arrays, 'rewards': np.ones_like(arrays['rewards'])}}


def value_and_gradients(row, batch, arrays):
  bound = bounds.bind(row, structured(batch, arrays), {})
  return jax.value_and_grad(bound)(bound.outputs)


@functools.lru_cache(None)
def evaluated(name):
  """{variant: (loss, gradients by each output of the model)}, in one compilation."""
  row = algorithms.get(name)
  batch = {'key': jax.random.key(0), **example.batch(row.loss)}
  found = variants(flat(batch))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *found.values())
  out = jax.jit(lambda xs: jax.lax.map(functools.partial(value_and_gradients, row, batch), xs))(
      stacked)
  out = jax.tree.map(np.asarray, out)
  return {v: jax.tree.map(lambda x: x[i], out) for i, v in enumerate(found)}


@every_row
def test_compiled_is_eager(name):
  row = algorithms.get(name)
  batch = {'key': jax.random.key(0), **example.batch(row.loss)}
  eager = value_and_gradients(row, batch, jax.tree.map(jnp.asarray, flat(batch)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14),
               evaluated(name)['plain'], jax.tree.map(np.asarray, eager))
  assert any(gradient.any() for gradient in eager[1].values())


@every_row
def test_padding_changes_nothing(name):
  plain, padded = (evaluated(name)[v] for v in ('plain', 'poisoned'))
  jax.tree.map(np.testing.assert_array_equal, plain, padded)
  masks = flat(example.batch(algorithms.get(name).loss))
  for output, gradient in plain[1].items():
    mask = masks['responses_mask' if output == 'responses' else mask_name(output)]
    if gradient.ndim >= 2 and gradient.shape[:2] == mask.shape:
      assert not gradient[~mask].any(), f'{output}: gradient off the mask'


@every_row
def test_the_order_of_prompts_changes_nothing(name):
  if name in DRAWS:
    return  # which token or pair is drawn depends on its place
  (loss, gradients), (moved_loss, moved) = (evaluated(name)[v] for v in ('plain', 'reordered'))
  np.testing.assert_allclose(moved_loss, loss, rtol=1e-9)
  for output, gradient in gradients.items():
    np.testing.assert_allclose(moved[output], reordered(gradient), rtol=1e-8, atol=1e-14)


@every_row
def test_metrics_carry_no_gradient(name):
  """Whoever adds one to a loss by mistake changes nothing."""
  row = algorithms.get(name)
  @functools.wraps(row.loss)
  def reported(*args, **kwargs):
    return sum(row.loss(*args, **kwargs)[1].values(), 0.0)
  bound = bounds.bind(dataclasses.replace(row, loss=reported), example.batch(row.loss), {})
  assert not any(g.any() for g in jax.tree.leaves(jax.jit(jax.grad(bound))(bound.outputs)))


DRAWS = {'sampo', 'betadpo', 'clip_cov'}


def test_what_draws_takes_a_key():
  arguments = {name: set(bounds.inspect.signature(algorithms.get(name).loss).parameters)
               for name in NAMES}
  assert DRAWS == {name for name, taken in arguments.items() if 'key' in taken}


@every_row
def test_extremes_are_finite(name):
  for variant, (loss, gradients) in evaluated(name).items():
    assert np.isfinite(loss), variant
    for output, gradient in gradients.items():
      assert np.isfinite(gradient).all(), f'{variant}: {output}'


@pytest.mark.parametrize('name', [
    name for name, row in algorithms.TABLE.items() if row.family == 'reward model'])
def test_gradients_of_reward_models_are_central_differences(name):
  """They stop no gradient, so their own values tell; of the others the closed forms do."""
  row = algorithms.get(name)
  bound = bounds.bind(row, example.batch(row.loss), {})
  gradient = jax.grad(bound)(bound.outputs)
  rng = np.random.default_rng(0)
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), bound.outputs)
  at = lambda step: bound(jax.tree.map(lambda x, d: x + step * d, bound.outputs, direction))
  slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
  np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-7)
