"""Preference pairs where nobody has stated a preference: from labels, from true endings, from
scores.

Every function takes rows and returns `Pairs`: rows `prompt`, `chosen`, `rejected` (and, where there
are scores, `chosen_score` and `rejected_score`), with a count of what gave none.
"""

import collections
import dataclasses

import numpy as np

from ptjax import config
from ptjax.data import choices as choices_lib
from ptjax.data import sources


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Preference pairs, and what became of the rest."""
  rows: list  # dicts
  prompts: int  # prompts looked at
  dropped: dict  # reason -> prompts, or samples where the reason says so

  def __str__(self):
    reasons = ', '.join(f'{count} {reason}' for reason, count in self.dropped.items())
    return f'{self.prompts} prompts: {len(self.rows)} pairs' + (f' ({reasons})' if reasons else '')


def require(rows, columns, what):
  """Returns `rows` as `sources.Rows` that have all these columns.

  Raises:
    UserError: one is missing; `what` needs them.
  """
  rows = sources.as_rows(rows)
  for column in columns:
    if column not in rows.columns:
      raise config.UserError(
          f'{rows.name}: {what} need the columns {", ".join(columns)}; found: '
          f'{", ".join(rows.columns) or "none"}; map one with --columns={column}=<name>')
  return rows


def with_choices(rows):
  """Returns rows of a format that `choices` knows as `sources.Rows` with the columns it makes."""
  rows = sources.as_rows(rows)
  return rows.with_columns(choices_lib.recognise(rows.columns))


def from_labels(rows, *, seed=0, every=False):
  """Pairs the right answer with another one.

  Args:
    rows: dicts of a format that `choices` knows, such as Quora's.
    seed: of the draw of the other answer, where there are several.
    every: whether each of the other answers makes a pair of its own.
  Returns:
    `Pairs`, in the order of the rows.
  Raises:
    UserError: rows without those columns.
  """
  rows = require(with_choices(rows), ('prompt', 'choices', 'correct'), 'label pairs')
  pairs, dropped = [], collections.Counter()
  for number, row in enumerate(rows):
    if not row['prompt'] or not row['choices']:
      dropped['with an empty prompt or choices'] += 1
      continue
    if row['correct'] is None:
      dropped['without a label'] += 1
      continue
    right = row['choices'][row['correct']]
    others = [choice for choice in row['choices'] if choice != right]
    if not others:
      dropped['without another answer'] += 1
      continue
    if not every:
      others = [others[np.random.default_rng([seed, number]).integers(len(others))]]
    pairs += [{'prompt': row['prompt'], 'chosen': right, 'rejected': other} for other in others]
  return Pairs(pairs, len(rows), dict(dropped))


def from_endings(rows, samples):
  """Pairs the true ending (chosen) with what a model wrote instead (rejected).

  Args:
    rows: dicts with `prompt` and `completion`.
    samples: one list of texts per row; each different one makes a pair.
  Returns:
    `Pairs`. Samples that are empty, repeat each other or equal the true ending, spaces around
    them aside, are dropped.
  Raises:
    UserError: rows without those columns.
  """
  rows = require(rows, ('prompt', 'completion'), 'ending pairs')
  pairs, dropped = [], collections.Counter()
  for row, texts in zip(rows, samples, strict=True):
    if not row['prompt'] or not row['completion']:
      dropped['with an empty prompt or completion'] += 1
      continue
    seen = set()
    for text in texts:
      bare = text.strip()
      if bare == row['completion'].strip():
        dropped['samples identical to the true ending'] += 1
      elif not bare:
        dropped['empty samples'] += 1
      elif bare in seen:
        dropped['samples that repeat another'] += 1
      else:
        seen.add(bare)
        pairs.append({'prompt': row['prompt'], 'chosen': row['completion'], 'rejected': text})
  return Pairs(pairs, len(rows), dict(dropped))


def from_scores(prompts, samples, scores, *, min_gap=0.0, most=1):
  """Pairs the best with the worst of each prompt's samples.

  With one pair per prompt and 16 samples drawn at temperature 1 this is the protocol of the oxRL
  study (arXiv:2603.19335). Of equal scores the first sample counts.

  Args:
    prompts: N texts or messages.
    samples: N lists of texts.
    scores: N lists of numbers, or None where a sample has no score.
    min_gap: the difference in score that a pair needs at least; equal scores never make one.
    most: pairs per prompt: the best with the worst, the second best with the second worst, ...
  Returns:
    `Pairs`, with their scores.
  """
  pairs, dropped = [], collections.Counter()
  for prompt, texts, values in zip(prompts, samples, scores, strict=True):
    scored = {}
    for text, value in zip(texts, values, strict=True):
      if value is None or value != value:
        dropped['samples without a score'] += 1
      elif not text.strip():
        dropped['empty samples'] += 1
      else:
        scored.setdefault(text, value)  # twice the same text is one sample
    ranked = sorted(scored, key=lambda text: -scored[text])  # stable: of equals the first is first
    found = [(best, worst) for best, worst in zip(ranked, _worst_first(ranked, scored))
             if scored[best] - scored[worst] >= min_gap and scored[best] > scored[worst]][:most]
    pairs += [{'prompt': prompt, 'chosen': best, 'rejected': worst, 'chosen_score': scored[best],
               'rejected_score': scored[worst]} for best, worst in found]
    if not found:
      dropped[_why_none(ranked, scored)] += 1
  return Pairs(pairs, len(prompts), dict(dropped))


def from_scored_rows(rows, *, min_gap=0.0, most=1, separator=''):
  """Pairs samples that somebody else has drawn and scored, one sample per row.

  Args:
    rows: dicts with `prompt`, the sample as `completion` or `text`, and `reward` or `score`.
    min_gap, most: as in `from_scores`.
    separator: put before each sample, e.g. a space where the file has stripped it.
  Returns:
    `Pairs`, in the order in which prompts first come.
  Raises:
    UserError: rows without those columns, or a score that is no number.
  """
  rows = require(rows, ('prompt',), 'scored pairs')
  text = _first_of(rows, ('completion', 'text'))
  score = _first_of(rows, ('reward', 'score'))
  groups = {}  # messages are no keys, but their spelling is one
  for number, row in enumerate(rows, start=1):
    if row['prompt'] and row[text] is not None:
      _, texts, values = groups.setdefault(repr(row['prompt']), (row['prompt'], [], []))
      texts.append(separator + row[text])
      values.append(_number(row[score], f'{rows.name}, row {number}: {score}'))
  if not groups:
    raise config.UserError(f'{rows.name}: no row has both a prompt and a {text}')
  return from_scores(*zip(*groups.values()), min_gap=min_gap, most=most)


def _worst_first(ranked, scored):
  """The ranked texts from the worst up; of equal ones the first sample comes first."""
  return sorted(ranked, key=lambda text: scored[text])


def _why_none(ranked, scored):
  if len(ranked) < 2:
    return 'prompts with fewer than two different samples'
  tied = scored[ranked[0]] == scored[ranked[-1]]
  return 'prompts whose samples tie' if tied else 'prompts with a smaller gap'


def _first_of(rows, names):
  for name in names:
    if name in rows.columns:
      return name
  raise config.UserError(
      f'{rows.name}: scored pairs need a column {" or ".join(names)}; found: '
      f'{", ".join(rows.columns)}; map one with --columns={names[0]}=<name>')


def _number(cell, where):
  if cell is None or cell == '':
    return None
  try:
    return float(cell)
  except (TypeError, ValueError):
    raise config.UserError(f'{where}: expected a number, found {cell!r}') from None
