"""Batches from rollouts: one rollout feeds `epochs x mini_batches` optimizer steps."""

import jax
import numpy as np

from ptjax import keys
from ptjax import types
from ptjax.training import experience
from ptjax.training import state as training_state
from ptjax.training import step as training_step


class RolloutSource:
  """Turns a step number into a batch; all else follows from (seed, step, parameters).

  Args:
    collector: experience.Collector.
    training: config.TrainingSettings.
    seed: the run's seed.
    mesh: where batches are placed, or None.
    samples_every: optimizer steps between rollouts that give samples; the stage's first and last
      rollout always do.
    lay_out: `batch -> batch` of an update, which may pack it.
    learners: name -> object whose `memory` a checkpoint must hold: samplers, packers.
  """
  waits_for_params = True  # sampling needs the newest, so nothing is gained by running ahead

  def __init__(self, collector, training, *, seed, mesh=None, samples_every=1,
               lay_out=lambda batch: batch, learners=None):
    self._collector = collector
    self._training = training
    self._seed = seed
    self._mesh = mesh
    self._samples_every = samples_every
    self._lay_out = lay_out
    self._learners = learners or {}
    self._experience = None
    self.updates_per_rollout = training.mini_batches * training.epochs

  def batch(self, params, step, loss_state=None):
    """Returns the placed batch of `step` (0-based), its metrics, and samples when they are due."""
    index, update = divmod(step, self.updates_per_rollout)
    samples = None
    if update == 0:
      self._experience = self._collector(params, index, loss_state)
      samples = self._experience.samples if self._samples_due(index) else None
    whole = self._experience.batch
    reuses = not bool(whole.on_policy)
    epoch, part = divmod(update, self._training.mini_batches)
    batch = mini_batch(
        whole, index=part, count=self._training.mini_batches, seed=self._seed, rollout=index,
        epoch=epoch, on_policy=update == 0 and not reuses)
    metrics = dict(self._experience.metrics)
    if update:
      metrics = {k: v for k, v in metrics.items() if not k.startswith(('timing_s/', 'perf/'))}
    metrics['rollout_tokens'] = int(whole.loss_mask.sum()) if update == 0 else 0
    metrics['train_tokens'] = int(batch.loss_mask.sum())
    return training_step.place(self._lay_out(batch), self._mesh), metrics, samples

  def complete(self, step, metrics):
    """Completes the metrics of `step`, in place, once the device has given them.

    How far sampler and trainer are apart is seen by a rollout's first update: later ones have
    moved the policy. They see it again only where old log-probs were recomputed before the first;
    else what the first update saw stands for all.
    """
    if 'old_log_probs' in self._experience.batch.inputs:
      return
    seen = self._experience.metrics if step % self.updates_per_rollout else metrics
    seen = {name: value for name, value in seen.items() if name.startswith('sampling/')}
    metrics.update(seen)
    self._experience.metrics.update(seen)

  def _samples_due(self, index):
    first = index * self.updates_per_rollout
    last = first + self.updates_per_rollout >= self._training.steps
    crossed = first // self._samples_every != (
        first - self.updates_per_rollout) // self._samples_every
    return index == 0 or last or crossed

  def pending(self, step):
    """What a checkpoint after `step` steps must hold: the rollout in the middle of its updates.

    Its batch is held as it was drawn. How it is packed and how the next one is drawn also depends,
    by rounding, on what packers and samplers have seen.
    """
    metrics = training_state.memories(self._learners)
    if step % self.updates_per_rollout == 0:
      return None, metrics
    batch = self._experience.batch
    arrays = {'prompt_tokens': batch.prompt_tokens, 'prompt_lengths': batch.prompt_lengths,
              'tokens': batch.tokens, 'loss_mask': batch.loss_mask, 'on_policy': batch.on_policy,
              **{f'input:{name}': x for name, x in batch.inputs.items()}}
    return {k: np.asarray(v) for k, v in arrays.items()}, {**self._experience.metrics, **metrics}

  def restore(self, arrays, metrics):
    """Takes back what `pending` gave."""
    metrics = dict(metrics)
    training_state.remember(self._learners, metrics)
    if arrays is None:
      return
    arrays = dict(arrays)
    inputs = {k.removeprefix('input:'): arrays.pop(k)
              for k in list(arrays) if k.startswith('input:')}
    batch = types.TokenBatch(**arrays, inputs=inputs)
    self._experience = experience.Experience(jax.tree.map(np.asarray, batch), metrics, [])


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
