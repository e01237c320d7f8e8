"""Preference losses in NumPy float64, written from the papers' formulas and not from ptjax.

`VALUES[name](w, l, at, **hyper)` gives the losses of the pairs, or a scalar where the loss is one of
the whole batch; `SLOPES[name](w, l, **hyper)` gives (A_w, A_l), minus the derivative of each pair's
loss in the summed log-probs, derived by hand. `at` is (w, l) at the point where constants (what
ptjax stops the gradient of) are taken; a finite difference in w and l with `at` held still is
therefore the gradient. Slopes are per pair: a token's weight is A / B.
"""

import math
import types

import numpy as np


def side(log_probs, loss_mask, reference_log_probs=None):
  """Statistics of responses: S, S0, n, s, m, m0, sbar, all [B] float64."""
  def total(x):
    return np.array([row[keep].sum() for row, keep in zip(np.asarray(x, np.float64), loss_mask)])
  n = np.array([keep.sum() for keep in loss_mask], np.float64)
  S = total(log_probs)
  S0 = np.full_like(S, np.nan) if reference_log_probs is None else total(reference_log_probs)
  return statistics(S, S0, n, log_probs, loss_mask, reference_log_probs)


def statistics(S, S0, n, log_probs=None, loss_mask=None, reference_log_probs=None):
  return types.SimpleNamespace(S=S, S0=S0, n=n, s=S - S0, m=S / n, m0=S0 / n, sbar=(S - S0) / n,
                               log_probs=log_probs, loss_mask=loss_mask,
                               reference_log_probs=reference_log_probs)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def log_sigmoid(x):
  return -np.logaddexp(0.0, -np.asarray(x, np.float64))


def relu(x):
  return np.where(x > 0, x, 0.0)


VALUES, SLOPES = {}, {}


def record(name, value, slopes):
  VALUES[name], SLOPES[name] = value, slopes


# Links: phi(h) and kappa(h) = -phi'(h), with A_w = beta kappa = -A_l.

def _gpo(h, variant):
  s = sigmoid(-h)
  return {'exponential': (np.exp(-h), np.exp(-h)), 'logistic': (-log_sigmoid(h), s),
          'squared': ((1 - h) ** 2, 2 * (1 - h)), 'hinge': (relu(1 - h), (h < 1) * 1.0),
          'truncated_quadratic': (relu(1 - h) ** 2, 2 * relu(1 - h)),
          'savage': (s ** 2, 2 * s ** 2 * sigmoid(h))}[variant]


def _exo(h, label_smoothing):
  e = label_smoothing
  return (sigmoid(h) * (log_sigmoid(h) - math.log(1 - e))
          + sigmoid(-h) * (log_sigmoid(-h) - math.log(e)),
          sigmoid(h) * sigmoid(-h) * (math.log((1 - e) / e) - h))


def _discopop(h, temperature):
  m, rest, e = sigmoid(h / temperature), sigmoid(-h / temperature), np.exp(-h)
  return (-rest * log_sigmoid(h) + m * e,
          rest * sigmoid(-h) + m * e - m * rest / temperature * (log_sigmoid(h) + e))


def _cdpo(h, label_smoothing=0.0):
  e = label_smoothing
  return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h), (1 - e) - sigmoid(h)


def _robust(h, label_smoothing):
  e = label_smoothing
  return (-((1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)) / (1 - 2 * e),
          ((1 - e) * sigmoid(-h) + e * sigmoid(h)) / (1 - 2 * e))


LINKS = {
    'dpo': _cdpo, 'cdpo': _cdpo, 'robust_dpo': _robust, 'exo': _exo, 'discopop': _discopop,
    'gpo': _gpo,
    'robust_dpo_oxrl': lambda h, label_smoothing: tuple(
        x / (1 - 2 * label_smoothing) for x in _cdpo(h, label_smoothing)),
    'hinge': lambda h: (relu(1 - h), (h < 1) * 1.0),
    'focalpo': lambda h, exponent: (
        -sigmoid(h) ** exponent * log_sigmoid(h),
        sigmoid(h) ** exponent * sigmoid(-h) * (1 + exponent * log_sigmoid(h))),
    'odpo_oxrl': lambda h, margin: (-log_sigmoid(h - margin), sigmoid(margin - h)),
}


