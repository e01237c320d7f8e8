"""Policy, imitation, distillation and hybrid losses in NumPy float64, one response at a time.

Written from the papers' formulas and not from ptjax. `VALUES[name](l, at, b, **hyper)` is the value
at log-probs `l` [B, T], constants (what the papers stop the gradient of) being taken at `at`: a
finite difference in `l` with `at` held still is the gradient. `b` holds the batch by name.
"""

import numpy as np

VALUES = {}


def record(name):
  def add(function):
    VALUES[name] = function
    return function
  return add


def responses(b):
  """Yields (row number, positions of its tokens), empty rows left out."""
  for i, keep in enumerate(b['loss_mask']):
    if keep.any():
      yield i, np.nonzero(keep)[0]


def tokens(b):
  return int(b['loss_mask'].sum())


def advantage(b, i, t):
  return b['advantages'][i] if b['advantages'].ndim == 1 else b['advantages'][i, t]


# How a table of token objectives [list of (row, array)] becomes one number.

def token_mean(parts, b):
  return sum(x.sum() for _, x in parts) / max(tokens(b), 1)


def sequence_mean(parts, b):
  return sum(x.mean() for _, x in parts) / len(b['loss_mask'])


def sequence_sum(parts, b):
  return sum(x.sum() for _, x in parts) / len(b['loss_mask'])


def by_length(length):
  return lambda parts, b: sum(x.sum() for _, x in parts) / (len(b['loss_mask']) * length)


def each(b, objective):
  """[(row, objective(row, positions))] over responses."""
  return [(i, np.asarray(objective(i, t))) for i, t in responses(b)]


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def surrogate(l, b, low, high, max_ratio=None):
  def objective(i, t):
    rho, A = np.exp(l[i, t] - b['old_log_probs'][i, t]), advantage(b, i, t)
    value = np.minimum(rho * A, np.clip(rho, 1 - low, 1 + high) * A)
    return value if max_ratio is None else np.where(A < 0, np.maximum(value, max_ratio * A), value)
  return each(b, objective)


def k3(l, b):
  def objective(i, t):
    d = b['reference_log_probs'][i, t] - l[i, t]
    return np.exp(d) - d - 1
  return each(b, objective)


# Imitation.

@record('sft')
def sft(l, at, b):
  return -token_mean(each(b, lambda i, t: l[i, t]), b)


@record('dft')
def dft(l, at, b):
  return -token_mean(each(b, lambda i, t: np.exp(at[i, t]) * l[i, t]), b)


@record('rft')
def rft(l, at, b, reward_threshold):
  kept = {**b, 'loss_mask': b['loss_mask'] & (b['rewards'] >= reward_threshold)[:, None]}
  return sft(l, at, kept)


# One ratio per token.

@record('reinforce')
def reinforce(l, at, b):
  return -token_mean(each(b, lambda i, t: advantage(b, i, t) * l[i, t]), b)


def clipped(reduce):
  def value(l, at, b, clip_low, clip_high, kl_coefficient=0.0):
    loss = -reduce(surrogate(l, b, clip_low, clip_high), b)
    return loss + (kl_coefficient * reduce(k3(l, b), b) if kl_coefficient else 0.0)
  return value


VALUES['grpo'] = clipped(sequence_mean)
VALUES['bnpo'] = clipped(token_mean)
VALUES['dapo'] = clipped(token_mean)


@record('dr_grpo')
def dr_grpo(l, at, b, max_completion_tokens, **hyper):
  return clipped(by_length(max_completion_tokens))(l, at, b, **hyper)


@record('sgrpo')
def sgrpo(l, at, b, entropy_coefficient, **hyper):
  entropy = token_mean(each(b, lambda i, t: b['entropy'][i, t]), b)
  return VALUES['bnpo'](l, at, b, **hyper) - entropy_coefficient * entropy


@record('ppo')
def ppo(l, at, b, clip_low, clip_high, value_clip, value_coefficient, entropy_coefficient,
        max_ratio=None):
  def value(i, t):
    v, old, target = b['values'][i, t], b['old_values'][i, t], b['returns'][i, t]
    clipped_v = np.clip(v, old - value_clip, old + value_clip)
    return 0.5 * np.maximum((v - target) ** 2, (clipped_v - target) ** 2)
  entropy = token_mean(each(b, lambda i, t: b['entropy'][i, t]), b)
  return (-token_mean(surrogate(l, b, clip_low, clip_high, max_ratio), b)
          + value_coefficient * token_mean(each(b, value), b) - entropy_coefficient * entropy)


