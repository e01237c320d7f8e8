"""Preference losses that differ from DPO in how pairs are aggregated, or in an added anchor.

Arguments and notation are those of `preference_link`; r = beta·s is the implicit reward.
`nll_coefficient` weighs a negative log-likelihood (see `preference_score.with_nll`).
"""

import jax
import jax.numpy as jnp

from ptjax.losses import preference_link
from ptjax.losses import preference_score
from ptjax.losses import unpaired
from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import running
from ptjax.pieces import score


def drdpo_loss(pair, *, beta=0.1, beta_prime=1.0):
  """Dr. DPO: -β' log mean exp(log σ(h) / β'), which gives pairs that look mislabelled less weight.

  Looks at the whole batch; one pair is DPO. Source: arXiv:2407.07880.
  """
  bounds.positive(beta=beta, beta_prime=beta_prime)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  log_likelihoods = jax.nn.log_sigmoid(beta * (chosen - rejected))  # [B]
  return (-reduction.log_sum_exp(log_likelihoods, temperature=beta_prime),
          score.pair_metrics(pair, beta * chosen, beta * rejected))


def _of_ratios(pair, beta, losses_fn):
  """mean losses_fn(s_w, s_l), the stem of the losses that look at each side by itself."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)  # [B] nats
  return (losses_fn(chosen, rejected).mean(),
          score.pair_metrics(pair, beta * chosen, beta * rejected))


def sppo_loss(pair, *, beta=0.1):
  """SPPO with hard labels: (s_w - 1 / (2 beta))² + (s_l + 1 / (2 beta))².

  Source: arXiv:2405.00675, as TRL's `sppo_hard`; beta in the paper 1e-3, and rounds of self-play.
  """
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.squared_error(chosen, 0.5 / beta) + link.squared_error(rejected, -0.5 / beta)))


def sppo_soft_loss(pair, *, chosen_win_probabilities, rejected_win_probabilities, beta=0.1):
  """SPPO: ½ sum over both sides of (s - (P - ½) / beta)².

  Args:
    pair, beta: see `preference_link`.
    chosen_win_probabilities, rejected_win_probabilities: [B] in [0, 1]; P, the judge's probability
      that the response beats one of the policy's.
  Source: arXiv:2405.00675, eq. 4.7.
  """
  def losses(chosen, rejected):
    win, lose = bounds.per_row(
        chosen.shape, chosen.dtype, chosen_win_probabilities=chosen_win_probabilities,
        rejected_win_probabilities=rejected_win_probabilities)
    return 0.5 * (link.squared_error(chosen, (win - 0.5) / beta)
                  + link.squared_error(rejected, (lose - 0.5) / beta))
  return _of_ratios(pair, beta, losses)


def nca_loss(pair, *, beta=0.01):
  """NCA on a pair: -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l). Source: arXiv:2402.05369."""
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.logistic(beta * chosen) + 0.5 * link.logistic(-beta * chosen)
      + 0.5 * link.logistic(-beta * rejected)))


def caldpo_loss(pair, *, beta=0.1, calibration_coefficient=1.0):
  """Cal-DPO: -log σ(s_w - s_l) + λ [(s_w - 1 / (2 beta))² + (s_l + 1 / (2 beta))²].

  beta is absent from the first term. λ is `calibration_coefficient`: 1 in oxRL, 0.5 in the authors'
  code. Source: arXiv:2412.14516.
  """
  masking.non_negative(calibration_coefficient=calibration_coefficient)
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.logistic(chosen - rejected) + calibration_coefficient * (
          link.squared_error(chosen, 0.5 / beta) + link.squared_error(rejected, -0.5 / beta))))


def apo_zero_loss(pair, *, beta=0.1):
  """APO-zero: 1 - σ(r_w) + σ(r_l): chosen up, rejected down. Source: arXiv:2408.06266, eq. 7."""
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.probability(-beta * chosen) + link.probability(beta * rejected)))


def apo_down_loss(pair, *, beta=0.1):
  """APO-down: σ(r_w) + 1 - σ(r_w - r_l): both down, rejected more. Source: arXiv:2408.06266, eq. 8.

  For chosen responses that are worse than what the model already writes.
  """
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.probability(beta * chosen) + link.probability(-beta * (chosen - rejected))))


def c2dpo_loss(pair, *, beta=0.1, constraint_coefficient=2e-4):
  """C2-DPO: -log σ(h) + λ (s_w + s_l)²: what the chosen gains the rejected must lose.

  λ is `constraint_coefficient`. Source: arXiv:2502.17507.
  """
  masking.non_negative(constraint_coefficient=constraint_coefficient)
  return _of_ratios(pair, beta, lambda chosen, rejected: (
      link.logistic(beta * (chosen - rejected))
      + constraint_coefficient * jnp.square(chosen + rejected)))


def dpnll_loss(pair, *, beta=0.1, nll_coefficient=1.0):
  """DPO + a NLL(chosen), per token of each response, then the mean over responses.

  Source: arXiv:2404.19733 (iterative reasoning preference optimization). oxRL's is `rpo_loss` with
  a = 1.
  """
  return preference_score.with_nll(preference_link.dpo_loss(pair, beta=beta), pair.chosen,
                                   nll_coefficient, reduction.sequence_mean)


def rpo_loss(pair, *, beta=0.01, nll_coefficient=0.005):
  """DPO + a NLL(chosen), the mean over all chosen tokens. Source: arXiv:2405.16436."""
  return preference_score.with_nll(
      preference_link.dpo_loss(pair, beta=beta), pair.chosen, nll_coefficient)


def mpo_loss(pair, *, loss_state=running.INITIAL, beta=0.1, preference_coefficient=0.8,
             quality_coefficient=0.2, nll_coefficient=1.0):
  """MPO: a weighted sum of DPO, BCO (with its running shift) and NLL(chosen) per response.

  Args:
    pair, beta: see `preference_link`.
    loss_state: running.Moments of the rewards, whose mean is the shift.
    preference_coefficient, quality_coefficient, nll_coefficient: weights; not negative.
  Returns:
    Scalar, metrics, state after the batch. Source: arXiv:2411.10442.
  """
  masking.non_negative(preference_coefficient=preference_coefficient,
                       quality_coefficient=quality_coefficient)
  dpo, metrics = preference_link.dpo_loss(pair, beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  rewards = beta * jnp.concatenate([chosen, rejected])
  state, quality = unpaired.shifted_logistic(loss_state, rewards, jnp.arange(
      rewards.size) < chosen.size)
  loss = preference_coefficient * dpo + quality_coefficient * 2.0 * quality.mean()
  return *preference_score.with_nll((loss, metrics), pair.chosen, nll_coefficient,
                                    reduction.sequence_mean), state


def _demonstration(side, log_probs, loss_mask):
  """`side` with a demonstration in the place of its response."""
  return side.replace(
      log_probs=masking.required(log_probs, 'demonstration_log_probs', 'tpo'),
      loss_mask=masking.required(loss_mask, 'demonstration_loss_mask', 'tpo'))


def tpo_loss(pair, *, demonstration_log_probs, demonstration_loss_mask, beta=0.01,
             nll_coefficient=1.0, label_smoothing=0.0, variant='logistic'):
  """Triple Preference Optimization: -log σ(beta (S_w - S_l)) + a NLL(gold), reference-free.

  Args:
    pair, beta, label_smoothing: see `preference_link`.
    demonstration_log_probs: [B, T] float32, nats; of a gold answer to each prompt. Attached.
    demonstration_loss_mask: [B, T] bool.
    nll_coefficient: a; the NLL is the mean over all demonstration tokens.
    variant: see `preference_score.contrast`.
  Source: arXiv:2405.16681.
  """
  return preference_score.with_nll(
      preference_score.contrast(
          pair, beta=beta, variant=variant, label_smoothing=label_smoothing),
      _demonstration(pair.chosen, demonstration_log_probs, demonstration_loss_mask),
      nll_coefficient)


def tpo_l_loss(pair, *, demonstration_log_probs, demonstration_loss_mask, beta=0.01, margin=0.5,
               nll_coefficient=1.0):
  """TPO-L: SimPO's contrast plus a NLL(gold). Arguments and source as `tpo_loss`; γ is `margin`."""
  return preference_score.with_nll(
      preference_score.simpo_loss(pair, beta=beta, margin=margin),
      _demonstration(pair.chosen, demonstration_log_probs, demonstration_loss_mask),
      nll_coefficient)


def mdpo_loss(pair, *, corrupted_log_probs=None, corrupted_reference_log_probs=None, beta=0.1,
              margin=0.0):
  """mDPO: DPO, plus the chosen response against itself on a corrupted prompt, plus an anchor.

  -log σ(h) - log σ(beta (s_w - s'_w)) - log σ(r_w - margin).

  Args:
    pair, beta: see `preference_link`.
    corrupted_log_probs, corrupted_reference_log_probs: [B, T] nats, of the chosen tokens when part
      of the prompt (in the paper the image) is corrupted; without them the middle term is left out,
      which is the use on text.
    margin: the anchor δ, in reward units.
  Source: arXiv:2406.11839.
  """
  def losses(chosen, rejected):
    total = link.logistic(beta * (chosen - rejected)) + link.logistic(beta * chosen - margin)
    if corrupted_log_probs is None:
      return total
    corrupted = score.log_ratio(pair.chosen.replace(
        log_probs=corrupted_log_probs, reference_log_probs=corrupted_reference_log_probs))
    return total + link.logistic(beta * (chosen - corrupted))
  return _of_ratios(pair, beta, losses)
