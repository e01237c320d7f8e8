import numpy as np
import pytest

from ptjax.data import decontaminate
from ptjax.data import sources


def _brute(train, evaluation, n):
  """(train row, evaluation row) pairs that share n words, by comparing all with all."""
  pairs = set()
  for i, a in enumerate(train):
    for j, b in enumerate(evaluation):
      a_words, b_words = a.split(), b.split()
      if len(b_words) < n or len(a_words) < n:
        same = a_words == b_words and bool(a_words)
      else:
        same = any(a_words[x:x + n] == b_words[y:y + n] for x in range(len(a_words) - n + 1)
                   for y in range(len(b_words) - n + 1))
      if same:
        pairs.add((i, j))
  return pairs


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_as_by_comparing_all_with_all(n):
  rng = np.random.default_rng(n)
  make = lambda count: [' '.join(rng.choice(list('abcd'), rng.integers(0, 9)))
                        for _ in range(count)]
  train, evaluation = make(40), make(30)
  report = decontaminate.overlap(iter(train), iter(evaluation), n=n)
  pairs = _brute(train, evaluation, n)
  assert [hit.row for hit in report.hits] == sorted({i for i, _ in pairs})
  assert report.hit_evaluation_rows == sorted({j for _, j in pairs})
  assert all((hit.row, hit.evaluation_row) in pairs for hit in report.hits)
  assert report.fraction == len({i for i, _ in pairs}) / 40
  assert report.evaluation_fraction == len({j for _, j in pairs}) / 30


def test_case_punctuation_and_spaces_do_not_count():
  report = decontaminate.overlap(
      ['Well: THE  quick, brown\nfox!', 'the quick red fox'], ['"The quick brown fox" jumps.'], n=4)
  assert report.hits == [decontaminate.Hit(0, 0, 'the quick brown fox')]
  assert str(report) == ('1 of 2 training rows (50.00 %) share 4 words in a row with 1 of 1 '
                         'evaluation rows (100.00 %)')


def test_a_short_text_counts_as_a_whole():
  report = decontaminate.overlap(['1 + 1 =', '1 + 1 = 2, as we know'], ['1+1='], n=13)
  assert [hit.row for hit in report.hits] == [0]
  assert decontaminate.overlap(['', '...'], ['', '?'], n=13).hits == []


def test_a_planted_test_question_is_found_and_dropped(shared_data):
  train = sources.load(shared_data / 'gsm8k' / 'train.jsonl', limit=400)
  test = sources.load(shared_data / 'gsm8k' / 'test.jsonl', limit=200)
  clean = decontaminate.overlap(decontaminate.texts(train), decontaminate.texts(test))
  planted = [dict(row) for row in train]
  planted[77]['prompt'] = 'As you may know, ' + test[55]['prompt'].upper()
  report = decontaminate.overlap(decontaminate.texts(planted), decontaminate.texts(test))
  new = [hit for hit in report.hits if hit not in clean.hits]
  assert [(hit.row, hit.evaluation_row) for hit in new] == [(77, 55)]
  left = decontaminate.drop(planted, report)
  assert len(left) == 400 - len(report.hits)
  assert 77 not in [left.number(i) for i in range(len(left))]
  assert decontaminate.overlap(decontaminate.texts(left), decontaminate.texts(test)).hits == []


def test_the_text_of_a_row_in_every_format():
  rows = [{'prompt': 'a', 'completion': 'b', 'answer': 'z'}, {'text': 'c'},
          {'messages': [{'role': 'user', 'content': 'd'}, {'from': 'gpt', 'value': 'e'}]},
          {'prompt': [{'role': 'user', 'content': 'f'}], 'chosen': 'g', 'rejected': None},
          {'prompt': 'h', 'completions': ['i', 'j'], 'labels': [True, False]}]
  assert [' '.join(text.split()) for text in decontaminate.texts(rows)] == [
      'a b', 'c', 'd e', 'f g', 'h i j']


def test_n_must_be_positive():
  with pytest.raises(ValueError, match='n=0: must be positive'):
    decontaminate.overlap([], [], n=0)
