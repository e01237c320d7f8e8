"""What the scripts with absl flags share: their front door, rows, the model they ask, files."""

import functools
import json
import os
import pathlib
import sys

from absl import flags

from ptjax import config as settings
from ptjax.data import sources


def run(name, says, options, argv, act):
  """Reads the flags and acts; returns the exit code, 2 for what the user can set right.

  Args:
    name: the script's, for its one-line errors.
    says: its docstring, for --help.
    options: absl's FlagValues, not parsed yet.
    argv: the command line, the program's name first.
    act: `act(options)`; it raises a UserError for what cannot be done.
  """
  try:
    if any(argument in ('--help', '-h', '--helpfull') for argument in argv[1:]):
      print(f'{says}\nFlags:\n{options.get_help()}')
      return 0
    rest = options(argv)[1:]
    if rest:
      raise settings.UserError(f'unexpected argument {rest[0]!r}; flags start with --')
    act(options)
    return 0
  except (settings.UserError, flags.Error) as error:
    print(f'{name}: {error}', file=sys.stderr)
    return 2


def load_rows(options):
  """Returns the rows that --dataset names, by way of --columns, --limit and --seed.

  Raises:
    UserError: no such data set or column, or a mapping that is none.
  """
  columns = {}
  for mapping in options.columns:
    ours, equals, theirs = mapping.partition('=')
    if not equals:
      raise settings.UserError(f'--columns={mapping}: expected ours=theirs, e.g. prompt=question')
    columns[ours] = theirs
  return sources.load(options.dataset, columns=columns, limit=options.limit, seed=options.seed)


def load_weights(policy):
  """Returns the mesh of all devices and the parameters of an assembly.Policy on it."""
  # Not every script asks a model, and its libraries take seconds to load.
  from ptjax import process
  from ptjax import sharding
  process.use_compile_cache('auto')
  mesh = sharding.make_mesh('')
  return mesh, policy.load(functools.partial(sharding.tree_sharding, mesh))


def output(path):
  """Returns `path` as a pathlib.Path; a UserError where its folder does not exist."""
  path = pathlib.Path(path)
  if not path.absolute().parent.is_dir():
    raise settings.UserError(f'--out={path}: no such folder {path.absolute().parent}')
  return path


def write_rows(path, rows):
  """Writes JSON lines: a reader, or a kill, sees the file whole or not at all."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
