"""Learning from a teacher: over the whole vocabulary, or from its log-probs of sampled tokens.

Arguments that mean the same everywhere:

  log_probs: [B, T] float32, nats; log π_θ of each target token. Carries the gradient.
  divergence: [B, T] nats, at each target between student and teacher over the whole vocabulary,
    as one of `pieces.divergence` measures it. The model's head computes it where the logits are, a
    few positions at a time, so that no [B, T, V] array is kept; which one a row of the algorithm
    table takes, and its hyperparameters, is said there. Carries the gradient.
  teacher_log_probs: [B, T] nats; the teacher's log-probs of the target tokens.
  old_log_probs: [B, T] nats; the student's own when it sampled the tokens.
  loss_mask: [B, T] bool.

A divergence is no policy gradient of the sampled token: its weight lies on the whole vocabulary.
Sequence-level distillation (arXiv:1606.07947) is `imitation.sft_loss` on the teacher's text.
"""

import jax
import jax.numpy as jnp

from ptjax.losses import imitation
from ptjax.losses import policy_gradient
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import returns


def kd_loss(log_probs, *, divergence, loss_mask, nll_coefficient=0.5, temperature=2.0):
  """Knowledge distillation: a · NLL + (1 - a) T² KL(teacher || student) at temperature T.

  The divergence is `forward_kl` at the same temperature, the NLL at temperature 1. Source:
  arXiv:1503.02531, section 2; a and T of oxRL.
  """
  bounds.positive(temperature=temperature)
  bounds.fraction(nll_coefficient=nll_coefficient)
  nll, metrics = imitation.sft_loss(log_probs, loss_mask=loss_mask)
  kl = _mean_divergence(divergence, loss_mask)
  loss = nll_coefficient * nll + (1.0 - nll_coefficient) * temperature**2 * kl
  return loss, {**metrics, 'distillation/divergence': jax.lax.stop_gradient(kl)}


def gkd_loss(log_probs, *, divergence, loss_mask):
  """Generalized KD: mean per token of the Jensen-Shannon divergence between teacher and student.

  The text is the data's or, usually half the time, the student's own. `interpolation` 0 of
  `jensen_shannon` is the forward KL, 1 the reverse. `log_probs` only sets the batch. Source:
  arXiv:2306.13649, eq. 1.
  """
  del log_probs
  loss = _mean_divergence(divergence, loss_mask)
  return loss, {'distillation/divergence': jax.lax.stop_gradient(loss)}


def student_turn(key, *, student_fraction=0.5):
  """Whether a batch of generalized KD is the student's own text: [] bool, drawn by `key`.

  Args:
    key: PRNG key of the batch.
    student_fraction: how likely, λ of arXiv:2306.13649; 0 is supervised KD, 1 on-policy.
  """
  bounds.fraction(student_fraction=student_fraction)
  return jax.random.bernoulli(key, student_fraction)


def _mean_divergence(divergence, loss_mask):
  return reduction.token_mean(masking.clean(loss_mask, divergence=divergence), loss_mask)


def opd_loss(log_probs, *, old_log_probs, teacher_log_probs, loss_mask):
  """On-policy distillation by sampled reverse KL: advantage log π_teacher - log π_old per token.

  Source: Thinking Machines, *On-Policy Distillation*, 2025; MiniLLM, arXiv:2306.08543.
  """
  return _teacher_ratio_loss(log_probs, old_log_probs, teacher_log_probs, loss_mask, 1.0)


def iw_opd_loss(log_probs, *, old_log_probs, teacher_log_probs, loss_mask, gamma=0.5):
  """On-policy distillation whose early tokens weigh more.

  Token t weighs 1 + γ (1 - Σ_{u<t} |Â_u| / Σ_u |Â_u|). Source: arXiv:2606.22600.
  """
  masking.non_negative(gamma=gamma)
  old, teacher = masking.clean(
      loss_mask, old_log_probs=old_log_probs, teacher_log_probs=teacher_log_probs)
  size = jnp.abs(teacher - old)
  before = jnp.cumsum(size, axis=1) - size
  total = jnp.maximum(size.sum(axis=1, keepdims=True), 1e-8)
  weights = 1.0 + gamma * (1.0 - before / total)
  return _teacher_ratio_loss(log_probs, old_log_probs, teacher_log_probs, loss_mask, weights)


