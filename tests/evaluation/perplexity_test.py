"""Perplexity from likelihoods written by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from ptjax.evaluation import evaluate
from ptjax.evaluation import likelihood
from ptjax.evaluation import perplexity

NATS, TOKENS = np.array([-6.0, -3.0, -12.0]), np.array([4, 3, 6])


def knowing(prompts, ended):
  def log_likelihood(given, completions, *, end=False):
    assert list(given) == prompts and end is ended
    return likelihood.Likelihoods(NATS, TOKENS, np.zeros(3, bool))
  return log_likelihood


def test_text_is_predicted_from_its_beginning():
  rows = tuple({'text': text} for text in ('abcd', 'h\u00e9', 'xyz'))
  records = []
  found = evaluate.evaluate(perplexity.PerplexityTask('t', rows), record=records.extend,
                            log_likelihood=knowing(['', '', ''], False))
  per_token = 21 / 13
  assert found['eval/t/nats_per_token'] == pytest.approx(per_token)
  assert found['eval/t/nats_per_byte'] == pytest.approx(21 / (4 + 3 + 3))
  assert found['eval/t/perplexity'] == pytest.approx(math.exp(per_token))
  residuals = -NATS - per_token * TOKENS
  se = math.sqrt(3 / 2 * (residuals**2).sum()) / 13
  assert found['eval/t/nats_per_token_se'] == pytest.approx(se)
  assert found['eval/t/perplexity_se'] == pytest.approx(math.exp(per_token) * se)
  high = per_token + stats.t.ppf(0.975, 2) * se
  assert found['eval/t/perplexity_high'] == pytest.approx(math.exp(high))
  assert records[1] == {'text': 'h\u00e9', 'nats': 3.0, 'tokens': 3}


def test_completions_are_predicted_after_their_prompts_with_their_end():
  rows = tuple({'prompt': f'p{i}', 'completion': 'c' * (i + 1)} for i in range(3))
  found = evaluate.evaluate(perplexity.PerplexityTask('t', rows),
                            log_likelihood=knowing(['p0', 'p1', 'p2'], True))
  assert found['eval/t/nats_per_byte'] == pytest.approx(21 / 6)


def test_messages_have_no_bytes():
  answer = [{'role': 'assistant', 'content': 'yes'}]
  rows = tuple({'prompt': f'p{i}', 'completion': answer} for i in range(3))
  found = evaluate.evaluate(perplexity.PerplexityTask('t', rows),
                            log_likelihood=knowing(['p0', 'p1', 'p2'], True))
  assert 'eval/t/perplexity' in found and 'eval/t/nats_per_byte' not in found


def test_of_one_text_the_windows_are_drawn():
  def log_likelihood(prompts, completions, *, end=False):
    return likelihood.Likelihoods(NATS.sum()[None], TOKENS.sum()[None], np.zeros(1, bool),
                                  (NATS, TOKENS))
  found = evaluate.evaluate(perplexity.PerplexityTask('t', ({'text': 'x' * 26},)),
                            log_likelihood=log_likelihood)
  per_token = 21 / 13
  residuals = -NATS - per_token * TOKENS
  se = math.sqrt(3 / 2 * (residuals**2).sum()) / 13
  assert found['eval/t/nats_per_token_se'] == pytest.approx(se)
  assert found['eval/t/nats_per_byte'] == pytest.approx(per_token / 2)
  assert found['eval/t/nats_per_byte_se'] == pytest.approx(se / 2)
