"""Distillation in NumPy float64, token by token; it adds to policy_gradient_reference."""

import numpy as np

import policy_gradient_reference as of


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(log_p, log_q):
  return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def jensen_shannon(student, teacher, mix):
  if mix == 0:
    return kl(teacher, student)
  if mix == 1:
    return kl(student, teacher)
  mixture = np.log(mix * np.exp(teacher) + (1 - mix) * np.exp(student))
  return mix * kl(teacher, mixture) + (1 - mix) * kl(student, mixture)


@of.record('kd')
def kd(l, at, b, nll_coefficient, temperature):
  divergence = of.token_mean(of.each(b, lambda i, t: kl(
      log_softmax(b['teacher_logits'][i, t] / temperature),
      log_softmax(b['logits'][i, t] / temperature))), b)
  nll = of.VALUES['sft'](l, at, b)
  return nll_coefficient * nll + (1 - nll_coefficient) * temperature ** 2 * divergence


@of.record('gkd')
def gkd(l, at, b, interpolation, temperature):
  return of.token_mean(of.each(b, lambda i, t: jensen_shannon(
      log_softmax(b['logits'][i, t] / temperature),
      log_softmax(b['teacher_logits'][i, t] / temperature), interpolation)), b)


@of.record('opd')
def opd(l, at, b, gamma=0.0):
  def objective(i, t):
    A = b['teacher_log_probs'][i, t] - b['old_log_probs'][i, t]
    before = np.concatenate([[0.0], np.cumsum(np.abs(A))[:-1]])
    weight = 1 + gamma * (1 - before / np.abs(A).sum())
    return np.exp(l[i, t] - b['old_log_probs'][i, t]) * A * (weight if gamma else 1.0)
  return -of.token_mean(of.each(b, objective), b)


of.VALUES['iw_opd'] = opd


@of.record('minillm')
def minillm(l, at, b, discount, clip_low, clip_high):
  b = {**b, 'advantages': future_log_ratios(b, discount)}
  return gkd(l, at, b, 1, 1.0) + of.VALUES['bnpo'](l, at, b, clip_low, clip_high)


def future_log_ratios(b, discount):
  """[B, T]; for each token the discounted mean of the teacher's log-ratio over the tokens after."""
  A = np.zeros(b['loss_mask'].shape)
  for i, ts in of.responses(b):
    r = b['teacher_log_probs'][i, ts] - b['old_log_probs'][i, ts]
    for k, t in enumerate(ts[:-1]):
      weights = discount ** np.arange(len(r) - k - 1)
      A[i, t] = (weights * r[k + 1:]).sum() / weights.sum()
  return A


@of.record('sdft')
def sdft(l, at, b, interpolation, top_k, max_ratio):
  def objective(i, ts):
    out = []
    for t in ts:
      student, teacher = (log_softmax(b[k][i, t]) for k in ('logits', 'teacher_logits'))
      top = np.argsort(-student, kind='stable')[:top_k]
      with_rest = lambda x: np.append(x[top], np.log(1 - np.exp(x[top]).sum()))
      ratio = min(np.exp(at[i, t] - b['old_log_probs'][i, t]), max_ratio)
      out.append(ratio * jensen_shannon(with_rest(student), with_rest(teacher), interpolation))
    return out
  return of.sequence_mean(of.each(b, objective), b)


@of.record('sdpo')
def sdpo(l, at, b, distillation_weight, clip_low, clip_high, **hyper):
  return ((1 - distillation_weight) * of.VALUES['grpo'](l, at, b, clip_low, clip_high)
          + distillation_weight * sdft(l, at, b, **hyper))
