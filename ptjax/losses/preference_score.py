"""Preference losses that differ from DPO in the score: what a response is worth.

Arguments and notation are those of `preference_link`. Losses that take only `pair.*.log_probs` need
no reference; the docstring says "reference-free". `nll_coefficient` weighs the negative
log-likelihood of the chosen responses, the mean over all their tokens in the batch.
"""

import functools

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import score


def _ipo(pair, score_fn, beta):
  """mean (score gap - 1 / (2 beta))²."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score_fn, pair)
  ratios = score.of_pair(score.log_ratio, pair)
  return (link.squared_error(chosen - rejected, 0.5 / beta).mean(),
          score.pair_metrics(pair, *(beta * ratio for ratio in ratios)))


def ipo_loss(pair, *, beta=0.1):
  """Identity Preference Optimization: (s_w/n_w - s_l/n_l - 1 / (2 beta))².

  Source: arXiv:2310.12036, eq. 17, with log-ratios per token, which TRL says the authors confirmed.
  """
  return _ipo(pair, score.mean_log_ratio, beta)


def ipo_oxrl_loss(pair, *, beta=0.1):
  """IPO with summed log-ratios, eq. 17 read literally: aims at 1 / (2 beta) nats per response.

  For repeating arXiv:2603.19335.
  """
  return _ipo(pair, score.log_ratio, beta)


def sigmoid_norm_loss(pair, *, beta=5.0):
  """Length-normalised DPO: -log σ(beta (s_w/n_w - s_l/n_l)). Source: arXiv:2411.15124 (Tülu 3)."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.mean_log_ratio, pair)  # [B] nats per token
  ratios = score.of_pair(score.log_ratio, pair)
  return (link.logistic(beta * (chosen - rejected)).mean(),
          score.pair_metrics(pair, *(beta * ratio for ratio in ratios)))


def _reference_free(pair, beta, margin, shape=lambda mean: mean):
  """mean -log σ(beta (shape(m_w) - shape(m_l)) - margin), the stem of SimPO and AlphaPO."""
  bounds.positive(beta=beta)
  chosen, rejected = (shape(mean) for mean in score.of_pair(score.mean_log_prob, pair))
  losses = link.logistic(beta * (chosen - rejected) - margin)
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def simpo_loss(pair, *, beta=2.0, margin=1.0):
  """SimPO: -log σ(beta (m_w - m_l) - margin), reference-free.

  Source: arXiv:2405.14734, eq. 6; the authors' beta 2 to 2.5 and margin / beta 0.5.
  """
  return _reference_free(pair, beta, margin)


def simpo_oxrl_loss(pair, *, beta=0.1, margin=0.5):
  """SimPO with oxRL's settings: a target of 5 nats per token. For repeating arXiv:2603.19335."""
  return simpo_loss(pair, beta=beta, margin=margin)


def alphapo_loss(pair, *, beta=2.5, margin=0.1, alpha=0.25):
  """AlphaPO: SimPO on the reward (1 - p^-α) / α of p = exp(m), reference-free.

  α = 0 is SimPO. p^-α stops growing at e^50, as in oxRL. Source: arXiv:2501.03884.
  """
  return _reference_free(pair, beta, margin, functools.partial(score.box_cox, alpha=alpha))


def alphapo_oxrl_loss(pair, *, beta=0.1, margin=0.5, alpha=1.0):
  """AlphaPO with oxRL's settings, which inflate unlikely text. For repeating arXiv:2603.19335."""
  return alphapo_loss(pair, beta=beta, margin=margin, alpha=alpha)


CONTRASTS = ('logistic', 'hinge', 'ipo')


def contrast(pair, *, beta, variant, label_smoothing):
  """The reference-free contrast of CPO and TPO: DPO against a uniform reference.

  `variant` is one of CONTRASTS: -log σ(h) or max(0, 1 - h) of h = beta (S_w - S_l), or
  (m_w - m_l - 1 / (2 beta))². `label_smoothing` serves 'logistic' alone.
  """
  bounds.positive(beta=beta)
  bounds.choice(CONTRASTS, variant=variant)
  chosen, rejected = score.of_pair(
      score.mean_log_prob if variant == 'ipo' else score.log_prob, pair)
  if variant == 'ipo':
    losses = link.squared_error(chosen - rejected, 0.5 / beta)
  elif variant == 'hinge':
    losses = link.hinge(beta * (chosen - rejected))
  else:
    losses = link.logistic(beta * (chosen - rejected), label_smoothing)
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def with_nll(loss_and_metrics, side, nll_coefficient, reduce=reduction.token_mean):
  """Adds `nll_coefficient` times the negative log-likelihood of `side` to (loss, metrics)."""
  masking.non_negative(nll_coefficient=nll_coefficient)
  loss, metrics = loss_and_metrics
  nll = -reduce(side.log_probs, side.loss_mask)
  return loss + nll_coefficient * nll, {**metrics, 'nll_loss': jax.lax.stop_gradient(nll)}


