"""Pairs made by the script: each kind, an interrupted run taken up again, unusable requests."""

import json
import pathlib

import numpy as np
import pytest

from ptjax import asking
from ptjax.data import sonnets

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def script(load_script):
  return load_script('make_preferences')


def run(script, *arguments, **flags):
  """Runs the script; returns the pairs it wrote."""
  argv = [f'--{name}={value}' for name, value in flags.items()]
  assert script.main(['make_preferences', *argv, *arguments]) == 0
  return read(flags['out'])


def read(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def stories(shared_data, tmp_path, count=5):
  """Beginnings of stories with their true endings, a model, and the flags that go with it."""
  text = (shared_data / 'tinystories' / 'tinystories_val_a.txt').read_text()
  rows = []
  for story in text.split('\n\n')[1:count + 1]:
    words = story.split(' ')
    rows.append({'prompt': ' '.join(words[:6]), 'completion': ' ' + ' '.join(words[6:20])})
  path = tmp_path / 'stories.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows, {'dataset': path, 'model': shared_data / 'models' / 'stories260K',
                'max_completion_tokens': 12, 'batch_size': 2, 'out': tmp_path / 'out.jsonl'}


def test_labels(script, shared_data, tmp_path):
  pairs = run(script, pairs='labels', dataset=shared_data / 'quora' / 'quora_pairs.csv', limit=50,
              out=tmp_path / 'out.jsonl')
  assert len(pairs) == 50 and {pair['chosen'] for pair in pairs} == {' yes', ' no'}
  assert all({pair['chosen'], pair['rejected']} == {' yes', ' no'} for pair in pairs)


def test_scored(script, shared_data, tmp_path):
  pairs = run(script, pairs='scored', dataset=shared_data / 'preference' / 'imdb_reward.jsonl',
              out=tmp_path / 'out.jsonl', separator=' ', min_gap=1.5, most=2)
  gaps = [pair['chosen_score'] - pair['rejected_score'] for pair in pairs]
  assert min(gaps) >= 1.5 and all(pair['chosen'].startswith(' ') for pair in pairs)
  prompts = [pair['prompt'] for pair in pairs]
  assert max(map(prompts.count, prompts)) == 2


