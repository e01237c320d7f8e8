"""Maths answers: find the answer in a completion, then decide whether it equals the gold one.

Two extractions, so that what a model knows and how it writes are told apart: *strict* reads only
the place the format prescribes (`#### 72` as GSM8K writes, or `\\boxed{72}` as MATH does);
*flexible* falls back on the last number. What strict accepts flexible accepts too.

The gold answer is the column `answer`: a number, LaTeX, a boxed answer, or a GSM8K worked solution
ending in `#### 72`.
"""

import collections
import functools
import logging
import pathlib
import re

from ptjax.rewards import numerals
from ptjax.rewards import pool as pool_lib

_LOGGER = logging.getLogger(__name__)
_MAX_ANSWER_CHARACTERS = 1000  # a longer answer counts as wrong unless it is the gold text itself

_HASHED = re.compile(r'####[ \t]*([^\n]*)')
_HASHED_NUMBER = re.compile(r'\\?\$?[-+\u2212]?\\?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)')
_BOX_TOKENS = re.compile(r'\\(?:boxed|fbox)\s*\{|\\.|[{}]', re.DOTALL)
_FRACTION = re.compile(r'-?[0-9]+/[0-9]+(?![0-9])')
_MATH_SPAN = re.compile(r'(?<!\\)\$([^$\n]+)(?<!\\)\$')
_INVISIBLE = re.compile(r'\\[!,]|\\(?:left|right)(?![A-Za-z])|\\?\$')
_SPACE = re.compile(r'(?:\\[;: ]|[\s~])+')
_IDLE_SPACE = re.compile(r'(?<![0-9A-Za-z]) | (?![0-9A-Za-z])')  # `1 2` is not `12`


def strict(text, style):
  """Returns the answer where `style` prescribes it, or None.

  Args:
    text: a completion.
    style: 'hash' for the number after the last `####`, 'boxed' for the last complete `\\boxed{}`.
  """
  return last_boxed(text) if style == 'boxed' else last_hashed(text)


def flexible(text, style, numeric=True):
  """Returns the answer wherever it stands, or None.

  The style's own place first, then the other style's, then the last number; for answers that are
  not numbers (`numeric` False) the last `$...$`, fraction or number, whichever stands last.
  """
  found = strict(text, style) or strict(text, 'hash' if style == 'boxed' else 'boxed')
  if found:
    return found
  text = text.replace('\\!', '')  # LaTeX writes 10,080 as 10,\!080
  if numeric:
    return numerals.last_number(text)
  matches = [numerals.last_match(pattern, text)
             for pattern in (_MATH_SPAN, _FRACTION, numerals.NUMBER)]
  matches = [match for match in matches if match]
  if not matches:
    return None
  last = max(matches, key=lambda match: (match.end(), -match.start()))
  return last[1].strip() if last.re is _MATH_SPAN else last[0]


def last_hashed(text):
  """Returns the number that follows the last `####` of `text`, or None if none does."""
  line = numerals.last_match(_HASHED, text)
  number = _HASHED_NUMBER.match(line[1]) if line else None
  return number.group().rstrip(',') if number else None


def last_boxed(text):
  """Returns the content of the last complete `\\boxed{}` (or `\\fbox{}`), or None.

  Of boxes within each other the innermost counts. One pass, whatever the nesting.
  """
  content, content_start, opened = None, -1, []
  for token in _BOX_TOKENS.finditer(text):
    mark = token.group()
    if mark == '}':
      start = opened.pop() if opened else None  # None closes a plain brace
      if start is not None and start > content_start:
        content, content_start = text[start:token.start()], start
    elif mark == '{':
      opened.append(None)
    elif mark.endswith('{') and len(mark) > 2:  # not the escaped brace `\{`
      opened.append(token.end())
  return None if content is None else content.strip()


def gold_answer(answer):
  """Returns the bare gold answer of a data set's `answer` value, or None if there is none."""
  if answer is None or isinstance(answer, float) and answer != answer:
    return None
  text = str(answer)
  if '####' in text:
    text = text.rpartition('####')[2]
  boxed = last_boxed(text)
  return (text if boxed is None else boxed).strip() or None


