"""Runs an evaluation task with what the model at hand can be asked.

A task is a value with a name, rows, the functions it `needs` and a `measure`; a function is
whatever gives the promised numbers, so nothing in this room knows a model.
"""

import dataclasses
import logging
import math
from typing import Callable

from ptjax import config

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Generations:
  """What a policy answered: one inner list per row, one entry per sample."""
  completions: list  # of lists of str
  lengths: list | None = None  # of lists of int; tokens
  truncated: list | None = None  # of lists of bool; True where the length limit ended it


@dataclasses.dataclass(frozen=True)
class Functions:
  """What a model can be asked. A policy generates and has likelihoods; a reward model scores."""
  generate: Callable | None = None  # (rows, samples, greedy) -> Generations
  log_likelihood: Callable | None = None  # (prompts, completions, *, end=False) -> Likelihoods
  reference_log_likelihood: Callable | None = None  # the same, under the frozen reference
  score: Callable | None = None  # (prompts, completions) -> [N] numbers


@dataclasses.dataclass(frozen=True)
class Options:
  """How to measure."""
  samples: int = 1  # completions per row for pass@k and maj@k; 1: the greedy pass alone
  ks: tuple = ()  # the k of those; empty takes 1 and `samples`
  level: float = 0.95  # of the confidence intervals


def evaluate(task, generate=None, *, log_likelihood=None, reference_log_likelihood=None,
             score=None, samples=1, ks=(), level=0.95, record=None):
  """Returns the metrics of one evaluation.

  Args:
    task: what `tasks.make` or `tasks.rewarded` returned.
    generate: `f(rows, samples, greedy) -> Generations`, the completions of each row's prompt.
    log_likelihood: `f(prompts, completions, *, end=False) -> likelihood.Likelihoods` of N
      completions, each after its own prompt; with `end`, of the end token after it too.
    reference_log_likelihood: the same, under the reference of a preference method.
    score: `f(prompts, completions) -> [N]` numbers, a reward model's.
    samples, ks, level: see `Options`.
    record: None or `f(list of dict)`, called with each row and what was found of it.
  Returns:
    dict `eval/<task>/<metric>` -> float, and beside each metric `<metric>_se` (clustered by row),
    `<metric>_low` and `<metric>_high`. What does not apply is absent.
  Raises:
    config.UserError: a task that needs another kind of model, or bad options.
  """
  functions = Functions(generate, log_likelihood, reference_log_likelihood, score)
  if not any(all(getattr(functions, name) for name in names) for names in task.needs):
    needed = ' or '.join(' and '.join(names) for names in task.needs)
    raise config.UserError(
        f'evaluation {task.name!r} needs {needed}, which this model does not offer: a policy has '
        'generate and log_likelihood, a reward model has score')
  if samples < 1:
    raise config.UserError(f'eval.samples={samples}: expected at least 1')
  if ks and max(ks) > samples or any(k < 1 for k in ks):
    raise config.UserError(f'eval.k={tuple(ks)}: expected 1 to eval.samples={samples}')
  metrics, records = task.measure(functions, Options(samples, tuple(ks), level))
  if record is not None:
    record(records)
  return {f'eval/{task.name}/{name}': value for name, value in _flat(metrics).items()
          if not math.isnan(value)}


def _flat(metrics):
  flat = {}
  for name, metric in metrics.items():
    flat |= {name: metric.value, f'{name}_se': metric.se, f'{name}_low': metric.low,
             f'{name}_high': metric.high}
  return flat


def admit(name, rows, *, limit, usable):
  """Keeps the rows that a task can use; says so where some cannot be used.

  Args:
    name: of the task.
    rows: dicts.
    limit: rows kept at most, from the start; None keeps all.
    usable: `f(row) -> None` or the reason why not, e.g. 'without a label'.
  Returns:
    Tuple of rows.
  Raises:
    config.UserError: none left.
  """
  kept, dropped, seen = [], {}, 0
  for row in rows:
    if len(kept) == limit:
      break
    seen += 1
    reason = usable(row)
    if reason is None:
      kept.append(row)
    else:
      dropped[reason] = dropped.get(reason, 0) + 1
  counts = ', '.join(f'{count} {reason}' for reason, count in dropped.items())
  if not kept:
    raise config.UserError(f'evaluation {name!r}: no rows' + (f' left: {counts}' if counts else ''))
  if dropped:
    _LOGGER.warning('evaluation %r: %d of %d rows dropped (%s)', name, sum(dropped.values()), seen,
                    counts)
  return tuple(kept)
