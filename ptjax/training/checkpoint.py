"""Checkpoints: one folder per step, written in the background, complete or not there at all.

    <directory>/<step>/arrays      orbax: the train state, any pytree of arrays, possibly sharded
    <directory>/<step>/experience  orbax: host arrays of a rollout not yet used up, if there is one
    <directory>/<step>/record      JSON: the caller's metadata and the path, shape and dtype of
                                   every leaf of `arrays`
    <directory>/<step>/inventory.json  size of every file above

orbax writes into a temporary folder and renames it, so a killed process leaves no half checkpoint.
What remains is damage after the fact (a lost disk cache, a partial copy): the inventory finds
missing and cut files without reading the arrays, checksums inside the arrays find the rest, and
`restore` then goes back to the checkpoint before.
"""

import json
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ptjax import config as settings

_ITEMS = ('arrays', 'experience', 'record')
_INVENTORY = 'inventory.json'
_SAVE_TIMEOUT_SECONDS = 3600  # a large state on a slow shared disk; orbax's own limit is shorter


class Restored(NamedTuple):
  """What `restore` returns."""
  step: int
  arrays: Any  # the target's structure, each leaf with the target's sharding
  metadata: dict
  experience: dict | None  # nested dict of NumPy arrays


class Checkpointer:
  """Saves and restores the checkpoints of one folder. One writer at a time (see run_folder).

  Every method is called on all processes of a multi-host job, in the same order.

  Args:
    directory: the folder, created if missing.
    keep: newest checkpoints kept.
    keep_every_steps: if given, checkpoints of its multiples are kept for ever as well.
    asynchronous: if False, `save` returns when the checkpoint is complete.
  """

  def __init__(self, directory, *, keep, keep_every_steps=None, asynchronous=True):
    self._directory = pathlib.Path(directory).absolute()  # orbax takes no relative path
    self._asynchronous = asynchronous
    self._unreadable = set()  # steps found damaged; the next save removes them
    self._saving = None  # the step being written
    self._directory.mkdir(parents=True, exist_ok=True)
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every_steps:
      policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
    self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=_SAVE_TIMEOUT_SECONDS,
                post_finalization_callback=self._write_inventory)),
        item_handlers={
            'arrays': ocp.StandardCheckpointHandler(),
            'experience': ocp.StandardCheckpointHandler(),
            'record': ocp.JsonCheckpointHandler()})

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def save(self, step, arrays, metadata, *, experience=None):
    """Starts writing the checkpoint of `step`, after waiting for the one before.

    When this returns, everything has been copied to the host or is held there: the caller may
    donate or overwrite all arrays.

    Args:
      step: int, the number of optimizer steps taken.
      arrays: pytree of jax or NumPy arrays.
      metadata: what JSON can hold.
      experience: nested dict of host arrays (the same on every process), or None.
    Returns:
      False if there is a checkpoint of `step` already, which then stays as it is.
    Raises:
      TypeError: metadata that JSON cannot hold.
      Exception: what went wrong while the checkpoint before this one was being written.
    """
    self.wait()
    for damaged in sorted(self._unreadable):
      self._manager.delete(damaged)
    self._unreadable.clear()
    if step in self.steps():
      return False
    record = {'metadata': metadata, 'leaves': _describe(arrays),
              'has_experience': experience is not None}
    json.dumps(record)  # fails here, not in the background
    items = {'arrays': ocp.args.StandardSave(arrays), 'record': ocp.args.JsonSave(record)}
    if experience is not None:
      items['experience'] = ocp.args.StandardSave(jax.tree.map(np.asarray, experience))
    self._saving = step
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    if not self._asynchronous:
      self.wait()
    return True

  def steps(self):
    """Steps with a checkpoint, damaged ones included, in ascending order."""
    return sorted(self._manager.all_steps())

  def latest(self):
    """`(step, metadata)` of the newest checkpoint that looks whole, or None; reads no arrays."""
    found = self._newest()
    return None if found is None else (found[0], found[1]['metadata'])

  def restore(self, target):
    """Reads the newest checkpoint that can be read, skipping damaged ones with a warning.

    Args:
      target: the saved tree's structure with jax.ShapeDtypeStruct leaves that carry a sharding
        (or jax arrays, which then give shape, dtype and sharding). The mesh need not be the one
        of the run that saved. A leaf without sharding goes to the default device. Or a function
        from a checkpoint's metadata to such a tree, for runs whose state changes its structure
        on the way: going back a checkpoint may mean going back a stage.
    Returns:
      Restored, or None if the folder holds no checkpoint.
    Raises:
      UserError: the checkpoint holds other leaves, shapes or dtypes than the target; or there are
        checkpoints, but none can be read.
    """
    while (found := self._newest()) is not None:
      step, record = found
      wanted = target(record['metadata']) if callable(target) else target
      wanted = jax.tree.map(_as_target, wanted)
      _check_fits(self._directory / str(step), record['leaves'], _describe(wanted))
      items = {'arrays': ocp.args.StandardRestore(wanted)}
      if record['has_experience']:
        items['experience'] = ocp.args.StandardRestore()
      try:
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
      except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the checkpoint is not to blame
      except Exception as error:  # orbax and tensorstore raise many types for damaged files
        self._skip(step, _one_line(error))
        continue
      return Restored(
          step, restored['arrays'], record['metadata'], restored.get('experience'))
    return None

  def wait(self):
    """Returns when nothing is being written; raises what went wrong while writing."""
    try:
      self._manager.wait_until_finished()
    except BaseException:
      self._manager.reload()  # forget the step that was not written
      raise

  def close(self):
    """Waits, then frees threads."""
    self._manager.close()

  def _newest(self):
    """(step, record) of the newest checkpoint not known to be damaged, or None if there is none."""
    self.wait()
    for step in reversed(self.steps()):
      record = None if step in self._unreadable else self._record(step)
      if record is not None:
        return step, record
    if self._unreadable:
      raise settings.UserError(
          f'{self._directory}: no checkpoint can be read (tried '
          f'{", ".join(str(s) for s in sorted(self._unreadable, reverse=True))}); restore them '
          'from a copy, or remove the folder to start again')
    return None

  def _record(self, step):
    """The record of a checkpoint that is whole as far as file sizes tell, else None."""
    problem, record = None, None
    if jax.process_index() == 0:
      problem = self._missing(step)
    if _agree(problem is None):
      try:
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=items)['record']
        record['metadata'], record['leaves'], record['has_experience']
      except Exception as error:  # cut or missing JSON, in several guises
        problem, record = _one_line(error), None
    if record is None:
      self._skip(step, problem)
    return record

  def _missing(self, step):
    """Says which file of a checkpoint is missing or cut, or None; process 0 only."""
    folder = self._directory / str(step)
    try:
      sizes = json.loads((folder / _INVENTORY).read_text())
    except (OSError, ValueError):
      sizes = {}  # lost as well: the arrays' own checksums have to do
    for name, size in sizes.items():
      try:
        found = (folder / name).stat().st_size
      except OSError:
        return f'{name} is missing'
      if found != size:
        return f'{name} has {found} of {size} bytes'
    return None

  def _skip(self, step, problem):
    self._unreadable.add(step)
    logging.warning('checkpoint %s cannot be read (%s); falling back to the one before',
                    self._directory / str(step), problem or 'see process 0')

  def _write_inventory(self):
    """Runs on process 0 in orbax's thread when all files are written, just before the rename."""
    folders = [f for f in self._directory.glob(f'{self._saving}*')
               if f.name.partition('.')[0] == str(self._saving)]
    for folder in folders:
      sizes = {str(f.relative_to(folder)): f.stat().st_size
               for item in _ITEMS for f in (folder / item).rglob('*') if f.is_file()}
      (folder / _INVENTORY).write_text(json.dumps(sizes))


