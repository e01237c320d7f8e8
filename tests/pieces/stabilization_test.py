"""Masks: the four corners of the clip, ties, gates, covariance, entropy, drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import stabilization

RATIO = jnp.array([[0.5, 0.8, 1.0, 1.3, 2.0]])


@pytest.mark.parametrize('sign, keep', [
    (1.0, [True, True, True, True, False]), (-1.0, [False, True, True, True, True]),
    (0.0, [True] * 5)])
def test_clip_mask_keeps_ties_and_the_way_back(sign, keep):
  ratio = jnp.asarray(np.array([[0.5, 1 - 0.2, 1.0, 1 + 0.3, 2.0]], np.float32))
  low, high = float(1 - ratio[0, 1]), float(ratio[0, 3] - 1)  # exactly at the bounds
  mask = stabilization.clip_mask(ratio, jnp.full_like(ratio, sign), low=low, high=high)
  np.testing.assert_array_equal(mask[0], keep)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_clipped_ratio_is_ppos_minimum(sign):
  advantages = jnp.full_like(RATIO, sign)
  stable = stabilization.clip_mask(RATIO, advantages, low=0.1, high=0.2)
  got = stabilization.clipped_ratio(RATIO, stable, low=0.1, high=0.2) * advantages
  want = np.minimum(RATIO * sign, np.clip(RATIO, 0.9, 1.2) * sign)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_dual_clip_mask():
  keep = stabilization.dual_clip_mask(RATIO, jnp.array([[-1.0, 1.0, -1.0, -1.0, -1.0]]),
                                      max_ratio=1.3)
  np.testing.assert_array_equal(keep[0], [True, True, True, True, False])
  encouraged = jnp.full_like(RATIO, 0.5)
  assert stabilization.dual_clip_mask(RATIO, encouraged, max_ratio=0.1).all()


def test_soft_gate_is_the_slope_of_its_value():
  advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]])
  of = lambda ratio: stabilization.soft_gate(
      ratio, advantages, temperature_positive=1.0, temperature_negative=1.5)
  gate, _ = of(RATIO)
  slope = jax.grad(lambda r: of(r)[1].sum())(RATIO)
  np.testing.assert_allclose(gate, slope, rtol=1e-5)
  np.testing.assert_allclose(of(jnp.ones_like(RATIO))[0], 1.0, rtol=1e-6)
  assert gate.max() <= 1.0


def test_gamma_gate_times_ratio_is_phi():
  log_ratio = jnp.array([[-2.0, -0.3, 0.0, 0.7]])
  advantages = jnp.array([[1.0, -1.0, 1.0, -1.0]])
  gate = stabilization.gamma_gate(log_ratio, advantages, shape_positive=2.0, rate_positive=3.0,
                                  shape_negative=3.0, rate_negative=2.0)
  W = np.exp(np.asarray(log_ratio, np.float64))
  k, rate = np.where(np.asarray(advantages) > 0, 2.0, 3.0), np.where(
      np.asarray(advantages) > 0, 3.0, 2.0)
  np.testing.assert_allclose(gate * W, W ** k * np.exp(rate * (1 - W)), rtol=1e-5)


def test_covariance_is_over_the_mask_and_carries_no_gradient():
  rng = np.random.default_rng(0)
  A, log_probs = rng.normal(size=(2, 2, 4)).astype(np.float32)
  mask = np.array([[True, True, False, False], [True] * 4])
  got = stabilization.covariance(A, log_probs, mask)
  want = (A - A[mask].mean()) * (log_probs - log_probs[mask].mean())
  np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=1e-5)
  grad = jax.grad(lambda l: stabilization.covariance(A, l, mask).sum())(jnp.asarray(log_probs))
  assert not np.asarray(grad).any()


@pytest.mark.parametrize('fraction, count', [(1e-9, 1), (0.3, 2), (0.5, 3), (1.0, 7)])
def test_largest_counts_tokens_on_the_mask(fraction, count):
  scores = jnp.arange(8.0).reshape(2, 4)
  mask = jnp.ones((2, 4), bool).at[1, 3].set(False)  # the largest score is padding
  got = stabilization.largest(scores, mask, fraction=fraction)
  want = np.zeros(8, bool)
  want[7 - count:7] = True
  np.testing.assert_array_equal(got.reshape(-1), want)


def test_largest_passes_over_minus_infinity():
  scores = jnp.array([[-jnp.inf, 1.0, -jnp.inf, -jnp.inf]])
  got = stabilization.largest(scores, jnp.ones((1, 4), bool), fraction=1.0)
  np.testing.assert_array_equal(got, [[False, True, False, False]])


def test_off_policy_mask_drops_discouraged_drifted_sequences():
  mask = jnp.array([[True, True], [True, False], [True, True]])
  log_probs = jnp.array([[-1.0, -1.0], [-1.0, 99.0], [-1.0, -1.0]])
  rollout = jnp.array([[0.0, 0.0], [-0.95, -99.0], [0.0, 0.0]])
  advantages = jnp.array([[-1.0] * 2, [-1.0] * 2, [1.0] * 2])
  keep = stabilization.off_policy_mask(log_probs, rollout, advantages, mask, threshold=0.1)
  np.testing.assert_array_equal(keep[:, 0], [False, True, True])


@pytest.mark.parametrize('fraction', [0.05, 0.2, 0.4, 1.0])
def test_top_entropy_mask_takes_the_quantile_of_the_mask_alone(fraction):
  rng = np.random.default_rng(0)
  mask = jnp.asarray(rng.random((7, 9)) < 0.7)
  entropy = rng.exponential(size=(7, 9)).astype(np.float32)
  entropy[0] = np.round(entropy[0])  # ties, and zeros
  got = jax.jit(lambda e: stabilization.top_entropy_mask(e, mask, fraction=fraction))(
      np.where(mask, entropy, np.nan))
  threshold = np.quantile(entropy[mask].astype(np.float64), 1.0 - fraction)
  np.testing.assert_array_equal(got, mask & (entropy >= threshold))


def test_top_entropy_of_nothing_is_nothing():
  nothing = jnp.zeros((2, 3), bool)
  assert not stabilization.top_entropy_mask(jnp.ones((2, 3)), nothing, fraction=0.2).any()
