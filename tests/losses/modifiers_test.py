"""Modifiers: what they change, what they leave, and how their signatures add up."""

import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import modifiers
from ptjax.losses import policy_gradient as pg
from ptjax.losses import policy_gradient_sequence as seq

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import policy_gradient_cases as cases


@pytest.fixture(scope='module')
def arrays():
  arrays = {n: jnp.asarray(x, bool if x.dtype == bool else np.float32)
            for n, x in cases.random_arrays().items()}
  arrays['rollout_log_probs'] = arrays['old_log_probs'] + 0.5 * arrays['token_advantages']
  arrays['truncated'] = jnp.arange(cases.B) % 3 == 0
  return arrays


def run(loss, arrays, **hyper):
  """(value, weights, whatever else the loss returns)."""
  names = inspect.signature(loss).parameters
  inputs = {n: x for n, x in arrays.items() if n in names and n != 'log_probs'}
  def objective(log_probs):
    value, *rest = loss(log_probs, **inputs, **hyper)
    return value, rest
  (value, rest), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(arrays['log_probs'])
  return value, -grad, rest


def with_advantages(arrays, advantages):
  return {**arrays, 'advantages': advantages}


def test_neutral_settings_change_nothing(arrays):
  neutral = [
      ('tis', {'rollout_log_probs': arrays['old_log_probs']}, {}),
      ('mis', {'rollout_log_probs': arrays['old_log_probs']}, {}),
      ('opsm', {}, {'drift_threshold': 1e9}),
      ('top_entropy', {}, {'entropy_fraction': 1.0}),
      ('mask_truncated', {'truncated': jnp.zeros(cases.B, bool)}, {}),
      ('entropy_bonus', {}, {'entropy_coefficient': 0.0}),
      ('adaptive_entropy', {}, {}),
      ('corrected_kl', {}, {'kl_coefficient': 0.0}),
      ('kl', {}, {'kl_coefficient': 0.0}),
      ('adaptive_kl', {}, {'kl_coefficient': 0.0}),
      ('adaptive_reward_kl', {}, {})]
  assert {name for name, _, _ in neutral} == set(modifiers.MODIFIERS)
  value, weights, _ = run(pg.dapo_loss, arrays)
  for name, change, hyper in neutral:
    got, got_weights, _ = run(
        modifiers.MODIFIERS[name](pg.dapo_loss), {**arrays, **change}, **hyper)
    np.testing.assert_allclose(got, value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(got_weights, weights, rtol=1e-5, atol=1e-8, err_msg=name)


def test_tis_multiplies_each_tokens_weight(arrays):
  _, plain, _ = run(pg.grpo_loss, arrays)
  _, weights, _ = run(modifiers.tis(pg.grpo_loss), arrays, max_rollout_ratio=1.3)
  ratio = np.exp(arrays['old_log_probs'] - arrays['rollout_log_probs'])
  np.testing.assert_allclose(weights, plain * np.minimum(ratio, 1.3), rtol=1e-4, atol=1e-7)


def test_mis_zeroes_what_lies_outside(arrays):
  _, plain, _ = run(pg.grpo_loss, arrays)
  _, weights, _ = run(modifiers.mis(pg.grpo_loss), arrays, min_rollout_ratio=0.8,
                      max_rollout_ratio=1.3)
  ratio = np.exp(arrays['old_log_probs'] - arrays['rollout_log_probs'])
  inside = (ratio >= 0.8) & (ratio <= 1.3)
  np.testing.assert_allclose(weights, np.where(inside, plain * ratio, 0.0), rtol=1e-4, atol=1e-7)


def test_sequence_level_keeps_one_advantage_per_sequence(arrays):
  """So that it composes with losses of one ratio per sequence; the token level does not."""
  clip = dict(clip_low=9.0, clip_high=9.0)
  _, plain, _ = run(seq.gspo_loss, arrays, **clip)
  _, weights, _ = run(modifiers.tis(seq.gspo_loss), arrays, level='sequence', **clip)
  gap = np.where(arrays['loss_mask'], arrays['old_log_probs'] - arrays['rollout_log_probs'], 0.0)
  factor = np.minimum(np.exp(gap.sum(1)), 2.0)[:, None]
  np.testing.assert_allclose(weights, plain * factor, rtol=1e-4, atol=1e-7)
  with pytest.raises(ValueError, match='one per sequence'):
    run(modifiers.tis(seq.gspo_loss), arrays, level='token')
  with pytest.raises(ValueError, match="level='word'"):
    run(modifiers.tis(pg.grpo_loss), arrays, level='word')


def test_opsm_drops_whole_sequences(arrays):
  mask = np.asarray(arrays['loss_mask'])
  gap = np.where(mask, arrays['rollout_log_probs'] - arrays['log_probs'], 0.0)
  drift = gap.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
  ragged = (mask.sum(1) > 1) & ~mask.all(1) & (np.asarray(arrays['advantages']) < 0)
  row = int(np.argmax(ragged))
  assert ragged[row]
  for advantages, threshold in ((arrays['advantages'], 0.0), (arrays['token_advantages'], 0.0),
                                (arrays['advantages'], float(drift[row, 0]) - 1e-3),
                                (arrays['advantages'], float(drift[row, 0]) + 1e-3)):
    _, plain, _ = run(pg.grpo_loss, with_advantages(arrays, advantages))
    _, weights, _ = run(modifiers.opsm(pg.grpo_loss), with_advantages(arrays, advantages),
                        drift_threshold=threshold)
    dropped = (drift > threshold) & (np.asarray(advantages).reshape(cases.B, -1) < 0)
    np.testing.assert_allclose(weights, np.where(dropped, 0.0, plain), rtol=1e-5, atol=1e-8)


def test_corrected_kl_is_k3_under_the_old_policy(arrays):
  value, weights, _ = run(pg.grpo_loss, arrays)
  got, got_weights, (metrics,) = run(modifiers.corrected_kl(pg.grpo_loss), arrays,
                                     kl_coefficient=0.3)
  mask = np.asarray(arrays['loss_mask'])
  k1 = np.asarray(arrays['log_probs'] - arrays['reference_log_probs'], np.float64)
  ratio = np.exp(np.asarray(arrays['log_probs'] - arrays['old_log_probs'], np.float64))
  k3 = np.where(mask, ratio * (np.exp(-k1) + k1 - 1), 0.0)
  per_sequence = cases.B * np.maximum(mask.sum(1, keepdims=True), 1)
  np.testing.assert_allclose(got - value, 0.3 * (k3 / per_sequence).sum(), rtol=1e-4)
  np.testing.assert_allclose(got_weights - weights, np.where(mask, -0.3 * ratio * k1, 0.0)
                             / per_sequence, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(metrics['kl'], k3.sum() / mask.sum(), rtol=1e-5)


def test_top_entropy_keeps_the_normalizer(arrays):
  _, plain, _ = run(pg.dapo_loss, arrays)
  _, weights, _ = run(modifiers.top_entropy(pg.dapo_loss), arrays, entropy_fraction=0.3)
  mask = np.asarray(arrays['loss_mask'])
  keep = mask & (arrays['entropy'] >= np.quantile(np.asarray(arrays['entropy'])[mask], 0.7))
  np.testing.assert_allclose(weights, np.where(keep, plain, 0.0), rtol=1e-5, atol=1e-8)


def test_mask_truncated_shrinks_the_normalizer(arrays):
  _, weights, _ = run(modifiers.mask_truncated(pg.reinforce_loss), arrays)
  mask = np.asarray(arrays['loss_mask']) & ~np.asarray(arrays['truncated'])[:, None]
  want = np.where(mask, np.asarray(arrays['advantages'])[:, None], 0.0) / mask.sum()
  np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_adaptive_entropy_steers_to_its_target(arrays):
  loss = modifiers.adaptive_entropy(pg.dapo_loss)
  mean = float(np.asarray(arrays['entropy'])[np.asarray(arrays['loss_mask'])].mean())
  value, _, _ = run(pg.dapo_loss, arrays)
  low, _, (metrics, up) = run(loss, arrays, loss_state=jnp.float32(0.5), entropy_target=mean + 0.1)
  np.testing.assert_allclose(low, value - 0.5 * mean, rtol=1e-5)
  np.testing.assert_allclose(up, 0.505, rtol=1e-6)
  np.testing.assert_allclose(metrics['entropy_coefficient'], 0.5, rtol=1e-6)
  high, _, (_, down) = run(loss, arrays, loss_state=jnp.float32(0.5), entropy_target=mean - 0.1)
  np.testing.assert_allclose(high, value, rtol=1e-5)
  np.testing.assert_allclose(down, 0.495, rtol=1e-6)
  _, _, (_, floor) = run(loss, arrays, entropy_target=mean - 0.1)
  assert floor == 0.0


def gap_of(arrays):
  """log π - log π₀ on the mask, 0 off it; float64."""
  gap = np.asarray(arrays['log_probs'] - arrays['reference_log_probs'], np.float64)
  return np.where(arrays['loss_mask'], gap, 0)


@pytest.mark.parametrize('name, value_of, weight_of', [
    ('k1', lambda d: d, lambda d: -np.ones_like(d)),
    ('k2', lambda d: d**2 / 2, lambda d: -d),
    ('k3', lambda d: np.exp(-d) + d - 1, lambda d: np.exp(-d) - 1)])
def test_kl_in_the_loss_by_each_estimator(arrays, name, value_of, weight_of):
  plain, plain_weights, _ = run(pg.dapo_loss, arrays)
  value, weights, (metrics,) = run(modifiers.kl(pg.dapo_loss), arrays, kl_coefficient=0.3,
                                   kl_estimator=name)
  gap, mask = gap_of(arrays), np.asarray(arrays['loss_mask'])
  per_row = np.maximum(mask.sum(1, keepdims=True), 1) * len(mask)
  np.testing.assert_allclose(
      value - plain, 0.3 * (value_of(gap) * mask / per_row).sum(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
      weights - plain_weights, 0.3 * weight_of(gap) * mask / per_row, rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(metrics['kl'], value_of(gap)[mask].mean(), rtol=1e-4)


def test_kl_takes_the_place_of_a_losss_own_term(arrays):
  own, own_weights, _ = run(pg.grpo_loss, arrays, kl_coefficient=0.3)
  value, weights, _ = run(modifiers.kl(pg.grpo_loss), arrays, kl_coefficient=0.3)
  np.testing.assert_allclose(value, own, rtol=1e-6)
  np.testing.assert_allclose(weights, own_weights, rtol=1e-5, atol=1e-8)
  with pytest.raises(ValueError, match="kl_estimator='k4': expected one of k3, k2, k1"):
    run(modifiers.kl(pg.grpo_loss), arrays, kl_estimator='k4')


@pytest.mark.parametrize('name, key', [
    ('adaptive_kl', 'kl_scale'), ('adaptive_reward_kl', 'reward_kl_scale')])
@pytest.mark.parametrize('off', [0.5, 0.9, 1.1, 2.0])  # the KL over its target
def test_the_controller_moves_towards_its_target(arrays, name, key, off):
  """Three steps of Ziegler's rule in float64."""
  loss = modifiers.MODIFIERS[name](pg.dapo_loss)
  arrays = {**arrays, 'reference_log_probs': arrays['log_probs'] - jnp.abs(arrays['log_probs'])}
  seen = gap_of(arrays).sum(1)[np.asarray(arrays['loss_mask']).any(1)]
  state, expected = {key: jnp.float32(1.5)}, 1.5
  for _ in range(3):
    _, _, (metrics, state) = run(loss, arrays, loss_state=state, kl_target=seen.mean() / off,
                                 kl_horizon=50)
    expected *= 1 + np.clip(off - 1, -0.2, 0.2) * len(seen) / 50
    np.testing.assert_allclose(state[key], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['kl_per_sequence'], seen.mean(), rtol=1e-5)


def test_a_controlled_reward_leaves_the_losss_own_kl(arrays):
  value, weights, _ = run(pg.grpo_loss, arrays, kl_coefficient=0.3)
  got, got_weights, _ = run(modifiers.adaptive_reward_kl(pg.grpo_loss), arrays, kl_coefficient=0.3)
  np.testing.assert_allclose(got, value, rtol=1e-6)
  np.testing.assert_allclose(got_weights, weights, rtol=1e-5, atol=1e-8)


def test_adaptive_kl_is_kl_under_its_present_coefficient(arrays):
  value, weights, _ = run(modifiers.kl(pg.dapo_loss), arrays, kl_coefficient=0.3)
  got, got_weights, (metrics, _) = run(
      modifiers.adaptive_kl(pg.dapo_loss), arrays, kl_coefficient=0.2,
      loss_state={'kl_scale': jnp.float32(1.5)})
  np.testing.assert_allclose(got, value, rtol=1e-6)
  np.testing.assert_allclose(got_weights, weights, rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(metrics['kl_coefficient'], 0.3, rtol=1e-6)


def test_signatures_add_up():
  loss = modifiers.tis(modifiers.top_entropy(pg.grpo_loss))
  names = inspect.signature(loss).parameters
  assert list(names)[0] == 'log_probs'
  assert {'rollout_log_probs', 'entropy', 'reference_log_probs', 'clip_low', 'entropy_fraction',
          'max_rollout_ratio'} <= set(names)
  assert names['max_rollout_ratio'].default == 2.0 and names['clip_low'].default == 0.2
  assert loss.__name__ == 'grpo_loss+top_entropy+tis'


def test_modifiers_commute_where_they_scale(arrays):
  one = modifiers.tis(modifiers.top_entropy(pg.grpo_loss))
  other = modifiers.top_entropy(modifiers.tis(pg.grpo_loss))
  for a, b in zip(run(one, arrays)[:2], run(other, arrays)[:2]):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_modified_loss_keeps_its_hyperparameters(arrays):
  wide, narrow = (run(modifiers.tis(pg.grpo_loss), arrays, clip_low=c, clip_high=c)[1]
                  for c in (9.0, 0.01))
  assert (np.asarray(wide) != 0).sum() > (np.asarray(narrow) != 0).sum()
