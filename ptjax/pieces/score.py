"""What a response is worth: one side of a pair in, [B] scores out.

A side is a `types.SideLogProbs`, or anything with its fields: `log_probs` [B, T] nats, `loss_mask`
[B, T] bool, and `reference_log_probs` [B, T] nats for the scores that compare with the frozen
reference (None elsewhere). Padding may hold anything. Scores are float32 or wider.
"""

import chex
import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import masking

# Exponents of log-ratios stop here: e^80 is still a float32, with room for a coefficient.
MAX_EXPONENT = 80.0
MAX_MEAN_LOG_PROB = -1e-6  # log(1 - p) needs p < 1


def log_prob(side):
  """Log-prob of the response, [B] nats: S = sum_t log π."""
  return masking.clean(side.loss_mask, log_probs=side.log_probs).sum(axis=1)


def mean_log_prob(side):
  """Log-prob per token, [B] nats: m = S / n. An empty response scores 0."""
  return _per_token(log_prob(side), side)


def log_ratio(side):
  """Log-ratio to the reference, [B] nats: s = sum_t (log π - log π₀)."""
  log_probs = masking.clean(side.loss_mask, log_probs=side.log_probs)
  return (log_probs - _reference(side)).sum(axis=1)  # differences first: the sums are large


def reference_log_prob(side):
  """Log-prob of the response under the reference, [B] nats: S⁰; a constant."""
  return _reference(side).sum(axis=1)


def _reference(side):
  """The reference's log-probs, [B, T], cleaned and without gradient."""
  reference = masking.required(
      side.reference_log_probs, 'reference_log_probs',
      'a loss that compares the policy with the frozen reference')
  return jax.lax.stop_gradient(
      masking.clean(side.loss_mask, reference_log_probs=reference))


def mean_log_ratio(side):
  """Log-ratio to the reference per token, [B] nats: s / n."""
  return _per_token(log_ratio(side), side)


def _per_token(total, side):
  return total / masking.lengths(side.loss_mask, total.dtype)


def of_pair(score, pair):
  """Returns `(score(pair.chosen), score(pair.rejected))`, [B] each."""
  scores = score(pair.chosen), score(pair.rejected)
  chex.assert_equal_shape(
      scores, exception_type=ValueError,
      custom_message='pair.chosen and pair.rejected must hold the same number of responses')
  return scores


def log_odds(mean):
  """log(p / (1 - p)) of the mean token probability p = exp(mean), [B] (ORPO).

  p is kept below 1 - 1e-6, past which the odds stop growing.
  """
  mean = jnp.where(mean <= MAX_MEAN_LOG_PROB, mean, MAX_MEAN_LOG_PROB)
  return mean - _log1mexp(mean)


def _log1mexp(x):
  """log(1 - exp(x)) for x < 0 without cancellation; both branches are finite everywhere."""
  return jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def box_cox(mean, alpha):
  """(1 - p^-α) / α of p = exp(mean), [B]; α = 0 is the limit, `mean` itself (AlphaPO)."""
  if alpha == 0:
    return mean
  return -jnp.expm1(_capped(-alpha * mean, 50.0)) / alpha


def capped_ratio(log_ratios):
  """exp(log_ratios), [B], flat and without gradient past e^20 (χPO)."""
  return jnp.exp(_capped(log_ratios, 20.0))


DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')


def divergence_slope(log_ratios, variant, alpha):
  """f'(u) of an f-divergence at u = exp(log_ratios), [B], up to a constant (f-DPO).

  Args:
    log_ratios: [B] nats.
    variant: one of DIVERGENCES.
    alpha: of the α-divergence alone, in (0, 1).
  """
  bounds.choice(DIVERGENCES, variant=variant)
  if variant == 'reverse_kl':
    return log_ratios
  if variant == 'forward_kl':
    return -jnp.exp(_capped(-log_ratios, MAX_EXPONENT))
  if variant == 'js':
    return jax.nn.log_sigmoid(log_ratios)
  bounds.within(None, 1, alpha=alpha)
  return -jnp.expm1(_capped(-alpha * log_ratios, MAX_EXPONENT)) / alpha


def _capped(x, cap):
  """min(x, cap), by comparison: the gradient is 1 up to the cap and 0 past it."""
  return jnp.where(x <= cap, x, cap)


def shared_prefix(pair):
  """Cuts both masks to their first min(n_chosen, n_rejected) tokens (LD-DPO)."""
  return _shared_length(
      pair, lambda mask, count: mask & (jnp.cumsum(mask, axis=1) <= count[:, None]))


def shared_sample(key, pair):
  """Keeps min(n_chosen, n_rejected) tokens of each response, drawn uniformly (SamPO).

  The shorter response keeps all it has, whatever is drawn, so one key serves both.
  """
  return _shared_length(pair, lambda mask, count: _draw(key, mask, count))


def _shared_length(pair, cut):
  """Cuts both masks with `cut(mask [B, T], count [B]) -> mask` to the shorter one's count."""
  of_pair(log_prob, pair)  # its checks come before the masks are counted
  count = jnp.minimum(pair.chosen.loss_mask.sum(axis=1), pair.rejected.loss_mask.sum(axis=1))
  return pair.replace(**{name: side.replace(loss_mask=cut(side.loss_mask, count))
                         for name, side in (('chosen', pair.chosen), ('rejected', pair.rejected))})


def _draw(key, mask, count):
  """Keeps `count` [B] of the True places of each row of `mask`, every subset equally likely.

  Selection sampling: token by token, keep with probability (still wanted) / (still to come), which
  meets the count exactly. A sort would take fifty times as long on a CPU.
  """
  to_come = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # [B, T], this token included
  uniform = jax.random.uniform(key, mask.shape, jnp.float32)
  def step(wanted, token):
    present, threshold = token
    keep = present & (threshold < wanted.astype(jnp.float32))
    return wanted - keep.astype(wanted.dtype), keep
  _, kept = jax.lax.scan(step, count, (mask.T, (uniform * to_come.astype(jnp.float32)).T))
  return kept.T


def pair_metrics(pair, chosen_rewards, rejected_rewards):
  """The metrics of every pair loss, under TRL's names; float scalars without gradient.

  Args:
    pair: types.PairLogProbs.
    chosen_rewards, rejected_rewards: [B]; beta times the log-ratio to the reference, or, in losses
      that have none, beta times the score.
  Returns:
    rewards/{chosen,rejected,margins,accuracies} and logps/{chosen,rejected}; the latter are means
    over responses of the summed log-probs, in nats.
  """
  return jax.lax.stop_gradient({
      **reward_metrics(chosen_rewards, rejected_rewards),
      'logps/chosen': log_prob(pair.chosen).mean(),
      'logps/rejected': log_prob(pair.rejected).mean(),
  })


def reward_metrics(chosen_rewards, rejected_rewards):
  """rewards/{chosen,rejected,margins,accuracies} of [B] rewards; accuracies is a fraction."""
  return jax.lax.stop_gradient({
      'rewards/chosen': chosen_rewards.mean(),
      'rewards/rejected': rejected_rewards.mean(),
      'rewards/margins': (chosen_rewards - rejected_rewards).mean(),
      'rewards/accuracies': (chosen_rewards > rejected_rewards).mean(dtype=chosen_rewards.dtype),
  })
