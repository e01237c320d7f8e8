"""Every policy, imitation, distillation and hybrid loss against a float64 closed form.

And the properties all of them share: what padding, order, extremes and compilation may not change.
"""

import functools
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import policy_gradient
from ptjax.losses import policy_gradient_sequence
from ptjax.pieces import likelihood

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import policy_gradient_cases as cases
import distillation_reference
import policy_gradient_reference as reference

every_case = pytest.mark.parametrize('case', cases.CASES, ids=[c.id for c in cases.CASES])
STEP = 1e-5  # of the central differences; float64 leaves about 1e-10 of a value of order 1


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def value_and_gradients(case, inputs):
  """(loss, metrics), and gradients with respect to every float input."""
  floats = {n: x for n, x in inputs.items() if x.dtype != bool}
  rest = {n: x for n, x in inputs.items() if x.dtype == bool}
  return jax.value_and_grad(lambda f: cases.call(case, {**f, **rest}), has_aux=True)(floats)


ORDER = np.array([5, 4, 7, 6, 1, 0, 3, 2])  # prompts swapped, and rows within them


@functools.lru_cache(None)
def evaluated(case):
  """One compilation per loss: all batches at once. Returns `{batch name: (loss, metrics, grads)}`.

  REBEL's rows are pairs, whose order within is which completion came first; the order keeps pairs.
  """
  batches = {
      'random': cases.random_arrays(), 'other': cases.random_arrays(7),
      'poisoned': cases.poisoned(cases.random_arrays()),
      'reordered': cases.reordered(cases.random_arrays(), ORDER),
      'far above': cases.extreme_arrays(+1), 'far below': cases.extreme_arrays(-1),
      'on policy': cases.on_policy_arrays(),
      'empty': {**cases.random_arrays(), 'loss_mask': np.zeros((cases.B, cases.T), bool)}}
  inputs = [cases.inputs_of(case, arrays) for arrays in batches.values()]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
  out = jax.jit(jax.vmap(functools.partial(value_and_gradients, case)))(stacked)
  out = jax.tree.map(np.asarray, out)
  return {name: jax.tree.map(lambda x: x[i], (out[0][0], out[0][1], out[1]))
          for i, name in enumerate(batches)}


def expected(case, arrays):
  """Value of the closed form and its central differences by each attached input."""
  b = {**arrays, 'advantages': arrays[case.advantages]}
  at = b['log_probs']
  hyper = {k: v for k, v in case.hyper.items()}
  value = lambda moved: reference.VALUES[case.name](moved['log_probs'], at, moved, **hyper)
  slopes = {}
  for name in (n for n in cases.ATTACHED if n in case.arrays):
    slopes[name] = np.zeros_like(b[name])
    if case.name == 'srft' and name == 'entropy':
      continue  # read as a constant
    for index in np.argwhere(np.broadcast_to(
        b['loss_mask'].reshape(cases.B, cases.T, *[1] * (b[name].ndim - 2)), b[name].shape)):
      above, below = ({**b, name: b[name].copy()} for _ in range(2))
      above[name][tuple(index)] += STEP
      below[name][tuple(index)] -= STEP
      slopes[name][tuple(index)] = (value(above) - value(below)) / (2 * STEP)
  return value(b), slopes


@every_case
def test_value_and_gradient_match_the_closed_form(case):
  for name, seed in (('random', 0), ('other', 7)):
    value, slopes = expected(case, cases.random_arrays(seed))
    loss, metrics, grads = evaluated(case)[name]
    np.testing.assert_allclose(loss, value, rtol=1e-11, atol=1e-13)
    for attached, slope in slopes.items():
      np.testing.assert_allclose(grads[attached], slope, rtol=1e-6, atol=2e-9, err_msg=attached)
    for metric, number in metrics.items():
      assert np.shape(number) == () and np.isfinite(number), metric


