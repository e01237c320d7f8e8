"""Every format of questions with given answers becomes prompt, choices, correct and completion."""

import collections

import pytest

from ptjax import config
from ptjax.data import choices
from ptjax.data import sources

_ARC = {'question': 'Which is a gas?', 'answerKey': 'B',
        'choices': {'text': ['ice', 'steam', 'sand'], 'label': ['A', 'B', 'C']}}
_ARC_AS_PUBLISHED = {'answerKey': '2', 'question': {
    'stem': 'Which is a gas?', 'choices': [{'text': 'ice', 'label': '1'},
                                           {'text': 'steam', 'label': '2'},
                                           {'text': 'sand', 'label': '3'}]}}
_HELLASWAG = {
    'ctx_a': 'A man [header] stands [title] How', 'ctx_b': 'the MAN', 'label': '1',
    'activity_label': 'Roof shingle removal', 'ind': 4,
    'endings': ['sits.', 'starts  pulling [step] up roofing.', 'sings.', 'sleeps.']}
_PLAIN = {'prompt': 'Sky:', 'choices': [' green', ' blue'], 'label': 1}


def read(row):
  derived = choices.recognise(row.keys())
  return {name: make(row) for name, make in derived.items()}


@pytest.mark.parametrize('row, prompt, answers, label', [
    (_ARC, 'Question: Which is a gas?\nAnswer:', [' ice', ' steam', ' sand'], 1),
    (_ARC_AS_PUBLISHED, 'Question: Which is a gas?\nAnswer:', [' ice', ' steam', ' sand'], 1),
    # What lm-evaluation-harness 0.4.13 makes of the row, spaces before the endings aside.
    (_HELLASWAG, 'Roof shingle removal: A man stands. How The man',
     [' sits.', ' starts pulling up roofing.', ' sings.', ' sleeps.'], 1),
    (_PLAIN, 'Sky:', [' green', ' blue'], 1),
    ({'question1': ' a? ', 'question2': 'b?', 'is_duplicate': 1},
     'Question 1: "a?"\nQuestion 2: "b?"\nAre these questions asking the same thing?',
     [' no', ' yes'], 1),
])
def test_known_formats(row, prompt, answers, label):
  assert read(row) == {'prompt': prompt, 'choices': answers, 'correct': label,
                       'completion': answers[label]}


def test_unknown_columns_are_left_alone():
  assert choices.recognise(['prompt', 'completion', 'label']) == {}
  assert choices.recognise(['question', 'answer']) == {}


@pytest.mark.parametrize('label, expected', [
    (0, 0), (1.0, 1), ('1.0', 1), (' b ', 1), ('', None), (None, None), (float('nan'), None),
    (True, 1)])
def test_labels(label, expected):
  assert choices.place(label, [' a', ' b']) == expected


@pytest.mark.parametrize('label', ['maybe', 2, -1, 0.5])
def test_a_label_that_is_none(label):
  with pytest.raises(config.UserError, match=f'label {label!r}: expected a place from 0 to 1 or'):
    choices.place(label, [' a', ' b'])
  with pytest.raises(config.UserError, match="answerKey 'E': expected one of 'A', 'B', 'C'"):
    read({**_ARC, 'answerKey': 'E'})


def test_rows_without_label_have_no_completion():
  assert read({**_ARC, 'answerKey': ''})['completion'] is None
  assert read({'sentence1': 'a', 'sentence2': None, 'is_duplicate': '1'}) == dict.fromkeys(
      ('prompt', 'choices', 'correct', 'completion'))


def test_quora(shared_data):
  rows = sources.load(shared_data / 'quora' / 'quora_pairs.csv')
  assert rows[3]['prompt'] == (
      'Question 1: "What can Trump realistically do for America (i.e. what will hypothetical '
      'America be after Trump?)"\nQuestion 2: "What would America look like under a trump '
      'presidency?"\nAre these questions asking the same thing?')
  assert rows[3]['completion'] == ' yes' and rows[0]['completion'] == ' no'
  found = collections.Counter(row['correct'] for row in rows)
  given = collections.Counter(row['is_duplicate'] for row in rows)
  assert found == {0: given['0.0'], 1: given['1.0'], None: 1}
