"""Judges: verdicts from replies, both orders, a cache, and a server that misbehaves."""

import pathlib
import sys

import numpy as np
import pytest

from ptjax import config
from ptjax.rewards import endpoint
from ptjax.rewards import judge
from ptjax.rewards import verdicts

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import endpoints


def _answers(question):
  """The two answers of a pairwise question, as the judge sees them."""
  part = lambda name: question.split(f'[Answer {name}]\n')[1].split(f'\n[End of answer {name}]')[0]
  return part('A'), part('B')


def _longer(conversations):
  """A fair model that prefers the longer answer."""
  replies = []
  for (message,) in conversations:
    a, b = _answers(message['content'])
    replies.append('[[C]]' if len(a) == len(b) else '[[A]]' if len(a) > len(b) else '[[B]]')
  return replies


# --- replies


@pytest.mark.parametrize('reply, outcome', [
    ('[[A]]', 1.0), ('At first [[A]], but no: [[ b ]].', 0.0), ('[[C]]', 0.5), ('[[tie]]', 0.5),
    ('A', 1.0), (' "B". ', 0.0), ('A is better', None), ('', None), ('[[D]]', None)])
def test_verdicts_are_read_from_replies(reply, outcome):
  assert judge.read_verdict(reply) == outcome


@pytest.mark.parametrize('reply, rating', [
    ('Good. [[10]]', 1.0), ('[[1]]', 0.0), ('[[5.5]]', 0.5), ('4', 1 / 3), ('[[0]]', None),
    ('[[11]]', None), ('about 7', None), ('', None)])
def test_ratings_are_read_from_replies(reply, rating):
  assert judge.read_rating(reply) == (None if rating is None else pytest.approx(rating))


# --- pairs


def test_both_orders_are_asked_and_averaged():
  fair = judge.Judge(_longer)
  np.testing.assert_array_equal(
      fair.compare(['p'] * 4, ['aa', 'a', 'aa', 'x'], ['b', 'bb', 'bb', 'x']), [1, 0, 0.5, 0.5])
  assert fair.take_report() == {'asked': 6}  # equal texts are not asked about
  biased = judge.Judge(lambda conversations: ['[[A]]'] * len(conversations))  # the first, always
  np.testing.assert_array_equal(biased.compare(['p'], ['aa'], ['b']), [0.5])


def test_one_order_stands_for_both_where_the_other_has_no_verdict():
  def first_only(conversations):
    return [None if _answers(c[0]['content'])[0] == 'bad' else '[[A]]' for c in conversations]
  mute = judge.Judge(first_only)
  np.testing.assert_array_equal(mute.compare(['p', 'q'], ['good', 'bad'], ['bad', 'bad ']),
                                [1.0, 0.0])
  nothing = judge.Judge(lambda conversations: ['hm'] * len(conversations))
  np.testing.assert_array_equal(nothing.compare(['p'], ['a'], ['b']), [np.nan])
  assert nothing.take_report() == {'asked': 2, 'unreadable': 2}
  assert nothing.take_report() == {}


def test_a_reward_model_judges_by_bradley_and_terry():
  judge_ = judge.ScoreJudge(lambda prompts, completions: [float(c) for c in completions])
  chances = judge_.compare(['p'] * 3, ['1', '0', '1000'], ['0', '2', '-1000'])
  np.testing.assert_allclose(chances, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2)), 1.0], rtol=1e-12)


def test_messages_are_shown_as_text_and_rubrics_named():
  seen = []
  judge.Judge(lambda c: seen.extend(c) or ['[[5]]'], rubric='brevity').rate(
      [[{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'hello'}]], ['hi'])
  text = seen[0][0]['content']
  assert 'system: be kind\nuser: hello' in text and 'by this alone: brevity' in text


# --- the cache


def test_verdicts_are_kept_by_content_and_judge(tmp_path):
  calls = []

  def ask(conversations):
    calls.append(len(conversations))
    return _longer(conversations)
  make = lambda identity: judge.Judge(
      ask, identity=identity, cache=verdicts.Verdicts(tmp_path / 'deep' / 'verdicts.jsonl'))
  first = make('one')
  first.compare(['p'], ['aa'], ['b'])
  assert calls == [2] and first.take_report() == {'asked': 2}
  again = make('one')  # a new process reads the file
  np.testing.assert_array_equal(again.compare(['p', 'p'], ['aa', 'aa'], ['b', 'bbb']), [1, 0])
  assert calls == [2, 2] and again.take_report() == {'asked': 2, 'cached': 2}
  make('two').compare(['p'], ['aa'], ['b'])
  assert calls == [2, 2, 2]