def quick_equal(gold, answer):
  """Returns True or False where the spelling decides, None where only algebra can."""
  gold, answer = _plain(gold), _plain(answer)
  if gold == answer:
    return True
  if not answer or len(answer) > max(_MAX_ANSWER_CHARACTERS, len(gold)):
    return False
  gold_number, answer_number = numerals.canonical(gold), numerals.canonical(answer)
  if gold_number is None or answer_number is None:
    return None
  return gold_number == answer_number


def vote(text, style):
  """Returns what a completion votes for in a majority vote: its flexible answer, or None.

  Answers vote together when they are spelled alike up to spacing and number format.
  """
  answer = flexible(text, style, numeric=style == 'hash')
  if answer is None:
    return None
  answer = _plain(answer)
  return numerals.canonical(answer) or answer or None


@functools.cache
def shared_pool(timeout_seconds=5.0, num_workers=2):
  """Returns the process's pool of equality checkers; it starts no process before it is needed."""
  return pool_lib.WorkerPool(
      pathlib.Path(__file__).with_name('math_equality.py'), 'equal',
      timeout_seconds=timeout_seconds, num_workers=num_workers)


class MathReward:
  """The reward function: 1.0 where the answer is right, 0.0 where wrong or absent, None undecided.

  Undecided are: no gold answer, a gold answer that does not parse, and comparisons that time out,
  raise or kill their worker. The latter are logged, and counted for `take_report`.

  Args:
    style: 'hash' or 'boxed', see `strict`.
    extraction: 'strict' or 'flexible'.
    pool: a `pool.WorkerPool` around `math_equality.equal`; None takes the shared one.
  """

  def __init__(self, style, extraction, *, pool=None):
    self._style = style
    self._extraction = extraction
    self._pool = shared_pool() if pool is None else pool
    self._counts = collections.Counter()

  def __call__(self, prompts, completions, *, answer, **columns):
    del prompts, columns
    golds = [gold_answer(value) for value in answer]
    pairs = [(gold, self._extract(text, gold))
             for text, gold in zip(completions, golds, strict=True)]
    verdicts, hard = {}, []
    for pair in dict.fromkeys(pairs):  # alike completions cost one check
      gold, found = pair
      equal = None if gold is None else found is not None and quick_equal(gold, found)
      verdicts[pair] = None if equal is None else float(equal)
      if gold is not None and equal is None:
        hard.append(pair)
    for pair, outcome in zip(hard, self._pool.map(hard) if hard else []):
      verdicts[pair] = self._judge(pair, outcome)
    return [verdicts[pair] for pair in pairs]

  def take_report(self):
    """Returns counts since the last call: 'timeout', 'died', 'error', 'gold_unparsed'."""
    counts, self._counts = dict(self._counts), collections.Counter()
    return counts

  def close(self):
    """Ends the pool's workers; they start again when needed."""
    self._pool.close()

  def _extract(self, text, gold):
    if gold is None:
      return None
    if self._extraction == 'strict':
      return strict(text, self._style)
    return flexible(text, self._style, numeric=numerals.canonical(_plain(gold)) is not None)

  def _judge(self, pair, outcome):
    if outcome.status == 'ok' and outcome.value is not None:
      return float(outcome.value)
    cause = 'gold_unparsed' if outcome.status == 'ok' else outcome.status
    self._counts[cause] += 1
    gold, answer = pair
    _LOGGER.warning('maths answer %.100r against %.100r has no verdict: %s', answer, gold,
                    outcome.detail or 'the gold answer does not parse')
    return None


def _plain(text):
  """Drops what never changes an answer's meaning: spacing, dollar signs, `\\left`, `\\dfrac`."""
  text = re.sub(r'\\[dt]frac', r'\\frac', text.replace('{,}', ','))
  text = _SPACE.sub(' ', _INVISIBLE.sub('', text)).strip()
  return _IDLE_SPACE.sub('', text).rstrip('.')
