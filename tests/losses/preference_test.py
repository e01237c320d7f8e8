"""Every preference loss against a float64 closed form, and the properties all of them share."""

import functools
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import preference_anchor
from ptjax.losses import preference_gap
from ptjax.losses import preference_link
from ptjax.losses import preference_score
from ptjax.losses import unpaired

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases
import preference_reference as reference

B, T = 4, 6


def ids(table):
  return [case.id for case in table]


def value_and_gradients(case, arrays):
  """(loss, metrics), gradients with respect to every float array of the pair and the extras."""
  floats = {k: v for k, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}
  rest = {k: v for k, v in arrays.items() if k not in floats}
  def objective(floats):
    loss, metrics, *_ = cases.call(case, {**floats, **rest})
    return loss, metrics
  return jax.value_and_grad(objective, has_aux=True)(floats)


@functools.lru_cache(None)
def compiled(case):
  """One compilation per loss and dtype, shared by the tests of this file."""
  return jax.jit(functools.partial(value_and_gradients, case))


def expected(case, arrays, dtype=np.float64):
  """Value and token weights, {name: [B, T]}, by the closed form."""
  w, l = cases.sides(arrays)
  hyper = {**case.hyper, **cases.reference_extras(case, arrays, dtype)}
  value = np.mean(reference.VALUES[case.name](w, l, (w, l), **hyper))
  def weights(A, mask):
    A = np.broadcast_to(A, (B,)) if np.ndim(A) < 2 else A
    return np.where(mask, (A[:, None] if A.ndim == 1 else A.T) / B, 0.0)
  A_w, A_l = reference.SLOPES[case.name](w, l, **hyper)
  return value, weights(A_w, arrays['chosen_mask']), weights(A_l, arrays['rejected_mask'])


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_value_and_gradient_match_the_closed_form(case):
  arrays = cases.random_arrays(B, T)
  value, chosen, rejected = expected(case, arrays)
  with jax.enable_x64(True):
    (loss, _), grads = compiled(case)(cases.to_jax(arrays, case, np.float64))
    assert loss.dtype == np.float64
    np.testing.assert_allclose(loss, value, rtol=1e-11)
    np.testing.assert_allclose(-grads['chosen'], chosen, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(-grads['rejected'], rejected, rtol=1e-9, atol=1e-13)
    assert not np.any(grads.get('chosen_reference', 0.0)), 'the reference is frozen'
    assert not np.any(grads.get('rejected_reference', 0.0)), 'the reference is frozen'


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_closed_form_is_the_central_difference(case):
  arrays = cases.random_arrays(B, T)
  _, chosen, rejected = expected(case, arrays)
  hyper = {**case.hyper, **cases.reference_extras(case, arrays)}
  at = cases.sides(arrays)
  for name, weights in (('chosen', chosen), ('rejected', rejected)):
    for i, t in zip(*np.nonzero(arrays[name + '_mask'])):
      values = []
      for step in (1e-5, -1e-5):
        moved = {**arrays, name: arrays[name].copy()}
        moved[name][i, t] += step
        values.append(np.mean(reference.VALUES[case.name](*cases.sides(moved), at, **hyper)))
      np.testing.assert_allclose(
          (values[1] - values[0]) / 2e-5, weights[i, t], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_jit_padding_and_order(case):
  arrays = cases.to_jax(cases.random_arrays(B, T), case, np.float32)
  (loss, metrics), grads = jax.tree.map(np.asarray, compiled(case)(arrays))

  (eager, _), eager_grads = value_and_gradients(case, arrays)
  np.testing.assert_allclose(loss, eager, rtol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               grads, dict(eager_grads))

  padded = compiled(case)(cases.poison(arrays))
  jax.tree.map(np.testing.assert_array_equal, ((loss, metrics), grads), padded)

  if case.draws:
    return  # which pair is drawn depends on its place
  order = np.array([2, 0, 3, 1])
  (moved_loss, _), moved = compiled(case)(
      {k: v[order] if v.ndim else v for k, v in arrays.items()})
  np.testing.assert_allclose(moved_loss, loss, rtol=2e-6)
  for name in ('chosen', 'rejected'):
    np.testing.assert_allclose(moved[name], grads[name][order], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_extreme_log_ratios_are_finite_and_right(case):
  arrays = cases.extreme_arrays(T)
  with np.errstate(over='ignore'):
    value, chosen, rejected = expected(case, arrays, np.float32)
  (loss, _), grads = compiled(case)(cases.to_jax(arrays, case, np.float32))
  np.testing.assert_allclose(loss, value, rtol=1e-4)
  for got, want in ((-grads['chosen'], chosen), (-grads['rejected'], rejected)):
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_reference_is_asked_for_exactly_where_needed(case):
  arrays = cases.to_jax(cases.random_arrays(B, T), case, np.float32)
  for name in ('chosen_reference', 'rejected_reference'):
    arrays.pop(name, None)
  trace = lambda: jax.eval_shape(functools.partial(cases.call, case), arrays)
  if case.needs_reference:
    with pytest.raises(ValueError, match='reference_log_probs'):
      trace()
  else:
    loss, metrics, *_ = trace()
    assert loss.shape == ()
    assert all(m.shape == () for m in metrics.values())


def test_every_loss_has_a_case():
  modules = (preference_link, preference_score, preference_gap, preference_anchor, unpaired)
  losses = {f for module in modules for name, f in vars(module).items()
            if name.endswith('_loss') and next(iter(inspect.signature(f).parameters)) == 'pair'}
  assert losses == {case.loss for case in cases.PAIR} | {preference_score.sampo_loss}


@pytest.mark.parametrize('golden', cases.GOLDEN, ids=[g[0] for g in cases.GOLDEN])
def test_golden_values(golden):
  """The worked examples of the specification, six printed digits."""
  name, loss, want, want_chosen, want_rejected, *whole_batch = golden
  with jax.enable_x64(True):
    value, chosen, rejected = cases.golden_pairs(loss, whole_batch=bool(whole_batch))
  tolerance = dict(rtol=0, atol=6e-7)
  np.testing.assert_allclose(value, want, **tolerance)
  np.testing.assert_allclose(chosen, want_chosen, **tolerance)
  np.testing.assert_allclose(rejected, want_rejected, **tolerance)


@pytest.fixture
def pair():
  return cases.pair_of(cases.to_jax(cases.random_arrays(B, T), None, np.float32))


def test_corrupted_prompts_of_mdpo_carry_gradient():
  arrays = cases.random_arrays(B, T)
  case = next(case for case in cases.PAIR if case.extras == cases.CORRUPTED)
  w, _ = cases.sides(arrays)
  corrupted = reference.side(arrays['corrupted_log_probs'], arrays['chosen_mask'],
                             arrays['corrupted_reference_log_probs'])
  beta = case.hyper['beta']
  want = beta * reference.sigmoid(beta * (corrupted.s - w.s)) / B
  with jax.enable_x64(True):
    _, grads = compiled(case)(cases.to_jax(arrays, case, np.float64))
  np.testing.assert_allclose(grads['corrupted_log_probs'],
                             np.where(arrays['chosen_mask'], want[:, None], 0.0), rtol=1e-9)


REWARDS = {  # beta times these are the rewards reported; of the losses not here, the log-ratio
    **dict.fromkeys(('simpo', 'simpo_oxrl', 'cposimpo', 'tpo_l', 'orpo', 'spo', 'alpha_dpo'), 'm'),
    **dict.fromkeys(('cpo', 'tpo', 'slic_hf'), 'S')}


def reported(case, x, other):
  """What a loss reports as the reward of each response, [B]."""
  hyper = case.hyper
  if case.name.startswith('alphapo'):
    return hyper['beta'] * (1 - np.exp(-hyper['alpha'] * x.m)) / hyper['alpha']
  if case.name == 'ld_dpo':
    weights = reference.tail_weights(x, other, hyper['alpha'])
    ratios = np.where(x.loss_mask, x.log_probs - x.reference_log_probs, 0.0)
    return hyper['beta'] * (weights * ratios).sum(axis=1)
  score = 'm' if hyper.get('variant') == 'ipo' else REWARDS.get(case.name, 's')
  return hyper.get('beta', 1.0) * getattr(x, score)


@pytest.mark.parametrize('case', cases.PAIR, ids=ids(cases.PAIR))
def test_metrics_are_trls(case):
  arrays = cases.random_arrays(B, T)
  w, l = cases.sides(arrays)
  chosen, rejected = reported(case, w, l), reported(case, l, w)
  with jax.enable_x64(True):
    (_, metrics), _ = compiled(case)(cases.to_jax(arrays, case, np.float64))
  want = {'rewards/chosen': chosen.mean(), 'rewards/rejected': rejected.mean(),
          'rewards/margins': (chosen - rejected).mean(),
          'rewards/accuracies': (chosen > rejected).mean(),
          'logps/chosen': w.S.mean(), 'logps/rejected': l.S.mean()}
  assert set(want) <= set(metrics)
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-11, err_msg=name)
  assert 0 < want['rewards/accuracies'] < 1, 'else chosen and rejected could be swapped'


@pytest.mark.parametrize('loss,hyper,message', cases.BAD, ids=[str(b[1]) for b in cases.BAD])
def test_bad_input_is_named(pair, loss, hyper, message):
  with pytest.raises(ValueError, match=message):
    loss(pair, **hyper)


def test_wrong_shapes_are_named(pair):
  shifted = pair.chosen.replace(log_probs=pair.chosen.log_probs[:, 1:])
  with pytest.raises(ValueError, match='log_probs'):
    preference_link.dpo_loss(pair.replace(chosen=shifted))
  fewer = jax.tree.map(lambda x: x[:1], pair.rejected)
  with pytest.raises(ValueError, match='pair.chosen and pair.rejected'):
    preference_link.dpo_loss(pair.replace(rejected=fewer))
  with pytest.raises(ValueError, match='at least 2'):
    preference_gap.aot_loss(cases.row(pair, 0))
