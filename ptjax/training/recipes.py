"""How a method's batch comes about: who draws the completions, and how rows are arranged for it.

Most methods train on their own completions as they come. A recipe is two pure functions that say
where another one differs; everything between them (scoring, log-probs, advantages) is shared.
"""

import dataclasses
from typing import Callable

import jax
import numpy as np

from ptjax import sharding
from ptjax import types
from ptjax.data import batching
from ptjax.losses import online_preference


def prompts_of(drawn, group_size=None):
  """The prompts of a data.prompts.PromptBatch, for a sampler.

  Args:
    drawn: the PromptBatch.
    group_size: completions per prompt, None for the door's own.
  """
  sample_ids = drawn.sample_ids if group_size is None else drawn.sample_ids[:, :group_size]
  return types.Prompts(tokens=drawn.tokens, lengths=drawn.lengths, ids=drawn.ids,
                       sample_ids=sample_ids)


def own_samples(samplers, params, drawn, key):
  """Every completion is the policy's own.

  Args:
    samplers: name -> `(params, prompts, key) -> Rollouts`.
    params: the policy's parameters.
    drawn: data.prompts.PromptBatch.
    key: PRNG key.
  Returns:
    types.Rollouts with NumPy leaves, prompt-major; and further inputs of the loss, [B] each.
  """
  return sharding.fetch(samplers['policy'](params, prompts_of(drawn), key)), {}


def teachers_samples(samplers, params, drawn, key):
  """Every completion is the teacher's. Sequence-level distillation, arXiv:1606.07947."""
  return sharding.fetch(samplers['teacher'](params, prompts_of(drawn), key)), {}


def own_samples_and_demonstration(samplers, params, drawn, key):
  """The policy's own completions of a prompt and, as the last of its group, its demonstration.

  Further inputs: `demonstration` [B] bool. Demonstrations have no sampler's log-probs: 0 there.
  """
  rollouts = sharding.fetch(samplers['policy'](params, prompts_of(drawn), key))
  count, longest = len(drawn.lengths), max(map(len, drawn.demonstrations))
  width = max(rollouts.tokens.shape[1], batching.bucket(longest))
  shown, lengths = batching.pad_right(drawn.demonstrations, width, 0)
  behind = types.Rollouts(
      tokens=shown, loss_mask=np.arange(width) < lengths[:, None],
      log_probs=np.zeros((count, width), np.float32), truncated=np.zeros(count, bool))

  def join(own, last):
    own = own.reshape(count, -1, *own.shape[1:])
    if own.ndim == 3:
      own = np.pad(own, ((0, 0), (0, 0), (0, width - own.shape[2])))
    both = np.concatenate([own, last[:, None].astype(own.dtype)], axis=1)
    return both.reshape(-1, *both.shape[2:])

  joined = jax.tree.map(join, rollouts, behind)
  group = len(joined.tokens) // count
  return joined, {'demonstration': np.arange(len(joined.tokens)) % group == group - 1}


def as_drawn(batch, rewards, scored):
  """The batch as it is.

  Args:
    batch: types.TokenBatch with NumPy leaves.
    rewards: [B].
    scored: [B] bool.
  Returns:
    types.TokenBatch.
  """
  del rewards, scored
  return batch


def best_against_worst(batch, rewards, scored):
  """Pairs, two rows per prompt: the best completion of each group, then its worst.

  A group whose rewards are all equal gives no pair: its rows are masked. Source: online DPO,
  arXiv:2402.04792.
  """
  group = len(batch.tokens) // len(batch.prompt_lengths)
  chosen, rejected, differ = (np.asarray(x) for x in online_preference.best_and_worst(
      np.where(scored, rewards, np.nan).astype(np.float32), group_size=group))
  rows = np.stack([chosen, rejected], 1).reshape(-1)  # [2 P]
  pick = lambda x: x[rows] if np.ndim(x) and len(x) == len(batch.tokens) else x
  picked = jax.tree.map(pick, batch)
  return picked.replace(loss_mask=picked.loss_mask & np.repeat(differ, 2)[:, None])


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a batch is drawn and arranged."""
  draw: Callable = own_samples
  arrange: Callable = as_drawn
  reads_rewards: bool = False  # whether `arrange` does
  samplers: tuple[str, ...] = ()  # beside the policy's


RECIPES = {
    'own samples': Recipe(),
    'own samples and demonstration': Recipe(draw=own_samples_and_demonstration),
    "teacher's samples": Recipe(draw=teachers_samples, samplers=('teacher',)),
    'best against worst': Recipe(arrange=best_against_worst, reads_rewards=True),
}
