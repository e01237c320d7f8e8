"""Folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil

import jax
from jax.experimental import multihost_utils

from ptjax import config as settings


@contextlib.contextmanager
def replacing(out_dir, marker, kind):
  """Yields a folder to write into, which takes the place of `out_dir` when the block ends well.

  With several processes each enters it, and process 0 alone may write.

  Args:
    out_dir: the folder to appear; an earlier one of the same kind is replaced.
    marker: name of the file that tells this kind; it must be written.
    kind: what the folder holds, for messages.
  Raises:
    UserError: `out_dir` holds something else, which would be lost.
  """
  out_dir = os.path.abspath(os.fspath(out_dir))
  if os.path.exists(out_dir) and not os.path.exists(os.path.join(out_dir, marker)) and (
      not os.path.isdir(out_dir) or os.listdir(out_dir)):
    raise settings.UserError(f'{out_dir} exists and is not {kind} directory; it would be lost, so '
                             'choose another one')
  temporary, previous = (f'{out_dir}.{what}-{os.getpid()}' for what in ('partial', 'previous'))
  writer = jax.process_index() == 0
  try:
    if writer:
      os.makedirs(temporary)
    yield temporary
    if writer:
      for name in os.listdir(temporary):  # safetensors makes its files private
        shutil.copymode(os.path.join(temporary, marker), os.path.join(temporary, name))
      if os.path.exists(out_dir):
        os.rename(out_dir, previous)
      os.rename(temporary, out_dir)
      shutil.rmtree(previous, ignore_errors=True)
  finally:
    if writer:
      shutil.rmtree(temporary, ignore_errors=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('folder')  # nobody reads before it is there


def read_json(path):
  """Reads a JSON object.

  Raises:
    UserError: the file is not JSON, or not an object.
  """
  try:
    with open(path, encoding='utf-8') as file:
      raw = json.load(file)
  except ValueError as error:
    raise settings.UserError(f'{path} is not JSON: {error}') from None
  if not isinstance(raw, dict):
    raise settings.UserError(f'{path} must hold a JSON object, not {type(raw).__name__}')
  return raw


def write_json(path, value):
  """Writes `value` as indented JSON."""
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(value, file, indent=2)
    file.write('\n')
