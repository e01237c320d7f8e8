"""Every preference loss against a float64 closed form, and the properties all of them share."""

import functools
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import types
from ptjax.losses import preference_anchor
from ptjax.losses import preference_gap
from ptjax.losses import preference_link
from ptjax.losses import preference_score
from ptjax.losses import unpaired
from ptjax.pieces import running

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases
import preference_reference as reference

B, T = 4, 6


@pytest.fixture(autouse=True)
def strict_dtypes():
  with jax.numpy_dtype_promotion('strict'):
    yield


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


IDENTITIES = [
    ('gpo logistic', preference_link.gpo_loss, dict(variant='logistic')),
    ('dpop', preference_gap.dpop_loss, dict(penalty_coefficient=0.0)),
    ('cdpo', preference_link.cdpo_loss, dict(label_smoothing=0.0)),
    ('robust', preference_link.robust_dpo_loss, dict(label_smoothing=0.0)),
    ('robust oxrl', preference_link.robust_dpo_oxrl_loss, dict(label_smoothing=0.0)),
    ('hdpo', preference_score.hdpo_loss, dict(alpha=1.0)),
    ('dposhift', preference_score.dposhift_loss, dict(rejected_coefficient=1.0)),
    ('fdpo', preference_score.fdpo_loss, dict(divergence='reverse_kl')),
    ('rdpo', preference_score.rdpo_loss, dict(alpha=0.0)),
    ('c2dpo', preference_anchor.c2dpo_loss, dict(constraint_coefficient=0.0)),
    ('ld_dpo', preference_score.ld_dpo_loss, dict(alpha=1.0)),
    ('focalpo', preference_link.focalpo_loss, dict(exponent=0.0)),
    ('focalpo oxrl', preference_link.focalpo_oxrl_loss, dict(exponent=0.0)),
    ('odpo oxrl', preference_link.odpo_oxrl_loss, dict(margin=0.0)),
    ('rpo', preference_anchor.rpo_loss, dict(nll_coefficient=0.0)),
    ('dpnll', preference_anchor.dpnll_loss, dict(nll_coefficient=0.0)),
    ('betadpo oxrl', preference_gap.betadpo_oxrl_loss, dict(alpha=0.0)),
    ('betadpo', preference_gap.betadpo_loss,
     dict(alpha=0.0, drop_fraction=0.0, key=jax.random.key(0))),
]


def gradients(loss, pair, **hyper):
  """(value, d/d chosen, d/d rejected) at a pair."""
  def objective(chosen, rejected):
    return loss(pair.replace(chosen=pair.chosen.replace(log_probs=chosen),
                             rejected=pair.rejected.replace(log_probs=rejected)), **hyper)[0]
  value, grads = jax.value_and_grad(objective, (0, 1))(
      pair.chosen.log_probs, pair.rejected.log_probs)
  return value, *grads


