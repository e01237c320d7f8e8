"""Prompts -> rollout -> rewards -> advantages -> batch, each stage a function of its own.

Everything here is host-side NumPy between two compiled programs (sampler and train step); arrays
are global on every process (see sharding.py).
"""

import dataclasses
import functools
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax import types
from ptjax.pieces import advantage
from ptjax.rewards import combine
from ptjax.training import recipes


@dataclasses.dataclass
class Experience:
  """One scored rollout, ready for one or several optimizer steps."""
  batch: types.TokenBatch  # NumPy leaves; the whole rollout
  metrics: dict  # name -> float, of this rollout
  samples: list  # dicts for samples.jsonl


def texts(rollouts, tokenizer):
  """Decodes completions, without special tokens.

  Args:
    rollouts: types.Rollouts with NumPy leaves.
    tokenizer: a Hugging Face tokenizer.
  Returns:
    B strings.
  """
  rows = [row[mask].tolist() for row, mask in zip(rollouts.tokens, rollouts.loss_mask)]
  return tokenizer.batch_decode(rows, skip_special_tokens=True)


def score(reward_set, prompts, completions, columns):
  """Scores completions, each process its own rows.

  Args:
    reward_set: rewards.combine.RewardSet.
    prompts: B strings, each prompt repeated for its group.
    completions: B strings.
    columns: dict of B values each, the data set's further columns.
  Returns:
    values [B, F] float64 with NaN where a function has no opinion, total [B] float64,
    scored [B] bool, and the report (counts of time-outs and errors).
  """
  count = len(completions)
  mine = sharding.local_rows(count)
  table, failure = None, None
  try:
    table = reward_set.score(prompts[mine], completions[mine],
                             {name: values[mine] for name, values in columns.items()})
  except Exception as error:  # raised below, once every process knows
    failure = error
  failures = [text for text in sharding.gather_json(None if failure is None else str(failure))
              if text is not None]
  if failures:
    raise failure or settings.UserError(failures[0])
  report = {}
  for part in sharding.gather_json(table.report):
    for name, number in part.items():
      report[name] = report.get(name, 0) + number
  values, total, scored = (sharding.gather_rows(np.asarray(x), count)
                           for x in (table.values, table.total, table.scored))
  return dataclasses.replace(table, values=values, total=total, scored=scored, report=report)


def estimate_advantages(estimator, rewards, scored, *, group_size, **arrays):
  """Calls an advantage estimator with the arrays it names.

  Args:
    estimator: function of `rewards` [B] and, by name, `group_size` and any of `arrays`; it returns
      advantages, or a dict of them and of other arrays for the loss.
    rewards: [B] float; what stands where not `scored` is not read.
    scored: [B] bool.
    group_size: completions per prompt.
    **arrays: `loss_mask`, `old_log_probs`, ... [B, T] each.
  Returns:
    Dict of [B] or [B, T] arrays, `advantages` among them: float32, 0 where not scored.
  """
  unknown = np.where(scored, rewards, np.nan).astype(np.float32)  # NaN is no opinion
  offered = {'rewards': jnp.asarray(unknown), 'group_size': group_size, **arrays}
  names = inspect.signature(estimator).parameters
  bound = estimator.keywords if isinstance(estimator, functools.partial) else {}
  found = estimator(**{n: v for n, v in offered.items() if n in names and n not in bound})
  found = dict(found) if isinstance(found, dict) else {'advantages': found}
  advantages = np.asarray(found['advantages'])
  keep = scored if advantages.ndim == 1 else scored[:, None]
  found['advantages'] = np.where(keep, advantages, 0.0).astype(np.float32)
  return {name: np.asarray(x) for name, x in found.items()}


def assemble(prompts, rollouts, *, scored, mask_truncated=False, reuse_log_probs=False):
  """Makes the batch, still without advantages.

  Args:
    prompts: types.Prompts with NumPy leaves, P rows.
    rollouts: types.Rollouts with NumPy leaves, B rows.
    scored: [B] bool; completions without a reward do not train.
    mask_truncated: whether completions cut off by the length limit do not train.
    reuse_log_probs: whether the sampler's log-probs are the old ones; else the trainer's are, its
      own while on-policy and later those that `Collector` adds as `old_log_probs`.
  Returns:
    types.TokenBatch with NumPy leaves.
  """
  keep = scored & ~rollouts.truncated if mask_truncated else scored
  return types.TokenBatch(
      prompt_tokens=prompts.tokens, prompt_lengths=prompts.lengths, tokens=rollouts.tokens,
      loss_mask=rollouts.loss_mask & keep[:, None], on_policy=np.asarray(not reuse_log_probs),
      inputs={'rollout_log_probs': rollouts.log_probs})


