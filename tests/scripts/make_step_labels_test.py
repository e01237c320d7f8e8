"""Step labels made by the script, and a process reward model that trains on them."""

import json
import pathlib
import sys

import pytest

from ptjax.data import stepwise
from ptjax.data import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))
import job_runs

REWARD = '''
def even(prompts, completions, **columns):
  """Right when the text holds an even number of characters: about half of all samples."""
  return [float(len(text) % 2 == 0) for text in completions]
'''

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def script(load_script):
  return load_script('make_step_labels')


def test_labels_by_hand(script):
  solutions = [(0, ['a', 'b', 'c']), (3, ['d']), (3, ['e', 'f'])]
  starts = script.prefixes(solutions)
  assert starts == [(0, 1), (0, 2), (2, 1)]
  successes = {0: [True, False, False, False], 1: [False] * 4}
  whole = [True, False, True]
  assert script.labels(solutions, starts, successes, whole) == [[0.25, 0.0, 1.0], [0.0], None]
  assert script.labels(solutions, starts, successes, whole, hard=True) == [
      [1.0, 0.0, 1.0], [0.0], None]
  assert script.steps_of('one\n\n two\n') == ['one', ' two']


@pytest.mark.slow
def test_own_solutions_are_labelled_and_can_be_trained_on(script, tmp_path, capsys):
  job_runs.export_model(tmp_path / 'model', width=16, num_layers=1, num_heads=2, num_kv_heads=1,
                        mlp_width=16, max_length=64)
  rows = [{'prompt': f'{i}+1=', 'completion': f'{i}\n+1\n{i + 1}'} for i in range(4)]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'reward.py').write_text(REWARD)
  arguments = [
      '', f'--dataset={tmp_path / "rows.jsonl"}', f'--model={tmp_path / "model"}',
      f'--reward={tmp_path / "reward.py"}:even', '--continuations=4', '--max_completion_tokens=4',
      f'--out={tmp_path / "steps.jsonl"}']
  assert script.main(arguments) == 0
  assert '4 solutions, 12 steps' in capsys.readouterr().out
  written = [json.loads(line) for line in (tmp_path / 'steps.jsonl').read_text().splitlines()]
  assert [row['completions'] for row in written] == [row['completion'].split('\n') for row in rows]
  values = [value for row in written for value in row['labels'][:-1]]
  assert set(values) <= {0, 0.25, 0.5, 0.75, 1} and len(set(values)) > 1
  # The last step's label is the solution's own success: 6 characters are even.
  assert [row['labels'][-1] for row in written] == [
      float(len(row['completion']) % 2 == 0) for row in rows]
  found = stepwise.read(written, tokenizers.characters(tokenizers.PRINTABLE))
  assert len(found.completions) == 4


def test_unusable_requests(script, tmp_path, capsys):
  (tmp_path / 'rows.jsonl').write_text(json.dumps({'prompt': 'a', 'answer': '1'}))
  arguments = ['', f'--dataset={tmp_path / "rows.jsonl"}', '--model=tiny',
               f'--out={tmp_path / "x.jsonl"}']
  assert script.main(arguments) == 2
  assert "no column 'completion'" in capsys.readouterr().err
