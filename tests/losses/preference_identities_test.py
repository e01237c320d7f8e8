"""Where preference losses meet: limits that equal DPO, ties, draws, and what they remember."""

import functools
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
from ptjax.pieces import score

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases
import preference_reference as reference

B, T = 4, 6


@pytest.fixture
def pair():
  return cases.pair_of(cases.to_jax(cases.random_arrays(B, T), None, np.float32))


IDENTITIES = [
    ('gpo logistic', preference_link.gpo_loss, dict(variant='logistic')),
    ('dpop', preference_gap.dpop_loss, dict(penalty_coefficient=0.0)),
    ('cdpo', preference_link.cdpo_loss, dict(label_smoothing=0.0)),
    ('robust', preference_link.robust_dpo_loss, dict(label_smoothing=0.0)),
    ('robust oxrl', preference_link.robust_dpo_oxrl_loss, dict(label_smoothing=0.0)),
    ('hdpo', preference_score.hdpo_loss, dict(alpha=1.0)),
    ('dposhift', preference_score.dposhift_loss, dict(rejected_coefficient=1.0)),
    ('fdpo', preference_score.fdpo_loss, dict(variant='reverse_kl')),
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


def assert_same(first, second, rtol=1e-5):
  for a, b in zip(first, second, strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize('name,loss,hyper', IDENTITIES, ids=[i[0] for i in IDENTITIES])
def test_limits_equal_dpo(pair, name, loss, hyper):
  assert_same(cases.gradients(loss, pair, beta=0.3, **hyper),
              cases.gradients(preference_link.dpo_loss, pair, beta=0.3))


def test_whole_batch_losses_on_equal_pairs_equal_dpo(pair):
  dpo = cases.gradients(preference_link.dpo_loss, cases.row(pair, 0, 2), beta=0.3)
  for loss in (preference_gap.aot_loss, preference_gap.aot_unpaired_loss,
               preference_anchor.drdpo_loss):
    assert_same(cases.gradients(loss, cases.row(pair, 0, 2), beta=0.3), dpo)
  assert_same(cases.gradients(preference_anchor.drdpo_loss, cases.row(pair, 1), beta=0.3),
              cases.gradients(preference_link.dpo_loss, cases.row(pair, 1), beta=0.3))


def test_gpo_squared_is_ipo_oxrl_rescaled(pair):
  squared = cases.gradients(preference_link.gpo_loss, pair, beta=0.3, variant='squared')
  ipo = cases.gradients(preference_score.ipo_oxrl_loss, pair, beta=0.15)
  assert_same(squared, [0.09 * x for x in ipo])


def test_simpo_is_the_limit_of_alphapo_and_alpha_dpo(pair):
  simpo = cases.gradients(preference_score.simpo_loss, pair, beta=2.0, margin=0.6)
  for alpha, rtol in ((0.0, 1e-5), (1e-4, 1e-3)):
    alphapo = cases.gradients(
        preference_score.alphapo_loss, pair, beta=2.0, margin=0.6, alpha=alpha)
    assert_same(alphapo, simpo, rtol=rtol)
  assert_same(cases.gradients(preference_gap.alpha_dpo_loss, pair, beta=2.0, margin_per_beta=0.3,
                        alpha=0.0), simpo)


def test_exo_is_zero_at_its_minimum():
  """6.3, no. 8: the minimum lies at h = log((1 - ε) / ε) and is 0."""
  target = float(np.log(0.9 / 0.1))
  one = types.SideLogProbs(log_probs=jnp.full((1, 1), -1.0), loss_mask=jnp.ones((1, 1), bool),
                           reference_log_probs=jnp.full((1, 1), -1.0 - target))
  pair = types.PairLogProbs(chosen=one, rejected=one.replace(reference_log_probs=one.log_probs))
  value, chosen, rejected = cases.gradients(
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
          cases.gradients(loss, start, **hyper)[1:],
          [int(np.argmax(side.loss_mask[0])) for side in (pair.chosen, pair.rejected)])]
  np.testing.assert_allclose(weight(preference_gap.minor_dpo_loss), [0.05, 0.0], atol=1e-7)
  np.testing.assert_allclose(weight(preference_gap.dpop_loss), [0.05, -0.05], rtol=1e-6)
  np.testing.assert_allclose(weight(preference_gap.bpo_loss), [0.0, -0.015], atol=1e-7)
  np.testing.assert_allclose(weight(preference_score.chipo_loss), [0.1, -0.1], rtol=1e-6)
  np.testing.assert_allclose(weight(preference_link.hinge_loss), [0.1, -0.1], rtol=1e-6)
  np.testing.assert_allclose(
      weight(preference_link.discopop_loss), [-0.0784, 0.0784], rtol=1e-3)
  for loss, key in ((preference_gap.alpha_dpo_loss, {}),
                    (preference_gap.betadpo_loss, {'key': jax.random.key(0)})):
    value, *grads = cases.gradients(loss, start, **key)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_hinge_stops_at_the_kink():
  side = types.SideLogProbs(log_probs=jnp.array([[-1.0]]), loss_mask=jnp.array([[True]]),
                            reference_log_probs=jnp.array([[-2.0]]))
  pair = types.PairLogProbs(chosen=side, rejected=side.replace(log_probs=jnp.array([[-2.0]])))
  value, chosen, rejected = cases.gradients(preference_link.hinge_loss, pair, beta=1.0)
  assert value == chosen[0, 0] == rejected[0, 0] == 0.0


def test_sampo_draws_the_same_positions_for_policy_and_reference():
  arrays = cases.random_arrays(B, T)
  key = jax.random.key(3)
  with jax.enable_x64(True):
    pair = cases.pair_of(cases.to_jax(arrays, None, np.float64))
    value, *grads = jax.jit(functools.partial(
        cases.gradients, preference_score.sampo_loss, beta=0.3, key=key))(pair)
    drawn = jax.jit(score.shared_sample)(key, pair)
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
  assert_same(cases.gradients(preference_score.sampo_loss, even, key=key),
              cases.gradients(preference_link.dpo_loss, even))


def test_betadpo_drops_the_unusual_pairs(pair):
  """A pair far from the mean is hardly ever kept, and the state is what the next step reads."""
  far = pair.replace(chosen=pair.chosen.replace(
      log_probs=pair.chosen.log_probs.at[0].add(100.0)))
  state = running.Moments(mean=np.float32(0.0), std=np.float32(1.0), count=np.float32(4.0))
  loss = functools.partial(preference_gap.betadpo_loss, loss_state=state, decay=1.0,
                           drop_fraction=0.5, alpha=0.0)
  def kept_pairs(key):
    return (cases.gradients(loss, far, key=key)[1] != 0).any(axis=1)
  kept = jax.jit(jax.vmap(kept_pairs))(jax.random.split(jax.random.key(0), 64))
  assert (kept.sum(axis=1) == 2).all() and not kept[:, 0].any()
  assert kept[:, 1:].mean(axis=0).min() > 0.1, 'each of the usual pairs is drawn'
  new = loss(far, key=jax.random.key(0))[2]
  np.testing.assert_allclose([new.mean, new.std, new.count], [0.0, 1.0, 8.0])


def test_states_after_a_batch(pair):
  """What each stateful loss remembers of its first batch."""
  w, l = cases.sides(cases.random_arrays(B, T))
  gap, disagreement = w.s - l.s, (w.m - l.m) - (w.m0 - l.m0)
  for loss, hyper, mean, std, count in (
      (preference_gap.betadpo_loss, {'key': jax.random.key(0)}, 0.1 * gap.mean(),
       0.1 * gap.std(ddof=1), B),
      (preference_gap.betadpo_oxrl_loss, {}, gap.mean(), gap.std(ddof=1), B),
      (preference_gap.alpha_dpo_loss, {}, 0.1 * disagreement.mean(),
       0.1 * disagreement.std(ddof=1), B),
      (unpaired.kto_oxrl_loss, {}, 0.1 * w.s.mean(), 0.1 * w.s.std(ddof=1), B),
      (preference_anchor.mpo_loss, {}, 0.05 * (w.s + l.s).mean(), 0.0, 2 * B)):
    state = loss(pair, **hyper)[2]
    np.testing.assert_allclose(state, [mean, std, count], rtol=1e-4, err_msg=loss.__name__)
