"""Rewards and verdicts over several processes: who calls which function on which rows."""

import dataclasses
import functools

import numpy as np

from ptjax import config as settings
from ptjax import sharding
from ptjax.pieces import advantage


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
  return begin(reward_set, prompts, completions, columns)()


def begin(reward_set, prompts, completions, columns, *, pool=None):
  """Begins to `score`; the functions on the host run in a thread of `pool`, where there is one.

  What all processes do together waits for the end, since their programs must come in one order.

  Args:
    reward_set, prompts, completions, columns: as for `score`.
    pool: concurrent.futures.Executor, or None.
  Returns:
    `finish() -> RewardTable`, to be called in the order of the beginnings.
  """
  count = len(completions)
  mine = sharding.local_rows(count)
  own = (prompts[mine], completions[mine], {name: values[mine] for name, values in columns.items()})
  running = []
  for part, collective in reward_set.parts():
    call = functools.partial(part.score, *((prompts, completions, columns) if collective else own))
    if pool is not None and not collective:
      call = pool.submit(call).result
    running.append((call, collective))

  def finish():
    tables = [call() if collective else _exchanged(call, count) for call, collective in running]
    return tables[0] if len(tables) == 1 else reward_set.join(tables)
  return finish


def joined(tables):
  """Returns the RewardTable of all rows from those of the parts of a rollout, in their order."""
  rows = {name: np.concatenate([getattr(table, name) for table in tables])
          for name in ('values', 'total', 'scored')}
  counts = {field: _added([getattr(table, field) for table in tables])
            for field in ('report', 'seconds')}
  steps = {name: [row for table in tables for row in table.steps[name]]
           for name in tables[0].steps}
  return dataclasses.replace(tables[0], **rows, **counts, steps=steps)


def _exchanged(call, count):
  """The table of all rows from `call()`, that of this process's share of `count`."""
  table = _on_all(call)
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


def with_overlong_penalty(table, rollouts, overlong_tokens):
  """The table with a further component, `overlong`: DAPO's penalty on long completions.

  Args:
    table: RewardTable.
    rollouts: types.Rollouts.
    overlong_tokens: over how many tokens before the longest length the penalty grows to 1.
  """
  penalty = np.asarray(advantage.overlong_penalty(
      rollouts.loss_mask.sum(1), max_completion_tokens=rollouts.loss_mask.shape[1],
      cache_tokens=overlong_tokens), float)
  return dataclasses.replace(
      table, names=(*table.names, 'overlong'), total=table.total + penalty,
      values=np.concatenate([table.values, penalty[:, None]], axis=1))


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
    rows = sharding.local_rows(count)
    mine = _on_all(lambda: judge.compare(prompts[rows], first[rows], second[rows]))
    return sharding.gather_rows(np.asarray(mine, np.float64), count)

  def take_report(self):
    """Returns what the judge counted since the last call: asked, cached, failed, unreadable."""
    report = self._judge.take_report()
    return report if self._judge.collective else _summed(report)


def _on_all(function):
  """Returns `function()`; where it raises on one process, all raise."""
  found, failure = None, None
  try:
    found = function()
  except Exception as error:  # raised below, once every process knows
    failure = error
  failures = [text for text in sharding.gather_json(None if failure is None else str(failure))
              if text is not None]
  if failures:
    raise failure or settings.UserError(failures[0])
  return found


def _summed(report):
  """Counts added up over the processes."""
  return _added(sharding.gather_json(report))


def _added(parts):
  """Dicts of numbers, added up by name."""
  found = {}
  for part in parts:
    for name, number in part.items():
      found[name] = found.get(name, 0) + number
  return found
