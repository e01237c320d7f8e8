"""The door: padding made harmless, dtypes widened, names in the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import masking

MASK = jnp.array([[True, False], [True, True]])


def test_clean_stops_nan_in_value_and_gradient():
  x = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
  objective = lambda x: jnp.exp(masking.clean(MASK, x=x)).sum()
  value, grad = jax.value_and_grad(objective)(x)
  np.testing.assert_allclose(value, np.exp([1.0, 0.0, 2.0, 3.0]).sum(), rtol=1e-6)
  np.testing.assert_allclose(grad, np.where(MASK, np.exp(np.nan_to_num(x)), 0.0), rtol=1e-6)


def test_clean_widens_half_precision():
  a, b = masking.clean(MASK, a=jnp.ones((2, 2), jnp.bfloat16), b=jnp.ones((2, 2), jnp.float32))
  assert a.dtype == b.dtype == jnp.float32


def test_errors_name_the_argument():
  with pytest.raises(ValueError, match=r'old_log_probs has shape \(2, 3\).*\(2, 2\)'):
    masking.clean(MASK, old_log_probs=jnp.ones((2, 3)))
  with pytest.raises(ValueError, match=r'loss_mask is int32\[2, 2\]: expected bool'):
    masking.clean(MASK.astype(jnp.int32), x=jnp.ones((2, 2)))
  with pytest.raises(ValueError, match='beta=0.1 needs reference_log_probs'):
    masking.required(None, 'reference_log_probs', 'beta=0.1')
  with pytest.raises(ValueError, match='kl_coefficient=-1'):
    masking.non_negative(kl_coefficient=-1)


def test_lengths_of_empty_rows_are_one():
  np.testing.assert_array_equal(masking.lengths(jnp.array([[True, True], [False, False]])), [2, 1])


def test_groups_may_be_of_one_unless_a_baseline_needs_more():
  rewards = jnp.arange(4.0)
  assert masking.in_groups(rewards, 1).shape == (4, 1)
  assert masking.in_groups(rewards, 2, at_least=2).shape == (2, 2)
  with pytest.raises(ValueError, match='group_size=1 .*at least 2'):
    masking.in_groups(rewards, 1, at_least=2)
  with pytest.raises(ValueError, match='4 completions do not split into groups of group_size=3'):
    masking.in_groups(rewards, 3)
