"""Preference losses on single responses labelled desirable or undesirable, and BCO's paired form.

  side: types.SideLogProbs; log_probs [B, T] float32 nats (they carry the gradient), loss_mask
    [B, T] bool, reference_log_probs [B, T] of the frozen reference.
  labels: [B] bool; True where the response is desirable.
  beta: inverse temperature of the implicit reward r = beta·s, s the response's log-ratio to the
    reference; above 0.

Losses look at the whole batch. Those with `loss_state` return a third value, the state after the
batch (see `pieces/running.py`).
"""

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import running
from ptjax.pieces import score


def _checked(side, labels, beta):
  """Returns s [B] after checking the labels and beta."""
  bounds.positive(beta=beta)
  bounds.boolean(side.loss_mask.shape[:1], labels=labels)
  return score.log_ratio(side)


def _signed(labels, values):
  """`values` where desirable, `-values` where not."""
  return jnp.where(labels, values, -values)


def _class_mean(values, members):
  """Mean of [B] values over the members, 0 when there are none."""
  return jnp.where(members, values, 0.0).sum() / jnp.maximum(members.sum(), 1).astype(values.dtype)


def _metrics(side, labels, rewards):
  """rewards/{chosen,rejected,margins} and logps/{chosen,rejected}: means over each class."""
  labels, log_probs = jnp.asarray(labels), score.log_prob(side)
  chosen, rejected = _class_mean(rewards, labels), _class_mean(rewards, ~labels)
  return jax.lax.stop_gradient({
      'rewards/chosen': chosen, 'rewards/rejected': rejected, 'rewards/margins': chosen - rejected,
      'logps/chosen': _class_mean(log_probs, labels),
      'logps/rejected': _class_mean(log_probs, ~labels)})


def kto_loss(side, *, labels, mismatched_log_probs, mismatched_loss_mask,
             mismatched_reference_log_probs, beta=0.1, desirable_weight=1.0,
             undesirable_weight=1.0):
  """KTO: λ_D (1 - σ(beta (s - z₀))) where desirable, λ_U (1 - σ(beta (z₀ - s))) where not.

  z₀ = max(0, mean of s over mismatched pairs), a constant: an estimate of the KL to the reference.

  Args:
    side, labels, beta: see the module; at least 2 responses.
    mismatched_log_probs, mismatched_reference_log_probs: [B, T'] nats; log-probs of completions put
      after a prompt they do not answer, by policy and reference. The usual pairing is prompt i with
      the completion of row i + 1 of the whole batch.
    mismatched_loss_mask: [B, T'] bool.
    desirable_weight, undesirable_weight: λ_D, λ_U, not negative; the paper keeps
      λ_D n_D / (λ_U n_U) in [1, 4/3].
  Returns:
    Scalar, the mean over all responses, and metrics, `kl` = z₀ among them.
  Source: arXiv:2402.01306, eq. 8.
  """
  masking.non_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
  bounds.two_rows(side.log_probs, 'KTO pairs prompts with completions of other rows')
  log_ratios = _checked(side, labels, beta)  # [B] nats
  mismatched = side.replace(
      log_probs=masking.required(mismatched_log_probs, 'mismatched_log_probs', 'kto'),
      loss_mask=masking.required(mismatched_loss_mask, 'mismatched_loss_mask', 'kto'),
      reference_log_probs=masking.required(
          mismatched_reference_log_probs, 'mismatched_reference_log_probs', 'kto'))
  kl = jax.lax.stop_gradient(jnp.maximum(score.log_ratio(mismatched).mean(), 0.0))
  weights = jnp.where(labels, desirable_weight, undesirable_weight).astype(log_ratios.dtype)
  losses = weights * link.probability(-_signed(labels, beta * (log_ratios - kl)))
  return losses.mean(), {**_metrics(side, labels, beta * log_ratios), 'kl': kl}


def kto_oxrl_loss(pair, *, loss_state=running.INITIAL, beta=0.1, desirable_weight=1.0,
                  undesirable_weight=1.0, decay=0.9):
  """oxRL's KTO on pairs: -λ log σ(±beta (s - z)), z a moving average of the chosen log-ratios.

  z starts at 0 and is updated by the batch mean of s_w before use. That is BCO's link with another
  shift; no mismatched pairs, no max(0, ·). For repeating arXiv:2603.19335.

  Args:
    pair, beta: see `preference_link`.
    loss_state: running.Moments of the chosen log-ratios.
    desirable_weight, undesirable_weight: λ of chosen and of rejected; not negative.
    decay: of the moving average.
  Returns:
    Scalar, the mean over all 2B responses, metrics, state after the batch.
  """
  masking.non_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
  bounds.positive(beta=beta)
  bounds.fraction(decay=decay)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  state = running.exponential(loss_state, chosen, decay=decay)
  losses = (desirable_weight * link.logistic(beta * (chosen - state.mean))
            + undesirable_weight * link.logistic(-beta * (rejected - state.mean)))
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  return 0.5 * losses.mean(), {**metrics, 'kl': state.mean}, state


def apo_zero_unpaired_loss(side, *, labels, beta=0.1):
  """APO-zero on single responses: 1 - σ(r) where desirable, σ(r) where not; KTO with z₀ = 0.

  Source: arXiv:2408.06266, eq. 7, unpaired as in TRL.
  """
  log_ratios = _checked(side, labels, beta)
  losses = link.probability(-_signed(labels, beta * log_ratios))
  return losses.mean(), _metrics(side, labels, beta * log_ratios)


def shifted_logistic(loss_state, rewards, labels):
  """BCO's core: (state, -log σ(±(r - δ)) [B]) with δ the mean of all rewards seen so far."""
  state = running.cumulative(loss_state, rewards)
  return state, link.logistic(_signed(labels, rewards - state.mean))


def bco_loss(side, *, labels, desirable_probabilities=None, loss_state=running.INITIAL, beta=0.1,
             min_weight=0.5, max_weight=10.0):
  """BCO: -log σ(r - δ) where desirable, -log σ(δ - r) where not; each class its own mean.

  δ is the mean reward of all responses seen so far, this batch included, a constant.

  Args:
    side, labels, beta: see the module.
    desirable_probabilities: None, or [B] in [0, 1]: c, a classifier's probability that the prompt
      belongs to the desirable set. Undesirable responses then weigh c / (1 - c), held between
      `min_weight` and `max_weight` (underlying distribution matching).
    loss_state: running.Moments of the rewards.
  Returns:
    Scalar, the sum of the two means, metrics, state after the batch.
  Source: arXiv:2404.04656; beta there 0.01. Differs from oxRL and TRL's bco_pair, which have no δ.
  """
  masking.non_negative(min_weight=min_weight, max_weight=max_weight)
  rewards = beta * _checked(side, labels, beta)
  state, losses = shifted_logistic(loss_state, rewards, labels)
  undesirable = losses
  if desirable_probabilities is not None:
    odds = bounds.per_row(
        losses.shape, losses.dtype, desirable_probabilities=desirable_probabilities)
    odds = odds / jnp.maximum(1.0 - odds, 1e-6)
    undesirable = jax.lax.stop_gradient(jnp.clip(odds, min_weight, max_weight)) * losses
  labels = jnp.asarray(labels)
  return (_class_mean(losses, labels) + _class_mean(undesirable, ~labels),
          {**_metrics(side, labels, rewards), 'shift': state.mean}, state)


def bco_pair_loss(pair, *, beta=0.1):
  """BCO on pairs without the shift: -log σ(r_w) - log σ(-r_l), as oxRL and TRL have it."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  losses = link.logistic(beta * chosen) + link.logistic(-beta * rejected)
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)