def expected_metrics(case, b):
  """What each metric should be; those of the pieces are tested in likelihood_test."""
  mask, hyper, tokens = b['loss_mask'], case.hyper, b['loss_mask'].sum()
  mean = lambda x: np.where(mask, x, 0.0).sum() / tokens
  A = b[case.advantages] if b[case.advantages].ndim == 2 else b[case.advantages][:, None]
  if case.name == 'minillm':
    A = distillation_reference.future_log_ratios(b, hyper['discount'])
  log_ratio = np.where(mask, b['log_probs'] - b['old_log_probs'], 0.0)
  if case.name in ('rloo', 'gspo', 'gspo_token', 'luspo'):
    sums = log_ratio.sum(1, keepdims=True)
    log_ratio = sums if case.name == 'rloo' else sums / np.maximum(mask.sum(1, keepdims=True), 1)
  ratio, want = np.exp(log_ratio), {}
  if 'clip_low' in hyper and case.name != 'cispo_oxrl':
    low = mean((A < 0) & (ratio < 1 - hyper['clip_low']))
    high = mean((A > 0) & (ratio > 1 + hyper['clip_high']))
    want = {'clip_ratio/low_mean': low, 'clip_ratio/high_mean': high,
            'clip_ratio/region_mean': low + high}
  if hyper.get('kl_coefficient'):
    k1 = b['log_probs'] - b['reference_log_probs']
    want['kl'] = mean({'nash_md': k1, 'reinforce_pp_baseline': k1 ** 2 / 2}.get(
        case.name, np.exp(-k1) + k1 - 1))
  if 'value_clip' in hyper:
    moved = np.clip(b['values'] - b['old_values'], -hyper['value_clip'], hyper['value_clip'])
    error = (b['values'] - b['returns']) ** 2
    clipped = (b['old_values'] + moved - b['returns']) ** 2
    want |= {'value/loss': mean(np.maximum(error, clipped)) / 2,
             'value/clip_fraction': mean(clipped > error)}
  if case.name == 'kd':
    squared = hyper['temperature'] ** 2
    want['distillation/divergence'] = (
        distillation_reference.kd(b['log_probs'], None, b, 0.0, hyper['temperature']) / squared)
  if case.name == 'gkd':
    want['distillation/divergence'] = distillation_reference.gkd(None, None, b, **hyper)
  if case.name == 'minillm':
    want['distillation/divergence'] = distillation_reference.gkd(None, None, b, 1, 1.0)
  if case.name in ('sdft', 'sdpo'):
    want['distillation/divergence'] = top_k_divergence(b, hyper)
  if case.name == 'rft':
    want['accepted_fraction'] = (b['rewards'] >= hyper['reward_threshold']).mean()
  return want


def top_k_divergence(b, hyper):
  """Mean over tokens of sdft's divergence, each by itself: ratio 1, and a mask of one token."""
  total, hyper = 0.0, {n: hyper[n] for n in ('interpolation', 'top_k', 'max_ratio')}
  for index in np.argwhere(b['loss_mask']):
    one = np.zeros_like(b['loss_mask'])
    one[tuple(index)] = True
    total += cases.B * distillation_reference.sdft(
        None, b['old_log_probs'], {**b, 'loss_mask': one}, **hyper)
  return total / b['loss_mask'].sum()


@every_case
def test_metrics(case):
  want = expected_metrics(case, cases.random_arrays())
  loss, metrics, _ = evaluated(case)['random']
  parts = {n: x for n, x in metrics.items() if n.startswith('hybrid/')}
  if parts:
    np.testing.assert_allclose(sum(parts.values()), loss, rtol=1e-12)
  assert {n for n in metrics if not n.startswith(('pieces/', 'hybrid/'))} == set(want)
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-11, atol=1e-15, err_msg=name)


