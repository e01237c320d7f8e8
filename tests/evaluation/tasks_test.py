"""Tasks are told from rows, score real ones and refuse unusable ones."""

import json

import numpy as np
import pytest

from ptjax import config
from ptjax.data import sonnets
from ptjax.data import sources
from ptjax.evaluation import choice
from ptjax.evaluation import evaluate
from ptjax.evaluation import likelihood
from ptjax.evaluation import pairs
from ptjax.evaluation import perplexity
from ptjax.evaluation import tasks
from ptjax.rewards import combine


def test_gsm8k_rows(shared_data):
  lines = (shared_data / 'gsm8k' / 'test.jsonl').read_text().splitlines()
  rows = [{'prompt': row['question'], 'answer': row['answer']} for row in map(json.loads, lines)]
  task = tasks.make('gsm8k', rows, limit=50, max_tokens=256)
  assert len(task.rows) == 50 and task.max_tokens == 256 and task.name == 'gsm8k'
  answers = [row['answer'] for row in task.rows]
  loose = [answer.replace('####', 'so') for answer in answers]
  assert task.scorers['acc_strict'](None, answers, answer=answers) == [1.0] * 50
  assert task.scorers['acc_strict'](None, loose, answer=answers) == [0.0] * 50
  assert task.scorers['acc_flexible'](None, loose, answer=answers) == [1.0] * 50
  assert [task.vote(text) for text in answers] == [task.vote(text) for text in loose]


@pytest.mark.parametrize('kind', ['arithmetic', 'gsm8k', 'math'])
def test_each_kind_tells_right_from_wrong(kind):
  task = tasks.make(kind, [{'prompt': 'p', 'answer': 5}], name='held_out')
  assert task.name == 'held_out' and task.correct in task.scorers
  for scorer in task.scorers.values():
    right, wrong = {'arithmetic': ('5', '6'), 'gsm8k': ('#### 5', '#### 6'),
                    'math': ('\\boxed{5}', '\\boxed{6}')}[kind]
    assert scorer(None, [right, wrong], answer=[5, 5]) == [1.0, 0.0]
  assert task.vote('it is 5') == '5'


def test_a_task_of_the_users_reward():
  task = tasks.rewarded('mine', [{'prompt': 'p', 'level': 2}],
                        combine.load([lambda prompts, completions, level: [3 * level[0], None]]))
  assert task.scorers['reward'](['p'] * 2, ['a', 'b'], level=[2, 2]) == [6.0, None]
  assert task.correct is None


@pytest.mark.parametrize('kind, rows, message', [
    ('gsm8', [{}], "no evaluation task 'gsm8'; did you mean gsm8k?"),
    ('gsm8k', [], 'no rows'),
    ('gsm8k', [{'prompt': 'p', 'answer': 1}, {'question': 'q', 'answer': 2}],
     "row 1 has no 'prompt'; found: question, answer; map one with --set data.columns.prompt="),
    ('math', [{'prompt': 'p', 'answer': None}], "row 0 has no 'answer'"),
    ('sonnets', [{'prompt': 'p', 'completion': None}], "row 0 has no 'completion'"),
    ('choice', [{'prompt': 'p', 'label': 0}],
     'needs the columns prompt, choices, correct; found: '),
    ('quora', [{'prompt': 'p', 'choices': [' no', ' yes'], 'label': ''}],
     'no rows left: 1 without a label'),
    ('choice', [{'prompt': 'p', 'choices': ['a', 'b'], 'label': 2}], 'label 2: expected a place'),
    ('perplexity', [{'prompt': 'p'}], 'needs the columns prompt, completion; found: prompt'),
    ('perplexity', [{'text': ''}], 'no rows left: 1 with an empty text'),
    ('pairs', [{'prompt': 'p', 'chosen': 'a', 'rejected': 'a'}],
     'no rows left: 1 with identical answers'),
    ('pairs', [], 'no rows'),
])
def test_unusable_rows(kind, rows, message):
  with pytest.raises(config.UserError, match=message):
    tasks.make(kind, rows)


def quora(shared_data):
  return sources.load(shared_data / 'quora' / 'quora_pairs.csv')


def test_quora_by_an_oracle_and_by_a_coin(shared_data, caplog):
  rows = quora(shared_data)
  with caplog.at_level('WARNING'):
    task = tasks.make('quora', rows)
  assert "evaluation 'quora': 1 of 12000 rows dropped (1 without a label)" in caplog.text
  assert isinstance(task, choice.ChoiceTask) and len(task.rows) == 11999
  labels = {row['prompt']: row['correct'] for row in task.rows}
  actual = np.array([row['correct'] for row in task.rows])

  def answering(says_yes):
    def log_likelihood(prompts, completions, *, end=False):
      assert set(completions) == {' no', ' yes'}
      yes = np.array([says_yes(prompt) for prompt in prompts])
      is_yes = np.array([completion == ' yes' for completion in completions])
      return likelihood.Likelihoods(-1.0 * (yes != is_yes), np.ones(len(yes), int), yes)
    return log_likelihood

  found = evaluate.evaluate(task, log_likelihood=answering(lambda prompt: labels[prompt] == 1))
  # Some prompts stand in the file twice, with both labels; everything else is right.
  assert found['eval/quora/acc'] > 0.999 and found['eval/quora/f1'] > 0.999
  always = evaluate.evaluate(task, log_likelihood=answering(lambda prompt: True))
  share = actual.mean()
  assert always['eval/quora/acc'] == pytest.approx(share)
  assert always['eval/quora/f1'] == pytest.approx(2 * share / (1 + share))
  assert always['eval/quora/acc_se'] == pytest.approx(np.sqrt(share * (1 - share) / 11998))


