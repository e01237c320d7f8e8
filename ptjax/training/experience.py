"""Prompts -> rollout -> rewards -> advantages -> batch, each stage a function of its own.

Everything here is host-side NumPy between two compiled programs (sampler and train step); arrays
are global on every process (see sharding.py).
"""

from concurrent import futures
import contextlib
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
from ptjax.training import privileged
from ptjax.training import recipes
from ptjax.training import resampling
from ptjax.training import rollout_metrics
from ptjax.training import scoring


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


def with_state(estimator, loss_state):
  """The estimator, its KL coefficient times a controller's factor where `loss_state` has one."""
  if not isinstance(loss_state, dict) or 'reward_kl_scale' not in loss_state:
    return estimator
  scale = float(sharding.fetch(loss_state['reward_kl_scale']))
  first = inspect.signature(estimator).parameters['reward_kl_coefficient'].default
  return functools.partial(estimator, reward_kl_coefficient=scale * first)


@dataclasses.dataclass
class Collector:
  """The stages in order; what the online loop calls once per rollout.

  Attributes:
    door: data.prompts.PromptDoor.
    samplers: name -> compiled `(params, prompts, key) -> Rollouts`; 'policy' is always there,
      'greedy' (one completion), 'reference', 'mixture' and 'teacher' where the method needs them.
    tokenizer: a Hugging Face tokenizer.
    reward_set: rewards.combine.RewardSet, or None where nothing reads rewards.
    estimator: advantage estimator, or None where the loss takes none.
    rollout: RolloutSettings.
    seed: the run's seed.
    mask_truncated: see `assemble`.
    log_probs: input's name -> `(params, batch) -> [B, T]`: `old_log_probs`,
      `reference_log_probs`, `teacher_log_probs`, `old_values`, where the method reads them.
    recipe: recipes.Recipe; how completions are drawn and the batch arranged.
    takes: names of the loss's arguments; it may read `rewards` and `truncated` themselves.
    num_samples: completions kept for samples.jsonl.
    judge: `(prompts, first, second) -> [N]`, the probability that the first text is the better one;
      None compares rewards, which gives 0, a half or 1.
    extra_rollouts: draws of other prompts, at most, for groups of equal rewards.
    overlong_tokens: at the end of the longest completion, over which a penalty grows to 1; 0: none.
    max_teacher_tokens: room for the prompt of a teacher that is shown more than the policy.
    overlap: parts of a rollout, of which one is scored on the host while the next is drawn.
    renew: None, or `renew(params, index)`, called before each rollout; it says whether the
      reference is another one now.
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
  takes: frozenset = frozenset()
  num_samples: int = 8
  judge: object = None
  extra_rollouts: int = 0
  overlong_tokens: int = 0
  max_teacher_tokens: int | None = None
  renew: object = None
  overlap: int = 1

  def __post_init__(self):
    self._optimal_values = {}  # row of the data set -> the reference's optimal value

  def __call__(self, params, index, loss_state=None):
    """Collects rollout number `index`, a pure function of `params`, `loss_state` and the seed."""
    clock = _Clock()
    if self.renew is not None and self.renew(params, index):
      self._optimal_values.clear()
    key = keys.stream(self.seed, 'rollout', index)
    first = self._draw(params, self.door.batch(index), key, clock)
    drawn, counts = self._resample(params, first, index, key, clock)
    table, rollouts, group = drawn.table, drawn.rollouts, drawn.group
    batch = assemble(drawn.prompts, rollouts, scored=table.scored,
                     mask_truncated=self.mask_truncated,
                     reuse_log_probs=self.rollout.reuse_log_probs)
    batch.inputs.update(drawn.known)
    if not self.recipe.own:  # nothing to compare the trainer with
      del batch.inputs['rollout_log_probs']
    total = self._compare(drawn) if self.recipe.compares and not self._judged else table.total
    if self.recipe.privileged is not None:
      batch.inputs.update(self._shown(drawn, total))
    clock.lap('reward')
    for name, log_probs in self.log_probs.items():
      batch.inputs[name] = log_probs(params, batch)
    if 'truncated' in self.takes:
      batch.inputs['truncated'] = rollouts.truncated
    if 'rewards' in self.takes:
      batch.inputs['rewards'] = np.where(table.scored, total, np.nan).astype(np.float32)
    gates = {}
    if self.estimator is not None:
      recorded = {name: x for name, x in batch.inputs.items() if name != 'rewards'}
      arrays = {'old_log_probs': rollouts.log_probs, **recorded,
                'reward_components': table.values.astype(np.float32),
                **self._baselines(params, drawn.prompts, group, key)}
      found = estimate_advantages(
          with_state(self.estimator, loss_state), total, table.scored, group_size=group,
          loss_mask=batch.loss_mask, **arrays)
      batch.inputs.update(found)
      gates = rollout_metrics.of_gate(found, group)
    clock.lap('log_probs')
    metrics = {
        **self._metrics(first, clock), **self._asked(), **counts, **gates, **clock.laps,
        'epoch': self.door.epoch(index)}
    samples = self._samples(_repeat(drawn.prompts.texts, group), drawn.completions, table, rollouts,
                            batch)
    return Experience(self.recipe.arrange(batch, total, table.scored), metrics, samples)

  def _draw(self, params, prompts, key, clock):
    """Draws and scores completions of some prompts; resampling.Drawn."""
    rollouts, known, completions, table = self._scored_samples(params, prompts, key, clock)
    if self._judged:  # win rates are the rewards
      wins = self._compare(resampling.Drawn(prompts, rollouts, known, completions, table, None))
      table = dataclasses.replace(table, names=('judge',), values=wins[:, None], total=wins,
                                  scored=~np.isnan(wins))
    merits = np.where(table.scored, table.total, np.nan)
    if self.overlong_tokens and self.reward_set is not None:
      table = scoring.with_overlong_penalty(table, rollouts, self.overlong_tokens)
    if self.reward_set is not None and 'step_rewards' in self._estimator_names:
      known = {**known, **scoring.step_inputs(table, self.reward_set, rollouts.tokens.shape)}
    clock.lap('reward')
    return resampling.Drawn(prompts, rollouts, known, completions, table, merits)

  def _scored_samples(self, params, prompts, key, clock):
    """Completions and their rewards; of several parts, one is scored while the next is drawn."""
    parts = [prompts]
    if self.overlap > 1 and self.recipe.draw is recipes.own_samples:
      places = np.array_split(np.arange(len(prompts.lengths)), self.overlap)
      parts = [prompts.take(some) for some in places if some.size]
    found = []
    with contextlib.ExitStack() as stack:
      pool = stack.enter_context(futures.ThreadPoolExecutor(1)) if len(parts) > 1 else None
      for part in parts:
        rollouts, known = self.recipe.draw(self.samplers, params, part, key)
        completions = texts(rollouts, self.tokenizer)
        found.append((rollouts, known, completions,
                      self._begin_scoring(part, rollouts, completions, pool)))
      clock.lap('rollout')
      tables = [finish() for *_, finish in found]
    join = lambda *arrays: np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    rollouts, known, completions, _ = zip(*found)
    return (jax.tree.map(join, *rollouts), jax.tree.map(join, *known),
            [text for own in completions for text in own],
            scoring.joined(tables) if len(tables) > 1 else tables[0])

  def _resample(self, params, drawn, index, key, clock):
    """Replaces groups of equal rewards by those of other prompts; what is left does not train."""
    if not self.extra_rollouts:
      return drawn, {}
    count, tokens, extra, filled = len(drawn.prompts.lengths), 0, 0, 0
    while extra < self.extra_rollouts and resampling.tied(drawn).any():
      vacant = int(resampling.tied(drawn).sum())
      size = min(count, 1 << (vacant - 1).bit_length())  # few shapes, so few programs
      spare = self.door.take(self.door.spare(index, extra)[:size])
      fresh = self._draw(params, spare, jax.random.fold_in(key, 2 + extra), clock)
      drawn, now = resampling.fill(drawn, fresh)
      tokens += int(fresh.rollouts.loss_mask.sum())
      extra, filled = extra + 1, filled + now
    vacant = resampling.tied(drawn)
    table = dataclasses.replace(
        drawn.table, scored=drawn.table.scored & ~np.repeat(vacant, drawn.group))
    return dataclasses.replace(drawn, table=table), {
        'resampling/extra_rollouts': extra, 'resampling/replaced_groups': filled,
        'resampling/vacant_groups': int(vacant.sum()), 'resampling/extra_tokens': tokens}

  def _metrics(self, drawn, clock):
    """Of the policy's own completions, before any of them was replaced."""
    table, rollouts = drawn.table, drawn.rollouts
    for name in ('demonstration', 'rival'):
      if name in drawn.known:
        table, rollouts = rollout_metrics.without(drawn.known[name], table, rollouts)
    count = len(drawn.prompts.lengths)
    return {
        **rollout_metrics.of(table, rollouts, len(rollouts.tokens) // count),
        **{f'rewards/{name}': value for name, value in table.report.items() if value},
        'perf/rollout_tokens_per_second': int(
            rollouts.loss_mask.sum()) / clock.laps['timing_s/rollout']}

  def _score(self, prompts, rollouts, completions):
    """The rewards of completions, prompt-major."""
    return self._begin_scoring(prompts, rollouts, completions)()

  def _begin_scoring(self, prompts, rollouts, completions, pool=None):
    """As scoring.begin."""
    if self.reward_set is None:
      count = len(completions)
      return lambda: combine.RewardTable(
          names=(), values=np.zeros((count, 0)), total=np.full(count, np.nan),
          scored=np.ones(count, bool), report={}, seconds={})
    group = len(completions) // len(prompts.lengths)
    columns = {name: _repeat(values, group) for name, values in prompts.columns.items()}
    columns['raw_prompts'] = _repeat(prompts.prompts, group)
    columns['prompt_ids'] = _repeat(
        [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths)], group)
    columns['completion_ids'] = [
        row[mask].tolist() for row, mask in zip(rollouts.tokens, rollouts.loss_mask)]
    return scoring.begin(self.reward_set, _repeat(prompts.texts, group), completions, columns,
                         pool=pool)

  def _compare(self, drawn):
    """[B]: how probably each completion beats its rival or, with none, another of its group."""
    rows = np.arange(len(drawn.completions)).reshape(-1, drawn.group)
    if 'rival' in drawn.known:
      own, rival = np.split(rows, 2, axis=1)
      pairs = np.stack([own.reshape(-1), rival.reshape(-1)], 1)
    else:
      pairs = np.concatenate([rows[:, [i, j]] for i in range(drawn.group) for j in range(i)])
    if self.judge is None:
      wins = 0.5 + 0.5 * np.sign(drawn.table.total[pairs[:, 0]] - drawn.table.total[pairs[:, 1]])
    else:
      prompts = _repeat(drawn.prompts.prompts, drawn.group)
      first, second = ([drawn.completions[row] for row in side] for side in pairs.T)
      wins = np.asarray(self.judge([prompts[row] for row in pairs[:, 0]], first, second), float)
    total, met = np.zeros(rows.size), np.zeros(rows.size)
    for side, probability in ((0, wins), (1, 1.0 - wins)):
      seen = ~np.isnan(probability)
      np.add.at(total, pairs[seen, side], probability[seen])
      np.add.at(met, pairs[seen, side], 1)
    return np.where(met > 0, total / np.maximum(met, 1), np.nan)

  @property
  def _estimator_names(self):
    return () if self.estimator is None else inspect.signature(self.estimator).parameters

  @property
  def _judged(self):
    return self.reward_set is None and self.judge is not None

  def _asked(self):
    """What the judge counted: `judge/asked`, `cached`, `failed`, `unreadable`."""
    report = self.judge.take_report() if hasattr(self.judge, 'take_report') else {}
    return {f'judge/{name}': count for name, count in report.items()}

  def _shown(self, drawn, total):
    """What the teacher reads in the place of the prompts, and which rows learn from it."""
    found, inputs = self.recipe.privileged(
        drawn.prompts, drawn.completions, total, self.tokenizer)
    return {**inputs, **privileged.teacher_prompts(
        self.tokenizer, drawn.prompts.prompts, found, template=self.recipe.template,
        max_tokens=self.max_teacher_tokens)}

  def _baselines(self, params, drawn, group, key):
    """What an estimator compares rewards with, if it asks: [B] each.

    `greedy_rewards` (ReMax): those of the prompt's greedy completion. `optimal_values` (A*-PO):
    of the reference's own samples, which are the same for a prompt whenever it comes.
    """
    names, found = self._estimator_names, {}
    if 'greedy_rewards' in names:
      greedy = sharding.fetch(self.samplers['greedy'](
          params, recipes.prompts_of(drawn, 1), key))
      total = self._score(drawn, greedy, texts(greedy, self.tokenizer)).total
      found['greedy_rewards'] = np.repeat(total, group).astype(np.float32)
    if 'optimal_values' in names:
      known = self._optimal_values
      if any(int(row) not in known for row in drawn.ids):
        first = np.tile(np.arange(drawn.sample_ids.shape[1], dtype=np.int32), (len(drawn.ids), 1))
        own = sharding.fetch(self.samplers['reference'](
            params, recipes.prompts_of(dataclasses.replace(drawn, sample_ids=first)),
            keys.stream(self.seed, 'optimal_values')))
        total = self._score(drawn, own, texts(own, self.tokenizer)).total
        values = advantage.optimal_value(
            jnp.asarray(total, jnp.float32).reshape(len(drawn.lengths), -1))
        known.update(zip(map(int, drawn.ids), np.asarray(values)))
      found['optimal_values'] = np.repeat(
          np.asarray([known[int(row)] for row in drawn.ids], np.float32), group)
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


def _repeat(values, times):
  return [value for value in values for _ in range(times)]


class _Clock:
  """Seconds of each stage, as timing_s/* metrics; a stage that comes again adds up."""

  def __init__(self):
    self.laps, self._last = {}, time.perf_counter()

  def lap(self, name):
    now, name = time.perf_counter(), f'timing_s/{name}'
    self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
