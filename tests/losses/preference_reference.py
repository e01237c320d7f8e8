"""Preference losses in NumPy float64, written from the papers' formulas and not from ptjax.

Here the links and scores; `preference_reference_batch` adds the gaps, aggregates and anchors.

`VALUES[name](w, l, at, **hyper)` gives the losses of the pairs, or a scalar where the loss is one
of the whole batch; `SLOPES[name](w, l, **hyper)` gives (A_w, A_l), minus the derivative of each
pair's loss in the summed log-probs, derived by hand. `at` is (w, l) at the point where constants
(what ptjax stops the gradient of) are taken; a finite difference in w and l with `at` held still is
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


def cdpo(h, label_smoothing=0.0):
  e = label_smoothing
  return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h), (1 - e) - sigmoid(h)


def _robust(h, label_smoothing):
  e = label_smoothing
  return (-((1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)) / (1 - 2 * e),
          ((1 - e) * sigmoid(-h) + e * sigmoid(h)) / (1 - 2 * e))


LINKS = {
    'dpo': cdpo, 'cdpo': cdpo, 'robust_dpo': _robust, 'exo': _exo, 'discopop': _discopop,
    'gpo': _gpo,
    'robust_dpo_oxrl': lambda h, label_smoothing: tuple(
        x / (1 - 2 * label_smoothing) for x in cdpo(h, label_smoothing)),
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


def gap(w, l):
  return w.s - l.s


def _focal_weight(at, beta, exponent):
  return sigmoid(beta * gap(*at)) ** exponent


record('focalpo_oxrl',
       lambda w, l, at, beta, exponent: -_focal_weight(at, beta, exponent) * log_sigmoid(
           beta * gap(w, l)),
       lambda w, l, beta, exponent: tuple(
           sign * beta * _focal_weight((w, l), beta, exponent) * sigmoid(-beta * gap(w, l))
           for sign in (1, -1)))


def _odpo_z(w, l, at, beta, alpha, chosen_scores, rejected_scores):
  return beta * gap(w, l) - alpha * np.log(np.maximum(chosen_scores - rejected_scores, 1e-6))


logistic_row('odpo', _odpo_z, lambda w, l, beta, **_: (beta, -beta))

# Scores.


def _target_row(name, gap, scale):
  record(name, lambda w, l, at, beta: (gap(w, l) - 1 / (2 * beta)) ** 2,
         lambda w, l, beta: (-2 * (gap(w, l) - 1 / (2 * beta)) / scale(w),
                             2 * (gap(w, l) - 1 / (2 * beta)) / scale(l)))


_target_row('ipo', lambda w, l: w.sbar - l.sbar, lambda x: x.n)
_target_row('ipo_oxrl', gap, lambda x: 1.0)
logistic_row('sigmoid_norm', lambda w, l, at, beta: beta * (w.sbar - l.sbar),
             lambda w, l, beta: (beta / w.n, -beta / l.n))


def per_token(w, l, beta, **_):
  return beta / w.n, -beta / l.n


logistic_row('simpo', lambda w, l, at, beta, margin: beta * (w.m - l.m) - margin, per_token)
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


def contrast(w, l, beta, variant, label_smoothing):
  """(losses, A_w, A_l) of CPO's and TPO's preference term."""
  if variant == 'ipo':
    error = w.m - l.m - 1 / (2 * beta)
    return error ** 2, -2 * error / w.n, 2 * error / l.n
  losses, kappa = (LINKS['hinge'](beta * (w.S - l.S)) if variant == 'hinge'
                   else cdpo(beta * (w.S - l.S), label_smoothing))
  return losses, beta * kappa, -beta * kappa


def _cpo(w, l, beta, nll_coefficient=1.0, label_smoothing=0.0, variant='logistic'):
  losses, A_w, A_l = contrast(w, l, beta, variant, label_smoothing)
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


record('orpo', lambda w, l, at, beta: _orpo(w, l, beta)[0],
       lambda w, l, beta: _orpo(w, l, beta)[1:])
record('slic_hf',
       lambda w, l, at, margin, nll_coefficient: (
           relu(margin - w.S + l.S) - nll_coefficient * w.S),
       lambda w, l, margin, nll_coefficient: (
           (w.S - l.S < margin) + nll_coefficient, -1.0 * (w.S - l.S < margin)))
logistic_row('rdpo', lambda w, l, at, beta, alpha: beta * gap(w, l) + alpha * (w.n - l.n),
             lambda w, l, beta, alpha: (beta, -beta))
logistic_row('rdpo_oxrl', lambda w, l, at, beta, alpha: beta * gap(w, l) - alpha * (w.n - l.n),
             lambda w, l, beta, alpha: (beta, -beta))
logistic_row('hdpo',
             lambda w, l, at, beta, alpha: alpha * beta * (w.S - l.S) - beta * (w.S0 - l.S0),
             lambda w, l, beta, alpha: (alpha * beta, -alpha * beta))
logistic_row('dposhift',
             lambda w, l, at, beta, rejected_coefficient: (
                 beta * w.s - rejected_coefficient * beta * l.s),
             lambda w, l, beta, rejected_coefficient: (beta, -rejected_coefficient * beta))


def _f_slope(s, variant, alpha=None):
  """f'(e^s) and u f''(u) at u = e^s."""
  u = np.exp(s)
  return {'reverse_kl': lambda: (np.log(u), np.ones_like(u)), 'forward_kl': lambda: (-1 / u, 1 / u),
          'js': lambda: (np.log(2 * u / (1 + u)), 1 / (1 + u)),
          'alpha': lambda: ((1 - u ** -alpha) / alpha, u ** -alpha)}[variant]()


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


def tail_weights(x, other, alpha):
  """1 on the first min(n, n_other) response tokens, alpha on the rest: [B, T]."""
  position = np.cumsum(x.loss_mask, axis=1)
  return np.where(position <= np.minimum(x.n, other.n)[:, None], 1.0, alpha)


def _ld_gap(w, l, alpha):
  def total(x, other):
    ratio = np.where(x.loss_mask, x.log_probs - x.reference_log_probs, 0.0)
    return (ratio * tail_weights(x, other, alpha)).sum(axis=1)
  return total(w, l) - total(l, w)


logistic_row('ld_dpo', lambda w, l, at, beta, alpha: beta * _ld_gap(w, l, alpha),
             lambda w, l, beta, alpha: (beta * tail_weights(w, l, alpha).T,
                                        -beta * tail_weights(l, w, alpha).T))