def test_a_limit_counts_rows_that_can_be_used(shared_data):
  assert len(tasks.make('quora', quora(shared_data), limit=100).rows) == 100


def test_what_rows_are(shared_data):
  def kind(path, **options):
    return tasks.recognise(path, sources.load(shared_data / path, limit=3, **options))
  assert kind('gsm8k/test.jsonl') == 'gsm8k'  # although its `answer` is the bare number
  assert kind('math/math500.json') == kind('math/aime24.json') == 'math'
  assert kind('preference/dpo_en.json') == 'pairs'
  assert kind('preference/persona_agreeableness.jsonl') == 'pairs'
  assert kind('tinystories/../instruct/seed_tasks.jsonl') == 'perplexity'
  assert tasks.recognise('q.csv', quora(shared_data)) == 'quora'
  poems = sonnets.sonnets(shared_data / 'shakespeare' / 'sonnets.txt')
  assert tasks.recognise('sonnets.txt', poems) == 'sonnets'
  assert tasks.recognise('arithmetic@test', []) == 'arithmetic'
  assert tasks.recognise('a', [{'prompt': 'p', 'choices': ['a'], 'label': 0}]) == 'choice'
  assert tasks.recognise('a', [{'text': 't'}]) == 'perplexity'
  assert tasks.recognise('a', [{'prompt': 'p', 'answer': '#### 3'}]) == 'gsm8k'
  assert tasks.recognise('a', [{'prompt': 'p'}]) is None
  assert tasks.recognise('perplexity:a', [{'prompt': 'p', 'choices': ['a'], 'label': 0}]) == (
      'perplexity')


@pytest.mark.parametrize('name, expected', [
    ('quora:data/q.csv', ('quora', 'data/q.csv')), ('perplexity:owner/set:config@test',
                                                    ('perplexity', 'owner/set:config@test')),
    ('owner/set:config@test', (None, 'owner/set:config@test')),
    ('data/q.csv', (None, 'data/q.csv')),
    ('arithmetic:max_operand=9@test', (None, 'arithmetic:max_operand=9@test')),
    ('quora:', (None, 'quora:'))])
def test_a_task_may_be_named_before_the_data_set(name, expected):
  assert tasks.split(name) == expected


def test_every_kind_has_a_task():
  rows = [{'prompt': 'p', 'answer': 1, 'completion': 'c', 'choices': [' no', ' yes'], 'label': 1,
           'chosen': 'a', 'rejected': 'b'}]
  needs = {kind: tasks.make(kind, rows).needs for kind in tasks.names()}
  assert needs == {
      **dict.fromkeys(('arithmetic', 'gsm8k', 'math', 'sonnets'), (('generate',),)),
      **dict.fromkeys(('quora', 'choice', 'perplexity'), (('log_likelihood',),)),
      'pairs': (('score',), ('log_likelihood',))}
  assert tasks.make('pairs', rows, beta=0.3) == pairs.PairTask('pairs', tuple(rows), 0.3)
  text = [{'text': 'a', 'prompt': 'p', 'completion': 'c'}]
  assert tasks.make('perplexity', text) == perplexity.PerplexityTask('perplexity', tuple(text))


def test_pairs_of_every_format(shared_data):
  def load(name, limit=5):
    return tasks.make('pairs', sources.load(shared_data / 'preference' / name, limit=limit)).rows
  for row in load('dpo_en.json'):  # conversations with one answer each
    assert row['prompt'][-1]['role'] == 'user' and row['chosen'][0]['role'] == 'assistant'
  for row in load('hh_harmless_mild.jsonl'):  # whole dialogues
    assert row['prompt'].endswith('\n\nAssistant:') and 'Assistant:' not in row['chosen']
  for row in load('persona_agreeableness.jsonl'):
    assert {row['chosen'], row['rejected']} == {' Yes', ' No'}
  whole, = tasks.make('pairs', [{'chosen': 'A good day.', 'rejected': 'A bad day.'}]).rows
  assert (whole['prompt'], whole['chosen']) == ('', 'A good day.')


def test_continuations_also_have_a_likelihood():
  pytest.importorskip('sacrebleu')
  rows = [{'prompt': 'p', 'completion': 'abcdef'}, {'prompt': 'q', 'completion': 'ghijkl'}]
  def log_likelihood(prompts, completions, *, end=False):
    assert (list(prompts), list(completions), end) == (['p', 'q'], ['abcdef', 'ghijkl'], True)
    return likelihood.Likelihoods(np.array([-6.0, -8.0]), np.array([7, 7]), np.zeros(2, bool))
  records = []
  found = evaluate.evaluate(
      tasks.make('sonnets', rows), lambda *_: evaluate.Generations([['abcdef'], ['x']]),
      log_likelihood=log_likelihood, record=records.extend)
  assert found['eval/sonnets/nats_per_token'] == 1.0 and 0 < found['eval/sonnets/chrf'] < 100
  assert records[0]['completion'] == records[0]['reference'] == 'abcdef'
