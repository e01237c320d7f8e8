"""The gaps, aggregates and anchors of `preference_reference`, added to its tables."""

import numpy as np
import preference_reference as base

log_sigmoid, sigmoid, relu, gap = base.log_sigmoid, base.sigmoid, base.relu, base.gap
logistic_row, record = base.logistic_row, base.record

# Gaps.

logistic_row('dpop',
             lambda w, l, at, beta, penalty_coefficient: beta * (
                 gap(w, l) - penalty_coefficient * relu(-w.s)),
             lambda w, l, beta, penalty_coefficient: (
                 beta * (1 + penalty_coefficient * (w.s < 0)), -beta))
logistic_row('minor_dpo', lambda w, l, at, beta: beta * (w.s - relu(l.s)),
             lambda w, l, beta: (beta, -beta * (l.s > 0)))
logistic_row('bpo', lambda w, l, at, beta, alpha: beta * np.minimum(w.s, -alpha * l.s),
             lambda w, l, beta, alpha: (beta * (w.s < -alpha * l.s),
                                        -alpha * beta * (w.s >= -alpha * l.s)))


def _by_rank(first, second):
  """sort(first) - sort(second), with the row of each rank in `first` and in `second`."""
  i, j = np.argsort(first, kind='stable'), np.argsort(second, kind='stable')
  return first[i] - second[j], i, j


def _aot(w, l, beta, label_smoothing=0.0):
  z, rows, _ = _by_rank(w.S - l.S, w.S0 - l.S0)
  losses, kappa = base.cdpo(beta * z, label_smoothing)
  A = np.empty_like(z)
  A[rows] = beta * kappa
  return losses.mean(), A, -A


def _aot_unpaired(w, l, beta, label_smoothing=0.0):
  z, chosen_rows, rejected_rows = _by_rank(w.s, l.s)
  losses, kappa = base.cdpo(beta * z, label_smoothing)
  A_w, A_l = np.empty_like(z), np.empty_like(z)
  A_w[chosen_rows], A_l[rejected_rows] = beta * kappa, -beta * kappa
  return losses.mean(), A_w, A_l


record('aot', lambda w, l, at, **h: _aot(w, l, **h)[0], lambda w, l, **h: _aot(w, l, **h)[1:])
record('aot_unpaired', lambda w, l, at, **h: _aot_unpaired(w, l, **h)[0],
       lambda w, l, **h: _aot_unpaired(w, l, **h)[1:])


def _ema(old, new, decay=0.9):
  return decay * old + (1 - decay) * new


def _betadpo_constants(w, l, noise, mean, std, beta, alpha, drop_fraction):
  gaps = gap(w, l)
  mean, std = _ema(mean, gaps.mean()), _ema(std, gaps.std(ddof=1))
  keys = -0.5 * ((gaps - mean) / std) ** 2 + noise
  count = int(len(gaps) * (1 - drop_fraction) + 1e-9)
  kept = np.zeros(len(gaps), bool)
  kept[np.argsort(-keys)[:count]] = True
  return kept, max(beta * (1 + alpha * (gaps[kept].mean() - mean)), 1e-3)


def _betadpo(w, l, at, **hyper):
  kept, beta = _betadpo_constants(*at, **hyper)
  return -log_sigmoid(beta * gap(w, l)[kept]).mean()


def _betadpo_slopes(w, l, **hyper):
  kept, beta = _betadpo_constants(w, l, **hyper)
  A = len(kept) / kept.sum() * beta * sigmoid(-beta * gap(w, l)) * kept
  return A, -A


record('betadpo', _betadpo, _betadpo_slopes)


def _pair_beta(gaps, mean, beta, alpha):
  return np.maximum(beta * (1 + alpha * (gaps - mean)), 1e-3)


def _betadpo_oxrl_slopes(w, l, mean, beta, alpha):
  gaps = gap(w, l)
  b = _pair_beta(gaps, mean, beta, alpha)
  A = sigmoid(-b * gaps) * (b + np.where(b > 1e-3, beta * alpha, 0.0) * gaps)
  return A, -A


record('betadpo_oxrl', lambda w, l, at, mean, beta, alpha: -log_sigmoid(
    _pair_beta(gap(w, l), mean, beta, alpha) * gap(w, l)), _betadpo_oxrl_slopes)