def _link_row(name):
  phi_kappa = LINKS[name]
  def slopes(w, l, beta, **hyper):
    kappa = beta * phi_kappa(beta * (w.s - l.s), **hyper)[1]
    return kappa, -kappa
  record(name, lambda w, l, at, beta, **hyper: phi_kappa(beta * (w.s - l.s), **hyper)[0], slopes)


for _name in LINKS:
  _link_row(_name)


def logistic_row(name, z, dz):
  """-log sigmoid(z(w, l, at)); dz(w, l) = (dz/dS_w, dz/dS_l) per pair."""
  record(name, lambda w, l, at, **hyper: -log_sigmoid(z(w, l, at, **hyper)),
         lambda w, l, **hyper: tuple(
             sigmoid(-z(w, l, (w, l), **hyper)) * d for d in dz(w, l, **hyper)))


def _gap(w, l):
  return w.s - l.s


def _focal_weight(at, beta, exponent):
  return sigmoid(beta * _gap(*at)) ** exponent


record('focalpo_oxrl',
       lambda w, l, at, beta, exponent: -_focal_weight(at, beta, exponent) * log_sigmoid(
           beta * _gap(w, l)),
       lambda w, l, beta, exponent: tuple(
           sign * beta * _focal_weight((w, l), beta, exponent) * sigmoid(-beta * _gap(w, l))
           for sign in (1, -1)))


def _odpo_z(w, l, at, beta, alpha, chosen_scores, rejected_scores):
  return beta * _gap(w, l) - alpha * np.log(np.maximum(chosen_scores - rejected_scores, 1e-6))


logistic_row('odpo', _odpo_z, lambda w, l, beta, **_: (beta, -beta))

# Scores.


def _target_row(name, gap, scale):
  record(name, lambda w, l, at, beta: (gap(w, l) - 1 / (2 * beta)) ** 2,
         lambda w, l, beta: (-2 * (gap(w, l) - 1 / (2 * beta)) / scale(w),
                             2 * (gap(w, l) - 1 / (2 * beta)) / scale(l)))


_target_row('ipo', lambda w, l: w.sbar - l.sbar, lambda x: x.n)
_target_row('ipo_oxrl', _gap, lambda x: 1.0)
logistic_row('sigmoid_norm', lambda w, l, at, beta: beta * (w.sbar - l.sbar),
             lambda w, l, beta: (beta / w.n, -beta / l.n))


def _per_token(w, l, beta, **_):
  return beta / w.n, -beta / l.n


logistic_row('simpo', lambda w, l, at, beta, margin: beta * (w.m - l.m) - margin, _per_token)
VALUES['simpo_oxrl'], SLOPES['simpo_oxrl'] = VALUES['simpo'], SLOPES['simpo']


def _alphapo(x, alpha):
  """Reward (1 - p^-alpha) / alpha and its slope in S; p^-alpha stops at e^50."""
  power = np.exp(np.minimum(-alpha * x.m, 50.0))
  return (1 - power) / alpha, np.where(-alpha * x.m > 50, 0.0, power) / x.n


logistic_row('alphapo',
             lambda w, l, at, beta, margin, alpha: beta * (
                 _alphapo(w, alpha)[0] - _alphapo(l, alpha)[0]) - margin,
             lambda w, l, beta, margin, alpha: (beta * _alphapo(w, alpha)[1],
                                                -beta * _alphapo(l, alpha)[1]))
VALUES['alphapo_oxrl'], SLOPES['alphapo_oxrl'] = VALUES['alphapo'], SLOPES['alphapo']


