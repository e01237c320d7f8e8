"""Measures what a policy writes: greedy scores, pass@k, maj@k, and scores of the whole corpus."""

import dataclasses

import numpy as np

from ptjax.evaluation import intervals
from ptjax.evaluation import pass_at_k


def measure(task, functions, options):
  """Returns the metrics of a `tasks.EvalTask`, and a record per row.

  From greedy completions: the task's scorers (`acc_strict`, `acc_flexible`, ...) and corpus
  scorers (`chrf`), `format_gap` (flexible minus strict), `mean_length` (tokens), `truncated` (a
  fraction). From samples: `pass@k`, `maj@k`, and `sampled_<name>` of each corpus scorer.
  `unscored` is the fraction of greedy completions without a verdict, absent when there are none;
  they count as wrong in accuracies and are left out of other means.
  """
  greedy = _generate(task, functions.generate, 1, True)
  scores = _score(task, greedy.completions)
  metrics = _greedy_metrics(scores, greedy, options.level)
  metrics |= _corpus_metrics(task, '', greedy.completions, options.level)
  if options.samples > 1 and (task.correct is not None or task.corpus):
    sampled = _generate(task, functions.generate, options.samples, False).completions
    metrics |= _corpus_metrics(task, 'sampled_', sampled, options.level)
    if task.correct is not None:
      metrics |= _sampled_metrics(task, sampled, options)
  return metrics, _records(task, greedy, scores)


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
      metrics[name] = intervals.proportion(np.nan_to_num(values), level)
    elif not np.isnan(values).all():
      metrics[name] = intervals.mean([row for row in values if not np.isnan(row).any()], level)
  if 'acc_strict' in scores and 'acc_flexible' in scores:
    gap = np.nan_to_num(scores['acc_flexible']) - np.nan_to_num(scores['acc_strict'])
    metrics['format_gap'] = intervals.mean(gap, level)  # paired: the rows' difficulty cancels
  if greedy.lengths is not None:
    metrics['mean_length'] = intervals.mean(greedy.lengths, level)
  if greedy.truncated is not None:
    metrics['truncated'] = intervals.proportion(np.array(greedy.truncated, np.float64), level)
  unscored = np.any([np.isnan(values) for values in scores.values()], axis=0)
  if unscored.any():
    metrics['unscored'] = intervals.proportion(unscored.astype(np.float64), level)
  return metrics


def _corpus_metrics(task, prefix, completions, level):
  return {prefix + name: intervals.bootstrap(scorer(task.rows, completions), len(task.rows), level)
          for name, scorer in task.corpus.items()}


def _sampled_metrics(task, completions, options):
  correct = _score(task, completions, task.correct)[task.correct] == 1.0  # [P, n]; NaN is wrong
  samples, level = options.samples, options.level
  ks = tuple(sorted(set(options.ks))) or (1, samples)
  metrics = {}
  for k in ks:
    per_row = pass_at_k.pass_at_k(samples, correct.sum(axis=1), k)  # [P]
    metrics[f'pass@{k}'] = intervals.proportion(per_row[:, None], level)
  if task.vote is not None:
    votes = [[task.vote(text) for text in answers] for answers in completions]
    for k in ks:
      per_row = np.array([pass_at_k.maj_at_k(row, right, k) for row, right in zip(votes, correct)])
      metrics[f'maj@{k}'] = intervals.proportion(per_row[:, None], level)
  return metrics


def _records(task, greedy, scores):
  records = []
  for number, (row, answers) in enumerate(zip(task.rows, greedy.completions)):
    record = {**row, 'completion': answers[0]}
    if 'completion' in row:
      record['reference'] = row['completion']
    for name, values in scores.items():
      record[name] = None if np.isnan(values[number, 0]) else float(values[number, 0])
    if greedy.lengths is not None:
      record['length'] = int(greedy.lengths[number][0])
    if greedy.truncated is not None:
      record['truncated'] = bool(greedy.truncated[number][0])
    records.append(record)
  return records
