import pytest

from ptjax import config
from ptjax.data import examples as examples_lib
from ptjax.data import offline
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers
from ptjax.data import unpaired

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def _rows(*labels):
  return [{'prompt': f'p{i}', 'completion': f'c{i}', 'label': label}
          for i, label in enumerate(labels)]


def _texts(examples, tokenizer):
  return [tuple(tokenizer.decode(c, skip_special_tokens=True) for c in group)
          for group in examples.completions]


@pytest.mark.parametrize('good, bad', [
    (True, False), (1, 0), ('true', 'false'), ('True', 'False'), ('1.0', '0.0'), (1.0, 0.0)])
def test_labels_in_every_spelling(characters, good, bad):
  examples = unpaired.read(_rows(good, bad, bad), characters)
  assert examples.inputs['labels'].tolist() == [True, False, False]
  assert examples.inputs['labels'].dtype == bool
  assert _texts(examples, characters) == [('c0',), ('c1',), ('c2',)]


def test_mismatched_completions_are_those_of_the_next_kept_row(characters):
  rows = _rows(True, False, None, True, False)
  rows[3]['completion'] = ''
  examples = unpaired.read(rows, characters, mismatched=True)
  assert examples.row_ids == [0, 1, 4]
  assert examples.intake.dropped == {'without a label': 1, 'with an empty prompt or completion': 1}
  assert _texts(examples, characters) == [('c0', 'c1'), ('c1', 'c4'), ('c4', 'c0')]
  batch = offline.OfflineDoor(examples, batch_size=3, seed=None).batch(0)
  assert batch.tokens.shape[0] == 6 and batch.inputs['labels'].tolist() == [True, False, False]


def test_real_chats(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  rows = sources.load(shared_data / 'preference' / 'kto_en.json')
  limits = examples_lib.Limits(max_prompt_tokens=600)
  examples = unpaired.read(rows, qwen, limits=limits)
  assert 100 < len(examples) < 200
  for i, row_id in enumerate(examples.row_ids):
    assert examples.inputs['labels'][i] == rows[row_id]['label']
    text = qwen.decode(examples.completions[i][0])
    assert text.endswith(rows[row_id]['messages'][-1]['content'].strip() + '<|im_end|>')


@pytest.mark.parametrize('rows, message', [
    (_rows(True, True), 'the given rows: every completion that is left is labelled true; there '
     'must be both kinds (2 rows: 2 kept)'),
    (_rows(False, None, 0), 'the given rows: every completion that is left is labelled false; '
     'there must be both kinds (3 rows: 2 kept, 1 dropped (1 without a label))'),
    (_rows(True, 'good'), "the given rows, row 2: label: expected true or false (1 or 0), found "
     "'good'"),
    (_rows(None, ''), 'the given rows: nothing left to train on: 2 rows: 0 kept, 2 dropped (2 '
     'without a label)'),
    ([{'prompt': 'p', 'completion': 'c', 'rating': 1}],
     "the given rows: labelled completions need the columns 'prompt' and 'completion' and 'label' "
     "or 'messages' and 'label'; found 'prompt', 'completion', 'rating'; map yours with --set "
     'data.columns.label=rating')])
def test_what_cannot_train_is_said_in_one_line(characters, rows, message):
  with pytest.raises(config.UserError) as caught:
    unpaired.read(rows, characters)
  assert str(caught.value) == message