def token_nll(x):
  return -x.S.sum() / x.n.sum()


def _contrast(w, l, beta, variant, label_smoothing):
  """(losses, A_w, A_l) of CPO's and TPO's preference term."""
  if variant == 'ipo':
    error = w.m - l.m - 1 / (2 * beta)
    return error ** 2, -2 * error / w.n, 2 * error / l.n
  losses, kappa = (LINKS['hinge'](beta * (w.S - l.S)) if variant == 'hinge'
                   else _cdpo(beta * (w.S - l.S), label_smoothing))
  return losses, beta * kappa, -beta * kappa


def _cpo(w, l, beta, nll_coefficient=1.0, label_smoothing=0.0, variant='logistic'):
  losses, A_w, A_l = _contrast(w, l, beta, variant, label_smoothing)
  return losses + nll_coefficient * token_nll(w), A_w + nll_coefficient * len(
      w.S) / w.n.sum(), A_l


record('cpo', lambda w, l, at, **hyper: _cpo(w, l, **hyper)[0],
       lambda w, l, **hyper: _cpo(w, l, **hyper)[1:])
record('cposimpo',
       lambda w, l, at, beta, margin, nll_coefficient: (
           -log_sigmoid(beta * (w.m - l.m) - margin) + nll_coefficient * token_nll(w)),
       lambda w, l, beta, margin, nll_coefficient: (
           beta / w.n * sigmoid(margin - beta * (w.m - l.m))
           + nll_coefficient * len(w.S) / w.n.sum(),
           -beta / l.n * sigmoid(margin - beta * (w.m - l.m))))


def _orpo(w, l, beta):
  p, q = np.exp(np.minimum(w.m, -1e-6)), np.exp(np.minimum(l.m, -1e-6))
  z = np.log(p / (1 - p)) - np.log(q / (1 - q))
  return (token_nll(w) - beta * log_sigmoid(z),
          len(w.S) / w.n.sum() + beta / w.n * sigmoid(-z) / (1 - p),
          -beta / l.n * sigmoid(-z) / (1 - q))


record('orpo', lambda w, l, at, beta: _orpo(w, l, beta)[0], lambda w, l, beta: _orpo(w, l, beta)[1:])
record('slic_hf',
       lambda w, l, at, margin, nll_coefficient: (
           relu(margin - w.S + l.S) - nll_coefficient * w.S),
       lambda w, l, margin, nll_coefficient: (
           (w.S - l.S < margin) + nll_coefficient, -1.0 * (w.S - l.S < margin)))
logistic_row('rdpo', lambda w, l, at, beta, alpha: beta * _gap(w, l) + alpha * (w.n - l.n),
             lambda w, l, beta, alpha: (beta, -beta))
logistic_row('rdpo_oxrl', lambda w, l, at, beta, alpha: beta * _gap(w, l) - alpha * (w.n - l.n),
             lambda w, l, beta, alpha: (beta, -beta))
logistic_row('hdpo',
             lambda w, l, at, beta, alpha: alpha * beta * (w.S - l.S) - beta * (w.S0 - l.S0),
             lambda w, l, beta, alpha: (alpha * beta, -alpha * beta))
logistic_row('dposhift',
             lambda w, l, at, beta, rejected_coefficient: (
                 beta * w.s - rejected_coefficient * beta * l.s),
             lambda w, l, beta, rejected_coefficient: (beta, -rejected_coefficient * beta))


def _f_slope(s, divergence, alpha=None):
  """f'(e^s) and u f''(u) at u = e^s."""
  u = np.exp(s)
  return {'reverse_kl': lambda: (np.log(u), np.ones_like(u)), 'forward_kl': lambda: (-1 / u, 1 / u),
          'js': lambda: (np.log(2 * u / (1 + u)), 1 / (1 + u)),
          'alpha': lambda: ((1 - u ** -alpha) / alpha, u ** -alpha)}[divergence]()


