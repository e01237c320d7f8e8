import json

import numpy as np
import pytest

from ptjax import config
from ptjax.data import demonstrations
from ptjax.data import mixtures
from ptjax.data import offline
from ptjax.data import prompts
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

pytest.importorskip('transformers')


@pytest.fixture
def files(tmp_path):
  def write(name, rows):
    path = tmp_path / name
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path
  a = write('a.jsonl', [{'prompt': f'a{i}', 'completion': 'x'} for i in range(10)])
  b = write('b.jsonl', [{'question': f'b{i}', 'answer': 'y', 'extra': i} for i in range(30)])
  return a, b


@pytest.mark.parametrize('name, parts', [
    ('a.jsonl', [('a.jsonl', None)]),
    ('a.jsonl*0.7 + b.jsonl*0.3', [('a.jsonl', 0.7), ('b.jsonl', 0.3)]),
    ('a * 2 +  b/c:d@train', [('a', 2.0), ('b/c:d@train', None)]),
    ('a+b.jsonl', [('a+b.jsonl', None)]),
    ('arithmetic:operations=+-*', [('arithmetic:operations=+-*', None)]),
    ('arithmetic:operations=+-**1e-2 + x', [('arithmetic:operations=+-*', 0.01), ('x', None)]),
])
def test_names_are_taken_apart(name, parts):
  assert mixtures.parse(name) == parts


@pytest.mark.parametrize('name, message', [
    ('a*0 + b', 'a\\*0 \\+ b: the weight of a must be positive'),
    ('a + *2', 'a data set without a name; expected e.g. "a.jsonl\\*0.7 \\+ b.jsonl\\*0.3"')])
def test_unusable_names(name, message):
  with pytest.raises(config.UserError, match=message):
    mixtures.parse(name)


def test_rows_of_both_with_their_own_formats(files):
  a, b = files
  rows = sources.load(f'{a} + {b}')
  assert len(rows) == 40 and rows.mixture is None
  assert rows[3] == {'prompt': 'a3', 'completion': 'x', 'question': None, 'answer': None,
                     'extra': None}
  assert rows[12] == {'prompt': 'b2', 'completion': 'y', 'question': 'b2', 'answer': 'y',
                      'extra': 2}
  assert rows[-1]['prompt'] == 'b29' and [row['prompt'] for row in rows][39] == 'b29'
  assert rows.where(12) == f'{b}, row 3'
  assert [row['prompt'] for row in rows[9:12]] == ['a9', 'b0', 'b1']
  assert rows[9:12].where(2) == f'{b}, row 2' and rows[9:12].number(2) == 11


def test_columns_and_limits_are_each_part_s_own(files):
  a, b = files
  rows = sources.load(f'{a} + {b}', columns={'label': 'extra'}, limit=4)
  assert len(rows) == 8
  assert [row['label'] for row in rows] == [None] * 4 + [0, 1, 2, 3]
  with pytest.raises(config.UserError, match="data.columns.label=extar: .* has no column 'extar'; "
                     'did you mean extra?'):
    sources.load(f'{a} + {b}', columns={'label': 'extar'})


def test_batches_respect_the_weights(files):
  a, b = files
  tokenizer = tokenizers.characters()
  rows = sources.load(f'{a}*3 + {b}')
  examples = demonstrations.read(rows, tokenizer)
  for bucket in (True, False):
    door = offline.OfflineDoor(examples, batch_size=8, seed=1, bucket=bucket)
    drawn = np.concatenate([door.rows(step) for step in range(10)])  # two epochs of 40
    assert (drawn < 10).sum() == 60
    again = offline.OfflineDoor(demonstrations.read(rows, tokenizer), batch_size=8, seed=1,
                                bucket=bucket)
    assert [again.rows(step) for step in (9, 0)] == [door.rows(step) for step in (9, 0)]
  door = prompts.PromptDoor(rows, tokenizer, num_prompts=8, seed=1)
  drawn = np.concatenate([door.batch(step).ids for step in range(10)])
  assert (drawn < 10).sum() == 60


def test_weights_count_for_what_is_left(files):
  """Rows dropped at the door take nothing from their data set's share."""
  a, b = files
  rows = [json.loads(line) for line in a.read_text().splitlines()]
  for row in rows[:8]:
    row['completion'] = ''
  a.write_text('\n'.join(map(json.dumps, rows)))
  examples = demonstrations.read(sources.load(f'{a}*0.5 + {b}*0.5'), tokenizers.characters())
  assert len(examples) == 32
  door = offline.OfflineDoor(examples, batch_size=32, seed=0)
  assert (np.array(door.rows(0)) < 10).sum() == 16


def test_errors_name_the_file_they_are_in(files, tmp_path):
  a, _ = files
  bad = tmp_path / 'c.jsonl'
  bad.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": 7}')
  with pytest.raises(config.UserError, match=f'{bad}, row 2: after a prompt given as text'):
    demonstrations.read(sources.load(f'{a}*1 + {bad}*1'), tokenizers.characters())
