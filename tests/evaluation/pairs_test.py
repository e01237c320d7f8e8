"""Preference metrics from rewards and likelihoods written by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from ptjax import config
from ptjax.evaluation import evaluate
from ptjax.evaluation import likelihood
from ptjax.evaluation import pairs

ROWS = tuple({'prompt': f'p{i}', 'chosen': f'good{i}', 'rejected': f'bad{i}'} for i in range(6))


def measure(rows=ROWS, beta=0.5, **functions):
  found = evaluate.evaluate(pairs.PairTask('x', rows, beta), **functions)
  return {name.removeprefix('eval/x/'): value for name, value in found.items()}


def scores(chosen, rejected):
  table = {**{f'good{i}': v for i, v in enumerate(chosen)},
           **{f'bad{i}': v for i, v in enumerate(rejected)}}
  def score(prompts, answers):
    assert list(prompts) == [f'p{answer.lstrip("goodba")}' for answer in answers]
    return [table[answer] for answer in answers]
  return score


def test_a_reward_models_accuracy_and_margin():
  chosen, rejected = [1.0, 2.0, 0.5, 3.0, 0.0, 1.0], [0.0, 2.5, 0.25, -1.0, 0.0, 0.5]
  found = measure(score=scores(chosen, rejected))
  margins = np.subtract(chosen, rejected)
  assert found['acc'] == 4 / 6  # a tie is not a win
  interval = stats.binomtest(4, 6).proportion_ci(method='wilson')
  assert (found['acc_low'], found['acc_high']) == pytest.approx((interval.low, interval.high))
  assert found['margin'] == pytest.approx(margins.mean())
  assert found['margin_se'] == pytest.approx(stats.sem(margins))
  assert found['loss'] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))
  assert found['ece_low'] <= found['ece'] <= found['ece_high']
  assert not [name for name in found if 'likelihood' in name]


def log_likelihood(nats, tokens):
  def function(prompts, answers, *, end=False):
    assert end  # trained completions are ended
    return likelihood.Likelihoods(np.array(nats), np.array(tokens), np.zeros(len(nats), bool))
  return function


def test_the_implicit_reward():
  tokens = [10] * 6 + [20] * 6
  policy = log_likelihood([-10.0] * 6 + [-9.0, -11.0, -20.0, -20.0, -9.5, -9.0], tokens)
  reference = log_likelihood([-12.0] * 6 + [-9.0, -14.0, -20.0, -21.0, -9.0, -10.0], tokens)
  found = measure(log_likelihood=policy, reference_log_likelihood=reference)
  gaps = 0.5 * (2.0 - np.array([0.0, 3.0, 0.0, 1.0, -0.5, 1.0]))
  assert found['margin'] == pytest.approx(gaps.mean()) and found['acc'] == 5 / 6
  assert found['acc_likelihood'] == 3 / 6
  assert found['acc_likelihood_per_token'] == 0  # -1 against -0.45 ... -1: the sixth is a tie
  alone = measure(log_likelihood=policy)
  assert set(alone) == {name for name in found if name.startswith('acc_likelihood')}


def test_calibration_error_by_hand():
  # sigma(0.1) = 0.525 in the first bin of [0.5, 1], sigma(2.2) = 0.900 in the ninth.
  margins = np.array([0.1, 0.1, -0.1, 2.2, 2.2, 2.2, -2.2])
  low, high = 1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(-2.2))
  expected = 3 / 7 * abs(2 / 3 - low) + 4 / 7 * abs(3 / 4 - high)
  assert pairs.calibration_error(margins) == pytest.approx(expected, rel=1e-12)


def test_a_reward_that_says_what_it_knows_is_calibrated():
  rng = np.random.default_rng(0)
  true = rng.normal(0, 2, 200_000)
  right = rng.random(200_000) < 1 / (1 + np.exp(-np.abs(true)))
  margins = np.where(right, np.abs(true), -np.abs(true))
  # About 20 000 pairs a bin: each gap is within 0.0035 of zero (one sd), most far less.
  assert pairs.calibration_error(margins) < 0.005
  assert pairs.calibration_error(3 * margins) > 0.05  # and one that overstates it is not


@pytest.mark.parametrize('margins, expected', [
    (np.zeros(5), 0.0),  # knows nothing and says so
    (np.full(5, 50.0), 0.0), (np.full(5, -50.0), 1.0)])  # sure, and right or wrong
def test_calibration_at_the_ends(margins, expected):
  assert pairs.calibration_error(margins) == pytest.approx(expected, abs=1e-12)


def test_a_task_asks_for_what_it_needs():
  with pytest.raises(config.UserError, match="evaluation 'x' needs score or log_likelihood, which"):
    measure(generate=lambda *_: None)