logistic_row('fdpo',
             lambda w, l, at, beta, **f: beta * (_f_slope(w.s, **f)[0] - _f_slope(l.s, **f)[0]),
             lambda w, l, beta, **f: (beta * _f_slope(w.s, **f)[1], -beta * _f_slope(l.s, **f)[1]))


def _chi(s):
  return np.exp(np.minimum(s, 20.0)) + s


def _chipo_z(w, l, at, beta, max_reward=None):
  h = beta * (_chi(w.s) - _chi(l.s))
  return h if max_reward is None else np.clip(h, -2 * max_reward, 2 * max_reward)


def _chipo_slopes(w, l, beta, max_reward=None):
  inside = 1.0 if max_reward is None else np.abs(_chipo_z(w, l, None, beta)) <= 2 * max_reward
  return tuple(sign * inside * beta * (1 + np.where(x.s <= 20, np.exp(np.minimum(x.s, 20)), 0))
               for sign, x in ((1, w), (-1, l)))


logistic_row('chipo', _chipo_z, _chipo_slopes)


def _spo(w, l, beta, margin):
  z = beta * (w.m - l.m) - margin
  slope = sigmoid(-z) - z * sigmoid(z) * sigmoid(-z)
  return -z * sigmoid(-z), beta / w.n * slope, -beta / l.n * slope


record('spo', lambda w, l, at, **hyper: _spo(w, l, **hyper)[0],
       lambda w, l, **hyper: _spo(w, l, **hyper)[1:])


def _tail_weights(x, other, alpha):
  """1 on the first min(n, n_other) response tokens, alpha on the rest: [B, T]."""
  position = np.cumsum(x.loss_mask, axis=1)
  return np.where(position <= np.minimum(x.n, other.n)[:, None], 1.0, alpha)


def _ld_gap(w, l, alpha):
  def total(x, other):
    ratio = np.where(x.loss_mask, x.log_probs - x.reference_log_probs, 0.0)
    return (ratio * _tail_weights(x, other, alpha)).sum(axis=1)
  return total(w, l) - total(l, w)


logistic_row('ld_dpo', lambda w, l, at, beta, alpha: beta * _ld_gap(w, l, alpha),
             lambda w, l, beta, alpha: (beta * _tail_weights(w, l, alpha).T,
                                        -beta * _tail_weights(l, w, alpha).T))

# Gaps.

