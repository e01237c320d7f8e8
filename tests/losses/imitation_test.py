"""Identities of the imitation losses; their closed forms are in policy_gradient_test.py."""

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.losses import imitation
from ptjax.losses import policy_gradient

rng = np.random.default_rng(0)
B, T = 4, 5
LOG_PROBS = jnp.asarray(-rng.uniform(0.1, 2.0, (B, T)), jnp.float32)
MASK = jnp.arange(T)[None] < jnp.array([[5], [2], [3], [1]])
gradient = lambda loss, **inputs: jax.grad(lambda l: loss(l, **inputs)[0])(LOG_PROBS)


def test_sft_is_the_unified_estimator_with_advantage_one():
  np.testing.assert_allclose(
      gradient(imitation.sft_loss, loss_mask=MASK),
      gradient(policy_gradient.reinforce_loss, advantages=jnp.ones(B), loss_mask=MASK), rtol=1e-6)


def test_sft_value_is_the_nll_per_token():
  loss, metrics = imitation.sft_loss(LOG_PROBS, loss_mask=MASK)
  np.testing.assert_allclose(loss, -np.asarray(LOG_PROBS)[np.asarray(MASK)].mean(), rtol=1e-6)
  assert metrics == {'pieces/advantage_abs_mean': 1.0}


def test_dft_weighs_a_token_by_its_probability():
  sft, dft = (gradient(loss, loss_mask=MASK) for loss in (imitation.sft_loss, imitation.dft_loss))
  np.testing.assert_allclose(dft, sft * np.exp(LOG_PROBS), rtol=1e-6)


def test_rft_is_sft_on_what_was_accepted():
  rewards = jnp.array([1.0, 0.2, jnp.nan, 0.5])
  kept = np.array([0, 3])
  loss, metrics = imitation.rft_loss(LOG_PROBS, rewards=rewards, loss_mask=MASK)
  want, _ = imitation.sft_loss(LOG_PROBS[kept], loss_mask=MASK[kept])
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert metrics['accepted_fraction'] == 0.5
  grad = gradient(imitation.rft_loss, rewards=rewards, loss_mask=MASK)
  assert not np.asarray(grad)[[1, 2]].any() and np.asarray(grad)[kept].any(axis=1).all()


def test_rft_of_nothing_accepted_is_zero():
  loss, metrics = imitation.rft_loss(LOG_PROBS, rewards=jnp.zeros(B), loss_mask=MASK)
  assert loss == 0.0 and metrics['accepted_fraction'] == 0.0
