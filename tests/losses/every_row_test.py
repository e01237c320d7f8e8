"""What holds for every row of the algorithm table and every modifier, whoever wrote its loss.

On the inspector's built-in batch, advantages estimated as the row says, in float64 and, wherever it
is hard, in float32. Values and gradients themselves are held against closed forms elsewhere.
"""

import dataclasses
import functools
import inspect

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
PARAMETERS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
every_row = pytest.mark.parametrize('name', PARAMETERS)

OF_POLICY = ('log_probs', 'responses', 'chosen', 'rejected', 'demonstration_log_probs',
             'corrupted_log_probs', 'mismatched_log_probs')
ORDER = np.array([2, 0, 3, 1])  # of the four prompts
STEP = 1e-5  # of central differences
STATIC = ('group_size', 'key')  # the same for all variants; a group size is no array


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
      'full length': {**arrays, **{n: np.ones_like(x) for n, x in masks.items()}},
      'equal rewards': {**arrays, 'rewards': np.ones_like(arrays['rewards']),
                        'reward_components': np.ones_like(arrays['reward_components']),
                        'step_rewards': np.where(np.isnan(arrays['step_rewards']), np.nan, 1.0),
                        'outcome_rewards': np.ones_like(arrays['outcome_rewards'])}}


def direction(outputs):
  """One way the model's outputs can move, the same at every call."""
  rng = np.random.default_rng(0)
  return {n: rng.normal(size=x.shape).astype(x.dtype) for n, x in sorted(outputs.items())}


def value_and_gradients(row, batch, arrays, step=0.0):
  """The loss and its gradients, the outputs having moved `step` along `direction`."""
  bound = bounds.bind(row, structured(batch, arrays), {})
  outputs = jax.tree.map(lambda x, d: x + step * d, bound.outputs, direction(bound.outputs))
  return jax.value_and_grad(bound)(outputs)


@functools.lru_cache(None)
def evaluated(name, dtype='float64'):
  """{variant: (loss, gradients by each output of the model)}, in one compilation."""
  row = algorithms.get(name)
  with jax.enable_x64(dtype == 'float64'):
    batch = {'key': jax.random.key(0), **example.batch(row.loss)}
    found = variants(flat(batch))
    steps = dict.fromkeys(found, 0.0)
    if dtype == 'float64':
      found.update(ahead=found['plain'], behind=found['plain'])
      steps.update(ahead=STEP, behind=-STEP)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *found.values())
    out = jax.jit(lambda xs: jax.lax.map(lambda x: value_and_gradients(row, batch, *x), xs))(
        (stacked, jnp.asarray(list(steps.values()), dtype)))
    out = jax.tree.map(np.asarray, out)
  return {v: jax.tree.map(lambda x: x[i], out) for i, v in enumerate(found)}


@every_row
def test_compiled_is_eager(name):
  row = algorithms.get(name)
  with jax.enable_x64(True):
    batch = {'key': jax.random.key(0), **example.batch(row.loss)}
    eager = value_and_gradients(row, batch, jax.tree.map(jnp.asarray, flat(batch)))
    eager = jax.tree.map(np.asarray, eager)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14),
               evaluated(name)['plain'], eager)
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


# What is drawn depends on its place, so these have no order to be free of.
DRAWS = {'sampo': 'the tokens that both responses keep',
         'betadpo': 'the pairs that are dropped',
         'clip_cov': 'the tokens that are dropped'}


@pytest.mark.parametrize('name', [p for p in PARAMETERS if p.values[0] not in DRAWS])
def test_the_order_of_prompts_changes_nothing(name):
  (loss, gradients), (moved_loss, moved) = (evaluated(name)[v] for v in ('plain', 'reordered'))
  np.testing.assert_allclose(moved_loss, loss, rtol=1e-9)
  for output, gradient in gradients.items():
    np.testing.assert_allclose(moved[output], reordered(gradient), rtol=1e-8, atol=1e-14)


