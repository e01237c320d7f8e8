"""Rewards and verdicts over several processes: who calls which function on which rows."""

import dataclasses

import numpy as np

from ptjax import config as settings
from ptjax import sharding


def score(reward_set, prompts, completions, columns):
  """Scores completions: functions on the host each process its own rows, models all together.

  Args:
    reward_set: rewards.combine.RewardSet.
    prompts: B strings, each prompt repeated for its group.
    completions: B strings.
    columns: dict of B values each, the data set's further columns.
  Returns:
    rewards.combine.RewardTable, the same on every process.
  """
  tables = []
  for part, collective in reward_set.parts():
    if collective:
      tables.append(part.score(prompts, completions, columns))
    else:
      tables.append(_score_own_rows(part, prompts, completions, columns))
  return tables[0] if len(tables) == 1 else reward_set.join(tables)


def _score_own_rows(reward_set, prompts, completions, columns):
  count = len(completions)
  table = _on_own_rows(count, lambda mine: reward_set.score(
      prompts[mine], completions[mine], {name: values[mine] for name, values in columns.items()}))
  values, total, scored = (sharding.gather_rows(np.asarray(x), count)
                           for x in (table.values, table.total, table.scored))
  return dataclasses.replace(table, values=values, total=total, scored=scored,
                             report=_summed(table.report))


def step_inputs(table, reward_set, shape):
  """What estimators of process rewards read beside the rewards.

  Args:
    table: rewards.combine.RewardTable.
    reward_set: the RewardSet it is of.
    shape: (B, T) of the completions.
  Returns:
    `step_rewards` [B, T] float32, at the token that ends a step its reward, weighted, and NaN
    elsewhere; `outcome_rewards` [B] float32, the weighted sum of the rewards without steps, 0
    where there are none.
  """
  weights = {component.name: component.weight for component in reward_set.components}
  steps = np.full(shape, np.nan, np.float32)
  for name, rows in table.steps.items():
    for row, ends in enumerate(rows):
      for place, reward in ends:
        before = 0.0 if np.isnan(steps[row, place]) else steps[row, place]
        steps[row, place] = before + weights[name] * reward
  others = [i for i, name in enumerate(table.names) if name not in table.steps]
  outcome = np.nan_to_num(table.values[:, others]) @ np.array(
      [weights.get(table.names[i], 1.0) for i in others])  # what no function gave counts in full
  return {'step_rewards': steps, 'outcome_rewards': outcome.astype(np.float32)}


class Compare:
  """`compare(prompts, first, second) -> P(first wins)`, the same on every process.

  Args:
    judge: see rewards.judge; one that asks a server does so on each process for its own rows.
  """

  def __init__(self, judge):
    self._judge = judge

  def __call__(self, prompts, first, second):
    """Compares N pairs.

    Args:
      prompts: N texts or message lists.
      first, second: N texts each.
    Returns:
      [N] float64, NaN where there is no verdict.
    """
    judge = self._judge
    if judge.collective:
      return judge.compare(prompts, first, second)
    count = len(first)
    mine = _on_own_rows(count, lambda rows: judge.compare(prompts[rows], first[rows], second[rows]))
    return sharding.gather_rows(np.asarray(mine, np.float64), count)

  def take_report(self):
    """Returns what the judge counted since the last call: asked, cached, failed, unreadable."""
    report = self._judge.take_report()
    return report if self._judge.collective else _summed(report)


def _on_own_rows(count, function):
  """Calls `function(rows)` for this process's share of `count` rows; all raise if one does."""
  found, failure = None, None
  try:
    found = function(sharding.local_rows(count))
  except Exception as error:  # raised below, once every process knows
    failure = error
  failures = [text for text in sharding.gather_json(None if failure is None else str(failure))
              if text is not None]
  if failures:
    raise failure or settings.UserError(failures[0])
  return found


def _summed(report):
  """Counts added up over the processes."""
  found = {}
  for part in sharding.gather_json(report):
    for name, number in part.items():
      found[name] = found.get(name, 0) + number
  return found
