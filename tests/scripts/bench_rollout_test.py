"""The benchmark of rollouts runs each mode, and refuses to compare what differs."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'scripts' / 'bench_rollout.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_rollout

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50',
        '--prompts=4', '--group=2', '--prompt=8', '--completion=9', '--repetitions=2',
        '--warm_up=1']


@pytest.mark.parametrize('change, message', [
    ({'tokens': 11}, r'tokens 12 \(a\), 11 \(b\)'), ({'parameters': 6}, 'parameters'), ({}, None)])
def test_unequal_work_is_not_compared(change, message):
  runs = {'tokens': 12, 'parameters': 5}
  arms = [types.SimpleNamespace(runs=[{**runs, 'name': 'a'}]),
          types.SimpleNamespace(runs=[{**runs, 'name': 'b', **change}])]
  if message is None:
    bench_rollout.check_comparable(arms)
    return
  with pytest.raises(SystemExit, match=message):
    bench_rollout.check_comparable(arms)


def run(*more):
  result = subprocess.run(
      [sys.executable, str(SCRIPT), *TINY, *more], check=True, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})
  lines = result.stdout.splitlines()
  rows = [json.loads(line) for line in lines if line.startswith('{')]
  for row in rows:
    assert row['repetitions'] == 2 and row['peak_rss_mib'] > 50 and row['machine']['cores']
    assert any(line.startswith(row['name']) for line in lines)
  return rows


@pytest.mark.slow
def test_rows_beside_generate():
  pytest.importorskip('torch', reason='the peer needs torch')
  ours, peer = run('--peer=hf')
  assert (ours['name'], peer['name']) == ('ptjax', 'hf generate')
  assert ours['tokens'] == peer['tokens'] == 4 * 2 * 9
  assert ours['times_first'] == {'seconds': 1.0, 'cpu_seconds': 1.0}
  assert ours['compilations'] > 3 and peer['compilations'] == 0


@pytest.mark.slow
def test_rows_of_variable_lengths():
  slots, full, windows = run('--mode=variable', '--slots=4', '--mean=4')
  assert slots['tokens'] == full['tokens'] == windows['tokens'] < 4 * 2 * 9


@pytest.mark.slow
def test_rows_of_sampling():
  names = [row['name'] for row in run('--mode=sampling')]
  assert names == ['argmax alone', 'sampled', 'top-p 0.95', 'draw: top-p 0.95',
                   'draw: top-p by sort', 'draw: whole softmax']