def assert_same(first, second, rtol=1e-5):
  for a, b in zip(first, second, strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


@pytest.fixture
def pair():
  return cases.pair_of(cases.to_jax(cases.random_arrays(B, T), None, np.float32))


@pytest.mark.parametrize('name,loss,hyper', IDENTITIES, ids=[i[0] for i in IDENTITIES])
def test_limits_equal_dpo(pair, name, loss, hyper):
  assert_same(gradients(loss, pair, beta=0.3, **hyper),
              gradients(preference_link.dpo_loss, pair, beta=0.3))


def row(pair, i, copies=1):
  return jax.tree.map(lambda x: jnp.repeat(x[i:i + 1], copies, axis=0), pair)


def test_whole_batch_losses_on_equal_pairs_equal_dpo(pair):
  dpo = gradients(preference_link.dpo_loss, row(pair, 0, 2), beta=0.3)
  for loss in (preference_gap.aot_loss, preference_gap.aot_unpaired_loss,
               preference_anchor.drdpo_loss):
    assert_same(gradients(loss, row(pair, 0, 2), beta=0.3), dpo)
  assert_same(gradients(preference_anchor.drdpo_loss, row(pair, 1), beta=0.3),
              gradients(preference_link.dpo_loss, row(pair, 1), beta=0.3))


def test_gpo_squared_is_ipo_oxrl_rescaled(pair):
  squared = gradients(preference_link.gpo_loss, pair, beta=0.3, variant='squared')
  ipo = gradients(preference_score.ipo_oxrl_loss, pair, beta=0.15)
  assert_same(squared, [0.09 * x for x in ipo])


def test_simpo_is_the_limit_of_alphapo_and_alpha_dpo(pair):
  simpo = gradients(preference_score.simpo_loss, pair, beta=2.0, margin=0.6)
  assert_same(gradients(preference_score.alphapo_loss, pair, beta=2.0, margin=0.6, alpha=0.0), simpo)
  assert_same(gradients(preference_score.alphapo_loss, pair, beta=2.0, margin=0.6, alpha=1e-4),
              simpo, rtol=1e-3)
  assert_same(gradients(preference_gap.alpha_dpo_loss, pair, beta=2.0, margin_per_beta=0.3,
                        alpha=0.0), simpo)


def test_exo_is_zero_at_its_minimum():
  """6.3, no. 8: the minimum lies at h = log((1 - ε) / ε) and is 0."""
  target = float(np.log(0.9 / 0.1))
  one = types.SideLogProbs(log_probs=jnp.full((1, 1), -1.0), loss_mask=jnp.ones((1, 1), bool),
                           reference_log_probs=jnp.full((1, 1), -1.0 - target))
  pair = types.PairLogProbs(chosen=one, rejected=one.replace(reference_log_probs=one.log_probs))
  value, chosen, rejected = gradients(
      preference_link.exo_loss, pair, beta=1.0, label_smoothing=0.1)
  np.testing.assert_allclose([value, chosen[0, 0], rejected[0, 0]], 0.0, atol=1e-6)


def at_reference(pair):
  same = lambda side: side.replace(reference_log_probs=side.log_probs)
  return types.PairLogProbs(chosen=same(pair.chosen), rejected=same(pair.rejected))


def test_start_of_training(pair):
  """At π = π₀ kinks are hit exactly: the ties of every clamp, and 6.3, no. 9."""
  start = at_reference(pair)
  np.testing.assert_allclose(
      preference_anchor.nca_loss(start)[0], 2 * np.log(2), rtol=1e-6)
  weight = lambda loss, **hyper: [
      -B * float(g[0, t]) for g, t in zip(
          gradients(loss, start, **hyper)[1:], [int(np.argmax(side.loss_mask[0])) for side in (
              pair.chosen, pair.rejected)])]
  np.testing.assert_allclose(weight(preference_gap.minor_dpo_loss), [0.05, 0.0], atol=1e-7)
  np.testing.assert_allclose(weight(preference_gap.dpop_loss), [0.05, -0.05], rtol=1e-6)
  np.testing.assert_allclose(weight(preference_gap.bpo_loss), [0.0, -0.015], atol=1e-7)
  np.testing.assert_allclose(weight(preference_score.chipo_loss), [0.1, -0.1], rtol=1e-6)
  np.testing.assert_allclose(weight(preference_link.hinge_loss), [0.1, -0.1], rtol=1e-6)
  np.testing.assert_allclose(
      weight(preference_link.discopop_loss), [-0.0784, 0.0784], rtol=1e-3)
  for loss, key in ((preference_gap.alpha_dpo_loss, {}),
                    (preference_gap.betadpo_loss, {'key': jax.random.key(0)})):
    value, *grads = gradients(loss, start, **key)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_hinge_stops_at_the_kink():
  side = types.SideLogProbs(log_probs=jnp.array([[-1.0]]), loss_mask=jnp.array([[True]]),
                            reference_log_probs=jnp.array([[-2.0]]))
  pair = types.PairLogProbs(chosen=side, rejected=side.replace(log_probs=jnp.array([[-2.0]])))
  value, chosen, rejected = gradients(preference_link.hinge_loss, pair, beta=1.0)
  assert value == chosen[0, 0] == rejected[0, 0] == 0.0


def test_sampo_draws_the_same_positions_for_policy_and_reference():
  arrays = cases.random_arrays(B, T)
  key = jax.random.key(3)
  with jax.enable_x64(True):
    pair = cases.pair_of(cases.to_jax(arrays, None, np.float64))
    value, *grads = gradients(preference_score.sampo_loss, pair, beta=0.3, key=key)
    drawn = preference_score.score.shared_sample(key, pair)
    kept = dict(arrays, chosen_mask=np.asarray(drawn.chosen.loss_mask),
                rejected_mask=np.asarray(drawn.rejected.loss_mask))
    w, l = cases.sides(kept)
    np.testing.assert_array_equal(w.n, l.n)
    np.testing.assert_allclose(
        value, reference.VALUES['dpo'](w, l, None, beta=0.3).mean(), rtol=1e-12)
    for grad, A, mask in zip(grads, reference.SLOPES['dpo'](w, l, beta=0.3),
                             (kept['chosen_mask'], kept['rejected_mask'])):
      np.testing.assert_allclose(-grad, np.where(mask, A[:, None] / B, 0.0), atol=1e-14)
  even = cases.pair_of(cases.to_jax(
      dict(arrays, rejected_mask=arrays['chosen_mask']), None, np.float32))
  assert_same(gradients(preference_score.sampo_loss, even, key=key),
              gradients(preference_link.dpo_loss, even))


def test_betadpo_drops_the_unusual_pairs(pair):
  """A pair far from the mean is hardly ever kept, and the state is what the next step reads."""
  far = pair.replace(chosen=pair.chosen.replace(
      log_probs=pair.chosen.log_probs.at[0].add(100.0)))
  state = running.Moments(mean=np.float32(0.0), std=np.float32(1.0), count=np.float32(4.0))
  loss = functools.partial(preference_gap.betadpo_loss, far, loss_state=state, decay=1.0,
                           drop_fraction=0.5, alpha=0.0)
  def weights(key):
    chosen = gradients(lambda p, **_: preference_gap.betadpo_loss(
        p, key=key, loss_state=state, decay=1.0, drop_fraction=0.5, alpha=0.0), far)[1]
    return (chosen != 0).any(axis=1)
  kept = jax.vmap(weights)(jax.random.split(jax.random.key(0), 64))
  assert (kept.sum(axis=1) == 2).all() and not kept[:, 0].any()
  assert kept[:, 1:].mean(axis=0).min() > 0.1, 'each of the usual pairs is drawn'
  new = loss(key=jax.random.key(0))[2]
  np.testing.assert_allclose([new.mean, new.std, new.count], [0.0, 1.0, 8.0])


def test_metrics_are_trls(pair):
  w, l = cases.sides(cases.random_arrays(B, T))
  metrics = preference_link.dpo_loss(pair, beta=0.3)[1]
  want = {'rewards/chosen': 0.3 * w.s.mean(), 'rewards/rejected': 0.3 * l.s.mean(),
          'rewards/margins': 0.3 * (w.s - l.s).mean(), 'rewards/accuracies': (w.s > l.s).mean(),
          'logps/chosen': w.S.mean(), 'logps/rejected': l.S.mean()}
  assert set(metrics) == set(want)
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5)


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
    preference_gap.aot_loss(row(pair, 0))
