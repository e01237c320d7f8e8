"""Batches from a data set: one per optimizer step, a pure function of the step."""

import time

import numpy as np

from ptjax import keys
from ptjax import sharding
from ptjax import types
from ptjax.training import step as training_step


class OfflineSource:
  """Turns a step number into a batch of the data set.

  Args:
    door: data.offline.OfflineDoor, or any other with its `batch` and `epoch`.
    mesh: where batches are placed, or None.
  """
  waits_for_params = False

  def __init__(self, door, *, mesh=None):
    self._door = door
    self._mesh = mesh

  def batch(self, params, step, loss_state=None):
    """Returns the placed batch of `step` (0-based), its metrics, and no samples."""
    del params, loss_state
    batch = self._door.batch(step)
    metrics = {'epoch': self._door.epoch(step), 'train_tokens': int(batch.loss_mask.sum())}
    return training_step.place(batch, self._mesh), metrics, None

  def complete(self, step, metrics):
    del step, metrics

  def pending(self, step):
    del step
    return None, {}

  def restore(self, arrays, metrics):
    del arrays, metrics