def test_endings(script, shared_data, tmp_path):
  rows, flags = stories(shared_data, tmp_path)
  pairs = run(script, '--keep_truncated', pairs='endings', samples=2, **flags)
  assert len(pairs) == 10
  for number, pair in enumerate(pairs):
    row = rows[number // 2]
    assert (pair['prompt'], pair['chosen']) == (row['prompt'], row['completion'])
    assert pair['rejected'] != row['completion']
  # What is written goes on where the prompt ends: a new word after a space, or none.
  assert np.mean([pair['rejected'].startswith(' ') for pair in pairs]) > 0.5
  assert not any(pair['rejected'].startswith(pair['prompt'][:4]) for pair in pairs)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(script, shared_data, tmp_path, monkeypatch, capsys):
  _, flags = stories(shared_data, tmp_path)
  request = {'pairs': 'best_of_n', 'samples': 4, 'reward': 'length(target=40)', **flags}
  whole = run(script, '--keep_truncated', **request)
  samples = tmp_path / 'out.jsonl.samples.jsonl'
  complete = samples.read_bytes()
  scores = [record['scores'] for record in read(samples)[1:]]
  assert len(scores) == 5 and all(len(values) == 4 for values in scores)
  for pair in whole:
    assert pair['chosen_score'] > pair['rejected_score']
    assert abs(len(pair['chosen']) - 40) < abs(len(pair['rejected']) - 40)

  # A kill in the midst of the third row's line, and no pairs yet.
  lines = complete.splitlines(keepends=True)
  samples.write_bytes(b''.join(lines[:3]) + lines[3][:20])
  (tmp_path / 'out.jsonl').unlink()
  drawn = []
  sample = asking.sample
  def watched(*arguments, **options):
    for batch in sample(*arguments, **options):
      drawn.extend(row for row, _, _ in batch)
      yield batch
  monkeypatch.setattr(asking, 'sample', watched)
  assert run(script, '--keep_truncated', **request) == whole
  assert drawn == [2, 3, 4] and samples.read_bytes() == complete

  drawn.clear()
  assert script.main(['x', '--keep_truncated', *(
      f'--{name}={value}' for name, value in {**request, 'min_gap': 1e9}.items())]) == 2
  assert 'no pairs: 5 prompts: 0 pairs (5 prompts with a smaller gap)' in capsys.readouterr().err
  assert not drawn and read(tmp_path / 'out.jsonl') == whole  # from the file, and left alone

  assert script.main(['x', *(
      f'--{name}={value}' for name, value in {**request, 'temperature': 0.7}.items())]) == 2
  assert 'was drawn with temperature=1.0, not 0.7; choose another --out' in capsys.readouterr().err


@pytest.mark.slow
def test_a_rows_samples_do_not_depend_on_the_others(script, shared_data, tmp_path):
  _, flags = stories(shared_data, tmp_path)
  both = [run(script, '--keep_truncated', pairs='endings', samples=1,
              **{**flags, 'batch_size': size, 'out': tmp_path / f'{size}.jsonl'})
          for size in (2, 5)]
  assert both[0] == both[1]
  other = run(script, '--keep_truncated', pairs='endings', samples=1, seed=1,
              **{**flags, 'out': tmp_path / 'other.jsonl'})
  assert other != both[0]


def test_samples_that_were_cut_take_no_part(script, shared_data, tmp_path, capsys):
  _, flags = stories(shared_data, tmp_path)
  argv = [f'--{name}={value}' for name, value in flags.items()]
  assert script.main(['x', '--pairs=endings', '--samples=1', *argv]) == 2
  assert 'take no part without --keep_truncated' in capsys.readouterr().err
  assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize('argv, message', [
    ([], 'Flag --pairs must have a value'),
    (['--pairs=best'], 'should be one of <labels|endings|best_of_n|scored>'),
    (['--pairs=labels', '--dataset=a.csv', '--out=/nowhere/b.jsonl'], 'no such folder /nowhere'),
    (['--pairs=endings', '--dataset={rows}', '--out={out}'], 'name one with --model'),
    (['--pairs=endings', '--dataset={rows}', '--out={out}', '--model=tiny'],
     'sampled pairs need the columns prompt, completion; found: prompt'),
    (['--pairs=best_of_n', '--dataset={rows}', '--out={out}', '--model=tiny'],
     'is no task with a reward of its own'),
    (['--pairs=labels', '--dataset={rows}', '--out={out}', '--columns=prompt'],
     '--columns=prompt: expected ours=theirs'),
    (['--pairs=labels', '--dataset={rows}', '--out={out}', 'more'], "unexpected argument 'more'"),
])
def test_unusable_requests(script, tmp_path, capsys, argv, message):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"prompt": "p"}\n')
  names = {'rows': rows, 'out': tmp_path / 'out.jsonl'}
  assert script.main(['x', *(argument.format(**names) for argument in argv)]) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith('make_preferences: ')
  assert list(tmp_path.iterdir()) == [rows]


@pytest.mark.slow
def test_sonnets_by_a_model_that_writes_none(script, shared_data, tmp_path):
  folder = shared_data / 'shakespeare'
  pairs = run(script, '--keep_truncated', pairs='endings', samples=1, limit=2, batch_size=2,
              dataset=folder / 'sonnets.txt', model=shared_data / 'models' / 'stories260K',
              max_completion_tokens=8, out=tmp_path / 'out.jsonl')
  true = sonnets.sonnets(folder / 'sonnets.txt')[:2]
  assert [pair['chosen'] for pair in pairs] == [row['completion'] for row in true]
