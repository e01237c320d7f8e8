"""Divergences: per-token estimators from sampled tokens, and exact ones over the vocabulary."""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import masking


def k1(log_probs, reference_log_probs):
  """log π - log π₀ in nats: unbiased for KL(π || π₀); belongs in the reward, not in the loss."""
  chex.assert_equal_shape([log_probs, reference_log_probs])
  return log_probs - reference_log_probs


def k2(log_probs, reference_log_probs):
  """½ (log π - log π₀)²: biased in value, the right reverse-KL gradient when on-policy."""
  return 0.5 * jnp.square(k1(log_probs, reference_log_probs))


def k3(log_probs, reference_log_probs):
  """π₀/π - log(π₀/π) - 1: unbiased, never negative (Schulman's note, *Approximating KL*, 2020)."""
  log_ratio = -k1(log_probs, reference_log_probs)
  bounded = jnp.clip(log_ratio, -denominator.MAX_LOG_RATIO, denominator.MAX_LOG_RATIO)
  return jnp.exp(bounded) - log_ratio - 1.0


def forward_kl(logits, teacher_logits, *, temperature=1.0):
  """KL(teacher || student) over the vocabulary, [..., V] logits -> [...] nats."""
  return jensen_shannon(logits, teacher_logits, interpolation=0.0, temperature=temperature)


def reverse_kl(logits, teacher_logits, *, temperature=1.0):
  """KL(student || teacher) over the vocabulary, [..., V] logits -> [...] nats."""
  return jensen_shannon(logits, teacher_logits, interpolation=1.0, temperature=temperature)


def jensen_shannon(logits, teacher_logits, *, interpolation=0.5, temperature=1.0):
  """Generalized Jensen-Shannon divergence, b KL(p_T || M) + (1 - b) KL(p_S || M).

  M = b p_T + (1 - b) p_S; by definition b = 0 is KL(p_T || p_S) and b = 1 is KL(p_S || p_T).

  Args:
    logits: [..., V]; the student's, which carry the gradient. Log-probs do too.
    teacher_logits: [..., V]; the teacher's, over the same vocabulary. No gradient.
    interpolation: b in [0, 1].
    temperature: both distributions are softmax(logits / temperature).
  Returns:
    [...] nats. Source: arXiv:2306.13649, eq. 1.
  """
  bounds.fraction(interpolation=interpolation)
  bounds.positive(temperature=temperature)
  student, teacher = _log_softmax(logits, teacher_logits, temperature)
  kl = lambda log_p, log_q: (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
  if interpolation == 0.0:
    return kl(teacher, student)
  if interpolation == 1.0:
    return kl(student, teacher)
  b = jnp.asarray(interpolation, student.dtype)
  mixture = jnp.logaddexp(jnp.log(b) + teacher, jnp.log1p(-b) + student)
  return b * kl(teacher, mixture) + (1.0 - b) * kl(student, mixture)


def top_k_jensen_shannon(logits, teacher_logits, *, interpolation=0.5, top_k=100):
  """`jensen_shannon` over the student's `top_k` tokens and one bucket for all the others."""
  return jensen_shannon(
      *onto_top_k(logits, teacher_logits, top_k=top_k), interpolation=interpolation)


def onto_top_k(logits, teacher_logits, *, top_k):
  """Both distributions over the student's `top_k` tokens and one bucket for all the others.

  Returns:
    Two arrays of log-probs [..., top_k + 1], each summing to 1 in probability.
  """
  bounds.positive(top_k=top_k)
  student, teacher = _log_softmax(logits, teacher_logits)
  _, indices = jax.lax.top_k(student, min(top_k, student.shape[-1]))
  return tuple(_with_tail(jnp.take_along_axis(x, indices, axis=-1)) for x in (student, teacher))


def _log_softmax(logits, teacher_logits, temperature=1.0):
  """Both as log-probs, the teacher's without a gradient, whoever it is."""
  chex.assert_equal_shape(
      [logits, teacher_logits], exception_type=ValueError,
      custom_message='student and teacher must share a vocabulary')
  of = lambda x: jax.nn.log_softmax(masking.wide(x) / temperature, axis=-1)
  return of(logits), of(jax.lax.stop_gradient(teacher_logits))


def _with_tail(log_probs):
  mass = jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
  mass = jnp.where(mass < -1e-7, mass, -1e-7)  # all of it in the top: a bucket of 1e-7
  return jnp.concatenate([log_probs, jnp.log(-jnp.expm1(mass))], axis=-1)
