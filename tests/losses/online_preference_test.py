"""Pairs from groups of completions, and XPO's optimism."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import online_preference
from ptjax.losses import preference_link

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases
import preference_reference as reference


def test_best_and_worst():
  rewards = jnp.array([0.0, 2.0, 1.0, 1.0, 1.0, 1.0, jnp.nan, 3.0, -1.0])
  chosen, rejected, differ = online_preference.best_and_worst(rewards, group_size=3)
  np.testing.assert_array_equal(differ, [True, False, True])
  np.testing.assert_array_equal(np.asarray(chosen)[[0, 2]], [1, 7])
  np.testing.assert_array_equal(np.asarray(rejected)[[0, 2]], [0, 8])
  with pytest.raises(ValueError, match='group_size=1'):
    online_preference.best_and_worst(rewards, group_size=1)


def test_xpo_is_dpo_and_pushes_the_references_sample_down():
  B, T = 4, 6
  arrays = cases.random_arrays(B, T)
  drew = np.array([True, False, False, True])
  with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
    pair = cases.pair_of({n: jnp.asarray(arrays[n]) for n in cases.PAIR_ARRAYS})
    def objective(pair):
      return online_preference.xpo_loss(pair, reference_drew_chosen=drew, beta=0.3, optimism=0.2)
    (loss, _), grads = jax.jit(jax.value_and_grad(objective, has_aux=True, allow_int=True))(pair)
    dpo = float(preference_link.dpo_loss(pair, beta=0.3)[0])
  w, l = cases.sides(arrays)
  h = 0.3 * (w.s - l.s)
  explored = np.where(drew, w.S, l.S)
  np.testing.assert_allclose(dpo, -reference.log_sigmoid(h).mean(), rtol=1e-12)
  np.testing.assert_allclose(loss, dpo + 0.2 * explored.mean(), rtol=1e-12)
  push = 0.3 * reference.sigmoid(-h) / B
  for side, sign, mine in (('chosen', 1.0, drew), ('rejected', -1.0, ~drew)):
    want = np.where(arrays[side + '_mask'], (sign * push - 0.2 * mine / B)[:, None], 0.0)
    np.testing.assert_allclose(-getattr(grads, side).log_probs, want, rtol=1e-10, atol=1e-15)


def test_bad_input_is_named():
  arrays = cases.random_arrays(4, 6)
  pair = cases.pair_of({n: jnp.asarray(arrays[n]) for n in cases.PAIR_ARRAYS})
  with pytest.raises(ValueError, match='reference_drew_chosen'):
    online_preference.xpo_loss(pair, reference_drew_chosen=jnp.ones(4))
  with pytest.raises(ValueError, match='optimism=-1'):
    online_preference.xpo_loss(pair, reference_drew_chosen=jnp.ones(4, bool), optimism=-1.0)
