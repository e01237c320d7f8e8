"""Losses of reward models, step verifiers and pairwise judges.

None of the four pieces applies: there is no policy, and gradient flows through the head's output
alone. Rewards come from the last token of a response; the arrays given first carry the gradient.
Metrics are rewards/{chosen,rejected,margins,accuracies}, or `accuracy` where there are labels.
"""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import score


def _checked(chosen_rewards, rejected_rewards):
  """Both as [B] float32 or wider."""
  chosen = masking.wide(chosen_rewards)
  return bounds.per_row(chosen.shape[:1], chosen.dtype, chosen_rewards=chosen,
                        rejected_rewards=rejected_rewards)


def reward_bt_loss(chosen_rewards, rejected_rewards):
  """Bradley-Terry: -log σ(R_w - R_l), the mean over pairs; rewards are [B].

  Source: arXiv:2203.02155, eq. 1 with K = 2.
  """
  chosen, rejected = _checked(chosen_rewards, rejected_rewards)
  return link.logistic(chosen - rejected).mean(), score.reward_metrics(chosen, rejected)


def reward_margin_loss(chosen_rewards, rejected_rewards, *, margins):
  """Bradley-Terry with a margin per pair: -log σ(R_w - R_l - margin).

  Args:
    chosen_rewards, rejected_rewards: [B].
    margins: [B]; how much better the chosen response was rated.
  Source: arXiv:2307.09288 (Llama 2), eq. 2.
  """
  chosen, rejected = _checked(chosen_rewards, rejected_rewards)
  margins = bounds.per_row(chosen.shape, chosen.dtype, margins=margins)
  losses = link.logistic(chosen - rejected - margins)
  return losses.mean(), score.reward_metrics(chosen, rejected)


def reward_centred_loss(chosen_rewards, rejected_rewards, *, centre_coefficient=0.01):
  """Bradley-Terry + c mean((R_w + R_l)²), which keeps rewards around 0; rewards are [B].

  Source: arXiv:2312.09244, c 0.01 there and not negative.
  """
  masking.non_negative(centre_coefficient=centre_coefficient)
  chosen, rejected = _checked(chosen_rewards, rejected_rewards)
  loss, metrics = reward_bt_loss(chosen, rejected)
  return loss + centre_coefficient * jnp.square(chosen + rejected).mean(), metrics


def reward_kwise_loss(rewards, *, ranks):
  """All ordered pairs of a ranked list: the mean over a prompt's pairs, then over prompts.

  Args:
    rewards: [P, K] of K responses per prompt; empty places may hold anything.
    ranks: [P, K] int; smaller is better, equal ranks state no preference, negative marks an empty
      place. A strict ranking has K (K - 1) / 2 pairs.
  Source: arXiv:2203.02155, eq. 1.
  """
  chex.assert_equal_shape([rewards, ranks], exception_type=ValueError,
                          custom_message='rewards and ranks must both be [P, K]')
  present = jnp.asarray(ranks) >= 0
  rewards = masking.clean(present, rewards=rewards)
  better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
  differences = rewards[:, :, None] - rewards[:, None, :]  # [P, K, K]
  count = jnp.maximum(better.sum(axis=(1, 2)), 1).astype(rewards.dtype)  # [P]
  def per_prompt(values):
    return (jnp.where(better, values, 0.0).sum(axis=(1, 2)) / count).mean()
  return per_prompt(link.logistic(differences)), jax.lax.stop_gradient({
      'rewards/margins': per_prompt(differences),
      'rewards/accuracies': per_prompt((differences > 0).astype(rewards.dtype))})


def _binary_cross_entropy(logits, labels):
  """mean -log σ(±logit) of [B] logits and bool labels, and the accuracy."""
  logits = masking.wide(logits)
  bounds.boolean(logits.shape[:1], labels=labels)
  logits = bounds.per_row(logits.shape[:1], logits.dtype, logits=logits)
  losses = link.logistic(jnp.where(labels, logits, -logits))
  return losses.mean(), {'accuracy': ((logits > 0) == labels).mean(dtype=logits.dtype)}


def orm_loss(rewards, *, labels):
  """Outcome reward model: binary cross-entropy of the last token's logit.

  Args:
    rewards: [B] logits.
    labels: [B] bool; True where the solution is right.
  Source: arXiv:2110.14168.
  """
  return _binary_cross_entropy(rewards, labels)


def preference_model_loss(preference_logits, *, labels):
  """Pairwise judge P(y > y' | x) = σ(head(x, y, y')): binary cross-entropy.

  Args:
    preference_logits: [B].
    labels: [B] bool; True where the first response is the better one. Show each pair in both
      orders, so that the order itself says nothing.
  Source: arXiv:2312.00886 (Nash-MD's judge), as PairRM.
  """
  return _binary_cross_entropy(preference_logits, labels)


def prm_loss(step_logits, *, step_labels, step_mask):
  """Process reward model: two-class cross-entropy at the step separators, mean over steps.

  Args:
    step_logits: [B, T, 2]; class 1 means the step is good. Carries the gradient.
    step_labels: [B, T] bool, or float in [0, 1]: the fraction of a step's continuations that
      reach the right answer (arXiv:2312.08935, eq. 4).
    step_mask: [B, T] bool; True at the token that ends a step.
  Source: arXiv:2211.14275, arXiv:2305.20050.
  """
  good = _step_log_odds(step_logits, step_mask)
  chex.assert_equal_shape([good, step_labels], exception_type=ValueError,
                          custom_message='step_labels must be [B, T] as step_mask')
  labels = jnp.asarray(step_labels, good.dtype)
  losses = labels * link.logistic(good) + (1.0 - labels) * link.logistic(-good)
  count = jnp.maximum(step_mask.sum(), 1).astype(good.dtype)
  def mean(values):
    return jnp.where(step_mask, values, 0.0).sum() / count
  right = ((good > 0) == (labels > 0.5)).astype(good.dtype)
  return mean(losses), {'accuracy': jax.lax.stop_gradient(mean(right))}


def _step_log_odds(step_logits, step_mask):
  """Log-odds that the step is good, [B, T], 0 off the mask."""
  chex.assert_shape(step_logits, (*step_mask.shape, 2), exception_type=ValueError,
                    custom_message='step_logits must be [B, T, 2] with step_mask [B, T]')
  good, bad = masking.clean(step_mask, good=step_logits[..., 1], bad=step_logits[..., 0])
  return good - bad
