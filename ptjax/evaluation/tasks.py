"""What is evaluated: which task rows stand for, and the task as a value."""

import dataclasses
from typing import Callable

from ptjax import config
from ptjax.data import choices
from ptjax.data import pairing
from ptjax.data import preferences
from ptjax.data import sources
from ptjax.evaluation import chrf
from ptjax.evaluation import choice
from ptjax.evaluation import evaluate
from ptjax.evaluation import generation
from ptjax.evaluation import pairs
from ptjax.evaluation import perplexity
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
  corpus: dict = dataclasses.field(default_factory=dict)  # name -> corpus scorer, as chrf makes
  own_completions: bool = False  # also measure the likelihood of the rows' own, where it is known
  needs = (('generate',),)

  def measure(self, functions, options):
    """Returns the metrics of `generation.measure`, and a record per row."""
    metrics, records = generation.measure(self, functions, options)
    if self.own_completions and functions.log_likelihood is not None:
      metrics |= perplexity.measure(self.rows, functions.log_likelihood, options.level)[0]
    return metrics, records


def names():
  """Returns the names of the tasks that `make` knows."""
  return tuple(_KINDS)


def split(name):
  """Splits `quora:path` into task and data set.

  Args:
    name: as `--eval_dataset` has it.
  Returns:
    ('quora', 'path'), or (None, name) where what stands before the colon is no task, as in
    `owner/name:config` and `arithmetic:max_operand=20`.
  """
  kind, colon, rest = name.partition(':')
  if colon and rest and kind in _KINDS and kind not in sources.TASKS:
    return kind, rest
  return None, name


def recognise(name, rows):
  """Returns which task some rows are, from what the user called it and from their columns.

  Args:
    name: as `--eval_dataset` has it; a task before the colon decides.
    rows: `sources.Rows`, or a list of dicts.
  Returns:
    A name that `make` knows, or None where the columns fit no task.
  """
  kind, path = split(name)
  if kind is not None:
    return kind
  if path.partition(':')[0].partition('@')[0] in sources.TASKS:
    return 'arithmetic'
  rows = sources.as_rows(rows)
  columns = set(rows.columns)
  if choices.recognise(columns) or {'prompt', 'choices', 'correct'} <= columns:
    return 'quora' if 'is_duplicate' in columns else 'choice'
  if {'chosen', 'rejected'} <= columns:
    return 'pairs'
  if {'prompt', 'answer'} <= columns:
    # GSM8K's worked solution is the completion once its answer has been taken out of it.
    worked = [str(rows[0].get(column)) for column in ('answer', 'completion')]
    return 'gsm8k' if any('####' in text for text in worked) else 'math'
  if {'number', 'prompt', 'completion'} == columns:
    return 'sonnets'
  if 'text' in columns or {'prompt', 'completion'} <= columns:
    return 'perplexity'
  return None


def make(kind, rows, *, name=None, max_tokens=None, limit=None, pool=None, beta=0.1):
  """Returns the task of some rows.

  Args:
    kind: what `names` lists. 'arithmetic' (integer answers), 'gsm8k' (`#### 72`), 'math'
      (`\\boxed{}`): `prompt` and `answer`, answered by generating. 'sonnets': `prompt` and
      `completion`, continued and compared by chrF. 'quora' (two answers, accuracy and F1) and
      'choice' (any answers, accuracies): a format that `data.choices` knows, by likelihood.
      'perplexity': `text`, or `prompt` and `completion`. 'pairs': `chosen` and `rejected`, as
      for training, by a reward model's scores or by likelihood.
    rows: dicts with those columns.
    name: of the metrics; None takes `kind`.
    max_tokens: see `EvalTask`.
    limit: the first so many rows; None takes all.
    pool: of workers that compare maths answers; None takes the shared one.
    beta: of the implicit reward, see `pairs.PairTask`.
  Raises:
    config.UserError: unknown kind, no rows, a row without what it needs, or sacrebleu missing.
  """
  if kind not in _KINDS:
    raise config.UserError(f'no evaluation task {kind!r}' + config.near_names(kind, _KINDS))
  return _KINDS[kind](name or kind, rows, limit, max_tokens=max_tokens, pool=pool, beta=beta)


def rewarded(name, rows, rewards, *, max_tokens=None, limit=None):
  """Returns an `EvalTask` whose one metric is the mean total of a `combine.RewardSet`.

  It serves data without a task of its own, trained on the user's reward.
  """
  def reward(prompts, completions, **columns):
    table = rewards.score(prompts, completions, columns)
    return [float(total) if scored else None for total, scored in zip(table.total, table.scored)]

  rows = _checked(name, rows, limit, ('prompt',))
  return EvalTask(name=name, rows=rows, scorers={'reward': reward}, max_tokens=max_tokens)


