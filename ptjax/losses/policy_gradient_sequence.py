"""Policy gradients with one ratio per sequence, the same for all its tokens.

The arguments mean what they mean in `policy_gradient`; advantages are [B] unless said otherwise.
"""

import chex

from ptjax.losses import policy_gradient
from ptjax.pieces import advantage
from ptjax.pieces import denominator
from ptjax.pieces import masking
from ptjax.pieces import reduction


def _clean(log_probs, old_log_probs, advantages, loss_mask):
  chex.assert_shape(advantages, loss_mask.shape[:1],
                    custom_message='a sequence ratio takes one advantage per sequence, [B]')
  log_probs, old_log_probs = masking.clean(
      loss_mask, log_probs=log_probs, old_log_probs=old_log_probs)
  return log_probs, old_log_probs, advantage.per_token(advantages, loss_mask, log_probs.dtype)


def rloo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=0.2, clip_high=0.2):
  """REINFORCE leave-one-out: the clipped ratio of the whole sequence, summed over its tokens.

  On the first update the ratio is 1 and this is the paper's REINFORCE; the clip serves further
  ones. Source: arXiv:2402.14740; TRL's RLOOTrainer for the clip.
  """
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence(log_probs, old_log_probs, loss_mask), advantages, loss_mask,
      clip_low=clip_low, clip_high=clip_high, reduce=reduction.sequence_sum,
      value_scale=1.0 / masking.lengths(loss_mask, log_probs.dtype)[:, None])


def gspo_loss(log_probs, *, old_log_probs, advantages, loss_mask, clip_low=3e-4, clip_high=4e-4):
  """Group Sequence Policy Optimization: the clipped geometric mean of the token ratios.

  The clip range is small because the mean of many log-ratios is. Source: arXiv:2507.18071, eq. 5.
  """
  log_probs, old_log_probs, advantages = _clean(log_probs, old_log_probs, advantages, loss_mask)
  return policy_gradient.clipped_ratio_loss(
      log_probs, denominator.sequence_mean(log_probs, old_log_probs, loss_mask), advantages,
      loss_mask, clip_low=clip_low, clip_high=clip_high, reduce=reduction.sequence_mean)