def _alpha_dpo_z(w, l, at, mean, std, beta, margin_per_beta, alpha):
  g = (at[0].m - at[1].m) - (at[0].m0 - at[1].m0)
  mean, std = _ema(mean, g.mean()), _ema(std, g.std(ddof=1))
  return beta * (w.m - l.m - (alpha * (g - mean) / std + margin_per_beta))


logistic_row('alpha_dpo', _alpha_dpo_z, base.per_token)


def _wpo_weight(w, l, chosen_sum_squares, rejected_sum_squares):
  def mean(x, squares):
    return np.where(x.loss_mask, x.log_probs - squares, 0.0).sum(axis=1) / x.n
  return np.minimum(1.0, np.exp(mean(w, chosen_sum_squares) + mean(l, rejected_sum_squares)))


record('wpo',
       lambda w, l, at, beta, **squares: -_wpo_weight(*at, **squares) * log_sigmoid(
           beta * gap(w, l)),
       lambda w, l, beta, **squares: tuple(
           sign * beta * _wpo_weight(w, l, **squares) * sigmoid(-beta * gap(w, l))
           for sign in (1, -1)))

# Aggregates and anchors.


def _drdpo_slopes(w, l, beta, beta_prime):
  h = beta * gap(w, l)
  share = sigmoid(h) ** (1 / beta_prime)
  A = len(h) * share / share.sum() * beta * sigmoid(-h)
  return A, -A


record('drdpo', lambda w, l, at, beta, beta_prime: -beta_prime * np.log(
    np.mean(sigmoid(beta * gap(w, l)) ** (1 / beta_prime))), _drdpo_slopes)
record('sppo', lambda w, l, at, beta: (w.s - .5 / beta) ** 2 + (l.s + .5 / beta) ** 2,
       lambda w, l, beta: (-2 * (w.s - .5 / beta), -2 * (l.s + .5 / beta)))
record('sppo_soft',
       lambda w, l, at, beta, chosen_win_probabilities, rejected_win_probabilities: .5 * (
           (w.s - (chosen_win_probabilities - .5) / beta) ** 2
           + (l.s - (rejected_win_probabilities - .5) / beta) ** 2),
       lambda w, l, beta, chosen_win_probabilities, rejected_win_probabilities: (
           (chosen_win_probabilities - .5) / beta - w.s,
           (rejected_win_probabilities - .5) / beta - l.s))
record('nca', lambda w, l, at, beta: (-log_sigmoid(beta * w.s) - .5 * log_sigmoid(-beta * w.s)
                                      - .5 * log_sigmoid(-beta * l.s)),
       lambda w, l, beta: (beta * (sigmoid(-beta * w.s) - .5 * sigmoid(beta * w.s)),
                           -.5 * beta * sigmoid(beta * l.s)))
record('caldpo',
       lambda w, l, at, beta, calibration_coefficient: (
           -log_sigmoid(gap(w, l))
           + calibration_coefficient * base.VALUES['sppo'](w, l, at, beta)),
       lambda w, l, beta, calibration_coefficient: tuple(
           sign * sigmoid(-gap(w, l)) + calibration_coefficient * A
           for sign, A in zip((1, -1), base.SLOPES['sppo'](w, l, beta))))


def _bump(x):
  return sigmoid(x) * sigmoid(-x)


record('apo_zero', lambda w, l, at, beta: 1 - sigmoid(beta * w.s) + sigmoid(beta * l.s),
       lambda w, l, beta: (beta * _bump(beta * w.s), -beta * _bump(beta * l.s)))
record('apo_down', lambda w, l, at, beta: sigmoid(beta * w.s) + 1 - sigmoid(beta * gap(w, l)),
       lambda w, l, beta: (-beta * _bump(beta * w.s) + beta * _bump(beta * gap(w, l)),
                           -beta * _bump(beta * gap(w, l))))
record('c2dpo',
       lambda w, l, at, beta, constraint_coefficient: (
           -log_sigmoid(beta * gap(w, l)) + constraint_coefficient * (w.s + l.s) ** 2),
       lambda w, l, beta, constraint_coefficient: tuple(
           sign * beta * sigmoid(-beta * gap(w, l)) - 2 * constraint_coefficient * (w.s + l.s)
           for sign in (1, -1)))
record('dpnll',
       lambda w, l, at, beta, nll_coefficient: (
           -log_sigmoid(beta * gap(w, l)) - nll_coefficient * w.m),
       lambda w, l, beta, nll_coefficient: (
           beta * sigmoid(-beta * gap(w, l)) + nll_coefficient / w.n,
           -beta * sigmoid(-beta * gap(w, l))))
