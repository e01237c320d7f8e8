"""Typed overrides: `--set a.b=value` on a config, read by the field's type."""

import ast
import dataclasses
import difflib
import types as python_types
import typing

from ptjax import config as settings


def override(config, assignment):
  """Returns `config` with one `a.b=value` assignment applied.

  The value is read by the field's type; siblings keep their values. Under `loss` and
  `data.columns` any name goes (the loss's signature and the data door check them).

  Raises:
    UserError: no `=`, an unknown key (near names listed), or a value of the wrong type.
  """
  path, equals, text = assignment.partition('=')
  if not equals:
    raise settings.UserError(
        f'--set {assignment}: expected key=value, e.g. optimizer.learning_rate=1e-6')
  return assign(config, path.strip(), text)


def assign(config, path, value):
  """Returns `config` with the setting `a.b` of `path` replaced; text is read by the field's type.

  Raises:
    UserError: see `override`.
  """
  return _replace(config, path.split('.'), value, path)


def _replace(node, keys, text, path):
  names = {f.name: f for f in dataclasses.fields(node)}
  if keys[0] not in names:
    raise settings.UserError(f'--set {path}: unknown key {keys[0]!r}'
                             + settings.near_names(keys[0], _candidates(names, keys)))
  field, value = names[keys[0]], getattr(node, keys[0])
  if dataclasses.is_dataclass(value):
    if len(keys) == 1:
      inner = ', '.join(f'{path}.{f.name}' for f in dataclasses.fields(value))
      raise settings.UserError(f'--set {path}: a section, not a setting; set one of {inner}')
    new = _replace(value, keys[1:], text, path)
  elif keys[0] == 'stages':
    if len(keys) < 3:
      raise settings.UserError(f'--set {path}: expected stages.<algo>.<setting>=value')
    stage = {**value.get(keys[1], {}), '.'.join(keys[2:]): text}
    new = {**value, keys[1]: stage}
  elif field.type is dict:
    if len(keys) != 2:
      raise settings.UserError(f'--set {path}: expected {keys[0]}.<name>=value')
    as_text = keys[0] == 'columns' or not isinstance(text, str)
    new = {**value, keys[1]: text if as_text else _literal(text)}
  elif len(keys) > 1:
    raise settings.UserError(f'--set {path}: {keys[0]} is a setting, not a section')
  else:
    new = parse(text, field.type, path) if isinstance(text, str) else text
  return dataclasses.replace(node, **{keys[0]: new})


def _candidates(names, keys):
  """What a misspelt key may have meant: its siblings, or a setting inside a section."""
  inner = {f'{section}.{f.name}': f.name for section, field in names.items()
           if dataclasses.is_dataclass(field.type) for f in dataclasses.fields(field.type)}
  near = difflib.get_close_matches(keys[0], inner.values(), n=2, cutoff=0.7)
  if len(keys) == 1 and near:
    return [path for path, name in inner.items() if name in near]
  return list(names)


def parse(text, kind, path):
  """Reads `text` as a value of type `kind`; raises UserError naming `path`."""
  if isinstance(kind, python_types.UnionType):
    if text.lower() in ('none', 'null'):
      return None
    kind = next(k for k in typing.get_args(kind) if k is not type(None))
  if typing.get_origin(kind) is tuple:
    inner = typing.get_args(kind)[0]
    return tuple(parse(part.strip(), inner, path) for part in text.split(',') if part.strip())
  try:
    if kind is bool:
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if kind is int:
      number = float(text)
      if number != int(number):
        raise ValueError
      return int(number)
    return kind(text)
  except (ValueError, KeyError, OverflowError):
    raise settings.UserError(
        f'--set {path}={text}: expected {kind.__name__}, got {text!r}') from None


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