def cpo_loss(pair, *, beta=0.1, nll_coefficient=1.0, label_smoothing=0.0, variant='logistic'):
  """Contrastive Preference Optimization: -log σ(beta (S_w - S_l)) + a NLL(chosen), reference-free.

  Source: arXiv:2401.08417, eq. 3; `variant` and `label_smoothing` as in TRL, see `contrast`.
  """
  return with_nll(contrast(pair, beta=beta, variant=variant, label_smoothing=label_smoothing),
                  pair.chosen, nll_coefficient)


def cposimpo_loss(pair, *, beta=2.0, margin=0.5, nll_coefficient=1.0):
  """CPO-SimPO: SimPO plus a NLL(chosen), reference-free. Source: github.com/fe1ixxu/CPO_SIMPO."""
  return with_nll(simpo_loss(pair, beta=beta, margin=margin), pair.chosen, nll_coefficient)


def orpo_loss(pair, *, beta=0.1):
  """ORPO: NLL(chosen) - beta log σ(o_w - o_l), o the log-odds of exp(m); reference-free.

  Args:
    pair: see `preference_link`.
    beta: the paper's λ, weight of the odds ratio; 0 leaves the NLL.
  Source: arXiv:2403.07691, eqs. 6 and 7. Differs from TRL, whose NLL also covers the prompt. The
  rewards among the metrics are beta·m.
  """
  masking.non_negative(beta=beta)
  chosen, rejected = score.of_pair(score.mean_log_prob, pair)  # [B] nats per token
  log_odds = score.log_odds(chosen) - score.log_odds(rejected)
  metrics = score.pair_metrics(pair, beta * chosen, beta * rejected)
  metrics['log_odds_chosen'] = jax.lax.stop_gradient(log_odds.mean())
  return with_nll((beta * link.logistic(log_odds).mean(), metrics), pair.chosen, 1.0)


def slic_hf_loss(pair, *, margin=1.0, nll_coefficient=1.0):
  """SLiC-HF: max(0, margin - S_w + S_l) - λ S_w, reference-free; λ is `nll_coefficient`.

  Source: arXiv:2305.10425, eq. 1. The chosen response stands in for the paper's SFT target, which
  a pair does not hold. The rewards among the metrics are S.
  """
  chosen, rejected = score.of_pair(score.log_prob, pair)  # [B] nats
  losses = jax.nn.relu(margin - (chosen - rejected))
  return with_nll((losses.mean(), score.pair_metrics(pair, chosen, rejected)),
                  pair.chosen, nll_coefficient, reduction.sequence_sum)


def _logistic_of_masked(pair, beta, score_fn):
  """mean -log σ(beta (score_w - score_l)), the scores also serving as rewards / beta."""
  bounds.positive(beta=beta)
  chosen, rejected = score_fn(pair)
  return (link.logistic(beta * (chosen - rejected)).mean(),
          score.pair_metrics(pair, beta * chosen, beta * rejected))


def sampo_loss(pair, *, key, beta=0.1):
  """SamPO: DPO on min(n_w, n_l) tokens of each response, drawn uniformly without replacement.

  Args:
    pair, beta: see `preference_link`.
    key: PRNG key, a new one each step; consumed.
  Source: arXiv:2406.10957. Policy and reference are read at the same drawn positions; the authors'
  code and oxRL draw for each apart, which leaves noise in the gap.
  """
  return _logistic_of_masked(
      pair, beta, lambda pair: score.of_pair(score.log_ratio, score.shared_sample(key, pair)))


def ld_dpo_loss(pair, *, beta=0.1, alpha=0.5):
  """LD-DPO: DPO on log-ratios whose tokens past min(n_w, n_l) count only α, in [0, 1].

  Source: arXiv:2409.06411; the paper tunes α per model.
  """
  bounds.fraction(alpha=alpha)
  def desensitised(pair):
    shared = score.of_pair(score.log_ratio, score.shared_prefix(pair))
    return [(1 - alpha) * prefix + alpha * whole
            for prefix, whole in zip(shared, score.of_pair(score.log_ratio, pair))]
  return _logistic_of_masked(pair, beta, desensitised)


