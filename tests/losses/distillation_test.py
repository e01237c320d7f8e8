"""Identities and limits of the distillation losses; closed forms are in policy_gradient_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import distillation
from ptjax.losses import imitation
from ptjax.losses import policy_gradient
from ptjax.pieces import divergence

rng = np.random.default_rng(0)
B, T, V = 3, 4, 6
LOGITS, TEACHER = rng.normal(size=(2, B, T, V)).astype(np.float32)
TOKENS = rng.integers(0, V, (B, T))
MASK = jnp.arange(T)[None] < jnp.array([[4], [2], [3]])


def picked(logits):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], axis=-1)[..., 0]


LOG_PROBS, TEACHER_LOG_PROBS = picked(LOGITS), picked(TEACHER)
OLD = LOG_PROBS + 0.1
FORWARD_KL = divergence.forward_kl(LOGITS, TEACHER)


def test_kd_lies_between_sft_and_the_teacher():
  value = lambda **hyper: distillation.kd_loss(
      LOG_PROBS, divergence=FORWARD_KL, loss_mask=MASK, **hyper)[0]
  np.testing.assert_allclose(value(nll_coefficient=1.0),
                             imitation.sft_loss(LOG_PROBS, loss_mask=MASK)[0], rtol=1e-6)
  forward = distillation.gkd_loss(LOG_PROBS, divergence=FORWARD_KL, loss_mask=MASK)[0]
  np.testing.assert_allclose(value(nll_coefficient=0.0, temperature=1.0), forward, rtol=1e-6)


def test_a_student_like_its_teacher_has_nothing_to_learn():
  def loss(logits):
    return distillation.gkd_loss(
        LOG_PROBS, divergence=divergence.jensen_shannon(logits, LOGITS), loss_mask=MASK)[0]
  value, grad = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
  np.testing.assert_allclose(value, 0.0, atol=1e-6)
  np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_on_policy_opd_is_reinforce_with_the_teachers_log_ratio():
  inputs = dict(old_log_probs=LOG_PROBS, teacher_log_probs=TEACHER_LOG_PROBS, loss_mask=MASK)
  got = jax.grad(lambda l: distillation.opd_loss(l, **inputs)[0])(LOG_PROBS)
  want = jax.grad(lambda l: policy_gradient.reinforce_loss(
      l, advantages=TEACHER_LOG_PROBS - LOG_PROBS, loss_mask=MASK)[0])(LOG_PROBS)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_early_tokens_weigh_up_to_one_and_a_half():
  inputs = dict(old_log_probs=OLD, teacher_log_probs=TEACHER_LOG_PROBS, loss_mask=MASK)
  gradient = lambda loss, **h: jax.grad(lambda l: loss(l, **inputs, **h)[0])(LOG_PROBS)
  plain, weighted = gradient(distillation.opd_loss), gradient(distillation.iw_opd_loss)
  factor = np.asarray(weighted / plain)
  np.testing.assert_allclose(factor[:, 0], 1.5, rtol=1e-5)
  rows = [row[keep] for row, keep in zip(factor, np.asarray(MASK))]
  assert all((np.diff(row) < 0).all() and row[-1] > 1.0 for row in rows)
  np.testing.assert_allclose(gradient(distillation.iw_opd_loss, gamma=0.0), plain, rtol=1e-6)


def test_minillm_splits_the_reverse_kl_of_a_response():
  """Undivided by lengths, its gradient is that of KL(π || teacher) over all 2-token responses."""
  rng = np.random.default_rng(1)
  logits, teacher = rng.normal(size=(2, 1 + V, V))  # of the first token; of the second after each
  written = np.stack(np.divmod(np.arange(V * V), V), axis=1)  # [V², 2], every response
  rows = np.stack([0 * written[:, 0], 1 + written[:, 0]], axis=1)  # which logits wrote each token
  of = lambda x: jnp.take_along_axis(
      jax.nn.log_softmax(x)[rows], written[..., None], axis=-1)[..., 0]
  def exact(logits):
    p = jnp.exp(of(logits).sum(1))
    return (p * (of(logits) - of(teacher)).sum(1)).sum()
  with jax.enable_x64(True):
    logits, teacher = jnp.asarray(logits), jnp.asarray(teacher)
    chance = jnp.exp(of(logits).sum(1))
    def sampled(logits, i):  # the loss of one response, times its two tokens
      loss, _ = distillation.minillm_loss(
          of(logits)[i][None], divergence=divergence.reverse_kl(logits, teacher)[rows][i][None],
          old_log_probs=of(start)[i][None], teacher_log_probs=of(teacher)[i][None],
          loss_mask=jnp.ones((1, 2), bool))
      return 2.0 * loss
    start = logits
    gradients = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(logits, jnp.arange(V * V))
    got = jnp.tensordot(chance, gradients, 1)
    np.testing.assert_allclose(got, jax.grad(exact)(logits), rtol=1e-9, atol=1e-12)


def test_sdpo_mixes_its_two_parts():
  inputs = dict(divergence=FORWARD_KL, old_log_probs=OLD, loss_mask=MASK)
  advantages = jnp.array([1.0, -1.0, 0.5])
  mixed = [distillation.sdpo_loss(
      LOG_PROBS, advantages=advantages, distillation_weight=w, **inputs)[0]
           for w in (0.0, 0.25, 1.0)]
  policy = policy_gradient.grpo_loss(
      LOG_PROBS, old_log_probs=OLD, advantages=advantages, loss_mask=MASK)[0]
  distilled = distillation.sdft_loss(LOG_PROBS, **inputs)[0]
  np.testing.assert_allclose(
      mixed, [policy, 0.75 * policy + 0.25 * distilled, distilled], rtol=1e-5)


def test_bad_input_is_named():
  inputs = dict(divergence=FORWARD_KL, loss_mask=MASK)
  bad = [
      (distillation.gkd_loss, {'divergence': FORWARD_KL[:, :2]}, r'divergence has shape \(3, 2\)'),
      (distillation.kd_loss, {'temperature': 0.0}, 'temperature=0.0'),
      (distillation.kd_loss, {'nll_coefficient': 1.2}, 'nll_coefficient=1.2'),
      (distillation.minillm_loss, {'discount': 0.0, 'old_log_probs': OLD,
                                   'teacher_log_probs': OLD}, 'discount=0.0'),
      (distillation.sdft_loss, {'max_ratio': 0.0, 'old_log_probs': OLD}, 'max_ratio=0.0'),
      (distillation.sdpo_loss, {'distillation_weight': 1.5, 'old_log_probs': OLD,
                                'advantages': jnp.ones(B)}, 'distillation_weight=1.5')]
  for loss, change, message in bad:
    with pytest.raises(ValueError, match=message):
      loss(LOG_PROBS, **{**inputs, **change})
