"""chrF against sacrebleu's own, and against the definition."""

import collections
import sys

import numpy as np
import pytest

from ptjax import config
from ptjax.data import sonnets
from ptjax.evaluation import chrf
from ptjax.evaluation import evaluate
from ptjax.evaluation import tasks


@pytest.fixture(scope='module')
def rows(shared_data):
  pytest.importorskip('sacrebleu')
  return tuple(sonnets.sonnets(shared_data / 'shakespeare' / 'TRUE_sonnets_held_out_dev.txt'))


def other(rows):
  """A continuation for each: that of the sonnet before."""
  return [[row['completion']] for row in (rows[-1], *rows[:-1])]


def by_definition(texts, references, beta=2):
  """chrF of a corpus from its definition: counts summed over texts, mean over orders 1 to 6."""
  precisions, recalls = [], []
  for n in range(1, 7):
    hits = written = wanted = 0
    for text, reference in zip(texts, references):
      text, reference = ''.join(text.split()), ''.join(reference.split())
      own = collections.Counter(text[i:i + n] for i in range(len(text) - n + 1))
      true = collections.Counter(reference[i:i + n] for i in range(len(reference) - n + 1))
      hits += (own & true).total()
      written, wanted = written + own.total(), wanted + true.total()
    precisions.append(hits / written)
    recalls.append(hits / wanted)
  p, r = np.mean(precisions), np.mean(recalls)
  return 100 * (1 + beta**2) * p * r / (beta**2 * p + r)


@pytest.mark.parametrize('whole', [False, True])
def test_corpus_chrf_is_sacrebleus_and_the_definitions(rows, whole):
  from sacrebleu import metrics
  completions = other(rows)
  statistic = chrf.make_chrf(whole=whole)(rows, completions)
  before = lambda row: row['prompt'] if whole else ''
  texts = [before(row) + text for row, (text,) in zip(rows, completions)]
  references = [before(row) + row['completion'] for row in rows]
  value = statistic(np.arange(12))
  assert value == pytest.approx(metrics.CHRF().corpus_score(texts, [references]).score, rel=1e-12)
  assert value == pytest.approx(by_definition(texts, references), rel=1e-12)
  drawn = np.array([3, 3, 7, 0])  # a resample is the corpus of its texts
  assert statistic(drawn) == pytest.approx(metrics.CHRF().corpus_score(
      [texts[i] for i in drawn], [[references[i] for i in drawn]]).score, rel=1e-12)


def test_the_interval_of_the_sonnet_task_is_the_bootstraps(rows):
  from sacrebleu import metrics
  completions = other(rows)
  task = tasks.make('sonnets', rows)
  found = evaluate.evaluate(task, lambda *_: evaluate.Generations(completions))
  assert set(found) == {f'eval/sonnets/{name}{part}' for name in ('chrf', 'chrf_whole')
                        for part in ('', '_se', '_low', '_high')}
  # sacrebleu resamples with another stream: mean and half-width of 95 %, good to a few percent.
  score = metrics.CHRF().corpus_score(
      [text for text, in completions], [[row['completion'] for row in rows]], n_bootstrap=1000)
  half = (found['eval/sonnets/chrf_high'] - found['eval/sonnets/chrf_low']) / 2
  assert half == pytest.approx(score._ci, rel=0.1)
  assert found['eval/sonnets/chrf_se'] == pytest.approx(half / 1.96, rel=0.15)
  assert found['eval/sonnets/chrf_whole'] > found['eval/sonnets/chrf'] + 5  # three lines given


def test_true_endings_score_100_and_nothing_scores_0(rows):
  true = [[row['completion']] for row in rows]
  statistic = chrf.make_chrf()(rows, true)
  assert statistic(np.arange(12)) == pytest.approx(100)
  assert chrf.make_chrf()(rows, [['']] * 12)(np.arange(12)) == 0


def test_several_samples_count_each(rows):
  true = [[row['completion']] * 2 for row in rows]
  mixed = [a + b for a, b in zip(true, other(rows))]
  statistic = chrf.make_chrf()(rows, mixed)
  assert chrf.make_chrf()(rows, other(rows))(np.arange(12)) < statistic(np.arange(12)) < 100
  found = evaluate.evaluate(
      tasks.make('sonnets', rows),
      lambda task_rows, samples, greedy: evaluate.Generations(
          other(rows) if greedy else [answers[:samples] for answers in mixed]), samples=3)
  assert found['eval/sonnets/sampled_chrf'] == pytest.approx(statistic(np.arange(12)), rel=1e-12)
  assert found['eval/sonnets/sampled_chrf'] > found['eval/sonnets/chrf']
  assert not [name for name in found if '@' in name]  # there is no right or wrong


def test_without_sacrebleu(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu', None)
  with pytest.raises(config.UserError, match='needs sacrebleu; .*pip install sacrebleu'):
    chrf.make_chrf()
