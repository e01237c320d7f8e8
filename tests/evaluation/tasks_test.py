"""Tasks score real rows and refuse unusable ones."""

import json

import pytest

from ptjax import config
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


@pytest.mark.parametrize('kind', tasks.names())
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
])
def test_unusable_rows(kind, rows, message):
  with pytest.raises(config.UserError, match=message):
    tasks.make(kind, rows)
