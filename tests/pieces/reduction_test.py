"""Reductions against loops, and what they make of padding and empty rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import reduction

B, T = 4, 5
MASK = np.arange(T)[None] < np.array([[3], [5], [0], [1]])
VALUES = np.random.default_rng(0).normal(size=(B, T))
ROWS = [VALUES[i][MASK[i]] for i in range(B)]
EXPECTED = {
    'token_mean': np.concatenate(ROWS).mean(),
    'sequence_mean': np.mean([r.mean() if r.size else 0.0 for r in ROWS]),
    'sequence_sum': np.mean([r.sum() for r in ROWS]),
    'fixed_length_mean': sum(r.sum() for r in ROWS) / (B * T)}


@pytest.mark.parametrize('name', EXPECTED)
def test_value_and_padding(name):
  reduce = getattr(reduction, name)
  poisoned = np.where(MASK, VALUES, np.nan).astype(np.float32)
  got, grad = jax.value_and_grad(reduce)(jnp.asarray(poisoned), MASK)
  np.testing.assert_allclose(got, EXPECTED[name], rtol=1e-6)
  assert np.isfinite(grad).all() and not np.asarray(grad)[~MASK].any()
  empty = reduce(jnp.asarray(poisoned), np.zeros((B, T), bool))
  assert empty == 0.0


def test_fixed_length_is_the_configured_one():
  ones = jnp.ones((B, T))
  np.testing.assert_allclose(
      reduction.fixed_length_mean(ones, MASK, max_completion_tokens=20), 9 / (B * 20), rtol=1e-6)


def test_log_sum_exp_lies_between_mean_and_maximum():
  values = jnp.array([0.3, -1.0, 2.0, 2.0])
  for temperature, want in ((1e3, float(values.mean())), (1e-2, 2.0 - 1e-2 * np.log(2.0))):
    got = reduction.log_sum_exp(values, temperature=temperature)
    np.testing.assert_allclose(got, want, atol=1e-3)
  np.testing.assert_allclose(
      reduction.log_sum_exp(values, temperature=0.7),
      0.7 * np.log(np.mean(np.exp(np.asarray(values, np.float64) / 0.7))), rtol=1e-6)
