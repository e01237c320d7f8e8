"""metrics.jsonl, samples.jsonl and TensorBoard events of a run.

metrics.jsonl holds one JSON object per optimizer step, in ascending order of `step`. A metric that
does not apply is absent; one that is NaN or infinite is null, since JSON knows neither. The file
is the only source of report.html.
"""

import contextlib
import json
import math
import os
import pathlib
import sys

from absl import logging
import jax
import numpy as np

METRICS = 'metrics.jsonl'
SAMPLES = 'samples.jsonl'

_INTERVAL_PARTS = ('_se', '_low', '_high')  # what evaluation puts beside a metric


class MetricsWriter:
  """Appends records; on processes other than the first it does nothing.

  Args:
    out_dir: the run's folder, which exists.
    resume_step: the step of the checkpoint the run goes on from: later records are removed, for
      those steps are about to be taken again. None starts both files anew.
    tensorboard: whether to write TensorBoard events beside them.
  """

  def __init__(self, out_dir, *, resume_step=None, tensorboard=True):
    self._last_step = -1 if resume_step is None else resume_step
    self._files = {}
    self._events = None
    if jax.process_index() != 0:
      return
    for name in (METRICS, SAMPLES):
      path = pathlib.Path(out_dir) / name
      last = truncate(path, -1 if resume_step is None else resume_step)
      if name == METRICS and resume_step and (last is None or last < resume_step):
        logging.warning('%s ends at step %s, before step %d from which the run goes on: the '
                        'records in between were lost', path, last, resume_step)
      # A lone surrogate in a prompt becomes an escape such as \ud800, as JSON spells it too.
      self._files[name] = open(path, 'a', encoding='utf-8', errors='backslashreplace')
    if tensorboard:
      self._events = _open_events(out_dir, first_step=self._last_step + 1)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def write(self, step, metrics):
    """Writes the record of an optimizer step; it is in the file when this returns.

    Write the record of a step before its checkpoint: then no kill leaves a gap.

    Args:
      step: int, larger than in every call before.
      metrics: name -> number, NumPy or jax scalar, bool or string; None leaves the name out.
    Raises:
      ValueError: the step was written before, or a value is no scalar.
    """
    if step <= self._last_step:
      raise ValueError(f'metrics of step {step} follow those of step {self._last_step}')
    self._last_step = step
    if not self._files:
      return
    record = {'step': step, **_plain(metrics)}
    self._append(METRICS, record)
    if self._events is not None:
      for name, value in record.items():
        if name != 'step' and isinstance(value, (int, float)):
          self._events.add_scalar(name, value, step)

  def write_samples(self, step, samples):
    """Writes one line per sample.

    Args:
      step: int, the optimizer step that trains on them.
      samples: dicts with `prompt`, `completion`, numbers such as `reward`, and lists with an entry
        per token such as `log_probs`.
    """
    for sample in samples if self._files else ():
      self._append(SAMPLES, {'step': step, **_plain(sample, lists=True)})

  def close(self):
    """Closes the files; further writes fail."""
    for file in self._files.values():
      file.close()
    if self._events is not None:
      self._events.close()
      self._events = None

  def _append(self, name, record):
    self._files[name].write(json.dumps(record, ensure_ascii=False, allow_nan=False) + '\n')
    self._files[name].flush()


def read(path):
  """Returns the records of a .jsonl file, [] if there is none.

  Lines that cannot be read, such as a last one cut by a kill, are left out.
  """
  return [record for _, record in _lines(pathlib.Path(path)) if record is not None]


def names(records, prefix=''):
  """Metric names in order of first appearance, without step, stage and the parts of intervals."""
  found = {name: None for record in records for name in record if name.startswith(prefix)}
  return [name for name in found if name not in ('step', 'stage') and not any(
      name.endswith(part) and name.removesuffix(part) in found for part in _INTERVAL_PARTS)]


def by_stage(records):
  """{stage: its records}, in order; a run's stages do not interleave."""
  stages = {}
  for record in records:
    stages.setdefault(str(record.get('stage', 'training')), []).append(record)
  return stages


def last(records, name):
  """The last record that has a value for `name`, or None."""
  return next((r for r in reversed(records) if r.get(name) is not None), None)


def interval(record, name):
  """The (low, high) that an evaluation put beside `name`, or None."""
  low, high = record.get(f'{name}_low'), record.get(f'{name}_high')
  return None if low is None or high is None else (low, high)


def truncate(path, last_step):
  """Removes records after `last_step` and unreadable lines, in one atomic replacement.

  Returns:
    The step of the last record left, or None if none is.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return None
  temporary = path.with_name(f'.{path.name}.tmp')
  left, unreadable = None, []
  with open(temporary, 'w', encoding='utf-8') as kept:
    for number, (line, record) in enumerate(_lines(path), start=1):
      if record is None:
        unreadable.append(number)
      elif record['step'] <= last_step:
        kept.write(line + '\n')
        left = record['step']
    kept.flush()
    os.fsync(kept.fileno())
  os.replace(temporary, path)
  if unreadable:
    logging.warning('%s: removed unreadable line %s', path, ', '.join(map(str, unreadable)))
  return left


def _lines(path):
  """Yields (line, record); the record is None where the line is not an object with a step."""
  if not path.exists():
    return
  with open(path, encoding='utf-8', errors='replace') as f:
    for line in f:
      try:
        record = json.loads(line)
        int(record['step'])
      except (ValueError, TypeError, KeyError):
        record = None
      yield line.rstrip('\n'), record


def _plain(values, lists=False):
  """Values as JSON holds them; see `MetricsWriter.write`."""
  return {str(name): _plain_value(name, value, lists) for name, value in values.items()
          if value is not None}


def _plain_value(name, value, lists):
  if isinstance(value, dict):
    return _plain(value, lists)
  if lists and isinstance(value, list):
    return [_plain_value(name, item, lists) for item in value]
  if isinstance(value, (str, bool, int)):
    return value
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in 'OSU':
    raise ValueError(f'metric {name!r} is no scalar: {type(value).__name__} of shape {array.shape}')
  if array.dtype.kind not in 'biu':
    array = array.astype(np.float64)  # ml_dtypes' bfloat16 too
  number = array.reshape(()).item()
  return None if isinstance(number, float) and not math.isfinite(number) else number


@contextlib.contextmanager
def _hidden(name):
  """Makes a package that is not loaded yet look as if it were not installed."""
  if name in sys.modules:
    yield
    return
  sys.modules[name] = None
  try:
    yield
  finally:
    del sys.modules[name]


def _open_events(out_dir, first_step):
  """A tensorboardX writer whose older events from `first_step` on are hidden, or None."""
  try:
    with _hidden('torch'):  # which it would load where there is one: seconds, for nothing
      import tensorboardX  # here, so that a run without the package still has its metrics
  except ImportError:
    logging.warning('tensorboardX is not installed: no TensorBoard events (python -m pip install '
                    'tensorboardX, or --set log.tensorboard=false)')
    return None
  return tensorboardX.SummaryWriter(str(out_dir), purge_step=first_step)
