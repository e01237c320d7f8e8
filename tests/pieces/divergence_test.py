"""Sampled estimators on average, exact divergences by their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import divergence

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(2, 3, 6)).astype(np.float32)
softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
P, Q = softmax(STUDENT.astype(np.float64)), softmax(TEACHER.astype(np.float64))
kl = lambda p, q: (p * np.log(p / q)).sum(-1)


def test_estimators_are_unbiased_where_they_say_so():
  log_p, log_q = jnp.log(P.astype(np.float32)), jnp.log(Q.astype(np.float32))
  mean = lambda f: (P * np.asarray(f(log_p, log_q))).sum(-1)  # under the policy, exactly
  np.testing.assert_allclose(mean(divergence.k1), kl(P, Q), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(mean(divergence.k3), kl(P, Q), rtol=1e-4, atol=1e-6)
  assert (np.asarray(divergence.k3(log_p, log_q)) >= 0).all()


def test_k2_has_the_reverse_kls_gradient_on_policy():
  def exact(logits):
    return divergence.reverse_kl(logits, TEACHER[0])
  def sampled(logits):  # mean over tokens drawn from the policy, which is held still
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(TEACHER[0])
    return (jax.lax.stop_gradient(jnp.exp(log_p)) * divergence.k2(log_p, log_q)).sum()
  np.testing.assert_allclose(
      jax.grad(sampled)(STUDENT[0]), jax.grad(exact)(STUDENT[0]), rtol=1e-4, atol=1e-6)


def test_exact_divergences():
  np.testing.assert_allclose(divergence.forward_kl(STUDENT, TEACHER), kl(Q, P), rtol=1e-4)
  np.testing.assert_allclose(divergence.reverse_kl(STUDENT, TEACHER), kl(P, Q), rtol=1e-4)
  mixture = 0.3 * Q + 0.7 * P
  want = 0.3 * kl(Q, mixture) + 0.7 * kl(P, mixture)
  np.testing.assert_allclose(
      divergence.jensen_shannon(STUDENT, TEACHER, interpolation=0.3), want, rtol=1e-4)
  np.testing.assert_allclose(
      divergence.jensen_shannon(STUDENT, STUDENT + 3.0), 0.0, atol=1e-6)
  hot, warm = (softmax(x.astype(np.float64) / 2.0) for x in (STUDENT, TEACHER))
  np.testing.assert_allclose(
      divergence.forward_kl(STUDENT, TEACHER, temperature=2.0), kl(warm, hot), rtol=1e-4)
  np.testing.assert_allclose(
      divergence.reverse_kl(STUDENT, TEACHER, temperature=2.0), kl(hot, warm), rtol=1e-4)


def test_a_teacher_that_shares_parameters_learns_nothing():
  for measure in (divergence.forward_kl, divergence.reverse_kl, divergence.jensen_shannon,
                  functools.partial(divergence.top_k_jensen_shannon, top_k=2)):
    grad = jax.grad(lambda x: measure(STUDENT, x).sum())(jnp.asarray(TEACHER))
    assert not grad.any()


def test_half_precision_logits_are_widened():
  half = jnp.asarray(STUDENT, jnp.bfloat16)
  for measure in (divergence.forward_kl, divergence.top_k_jensen_shannon):
    got = measure(half, jnp.asarray(TEACHER, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, measure(np.asarray(half, np.float32), TEACHER), rtol=0.05)


def test_top_k_with_its_tail():
  for k in (1, 50):
    merge = jax.jit(functools.partial(divergence.onto_top_k, top_k=k))
    student, teacher = merge(STUDENT, TEACHER)
    assert student.shape == (3, min(k, 6) + 1)
    for x in (student, teacher):
      np.testing.assert_allclose(np.exp(x).sum(-1), 1.0, rtol=1e-5)
    assert (divergence.top_k_jensen_shannon(STUDENT, TEACHER, top_k=k)
            <= divergence.jensen_shannon(STUDENT, TEACHER) + 1e-5).all()  # merging loses
    grad = jax.jit(jax.grad(lambda x: merge(x, TEACHER)[0].sum()))(STUDENT)
    assert np.isfinite(grad).all()


def test_extremes_are_finite():
  far = jnp.array([-50.0, 50.0])
  for estimator in (divergence.k1, divergence.k2, divergence.k3):
    assert np.isfinite(estimator(far, jnp.zeros(2))).all()


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='share a vocabulary'):
    divergence.jensen_shannon(STUDENT, TEACHER[:, :5])
  with pytest.raises(ValueError, match='interpolation=1.5'):
    divergence.jensen_shannon(STUDENT, TEACHER, interpolation=1.5)
  with pytest.raises(ValueError, match='temperature=0.0'):
    divergence.forward_kl(STUDENT, TEACHER, temperature=0.0)
  with pytest.raises(ValueError, match='top_k=0'):
    divergence.top_k_jensen_shannon(STUDENT, TEACHER, top_k=0)
