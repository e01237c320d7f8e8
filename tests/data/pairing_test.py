"""Pairs from labels, endings and scores: who is chosen, what is dropped, what is counted."""

import itertools
import json

import numpy as np
import pytest

from ptjax import config
from ptjax.data import pairing
from ptjax.data import sources


def test_label_against_other_label(shared_data):
  rows = sources.load(shared_data / 'quora' / 'quora_pairs.csv')
  pairs = pairing.from_labels(rows)
  assert (len(pairs.rows), pairs.prompts) == (11999, 12000)
  assert pairs.dropped == {'without a label': 1}
  assert str(pairs) == '12000 prompts: 11999 pairs (1 without a label)'
  assert pairs.rows[0] == {'prompt': rows[0]['prompt'], 'chosen': ' no', 'rejected': ' yes'}
  yes = sum(row['is_duplicate'] == '1.0' for row in rows)
  assert sum(pair['chosen'] == ' yes' for pair in pairs.rows) == yes


def test_one_of_several_other_labels():
  rows = [{'prompt': f'{i}', 'choices': ['a', 'b', 'c', 'a'], 'label': 0} for i in range(300)]
  pairs = pairing.from_labels(rows, seed=1)
  drawn = [pair['rejected'] for pair in pairs.rows]
  assert set(drawn) == {'b', 'c'} and 110 < drawn.count('b') < 190  # 150 +- 4.6 sd
  assert pairing.from_labels(rows[:7], seed=1).rows == pairs.rows[:7]  # each row draws for itself
  assert pairing.from_labels(rows, seed=2).rows != pairs.rows
  every = pairing.from_labels(rows[:1], every=True).rows
  assert [pair['rejected'] for pair in every] == ['b', 'c']
  alone = pairing.from_labels([{'prompt': 'p', 'choices': ['a', 'a'], 'label': 1}])
  assert alone.rows == [] and alone.dropped == {'without another answer': 1}


def test_true_ending_against_sampled_ending():
  rows = [{'prompt': 'Once', 'completion': ' upon a time'}, {'prompt': 'The', 'completion': ' end'},
          {'prompt': 'No', 'completion': None}]
  pairs = pairing.from_endings(
      rows, [[' more', ' upon a time ', ' less', 'more', ' '], [' end'], [' x']])
  assert pairs.rows == [
      {'prompt': 'Once', 'chosen': ' upon a time', 'rejected': ' more'},
      {'prompt': 'Once', 'chosen': ' upon a time', 'rejected': ' less'}]
  assert pairs.dropped == {
      'samples identical to the true ending': 2, 'samples that repeat another': 1,
      'empty samples': 1, 'with an empty prompt or completion': 1}


def test_best_against_worst():
  pairs = pairing.from_scores(
      ['p', 'q', 'r', 's'], [['a', 'b', 'c', 'd', 'b'], ['a', 'b'], ['a', 'b'], ['a', '']],
      [[1, 3, 0, 3, 9], [1, 1], [1, 1.5], [1, 2]], min_gap=1)
  # Of the two best the first counts, and so does the first of two equal texts.
  assert pairs.rows == [{'prompt': 'p', 'chosen': 'b', 'rejected': 'c', 'chosen_score': 3,
                         'rejected_score': 0}]
  assert pairs.dropped == {
      'prompts whose samples tie': 1, 'prompts with a smaller gap': 1, 'empty samples': 1,
      'prompts with fewer than two different samples': 1}


def test_samples_without_a_score_take_no_part():
  pairs = pairing.from_scores(['p'], [['a', 'b', 'c']], [[None, 2.0, float('nan')]])
  assert pairs.rows == [] and pairs.dropped['samples without a score'] == 2


@pytest.mark.parametrize('most', [1, 2, 9])
def test_several_pairs_per_prompt(most):
  scores = np.random.default_rng(0).integers(0, 4, 8).tolist()
  texts = [f't{i}' for i in range(8)]
  pairs = pairing.from_scores(['p'], [texts], [scores], most=most).rows
  best, worst = sorted(scores, reverse=True), sorted(scores)
  expected = [(b, w) for b, w in zip(best, worst) if b > w][:most]
  assert [(pair['chosen_score'], pair['rejected_score']) for pair in pairs] == expected
  assert all(scores[texts.index(pair['chosen'])] == pair['chosen_score'] for pair in pairs)


def test_scored_samples_of_others(shared_data):
  path = shared_data / 'preference' / 'imdb_reward.jsonl'
  raw = [json.loads(line) for line in path.read_text().splitlines()]
  pairs = pairing.from_scored_rows(sources.load(path), separator=' ')
  by_prompt = {prompt: list(group) for prompt, group in itertools.groupby(
      sorted(raw, key=lambda row: row['prompt']), lambda row: row['prompt'])}
  assert pairs.prompts == len(by_prompt) == 151
  assert len(pairs.rows) == 151
  assert pairs.dropped == {'empty samples': sum(not row['text'].strip() for row in raw)}
  for pair in pairs.rows:
    rewards = {' ' + row['text']: row['reward'] for row in by_prompt[pair['prompt']]
               if row['text'].strip()}
    assert pair['chosen_score'] == rewards[pair['chosen']] == max(rewards.values())
    assert pair['rejected_score'] == rewards[pair['rejected']] == min(rewards.values())
  gaps = [pair['chosen_score'] - pair['rejected_score'] for pair in pairs.rows]
  wide = pairing.from_scored_rows(sources.load(path), min_gap=1.0)
  assert 0 < len(wide.rows) == sum(gap >= 1.0 for gap in gaps) < len(gaps)


def test_scored_rows_of_messages():
  prompt = [{'role': 'user', 'content': 'hi'}]
  pairs = pairing.from_scored_rows([
      {'prompt': prompt, 'completion': 'a', 'score': '1'},
      {'prompt': list(prompt), 'completion': 'b', 'score': '2'},
      {'prompt': prompt, 'completion': 'c', 'score': ''}])
  assert pairs.rows == [{'prompt': prompt, 'chosen': 'b', 'rejected': 'a', 'chosen_score': 2.0,
                         'rejected_score': 1.0}]


@pytest.mark.parametrize('make, rows, message', [
    (pairing.from_labels, [{'prompt': 'p'}], 'need the columns prompt, choices, correct; found: p'),
    (lambda rows: pairing.from_endings(rows, [[]]), [{'text': 't'}], 'found: text; map one with'),
    (pairing.from_scored_rows, [{'prompt': 'p', 'text': 't'}], 'need a column reward or score'),
    (pairing.from_scored_rows, [{'prompt': 'p', 'text': 't', 'score': 'good'}],
     "row 1: score: expected a number, found 'good'"),
    (pairing.from_scored_rows, [{'prompt': '', 'text': 't', 'score': 1}], 'no row has both'),
])
def test_unusable_rows(make, rows, message):
  with pytest.raises(config.UserError, match=message):
    make(rows)
