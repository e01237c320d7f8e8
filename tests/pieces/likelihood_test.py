"""The one composition: exact gradient, textbook value, and taking it apart again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import likelihood
from ptjax.pieces import reduction

rng = np.random.default_rng(0)
B, T = 3, 4
LOG_PROBS, RATIO, VALUE = rng.normal(size=(3, B, T)).astype(np.float32)
ADVANTAGES = np.array([1.0, -2.0, 0.5], np.float32)
MASK = np.arange(T)[None] < np.array([[2], [4], [0]])
# Means over tokens and over sequences of it differ.
STABLE = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0]], bool)
pieces = dict(advantages=ADVANTAGES, ratio=RATIO, stable=STABLE, reduce=reduction.token_mean)


def test_gradient_is_mask_times_ratio_times_advantage():
  want = np.where(MASK & STABLE, RATIO * ADVANTAGES[:, None], 0.0) / MASK.sum()
  for value in (None, VALUE):
    grad = jax.grad(lambda l: likelihood.weighted_loss(l, MASK, value=value, **pieces)[0])(
        jnp.asarray(LOG_PROBS))
    np.testing.assert_allclose(-grad, want, rtol=1e-6)


def test_no_gradient_through_the_pieces():
  def loss(ratio, advantages, value):
    return likelihood.weighted_loss(
        LOG_PROBS, MASK, advantages=advantages, ratio=ratio, value=value,
        reduce=reduction.token_mean)[0]
  grads = jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, (RATIO, ADVANTAGES, VALUE)))
  assert not any(np.asarray(g).any() for g in grads)


def test_value():
  loss, metrics = likelihood.weighted_loss(LOG_PROBS, MASK, value=VALUE, **pieces)
  np.testing.assert_allclose(loss, -VALUE[MASK].mean(), rtol=1e-6)
  bare, _ = likelihood.weighted_loss(LOG_PROBS, MASK, **pieces)
  weights = STABLE * RATIO * ADVANTAGES[:, None]
  np.testing.assert_allclose(bare, -(weights * LOG_PROBS)[MASK].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['pieces/mask_fraction'], (~STABLE)[MASK].mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics['pieces/ratio_mean'], RATIO[MASK].mean(), rtol=1e-5)
  np.testing.assert_allclose(
      metrics['pieces/advantage_abs_mean'],
      np.abs(np.broadcast_to(ADVANTAGES[:, None], (B, T)))[MASK].mean(), rtol=1e-6)


def test_metrics_are_absent_where_they_do_not_apply():
  _, metrics = likelihood.weighted_loss(
      LOG_PROBS, MASK, advantages=1.0, reduce=reduction.token_mean)
  assert set(metrics) == {'pieces/advantage_abs_mean'}


def test_pieces_of_a_users_loss_multiply_to_its_gradient():
  def my_loss(log_probs, *, old_log_probs, advantages, loss_mask):
    push, metrics = likelihood.weighted_loss(
        log_probs, loss_mask, advantages=advantages, ratio=jnp.exp(log_probs - old_log_probs),
        stable=STABLE, reduce=reduction.sequence_mean)
    imitate, _ = likelihood.weighted_loss(
        log_probs, loss_mask, advantages=0.1, reduce=reduction.sequence_sum)
    return push + 0.3 * imitate, metrics
  bound = functools.partial(my_loss, old_log_probs=RATIO, advantages=ADVANTAGES, loss_mask=MASK)
  parts = likelihood.pieces_of(bound, jnp.asarray(LOG_PROBS))
  assert {name: set(part) for name, part in parts.items()} == {
      'policy': {'advantages', 'ratio', 'stable', 'reduction'},
      'policy 2': {'advantages', 'reduction'}}
  weights = sum(functools.reduce(np.multiply, p.values()) for p in parts.values())
  grad = jax.grad(lambda l: bound(l)[0])(jnp.asarray(LOG_PROBS))
  np.testing.assert_allclose(-grad, weights, rtol=1e-5, atol=1e-7)
  assert not likelihood.pieces_of(lambda: None)  # nothing is left over from the call before


def test_shapes_are_checked_at_the_door():
  with pytest.raises(ValueError, match=r'log_probs has shape \(3, 4\).*\(3, 3\)'):
    likelihood.weighted_loss(
        LOG_PROBS, MASK[:, :3], advantages=1.0, reduce=reduction.token_mean)
  with pytest.raises(ValueError, match=r'advantages have shape \(2,\)'):
    likelihood.weighted_loss(
        LOG_PROBS, MASK, advantages=np.ones(2, np.float32), reduce=reduction.token_mean)
