import json
import os
import subprocess
import sys

import pytest

from ptjax import config
from ptjax.data import arithmetic
from ptjax.data import sources


def _write(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def _message(path, **options):
  with pytest.raises(config.UserError) as caught:
    sources.load(path, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_rows_are_a_sequence():
  rows = sources.Rows([{'a': 1}, {'a': 2, 'b': 'x'}, {'b': 'y'}], name='n',
                      columns={'c': lambda row: row['b']})
  assert (len(rows), rows.columns, rows.name) == (3, ('a', 'b', 'c'), 'n')
  assert rows[0] == {'a': 1, 'b': None, 'c': None}
  assert rows[-1] == {'a': None, 'b': 'y', 'c': 'y'}
  assert list(rows) == [rows[0], rows[1], rows[2]]
  assert list(rows[1:]) == [rows[1], rows[2]]
  assert rows[1:].columns == rows.columns
  rows[0]['a'] = 5
  assert rows[0]['a'] == 1


# --- formats


def test_json_lines(tmp_path):
  # A byte order mark, a blank line, a line separator inside a text, no newline at the end.
  text = '\ufeff{"prompt": "a\u2028b"}\n\n  \n{"prompt": "é", "x": [1]}'
  rows = sources.load(_write(tmp_path, 'a.jsonl', text))
  assert list(rows) == [{'prompt': 'a\u2028b', 'x': None}, {'prompt': 'é', 'x': [1]}]


@pytest.mark.parametrize('text', [
    '[{"prompt": "a"}, {"prompt": "b"}]', '\n[\n{"prompt": "a"},\n{"prompt": "b"}]\n',
    '{"prompt": "a"}\n{"prompt": "b"}\n'])
def test_json_as_a_list_or_as_lines(tmp_path, text):
  assert list(sources.load(_write(tmp_path, 'a.json', text))) == [{'prompt': 'a'}, {'prompt': 'b'}]


@pytest.mark.parametrize('name, text', [
    ('a.csv', 'prompt,x\n"a, ""b""",1\n"two\nlines",2\n'),
    ('a.csv', 'prompt\tx\r\n"a, ""b"""\t1\r\n"two\nlines"\t2\r\n'),
    ('a.tsv', 'prompt\tx\na, "b"\t1\n"two\nlines"\t2')])
def test_csv_with_commas_or_tabs(tmp_path, name, text):
  rows = sources.load(_write(tmp_path, name, text))
  assert list(rows) == [{'prompt': 'a, "b"', 'x': '1'}, {'prompt': 'two\nlines', 'x': '2'}]


def test_csv_with_a_long_field(tmp_path):
  rows = sources.load(_write(tmp_path, 'a.csv', 'prompt\n' + 'x' * 300_000 + '\n'))
  assert len(rows[0]['prompt']) == 300_000


@pytest.fixture
def parquet(tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  def write(name, rows):
    path = _write(tmp_path, name, '')
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path
  return write


def test_parquet(parquet):
  path = parquet('a.parquet', [{'question': f'q{i}', 'answer': f'work\n#### 1,00{i}'}
                               for i in range(5)])
  rows = sources.load(path, limit=3)
  assert len(rows) == 3
  assert rows[2] == {'question': 'q2', 'prompt': 'q2', 'completion': 'work\n#### 1,002',
                     'answer': '1002'}
  assert list(rows)[2] == rows[2] and rows[1:][1] == rows[2]


def test_broken_parquet(parquet, tmp_path):
  parquet('good.parquet', [{'prompt': 'a'}])
  assert 'bad.parquet: cannot be read as Parquet (' in _message(
      _write(tmp_path, 'bad.parquet', 'not parquet'))


def test_a_folder_of_parquet(parquet, tmp_path):
  for i in range(2):
    parquet(f'set/data/train-0000{i}-of-00002.parquet', [{'prompt': f'train {i}'}])
  parquet('set/data/test-00000-of-00001.parquet', [{'prompt': 'test'}])
  assert [row['prompt'] for row in sources.load(tmp_path / 'set')] == ['train 0', 'train 1']
  assert [row['prompt'] for row in sources.load(f'{tmp_path}/set@test')] == ['test']


def test_lazy_json_lines_are_the_same_rows(tmp_path):
  text = '\ufeff{"prompt": "a\u2028b"}\n\n  \n{"prompt": "é", "x": [1]}\n{"prompt": "c"}'
  path = _write(tmp_path, 'a.jsonl', text)
  eager, lazy = sources.load(path), sources.load(path, lazy=True)
  assert list(lazy) == list(eager) == [lazy[i] for i in range(3)]
  assert (len(lazy), lazy.columns, lazy[-1]) == (3, eager.columns, eager[-1])
  assert list(lazy[1:]) == list(eager[1:])
  assert list(sources.load(path, lazy=True, limit=2)) == list(eager[:2])


def test_lazy_json_lines_stay_on_disk(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '\n'.join('{"n": %04d}' % (i + 1000) for i in range(3000)))
  rows = sources.load(path, lazy=True)
  text = path.read_bytes().replace(b'2500', b'9999')
  path.write_bytes(text)
  assert rows[1500] == {'n': 9999}  # read only now
  path.write_bytes(text.replace(b'{"n": 3999}', b'{"n":  oops'))
  assert rows[2998] == {'n': 3998}
  with pytest.raises(config.UserError, match='a.jsonl, line 3000, column 8: not valid JSON'):
    rows[2999]


def test_lazy_json_lines_say_what_is_wrong(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '{"a": 1}\n\n[2]\n')
  assert _message(path, lazy=True) == (
      f'{path}, line 3: expected an object {{"column": value, ...}}, found a list')
  path = _write(tmp_path, 'b.jsonl', '\n \n')
  assert _message(path, lazy=True) == f'{path} is empty: it holds no rows'


def test_a_text_is_one_row(tmp_path):
  path = _write(tmp_path, 'a.txt', '\ufeffone\n\ntwo\n')
  assert list(sources.load(path)) == [{'text': 'one\n\ntwo\n'}]
  _write(tmp_path, 'b.txt', 'three')
  assert [row['text'] for row in sources.load(tmp_path)] == ['one\n\ntwo\n', 'three']
  _write(tmp_path, 'c.jsonl', '{"prompt": "p"}')
  assert list(sources.load(tmp_path)) == [{'prompt': 'p'}]  # beside tables, texts are notes
  path = _write(tmp_path, 'empty.txt', ' \n')
  assert _message(path) == f'{path} is empty: it holds no rows'


def test_chosen_rows_keep_their_numbers():
  rows = sources.Rows([{'a': i} for i in range(6)], name='n', columns={'b': lambda r: -r['a']})
  chosen = rows.select([4, 1, 1])
  assert [row['b'] for row in chosen] == [-4, -1, -1] and chosen[-1] == {'a': 1, 'b': -1}
  assert [chosen.number(i) for i in range(3)] == [4, 1, 1]
  assert chosen[1:].where(0) == 'n, row 2'
  with pytest.raises(IndexError):
    rows[6]


# --- known formats and mappings


def test_gsm8k(shared_data):
  rows = sources.load(shared_data / 'gsm8k' / 'train.jsonl')
  assert len(rows) == 7473
  assert rows[0]['prompt'].startswith('Natalia sold clips to 48 of her friends in April')
  assert rows[0]['completion'].endswith('altogether in April and May.\n#### 72')
  assert rows[0]['answer'] == '72'
  assert all(float(row['answer']) == float(row['answer'].replace(',', '')) for row in rows)


def test_a_folder_gives_its_training_rows(shared_data):
  assert len(sources.load(shared_data / 'gsm8k')) == 7473
  assert len(sources.load(f'{shared_data}/gsm8k@test')) == 1319
  assert "no files of the split 'val'; known: test, train" in _message(f'{shared_data}/gsm8k@val')


def test_quora_has_tabs_and_a_saved_index(shared_data):
  rows = sources.load(shared_data / 'quora' / 'quora_pairs.csv')
  assert len(rows) == 12000
  assert rows.columns == ('index', 'id', 'sentence1', 'sentence2', 'is_duplicate',
                          'prompt', 'choices', 'correct', 'completion')
  assert rows[1]['sentence1'].startswith('"Which is correct grammar: I graduated from')
  labels = [row['is_duplicate'] for row in rows]
  assert {label: labels.count(label) for label in {'', '0.0', '1.0'}}[''] == 1


def test_text_files(shared_data, tmp_path):
  rows = sources.load(shared_data / 'shakespeare' / 'sonnets.txt', limit=5)
  assert rows.columns == ('number', 'prompt', 'completion') and len(rows) == 5
  text, = sources.load(shared_data / 'shakespeare' / 'tinyshakespeare.txt')
  assert len(text['text']) == 1115394


def test_maths_problems(tmp_path):
  problem = {'problem': 'p', 'solution': 'So \\boxed{7}.'}
  row, = sources.load(_write(tmp_path, 'a.jsonl', json.dumps(problem)))
  assert (row['prompt'], row['completion'], row['answer']) == ('p', *[problem['solution']] * 2)
  row, = sources.load(_write(tmp_path, 'b.jsonl', json.dumps({**problem, 'answer': '7'})))
  assert row['answer'] == '7' and row['completion'] == problem['solution']


def test_instructions(shared_data):
  rows = sources.load(shared_data / 'instruct' / 'seed_tasks.jsonl')
  assert len(rows) == 175
  assert rows[1]['prompt'] == ('What is the relation between the given pairs?\n\n'
                               'Night : Day :: Right : Left')
  assert rows[1]['completion'].startswith('The relation between the given pairs is that')
  assert rows[0]['prompt'].endswith('700-1000 calories?')  # without an input, nothing is added


def test_preferences_and_maths(shared_data):
  rows = sources.load(shared_data / 'preference' / 'dpo_en.json')
  assert (len(rows), rows.columns) == (
      200, ('conversations', 'chosen', 'rejected', 'prompt'))
  assert rows[0]['prompt'] == rows[0]['conversations']
  rows = sources.load(shared_data / 'math' / 'math500.json')
  assert (len(rows), rows[1]['answer']) == (500, 'p - q')


def test_alpaca_instances_unfold(tmp_path):
  row = {'instruction': 'Add.', 'instances': [{'input': '1 1', 'output': '2'},
                                              {'input': '', 'output': '?'}]}
  rows = sources.load(_write(tmp_path, 'a.jsonl', json.dumps(row)))
  assert [(r['prompt'], r['completion']) for r in rows] == [('Add.\n\n1 1', '2'), ('Add.', '?')]


def test_columns_can_be_mapped(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '{"problem": "p", "gold": "7", "prompt": "old"}')
  rows = sources.load(path, columns={'prompt': 'problem', 'answer': 'gold'})
  assert rows[0] == {'problem': 'p', 'gold': '7', 'prompt': 'p', 'answer': '7'}


def test_a_mapping_adds_to_a_known_format(shared_data):
  rows = sources.load(shared_data / 'gsm8k' / 'test.jsonl', limit=1,
                      columns={'prompt': 'question', 'solution': 'answer'})
  assert rows[0]['prompt'] == rows[0]['question']
  assert rows[0]['answer'] == '18'
  assert rows[0]['solution'].endswith('#### 18')


def test_mapping_from_a_column_that_is_not_there(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '{"question": "q"}')
  assert _message(path, columns={'prompt': 'questoin'}) == (
      f"data.columns.prompt=questoin: {path} has no column 'questoin'; did you mean question?")


# --- the built-in task


def test_arithmetic_by_name():
  rows = sources.load('arithmetic', limit=10, seed=3)
  assert list(rows) == arithmetic.rows('train', seed=3, count=10)
  settings = arithmetic.Arithmetic(max_operand=20, operations='+-')
  rows = sources.load('arithmetic:max_operand=20,operations=+-@test')
  assert list(rows) == arithmetic.rows('test', settings=settings)
  assert rows.name == 'arithmetic:max_operand=20,operations=+-@test'


@pytest.mark.parametrize('name, message', [
    ('arithmetic:digits=2', "arithmetic has no setting 'digits'; known: careless, max_operand, "
     'modulus, operations, test_fraction'),
    ('arithmetic:max_operand=x', 'arithmetic: max_operand=x: expected int'),
    ('arithmetic@tset', "arithmetic has no split 'tset'; did you mean test?")])
def test_arithmetic_misnamed(name, message):
  assert _message(name) == message


# --- bad input


@pytest.mark.parametrize('name, text, message', [
    ('a.jsonl', '{"a": 1}\n\n{"a": }\n',
     '{path}, line 3, column 7: not valid JSON (Expecting value); expected one object per line'),
    ('a.jsonl', '{"a": 1}\n[1]\n',
     '{path}, line 2: expected an object {{"column": value, ...}}, found a list'),
    ('a.jsonl', '', '{path} is empty: it holds no rows'),
    ('a.jsonl', '\n \n', '{path} is empty: it holds no rows'),
    ('a.jsonl', b'{"a": 1}\n{"a": "\xe9"}\n',
     '{path}, line 2: not UTF-8 text (byte 0xe9); save the file as UTF-8'),
    ('a.json', '[\n{"a": 1},\n{"a" 2}]',
     "{path}, line 3, column 6: not valid JSON (Expecting ':' delimiter)"),
    ('a.json', '{"a": 1}\n{"a": 2\n',
     "{path}, line 2, column 8: not valid JSON (Expecting ',' delimiter); expected one object per "
     'line'),
    ('a.json', '{"data": [{"a": 1}]}',
     "{path}: expected a list of objects, found one object with the keys 'data'; save its rows as "
     '[{{...}}, ...] or one per line'),
    ('a.json', '"text"', '{path}: expected a list of objects, found a text'),
    ('a.json', '[{"a": 1}, 7]',
     '{path}: entry 2 is a number; expected an object {{"column": value, ...}}'),
    ('a.json', '[]', '{path} is empty: it holds no rows'),
    ('a.json', '', '{path} is empty: it holds no rows'),
    ('a.json', b'[\n"\xff"]', '{path}, line 2: not UTF-8 text (byte 0xff); save the file as UTF-8'),
    ('a.csv', '', '{path} is empty'),
    ('a.csv', 'a,b\n', '{path} holds a header but no rows'),
    ('a.csv', 'a,b\n1,2\n3,4,5\n',
     "{path}, line 3: 3 fields where the header has 2 ('a', 'b'); quote fields that hold the "
     'separator'),
    ('a.csv', 'a,a\n1,2\n',
     "{path}, line 1: the header needs one distinct name per column, found 'a', 'a'"),
    ('a.csv', 'a,b\n1,"2\n', '{path}, line 2: not a valid table (unexpected end of data)'),
    ('a.xml', 'x', "{path}: unknown file format '.xml'; expected one of .jsonl .json .csv .tsv "
     '.txt .parquet'),
])
def test_unreadable_files(tmp_path, name, text, message):
  path = _write(tmp_path, name, text)
  assert _message(path) == message.format(path=path)


def test_missing_file_names_its_neighbours(tmp_path):
  _write(tmp_path, 'train.jsonl', '{}')
  _write(tmp_path, 'notes.md', '')
  missing = tmp_path / 'trian.jsonl'
  assert _message(missing) == (
      f'no such file or folder: {missing}; did you mean {tmp_path}/train.jsonl?')
  missing = tmp_path / 'quora.csv'
  assert _message(missing) == f'no such file or folder: {missing}; {tmp_path} holds train.jsonl'
  missing = tmp_path / 'no' / 'a.csv'
  assert _message(missing) == (f'no such file or folder: {missing} (the folder {tmp_path}/no does '
                               'not exist either)')


def test_folders_that_cannot_be_used(tmp_path):
  assert f'{tmp_path}: no data files in this folder' in _message(tmp_path)
  _write(tmp_path, 'a.jsonl', '{"a": 1}')
  _write(tmp_path, 'b.jsonl', '{"b": 1, "c": 2}')
  assert 'files with different columns: a.jsonl has a; b.jsonl has b, c' in _message(tmp_path)
  _write(tmp_path, 'c.parquet', '')
  assert 'the folder mixes Parquet with other files' in _message(tmp_path)


def test_a_folder_without_training_rows(tmp_path):
  _write(tmp_path, 'x_test.jsonl', '{"a": 1}')
  assert len(sources.load(tmp_path)) == 1
  _write(tmp_path, 'x_dev.jsonl', '{"a": 1}')
  assert 'several sets and none called train: x_dev.jsonl, x_test.jsonl; name one file' in (
      _message(tmp_path))


def test_limit_must_be_positive():
  assert _message('arithmetic', limit=0) == 'data.limit=0: must be positive'


@pytest.mark.skipif(os.name == 'nt' or not hasattr(os, 'geteuid') or os.geteuid() == 0,
                    reason='root reads everything')
def test_file_without_permission(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '{"a": 1}')
  path.chmod(0)
  assert 'cannot be read (Permission denied)' in _message(path)


def test_datasets_is_imported_only_when_needed():
  code = ('import sys; from ptjax.data import sources, prompts, demonstrations, tokenizer; '
          'sources.load("arithmetic"); print("datasets" in sys.modules, '
          '"transformers" in sys.modules)')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert result.stdout.split() == ['False', 'False']
