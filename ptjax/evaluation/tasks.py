"""What is evaluated: rows with prompts and answers, and how completions are scored."""

import dataclasses
from typing import Callable

from ptjax import config
from ptjax.rewards import arithmetic
from ptjax.rewards import math_answers


@dataclasses.dataclass(frozen=True)
class EvalTask:
  """Held-out rows and how to score what a policy answers."""
  name: str  # of its metrics, `eval/<name>/...`
  rows: tuple  # dicts with 'prompt' and the columns the scorers ask for
  scorers: dict  # metric name -> f(prompts, completions, **columns) -> list of number or None
  correct: str | None = None  # the scorer that decides pass@k and maj@k
  vote: Callable | None = None  # completion -> what it votes for in maj@k, or None
  max_tokens: int | None = None  # per completion; None leaves it to the caller


def names():
  """Returns the names of the tasks that `make` knows."""
  return tuple(_KINDS)


def make(kind, rows, *, name=None, max_tokens=None, limit=None, pool=None):
  """Returns the `EvalTask` of some rows.

  Args:
    kind: 'arithmetic' (integer answers), 'gsm8k' (`#### 72`) or 'math' (`\\boxed{}`).
    rows: dicts with 'prompt' and 'answer'.
    name: of the metrics; None takes `kind`.
    max_tokens: see `EvalTask`.
    limit: the first so many rows; None takes all.
    pool: of workers that compare maths answers; None takes the shared one.
  Raises:
    config.UserError: unknown kind, no rows, or a row without prompt or answer.
  """
  if kind not in _KINDS:
    raise config.UserError(f'no evaluation task {kind!r}' + config.near_names(kind, _KINDS))
  rows = _checked(kind, rows, limit, ('prompt', 'answer'))
  scorers, vote = _KINDS[kind](pool)
  return EvalTask(name=name or kind, rows=rows, scorers=scorers, correct='acc_flexible', vote=vote,
                  max_tokens=max_tokens)


def rewarded(name, rows, rewards, *, max_tokens=None, limit=None):
  """Returns an `EvalTask` whose one metric is the mean total of a `combine.RewardSet`.

  It serves data without a task of its own, trained on the user's reward.
  """
  def reward(prompts, completions, **columns):
    table = rewards.score(prompts, completions, columns)
    return [float(total) if scored else None for total, scored in zip(table.total, table.scored)]

  rows = _checked(name, rows, limit, ('prompt',))
  return EvalTask(name=name, rows=rows, scorers={'reward': reward}, max_tokens=max_tokens)


def _arithmetic(pool):
  del pool
  scorers = {'acc_strict': arithmetic.strict, 'acc_flexible': arithmetic.flexible}
  return scorers, arithmetic.vote


def _math(style):
  def make_scorers(pool):
    scorers = {f'acc_{extraction}': math_answers.MathReward(style, extraction, pool=pool)
               for extraction in ('strict', 'flexible')}
    return scorers, lambda completion: math_answers.vote(completion, style)
  return make_scorers


_KINDS = {'arithmetic': _arithmetic, 'gsm8k': _math('hash'), 'math': _math('boxed')}


def _checked(name, rows, limit, needed):
  rows = tuple(rows)[:limit]
  if not rows:
    raise config.UserError(f'evaluation {name!r}: no rows')
  for number, row in enumerate(rows):
    missing = [column for column in needed if row.get(column) is None]
    if missing:
      raise config.UserError(
          f'evaluation {name!r}: row {number} has no {missing[0]!r}; found: {", ".join(row)}; map '
          f'one with --set data.columns.{missing[0]}=<name>')
  return rows
