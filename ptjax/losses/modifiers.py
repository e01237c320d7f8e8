"""Modifiers: `modifier(loss) -> loss`, for any loss that takes advantages and a mask.

A modifier changes what goes in (advantages, mask) or adds a term, so it composes with every policy
loss and with other modifiers: `grpo+tis+top_entropy`. The result is a plain loss whose signature
holds the arguments of both. Scaling an advantage by a constant w >= 0 scales its token's term, as
all policy losses here are homogeneous in the advantage.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.losses import terms
from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import stabilization


def _with_signature(modified, loss):
  """Gives `modified(log_probs, *, own..., **inputs)` the arguments of `loss` and its own."""
  own = inspect.signature(modified).parameters
  base = inspect.signature(loss).parameters
  merged = {**base, **{k: p for k, p in own.items() if p.kind is not p.VAR_KEYWORD}}
  ordered = sorted(merged.values(), key=lambda p: (p.kind, p.default is not p.empty))
  def wrapper(log_probs, **inputs):
    return modified(log_probs, **inputs)
  wrapper.__signature__ = inspect.Signature(ordered)
  wrapper.__name__ = f'{loss.__name__}+{modified.__qualname__.split(".")[0]}'
  wrapper.__doc__ = loss.__doc__
  return wrapper


def _call(loss, log_probs, inputs):
  """Calls `loss` with those of `inputs` it names."""
  names = inspect.signature(loss).parameters
  return loss(log_probs, **{k: v for k, v in inputs.items() if k in names})


def _scaled(advantages, weights, loss_mask):
  """advantages · weights; stays [B] if both are, so that sequence losses accept it."""
  if advantages.ndim == 1 and weights.ndim == 1:
    return advantages * weights
  spread = lambda x: advantage.per_token(x, loss_mask, advantages.dtype)
  return spread(advantages) * spread(weights)


def _rollout_ratio(old_log_probs, rollout_log_probs, loss_mask, level):
  """π_old / π_rollout of each token [B, T], or of each sequence [B]; a constant."""
  if level not in ('token', 'sequence'):
    raise ValueError(f'level={level!r}: expected token or sequence')
  old, rollout = masking.clean(
      loss_mask, old_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs)
  if level == 'token':
    return jax.lax.stop_gradient(denominator.old(old, rollout))
  return jax.lax.stop_gradient(denominator.sequence(old, rollout, loss_mask)[:, 0])


def tis(loss):
  """Truncated importance sampling: the sampler's own log-probs join the denominator.

  Each term is multiplied by min(π_old / π_rollout, max_rollout_ratio), per token or per sequence.
  Source: Yao et al., *Your efficient RL framework secretly brings you off-policy RL training*,
  2025; the cap of 2 is Tunix's.
  """
  def modified(log_probs, *, old_log_probs, rollout_log_probs, advantages, loss_mask,
               max_rollout_ratio=2.0, level='token', **inputs):
    bounds.positive(max_rollout_ratio=max_rollout_ratio)
    ratio = _rollout_ratio(old_log_probs, rollout_log_probs, loss_mask, level)
    weights = denominator.truncated(ratio, max_ratio=max_rollout_ratio)
    return _call(loss, log_probs, dict(
        inputs, old_log_probs=old_log_probs, loss_mask=loss_mask,
        advantages=_scaled(advantages, weights, loss_mask)))
  return _with_signature(modified, loss)


def mis(loss):
  """Masked importance sampling (IcePop): as `tis`, but weight 0 outside the two bounds.

  Source: arXiv:2510.18855.
  """
  def modified(log_probs, *, old_log_probs, rollout_log_probs, advantages, loss_mask,
               min_rollout_ratio=0.5, max_rollout_ratio=5.0, level='token', **inputs):
    masking.non_negative(min_rollout_ratio=min_rollout_ratio, max_rollout_ratio=max_rollout_ratio)
    ratio = _rollout_ratio(old_log_probs, rollout_log_probs, loss_mask, level)
    inside = (ratio >= min_rollout_ratio) & (ratio <= max_rollout_ratio)
    return _call(loss, log_probs, dict(
        inputs, old_log_probs=old_log_probs, loss_mask=loss_mask,
        advantages=_scaled(advantages, jnp.where(inside, ratio, 0.0), loss_mask)))
  return _with_signature(modified, loss)


def opsm(loss):
  """Off-policy sequence mask: discouraged sequences that drifted from the sampler are dropped.

  `drift_threshold` is in nats per token. Source: DeepSeek-V3.2, arXiv:2512.02556.
  """
  def modified(log_probs, *, rollout_log_probs, advantages, loss_mask, drift_threshold=0.1,
               **inputs):
    masking.non_negative(drift_threshold=drift_threshold)
    clean_log_probs, rollout = masking.clean(
        loss_mask, log_probs=log_probs, rollout_log_probs=rollout_log_probs)
    keep = stabilization.off_policy_mask(
        jax.lax.stop_gradient(clean_log_probs), rollout,
        advantage.per_token(advantages, loss_mask, clean_log_probs.dtype), loss_mask,
        threshold=drift_threshold)
    keep = keep[:, 0] if advantages.ndim == 1 else keep
    return _call(loss, log_probs, dict(
        inputs, rollout_log_probs=rollout_log_probs, loss_mask=loss_mask,
        advantages=jnp.where(keep, advantages, 0.0)))
  return _with_signature(modified, loss)


def top_entropy(loss):
  """Only the `entropy_fraction` of the batch's tokens with the highest entropy push.

  The normalizer still counts all tokens. Source: arXiv:2506.01939; TRL's `top_entropy_quantile`.
  """
  def modified(log_probs, *, entropy, advantages, loss_mask, entropy_fraction=0.2, **inputs):
    bounds.fraction(entropy_fraction=entropy_fraction)
    keep = stabilization.top_entropy_mask(
        masking.clean(loss_mask, entropy=entropy), loss_mask, fraction=entropy_fraction)
    spread = advantage.per_token(advantages, loss_mask, advantages.dtype)
    return _call(loss, log_probs, dict(
        inputs, entropy=entropy, loss_mask=loss_mask, advantages=jnp.where(keep, spread, 0.0)))
  return _with_signature(modified, loss)


def mask_truncated(loss):
  """Completions that hit the length limit without an end leave the mask. Source: DAPO."""
  def modified(log_probs, *, truncated, loss_mask, **inputs):
    log_probs = masking.clean(loss_mask, log_probs=log_probs)
    bounds.boolean(loss_mask.shape[:1], truncated=truncated)
    return _call(loss, log_probs, dict(inputs, loss_mask=loss_mask & ~truncated[:, None]))
  return _with_signature(modified, loss)


def entropy_bonus(loss):
  """Adds -entropy_coefficient · mean entropy per token."""
  def modified(log_probs, *, entropy, loss_mask, entropy_coefficient=1e-3, **inputs):
    value, metrics = _call(loss, log_probs, dict(inputs, entropy=entropy, loss_mask=loss_mask))
    bonus, _ = terms.entropy_bonus(entropy, loss_mask, entropy_coefficient=entropy_coefficient)
    return value + bonus, metrics
  return _with_signature(modified, loss)


def adaptive_entropy(loss):
  """Entropy bonus whose coefficient rises below a target entropy and falls above it.

  The term acts only below the target. State: the coefficient; see `running` for the convention.
  Source: Skywork-OR1, arXiv:2505.22312; TRL's defaults.
  """
  def modified(log_probs, *, entropy, loss_mask, loss_state=np.float32(0.0), entropy_target=0.2,
               coefficient_step=0.005, min_coefficient=0.0, max_coefficient=1.0, **inputs):
    masking.non_negative(entropy_target=entropy_target, coefficient_step=coefficient_step,
                         min_coefficient=min_coefficient, max_coefficient=max_coefficient)
    value, metrics = _call(loss, log_probs, dict(inputs, entropy=entropy, loss_mask=loss_mask))
    mean = reduction.token_mean(entropy, loss_mask)
    low = mean <= entropy_target
    coefficient = jax.lax.stop_gradient(jnp.asarray(loss_state, mean.dtype))
    state = jnp.clip(coefficient + jnp.where(low, coefficient_step, -coefficient_step),
                     min_coefficient, max_coefficient)
    value = value - jnp.where(low, coefficient, 0.0) * mean
    return value, {**metrics, 'entropy_coefficient': coefficient}, state
  return _with_signature(modified, loss)


def corrected_kl(loss):
  """Adds kl_coefficient · ρ k3, the KL to the reference corrected for old-policy tokens.

  Per sequence, like GRPO's own. Source: DeepSeek-V3.2, arXiv:2512.02556.
  """
  def modified(log_probs, *, old_log_probs, reference_log_probs, loss_mask, kl_coefficient=0.04,
               **inputs):
    value, metrics = _call(
        loss, log_probs, dict(inputs, old_log_probs=old_log_probs, loss_mask=loss_mask))
    penalty, kl_metrics = terms.corrected_kl_penalty(
        log_probs, old_log_probs, reference_log_probs, loss_mask, kl_coefficient=kl_coefficient,
        reduce=reduction.sequence_mean)
    return value + penalty, {**metrics, **kl_metrics}
  return _with_signature(modified, loss)


def kl(loss):
  """Adds kl_coefficient · KL to the reference, estimated by k1, k2 or k3; per sequence.

  It takes the place of the loss's own term, if that has one. Source of the estimators: Schulman,
  *Approximating KL divergence*, 2020.
  """
  def modified(log_probs, *, reference_log_probs, loss_mask, kl_coefficient=0.04,
               kl_estimator='k3', **inputs):
    value, metrics = _call(
        loss, log_probs, dict(inputs, loss_mask=loss_mask, kl_coefficient=0.0))
    penalty, kl_metrics = terms.kl_penalty(
        log_probs, reference_log_probs, loss_mask, kl_coefficient=kl_coefficient,
        reduce=reduction.sequence_mean, estimator=kl_estimator)
    return value + penalty, {**metrics, **kl_metrics}
  return _with_signature(modified, loss)


def _controlled(scale, log_probs, reference_log_probs, loss_mask, kl_target, kl_horizon):
  """Ziegler's controller: the scale of a KL coefficient, the next one, and the KL seen; [] each.

  scale · (1 + clip(KL / kl_target - 1, -.2, .2) · B / kl_horizon), KL being the mean over sequences
  of Σ_t k1, nats. Source: arXiv:1909.08593, section 2.2, with K_β = B / kl_horizon as in its code.
  """
  bounds.positive(kl_target=kl_target, kl_horizon=kl_horizon)
  log_probs, reference_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
  gap = jax.lax.stop_gradient(log_probs - reference_log_probs)
  scale = jnp.asarray(scale, gap.dtype)
  count = jnp.maximum(loss_mask.any(axis=1).sum(), 1).astype(gap.dtype)
  seen = gap.sum() / count
  error = jnp.clip(seen / kl_target - 1.0, -0.2, 0.2)
  return scale, scale * (1.0 + error * count / kl_horizon), seen


def adaptive_kl(loss):
  """As `kl`, with a coefficient that a controller moves towards a target KL.

  `kl_coefficient` is the first; `kl_target` is in nats per sequence, `kl_horizon` in sequences.
  State: the factor on the coefficient; see `running` for the convention. Source: arXiv:1909.08593;
  the defaults are TRL's.
  """
  def modified(log_probs, *, reference_log_probs, loss_mask,
               loss_state={'kl_scale': np.float32(1.0)}, kl_coefficient=0.2, kl_estimator='k3',
               kl_target=6.0, kl_horizon=10000, **inputs):
    masking.non_negative(kl_coefficient=kl_coefficient)
    value, metrics = _call(
        loss, log_probs, dict(inputs, loss_mask=loss_mask, kl_coefficient=0.0))
    scale, following, seen = _controlled(
        loss_state['kl_scale'], log_probs, reference_log_probs, loss_mask, kl_target, kl_horizon)
    coefficient = scale * kl_coefficient
    penalty, kl_metrics = terms.kl_penalty(
        log_probs, reference_log_probs, loss_mask, kl_coefficient=coefficient,
        reduce=reduction.sequence_mean, estimator=kl_estimator)
    return value + penalty, {**metrics, **kl_metrics, 'kl_coefficient': coefficient,
                             'kl_per_sequence': seen}, {'kl_scale': following}
  return _with_signature(modified, loss)


def adaptive_reward_kl(loss):
  """A controller of the KL in the reward: that of `adaptive_kl`, for the advantage's coefficient.

  The loss stays as it is. State: the factor on `reward_kl_coefficient`, which the next rollouts'
  rewards take. Source: arXiv:1909.08593.
  """
  def modified(log_probs, *, reference_log_probs, loss_mask,
               loss_state={'reward_kl_scale': np.float32(1.0)}, kl_target=6.0, kl_horizon=10000,
               **inputs):
    value, metrics = _call(loss, log_probs, dict(
        inputs, loss_mask=loss_mask, reference_log_probs=reference_log_probs))
    scale, following, seen = _controlled(
        loss_state['reward_kl_scale'], log_probs, reference_log_probs, loss_mask, kl_target,
        kl_horizon)
    return value, {**metrics, 'reward_kl_scale': scale, 'kl_per_sequence': seen}, {
        'reward_kl_scale': following}
  return _with_signature(modified, loss)


MODIFIERS = {f.__name__: f for f in (
    tis, mis, opsm, top_entropy, mask_truncated, entropy_bonus, adaptive_entropy, corrected_kl, kl,
    adaptive_kl, adaptive_reward_kl)}
