"""The policy as a stage found it: its parameters kept on disk, or its log-probs of every row.

Online, the reference scores completions that are drawn as training goes on, so its parameters
stay. Offline it scores the same rows in every epoch, so it scores them once, before the first
step, and is gone: with the cache no reference is in memory.
"""

import os
import pathlib
import shutil

from absl import logging
import jax
import numpy as np

from ptjax import config as settings
from ptjax import sharding
from ptjax.data import log_prob_cache
from ptjax.training import checkpoint


def save_params(folder, params):
  """Keeps the parameters a stage starts from, for a resume."""
  with checkpoint.Checkpointer(folder, keep=1, asynchronous=False) as kept:
    kept.save(0, params, {})


def save_round(folder, number, params):
  """Keeps the policy a round starts from; a resumed run may come to the same round again."""
  path = pathlib.Path(folder) / f'round_{number}'
  if jax.process_index() == 0:
    shutil.rmtree(path, ignore_errors=True)
  sharding.gather_json(None)  # nobody writes before that
  save_params(path, params)


def drop_rounds(folder, oldest):
  """Deletes the rounds before `oldest`, whose policies no checkpoint needs any more."""
  if jax.process_index() == 0:
    for path in pathlib.Path(folder).glob('round_*'):
      if int(path.name.removeprefix('round_')) < oldest:
        shutil.rmtree(path, ignore_errors=True)


def load_params(folder, targets):
  """Takes back what `save_params` kept.

  Args:
    folder: as given to `save_params`.
    targets: tree of jax.ShapeDtypeStruct with shardings.
  Raises:
    UserError: it is gone.
  """
  with checkpoint.Checkpointer(folder, keep=1, asynchronous=False) as kept:
    found = kept.restore(targets)
  if found is None:
    raise settings.UserError(f'{folder} is gone, and with it the policy this stage started from; '
                             'restore it, or start anew in another --out_dir')
  return found.arrays


def attach(door, score, key, folders, *, parts, batch_size):
  """Gives a door's rows their reference log-probs, computed once and cached.

  Args:
    door: data.offline.OfflineDoor.
    score: `batch -> [B, T]` of a host batch, by the reference.
    key: log_prob_cache.Key of what the numbers depend on.
    folders: where they are kept; the first is looked in before anything is computed.
    parts: into how many parts a batch is split over devices.
    batch_size: examples computed together.
  Raises:
    UserError: what is kept in the first folder was changed, or is of another key.
  """
  shared, *_ = folders
  values = None if shared is None else log_prob_cache.load(shared, key)
  if values is None:
    values = _compute(door, score, parts, batch_size)
  for folder in filter(None, folders):
    if jax.process_index() == 0 and log_prob_cache.load(folder, key) is None:
      log_prob_cache.save(folder, key, values)
  door.attach('reference_log_probs', values)


def attach_zeros(door):
  """Gives a door's rows log-probs of 0, for a plan, which asks of batches their shapes alone."""
  door.attach('reference_log_probs', [
      np.broadcast_to(np.float32(0), len(completion))
      for group in door.examples.completions for completion in group])


def restore(door, key, folder):
  """Gives a door's rows the log-probs that `attach` kept in `folder`.

  Raises:
    UserError: they are gone, were changed, or are of other rows.
  """
  values = log_prob_cache.load(folder, key)
  if values is None:
    raise settings.UserError(
        f'{folder} is gone, and with it the log-probs of the policy this stage started from; '
        'restore it, or start anew in another --out_dir')
  door.attach('reference_log_probs', values)


def _compute(door, score, parts, batch_size):
  """The log-probs of every completion of every example, in example order."""
  size = -(-min(batch_size, len(door)) // parts) * parts
  completions = door.examples.lengths()[1]
  order = door.in_turn()
  values = [None] * len(order)
  logging.info('reference log-probs of %d rows', len(order))
  for start in range(0, len(order), size):
    places = order[np.minimum(np.arange(start, start + size), len(order) - 1)]
    batch = door.take(places)
    found = score(batch)
    group = len(found) // size
    for i, place in enumerate(places[:len(order) - start]):
      values[int(place)] = [found[i * group + g, :length]
                            for g, length in enumerate(completions[place])]
  return [row for example in values for row in example]


def cache_folder(setting, dataset, fallback):
  """Where the log-probs of a data set's rows are kept: beside it, or where the user says.

  Args:
    setting: `data.reference_cache`: 'auto', a folder, or None.
    dataset: the data set's name.
    fallback: for data sets that are no local file, or lie where nothing can be written.
  """
  if setting != 'auto':
    return setting
  path = pathlib.Path(dataset.partition('@')[0])
  beside = path.parent if path.is_file() else path if path.is_dir() else None
  if beside is not None and os.access(beside, os.W_OK):
    return str(beside / '.ptjax_log_probs')
  return fallback