def without(shown, table, rollouts):
  """Reward table and rollouts of the policy's own completions alone.

  Args:
    shown: [B] bool; the rows that are demonstrations, as many in every group.
    table: RewardTable.
    rollouts: types.Rollouts.
  """
  own = ~shown
  return (dataclasses.replace(table, values=table.values[own], total=table.total[own],
                              scored=table.scored[own]),
          jax.tree.map(lambda x: x[own], rollouts))


def rollout_metrics(table, rollouts, group_size):
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


@dataclasses.dataclass
class Collector:
  """The stages in order; what the online loop calls once per rollout.

  Attributes:
    door: data.prompts.PromptDoor.
    samplers: name -> compiled `(params, prompts, key) -> Rollouts`; 'policy' is always there,
      'greedy' (one completion), 'reference' and 'teacher' where the method needs them.
    tokenizer: a Hugging Face tokenizer.
    reward_set: rewards.combine.RewardSet, or None where nothing reads rewards.
    estimator: advantage estimator, or None where the loss takes none.
    rollout: RolloutSettings.
    mask_truncated: see `assemble`.
    seed: the run's seed.
    log_probs: input's name -> `(params, batch) -> [B, T]`: `old_log_probs`,
      `reference_log_probs`, `teacher_log_probs`, `old_values`, where the method reads them.
    recipe: recipes.Recipe; how completions are drawn and the batch arranged.
    takes_rewards: whether the loss reads the rewards themselves.
    num_samples: completions kept for samples.jsonl.
  """
  door: object
  samplers: dict
  tokenizer: object
  reward_set: object
  estimator: object
  rollout: settings.RolloutSettings
  seed: int
  mask_truncated: bool = False
  log_probs: dict = dataclasses.field(default_factory=dict)
  recipe: recipes.Recipe = recipes.Recipe()
  takes_rewards: bool = False
  num_samples: int = 8
  judge: object = None

  def __call__(self, params, index):
    """Collects rollout number `index` under `params`; a pure function of both and the seed."""
    clock = _Clock()
    drawn = self.door.batch(index)
    key = keys.stream(self.seed, 'rollout', index)
    rollouts, known = self.recipe.draw(self.samplers, params, drawn, key)
    clock.lap('rollout')
    group = len(rollouts.tokens) // len(drawn.lengths)
    completions = texts(rollouts, self.tokenizer)
    table = self._score(drawn, rollouts, completions)
    clock.lap('reward')
    batch = assemble(drawn, rollouts, scored=table.scored, mask_truncated=self.mask_truncated,
                     reuse_log_probs=self.rollout.reuse_log_probs)
    batch.inputs.update(known)
    for name, log_probs in self.log_probs.items():
      batch.inputs[name] = log_probs(params, batch)
    if self.takes_rewards:
      batch.inputs['rewards'] = np.where(table.scored, table.total, np.nan).astype(np.float32)
    gates = {}
    if self.estimator is not None:
      recorded = {name: x for name, x in batch.inputs.items() if name != 'rewards'}
      arrays = {'old_log_probs': rollouts.log_probs, **recorded,
                'reward_components': table.values, **self._baselines(params, drawn, group, key)}
      found = estimate_advantages(
          self.estimator, table.total, table.scored, group_size=group,
          loss_mask=batch.loss_mask, **arrays)
      batch.inputs.update(found)
      for name, value in found.items():
        if value.dtype == bool:  # which prompts have rows that take this part
          gates[f'gate/{name}'] = float(value.reshape(-1, group).any(1).mean())
    clock.lap('log_probs')
    own = (table, rollouts)
    if 'demonstration' in known:
      own = without(known['demonstration'], table, rollouts)
    tokens = int(own[1].loss_mask.sum())
    metrics = {
        **rollout_metrics(*own, len(own[1].tokens) // len(drawn.lengths)), **gates, **clock.laps,
        **{f'rewards/{name}': value for name, value in table.report.items() if value},
        'epoch': self.door.epoch(index),
        'perf/rollout_tokens_per_second': tokens / clock.laps['timing_s/rollout']}
    samples = self._samples(_repeat(drawn.texts, group), completions, table, rollouts, batch)
    return Experience(self.recipe.arrange(batch, table.total, table.scored), metrics, samples)

  def _score(self, drawn, rollouts, completions):
    """The rewards of completions, prompt-major."""
    if self.reward_set is None:
      count = len(completions)
      return combine.RewardTable(
          names=(), values=np.zeros((count, 0)), total=np.full(count, np.nan),
          scored=np.ones(count, bool), report={}, seconds={})
    group = len(completions) // len(drawn.lengths)
    columns = {name: _repeat(values, group) for name, values in drawn.columns.items()}
    columns['completion_ids'] = [
        row[mask].tolist() for row, mask in zip(rollouts.tokens, rollouts.loss_mask)]
    return score(self.reward_set, _repeat(drawn.texts, group), completions, columns)

  def _baselines(self, params, drawn, group, key):
    """What an estimator compares rewards with, if it asks: [B] each.

    `greedy_rewards` (ReMax): those of the prompt's greedy completion. `optimal_values` (A*-PO):
    of the reference's own samples; without a stored copy they are drawn anew for each rollout.
    """
    names = () if self.estimator is None else inspect.signature(self.estimator).parameters
    found = {}
    if 'greedy_rewards' in names:
      greedy = sharding.fetch(self.samplers['greedy'](
          params, recipes.prompts_of(drawn, 1), key))
      total = self._score(drawn, greedy, texts(greedy, self.tokenizer)).total
      found['greedy_rewards'] = np.repeat(total, group).astype(np.float32)
    if 'optimal_values' in names:
      own = sharding.fetch(self.samplers['reference'](
          params, recipes.prompts_of(drawn), jax.random.fold_in(key, 1)))
      total = self._score(drawn, own, texts(own, self.tokenizer)).total
      values = advantage.optimal_value(
          jnp.asarray(total, jnp.float32).reshape(len(drawn.lengths), -1))
      found['optimal_values'] = np.repeat(np.asarray(values), group)
    return found

  def _samples(self, prompts, completions, table, rollouts, batch):
    count = min(self.num_samples, len(completions))
    group = len(completions) // len(batch.prompt_lengths)
    lengths = rollouts.loss_mask.sum(1)
    log_probs = {'log_probs': rollouts.log_probs}  # as the sampler saw them
    log_probs.update({name: np.asarray(batch.inputs[name])
                      for name in ('old_log_probs', 'reference_log_probs') if name in batch.inputs})
    def per_token(i):
      mask = rollouts.loss_mask[i]
      tokens = [[token] for token in rollouts.tokens[i][mask].tolist()]
      return {'tokens': self.tokenizer.batch_decode(tokens),
              **{name: x[i][mask].astype(float).round(5).tolist() for name, x in log_probs.items()}}
    return [{
        'prompt': prompts[i], 'completion': completions[i],
        'reward': float(table.total[i]) if np.isfinite(table.total[i]) else None,
        'rewards': {name: None if np.isnan(v) else float(v)
                    for name, v in zip(table.names, table.values[i])},
        'completion_tokens': int(lengths[i]), 'truncated': bool(rollouts.truncated[i]),
        'group': i // group, **per_token(i),
    } for i in range(count)]


def mini_batch(batch, *, index, count, seed, rollout, epoch, on_policy):
  """Cuts mini-batch `index` of `count` out of a rollout's batch.

  Whole groups stay together. The order of prompts is a permutation drawn from (seed, rollout,
  epoch), so a resumed run cuts the same pieces.
  """
  num_prompts = batch.prompt_lengths.shape[0]
  if count == 1:
    chosen = np.arange(num_prompts)
  else:
    order = np.asarray(jax.random.permutation(
        keys.stream(seed, 'mini_batches', rollout, epoch), num_prompts))
    size = num_prompts // count
    chosen = np.sort(order[index * size:(index + 1) * size])
  def one(x):
    x = np.asarray(x)
    if x.ndim == 0:
      return x
    return x.reshape(num_prompts, -1, *x.shape[1:])[chosen].reshape(-1, *x.shape[1:])
  return jax.tree.map(one, batch).replace(on_policy=np.asarray(bool(on_policy)))


def _repeat(values, times):
  return [value for value in values for _ in range(times)]


class _Clock:
  """Seconds of each stage, as timing_s/* metrics."""

  def __init__(self):
    self.laps, self._last = {}, time.perf_counter()

  def lap(self, name):
    now = time.perf_counter()
    self.laps[f'timing_s/{name}'], self._last = now - self._last, now
