"""Numbered poems in a text file, each as three given lines and the lines to write."""

import pathlib
import re

from ptjax import config
from ptjax.data import files

GIVEN_LINES = 3  # as in the CS224n sonnet task
_NUMBER = re.compile(r'(?:^|\n)[ \t]*(\d+)[ \t]*\n[ \t]*(?=\n)')  # a line of its own, then a blank


def recognise(text):
  """Returns whether a text holds numbered poems: at least two, counted upwards."""
  numbers = [int(match[1]) for match in _NUMBER.finditer(_plain(text))]
  return len(numbers) > 1 and all(a < b for a, b in zip(numbers, numbers[1:]))


def read(path):
  """Reads a text file: numbered poems as `sonnets` does, any other text as `files.read_text`."""
  rows = files.read_text(path)
  text = rows[0]['text']
  return parse(text) if recognise(text) else rows


def sonnets(path):
  """Reads a file of numbered poems, such as Folger's sonnets; what stands before them is left out.

  Args:
    path: `pathlib.Path` or str.
  Returns:
    List of dicts `number`, `prompt` (the first three lines, without a line break behind them) and
    `completion` (the rest, beginning with that line break; None where only three are given).
  Raises:
    UserError: no such file, not UTF-8, or no numbered poems in it.
  """
  try:
    text = files.read_text(pathlib.Path(path))[0]['text']
  except OSError as error:
    raise config.UserError(f'{path}: cannot be read ({error.strerror or error})') from error
  rows = parse(text)
  if not rows:
    raise config.UserError(f'{path}: no poems; expected a number on a line of its own, a blank '
                           'line, the poem, a blank line, and so on')
  return rows


def parse(text):
  """Returns the rows of `sonnets` from the file's text; a number without a poem is left out."""
  rows = []
  _, *parts = _NUMBER.split(_plain(text))
  for number, poem in zip(parts[::2], parts[1::2]):
    lines = [line.rstrip() for line in poem.strip().splitlines()]  # indents stay, but the first
    if lines:
      given, rest = lines[:GIVEN_LINES], lines[GIVEN_LINES:]
      rows.append({'number': int(number), 'prompt': '\n'.join(given),
                   'completion': '\n' + '\n'.join(rest) if rest else None})
  return rows


def _plain(text):
  return text.replace('\r\n', '\n').replace('\r', '\n')
