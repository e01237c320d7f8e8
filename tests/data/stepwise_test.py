import numpy as np
import pytest

from ptjax import config
from ptjax.data import examples as examples_lib
from ptjax.data import offline
from ptjax.data import stepwise
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')

ROWS = [{'prompt': 'What is 2+3*4?', 'completions': ['3*4 is 12.', '2+12 is 15.', 'So 15.'],
         'labels': [True, False, False]},
        {'prompt': 'And 1+1?', 'completions': ['It is 2.'], 'labels': [1]}]


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def _trl_row(tokenizer, row, separator='\n'):
  """What TRL's process reward trainer made of a row (its last release, 1.10): ids and labels."""
  ids = [tokenizer(step, add_special_tokens=False)['input_ids'] for step in row['completions']]
  between = tokenizer.encode(separator, add_special_tokens=False)
  ids = [step + between for step in ids]
  labels = [[-100] * (len(step) - 1) + [int(label)] for step, label in zip(ids, row['labels'])]
  return sum(ids, []), sum(labels, [])


@pytest.mark.parametrize('separator', ['\n', ' ки\n\n'])
def test_ids_and_labels_as_trl_makes_them(shared_data, separator):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  examples = stepwise.read(ROWS, gpt2, separator=separator)
  for i, row in enumerate(ROWS):
    ids, labels = _trl_row(gpt2, row, separator)
    assert examples.completions[i][0].tolist() == ids
    mask = examples.per_token['step_mask'][i][0]
    np.testing.assert_array_equal(mask, np.array(labels) != -100)
    np.testing.assert_array_equal(
        examples.per_token['step_labels'][i][0][mask], np.array(labels)[mask])
    assert examples.prompts[i].tolist() == gpt2(row['prompt']).input_ids


def test_steps_are_continuations(shared_data):
  stories = transformers.AutoTokenizer.from_pretrained(shared_data / 'models' / 'stories260K')
  examples = stepwise.read(ROWS, stories)
  text = stories.decode([*examples.prompts[0], *examples.completions[0][0]],
                        skip_special_tokens=True)
  assert text == ROWS[0]['prompt'] + ''.join(step + '\n' for step in ROWS[0]['completions'])


def test_a_batch_holds_the_labels(characters):
  batch = offline.OfflineDoor(stepwise.read(ROWS, characters), batch_size=2, seed=None).batch(0)
  mask = batch.inputs['step_mask']
  assert mask.dtype == bool and mask.sum(1).tolist() == [3, 1]
  assert batch.inputs['step_labels'].dtype == np.float32
  assert batch.inputs['step_labels'][mask].tolist() == [1, 0, 0, 1]
  newline, = characters.encode('\n', add_special_tokens=False)
  assert (batch.tokens[mask] == newline).all()


def test_soft_labels(characters):
  rows = [{'prompt': 'p', 'completions': ['a', 'b'], 'labels': [0.75, 0.25]}]
  examples = stepwise.read(rows, characters)
  mask = examples.per_token['step_mask'][0][0]
  assert examples.per_token['step_labels'][0][0][mask].tolist() == [0.75, 0.25]


def test_labels_stay_with_their_row_when_others_are_dropped(characters):
  rows = [{'prompt': 'p', 'completions': ['too long'], 'labels': [1]},
          {'prompt': 'p', 'completions': ['a', 'bb'], 'labels': [0, 1]}]
  examples = stepwise.read(rows, characters, limits=examples_lib.Limits(max_completion_tokens=6))
  assert examples.row_ids == [1]
  assert examples.per_token['step_mask'][0][0].tolist() == [False, True, False, False, True]
  assert examples.per_token['step_labels'][0][0].tolist() == [0, 0, 0, 0, 1]


def test_a_cut_solution_loses_its_last_steps(characters):
  rows = [{'prompt': 'p', 'completions': ['aa', 'bb', 'cc'], 'labels': [1, 0, 1]},
          {'prompt': 'p', 'completions': ['aaaaaaaa'], 'labels': [1]}]
  limits = examples_lib.Limits(max_completion_tokens=7, overlong='truncate')
  examples = stepwise.read(rows, characters, limits=limits)
  assert examples.per_token['step_mask'][0][0].sum() == 2
  assert str(examples.intake) == ('2 rows: 1 kept (1 truncated), 1 dropped (1 with no step left)')


@pytest.mark.parametrize('row, message', [
    ({'labels': [True, False]}, 'the given rows, row 1: 3 steps in completions, but 2 in labels; '
     'expected one label per step'),
    ({'labels': [True, False, 'so so']}, 'the given rows, row 1: labels: expected true or false '
     "(1 or 0), found 'so so'"),
    ({'labels': [True, False, None]}, 'the given rows, row 1: labels: a step without a label'),
    ({'labels': [True, True, True]}, 'the given rows: every step that is left is labelled 1; there '
     'must be good ones and bad ones (1 rows: 1 kept)'),
    ({'completions': 'one two three'},
     'the given rows, row 1: completions: expected a list of texts, one per step'),
    ({'completions': [], 'labels': []}, 'the given rows: nothing left to train on: 1 rows: 0 kept, '
     '1 dropped (1 with an empty prompt or completion)'),
])
def test_what_cannot_train_is_said_in_one_line(characters, row, message):
  with pytest.raises(config.UserError) as caught:
    stepwise.read([{**ROWS[0], **row}], characters)
  assert str(caught.value) == message