def _arithmetic(name, rows, limit, *, max_tokens, **unused):
  scorers = {'acc_strict': arithmetic.strict, 'acc_flexible': arithmetic.flexible}
  return EvalTask(name, _checked(name, rows, limit, ('prompt', 'answer')), scorers, 'acc_flexible',
                  arithmetic.vote, max_tokens)


def _math(style):
  def make_task(name, rows, limit, *, max_tokens, pool, **unused):
    scorers = {f'acc_{extraction}': math_answers.MathReward(style, extraction, pool=pool)
               for extraction in ('strict', 'flexible')}
    return EvalTask(
        name, _checked(name, rows, limit, ('prompt', 'answer')), scorers, 'acc_flexible',
        lambda completion: math_answers.vote(completion, style), max_tokens)
  return make_task


def _sonnets(name, rows, limit, *, max_tokens, **unused):
  return EvalTask(
      name, _checked(name, rows, limit, ('prompt', 'completion')), {}, max_tokens=max_tokens,
      corpus={'chrf': chrf.make_chrf(), 'chrf_whole': chrf.make_chrf(whole=True)},
      own_completions=True)


def _quora(name, rows, limit, **unused):
  task = _choice(name, rows, limit)
  return dataclasses.replace(task, positive=choices.PARAPHRASE_ANSWERS.index(' yes'))


def _choice(name, rows, limit, **unused):
  def usable(row):
    if not row['prompt'] or not row['choices']:
      return 'with an empty prompt or choices'
    return 'without a label' if row['correct'] is None else None

  rows = pairing.with_choices(rows)
  _check_columns(name, rows, ('prompt', 'choices', 'correct'))
  return choice.ChoiceTask(name, evaluate.admit(name, rows, limit=limit, usable=usable))


def _perplexity(name, rows, limit, **unused):
  needed = ('text',) if 'text' in sources.as_rows(rows).columns else ('prompt', 'completion')
  _check_columns(name, rows, needed)
  usable = lambda row: None if row[needed[-1]] else f'with an empty {needed[-1]}'
  return perplexity.PerplexityTask(name, evaluate.admit(name, rows, limit=limit, usable=usable))


def _pairs(name, rows, limit, *, beta, **unused):
  def explicit(place, row):
    """The row with its prompt apart, or the reason why it is none."""
    if not row['chosen'] or not row['rejected']:
      return 'with an empty answer'
    if row['chosen'] == row['rejected']:
      return 'with identical answers'
    found = preferences.split_pair(row.get('prompt'), [row['chosen'], row['rejected']],
                                   f'evaluation {name!r}, row {place + 1}')
    if isinstance(found, str):
      return found
    prompt, (chosen, rejected) = found
    # Without a prompt whole texts are compared; what they share cancels.
    return {**row, 'prompt': prompt or '', 'chosen': chosen, 'rejected': rejected}

  _check_columns(name, rows, ('chosen', 'rejected'))
  rows = [explicit(place, row) for place, row in enumerate(rows)]
  return pairs.PairTask(name, evaluate.admit(
      name, rows, limit=limit, usable=lambda row: row if isinstance(row, str) else None), beta)


_KINDS = {'arithmetic': _arithmetic, 'gsm8k': _math('hash'), 'math': _math('boxed'),
          'sonnets': _sonnets, 'quora': _quora, 'choice': _choice, 'perplexity': _perplexity,
          'pairs': _pairs}


def _check_columns(name, rows, needed):
  """Raises UserError unless the rows, if there are any, have some columns at all."""
  found = sources.as_rows(rows).columns
  for column in needed:
    if len(rows) and column not in found:
      raise config.UserError(
          f'evaluation {name!r} needs the columns {", ".join(needed)}; found: '
          f'{", ".join(found) or "none"}; map one with --set data.columns.{column}=<name>')


def _checked(name, rows, limit, needed):
  """Returns the first rows as a tuple; each must have all that is needed."""
  rows = evaluate.admit(name, rows, limit=limit, usable=lambda row: None)
  for number, row in enumerate(rows):
    missing = [column for column in needed if row.get(column) is None]
    if missing:
      raise config.UserError(
          f'evaluation {name!r}: row {number} has no {missing[0]!r}; found: {", ".join(row)}; map '
          f'one with --set data.columns.{missing[0]}=<name>')
  return rows