record('rpo',
       lambda w, l, at, beta, nll_coefficient: (
           -log_sigmoid(beta * gap(w, l)) + nll_coefficient * base.token_nll(w)),
       lambda w, l, beta, nll_coefficient: (
           beta * sigmoid(-beta * gap(w, l)) + nll_coefficient * len(w.S) / w.n.sum(),
           -beta * sigmoid(-beta * gap(w, l))))


def _shift(w, l, mean, count, beta):
  rewards = beta * np.concatenate([w.s, l.s])
  return (mean * count + rewards.sum()) / (count + len(rewards))


def _mpo(w, l, at, mean, count, beta, preference_coefficient, quality_coefficient,
         nll_coefficient):
  shift = _shift(*at, mean, count, beta)
  return (-preference_coefficient * log_sigmoid(beta * gap(w, l)) - quality_coefficient * (
      log_sigmoid(beta * w.s - shift) + log_sigmoid(shift - beta * l.s)) - nll_coefficient * w.m)


def _mpo_slopes(w, l, mean, count, beta, preference_coefficient, quality_coefficient,
                nll_coefficient):
  shift = _shift(w, l, mean, count, beta)
  A = preference_coefficient * beta * sigmoid(-beta * gap(w, l))
  return (A + quality_coefficient * beta * sigmoid(shift - beta * w.s) + nll_coefficient / w.n,
          -A - quality_coefficient * beta * sigmoid(beta * l.s - shift))


record('mpo', _mpo, _mpo_slopes)


def _tpo(w, l, demonstration_log_probs, demonstration_loss_mask, nll_coefficient, **hyper):
  gold = base.side(demonstration_log_probs, demonstration_loss_mask)
  return base.contrast(w, l, **hyper)[0] + nll_coefficient * base.token_nll(gold)


record('tpo', lambda w, l, at, **hyper: _tpo(w, l, **hyper),
       lambda w, l, beta, variant='logistic', label_smoothing=0.0, **_: base.contrast(
           w, l, beta, variant, label_smoothing)[1:])
record('tpo_l',
       lambda w, l, at, demonstration_log_probs, demonstration_loss_mask, nll_coefficient,
       **hyper: (
           base.VALUES['simpo'](w, l, at, **hyper) + nll_coefficient * base.token_nll(
               base.side(demonstration_log_probs, demonstration_loss_mask))),
       lambda w, l, beta, margin, **_: base.SLOPES['simpo'](w, l, beta=beta, margin=margin))


def _corrupted_ratio(w, corrupted_log_probs, corrupted_reference_log_probs):
  return base.side(corrupted_log_probs, w.loss_mask, corrupted_reference_log_probs).s


def _mdpo(w, l, at, beta, margin, **corrupted):
  return -(log_sigmoid(beta * gap(w, l)) + log_sigmoid(beta * w.s - margin)
           + (log_sigmoid(beta * (w.s - _corrupted_ratio(w, **corrupted))) if corrupted else 0.0))


def _mdpo_slopes(w, l, beta, margin, **corrupted):
  A = beta * sigmoid(-beta * gap(w, l))
  extra = sigmoid(-beta * (w.s - _corrupted_ratio(w, **corrupted))) if corrupted else 0.0
  return A + beta * (sigmoid(margin - beta * w.s) + extra), -A


record('mdpo', _mdpo, _mdpo_slopes)
record('bco_pair', lambda w, l, at, beta: -log_sigmoid(beta * w.s) - log_sigmoid(-beta * l.s),
       lambda w, l, beta: (beta * sigmoid(-beta * w.s), -beta * sigmoid(beta * l.s)))


def _kto_oxrl(w, l, at, mean, beta, desirable_weight, undesirable_weight):
  z = _ema(mean, at[0].s.mean())
  return -.5 * (desirable_weight * log_sigmoid(beta * (w.s - z))
                + undesirable_weight * log_sigmoid(-beta * (l.s - z)))


def _kto_oxrl_slopes(w, l, mean, beta, desirable_weight, undesirable_weight):
  z = _ema(mean, w.s.mean())
  return (.5 * desirable_weight * beta * sigmoid(-beta * (w.s - z)),
          -.5 * undesirable_weight * beta * sigmoid(beta * (l.s - z)))


record('kto_oxrl', _kto_oxrl, _kto_oxrl_slopes)
