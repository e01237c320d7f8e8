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
    estimator: function of `rewards` [B] and, by name, `group_size` and any of `arrays`.
    rewards: [B] float; what stands where not `scored` is not read.
    scored: [B] bool.
    group_size: completions per prompt.
    **arrays: `loss_mask`, `old_log_probs`, ... [B, T] each.
  Returns:
    [B] or [B, T] float32, 0 where not scored.
  """
  unknown = np.where(scored, rewards, np.nan).astype(np.float32)  # NaN is no opinion
  offered = {'rewards': jnp.asarray(unknown), 'group_size': group_size, **arrays}
  names = inspect.signature(estimator).parameters
  bound = estimator.keywords if isinstance(estimator, functools.partial) else {}
  advantages = np.asarray(
      estimator(**{n: v for n, v in offered.items() if n in names and n not in bound}))
  keep = scored if advantages.ndim == 1 else scored[:, None]
  return np.where(keep, advantages, 0.0).astype(np.float32)


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


def rollout_metrics(table, rollouts, group_size):
  """Reward and length statistics of one rollout, under TRL's names."""
  metrics = {}
  scored = table.scored
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
    sample: the compiled sampler, `(params, prompts, key) -> Rollouts`.
    tokenizer: a Hugging Face tokenizer.
    reward_set: rewards.combine.RewardSet.
    estimator: advantage estimator, or None where the loss takes none.
    rollout: RolloutSettings.
    mask_truncated: see `assemble`.
    seed: the run's seed.
    old_log_probs: `(params, batch) -> [B, T]` where the loss needs them recomputed, else None.
    reference_log_probs: the same under the frozen reference, else None.
    num_samples: completions kept for samples.jsonl.
  """
  door: object
  sample: object
  tokenizer: object
  reward_set: object
  estimator: object
  rollout: settings.RolloutSettings
  seed: int
  mask_truncated: bool = False
  old_log_probs: object = None
  reference_log_probs: object = None
  num_samples: int = 8

  def __call__(self, params, index):
    """Collects rollout number `index` under `params`; a pure function of both and the seed."""
    clock = _Clock()
    drawn = self.door.batch(index)
    prompts = types.Prompts(tokens=drawn.tokens, lengths=drawn.lengths, ids=drawn.ids,
                            sample_ids=drawn.sample_ids)
    rollouts = sharding.fetch(
        self.sample(params, prompts, keys.stream(self.seed, 'rollout', index)))
    clock.lap('rollout')
    group = self.rollout.group_size
    repeat = lambda values: [v for v in values for _ in range(group)]
    completions = texts(rollouts, self.tokenizer)
    prompt_texts = repeat(drawn.texts)
    columns = {name: repeat(values) for name, values in drawn.columns.items()}
    columns['completion_ids'] = [
        row[mask].tolist() for row, mask in zip(rollouts.tokens, rollouts.loss_mask)]
    table = score(self.reward_set, prompt_texts, completions, columns)
    clock.lap('reward')
    batch = assemble(prompts, rollouts, scored=table.scored, mask_truncated=self.mask_truncated,
                     reuse_log_probs=self.rollout.reuse_log_probs)
    if self.old_log_probs is not None and not self.rollout.reuse_log_probs:
      batch.inputs['old_log_probs'] = self.old_log_probs(params, batch)
    if self.reference_log_probs is not None:
      batch.inputs['reference_log_probs'] = self.reference_log_probs(batch)
    if self.estimator is not None:
      arrays = {'old_log_probs': rollouts.log_probs, **batch.inputs}
      batch.inputs['advantages'] = estimate_advantages(
          self.estimator, table.total, table.scored, group_size=group,
          loss_mask=batch.loss_mask, **arrays)
    clock.lap('log_probs')
    tokens = int(rollouts.loss_mask.sum())
    metrics = {
        **rollout_metrics(table, rollouts, group), **clock.laps,
        **{f'rewards/{name}': value for name, value in table.report.items() if value},
        'epoch': self.door.epoch(index),
        'perf/rollout_tokens_per_second': tokens / clock.laps['timing_s/rollout']}
    return Experience(batch, metrics, self._samples(
        prompt_texts, completions, table, rollouts, batch))

  def _samples(self, prompts, completions, table, rollouts, batch):
    count = min(self.num_samples, len(completions))
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
        'reward': float(table.total[i]) if table.scored[i] else None,
        'rewards': {name: None if np.isnan(v) else float(v)
                    for name, v in zip(table.names, table.values[i])},
        'completion_tokens': int(lengths[i]), 'truncated': bool(rollouts.truncated[i]),
        'group': i // self.rollout.group_size, **per_token(i),
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


class _Clock:
  """Seconds of each stage, as timing_s/* metrics."""

  def __init__(self):
    self.laps, self._last = {}, time.perf_counter()

  def lap(self, name):
    now = time.perf_counter()
    self.laps[f'timing_s/{name}'], self._last = now - self._last, now
