"""Preference losses that differ from DPO in the gap: clamped, sorted, weighted or adaptive.

Arguments and notation are those of `preference_link`. All but the first three look at the whole
batch, which they must therefore see at once. Those with `loss_state` return a third value, the
state after the batch (see `pieces/running.py`).
"""

import math

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import running
from ptjax.pieces import score


def _logistic_of(pair, beta, gap_fn, label_smoothing=0.0):
  """mean -log σ(beta·gap_fn(s_w, s_l)), the stem of this family."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)  # [B] nats
  losses = link.logistic(beta * gap_fn(chosen, rejected), label_smoothing)
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def dpop_loss(pair, *, beta=0.1, penalty_coefficient=5.0):
  """DPO-Positive: -log σ(beta (gap - λ max(0, -s_w))), which holds the chosen likelihood up.

  λ is `penalty_coefficient`; 0 is DPO. Source: arXiv:2402.13228 (Smaug), λ 5, 50 and 500, beta 0.3.
  """
  masking.non_negative(penalty_coefficient=penalty_coefficient)
  return _logistic_of(pair, beta, lambda chosen, rejected: (
      chosen - rejected - penalty_coefficient * jax.nn.relu(-chosen)))


def minor_dpo_loss(pair, *, beta=0.1):
  """MinorDPO: -log σ(beta (s_w - max(0, s_l))): a rejected response is pushed down only while it is
  likelier than under the reference. Source: arXiv:2408.09834.
  """
  return _logistic_of(pair, beta, lambda chosen, rejected: chosen - jax.nn.relu(rejected))


def bpo_loss(pair, *, beta=0.1, alpha=0.3):
  """BPO: -log σ(beta min(s_w, -α s_l)), which trains the side that lags; a tie trains the rejected.

  Source: arXiv:2506.03557; α above 0.
  """
  bounds.positive(alpha=alpha)
  return _logistic_of(pair, beta, lambda chosen, rejected: (
      jnp.where(chosen < -alpha * rejected, chosen, -alpha * rejected)))


WHOLE_BATCH = 'it compares the pairs of a batch with each other and on one pair would only be DPO'


def aot_loss(pair, *, beta=0.1, label_smoothing=0.0):
  """Paired AOT: -log σ of beta (sort(S_w - S_l) - sort(S⁰_w - S⁰_l)), rank by rank.

  Sorting matches the quantiles of the policy's margins with those of the reference, first-order
  stochastic dominance. At least 2 pairs. Source: arXiv:2406.05882; beta there 0.01.
  """
  def gap(chosen, rejected):
    bounds.two_rows(chosen, WHOLE_BATCH)
    policy = score.of_pair(score.log_prob, pair)
    reference = score.of_pair(score.reference_log_prob, pair)
    return jnp.sort(policy[0] - policy[1]) - jnp.sort(reference[0] - reference[1])
  return _logistic_of(pair, beta, gap, label_smoothing)


def aot_unpaired_loss(pair, *, beta=0.1, label_smoothing=0.0):
  """Unpaired AOT: -log σ of beta (sort(s_w) - sort(s_l)), rank by rank; oxRL's AOT.

  The sides need not answer the same prompts, but must be equally many, at least 2. Source:
  arXiv:2406.05882; beta there 0.01.
  """
  def gap(chosen, rejected):
    bounds.two_rows(chosen, WHOLE_BATCH)
    return jnp.sort(chosen) - jnp.sort(rejected)
  return _logistic_of(pair, beta, gap, label_smoothing)


def betadpo_loss(pair, *, key, loss_state=running.INITIAL, beta=0.1, alpha=0.6, drop_fraction=0.2,
                 decay=0.9, min_beta=1e-3):
  """β-DPO: pairs with an unusual gap are dropped at random, and beta follows the batch.

  M and σ are moving averages of the batch mean and std of the gap, updated before use. Of B pairs
  floor((1 - drop_fraction) B) are kept, drawn without replacement with weights
  exp(-((gap - M) / σ)² / 2); the loss is the mean over them of -log σ(β' gap) with the constant
  β' = max(beta (1 + α (mean kept gap - M)), min_beta).

  Args:
    pair, beta: see `preference_link`.
    key: PRNG key, a new one each step; consumed.
    loss_state: running.Moments of the gap.
    alpha: how far beta follows the gap; not negative.
    drop_fraction: the paper's ρ, in [0, 1].
    decay: of the moving averages.
    min_beta: floor of β'.
  Returns:
    Scalar, metrics, state after the batch.
  Source: arXiv:2407.08639 and the authors' trainers.py.
  """
  bounds.positive(beta=beta, min_beta=min_beta)
  bounds.fraction(drop_fraction=drop_fraction, decay=decay)
  masking.non_negative(alpha=alpha)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  gap = chosen - rejected  # [B] nats
  constant_gap = jax.lax.stop_gradient(gap)
  state = running.exponential(loss_state, gap, decay=decay)
  log_weights = -0.5 * jnp.square((constant_gap - state.mean) / jnp.maximum(state.std, 1e-6))
  count = max(1, math.floor((1.0 - drop_fraction) * gap.size + 1e-9))
  # The largest log-weights plus Gumbel noise are a draw without replacement.
  _, kept = jax.lax.top_k(log_weights + jax.random.gumbel(key, gap.shape, gap.dtype), count)
  batch_beta = jnp.maximum(
      beta * (1.0 + alpha * (constant_gap[kept].mean() - state.mean)), min_beta)
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  return link.logistic(batch_beta * gap[kept]).mean(), {**metrics, 'beta': batch_beta}, state


def betadpo_oxrl_loss(pair, *, loss_state=running.INITIAL, beta=0.1, alpha=0.5, decay=0.9,
                      min_beta=1e-3):
  """oxRL's β-DPO: one beta per pair, through which gradient flows, and no pair dropped.

  -log σ(β_i gap_i) with β_i = max(beta (1 + α (gap_i - M)), min_beta); M is read before the batch
  updates it, and the first batch replaces its initial 0. For repeating arXiv:2603.19335.
  """
  bounds.positive(beta=beta, min_beta=min_beta)
  bounds.fraction(decay=decay)
  masking.non_negative(alpha=alpha)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  gap = chosen - rejected  # [B] nats
  pair_beta = beta * (1.0 + alpha * (gap - jnp.asarray(loss_state.mean, gap.dtype)))
  pair_beta = jnp.where(pair_beta >= min_beta, pair_beta, min_beta)
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  metrics['beta'] = jax.lax.stop_gradient(pair_beta.mean())
  return (link.logistic(pair_beta * gap).mean(), metrics,
          running.exponential(loss_state, gap, decay=decay, warm_start=True))


def alpha_dpo_loss(pair, *, loss_state=running.INITIAL, beta=2.5, margin_per_beta=0.4, alpha=0.1,
                   decay=0.9):
  """AlphaDPO: SimPO whose margin follows how far policy and reference disagree on the pair.

  -log σ(beta [m_w - m_l - (α z + γ₀)]) with z = (g - μ) / sd of the constant
  g = (m_w - m_l) - (m⁰_w - m⁰_l); μ and sd are moving averages of its batch mean and std, updated
  before use. α = 0 is SimPO with margin beta·γ₀.

  Args:
    pair, beta: see `preference_link`.
    loss_state: running.Moments of g.
    margin_per_beta: γ₀, nats per token.
    alpha: weight of z, nats per token; not negative.
    decay: of the moving averages.
  Returns:
    Scalar, metrics, state after the batch.
  Source: arXiv:2410.10148 and the authors' dpo_trainer.py. Where sd is still 0, as when policy and
  reference are equal, z is 0; theirs is NaN.
  """
  bounds.positive(beta=beta)
  bounds.fraction(decay=decay)
  masking.non_negative(alpha=alpha)
  ratios = score.of_pair(score.mean_log_ratio, pair)  # [B] nats per token
  chosen, rejected = score.of_pair(score.mean_log_prob, pair)
  disagreement = jax.lax.stop_gradient(ratios[0] - ratios[1])
  state = running.exponential(loss_state, disagreement, decay=decay)
  target = margin_per_beta + alpha * (disagreement - state.mean) / jnp.maximum(state.std, 1e-6)
  losses = link.logistic(beta * (chosen - rejected - target))
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  return losses.mean(), {**metrics, 'margin': target.mean()}, state


def wpo_loss(pair, *, chosen_sum_squares, rejected_sum_squares, beta=0.01):
  """WPO: DPO on pairs weighted by how likely the policy is to write them itself.

  The constant weight is min(1, exp(mean_t a_w + mean_t a_l)), a_t = log π_t - log sum_v π_v², so
  that a token the policy would sample with average probability counts 1.

  Args:
    pair, beta: see `preference_link`.
    chosen_sum_squares, rejected_sum_squares: [B, T] float, log sum_v π_v² of the policy's
      distribution at each token; no gradient flows through them.
  Source: arXiv:2406.11827, eq. 2, and the authors' run_wpo.py. Differs from TRL in the min(1, ·).
  """
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  alignment = (_mean_alignment(pair.chosen, chosen_sum_squares, 'chosen_sum_squares')
               + _mean_alignment(pair.rejected, rejected_sum_squares, 'rejected_sum_squares'))
  weights = jnp.exp(jnp.minimum(alignment, 0.0))  # [B]
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  return ((weights * link.logistic(beta * (chosen - rejected))).mean(),
          {**metrics, 'weights/mean': weights.mean()})


def _mean_alignment(side, log_sum_squares, name):
  """mean_t (log π_t - log sum_v π_v²), [B], a constant."""
  log_sum_squares = masking.required(log_sum_squares, name, 'wpo')
  log_probs, log_sum_squares = masking.clean(
      side.loss_mask, log_probs=side.log_probs, **{name: log_sum_squares})
  aligned = jax.lax.stop_gradient(log_probs - log_sum_squares)
  return aligned.sum(axis=1) / masking.lengths(side.loss_mask, aligned.dtype)
