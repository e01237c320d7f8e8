"""Reads text files of rows, and says which line is at fault when one cannot be read.

JSON and CSV are read into plain Python objects with the standard library: row formats differ
(messages, missing keys, mixed types) in ways that a table of fixed types bends, and an error must
name the line. For data sets that fill the memory there is Parquet, which stays on disk.
"""

import array
import csv
import io
import json

from ptjax import config


def read_json_lines(path):
  """Reads one JSON object per line; blank lines are skipped.

  Args:
    path: `pathlib.Path` of the file.
  Returns:
    List of dicts.
  Raises:
    UserError: a line that is no JSON object, or no rows at all.
  """
  with open(path, 'rb') as file:  # in bytes, so that only \n ends a line
    rows = [_json_row(line, path, number) for number, line in enumerate(file, start=1)
            if not _blank(line)]
  return _not_empty(rows, path)


class JsonLines:
  """The rows of a JSON Lines file, read when they are asked for; 8 bytes a row stay in memory."""

  def __init__(self, path, *, look_at=1000):
    """Finds where the rows begin.

    Args:
      path: `pathlib.Path` of the file, which must not change from now on.
      look_at: rows whose columns are looked at.
    Raises:
      UserError: no rows, or one of those looked at is no JSON object.
    """
    self._path = path
    offsets, numbers, at = array.array('q'), array.array('q'), 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, start=1):
        if not _blank(line):
          offsets.append(at)
          numbers.append(number)
        at += len(line)
    self._offsets = _not_empty(offsets, path)
    # Behind a blank line a row's number is not its line's; rarely are there any.
    self._lines = numbers if numbers[-1] != len(numbers) else range(1, len(numbers) + 1)
    first = (self[i] for i in range(min(look_at, len(offsets))))
    self.column_names = list(dict.fromkeys(key for row in first for key in row))

  def __len__(self):
    return len(self._offsets)

  def __getitem__(self, index):
    with open(self._path, 'rb') as file:
      file.seek(self._offsets[index])
      return _json_row(file.readline(), self._path, self._lines[index])

  def __iter__(self):
    with open(self._path, 'rb') as file:
      for offset, line in zip(self._offsets, self._lines):
        file.seek(offset)
        yield _json_row(file.readline(), self._path, line)


def read_text(path):
  """Reads a whole text as one row with the column `text`.

  Args:
    path: `pathlib.Path` of the file.
  Returns:
    List of one dict.
  Raises:
    UserError: not UTF-8, or nothing in it.
  """
  text = _decode(path.read_bytes(), path)
  return _not_empty([{'text': text}] if text.strip() else [], path)


def read_json(path):
  """Reads a JSON file that holds a list of objects, or one object per line.

  Args:
    path: `pathlib.Path` of the file.
  Returns:
    List of dicts.
  Raises:
    UserError: malformed JSON (with its line), another shape, or no rows.
  """
  text = _decode(path.read_bytes(), path)
  try:
    value = json.loads(text) if text.strip() else []
  except json.JSONDecodeError as error:
    if text.lstrip().startswith('{') and error.msg == 'Extra data':
      return read_json_lines(path)  # whole objects one after another
    raise config.UserError(f'{path}, line {error.lineno}, column {error.colno}: not valid JSON '
                           f'({error.msg})') from error
  if isinstance(value, dict):
    if text.strip().count('\n') == 0 and not any(isinstance(v, list) for v in value.values()):
      return [value]  # one line, one row
    raise config.UserError(f'{path}: expected a list of objects, found one object with the keys '
                           f'{_names(value)}; save its rows as [{{...}}, ...] or one per line')
  if not isinstance(value, list):
    raise config.UserError(f'{path}: expected a list of objects, found {_kind(value)}')
  for number, row in enumerate(value, start=1):
    if not isinstance(row, dict):
      raise config.UserError(f'{path}: entry {number} is {_kind(row)}; expected an object '
                             '{"column": value, ...}')
  return _not_empty(value, path)


def read_csv(path):
  """Reads a table with a header line, separated by commas or tabs, whichever the header uses.

  A nameless first column is a saved index and is called `index`. All values are text.

  Args:
    path: `pathlib.Path` of the file.
  Returns:
    List of dicts.
  Raises:
    UserError: an unusable header, a row of another width (with its line), or no rows.
  """
  text = _decode(path.read_bytes(), path)
  first = text.partition('\n')[0]
  reader = csv.reader(
      io.StringIO(text, newline=''), delimiter='\t' if '\t' in first else ',', strict=True)
  limit = csv.field_size_limit(2**31 - 1)  # the default refuses fields beyond 128 KiB
  try:
    header = next(reader, None)
    if header is None:
      raise config.UserError(f'{path} is empty')
    header = ['index' if i == 0 and not name else name.strip() for i, name in enumerate(header)]
    if not all(header) or len(set(header)) < len(header):
      raise config.UserError(f'{path}, line 1: the header needs one distinct name per column, '
                             f'found {_names(header)}')
    rows = []
    for fields in reader:
      if not fields:
        continue
      if len(fields) != len(header):
        raise config.UserError(
            f'{path}, line {reader.line_num}: {len(fields)} fields where the header has '
            f'{len(header)} ({_names(header)}); quote fields that hold the separator')
      rows.append(dict(zip(header, fields)))
  except csv.Error as error:
    raise config.UserError(
        f'{path}, line {reader.line_num}: not a valid table ({error})') from error
  finally:
    csv.field_size_limit(limit)
  if not rows:
    raise config.UserError(f'{path} holds a header but no rows')
  return rows


def _blank(line):
  return not line.strip(b'\xef\xbb\xbf \t\r\n')


def _json_row(line, path, number):
  text = _decode(line, path, first_line=number).rstrip('\r\n')
  try:
    row = json.loads(text)
  except json.JSONDecodeError as error:
    raise config.UserError(f'{path}, line {number}, column {error.colno}: not valid JSON '
                           f'({error.msg}); expected one object per line') from error
  if not isinstance(row, dict):
    raise config.UserError(f'{path}, line {number}: expected an object {{"column": value, '
                           f'...}}, found {_kind(row)}')
  return row


def _decode(data, path, first_line=1):
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = first_line + data.count(b'\n', 0, error.start)
    raise config.UserError(f'{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); '
                           'save the file as UTF-8') from error


def _not_empty(rows, path):
  if not len(rows):
    raise config.UserError(f'{path} is empty: it holds no rows')
  return rows


def _kind(value):
  names = {dict: 'an object', list: 'a list', str: 'a text', bool: 'a truth value',
           type(None): 'null'}
  return names.get(type(value), 'a number')


def _names(names):
  names = [repr(name) for name in names]
  return ', '.join(names[:12]) + (', ...' if len(names) > 12 else '')
