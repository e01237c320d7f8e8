"""Accuracies and F1 from likelihoods written by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from ptjax.evaluation import choice
from ptjax.evaluation import evaluate
from ptjax.evaluation import likelihood


def answering(table):
  """A log-likelihood that knows `(prompt, completion) -> nats`."""
  def log_likelihood(prompts, completions, *, end=False):
    assert not end  # an answer is not ended: what follows it is not asked
    nats = np.array([table[pair] for pair in zip(prompts, completions, strict=True)])
    return likelihood.Likelihoods(nats, np.ones(len(nats), int), nats > -1)
  return log_likelihood


def run(task, table, **options):
  found = evaluate.evaluate(task, log_likelihood=answering(table), **options)
  return {name.removeprefix(f'eval/{task.name}/'): value for name, value in found.items()}


def test_accuracies_by_length():
  rows = ({'prompt': 'p', 'correct': 1,
           'choices': [' ab', ' abcdefgh', ' \u00e9\u00e9\u00e9\u00e9']},
          {'prompt': 'q', 'choices': [' x', ' y'], 'correct': 1})
  table = {('p', ' ab'): -3.0, ('p', ' abcdefgh'): -8.0, ('p', ' \u00e9\u00e9\u00e9\u00e9'): -3.9,
           ('q', ' x'): -2.0, ('q', ' y'): -2.0}
  # p in total: the first (-3). Per character: -1.5, -1.0, -0.975, so the third. Per byte:
  # -1.5, -1.0, -0.4875, the third. q: a tie, which the first answer wins.
  records = []
  found = run(choice.ChoiceTask('c', rows), table, record=records.extend)
  assert (found['acc'], found['acc_norm'], found['acc_bytes']) == (0, 0, 0)
  table['p', ' \u00e9\u00e9\u00e9\u00e9'] = -5.0  # per character -1.25, per byte -0.625
  found = run(choice.ChoiceTask('c', rows), table)
  assert (found['acc'], found['acc_norm'], found['acc_bytes']) == (0, 0.5, 0)
  assert 'f1' not in found
  assert records[0]['chosen'] == 0 and records[0]['correct'] == 1
  assert records[0]['nats'] == [-3.0, -8.0, -3.9]


def test_accuracy_has_wilsons_interval():
  rows = tuple({'prompt': str(i), 'choices': [' a', ' b', ' c'], 'correct': i % 3}
               for i in range(20))
  table = {(str(i), ' ' + c): -float(c != 'a') for i in range(20) for c in 'abc'}
  found = run(choice.ChoiceTask('c', rows), table)
  right = sum(i % 3 == 0 for i in range(20))
  assert found['acc'] == right / 20
  interval = stats.binomtest(right, 20).proportion_ci(method='wilson')
  assert (found['acc_low'], found['acc_high']) == pytest.approx((interval.low, interval.high))
  assert found['acc_se'] == pytest.approx(stats.sem([i % 3 == 0 for i in range(20)]))


def two_answers(predicted, actual):
  rows = tuple({'prompt': str(i), 'choices': [' no', ' yes'], 'correct': label}
               for i, label in enumerate(actual))
  table = {(str(i), answer): -1.0 - (place != guess) for i, guess in enumerate(predicted)
           for place, answer in enumerate((' no', ' yes'))}
  return choice.ChoiceTask('c', rows, positive=1), table


def test_f1():
  rng = np.random.default_rng(0)
  actual = rng.integers(0, 2, 400)
  predicted = np.where(rng.random(400) < 0.8, actual, 1 - actual)
  found = run(*two_answers(predicted, actual))
  precision = actual[predicted == 1].mean()
  recall = predicted[actual == 1].mean()
  assert found['f1'] == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12)
  assert found['acc'] == (predicted == actual).mean() and 'acc_norm' not in found
  # The delta method for F1 = 2 TP / (2 TP + FP + FN), a ratio of sums over rows.
  top, bottom = 2.0 * predicted * actual, 1.0 * predicted + actual
  residuals = top - found['f1'] * bottom
  se = math.sqrt(400 / 399 * (residuals**2).sum()) / bottom.sum()
  assert found['f1_se'] == pytest.approx(se, rel=0.1)  # 1000 resamples: good to 2.2 %
  assert found['f1_low'] < found['f1'] < found['f1_high']
  assert found['f1_high'] - found['f1_low'] == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_f1_is_absent_where_nothing_is_positive():
  found = run(*two_answers([0, 0], [0, 0]))
  assert found['acc'] == 1 and 'f1' not in found
  assert run(*two_answers([0, 0, 0], [0, 1, 1]))['f1'] == 0