def _length_shifted(pair, beta, alpha):
  """mean -log σ(h + α (n_w - n_l))."""
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  lengths = score.of_pair(lambda side: side.loss_mask.sum(axis=1).astype(chosen.dtype), pair)
  losses = link.logistic(beta * (chosen - rejected) + alpha * (lengths[0] - lengths[1]))
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def rdpo_loss(pair, *, beta=0.1, alpha=0.01):
  """R-DPO: -log σ(h + α (n_w - n_l)), the reward being penalised by α per token.

  Source: arXiv:2403.19159, eq. 9. oxRL has the other sign, see `rdpo_oxrl_loss`; α is theirs.
  """
  masking.non_negative(alpha=alpha)
  return _length_shifted(pair, beta, alpha)


def rdpo_oxrl_loss(pair, *, beta=0.1, alpha=0.01):
  """oxRL's R-DPO: -log σ(h - α (n_w - n_l)), which rewards length. For arXiv:2603.19335."""
  masking.non_negative(alpha=alpha)
  return _length_shifted(pair, beta, -alpha)


def hdpo_loss(pair, *, beta=0.1, alpha=0.9):
  """Entropy-controllable DPO: -log σ(α beta (S_w - S_l) - beta (S⁰_w - S⁰_l)); α = 1 is DPO.

  Source: arXiv:2411.07595 (H-DPO); α there 0.8 to 0.95.
  """
  bounds.positive(beta=beta, alpha=alpha)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  policy = score.of_pair(score.log_prob, pair)
  losses = link.logistic(beta * (chosen - rejected - (1.0 - alpha) * (policy[0] - policy[1])))
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def dposhift_loss(pair, *, beta=0.1, rejected_coefficient=0.5):
  """DPO-Shift: -log σ(beta s_w - λ beta s_l); λ is `rejected_coefficient`, 1 is DPO.

  Source: arXiv:2502.07599; λ of oxRL, the authors also let it run from 0.5 to 1.
  """
  bounds.positive(beta=beta)
  masking.non_negative(rejected_coefficient=rejected_coefficient)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  losses = link.logistic(beta * (chosen - rejected_coefficient * rejected))
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def fdpo_loss(pair, *, beta=0.1, variant='js', alpha=0.5):
  """f-DPO: -log σ(beta (f'(e^s_w) - f'(e^s_l))) for a divergence other than the reverse KL.

  Args:
    pair, beta: see `preference_link`.
    variant: one of score.DIVERGENCES; 'reverse_kl' is DPO and oxRL's default.
    alpha: of 'alpha' alone, in (0, 1); TRL's coefficient is 1 - alpha.
  Source: arXiv:2309.16240. oxRL's forward KL, JS and α-divergence are not the paper's.
  """
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  slopes = [score.divergence_slope(s, variant, alpha) for s in (chosen, rejected)]
  losses = link.logistic(beta * (slopes[0] - slopes[1]))
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def chipo_loss(pair, *, beta=0.1, max_reward=None):
  """χPO: -log σ(beta (φ(s_w) - φ(s_l))) with φ(s) = e^s + s, clipped to ±2·max_reward.

  Args:
    pair, beta: see `preference_link`.
    max_reward: the problem's largest reward; None does not clip, as oxRL. A clipped pair has no
      gradient.
  Source: arXiv:2407.13399. e^s stops growing at e^20.
  """
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.log_ratio, pair)
  ratio_gap = score.capped_ratio(chosen) - score.capped_ratio(rejected)
  h = beta * (ratio_gap + (chosen - rejected))  # e^s + s would lose s to rounding
  if max_reward is not None:
    bounds.positive(max_reward=max_reward)
    h = jnp.where(jnp.abs(h) <= 2.0 * max_reward, h, jnp.sign(h) * 2.0 * max_reward)
  return link.logistic(h).mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)


def spo_loss(pair, *, beta=2.5, margin=0.8):
  """Self Preference Optimization: SiLU(-z), z = beta (m_w - m_l) - margin, reference-free.

  Lowest, -0.2785, at z = 1.2785, so that a pair never pushes without end. Source: EMNLP 2025
  Findings, 300. oxRL has -SiLU(h), which is unbounded below.
  """
  bounds.positive(beta=beta)
  chosen, rejected = score.of_pair(score.mean_log_prob, pair)
  losses = link.silu(beta * (chosen - rejected) - margin)
  return losses.mean(), score.pair_metrics(pair, beta * chosen, beta * rejected)
