"""What one rollout earned, how long it was, and which way its gates went."""

import dataclasses

import jax
import numpy as np


def of(table, rollouts, group_size):
  """Reward and length statistics of one rollout, under TRL's names."""
  metrics = {}
  scored = table.scored & ~np.isnan(table.total)
  if scored.any():
    grouped = np.where(scored, table.total, np.nan).reshape(-1, group_size)
    grouped = grouped[~np.isnan(grouped).all(1)]
    stds = np.asarray([np.std(g[~np.isnan(g)], ddof=1) if (~np.isnan(g)).sum() > 1 else 0.0
                       for g in grouped])
    metrics['reward'] = float(table.total[scored].mean())
    metrics['reward_std'] = float(stds.mean())
    metrics['frac_reward_zero_std'] = float((stds < 1e-8).mean())
  for i, name in enumerate(table.names):
    values = table.values[:, i]
    values = values[~np.isnan(values)]
    if values.size:
      metrics[f'rewards/{name}/mean'] = float(values.mean())
      metrics[f'rewards/{name}/std'] = float(values.std(ddof=1)) if values.size > 1 else 0.0
  lengths = rollouts.loss_mask.sum(1)
  metrics.update({
      'completions/mean_length': float(lengths.mean()),
      'completions/min_length': int(lengths.min()),
      'completions/max_length': int(lengths.max()),
      'completions/clipped_ratio': float(rollouts.truncated.mean())})
  return metrics


def of_gate(found, group):
  """The trace of a gate among an estimator's arrays: `gate/<name>`, means over prompts.

  Of rows that take a part: the fraction of prompts that have some. Of weights: their mean.
  """
  metrics = {}
  for name, value in found.items():
    if name not in ('advantages', 'returns') and value.ndim == 1:
      metrics[f'gate/{name}'] = float(value.reshape(-1, group).max(1).mean())
  return metrics


def without(shown, table, rollouts):
  """Reward table and rollouts of the policy's own completions alone.

  Args:
    shown: [B] bool; the rows that are not, as many in every group.
    table: RewardTable.
    rollouts: types.Rollouts.
  """
  own = ~shown
  return (dataclasses.replace(table, values=table.values[own], total=table.total[own],
                              scored=table.scored[own]),
          jax.tree.map(lambda x: x[own], rollouts))
