"""Learning from text that is simply right: supervised fine-tuning and its kin."""

from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction


def sft_loss(log_probs, *, loss_mask):
  """Supervised fine-tuning: mean negative log-likelihood per token.

  The unified estimator with advantage 1 over the current policy; the value is the NLL in nats per
  token. Continued pre-training, rejection-sampling fine-tuning and sequence-level distillation are
  this loss on other data.

  Args:
    log_probs: [B, T] float32, nats; log π_θ of each target token. Carries the gradient.
    loss_mask: [B, T] bool; True where the target belongs to the response.
  Returns:
    Scalar loss and metrics.
  Source: InstructGPT, arXiv:2203.02155, stage 1.
  """
  return likelihood.weighted_loss(log_probs, loss_mask, advantages=1.0, reduce=reduction.token_mean)


def dft_loss(log_probs, *, loss_mask):
  """Dynamic fine-tuning: SFT whose denominator is 1, so a token weighs its own probability.

  Args:
    log_probs: [B, T] float32, nats; log π_θ of each target token. Carries the gradient.
    loss_mask: [B, T] bool; True where the target belongs to the response.
  Returns:
    Scalar loss and metrics.
  Source: arXiv:2508.05629, eq. 9.
  """
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=1.0, ratio=denominator.unit(log_probs),
      reduce=reduction.token_mean)


def rft_loss(log_probs, *, rewards, loss_mask, reward_threshold=0.5):
  """Rejection-sampling fine-tuning: SFT on the completions that were good enough.

  Args:
    log_probs: [B, T] float32, nats; log π_θ of each token of the policy's own samples.
    rewards: [B] float32; NaN, a reward function's "no opinion", is rejected.
    loss_mask: [B, T] bool.
    reward_threshold: the least reward that is accepted.
  Returns:
    Scalar loss and metrics: 0 when nothing was accepted.
  Source: arXiv:2308.01825; cf. RAFT 2304.06767, STaR 2203.14465.
  """
  log_probs = masking.clean(loss_mask, log_probs=log_probs)
  rewards = bounds.per_row(loss_mask.shape[:1], log_probs.dtype, rewards=rewards)
  accepted = rewards >= reward_threshold  # [B]
  loss, metrics = sft_loss(log_probs, loss_mask=loss_mask & accepted[:, None])
  return loss, {**metrics, 'accepted_fraction': accepted.mean(dtype=loss.dtype)}
