"""The benchmark trains by the launcher itself, and refuses to compare what differs."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_offline.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_offline

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50',
        '--rows=16', '--batch=8', '--prompt=8', '--completion=16', '--mean=6', '--repetitions=1']


def side(tokens=(24, 24), steps=4):
  return types.SimpleNamespace(
      runs=[{'trained_tokens': count, 'steps': steps} for count in tokens])


@pytest.mark.parametrize('peer, message', [
    (side(tokens=(24, 23)), 'tokens trained on'), (side(tokens=(25, 25)), '24 and 25'),
    (side(steps=5), 'optimizer steps'), (side(), None)])
def test_unequal_work_is_not_compared(peer, message):
  if message is None:
    bench_offline.check_comparable([side(), peer])
    return
  with pytest.raises(SystemExit, match=message):
    bench_offline.check_comparable([side(), peer])


@pytest.mark.slow
def test_a_tiny_run_prints_a_table_and_a_row_per_side():
  pytest.importorskip('trl')
  done = subprocess.run([sys.executable, str(SCRIPT), '--setting=padded', *TINY],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert [row['name'] for row in rows] == ['ptjax', 'trl']
  assert len({row['trained_tokens_per_pass'] for row in rows}) == 1