@every_case
def test_gradient_flows_only_through_the_model(case):
  _, _, grads = evaluated(case)['random']
  mask = cases.random_arrays()['loss_mask']
  for name, grad in grads.items():
    if name in cases.ATTACHED:
      assert not grad[~mask].any(), f'{name}: gradient off the mask'
    elif name in ('old_log_probs', 'reference_log_probs', 'teacher_log_probs', 'old_values',
                  'returns', 'teacher_logits'):
      assert not grad.any(), f'{name} is no output of the policy'


@every_case
def test_weights_are_the_product_of_the_pieces(case):
  inputs = cases.inputs_of(case, cases.random_arrays())
  parts = jax.jit(lambda x: likelihood.pieces_of(functools.partial(cases.call, case), x))(inputs)
  weights = sum(functools.reduce(np.multiply, part.values()) for part in parts.values())
  _, _, grads = evaluated(case)['random']
  if case.name in ('gkd', 'sdft'):
    assert case.whole_vocabulary and np.abs(grads['logits']).max() > 0  # not a policy gradient
    return
  np.testing.assert_allclose(-grads['log_probs'], weights, rtol=1e-12, atol=1e-15)
  full = [n for n in ('values', 'entropy', 'logits') if n in grads and grads[n].any()]
  assert bool(full) == case.whole_vocabulary, f'terms beside the policy gradient: {full}'


@every_case
def test_padding_changes_nothing(case):
  jax.tree.map(np.testing.assert_array_equal, evaluated(case)['poisoned'],
               evaluated(case)['random'])


@every_case
def test_order_changes_nothing(case):
  loss, _, grads = evaluated(case)['random']
  moved_loss, _, moved = evaluated(case)['reordered']
  np.testing.assert_allclose(moved_loss, loss, rtol=1e-12)
  for name in (n for n in cases.ATTACHED if n in grads):
    np.testing.assert_allclose(moved[name], grads[name][ORDER], rtol=1e-11, atol=1e-15)


@every_case
def test_extremes_are_finite(case):
  for name in ('far above', 'far below', 'on policy', 'empty'):
    for leaf in jax.tree.leaves(evaluated(case)[name]):
      assert np.isfinite(leaf).all(), name
  loss, _, grads = evaluated(case)['empty']
  assert not any(grads[n].any() for n in cases.ATTACHED if n in grads)
  if case.name != 'rebel':  # which still has rewards to explain
    assert loss == 0.0


@every_case
def test_ties_keep_the_whole_gradient(case):
  """On policy every clip, cap and gate sits at ratio 1, and none may halve the gradient."""
  arrays = cases.on_policy_arrays()
  _, _, grads = evaluated(case)['on policy']
  if case.name in ('kd', 'gkd', 'sdft', 'hpt', 'luffy', 'srft', 'sdpo', 'sft', 'dft', 'rft',
                   'a_star_po', 'rebel', 'opd', 'iw_opd', 'minillm', 'clip_cov'):
    return
  n, mask = arrays['loss_mask'].sum(1), arrays['loss_mask']
  A = arrays[case.advantages]
  A = A[:, None] if A.ndim == 1 else A
  factor = {
      'grpo': 1 / (cases.B * np.maximum(n, 1)), 'dr_grpo': 1 / (cases.B * 9),
      **dict.fromkeys(('sapo', 'gspo', 'gspo_token', 'gmpo'),
                      1 / (cases.B * np.maximum(n, 1))),
      **dict.fromkeys(('rloo', 'luspo', 'nash_md'), 1 / cases.B)}.get(case.name, 1 / n.sum())
  want = np.where(mask, A * np.broadcast_to(factor, cases.B)[:, None], 0.0)
  np.testing.assert_allclose(-grads['log_probs'], want, rtol=1e-12, atol=1e-15)