logistic_row('dpop',
             lambda w, l, at, beta, penalty_coefficient: beta * (
                 _gap(w, l) - penalty_coefficient * relu(-w.s)),
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
  losses, kappa = _cdpo(beta * z, label_smoothing)
  A = np.empty_like(z)
  A[rows] = beta * kappa
  return losses.mean(), A, -A


def _aot_unpaired(w, l, beta, label_smoothing=0.0):
  z, chosen_rows, rejected_rows = _by_rank(w.s, l.s)
  losses, kappa = _cdpo(beta * z, label_smoothing)
  A_w, A_l = np.empty_like(z), np.empty_like(z)
  A_w[chosen_rows], A_l[rejected_rows] = beta * kappa, -beta * kappa
  return losses.mean(), A_w, A_l


record('aot', lambda w, l, at, **h: _aot(w, l, **h)[0], lambda w, l, **h: _aot(w, l, **h)[1:])
record('aot_unpaired', lambda w, l, at, **h: _aot_unpaired(w, l, **h)[0],
       lambda w, l, **h: _aot_unpaired(w, l, **h)[1:])


def _ema(old, new, decay=0.9):
  return decay * old + (1 - decay) * new


def _betadpo_constants(w, l, noise, mean, std, beta, alpha, drop_fraction):
  gap = _gap(w, l)
  mean, std = _ema(mean, gap.mean()), _ema(std, gap.std(ddof=1))
  keys = -0.5 * ((gap - mean) / std) ** 2 + noise
  count = int(len(gap) * (1 - drop_fraction) + 1e-9)
  kept = np.zeros(len(gap), bool)
  kept[np.argsort(-keys)[:count]] = True
  return kept, max(beta * (1 + alpha * (gap[kept].mean() - mean)), 1e-3)


def _betadpo(w, l, at, **hyper):
  kept, beta = _betadpo_constants(*at, **hyper)
  return -log_sigmoid(beta * _gap(w, l)[kept]).mean()


def _betadpo_slopes(w, l, **hyper):
  kept, beta = _betadpo_constants(w, l, **hyper)
  A = len(kept) / kept.sum() * beta * sigmoid(-beta * _gap(w, l)) * kept
  return A, -A


record('betadpo', _betadpo, _betadpo_slopes)


def _pair_beta(gap, mean, beta, alpha):
  return np.maximum(beta * (1 + alpha * (gap - mean)), 1e-3)


def _betadpo_oxrl_slopes(w, l, mean, beta, alpha):
  gap = _gap(w, l)
  b = _pair_beta(gap, mean, beta, alpha)
  A = sigmoid(-b * gap) * (b + np.where(b > 1e-3, beta * alpha, 0.0) * gap)
  return A, -A


record('betadpo_oxrl', lambda w, l, at, mean, beta, alpha: -log_sigmoid(
    _pair_beta(_gap(w, l), mean, beta, alpha) * _gap(w, l)), _betadpo_oxrl_slopes)


def _alpha_dpo_z(w, l, at, mean, std, beta, margin_per_beta, alpha):
  g = (at[0].m - at[1].m) - (at[0].m0 - at[1].m0)
  mean, std = _ema(mean, g.mean()), _ema(std, g.std(ddof=1))
  return beta * (w.m - l.m - (alpha * (g - mean) / std + margin_per_beta))


logistic_row('alpha_dpo', _alpha_dpo_z, _per_token)


def _wpo_weight(w, l, chosen_sum_squares, rejected_sum_squares):
  def mean(x, squares):
    return np.where(x.loss_mask, x.log_probs - squares, 0.0).sum(axis=1) / x.n
  return np.minimum(1.0, np.exp(mean(w, chosen_sum_squares) + mean(l, rejected_sum_squares)))


record('wpo',
       lambda w, l, at, beta, **squares: -_wpo_weight(*at, **squares) * log_sigmoid(
           beta * _gap(w, l)),
       lambda w, l, beta, **squares: tuple(
           sign * beta * _wpo_weight(w, l, **squares) * sigmoid(-beta * _gap(w, l))
           for sign in (1, -1)))

# Aggregates and anchors.


def _drdpo_slopes(w, l, beta, beta_prime):
  h = beta * _gap(w, l)
  share = sigmoid(h) ** (1 / beta_prime)
  A = len(h) * share / share.sum() * beta * sigmoid(-h)
  return A, -A


record('drdpo', lambda w, l, at, beta, beta_prime: -beta_prime * np.log(
    np.mean(sigmoid(beta * _gap(w, l)) ** (1 / beta_prime))), _drdpo_slopes)
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
           -log_sigmoid(_gap(w, l)) + calibration_coefficient * VALUES['sppo'](w, l, at, beta)),
       lambda w, l, beta, calibration_coefficient: tuple(
           sign * sigmoid(-_gap(w, l)) + calibration_coefficient * A
           for sign, A in zip((1, -1), SLOPES['sppo'](w, l, beta))))


def _bump(x):
  return sigmoid(x) * sigmoid(-x)


record('apo_zero', lambda w, l, at, beta: 1 - sigmoid(beta * w.s) + sigmoid(beta * l.s),
       lambda w, l, beta: (beta * _bump(beta * w.s), -beta * _bump(beta * l.s)))
record('apo_down', lambda w, l, at, beta: sigmoid(beta * w.s) + 1 - sigmoid(beta * _gap(w, l)),
       lambda w, l, beta: (-beta * _bump(beta * w.s) + beta * _bump(beta * _gap(w, l)),
                           -beta * _bump(beta * _gap(w, l))))
