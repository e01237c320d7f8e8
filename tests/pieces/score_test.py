"""Scores of responses: masked sums and means, shaped rewards, and cuts to equal length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import types
from ptjax.pieces import score

MASK = np.array([[True, True, False, True], [False, True, False, False], [False] * 4])
RNG = np.random.default_rng(0)
LOG_PROBS = np.where(MASK, -RNG.uniform(0.1, 2.0, MASK.shape), np.nan)
REFERENCE = np.where(MASK, -RNG.uniform(0.1, 2.0, MASK.shape), np.nan)


def side(log_probs=LOG_PROBS, mask=MASK, reference=REFERENCE, dtype=jnp.float32):
  reference = None if reference is None else jnp.asarray(reference, dtype)
  return types.SideLogProbs(jnp.asarray(log_probs, dtype), jnp.asarray(mask), reference)


def test_sums_and_means_skip_padding_and_empty_responses():
  total, reference = (np.where(MASK, x, 0.0).sum(axis=1) for x in (LOG_PROBS, REFERENCE))
  length = np.maximum(MASK.sum(axis=1), 1)
  for function, want in (
      (score.log_prob, total), (score.mean_log_prob, total / length),
      (score.reference_log_prob, reference), (score.log_ratio, total - reference),
      (score.mean_log_ratio, (total - reference) / length)):
    np.testing.assert_allclose(function(side()), want, rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda x: function(side().replace(log_probs=x)).sum())(side().log_probs)
    assert np.isfinite(grad).all() and not grad[~MASK].any()


def test_half_precision_is_summed_in_float32():
  assert score.log_ratio(side(dtype=jnp.bfloat16)).dtype == jnp.float32


def test_long_log_ratios_do_not_cancel():
  """Log-probs near -10 over 4,000 tokens: the sums have an ulp of 4e-3, the difference is 0.4."""
  log_probs = np.full((1, 4000), -10.0, np.float32)
  both = side(log_probs, np.ones((1, 4000), bool), log_probs - np.float32(1e-4))
  want = (log_probs - (log_probs - np.float32(1e-4))).astype(np.float64).sum()
  np.testing.assert_allclose(score.log_ratio(both), [want], rtol=1e-5)


def test_reference_is_constant_and_asked_for():
  grad = jax.grad(lambda x: score.log_ratio(side().replace(reference_log_probs=x)).sum())(
      side().reference_log_probs)
  assert not grad.any()
  with pytest.raises(ValueError, match='reference_log_probs'):
    score.log_ratio(side(reference=None))


def test_log_odds():
  mean = np.array([-50.0, -3.0, -0.7, -0.6, -1e-3])
  with jax.enable_x64(True):
    values, slopes = jax.vmap(jax.value_and_grad(score.log_odds))(jnp.asarray(mean))
  p = np.exp(mean)
  np.testing.assert_allclose(values, np.log(p) - np.log1p(-p), rtol=1e-12)
  np.testing.assert_allclose(slopes, 1 / (1 - p), rtol=1e-11)
  values, slopes = jax.vmap(jax.value_and_grad(score.log_odds))(jnp.array([-1e-7, 0.0]))
  np.testing.assert_allclose(values, -np.log(1e-6), rtol=1e-3)
  assert not slopes.any(), 'certain responses stop pushing'


@pytest.mark.parametrize('alpha', [0.25, 1.0, -0.5, 1e-3])
def test_box_cox(alpha):
  mean = np.array([-3.0, -0.5, -1e-4])
  with jax.enable_x64(True):
    values, slopes = jax.vmap(jax.value_and_grad(lambda m: score.box_cox(m, alpha)))(
        jnp.asarray(mean))
  np.testing.assert_allclose(values, (1 - np.exp(mean) ** -alpha) / alpha, rtol=1e-9)
  np.testing.assert_allclose(slopes, np.exp(mean) ** -alpha, rtol=1e-12)


def test_box_cox_without_alpha_is_the_mean():
  np.testing.assert_array_equal(score.box_cox(jnp.array([-3.0]), 0.0), [-3.0])


@pytest.mark.parametrize('divergence,slope', [
    ('reverse_kl', np.ones_like), ('forward_kl', lambda u: 1 / u), ('js', lambda u: 1 / (1 + u)),
    ('alpha', lambda u: u ** -0.6)])
def test_divergence_slopes(divergence, slope):
  """The derivative of f' in log u is u f''(u)."""
  log_ratios = np.array([-3.0, 0.0, 2.0])
  function = lambda s: score.divergence_slope(s, divergence, 0.6)
  with jax.enable_x64(True):
    slopes = jax.vmap(jax.grad(function))(jnp.asarray(log_ratios))
  np.testing.assert_allclose(slopes, slope(np.exp(log_ratios)), rtol=1e-12)
  values = jax.vmap(jax.value_and_grad(function))(jnp.array([-300.0, 300.0]))
  assert all(np.isfinite(v).all() for v in values)


