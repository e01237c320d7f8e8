"""Running statistics: averages over batches, and the checkpointable state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import running

BATCHES = [np.array([1.0, 2.0, 4.0]), np.array([-1.0, 0.5, 3.0])]


@pytest.mark.parametrize('warm_start', [False, True])
def test_exponential_is_the_recursion(warm_start):
  state, mean, std = running.INITIAL, 0.0, 0.0
  for i, batch in enumerate(BATCHES):
    keep = 0.0 if warm_start and i == 0 else 0.9
    mean = keep * mean + (1 - keep) * batch.mean()
    std = keep * std + (1 - keep) * batch.std(ddof=1)
    state = running.exponential(
        state, jnp.asarray(batch, jnp.float32), decay=0.9, warm_start=warm_start)
  np.testing.assert_allclose([state.mean, state.std, state.count], [mean, std, 6], rtol=1e-6)


def test_cumulative_is_the_mean_of_everything():
  state = running.INITIAL
  for batch in BATCHES:
    state = running.cumulative(state, jnp.asarray(batch, jnp.float32))
  np.testing.assert_allclose(state.mean, np.concatenate(BATCHES).mean(), rtol=1e-6)
  assert state.count == 6


def test_a_first_batch_of_one_is_a_start_already():
  state = running.exponential(running.INITIAL, jnp.array([3.0]), decay=0.9, warm_start=True)
  state = running.exponential(state, jnp.array([5.0]), decay=0.9, warm_start=True)
  np.testing.assert_allclose(state.mean, 0.9 * 3.0 + 0.1 * 5.0, rtol=1e-6)


def test_one_value_has_no_spread():
  assert running.exponential(running.INITIAL, jnp.array([3.0]), decay=0.9).std == 0.0


@pytest.mark.parametrize('update', [
    lambda x: running.exponential(running.INITIAL, x, decay=0.9),
    lambda x: running.cumulative(running.INITIAL, x)])
def test_statistics_are_constants_with_a_stable_type(update):
  """No gradient; and the state has the same type after a step as before, so nothing recompiles."""
  values = jnp.asarray(BATCHES[0], jnp.float32)
  assert not jax.grad(lambda x: update(x).mean + update(x).std)(values).any()
  described = lambda state: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state)
  assert described(update(values)) == described(running.INITIAL)
