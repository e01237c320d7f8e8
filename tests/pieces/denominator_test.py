"""Ratios against NumPy, and at the ends of the range."""

import jax.numpy as jnp
import numpy as np

from ptjax.pieces import denominator

MASK = np.array([[True, True, False], [True, False, False]])
LOG_PROBS = np.array([[-1.0, -0.5, 0.0], [-2.0, 0.0, 0.0]], np.float32)
OLD = np.array([[-1.3, -0.1, 0.0], [-1.0, 0.0, 0.0]], np.float32)


def test_token_ratio():
  np.testing.assert_allclose(denominator.old(LOG_PROBS, OLD), np.exp(LOG_PROBS - OLD), rtol=1e-6)
  np.testing.assert_array_equal(denominator.current(LOG_PROBS), np.ones((2, 3)))
  np.testing.assert_allclose(denominator.unit(LOG_PROBS), np.exp(LOG_PROBS), rtol=1e-6)


def test_sequence_ratios_are_the_same_for_all_tokens():
  mean = np.exp([(0.3 - 0.4) / 2, -1.0])
  total = np.exp([0.3 - 0.4, -1.0])
  np.testing.assert_allclose(
      denominator.sequence_mean(LOG_PROBS, OLD, MASK), np.tile(mean[:, None], 3), rtol=1e-6)
  np.testing.assert_allclose(
      denominator.sequence(LOG_PROBS, OLD, MASK), np.tile(total[:, None], 3), rtol=1e-6)


def test_extreme_ratios_stop_at_e20():
  far = jnp.array([[50.0, -50.0]])
  want = np.exp([[20.0, -20.0]])
  zero = jnp.zeros_like(far)
  np.testing.assert_allclose(denominator.old(far, zero), want, rtol=1e-5)
  mask = jnp.array([[True, False]])
  np.testing.assert_allclose(denominator.sequence(far, zero, mask), np.exp(20.0), rtol=1e-5)


def test_truncated_has_no_lower_bound():
  got = denominator.truncated(jnp.array([[0.01, 1.0, 7.0]]), max_ratio=5.0)
  np.testing.assert_allclose(got, [[0.01, 1.0, 5.0]], rtol=1e-6)


def test_same_weights_give_exactly_one():
  np.testing.assert_array_equal(denominator.old(LOG_PROBS, LOG_PROBS), 1.0)
  np.testing.assert_array_equal(denominator.sequence_mean(LOG_PROBS, LOG_PROBS, MASK), 1.0)