def _agree(flag):
  """Process 0's `flag`, on every process."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _describe(tree):
  """{leaf path: [shape, dtype]} in the form JSON gives back."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'):
          [list(np.shape(leaf)), str(leaf.dtype)] for path, leaf in leaves}


def _as_target(leaf):
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fits(folder, saved, wanted):
  """Raises UserError naming the leaves in which a checkpoint and the target differ."""
  problems = []
  for name in sorted(saved.keys() | wanted.keys()):
    if name not in wanted:
      problems.append(f'{name} is saved but not expected')
    elif name not in saved:
      problems.append(f'{name} is expected but not saved')
    elif saved[name] != wanted[name]:
      problems.append(f'{name} is {_spell(saved[name])}, expected {_spell(wanted[name])}')
  if problems:
    more = f' (and {len(problems) - 4} more)' if len(problems) > 4 else ''
    raise settings.UserError(
        f'checkpoint {folder} is of another model or optimizer: {"; ".join(problems[:4])}{more}; '
        'resume with the settings it was saved with, or choose another --out_dir')


def _spell(shape_and_dtype):
  shape, dtype = shape_and_dtype
  return f'{dtype}[{",".join(str(n) for n in shape)}]'


def _one_line(error):
  text = ' '.join(f'{type(error).__name__}: {error}'.split())
  return text if len(text) <= 200 else text[:200] + '...'
