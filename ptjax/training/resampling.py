"""Dynamic sampling: groups whose rewards are all equal give way to groups of other prompts.

Such a group teaches nothing under a baseline of its own, and where the policy is very bad or very
good most groups are like that. Source: DAPO, arXiv:2503.14476, section 3.2.
"""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Completions and what they earned; NumPy leaves, prompt-major."""
  prompts: object  # data.prompts.PromptBatch
  rollouts: object  # types.Rollouts, B rows
  known: dict  # further inputs of the loss, [B] each
  completions: list  # B texts
  table: object  # rewards.combine.RewardTable
  merits: np.ndarray  # [B]; the rewards that decide whether a group teaches, NaN for no opinion

  @property
  def group(self):
    """Rows per prompt."""
    return len(self.completions) // len(self.prompts.lengths)


def tied(drawn):
  """[P] bool: groups whose scored members all earned the same."""
  merits = drawn.merits.reshape(-1, drawn.group)
  highest = np.where(np.isnan(merits), -np.inf, merits).max(1)
  return highest <= np.where(np.isnan(merits), np.inf, merits).min(1)


def fill(drawn, fresh):
  """Puts groups of `fresh` that teach into the places of groups of `drawn` that do not.

  Groups that teach stay where they are, and both sides keep their order.

  Args:
    drawn: Drawn.
    fresh: Drawn of other prompts, any number of them, with the same group size.
  Returns:
    Drawn, and how many places were filled.
  """
  places, sources = np.flatnonzero(tied(drawn)), np.flatnonzero(~tied(fresh))
  count = min(len(places), len(sources))
  places, sources = places[:count], sources[:count]
  group = drawn.group
  spread = lambda groups: (groups[:, None] * group + np.arange(group)).reshape(-1)
  rows = lambda old, new: _put(old, new, spread(places), spread(sources))
  prompts = lambda old, new: _put(old, new, places, sources)
  old, new = drawn.prompts, fresh.prompts
  table = dataclasses.replace(
      drawn.table, report={name: drawn.table.report.get(name, 0) + fresh.table.report.get(name, 0)
                           for name in {**drawn.table.report, **fresh.table.report}},
      **{name: rows(getattr(drawn.table, name), getattr(fresh.table, name))
         for name in ('values', 'total', 'scored')})
  merged = dataclasses.replace(
      old, **{name: prompts(getattr(old, name), getattr(new, name))
              for name in ('tokens', 'lengths', 'ids', 'sample_ids', 'prompts', 'texts')},
      columns={name: prompts(values, new.columns[name]) for name, values in old.columns.items()},
      demonstrations=None if old.demonstrations is None else prompts(
          old.demonstrations, new.demonstrations))
  return Drawn(
      prompts=merged, rollouts=jax.tree.map(rows, drawn.rollouts, fresh.rollouts),
      known={name: rows(x, fresh.known[name]) for name, x in drawn.known.items()},
      completions=rows(drawn.completions, fresh.completions), table=table,
      merits=rows(drawn.merits, fresh.merits)), count


def _put(old, new, places, sources):
  """A copy of `old` with `new[sources]` at `places`; arrays are widened to hold both."""
  if isinstance(old, list):
    result = list(old)
    for place, source in zip(places, sources):
      result[place] = new[source]
    return result
  if old.ndim == 2:
    width = max(old.shape[1], new.shape[1])
    old, new = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (old, new))
  result = np.array(old)
  result[places] = new[sources]
  return result
