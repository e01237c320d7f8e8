"""The notebooks run as they are, use public names, and were saved with what they print."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))


def cells(path):
  return [cell for cell in json.loads(path.read_text(encoding='utf-8'))['cells']
          if cell['cell_type'] == 'code']


def kinds(path):
  return [[output['output_type'] for output in cell['outputs']] for cell in cells(path)]


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} >= {
      'compose_a_loss', 'unified_table', 'preference_weights'}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_with_outputs_small_and_of_public_names(path):
  assert [cell['execution_count'] for cell in cells(path)] == list(range(1, 1 + len(cells(path))))
  assert 'display_data' in sum(kinds(path), []) and 'stream' in sum(kinds(path), [])
  assert path.stat().st_size < 300_000
  for cell in cells(path):
    assert not re.search(r'\._[a-z]', ''.join(cell['source'])), 'a private name'


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
  copy = pathlib.Path(shutil.copy(path, tmp_path))
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)  # one device, as on a laptop
  run = subprocess.run([sys.executable, ROOT / 'scripts' / 'run_notebooks.py', copy], cwd=tmp_path,
                       env=environment, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-3000:]
  assert kinds(copy) == kinds(path), 'save the outputs: run scripts/run_notebooks.py'