VALUES['ppo_dual_clip'] = ppo


@record('reinforce_pp_baseline')
def reinforce_pp_baseline(l, at, b, clip_low, clip_high, kl_coefficient):
  k2 = each(b, lambda i, t: 0.5 * (l[i, t] - b['reference_log_probs'][i, t]) ** 2)
  return (-token_mean(surrogate(l, b, clip_low, clip_high), b)
          + kl_coefficient * token_mean(k2, b))


@record('cispo')
def cispo(l, at, b, max_ratio):
  def objective(i, t):
    rho = np.exp(at[i, t] - b['old_log_probs'][i, t])
    return np.minimum(rho, max_ratio) * advantage(b, i, t) * l[i, t]
  return -token_mean(each(b, objective), b)


@record('cispo_oxrl')
def cispo_oxrl(l, at, b, clip_low, clip_high):
  def objective(i, t):
    old = b['old_log_probs'][i, t]
    weight = np.clip(np.exp(at[i, t] - old), 1 - clip_low, 1 + clip_high)
    return weight * advantage(b, i, t) * (l[i, t] - old)
  return -token_mean(each(b, objective), b)


@record('sapo')
def sapo(l, at, b, temperature_positive, temperature_negative):
  def objective(i, t):
    A = advantage(b, i, t)
    tau = np.where(A > 0, temperature_positive, temperature_negative)
    rho = np.exp(l[i, t] - b['old_log_probs'][i, t])
    return A * 4 / tau * sigmoid(tau * (rho - 1))
  return -sequence_mean(each(b, objective), b)


def covariance(at, b):
  flat = [(i, t, advantage(b, i, t), at[i, t]) for i, ts in responses(b) for t in ts]
  A = np.array([x[2] for x in flat])
  log_prob = np.array([x[3] for x in flat])
  return {(i, t): c for (i, t, _, _), c in
          zip(flat, (A - A.mean()) * (log_prob - log_prob.mean()))}


@record('clip_cov')
def clip_cov(l, at, b, clip_low, clip_high, covariance_low, covariance_high, fraction):
  """With fraction 1 every candidate is dropped, so that no draw is needed."""
  assert fraction == 1.0
  cov, total = covariance(at, b), 0.0
  for i, parts in surrogate(l, b, clip_low, clip_high):
    for t, value in zip(np.nonzero(b['loss_mask'][i])[0], parts):
      rho, A = np.exp(at[i, t] - b['old_log_probs'][i, t]), advantage(b, i, t)
      free = rho * A <= np.clip(rho, 1 - clip_low, 1 + clip_high) * A
      if not (free and covariance_low < cov[i, t] < covariance_high):
        total += value
  return -total / tokens(b)


@record('kl_cov')
def kl_cov(l, at, b, penalty_coefficient, fraction):
  cov = covariance(at, b)
  top = sorted(cov, key=lambda k: -cov[k])[:max(1, int(fraction * len(cov)))]
  total = 0.0
  for i, t in cov:
    u = l[i, t] - b['old_log_probs'][i, t]
    total += -np.exp(u) * advantage(b, i, t) + penalty_coefficient * abs(u) * ((i, t) in top)
  return total / tokens(b)


# One ratio or residual per sequence.

def log_ratio(l, b, i, t, other='old_log_probs'):
  return l[i, t] - b[other][i, t]


def per_sequence(b, objective):
  return sum(objective(i, t) for i, t in responses(b)) / len(b['loss_mask'])


def clip_min(ratio, A, low, high):
  return np.minimum(ratio * A, np.clip(ratio, 1 - low, 1 + high) * A)


@record('rloo')
def rloo(l, at, b, clip_low, clip_high):
  return -per_sequence(b, lambda i, t: clip_min(
      np.exp(log_ratio(l, b, i, t).sum()), b['advantages'][i], clip_low, clip_high))


@record('gspo')
def gspo(l, at, b, clip_low, clip_high):
  return -per_sequence(b, lambda i, t: clip_min(
      np.exp(log_ratio(l, b, i, t).mean()), b['advantages'][i], clip_low, clip_high))


@record('gspo_token')
def gspo_token(l, at, b, clip_low, clip_high):
  def objective(i, t):
    ratio = np.exp(log_ratio(at, b, i, t).mean()) * np.exp(l[i, t] - at[i, t])
    return clip_min(ratio, advantage(b, i, t), clip_low, clip_high)
  return -sequence_mean(each(b, objective), b)


