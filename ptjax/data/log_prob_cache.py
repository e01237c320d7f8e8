"""Arrays computed once for the rows of a data set, kept on disk under what they depend on.

A file holds one float32 array per completion, the parts of its key and a checksum. What is read is
either exactly what was saved under the key asked for, or refused.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ptjax import config
from ptjax import sharding

_SUFFIX = '.safetensors'
_VERSION = '1'
_WORDS = {'weights': 'other weights', 'tokenizer': 'another tokenizer',
          'template': 'another chat template', 'rows': 'other rows (or rows cut differently)',
          'settings': 'other settings'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
  """What the arrays depend on: hex digests, '' where a part does not matter.

  None in a key that is asked for means any: a resumed run no longer has the first weights.
  """
  weights: str | None = ''  # `digest_params`
  tokenizer: str | None = ''  # `digest_tokenizer`
  template: str | None = ''  # `digest_template`
  rows: str | None = ''  # Examples.digest: token ids and which of them train
  settings: str | None = ''  # `digest_settings`, e.g. of a temperature

  def name(self):
    """Returns the name of the file that is kept under this key."""
    return digest_settings(dataclasses.asdict(self))[:32] + _SUFFIX


def digest_params(params):
  """Returns a hex digest of a parameter tree: names, types, shapes and values."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(sharding.fetch(leaf))
    found.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
    found.update(array.reshape(-1).view(np.uint8))
  return found.hexdigest()


def digest_tokenizer(tokenizer):
  """Returns a hex digest of how a tokenizer encodes text (its template is not part of it)."""
  if tokenizer.is_fast:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop('padding', None)  # set by whoever called it last
    state.pop('truncation', None)
  else:
    state = {'vocabulary': tokenizer.get_vocab(), 'special': tokenizer.all_special_tokens,
             'kind': type(tokenizer).__name__}
  return digest_settings(state)


def digest_template(tokenizer):
  """Returns a hex digest of a tokenizer's chat template, '' if it has none."""
  return digest_settings(tokenizer.chat_template) if tokenizer.chat_template else ''


def digest_settings(value):
  """Returns a hex digest of anything that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(folder, key, arrays):
  """Writes arrays, all at once or not at all.

  Args:
    folder: where; made if it is not there.
    key: Key without None.
    arrays: list of [T] arrays.
  Returns:
    pathlib.Path of the file.
  Raises:
    UserError: the folder cannot be written to.
  """
  folder = pathlib.Path(folder)
  lengths = np.array([len(array) for array in arrays], np.int64)
  values = np.concatenate([np.asarray(a, np.float32) for a in arrays] or [np.zeros(0, np.float32)])
  metadata = {'version': _VERSION, 'key': json.dumps(dataclasses.asdict(key)),
              'checksum': _checksum(values, lengths)}
  data = safetensors.numpy.save({'values': values, 'lengths': lengths}, metadata)
  path = folder / key.name()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, suffix='.partial')
    try:
      with os.fdopen(descriptor, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      pathlib.Path(temporary).unlink(missing_ok=True)
      raise
  except OSError as error:
    raise config.UserError(f'{folder}: cached log-probs cannot be written '
                           f'({error.strerror or error}); set data.reference_cache to another '
                           'folder') from error
  return path


def load(folder, key):
  """Reads the arrays kept under a key.

  Args:
    folder: where `save` put them.
    key: Key; with None for a part, the folder's only file is taken and its other parts must fit.
  Returns:
    List of [T] float32 arrays, or None where there is no such file.
  Raises:
    UserError: the file is damaged, was changed, or belongs to another key.
  """
  folder = pathlib.Path(folder)
  if None not in dataclasses.astuple(key):
    path = folder / key.name()
    return read(path, key) if path.is_file() else None
  found = sorted(folder.glob('*' + _SUFFIX))
  if len(found) > 1:
    raise config.UserError(f'{folder}: {len(found)} files of cached log-probs where one was '
                           'expected; delete those of other runs')
  return read(found[0], key) if found else None


def read(path, key):
  """Reads one file of `save`, which must have been kept under `key` (see `load`)."""
  path = pathlib.Path(path)
  remedy = f'delete {path} to have them computed anew'
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      values, lengths = file.get_tensor('values'), file.get_tensor('lengths')
    kept = json.loads(metadata['key'])
    checksum, version = metadata['checksum'], metadata['version']
  except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
    raise config.UserError(f'{path}: cached log-probs cannot be read '
                           f'({" ".join(str(error).split())}); {remedy}') from error
  if version != _VERSION:
    raise config.UserError(f'{path}: cached log-probs of version {version}, this program reads '
                           f'{_VERSION}; {remedy}')
  if checksum != _checksum(values, lengths) or int(lengths.sum()) != len(values):
    raise config.UserError(
        f'{path}: cached log-probs were changed since they were saved; {remedy}')
  wanted = dataclasses.asdict(key)
  wrong = [_WORDS[part] for part, value in wanted.items()
           if value is not None and kept.get(part, '') != value]
  if wrong:
    raise config.UserError(f'{path}: cached log-probs of {" and ".join(wrong)}; {remedy}')
  return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _checksum(values, lengths):
  found = hashlib.sha256(np.ascontiguousarray(lengths, '<i8').view(np.uint8))
  found.update(np.ascontiguousarray(values, '<f4').view(np.uint8))
  return found.hexdigest()
