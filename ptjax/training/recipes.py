"""How a method's batch comes about: who draws the completions, and how rows are arranged for it.

Most methods train on their own completions as they come. A recipe is a few pure functions that say
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


# Who draws: `draw(samplers, params, drawn, key) -> (Rollouts, {further input: [B]})`.


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
  own = sharding.fetch(samplers['policy'](params, prompts_of(drawn), key))
  joined = _join(own, _shown(drawn, 1, own.tokens.shape[1]), len(drawn.lengths))
  return joined, {'demonstration': _last(joined, len(drawn.lengths), 1)}


def own_samples_and(rival):
  """Returns a `draw`: the policy's own completions and, behind them, as many of a rival's.

  Args:
    rival: the sampler's name. It draws with a key of its own, else the same weights would draw the
      same completions.
  Returns:
    The function; its further input is `rival` [B] bool.
  """
  def draw(samplers, params, drawn, key):
    own, other = (sharding.fetch(samplers[name](params, prompts_of(drawn), use)) for name, use in (
        ('policy', key), (rival, jax.random.fold_in(key, 1))))
    joined = _join(own, other, len(drawn.lengths))
    return joined, {'rival': _last(joined, len(drawn.lengths), drawn.sample_ids.shape[1])}
  return draw


def demonstration_and_opponents(samplers, params, drawn, key):
  """Pairs: the demonstration, then a completion of the previous iterate; a pair per sample.

  The previous iterate is the reference, which a stage renews every round. Further inputs:
  `demonstration` [B] bool. Source: SPIN, arXiv:2401.01335, algorithm 1.
  """
  opponents = sharding.fetch(samplers['reference'](params, prompts_of(drawn), key))
  count, group = len(drawn.lengths), drawn.sample_ids.shape[1]
  joined = _join(_shown(drawn, group, opponents.tokens.shape[1]), opponents, count)
  pairs = lambda x: x.reshape(count, 2, group, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
  return jax.tree.map(pairs, joined), {'demonstration': np.arange(len(joined.tokens)) % 2 == 0}


def _shown(drawn, times, width):
  """The prompts' demonstrations as Rollouts of their own, each `times` times, at least `width`."""
  width = max(width, batching.bucket(max(map(len, drawn.demonstrations))))
  shown, lengths = batching.pad_right(drawn.demonstrations, width, 0)
  once = types.Rollouts(
      tokens=shown, loss_mask=np.arange(width) < lengths[:, None],
      log_probs=np.zeros(shown.shape, np.float32), truncated=np.zeros(len(shown), bool))
  return jax.tree.map(lambda x: np.repeat(x, times, axis=0), once)


def _join(first, second, num_prompts):
  """Rollouts whose groups are those of `first` and behind them those of `second`."""
  def join(a, b):
    a, b = (x.reshape(num_prompts, -1, *x.shape[1:]) for x in (a, b))
    if a.ndim == 3:
      width = max(a.shape[2], b.shape[2])
      a, b = (np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]))) for x in (a, b))
    both = np.concatenate([a, b.astype(a.dtype)], axis=1)
    return both.reshape(-1, *both.shape[2:])
  return jax.tree.map(join, first, second)


def _last(rollouts, num_prompts, count):
  """[B] bool: the last `count` rows of every group."""
  group = len(rollouts.tokens) // num_prompts
  return np.arange(len(rollouts.tokens)) % group >= group - count


# How rows lie: `arrange(batch, rewards, scored) -> TokenBatch`.


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
  return _rows(batch, np.stack([chosen, rejected], 1).reshape(-1), np.repeat(differ, 2))


def best_of_group(batch, rewards, scored):
  """One row per prompt: the best completion of its group. RAFT, arXiv:2304.06767.

  A group without any reward is masked.
  """
  grouped = np.where(scored, rewards, -np.inf).reshape(len(batch.prompt_lengths), -1)
  best = np.arange(len(grouped)) * grouped.shape[1] + grouped.argmax(1)
  return _rows(batch, best, np.isfinite(grouped.max(1)))


def own_against_rival(batch, rewards, scored):
  """Pairs of a completion of the policy and one of its rival, the better one first.

  `rewards` are win probabilities; a draw gives no pair. The input `reference_drew_chosen` says of
  each pair whether the rival's is the chosen one. XPO, arXiv:2405.21046.
  """
  own, rival = _sides(batch)
  lost = rewards[rival] > rewards[own]
  rows = np.where(lost[:, None], np.stack([rival, own], 1), np.stack([own, rival], 1)).reshape(-1)
  decided = scored[own] & scored[rival] & (rewards[own] != rewards[rival])
  pairs = _rows(batch, rows, np.repeat(decided, 2))
  pairs.inputs['reference_drew_chosen'] = lost
  return pairs