def test_what_draws_takes_a_key():
  arguments = {name: set(inspect.signature(algorithms.get(name).loss).parameters) for name in NAMES}
  assert set(DRAWS) == {name for name, taken in arguments.items() if 'key' in taken}


@every_row
def test_metrics_carry_no_gradient(name):
  """Whoever adds one to a loss by mistake changes nothing."""
  row = algorithms.get(name)
  @functools.wraps(row.loss)
  def reported(*args, **kwargs):
    return sum(row.loss(*args, **kwargs)[1].values(), 0.0)
  with jax.enable_x64(True):  # as above, so that what binding computes is compiled already
    bound = bounds.bind(dataclasses.replace(row, loss=reported), example.batch(row.loss), {})
    gradients = jax.jit(jax.grad(bound))(bound.outputs)
  assert not any(np.asarray(gradient).any() for gradient in jax.tree.leaves(gradients))


@every_row
def test_extremes_are_finite_and_float32_is_right(name):
  """Held against float64, in units of an array's largest entry."""
  single, double = evaluated(name, 'float32'), evaluated(name)
  for variant, found in single.items():
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(double[variant])):
      assert np.isfinite(want).all() and np.isfinite(got).all(), variant
      if name == 'clip_cov':
        continue  # the numbers it draws are others in another precision
      np.testing.assert_allclose(
          got, want, rtol=0, atol=5e-4 * np.abs(want).max(initial=0.0) + 1e-7, err_msg=variant)


# Rows that have no gradient in the log-probs where a prompt's completions all earn the same, and
# those that have one still.
OWN_BASELINE = ('group_centred', 'group_normalized', 'leave_one_out', 'batch_normalized',
                'informative_group_scaled', 'pass_at_k', 'optimal_length_baseline',
                'step_normalized', 'last_token_normalized', 'whitened_group_centred',
                'component_normalized', 'gate', 'soft_gate')
PUSHED_STILL = {
    **dict.fromkeys(('rlhf', 'rlaif', 'grpo+adaptive_reward_kl'), 'the reward holds the KL'),
    **dict.fromkeys(('reinforce_pp_baseline', 'grpo+kl', 'grpo+corrected_kl', 'grpo+adaptive_kl'),
                    'the loss has a KL term'),
    'kl_cov': 'the tokens of highest covariance pay, whatever they earned',
    'srft': 'its rollouts have no baseline'}


def of_groups(name):
  """Whether a row's advantages compare the completions of a prompt with each other."""
  found = getattr(algorithms.get(name).advantage, '__name__', '')
  return found.partition('+')[0] in OWN_BASELINE


@pytest.mark.parametrize('name', [p for p in PARAMETERS if of_groups(p.values[0])])
def test_equal_rewards_teach_nothing(name):
  for found in (evaluated(name), evaluated(name, 'float32')):
    _, gradients = found['equal rewards']
    assert gradients['log_probs'].any() == (name in PUSHED_STILL)


# Rows whose gradient is not that of their value, by what they hold still.
HELD_STILL = {
    'dft': "the token's probability, its weight",
    **dict.fromkeys(('cispo', 'cispo_oxrl', 'vespo', 'sdft', 'sdpo'), 'the bounded ratio'),
    'nash_md': 'the log-ratio to the reference, as part of the reward',
    'focalpo_oxrl': 'the focal weight', 'wpo': "the pair's weight",
    'betadpo': 'the β of the batch', 'alpha_dpo': 'the margin of the pair',
    **dict.fromkeys(('kto_oxrl', 'bco', 'mpo'), 'the mean reward, or KL, that it shifts by'),
    'srft': 'the weights by entropy'}


@every_row
def test_gradients_are_central_differences(name):
  (ahead, _), (behind, _), (_, gradient) = (
      evaluated(name)[v] for v in ('ahead', 'behind', 'plain'))
  way = direction(gradient)
  slope = sum((gradient[output] * way[output]).sum() for output in gradient)
  same = np.isclose((ahead - behind) / (2 * STEP), slope, rtol=1e-6, atol=0)
  assert same == (name not in HELD_STILL)