def test_capped_ratio():
  values, slopes = jax.vmap(jax.value_and_grad(score.capped_ratio))(jnp.array([1.0, 20.0, 21.0]))
  np.testing.assert_allclose(values, np.exp([1.0, 20.0, 20.0]), rtol=1e-5)
  np.testing.assert_allclose(slopes, [np.exp(1.0), np.exp(20.0), 0.0], rtol=1e-5)


def pair():
  other = np.array([[False, True, False, False], [True] * 4, [True, True, False, False]])
  return types.PairLogProbs(chosen=side(), rejected=side(np.zeros(MASK.shape), other))


def test_shared_prefix_keeps_the_first_tokens_of_the_longer_response():
  cut = score.shared_prefix(pair())
  np.testing.assert_array_equal(cut.chosen.loss_mask, [
      [True, False, False, False], [False, True, False, False], [False] * 4])
  np.testing.assert_array_equal(cut.rejected.loss_mask, [
      [False, True, False, False], [True, False, False, False], [False] * 4])


def test_shared_sample_draws_uniformly_among_the_tokens():
  keys = jax.random.split(jax.random.key(0), 400)
  cut = jax.jit(jax.vmap(lambda key: score.shared_sample(key, pair())))(keys)
  for drawn, whole in ((cut.chosen, pair().chosen), (cut.rejected, pair().rejected)):
    assert not (drawn.loss_mask & ~whole.loss_mask[None]).any()
    np.testing.assert_array_equal(
        drawn.loss_mask.sum(axis=2), np.tile([1, 1, 0], (len(keys), 1)))
  np.testing.assert_allclose(cut.chosen.loss_mask[:, 0].mean(axis=0), MASK[0] / 3, atol=0.1)
  np.testing.assert_allclose(cut.rejected.loss_mask[:, 1].mean(axis=0), 0.25, atol=0.1)


def test_shared_sample_draws_every_subset_equally_often():
  padded = lambda count: jnp.arange(7)[None] < count  # after the response
  both = types.PairLogProbs(*(
      types.SideLogProbs(jnp.zeros((1, 7)), padded(count)) for count in (2, 4)))
  keys = jax.random.split(jax.random.key(1), 1200)
  drawn = jax.jit(jax.vmap(lambda key: score.shared_sample(key, both)))(keys).rejected.loss_mask
  subsets, counts = np.unique(np.asarray(drawn[:, 0]), axis=0, return_counts=True)
  assert len(subsets) == 6 and (subsets.sum(axis=1) == 2).all()
  np.testing.assert_allclose(counts, 200, atol=70)  # five standard deviations


def test_of_pair_wants_equally_many_rows():
  fewer = pair().replace(rejected=jax.tree.map(lambda x: x[:1], pair().rejected))
  with pytest.raises(ValueError, match='same number of responses'):
    score.of_pair(score.log_prob, fewer)


def test_metrics_carry_no_gradient():
  def total(log_probs):
    both = pair().replace(chosen=side().replace(log_probs=log_probs))
    rewards = score.of_pair(score.log_ratio, both)
    return sum(score.pair_metrics(both, *rewards).values())
  assert not jax.grad(total)(side().log_probs).any()