def without_rivals(batch, rewards, scored):
  """The policy's own rows alone: rivals are there to be compared with. Nash-MD."""
  del rewards, scored
  own, _ = _sides(batch)
  return _rows(batch, own, np.ones(len(own), bool))


def two_by_two(batch, rewards, scored):
  """Neighbouring rows of a group as pairs, of which both have a reward. REBEL, arXiv:2404.16767."""
  whole = np.repeat(scored.reshape(-1, 2).all(1), 2)
  inputs = {**batch.inputs, 'rewards': np.where(whole, rewards, 0.0).astype(np.float32)}
  return batch.replace(loss_mask=batch.loss_mask & whole[:, None], inputs=inputs)


def _sides(batch):
  """Row numbers of the policy's own completions and of their rivals, in the same order."""
  return np.flatnonzero(~batch.inputs['rival']), np.flatnonzero(batch.inputs['rival'])


def _rows(batch, rows, trains):
  """Chosen rows of a batch; those that do not train are masked."""
  pick = lambda x: x[rows] if np.ndim(x) and len(x) == len(batch.tokens) else x
  picked = jax.tree.map(pick, batch)
  return picked.replace(loss_mask=picked.loss_mask & trains[:, None])


# What text the teacher is shown: `privileged(drawn, completions, rewards, tokenizer) -> (P texts or
# None each, {further input: [B]})`.


def shown_the_demonstration(drawn, completions, rewards, tokenizer):
  """The prompt's own demonstration. Self-distillation, arXiv:2601.19897."""
  del completions, rewards
  return tokenizer.batch_decode(
      [list(ids) for ids in drawn.demonstrations], skip_special_tokens=True), {}


def shown_a_success(drawn, completions, rewards, tokenizer):
  """A successful completion of the same group, if there is one. SDPO, arXiv:2601.20802.

  Success is the full reward of 1. Further input: `shown` [B] bool, False for the rows of a group
  without success, and for the completion that is shown: it has nothing to learn from itself.
  """
  del tokenizer
  grouped = np.nan_to_num(rewards, nan=-np.inf).reshape(len(drawn.lengths), -1)
  first = (grouped >= 1.0).argmax(1)
  succeeded = (grouped >= 1.0).any(1)
  rows = np.arange(len(grouped)) * grouped.shape[1] + first
  shown = np.repeat(succeeded, grouped.shape[1])
  shown[rows] = False
  return [completions[row] if good else None for row, good in zip(rows, succeeded)], {
      'shown': shown}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a batch is drawn and arranged."""
  draw: Callable = own_samples
  own: bool = True  # whether the policy draws, so that its own log-probs should be the sampler's
  arrange: Callable = as_drawn
  privileged: Callable | None = None  # what a teacher, by default the policy, is shown of a prompt
  template: str = '{prompt}\n\n{privileged}'  # how it is shown
  reads_rewards: bool = False  # whether `arrange` or `privileged` does
  compares: bool = False  # rewards become probabilities of winning against the rival, or the group
  samplers: tuple[str, ...] = ()  # beside the policy's
  gives: tuple[str, ...] = ()  # inputs of the loss that are this recipe's own
  group_multiple: int = 1  # the group size must be one of it
  least_group: int = 1
  renews_reference: bool = False  # the policy becomes the reference with every pass over prompts
  extra_rollouts: int = 0  # of other prompts, for groups of equal rewards (see resampling)
  overlong_fraction: float = 0.0  # of the longest completion, over which a penalty grows to 1


RECIPES = {
    'own samples': Recipe(),
    'own samples and demonstration': Recipe(draw=own_samples_and_demonstration),
    "teacher's samples": Recipe(
        draw=teachers_samples, own=False, samplers=('teacher',)),
    'dynamic samples': Recipe(extra_rollouts=3, overlong_fraction=0.2),
    'best against worst': Recipe(
        arrange=best_against_worst, reads_rewards=True, compares=True, least_group=2),
    'best of group': Recipe(arrange=best_of_group, reads_rewards=True),
    'two by two': Recipe(arrange=two_by_two, reads_rewards=True, group_multiple=2),
    'against the reference': Recipe(
        draw=own_samples_and('reference'), arrange=own_against_rival, reads_rewards=True,
        compares=True, samplers=('reference',), gives=('reference_drew_chosen',)),
    'against a mixture': Recipe(
        draw=own_samples_and('mixture'), arrange=without_rivals, compares=True,
        samplers=('mixture',)),
    'demonstration against opponent': Recipe(
        draw=demonstration_and_opponents, own=False, samplers=('reference',),
        renews_reference=True),
    'shown the demonstration': Recipe(privileged=shown_the_demonstration),
    'shown a success': Recipe(
        privileged=shown_a_success, reads_rewards=True, gives=('shown',), least_group=2,
        template='{prompt}\nCorrect solution:\n\n{privileged}\n\n\n\n'
                 'Correctly solve the original question.\n'),
}