def _teacher_ratio_loss(log_probs, old_log_probs, teacher_log_probs, loss_mask, weights):
  log_probs, old, teacher = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs,
      teacher_log_probs=teacher_log_probs)
  ratio = denominator.old(log_probs, old)
  advantages = weights * (teacher - old)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=advantages, ratio=ratio, value=ratio * advantages,
      reduce=reduction.token_mean)


def minillm_loss(log_probs, *, divergence, old_log_probs, teacher_log_probs, loss_mask,
                 discount=1.0, clip_low=0.2, clip_high=0.2):
  """MiniLLM: the reverse KL of whole responses, the present token exactly and the rest by returns.

  The present token's part is the divergence, `reverse_kl`. The future's is PPO's clipped surrogate
  with the advantage Σ_{u>t} γ^{u-t-1} r_u / Σ_{u>t} γ^{u-t-1}, r_u = log π_teacher - log π_old: the
  mean teacher log-ratio of the tokens still to come, so that long responses are not favoured.

  Args:
    discount: γ per token, in (0, 1]; 1 in the paper.
    The others: see the module, and `policy_gradient`.
  Source: arXiv:2306.08543, section 2.2 and algorithm 1, whose sampling from a mixture with the
  teacher and language-modelling term on other text are left out.
  """
  bounds.positive(discount=discount)
  bounds.fraction(discount=discount)
  old, teacher = masking.clean(
      loss_mask, old_log_probs=old_log_probs, teacher_log_probs=teacher_log_probs)
  rewards = teacher - old
  # γ of the sums, which cancels in their ratio.
  future, weight = (returns.to_go(x, loss_mask, discount=discount) - x
                    for x in (rewards, loss_mask.astype(rewards.dtype)))
  last = returns.last_token(loss_mask) | ~loss_mask
  advantages = jnp.where(last, 0.0, future) / jnp.where(last, 1.0, weight)
  policy, metrics = policy_gradient.clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high,
      reduce=reduction.token_mean)
  kl = _mean_divergence(divergence, loss_mask)
  return policy + kl, {**metrics, 'distillation/divergence': jax.lax.stop_gradient(kl)}


def sdft_loss(log_probs, *, divergence, old_log_probs, loss_mask, max_ratio=2.0):
  """Self-distillation from the policy itself with privileged context (the answer, say).

  The divergence, `top_k_jensen_shannon`, times the ratio to the sampling policy, truncated at
  `max_ratio` and stopped; mean per sequence. Source: arXiv:2601.19897; TRL's experimental
  SDFTTrainer.
  """
  bounds.positive(max_ratio=max_ratio)
  log_probs, old_log_probs, per_token = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs, divergence=divergence)
  ratio = denominator.truncated(denominator.old(log_probs, old_log_probs), max_ratio=max_ratio)
  loss = reduction.sequence_mean(jax.lax.stop_gradient(ratio) * per_token, loss_mask)
  return loss, {'distillation/divergence': jax.lax.stop_gradient(
      reduction.token_mean(per_token, loss_mask))}


def sdpo_loss(log_probs, *, divergence, old_log_probs, advantages, loss_mask, shown=None,
              distillation_weight=1.0, max_ratio=2.0, clip_low=0.2, clip_high=0.2):
  """Self-distillation policy optimization: (1 - w) · GRPO + w · self-distillation.

  The teacher is the policy shown feedback or a successful rollout.

  Args:
    shown: [B] bool; the rows for which it was shown something, None for all. Others are not
      distilled, and count as 0 in the mean.
    The others: see the module, `policy_gradient` and `sdft_loss`.
  Source: arXiv:2601.20802; TRL's experimental SDPOTrainer.
  """
  bounds.fraction(distillation_weight=distillation_weight)
  learns = loss_mask if shown is None else loss_mask & shown[:, None]
  distilled, metrics = sdft_loss(
      log_probs, divergence=divergence, old_log_probs=old_log_probs, loss_mask=learns,
      max_ratio=max_ratio)
  policy, policy_metrics = policy_gradient.grpo_loss(
      log_probs, old_log_probs=old_log_probs, advantages=advantages, loss_mask=loss_mask,
      clip_low=clip_low, clip_high=clip_high)
  loss = (1.0 - distillation_weight) * policy + distillation_weight * distilled
  return loss, {**policy_metrics, **metrics}
