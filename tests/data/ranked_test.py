"""Ranked completions: how ranks and scores are read, and what fills up the rows with fewer."""

import numpy as np
import pytest

from ptjax import config
from ptjax.data import examples as examples_lib
from ptjax.data import offline
from ptjax.data import ranked
from ptjax.data import tokenizer as tokenizers

COLOURS = {'prompt': 'Colour? ', 'completions': ['red', 'blue', 'green'], 'ranks': [2, 1, 3]}
SIZES = {'prompt': 'Size? ', 'completions': ['big', 'small'], 'ranks': [7.5, 7.5]}


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def texts(examples, tokenizer):
  return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group]
          for group in examples.completions]


def test_missing_completions_are_filled_up(characters):
  pair = {**SIZES, 'ranks': [4, 1]}
  found = ranked.read([COLOURS, pair], characters)
  assert texts(found, characters) == [['red', 'blue', 'green'], ['big', 'small', '']]
  assert found.inputs['ranks'].tolist() == [[1, 0, 2], [1, 0, -1]]
  batch = offline.OfflineDoor(found, batch_size=2, seed=None).batch(0)
  assert batch.inputs['ranks'].dtype == np.int32
  assert batch.inputs['ranks'].tolist() == [1, 0, 2, 1, 0, -1]  # prompt by prompt, as rows lie
  assert batch.loss_mask.sum(1).tolist() == [4, 5, 6, 4, 6, 0]  # with their end tokens


def test_scores_rank_the_other_way_and_equal_ones_tie(characters):
  scored = {'prompt': 'Colour? ', 'completions': ['red', 'blue', 'green'], 'scores': [0.5, 2, 0.5]}
  assert ranked.read([scored], characters).inputs['ranks'].tolist() == [[1, 0, 1]]


def test_rows_that_state_no_preference_are_dropped_and_counted(characters):
  rows = [COLOURS, SIZES, {**COLOURS, 'prompt': ''}, {**COLOURS, 'completions': ['red', '', None]},
          {**COLOURS, 'ranks': [1, None, float('nan')]}, {**COLOURS, 'completions': None}]
  found = ranked.read(rows, characters)
  assert found.row_ids == [0]
  assert found.intake.dropped == {'without two completions of different rank': 4,
                                  'with an empty prompt': 1}


def test_one_overlong_completion_drops_its_row(characters):
  limits = examples_lib.Limits(max_completion_tokens=5)
  short = {**SIZES, 'completions': ['big', 'tiny'], 'ranks': [1, 2]}
  found = ranked.read([COLOURS, short], characters, limits=limits)
  assert found.row_ids == [1]
  assert found.intake.dropped == {'longer than rollout.max_completion_tokens=5': 1}


@pytest.mark.parametrize('change, words', [
    ({'ranks': [1, 2]}, 'row 1: 3 completions, but 2 ranks'),
    ({'ranks': 'best'}, "row 1: ranks: expected a list, found 'best'"),
    ({'completions': 'red'}, "row 1: completions: expected a list, found 'red'"),
    ({'ranks': [1, 'two', 3]}, "row 1: ranks: expected a number, found 'two'"),
    ({'prompt': ''}, 'nothing left to train on: 1 rows: 0 kept, 1 dropped'),
])
def test_bad_rows_are_named(characters, change, words):
  with pytest.raises(config.UserError, match=words):
    ranked.read([{**COLOURS, **change}], characters)


def test_columns_that_are_missing(characters):
  with pytest.raises(config.UserError, match="ranked completions need the columns 'prompt' and "
                     "'completions' and 'ranks' or .* 'scores'; found 'prompt'"):
    ranked.read([{'prompt': 'a'}], characters)
