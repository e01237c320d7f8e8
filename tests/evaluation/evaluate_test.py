"""The numbers of an evaluation, from completions written by hand."""

import numpy as np
import pytest
from scipy import stats

from ptjax import config
from ptjax.evaluation import evaluate
from ptjax.evaluation import tasks

_ROWS = [{'prompt': '2+3=', 'answer': 5}, {'prompt': '4+4=', 'answer': 8},
         {'prompt': '1+1=', 'answer': '2'}, {'prompt': '9-1=', 'answer': 8}]
_GREEDY = [['5'], ['it is 8'], ['3'], ['8']]
_SAMPLED = [['5', '5', '6', 'none'], ['7', '8', '8', '8'], ['1', '1', '2', '3'], ['8'] * 4]


def _generate(rows, samples, greedy):
  assert [row['prompt'] for row in rows] == [row['prompt'] for row in _ROWS]
  if greedy:
    assert samples == 1
    return evaluate.Generations(_GREEDY, [[1], [7], [1], [1]], [[False], [True], [False], [False]])
  assert samples == 4
  return evaluate.Generations(_SAMPLED)


def test_greedy_metrics():
  records = []
  metrics = evaluate.evaluate(tasks.make('arithmetic', _ROWS), _generate, record=records.extend)
  assert all(name.startswith('eval/arithmetic/') for name in metrics)
  metrics = {name.removeprefix('eval/arithmetic/'): value for name, value in metrics.items()}
  assert set(metrics) == {name + part for part in ('', '_se', '_low', '_high') for name in (
      'acc_strict', 'acc_flexible', 'format_gap', 'mean_length', 'truncated')}
  assert metrics['acc_strict'] == 0.5 and metrics['acc_flexible'] == 0.75
  assert metrics['acc_flexible_se'] == pytest.approx(np.sqrt(0.75 * 0.25 / 3))
  expected = stats.binomtest(3, 4).proportion_ci(method='wilson')
  assert metrics['acc_flexible_low'] == pytest.approx(expected.low)
  assert metrics['acc_flexible_high'] == pytest.approx(expected.high)
  assert metrics['format_gap'] == 0.25
  assert metrics['format_gap_se'] == pytest.approx(stats.sem([0, 1, 0, 0]))
  assert metrics['mean_length'] == 2.5 and metrics['truncated'] == 0.25
  low, high = stats.ttest_1samp([1, 7, 1, 1], 0).confidence_interval()
  assert (metrics['mean_length_low'], metrics['mean_length_high']) == pytest.approx((low, high))
  assert records[1] == {'prompt': '4+4=', 'answer': 8, 'completion': 'it is 8', 'acc_strict': 0.0,
                        'acc_flexible': 1.0, 'length': 7, 'truncated': True}


def test_sampled_metrics():
  metrics = evaluate.evaluate(tasks.make('arithmetic', _ROWS), _generate, samples=4, ks=(1, 2, 4))
  right = [2, 3, 1, 4]
  assert metrics['eval/arithmetic/pass@1'] == pytest.approx(sum(right) / 16)
  assert metrics['eval/arithmetic/pass@1_se'] == pytest.approx(stats.sem(np.array(right) / 4))
  assert metrics['eval/arithmetic/pass@2'] == pytest.approx((5 / 6 + 1 + 1 / 2 + 1) / 4)
  assert metrics['eval/arithmetic/pass@4'] == 1
  assert metrics['eval/arithmetic/maj@4'] == pytest.approx((1 + 1 + 0 + 1) / 4)
  assert metrics['eval/arithmetic/maj@1'] == pytest.approx(sum(right) / 16)
  assert metrics['eval/arithmetic/pass@4_high'] == 1 > metrics['eval/arithmetic/pass@4_low'] > 0.4
  default = evaluate.evaluate(tasks.make('arithmetic', _ROWS), _generate, samples=4)
  assert {name.rpartition('/')[2] for name in default if '@' in name and '_' not in
          name.rpartition('@')[2]} == {'pass@1', 'pass@4', 'maj@1', 'maj@4'}


def test_completions_without_verdict_count_as_wrong_and_show():
  task = tasks.EvalTask(
      'x', tuple(_ROWS), {'acc_flexible': lambda p, c, **k: [1.0, None, 1.0, 1.0],
                          'reward': lambda p, c, **k: [2.0, None, 4.0, None]})
  metrics = evaluate.evaluate(task, _generate)
  assert metrics['eval/x/acc_flexible'] == 0.75
  assert metrics['eval/x/reward'] == 3.0
  assert metrics['eval/x/unscored'] == 0.5


def test_what_does_not_apply_is_absent():
  task = tasks.make('arithmetic', _ROWS[:1])
  metrics = evaluate.evaluate(task, lambda *_: evaluate.Generations([['5']]))
  assert metrics['eval/arithmetic/acc_strict'] == 1
  assert not [name for name in metrics if 'length' in name or name.endswith('_se')]
  assert not any(np.isnan(value) for value in metrics.values())


@pytest.mark.parametrize('options, message', [
    ({'samples': 2, 'ks': (1, 4)}, r'eval.k=\(1, 4\): expected 1 to eval.samples=2'),
    ({'samples': 2, 'ks': (0,)}, r'eval.k=\(0,\)'), ({'samples': 0}, 'eval.samples=0')])
def test_bad_k(options, message):
  with pytest.raises(config.UserError, match=message):
    evaluate.evaluate(tasks.make('arithmetic', _ROWS), _generate, **options)


def test_a_generator_that_breaks_its_promise():
  with pytest.raises(ValueError, match='generate gave completions for 1 rows, expected 4 rows'):
    evaluate.evaluate(tasks.make('arithmetic', _ROWS), lambda *_: evaluate.Generations([['5']]))


def test_a_task_asks_for_functions_that_are_there():
  with pytest.raises(config.UserError, match="'arithmetic' needs generate, which this model does "):
    evaluate.evaluate(tasks.make('arithmetic', _ROWS), log_likelihood=lambda *_: None)