record('c2dpo',
       lambda w, l, at, beta, constraint_coefficient: (
           -log_sigmoid(beta * _gap(w, l)) + constraint_coefficient * (w.s + l.s) ** 2),
       lambda w, l, beta, constraint_coefficient: tuple(
           sign * beta * sigmoid(-beta * _gap(w, l)) - 2 * constraint_coefficient * (w.s + l.s)
           for sign in (1, -1)))
record('dpnll',
       lambda w, l, at, beta, nll_coefficient: (
           -log_sigmoid(beta * _gap(w, l)) - nll_coefficient * w.m),
       lambda w, l, beta, nll_coefficient: (
           beta * sigmoid(-beta * _gap(w, l)) + nll_coefficient / w.n,
           -beta * sigmoid(-beta * _gap(w, l))))
record('rpo',
       lambda w, l, at, beta, nll_coefficient: (
           -log_sigmoid(beta * _gap(w, l)) + nll_coefficient * token_nll(w)),
       lambda w, l, beta, nll_coefficient: (
           beta * sigmoid(-beta * _gap(w, l)) + nll_coefficient * len(w.S) / w.n.sum(),
           -beta * sigmoid(-beta * _gap(w, l))))


def _shift(w, l, mean, count, beta):
  rewards = beta * np.concatenate([w.s, l.s])
  return (mean * count + rewards.sum()) / (count + len(rewards))


def _mpo(w, l, at, mean, count, beta, preference_coefficient, quality_coefficient,
         nll_coefficient):
  shift = _shift(*at, mean, count, beta)
  return (-preference_coefficient * log_sigmoid(beta * _gap(w, l)) - quality_coefficient * (
      log_sigmoid(beta * w.s - shift) + log_sigmoid(shift - beta * l.s)) - nll_coefficient * w.m)


def _mpo_slopes(w, l, mean, count, beta, preference_coefficient, quality_coefficient,
                nll_coefficient):
  shift = _shift(w, l, mean, count, beta)
  A = preference_coefficient * beta * sigmoid(-beta * _gap(w, l))
  return (A + quality_coefficient * beta * sigmoid(shift - beta * w.s) + nll_coefficient / w.n,
          -A - quality_coefficient * beta * sigmoid(beta * l.s - shift))


record('mpo', _mpo, _mpo_slopes)


def _tpo(w, l, demonstration_log_probs, demonstration_loss_mask, nll_coefficient, **hyper):
  gold = side(demonstration_log_probs, demonstration_loss_mask)
  return _contrast(w, l, **hyper)[0] + nll_coefficient * token_nll(gold)


record('tpo', lambda w, l, at, **hyper: _tpo(w, l, **hyper),
       lambda w, l, beta, variant='logistic', label_smoothing=0.0, **_: _contrast(
           w, l, beta, variant, label_smoothing)[1:])
record('tpo_l',
       lambda w, l, at, demonstration_log_probs, demonstration_loss_mask, nll_coefficient, **hyper: (
           VALUES['simpo'](w, l, at, **hyper) + nll_coefficient * token_nll(
               side(demonstration_log_probs, demonstration_loss_mask))),
       lambda w, l, beta, margin, **_: SLOPES['simpo'](w, l, beta=beta, margin=margin))


def _corrupted_ratio(w, corrupted_log_probs, corrupted_reference_log_probs):
  return side(corrupted_log_probs, w.loss_mask, corrupted_reference_log_probs).s


def _mdpo(w, l, at, beta, margin, **corrupted):
  return -(log_sigmoid(beta * _gap(w, l)) + log_sigmoid(beta * w.s - margin)
           + (log_sigmoid(beta * (w.s - _corrupted_ratio(w, **corrupted))) if corrupted else 0.0))


def _mdpo_slopes(w, l, beta, margin, **corrupted):
  A = beta * sigmoid(-beta * _gap(w, l))
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