@record('luspo')
def luspo(l, at, b, clip_low, clip_high):
  return -per_sequence(b, lambda i, t: len(t) * clip_min(
      np.exp(log_ratio(l, b, i, t).mean()), b['advantages'][i], clip_low, clip_high))


@record('vespo')
def vespo(l, at, b, shape_positive, rate_positive, shape_negative, rate_negative):
  def objective(i, t):
    A = b['advantages'][i]
    k, rate = (shape_positive, rate_positive) if A >= 0 else (shape_negative, rate_negative)
    W = np.exp(log_ratio(at, b, i, t).sum())
    return np.exp(rate) * W ** k * np.exp(-rate * W) * A * l[i, t]
  return -token_mean(each(b, objective), b)


@record('gmpo')
def gmpo(l, at, b, log_clip):
  def objective(i, t):
    u, A = log_ratio(l, b, i, t), b['advantages'][i]
    s = np.sign(A)
    return A * np.exp(np.mean(s * np.minimum(s * u, s * np.clip(u, -log_clip, log_clip))))
  return -per_sequence(b, objective)


@record('a_star_po')
def a_star_po(l, at, b, beta):
  return per_sequence(b, lambda i, t: (
      beta * log_ratio(l, b, i, t, 'reference_log_probs').sum() - b['advantages'][i]) ** 2)


@record('rebel')
def rebel(l, at, b, eta):
  total = 0.0
  for p in range(len(b['rewards']) // 2):
    s = [log_ratio(l, b, i, b['loss_mask'][i]).sum() for i in (2 * p, 2 * p + 1)]
    total += ((s[0] - s[1]) / eta - (b['rewards'][2 * p] - b['rewards'][2 * p + 1])) ** 2
  return total / (len(b['rewards']) // 2)


@record('nash_md')
def nash_md(l, at, b, kl_coefficient):
  return per_sequence(b, lambda i, t: (
      kl_coefficient * (log_ratio(at, b, i, t, 'reference_log_probs') * l[i, t]).sum()
      - b['advantages'][i] * l[i, t].sum()))


# Hybrids.

def rows(b, name):
  return {**b, 'loss_mask': b['loss_mask'] & b[name][:, None]}


def shaped(l, b, shaping):
  return each(b, lambda i, t: np.exp(l[i, t]) / (np.exp(l[i, t]) + shaping) * advantage(b, i, t))


def ratio_terms(l, b):
  return each(b, lambda i, t: np.exp(log_ratio(l, b, i, t)) * advantage(b, i, t))


def total(parts):
  return sum(x.sum() for _, x in parts)


@record('hpt')
def hpt(l, at, b, sft_coefficient, shaping, entropy_coefficient, max_completion_tokens):
  count = (~b['demonstration']).sum() * max_completion_tokens
  trained = b['from_rollouts'] | b['imitated'] | b['off_policy']
  entropy = rows({**b, 'trained': trained}, 'trained')
  return (-total(ratio_terms(l, rows(b, 'from_rollouts'))) / count
          - total(shaped(l, rows(b, 'off_policy'), shaping)) / count
          + sft_coefficient * sft(l, at, rows(b, 'imitated'))
          - entropy_coefficient * token_mean(each(entropy, lambda i, t: b['entropy'][i, t]),
                                             entropy))


@record('luffy')
def luffy(l, at, b, shaping, entropy_coefficient, max_completion_tokens):
  on = rows({**b, 'on': ~b['demonstration']}, 'on')
  return (-(total(ratio_terms(l, on)) + total(shaped(l, rows(b, 'demonstration'), shaping)))
          / max_completion_tokens
          - entropy_coefficient * token_mean(each(b, lambda i, t: b['entropy'][i, t]), b))


@record('srft')
def srft(l, at, b, sft_coefficient, positive_coefficient, shaping, success_threshold,
         max_completion_tokens):
  H = lambda i, t: b['entropy'][i, t].mean()
  on = rows({**b, 'on': ~b['demonstration']}, 'on')
  demonstrations = rows(b, 'demonstration')
  nll = token_mean(each(demonstrations, lambda i, t: -np.exp(-H(i, t)) * l[i, t]), demonstrations)
  rollout = each(on, lambda i, t: l[i, t] * (
      positive_coefficient * np.exp(H(i, t)) if b['rewards'][i] >= success_threshold else -1.0))
  return (sft_coefficient * nll - total(rollout) / max_completion_tokens
          - total(shaped(l, demonstrations, shaping)) / max_completion_tokens)
