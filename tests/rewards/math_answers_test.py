"""Maths answers on the real gold answers of GSM8K and MATH, and on what models write instead."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from ptjax.rewards import math_answers
from ptjax.rewards import pool as pool_lib

_EQUALITY = pathlib.Path(math_answers.__file__).with_name('math_equality.py')


class _NoPool:
  """Fails the test if the fast path hands anything on."""

  def map(self, items):
    raise AssertionError(f'not decided by spelling: {items}')


@pytest.fixture(name='pool', scope='module')
def pool_fixture():
  pool = pool_lib.WorkerPool(_EQUALITY, 'equal', num_workers=1, timeout_seconds=30)
  yield pool
  pool.close()


@pytest.mark.parametrize('extraction', ['strict', 'flexible'])
@pytest.mark.parametrize('split', ['train', 'test'])
def test_gsm8k_gold_answers_verify_against_themselves(shared_data, split, extraction):
  lines = (shared_data / 'gsm8k' / f'{split}.jsonl').read_text().splitlines()
  gold = [json.loads(line)['answer'] for line in lines]
  reward = math_answers.MathReward('hash', extraction, pool=_NoPool())
  assert reward(None, gold, answer=gold) == [1.0] * len(gold)
  wrong = [text + '.5' for text in gold]
  assert reward(None, wrong, answer=gold) == [0.0] * len(gold)


def test_math_gold_answers_verify_by_spelling(shared_data):
  gold = [row['answer'] for row in json.loads((shared_data / 'math' / 'math500.json').read_text())]
  texts = [f'Therefore the answer is $\\boxed{{{answer}}}$.' for answer in gold]
  for extraction in ('strict', 'flexible'):
    reward = math_answers.MathReward('boxed', extraction, pool=_NoPool())
    assert reward(None, texts, answer=gold) == [1.0] * len(gold)


def test_math_gold_answers_verify_by_algebra(shared_data, pool):
  gold = [row['answer'] for row in json.loads((shared_data / 'math' / 'math500.json').read_text())]
  sample = sorted(set(gold))[::12]
  outcomes = pool.map([(answer, answer) for answer in sample])
  assert [outcome.value for outcome in outcomes] == [True] * len(sample)


def test_competition_answers_come_boxed(shared_data):
  gold = [row['answer'] for row in json.loads((shared_data / 'math' / 'aime24.json').read_text())]
  reward = math_answers.MathReward('boxed', 'strict', pool=_NoPool())
  assert reward(None, ['\\boxed{204}'], answer=gold[:1]) == [1.0]


@pytest.mark.parametrize('gold, answer, expected', [
    ('\\frac{1}{2}', '0.5', True), ('\\frac{14}{3}', '14/3', True), ('90^\\circ', '90', True),
    ('x=5', '5', True), ('1,-2', '-2,1', True), ('2k+2', '2(k+1)', True), ('(3,4]', '[3,4)', False),
    ('\\sqrt{8}', '2\\sqrt{2}', True), ('p - q', 'q - p', False), ('3', '3 + x', False),
    ('\\text{even}', 'odd', False), ('\\frac{1}{2}', '}{', False), ('3', '\\frac{', False),
])
def test_equality_by_algebra(pool, gold, answer, expected):
  reward = math_answers.MathReward('boxed', 'strict', pool=pool)
  assert pool.map([(gold, answer)])[0].value is expected
  text = f'\\boxed{{{answer}}}'
  if math_answers.last_boxed(text) == answer:
    assert reward(None, [text], answer=[gold]) == [float(expected)]


@pytest.mark.parametrize('gold, answer, expected', [
    ('72', '72.00', True), ('1,234', '1234', True), ('10,\\!080', '10080', True),
    ('10{,}080', '10080', True), ('\\$18.90', '18.9', True), ('72', '7.2', False),
    ('12', '1 2', None), ('\\dfrac{1}{3}', '\\frac{1}{3}', True), ('(1, 2)', '(1,2)', True),
    ('\\left( 3, 4 \\right]', '(3,4]', True), ('3', 'x' * 2000, False), ('3', '', False),
    ('5', '5%', None), ('\\rightarrow', 'arrow', None), ('0.3333333', '1/3', None),
])
def test_equality_by_spelling(gold, answer, expected):
  assert math_answers.quick_equal(gold, answer) is expected


@pytest.mark.parametrize('text, style, strict, flexible', [
    ('so\n#### 72', 'hash', '72', '72'),
    ('#### 70\n#### $1,072.', 'hash', '$1,072', '$1,072'),
    ('#### -5 apples, not 6', 'hash', '-5', '-5'),
    ('#### seventy-two', 'hash', None, None),
    ('the answer is 72 eggs', 'hash', None, '72'),
    ('\\boxed{72} or 73', 'hash', None, '72'),
    ('\\boxed{7}\n#### 8', 'hash', '8', '8'),
    ('\\boxed{7}\n#### 8', 'boxed', '7', '7'),
    ('\\boxed{\\frac{1}{2}}', 'boxed', '\\frac{1}{2}', '\\frac{1}{2}'),
    ('\\boxed{\\{1, 2\\}}', 'boxed', '\\{1, 2\\}', '\\{1, 2\\}'),
    ('\\boxed{1} then \\boxed{2', 'boxed', '1', '1'),  # cut off by the length limit
    ('\\boxed{x=\\boxed{3}}', 'boxed', '3', '3'),
    ('f{x \\fbox {5}', 'boxed', '5', '5'),
    ('\\boxed{}', 'boxed', '', None),
    ('#### \n', 'hash', None, None),
    ('', 'hash', None, None),
    ('10,\\!080', 'hash', None, '10,080'),
    ('\u7b54\u6848\u662f 72 \U0001f600 \ud800', 'hash', None, '72'),
])
def test_extraction(text, style, strict, flexible):
  assert math_answers.strict(text, style) == strict
  assert math_answers.flexible(text, style) == flexible


@pytest.mark.parametrize('text, expected', [
    ('so $p - q$ holds', 'p - q'), ('from 3 we get 1/2.', '1/2'), ('$x$ is 5', '5'),
    ('$x = 5$', 'x = 5'), ('costs $5 or $6', '$6'), ('nothing', None)])
def test_flexible_extraction_of_what_is_no_number(text, expected):
  assert math_answers.flexible(text, 'boxed', numeric=False) == expected


@pytest.mark.parametrize('answer, expected', [
    ('work\n#### 1,234', '1,234'), (72, '72'), (72.5, '72.5'), ('\\boxed{204}', '204'),
    ('\\frac{1}{2}', '\\frac{1}{2}'), (None, None), (float('nan'), None), ('', None),
    ('####', None)])
def test_gold_answers(answer, expected):
  assert math_answers.gold_answer(answer) == expected


def test_strict_never_beats_flexible(shared_data):
  lines = (shared_data / 'gsm8k' / 'test.jsonl').read_text().splitlines()[:200]
  gold = [json.loads(line)['answer'] for line in lines]
  texts = [text.replace('####', '##') if n % 2 else text + '\nCheck: 5 + 5 = 10'
           for n, text in enumerate(gold)]
  strict = math_answers.MathReward('hash', 'strict', pool=_NoPool())(None, texts, answer=gold)
  flexible = math_answers.MathReward('hash', 'flexible', pool=_NoPool())(None, texts, answer=gold)
  assert sum(strict) == 100 and flexible == [1.0] * 200


def test_huge_completions_take_one_pass():
  reward = math_answers.MathReward('boxed', 'flexible', pool=_NoPool())
  huge = ['\\boxed{' * 200_000 + '3' + '}' * 200_000, '{' * 10**6 + '3', '#' * 10**6 + ' 3',
          '$' * 10**6 + '3', '9' * 10**6, '\\boxed{' + 'x' * 10**6 + '}', '1,234' * 10**5]
  assert reward(None, huge, answer=['3'] * len(huge)) == [1, 1, 1, 1, 0, 0, 0]


def test_a_hanging_comparison_is_undecided_and_reported(tmp_path, caplog):
  path = tmp_path / 'hangs.py'
  path.write_text('import time\ndef equal(gold, answer):\n'
                  '  time.sleep(100 if "hang" in answer else 0)\n  return True\n')
  pool = pool_lib.WorkerPool(path, 'equal', num_workers=1, timeout_seconds=0.8)
  reward = math_answers.MathReward('boxed', 'strict', pool=pool)
  texts = ['\\boxed{x}', '\\boxed{hang}', '\\boxed{hang}', '\\boxed{y}', 'none']
  with caplog.at_level(logging.WARNING):
    assert reward(None, texts, answer=['z'] * 5) == [1.0, None, None, 1.0, 0.0]
  assert reward.take_report() == {'timeout': 1}  # alike completions are compared once
  assert reward.take_report() == {}
  assert "'hang' against 'z' has no verdict: no answer within 0.8 s" in caplog.text
  assert reward(None, ['\\boxed{x}'], answer=['z']) == [1.0]
  reward.close()


def test_a_comparison_that_eats_memory_or_time_for_real():
  pool = pool_lib.WorkerPool(_EQUALITY, 'equal', num_workers=1, timeout_seconds=1.0)
  reward = math_answers.MathReward('boxed', 'strict', pool=pool)
  texts = ['\\boxed{9^{9^{9^{9}}}+x}', '\\boxed{0.5}']
  values = reward(None, texts, answer=['\\frac{1}{2}'] * 2)
  assert values[1] == 1.0
  assert values[0] in (None, 0.0) and (values[0] is None) == bool(reward.take_report())
  reward.close()


def test_a_gold_answer_that_does_not_parse_gives_no_opinion(pool):
  reward = math_answers.MathReward('boxed', 'strict', pool=pool)
  assert reward(None, ['\\boxed{3}'], answer=['}{']) == [None]
  assert reward.take_report() == {'gold_unparsed': 1}
  assert reward(None, ['\\boxed{3}'], answer=[None]) == [None]


def test_votes():
  assert math_answers.vote('#### 1,072', 'hash') == math_answers.vote('so 1072.0', 'hash') == '1072'
  assert math_answers.vote('\\boxed{(1, 2)}', 'boxed') == '(1,2)'
  assert math_answers.vote('who knows', 'hash') is None


def test_the_trainer_does_not_import_math_verify():
  root = pathlib.Path(math_answers.__file__).parents[2]
  script = ('import sys; from ptjax.rewards import combine; combine.load(["math"]); '
            'sys.exit("math_verify" in sys.modules or "sympy" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', script], cwd=root, check=False,
                        env={**os.environ, 'PYTHONPATH': str(root)}).returncode == 0
