"""Batches from a data set: one per optimizer step, a pure function of the step."""

import time

import numpy as np

from ptjax import keys
from ptjax import sharding
from ptjax import types
from ptjax.training import state as training_state
from ptjax.training import step as training_step


class OfflineSource:
  """Turns a step number into a batch of the data set.

  Args:
    door: data.offline.OfflineDoor, or any other with its `batch` and `epoch`.
    mesh: where batches are placed, or None.
    lay_out: `batch -> batch`, which may pack it.
  """
  waits_for_params = False

  def __init__(self, door, *, mesh=None, lay_out=lambda batch: batch):
    self._door = door
    self._mesh = mesh
    self._lay_out = lay_out

  def batch(self, params, step, loss_state=None):
    """Returns the placed batch of `step` (0-based), its metrics, and no samples."""
    del params, loss_state
    batch = self._door.batch(step)
    metrics = {'epoch': self._door.epoch(step), 'train_tokens': int(batch.loss_mask.sum())}
    return training_step.place(self._lay_out(batch), self._mesh), metrics, None

  def complete(self, step, metrics):
    del step, metrics

  def pending(self, step):
    del step
    return None, {}

  def restore(self, arrays, metrics):
    del arrays, metrics


class MixedSource(OfflineSource):
  """Batches of the data set of which some are the policy's own completions of its prompts.

  Args:
    door: data.offline.OfflineDoor.
    draw: `(params, prompts, key) -> Rollouts`, one completion per prompt.
    own_turn: `key -> [] bool`, whether a batch is the policy's own.
    seed: the run's seed.
    mesh: where batches are placed, or None.
    samplers: name -> rollout.sampler.Sampler that `draw` draws with.
  """
  waits_for_params = True  # sampling needs the newest

  def __init__(self, door, draw, own_turn, *, seed, mesh=None, samplers=None):
    super().__init__(door, mesh=mesh)
    self._samplers = samplers or {}
    self._draw, self._own_turn, self._seed = draw, own_turn, seed

  def batch(self, params, step, loss_state=None):
    """Returns what `OfflineSource.batch` does; a pure function of the parameters, seed and step."""
    if not self._own_turn(keys.stream(self._seed, 'own_turn', step)):
      batch, metrics, samples = super().batch(params, step, loss_state)
      return batch, {**metrics, 'distillation/own_samples': 0.0}, samples
    started = time.perf_counter()
    shown = self._door.batch(step)
    count = len(shown.prompt_lengths)
    prompts = types.Prompts(
        tokens=shown.prompt_tokens, lengths=shown.prompt_lengths,
        ids=np.asarray(self._door.rows(step), np.int32), sample_ids=np.zeros((count, 1), np.int32))
    drawn = sharding.fetch(self._draw(params, prompts, keys.stream(self._seed, 'rollout', step)))
    batch = shown.replace(tokens=drawn.tokens, loss_mask=drawn.loss_mask, inputs={})
    metrics = {'epoch': self._door.epoch(step), 'train_tokens': int(drawn.loss_mask.sum()),
               'distillation/own_samples': 1.0, 'timing_s/rollout': time.perf_counter() - started}
    return training_step.place(batch, self._mesh), metrics, None

  def pending(self, step):
    """What a checkpoint must hold: how the next completions are drawn depends on it by rounding."""
    del step
    return None, training_state.memories(self._samplers)

  def restore(self, arrays, metrics):
    del arrays
    training_state.remember(self._samplers, dict(metrics))
