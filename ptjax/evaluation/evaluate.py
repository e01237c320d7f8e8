"""Runs an evaluation task: greedy scores, pass@k, maj@k, each with error and interval."""

import dataclasses
import math

import numpy as np

from ptjax import config
from ptjax.evaluation import intervals
from ptjax.evaluation import pass_at_k


@dataclasses.dataclass(frozen=True)
class Generations:
  """What a policy answered: one inner list per row, one entry per sample."""
  completions: list  # of lists of str
  lengths: list | None = None  # of lists of int; tokens
  truncated: list | None = None  # of lists of bool; True where the length limit ended it


def evaluate(task, generate, *, samples=1, ks=(), level=0.95, record=None):
  """Returns the metrics of one evaluation.

  Args:
    task: `tasks.EvalTask`.
    generate: `f(rows, samples, greedy) -> Generations`, the completions of each row's prompt.
    samples: n, completions per row for pass@k and maj@k; 1 runs the greedy pass alone.
    ks: the k of pass@k and maj@k, at most `samples`; empty takes 1 and `samples`.
    level: of the confidence intervals.
    record: None or `f(list of dict)`, called with each greedy completion, its scores and its row.
  Returns:
    dict `eval/<task>/<metric>` -> float, and beside each metric `<metric>_se` (clustered by row),
    `<metric>_low` and `<metric>_high`. From greedy completions: the task's scorers (`acc_strict`,
    `acc_flexible`), `format_gap` (flexible minus strict), `mean_length` (tokens), `truncated` (a
    fraction). From samples: `pass@k`, `maj@k`. `unscored` is the fraction of greedy completions
    without a verdict, absent when there are none; they count as wrong in accuracies and are left
    out of other means. What does not apply is absent.
  """
  ks = _checked_ks(task, samples, ks)
  greedy = _generate(task, generate, 1, True)
  scores = _score(task, greedy.completions)
  metrics = _greedy_metrics(scores, greedy, level)
  if ks:
    sampled = _generate(task, generate, samples, False)
    metrics |= _sampled_metrics(task, sampled.completions, samples, ks, level)
  if record is not None:
    record(_records(task, greedy, scores))
  return {f'eval/{task.name}/{name}': value for name, value in metrics.items()
          if not math.isnan(value)}


def _checked_ks(task, samples, ks):
  if samples < 1:
    raise config.UserError(f'eval.samples={samples}: expected at least 1')
  if ks and max(ks) > samples or any(k < 1 for k in ks):
    raise config.UserError(f'eval.k={tuple(ks)}: expected 1 to eval.samples={samples}')
  if samples == 1 or task.correct is None:
    return ()
  return tuple(sorted(set(ks))) or (1, samples)


def _generate(task, generate, samples, greedy):
  """Generates and checks the shapes, which are the caller's promise."""
  generations = generate(task.rows, samples, greedy)
  for field in dataclasses.fields(generations):
    lists = getattr(generations, field.name)
    if lists is not None and [len(entries) for entries in lists] != [samples] * len(task.rows):
      raise ValueError(f'generate gave {field.name} for {len(lists)} rows, expected '
                       f'{len(task.rows)} rows of {samples}')
  return generations


def _score(task, completions, only=None):
  """Returns scorer name -> [P, n] float64, NaN where there is no verdict."""
  samples = len(completions[0])
  prompts, columns, texts = [], {}, []
  names = dict.fromkeys(name for row in task.rows for name in row
                        if name not in ('prompt', 'prompts', 'completions'))
  for row, answers in zip(task.rows, completions):
    texts += answers
    prompts += [row['prompt']] * samples
    for name in names:
      columns.setdefault(name, []).extend([row.get(name)] * samples)
  return {name: np.array(scorer(prompts, texts, **columns), np.float64).reshape(-1, samples)
          for name, scorer in task.scorers.items() if only in (None, name)}


def _greedy_metrics(scores, greedy, level):
  metrics = {}
  for name, values in scores.items():
    if name.startswith('acc_'):
      metrics |= _proportion(name, np.nan_to_num(values), level)
    else:
      metrics |= _mean(name, [row for row in values if not np.isnan(row).any()], level)
  if 'acc_strict' in scores and 'acc_flexible' in scores:
    gap = np.nan_to_num(scores['acc_flexible']) - np.nan_to_num(scores['acc_strict'])
    metrics |= _mean('format_gap', gap, level)  # paired, so the rows' difficulty cancels
  if greedy.lengths is not None:
    metrics |= _mean('mean_length', greedy.lengths, level)
  if greedy.truncated is not None:
    metrics |= _proportion('truncated', np.array(greedy.truncated, np.float64), level)
  unscored = np.any([np.isnan(values) for values in scores.values()], axis=0)
  if unscored.any():
    metrics |= _proportion('unscored', unscored.astype(np.float64), level)
  return metrics


def _sampled_metrics(task, completions, samples, ks, level):
  correct = _score(task, completions, task.correct)[task.correct] == 1.0  # [P, n]; NaN is wrong
  metrics = {}
  for k in ks:
    per_row = pass_at_k.pass_at_k(samples, correct.sum(axis=1), k)  # [P]
    metrics |= _proportion(f'pass@{k}', per_row[:, None], level)
  if task.vote is not None:
    votes = [[task.vote(text) for text in answers] for answers in completions]
    for k in ks:
      per_row = np.array([pass_at_k.maj_at_k(row, right, k) for row, right in zip(votes, correct)])
      metrics |= _proportion(f'maj@{k}', per_row[:, None], level)
  return metrics


def _proportion(name, values, level):
  """The mean of values within [0, 1], with Wilson's interval over rows."""
  estimate = intervals.clustered_mean(values)
  low, high = intervals.wilson(estimate.mean, estimate.num_clusters, level)
  return _named(name, estimate, low, high)


def _mean(name, values, level):
  if not len(values):
    return {}
  estimate = intervals.clustered_mean(values)
  return _named(name, estimate, *intervals.student(estimate, level))


def _named(name, estimate, low, high):
  return {name: estimate.mean, f'{name}_se': estimate.se, f'{name}_low': low, f'{name}_high': high}


def _records(task, greedy, scores):
  records = []
  for number, (row, answers) in enumerate(zip(task.rows, greedy.completions)):
    record = {**row, 'completion': answers[0]}
    for name, values in scores.items():
      record[name] = None if np.isnan(values[number, 0]) else float(values[number, 0])
    if greedy.lengths is not None:
      record['length'] = int(greedy.lengths[number][0])
    if greedy.truncated is not None:
      record['truncated'] = bool(greedy.truncated[number][0])
    records.append(record)
  return records