def test_a_torn_cache_costs_one_verdict_and_garbage_is_not_kept(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  store = verdicts.Verdicts(path)
  store.add({'one': 1.0})
  path.write_text(path.read_text() + '["two", 0.')  # a crash in the middle of a line
  store = verdicts.Verdicts(path)
  assert store.get('one') == 1.0 and store.get('two') is None
  store.add({'three': 0.5})
  assert verdicts.Verdicts(path).get('three') == 0.5
  unreadable = judge.Judge(lambda c: ['?'] * len(c), cache=verdicts.Verdicts(path))
  for _ in range(2):
    unreadable.rate(['p'], ['a'])
  assert unreadable.take_report() == {'asked': 2, 'unreadable': 2}


# --- the endpoint


def _ask(url, questions, **options):
  waits = []
  ask = endpoint.Endpoint(**{'url': url, 'model': 'm', 'timeout_seconds': 0.2, 'retries': 3,
                             'sleep': waits.append, **options})
  return ask([[{'role': 'user', 'content': q}] for q in questions]), waits


def test_replies_come_in_order_with_key_and_model(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'secret')
  behave = lambda question, attempt: endpoints.reply(question.upper())
  with endpoints.serve(behave) as (url, attempts):
    questions = [f'question {i}' for i in range(20)]
    replies, waits = _ask(url + '/', questions, temperature=0.5, max_tokens=7,
                          timeout_seconds=10.0)
  assert replies == [q.upper() for q in questions] and not waits
  (path, authorization, body), = attempts['question 3']
  assert path == '/v1/chat/completions' and authorization == 'Bearer secret'
  assert body == {'model': 'm', 'temperature': 0.5, 'max_tokens': 7,
                  'messages': [{'role': 'user', 'content': 'question 3'}]}


_TROUBLE = {
    'an error': (500, {}, b'oops'),
    'a wait': (429, {'Retry-After': '7'}, b''),
    'garbage': (200, {}, b'<html>'),
    'no choice': (200, {}, b'{"choices": []}'),
    'no text': (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    'cut off': (200, {'Content-Length': 500}, b'{"choices": [{"mess'),
    'silence': None,
}


@pytest.mark.parametrize('trouble', _TROUBLE)
def test_trouble_passes_with_retries(trouble):
  behave = lambda question, attempt: _TROUBLE[trouble] if attempt < 3 else endpoints.reply('[[A]]')
  with endpoints.serve(behave) as (url, attempts):
    replies, waits = _ask(url, ['q'])
  assert replies == ['[[A]]'] and len(attempts['q']) == 3
  if trouble == 'a wait':
    assert waits == [7.0, 7.0]
  else:
    assert 0.5 <= waits[0] <= 1.0 <= waits[1] <= 2.0


def test_what_never_answers_is_given_up_and_the_rest_counts():
  behave = lambda question, attempt: (
      endpoints.reply('[[A]]') if question == 'good' else (503, {}, b''))
  with endpoints.serve(behave) as (url, attempts):
    replies, waits = _ask(url, ['bad', 'good'], retries=2)
    assert replies == [None, '[[A]]'] and len(attempts['bad']) == 3 and len(waits) == 2
    with pytest.raises(config.UserError, match='answered none of 1 questions: HTTP 503'):
      _ask(url, ['bad'])
  with pytest.raises(config.UserError, match='answered none of 2 .*Connection refused.*4 attempts'):
    _ask(url, ['down', 'down too'])


def test_a_refusal_is_not_asked_again():
  with endpoints.serve(lambda q, n: (404, {}, b'no model m')) as (url, attempts):
    with pytest.raises(config.UserError, match="refuses model 'm': HTTP 404 .*no model m"):
      _ask(url, ['q'])
    assert len(attempts['q']) == 1
  behave = lambda q, n: (400, {}, b'too long') if q == 'long' else endpoints.reply('fine')
  with endpoints.serve(behave) as (url, attempts):  # one question's own fault
    assert _ask(url, ['long', 'short'])[0] == [None, 'fine']
    assert len(attempts['long']) == 1


def test_bad_options_are_refused():
  for options in ({'timeout_seconds': 0}, {'workers': 0}, {'retries': -1}):
    with pytest.raises(config.UserError, match='judge http://x'):
      endpoint.Endpoint(url='http://x', model='m', **options)
