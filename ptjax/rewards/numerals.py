"""Numbers as people write them, read exactly: `$1,234.50` is `1234.5`, whatever its length.

Numbers stay text. A policy may write a million digits, which `int` refuses and `float` rounds.
"""

import re

# Thousands separators only in groups of three, so that the list `1,2,3` stays three numbers. A
# minus is a sign only where no digit, letter or bracket stands before it: `12-7` ends in 7.
_MAGNITUDE = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+'
NUMBER = re.compile(rf'(?:(?<![0-9A-Za-z)\]}}])[-\u2212])?\$?(?:{_MAGNITUDE})')
_WHOLE = re.compile(rf'\\?\$?\s*(?P<sign>[-+\u2212]?)\s*\\?\$?(?P<magnitude>{_MAGNITUDE})\.?')


def canonical(text):
  """Returns the one spelling of the decimal number `text`, or None if it is not one.

  Two numbers are equal exactly when their canonical spellings are. Thousands separators, a dollar
  sign, a final full stop and surrounding space are accepted; `%`, fractions and exponents are not.
  """
  match = _WHOLE.fullmatch(text.strip())
  if not match:
    return None
  whole, _, fraction = match['magnitude'].replace(',', '').partition('.')
  whole, fraction = whole.lstrip('0') or '0', fraction.rstrip('0')
  number = f'{whole}.{fraction}' if fraction else whole
  return f'-{number}' if match['sign'] in ('-', '\u2212') and number != '0' else number


def last_number(text):
  """Returns the last decimal number in `text` as it is written, or None."""
  match = last_match(NUMBER, text)
  return match.group() if match else None


def last_match(pattern, text):
  """Returns the last match of a compiled `pattern` in `text`, or None."""
  last = None
  for last in pattern.finditer(text):
    pass
  return last
