"""The out_dir of a run: who holds it, what it was configured with, whether it goes on."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys

from absl import logging
import jax

from ptjax import config as settings

# What may differ when a run is continued: none of it changes what a training step computes. A
# trailing dot means the whole section. Another number of steps moves the end of a decaying
# schedule, which is what extending a run asks for; another mesh changes only rounding.
MAY_CHANGE = ('training.steps', 'out_dir', 'resume', 'mesh', 'log.', 'eval.', 'checkpoint.',
              'rewards.workers', 'plan.')

# Which rows train depends on these where rows that share text with them are dropped.
_DROPPED_BY = ('eval.dataset', 'eval.limit')

_PACKAGES = ('ptjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'numpy')


class RunFolder:
  """An out_dir held by this process until `close`.

  Attributes:
    path: pathlib.Path of the folder.
    checkpoints: pathlib.Path of its checkpoint folder.
    resuming: True if the folder holds checkpoints of the same config, from which to go on.
  """

  def __init__(self, path, lock, resuming):
    self.path = path
    self.checkpoints = path / 'checkpoints'
    self.resuming = resuming
    self._lock = lock

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def write_error(self, text):
    """Writes error.txt and returns its path; never raises, for it runs when something else has."""
    path = self.path / 'error.txt'
    try:
      write_atomically(path, text if text.endswith('\n') else text + '\n')
    except OSError as error:
      logging.error('could not write %s: %s', path, error)
    return path

  def close(self):
    """Lets other processes have the folder."""
    if self._lock is not None:
      self._lock.close()
      self._lock = None


def open_run(config, out_dir, *, argv=None):
  """Takes hold of `out_dir` and writes its config.json.

  Args:
    config: config.Config; its `resume` is 'auto' or 'never'.
    out_dir: the folder, created if missing.
    argv: the command that started the run, for the report; default sys.argv.
  Returns:
    RunFolder.
  Raises:
    UserError: the folder cannot be made or written, another process holds it, it holds a
      checkpoint and `resume` is 'never', or it holds one of another config (changed keys named).
  """
  path = pathlib.Path(out_dir).absolute()
  _make(path)
  primary = jax.process_index() == 0
  lock = _lock(path) if primary else None
  try:
    resuming = _decide(path, config)
    if primary:
      (path / 'error.txt').unlink(missing_ok=True)
      text = json.dumps(_describe_run(config, argv), indent=2)
      write_atomically(path / 'config.json', text + '\n')
  except OSError as error:
    if lock is not None:
      lock.close()
    raise settings.UserError(f'cannot write to {path}: {error.strerror or error}; '
                             'choose another --out_dir') from error
  except BaseException:
    if lock is not None:
      lock.close()
    raise
  return RunFolder(path, lock, resuming)


def check_writable(out_dir, bytes_needed):
  """Raises UserError unless `out_dir` can be written and its disk has `bytes_needed` bytes free."""
  path = pathlib.Path(out_dir).absolute()
  _make(path)
  probe = path / '.write_probe'
  try:
    with open(probe, 'wb') as f:
      f.write(bytes(1 << 16))
      f.flush()
      os.fsync(f.fileno())
  except OSError as error:
    raise settings.UserError(f'cannot write to {path}: {error.strerror or error}; '
                             'choose another --out_dir') from error
  finally:
    probe.unlink(missing_ok=True)
  free = shutil.disk_usage(path).free
  if free < bytes_needed:
    raise settings.UserError(
        f'{path} has {_spell(free)} free, but checkpoints and the exported model need about '
        f'{_spell(bytes_needed)}; free space, choose another --out_dir or lower checkpoint.keep')


def write_atomically(path, text):
  """Replaces the file at `path` by `text`: a reader, or a kill, sees the old one or the new one."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.tmp')
  with open(temporary, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def changed_keys(old, new):
  """Compares two configs as nested dicts.

  Returns:
    [(dotted key, old value, new value)], sorted; a missing value is `'(absent)'`.
  """
  old, new = flatten(_plain(old)), flatten(_plain(new))
  return [(key, old.get(key, '(absent)'), new.get(key, '(absent)'))
          for key in sorted(old.keys() | new.keys())
          if old.get(key, '(absent)') != new.get(key, '(absent)')]


def flatten(tree, prefix=''):
  """Nested dicts -> {dotted key: value}; an empty section vanishes."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      flat.update(flatten(value, f'{prefix}{key}.'))
    elif not isinstance(value, dict):
      flat[prefix + key] = value
  return flat


def _make(path):
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise settings.UserError(f'cannot create {path}: {error.strerror or error}; '
                             'choose another --out_dir') from error


def _lock(path):
  """Returns the open lock file; the operating system frees the lock however the process ends."""
  try:
    lock = open(path / '.lock', 'a+', encoding='utf-8')
  except OSError as error:
    raise settings.UserError(f'cannot write to {path}: {error.strerror or error}; '
                             'choose another --out_dir') from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    holder = lock.read().strip() or 'another process'
    lock.close()
    raise settings.UserError(f'{path} is in use by {holder}; wait for it, stop it, or choose '
                             'another --out_dir') from None
  except OSError as error:  # some network file systems have no locks
    logging.warning('%s cannot be locked (%s); make sure that no other run writes there',
                    path, error.strerror)
    return lock
  lock.seek(0)
  lock.truncate()
  lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  lock.flush()
  return lock


def _decide(path, config):
  """True if the run goes on from the folder's checkpoints; raises UserError if it must not."""
  folder = path / 'checkpoints'
  steps = [int(p.name) for p in folder.glob('*') if p.name.isdigit()] if folder.is_dir() else []
  if not steps:
    return False
  if config.resume == 'never':
    raise settings.UserError(
        f'{path} holds a checkpoint of step {max(steps)} and --resume=never; use --resume=auto to '
        'continue it, choose another --out_dir or remove the folder')
  try:
    saved = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    old = saved['config']
  except (OSError, ValueError, KeyError) as error:
    raise settings.UserError(
        f'{path} holds a checkpoint, but its config.json cannot be read '
        f'({type(error).__name__}: {error}); restore it or choose another --out_dir') from error
  refused = []
  for key, before, after in changed_keys(old, settings.to_dict(config)):
    if _may_change(key) and not (key in _DROPPED_BY and _drops(config)):
      logging.info('continuing with %s=%s (was %s)', key, after, before)
    else:
      refused.append(f'{key} was {json.dumps(before)}, now {json.dumps(after)}')
  if refused:
    raise settings.UserError(
        f'{path} holds a checkpoint of step {max(steps)} of another config: {"; ".join(refused)}. '
        'Set them back to continue it, or choose another --out_dir')
  versions = [f'{name} {before} -> {after}' for name, before, after
              in changed_keys(saved.get('versions', {}), _versions())]
  if versions:
    logging.warning('continuing a run made with other versions (%s): numbers may differ in their '
                    'last digits from an uninterrupted run', ', '.join(versions))
  return True


def _may_change(key):
  return any(key == name or (name.endswith('.') and key.startswith(name)) for name in MAY_CHANGE)


def _drops(config):
  """Whether some stage leaves out rows that share text with the rows to evaluate on."""
  asked = (stage.get('data.decontaminate') for stage in config.stages.values())
  return 'drop' in (config.data.decontaminate, *asked)


def _describe_run(config, argv):
  devices = jax.devices()
  return {
      'config': settings.to_dict(config),
      'seed': config.seed,
      'versions': _versions(),
      'git_revision': _git_revision(),
      'command': list(sys.argv if argv is None else argv),
      'devices': {'platform': devices[0].platform, 'kind': devices[0].device_kind,
                  'count': len(devices), 'processes': jax.process_count()},
      'started': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
  }


def _versions():
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # run from a source tree that is not installed
  return versions


def _git_revision():
  """The commit of the source tree that ptjax is imported from, or None if it is not from one."""
  package = pathlib.Path(__file__).resolve().parents[1]

  def git(*arguments):
    return subprocess.run(['git', '-C', str(package), *arguments], capture_output=True, text=True,
                          timeout=10, check=True).stdout.strip()
  try:
    git('ls-files', '--error-unmatch', '__init__.py')  # not merely installed below some repository
    changed = git('status', '--porcelain', '--untracked-files=no', '--', str(package))
    return git('rev-parse', 'HEAD') + ('-changed' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _plain(tree):
  """As JSON gives it back: lists for tuples."""
  return json.loads(json.dumps(tree))


def _spell(count):
  """123456789 -> '123.5 MB'."""
  for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
    if count < 1000 or unit == 'TB':
      return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.1f} {unit}'
    count /= 1000