@every_case
def test_eager_float32_agrees(case):
  with jax.enable_x64(False):
    inputs = jax.tree.map(jnp.asarray, cases.inputs_of(case, cases.random_arrays(), np.float32))
    loss, metrics = cases.call(case, inputs)
    assert jnp.result_type(loss) == np.float32
    assert {jnp.result_type(m) for m in metrics.values()} <= {np.dtype(np.float32)}
  np.testing.assert_allclose(loss, evaluated(case)['random'][0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('golden', cases.GOLDEN, ids=[g[0] for g in cases.GOLDEN])
def test_golden_values(golden):
  _, loss, hyper, value, first, second = golden
  names = inspect.signature(loss).parameters
  inputs = {n: x for n, x in cases.GOLDEN_ARRAYS.items() if n in names}
  log_probs = inputs.pop('log_probs')
  got, grad = jax.jit(jax.value_and_grad(lambda l: loss(l, **inputs, **hyper)[0]))(log_probs)
  np.testing.assert_allclose(got, value, atol=6e-7)
  np.testing.assert_allclose(-grad, [first, (*second, 0.0)], atol=6e-7)


def test_extreme_ratios_push_only_where_they_may():
  """Past the clip nothing pushes on; against Â, as hard as the clamp of the ratio lets."""
  above, below = cases.extreme_arrays(+1), cases.extreme_arrays(-1)
  encouraged = above['loss_mask'] & (above['advantages'][:, None] > 0)
  discouraged = above['loss_mask'] & (above['advantages'][:, None] < 0)
  for loss in (policy_gradient.grpo_loss, policy_gradient_sequence.rloo_loss,
               policy_gradient_sequence.gspo_loss):
    up, down = -gradient(loss, above), -gradient(loss, below)
    assert not up[encouraged].any() and not down[discouraged].any()
    n = above['loss_mask'].sum(1)[:, None] ** (loss is not policy_gradient_sequence.rloo_loss)
    size = above['advantages'][:, None] / (cases.B * n)
    np.testing.assert_allclose(up, np.where(discouraged, np.exp(20) * size, 0.0), rtol=1e-12)
    np.testing.assert_allclose(down, np.where(encouraged, np.exp(-20) * size, 0.0), rtol=1e-12)


# Identities.

def gradient(loss, arrays, **hyper):
  names = inspect.signature(loss).parameters
  inputs = {n: x for n, x in arrays.items() if n in names}
  log_probs = inputs.pop('log_probs')
  return jax.jit(jax.grad(lambda l: loss(l, **inputs, **hyper)[0]))(log_probs)


def test_on_policy_token_mean_losses_are_reinforce():
  arrays = cases.on_policy_arrays()
  want = gradient(policy_gradient.reinforce_loss, arrays)
  for loss in (policy_gradient.bnpo_loss, policy_gradient.dapo_loss, policy_gradient.cispo_loss,
               policy_gradient.kl_cov_loss, policy_gradient_sequence.vespo_loss):
    np.testing.assert_allclose(gradient(loss, arrays), want, rtol=1e-12, atol=1e-16)


def test_gspo_of_one_token_is_grpo():
  arrays = cases.random_arrays()
  arrays['loss_mask'] = np.arange(cases.T)[None] < np.ones((cases.B, 1))
  clip = dict(clip_low=0.1, clip_high=0.15)
  np.testing.assert_allclose(
      gradient(policy_gradient_sequence.gspo_loss, arrays, **clip),
      gradient(policy_gradient.grpo_loss, arrays, **clip), rtol=1e-12, atol=1e-16)


def test_gspo_token_with_one_advantage_per_sequence_is_gspo():
  arrays = cases.random_arrays()
  clip = dict(clip_low=0.03, clip_high=0.05)
  names = ('log_probs', 'old_log_probs', 'advantages', 'loss_mask')
  inputs = {n: arrays[n] for n in names}
  want = policy_gradient_sequence.gspo_loss(**inputs, **clip)
  got = policy_gradient_sequence.gspo_token_loss(**inputs, **clip)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-12)


def test_dual_clip_masks_only_discouraged_tokens_past_the_cap():
  arrays = cases.random_arrays()
  arrays['log_probs'] = arrays['old_log_probs'] + 0.7  # ratio 2.01, past both caps
  masked, kept = (gradient(policy_gradient.ppo_dual_clip_loss, arrays, max_ratio=m)
                  for m in (1.5, 3.0))
  pushes = arrays['loss_mask'] & (arrays['advantages'][:, None] < 0)
  assert not masked.any() and np.array_equal(kept != 0, pushes)


def test_clip_cov_drops_as_many_tokens_as_the_fraction_says():
  arrays = cases.random_arrays()
  clip = dict(clip_low=9.0, clip_high=9.0, covariance_low=0.0, covariance_high=99.0)
  kept = lambda fraction, seed=0: np.asarray(gradient(
      policy_gradient.clip_cov_loss, {**arrays, 'key': jax.random.key(seed)}, fraction=fraction,
      **clip) != 0)
  mask, total = arrays['loss_mask'], int(arrays['loss_mask'].sum())
  assert (mask & ~kept(1e-9)).sum() == 1
  dropped = [mask & ~kept(3.5 / total, seed) for seed in range(3)]
  assert [d.sum() for d in dropped] == [3, 3, 3]
  assert any((dropped[0] != d).any() for d in dropped[1:]), 'the draw follows the key'


# What a user can get wrong.

def test_missing_reference_is_named():
  arrays = cases.random_arrays()
  for loss in (policy_gradient.grpo_loss, policy_gradient.reinforce_pp_baseline_loss):
    inputs = {n: arrays[n] for n in ('log_probs', 'old_log_probs', 'advantages', 'loss_mask')}
    with pytest.raises(ValueError, match='kl_coefficient=0.1 needs reference_log_probs'):
      loss(**inputs, kl_coefficient=0.1)
  with pytest.raises(ValueError, match='entropy_coefficient=0.1 needs entropy'):
    policy_gradient.sgrpo_loss(**inputs, entropy_coefficient=0.1)


def test_bad_hyperparameters_and_shapes_are_named():
  arrays = cases.random_arrays()
  inputs = {n: arrays[n] for n in ('log_probs', 'old_log_probs', 'advantages', 'loss_mask')}
  bad = [
      (policy_gradient.grpo_loss, {'kl_coefficient': -0.1}, 'kl_coefficient=-0.1'),
      (policy_gradient.grpo_loss, {'old_log_probs': np.zeros((8, 5))}, 'old_log_probs has shape'),
      (policy_gradient.grpo_loss, {'advantages': np.zeros(3)}, r'advantages have shape \(3,\)'),
      (policy_gradient.grpo_loss, {'loss_mask': np.ones((8, 6))}, r'loss_mask is float64\[8, 6\]'),
      (policy_gradient_sequence.gspo_loss, {'advantages': np.zeros((8, 6))}, 'one per sequence'),
      (policy_gradient.grpo_loss, {'clip_low': -0.1}, 'clip_low=-0.1'),
      (policy_gradient.cispo_loss, {'max_ratio': 0.0}, 'max_ratio=0.0'),
      (policy_gradient.sapo_loss, {'temperature_negative': 0.0}, 'temperature_negative=0.0'),
      (policy_gradient_sequence.gmpo_loss, {'log_clip': -0.4}, 'log_clip=-0.4'),
      (policy_gradient.kl_cov_loss, {'penalty_coefficient': -1.0}, 'penalty_coefficient=-1.0')]
  for loss, change, message in bad:
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(lambda: loss(**{**inputs, **change}))
  with pytest.raises(ValueError, match='eta=0.0'):
    policy_gradient_sequence.rebel_loss(
        inputs['log_probs'], old_log_probs=inputs['old_log_probs'], rewards=arrays['rewards'],
        loss_mask=inputs['loss_mask'], eta=0.0)
