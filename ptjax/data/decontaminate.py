"""Which training rows hold text of the evaluation rows: overlap of n-grams of words."""

import dataclasses
import re

from ptjax.data import sources

_WORD = re.compile(r'\w+')
# Where rows keep their text; whole conversations and lists of steps included.
_COLUMNS = ('text', 'prompt', 'messages', 'completion', 'completions', 'chosen', 'rejected')


@dataclasses.dataclass(frozen=True)
class Hit:
  """A training row that shares text with an evaluation row."""
  row: int  # of the training set, from 0
  evaluation_row: int  # the first one it shares text with
  shared: str  # the words they share, in lower case


@dataclasses.dataclass(frozen=True)
class Report:
  """What `overlap` found."""
  n: int
  rows: int  # training rows looked at
  evaluation_rows: int
  hits: list  # of Hit, one per contaminated training row
  hit_evaluation_rows: list  # numbers of evaluation rows of which some text was found

  @property
  def fraction(self):
    """Contaminated training rows, of all."""
    return len(self.hits) / self.rows if self.rows else 0.0

  @property
  def evaluation_fraction(self):
    """Evaluation rows found in the training rows, of all."""
    return len(self.hit_evaluation_rows) / self.evaluation_rows if self.evaluation_rows else 0.0

  def __str__(self):
    return (f'{len(self.hits)} of {self.rows} training rows ({100 * self.fraction:.2f} %) share '
            f'{self.n} words in a row with {len(self.hit_evaluation_rows)} of '
            f'{self.evaluation_rows} evaluation rows ({100 * self.evaluation_fraction:.2f} %)')


def overlap(train_texts, eval_texts, *, n=13):
  """Finds training texts that share n words in a row with an evaluation text.

  Case, punctuation and spaces do not count. An evaluation text of fewer than n words counts as
  found where a training text is the same as a whole.

  Args:
    train_texts: iterable of texts; read once, one at a time.
    eval_texts: iterable of texts; their n-grams are held in memory.
    n: words, at least 1; 13 as for GPT-3 (arXiv:2005.14165, appendix C).
  Returns:
    Report.
  """
  if n < 1:
    raise ValueError(f'n={n}: must be positive')
  owners, count = {}, 0  # gram -> numbers of the evaluation rows that hold it
  for count, text in enumerate(eval_texts, start=1):
    words = _words(text)
    # A whole short text is told apart from an n-gram by its mark.
    grams = _grams(words, n) if len(words) >= n else ['=' + ' '.join(words)] if words else []
    for gram in set(grams):
      owners.setdefault(gram, []).append(count - 1)
  hits, found, rows = [], set(), 0
  for rows, text in enumerate(train_texts, start=1):
    words = _words(text)
    shared = [gram for gram in _grams(words, n) if gram in owners]
    whole = '=' + ' '.join(words)
    if whole in owners:
      shared.append(whole)
    if shared:
      hits.append(Hit(rows - 1, owners[shared[0]][0], shared[0].lstrip('=')))
      found.update(owner for gram in shared for owner in owners[gram])
  return Report(n, rows, count, hits, sorted(found))


def texts(rows):
  """Yields the text of each row: prompt, completion, messages, `text`, ... whatever it has."""
  for row in sources.as_rows(rows):
    yield ' '.join(part for name in _COLUMNS for part in _strings(row.get(name)))


def drop(rows, report):
  """Returns the rows that are not contaminated, as `sources.Rows`."""
  bad = {hit.row for hit in report.hits}
  rows = sources.as_rows(rows)
  return rows.select([i for i in range(len(rows)) if i not in bad])


def _strings(value):
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):  # a message
    yield from _strings(value.get('content', value.get('value')))
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _strings(item)


def _words(text):
  return _WORD.findall(text.lower())


def _grams(words, n):
  return [' '.join(words[i:i + n]) for i in range(len(words) - n + 1)]
