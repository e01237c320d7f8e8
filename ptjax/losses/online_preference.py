"""Preference learning on the policy's own samples: how pairs are made, and XPO.

Online DPO (arXiv:2402.04792) is `preference_link.dpo_loss` on the pairs of `best_and_worst`.
"""

import jax
import jax.numpy as jnp

from ptjax.losses import preference_link
from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import masking
from ptjax.pieces import score


def best_and_worst(rewards, *, group_size):
  """Which completion of each group is chosen, which rejected, and whether they differ.

  Args:
    rewards: [B], prompt-major; NaN, "no opinion", is neither best nor worst.
    group_size: completions per prompt, at least 2.
  Returns:
    chosen and rejected [P] int32, row numbers of the batch (the first of equals), and differ [P]
    bool, False for a group that gives no pair. Source: arXiv:2402.04792.
  """
  groups = masking.in_groups(rewards, group_size, at_least=2)
  first = jnp.arange(groups.shape[0]) * group_size
  chosen = first + jnp.argmax(jnp.where(jnp.isnan(groups), -jnp.inf, groups), axis=1)
  rejected = first + jnp.argmin(jnp.where(jnp.isnan(groups), jnp.inf, groups), axis=1)
  return chosen, rejected, advantage.informative_groups(rewards, group_size=group_size)


def xpo_loss(pair, *, reference_drew_chosen, beta=0.1, optimism=1e-5):
  """Exploratory Preference Optimization: DPO, and the reference's own samples are pushed down.

  One side of each pair is the policy's sample, the other the reference's; a judge ordered them.

  Args:
    pair: types.PairLogProbs with reference log-probs.
    reference_drew_chosen: [B] bool; True where the chosen side is the reference's sample.
    beta: inverse temperature of the implicit reward.
    optimism: weight of the mean log-prob of the reference's samples, in nats^-1; not negative.
  Source: arXiv:2405.21046, eq. 4 (not χPO); defaults of TRL.
  """
  masking.non_negative(optimism=optimism)
  bounds.boolean(pair.chosen.log_probs.shape[:1], reference_drew_chosen=reference_drew_chosen)
  loss, metrics = preference_link.dpo_loss(pair, beta=beta)
  chosen, rejected = score.of_pair(score.log_prob, pair)
  explored = jnp.where(reference_drew_chosen, chosen, rejected).mean()
  return loss + optimism * explored, {
      **metrics, 'logps/reference_samples': jax.lax.stop_gradient(explored)}
