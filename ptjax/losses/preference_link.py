"""Preference losses that differ from DPO in the link: how the gap becomes a penalty.

Arguments that mean the same in all preference losses:

  pair: types.PairLogProbs; per side log_probs [B, T] float32 nats (they carry the gradient),
    loss_mask [B, T] bool, and reference_log_probs [B, T] where the loss compares with the frozen
    reference. Row i of both sides answers the same prompt.
  beta: inverse temperature of the implicit reward beta * (log π - log π₀); above 0.
  label_smoothing: ε, the fraction of pairs whose labels are taken to be flipped.

Notation in the docstrings: S is a response's summed log-prob, n its tokens, m = S / n, s its
log-ratio to the reference, w and l the chosen and rejected response, gap = s_w - s_l, h = beta·gap.

Every loss returns (mean over pairs, metrics of `score.pair_metrics`). In the unified estimator it
is a policy gradient with ratio 1, nothing masked, and one constant advantage per response, minus
the slope of the pair's loss in S.
"""

import functools

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import score


def linked(pair, beta, link_fn):
  """mean link_fn(beta·(s_w - s_l)), the stem of this family; link_fn takes [B] to [B]."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)  # [B] nats
  h = beta * (chosen - rejected)  # [B]
  return link_fn(h).mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def dpo_loss(pair, *, beta=0.1, label_smoothing=0.0):
  """Direct Preference Optimization: -log σ(h).

  Also the loss of SPIN (arXiv:2401.01335), Step-DPO (arXiv:2406.18629), online DPO and TR-DPO,
  which change the data or the reference. Source: arXiv:2305.18290, eq. 7.
  """
  return linked(pair, beta, functools.partial(link.logistic, label_smoothing=label_smoothing))


def cdpo_loss(pair, *, beta=0.1, label_smoothing=0.1):
  """Conservative DPO: -(1 - ε) log σ(h) - ε log σ(-h), lowest at h = log((1 - ε) / ε).

  Source: Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3; ε of oxRL.
  """
  return dpo_loss(pair, beta=beta, label_smoothing=label_smoothing)


def robust_dpo_loss(pair, *, beta=0.1, label_smoothing=0.1):
  """Provably robust DPO: -[(1 - ε) log σ(h) - ε log σ(-h)] / (1 - 2ε).

  An unbiased estimate of the loss on clean labels, so not bounded below. Source:
  arXiv:2403.00409; ε of oxRL.
  """
  return linked(pair, beta, functools.partial(link.robust, label_smoothing=label_smoothing))


def robust_dpo_oxrl_loss(pair, *, beta=0.1, label_smoothing=0.1):
  """oxRL's robust DPO: a plus sign makes it cDPO / (1 - 2ε). For repeating arXiv:2603.19335."""
  loss, metrics = cdpo_loss(pair, beta=beta, label_smoothing=label_smoothing)
  return loss / (1.0 - 2.0 * label_smoothing), metrics


def hinge_loss(pair, *, beta=0.1):
  """max(0, 1 - h): no push past a margin of 1. Source: arXiv:2309.06657 (RSO), after 2305.10425."""
  return linked(pair, beta, link.hinge)


def exo_loss(pair, *, beta=0.1, label_smoothing=1e-3):
  """Efficient exact optimization: the reverse KL from σ(h) to 1 - ε, 0 at h = log((1 - ε) / ε).

  ε = 0 would be infinite and raises. Source: arXiv:2402.00856, eq. 16; ε of oxRL. The authors'
  code leaves the label logits unnormalised; this is TRL's form.
  """
  return linked(pair, beta, functools.partial(link.reverse_kl, label_smoothing=label_smoothing))


def discopop_loss(pair, *, beta=0.1, temperature=0.05):
  """DiscoPOP, log-ratio modulated: -(1 - m) log σ(h) + m exp(-h) with m = σ(h / temperature).

  Its weight at h = 0 is negative: training starts by lowering the margin, as discovered. Source:
  arXiv:2406.08414, eq. 5; beta there 0.05.
  """
  return linked(pair, beta, functools.partial(link.logistic_exponential, temperature=temperature))


GPO_LINKS = {
    'exponential': link.exponential, 'logistic': link.logistic, 'squared': link.squared,
    'hinge': link.hinge, 'truncated_quadratic': link.truncated_quadratic, 'savage': link.savage}


def gpo_loss(pair, *, beta=0.1, variant='exponential'):
  """Generalized Preference Optimization: any convex link; `variant` is a key of GPO_LINKS.

  exp(-h), -log σ(h), (1 - h)², max(0, 1 - h), max(0, 1 - h)² or σ(-h)². Source: arXiv:2402.05749;
  the default is oxRL's.
  """
  bounds.choice(GPO_LINKS, variant=variant)
  return linked(pair, beta, GPO_LINKS[variant])


def focalpo_loss(pair, *, beta=0.1, exponent=0.05):
  """FocalPO: -σ(h)^γ log σ(h), which down-weighs wrongly ranked pairs; γ is `exponent`.

  Source: arXiv:2501.06645. Differs from oxRL in that the factor carries gradient.
  """
  return linked(pair, beta, functools.partial(link.focal, exponent=exponent))


def focalpo_oxrl_loss(pair, *, beta=0.1, exponent=1.0):
  """oxRL's FocalPO: the factor σ(h)^γ is a constant weight. For repeating arXiv:2603.19335."""
  def weighted(h):
    return jax.lax.stop_gradient(jax.nn.sigmoid(h) ** exponent) * link.logistic(h)
  masking.non_negative(exponent=exponent)
  return linked(pair, beta, weighted)


def odpo_loss(pair, *, chosen_scores, rejected_scores, beta=0.1, alpha=1.0):
  """DPO with an offset: -log σ(h - α log(score_w - score_l)).

  Args:
    pair, beta: see the module.
    chosen_scores, rejected_scores: [B] float; how good the responses are, of a reward model. A
      pair whose scores tie, or contradict its order, counts as 1e-6 apart: hardly at all.
    alpha: weight of the offset; not negative.
  Source: arXiv:2402.10571. Differs from oxRL, whose `odpo_oxrl` subtracts a constant.
  """
  masking.non_negative(alpha=alpha)
  def offset_logistic(h):
    chosen, rejected = bounds.per_row(
        h.shape, h.dtype, chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return link.logistic(h - alpha * jnp.log(jnp.maximum(chosen - rejected, 1e-6)))
  return linked(pair, beta, offset_logistic)


def odpo_oxrl_loss(pair, *, beta=0.1, margin=1.0):
  """oxRL's ODPO: -log σ(h - margin), the same offset for all. For repeating arXiv:2603.19335."""
  return linked(pair, beta, lambda h: link.logistic(h - margin))
