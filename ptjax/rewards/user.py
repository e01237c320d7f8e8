"""Reward functions from the user's own files: `path/to/file.py:function`."""

import hashlib
import importlib.util
import pathlib
import sys

from ptjax import config


def load_function(path, name):
  """Imports the Python file at `path` and returns its function `name`.

  The file's folder joins the end of `sys.path`, so it may import its neighbours.

  Raises:
    config.UserError: no such file, it fails to import, it has no such name (the functions it has
      are listed), or the name is not a function.
  """
  file = pathlib.Path(path).expanduser()
  where = f'reward {path}:{name}'
  if not file.is_file():
    what = 'is a folder' if file.is_dir() else 'no such file'
    raise config.UserError(f'{where}: {what}: {file.absolute()}')
  module = _import(file.resolve(), where)
  if not hasattr(module, name):
    functions = [key for key, value in vars(module).items()
                 if callable(value) and not key.startswith('_')
                 and getattr(value, '__module__', None) == module.__name__]
    hint = config.near_names(name, functions) if functions else '; the file defines no function'
    raise config.UserError(f'{where}: the file has no {name!r}{hint}')
  function = getattr(module, name)
  if isinstance(function, type) or not callable(function):
    kind = 'a class' if isinstance(function, type) else f'of type {type(function).__name__}'
    raise config.UserError(f'{where}: {name!r} is {kind}, expected a function '
                           'f(prompts, completions, **columns)')
  return function


def _import(file, where):
  if str(file.parent) not in sys.path:
    sys.path.append(str(file.parent))
  module_name = f'{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}'
  spec = importlib.util.spec_from_file_location(module_name, file)
  if spec is None:
    raise config.UserError(f'{where}: not a Python file, expected a name ending in .py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[module_name] = module  # dataclasses and pickling look it up there
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    del sys.modules[module_name]
    raise config.UserError(
        f'{where}: importing the file failed: {type(error).__name__}: {error}') from error
  return module
