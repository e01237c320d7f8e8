"""The benchmark runs both sides on the same work, and refuses to compare what differs."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_grpo.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_grpo

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50',
        '--prompts=2', '--group=2', '--prompt=8', '--completion=6', '--repetitions=1']


def side(parameters=10, counts=(24, 24), prompt_tokens=16):
  return types.SimpleNamespace(facts={'parameters': parameters, 'prompt_tokens': prompt_tokens},
                               runs=[{'completion_tokens': count} for count in counts])


@pytest.mark.parametrize('peer, message', [
    (side(counts=(24, 23)), 'completion tokens'), (side(prompt_tokens=15), 'prompt_tokens'),
    (side(parameters=11), 'parameters'), (side(), None)])
def test_unequal_work_is_not_compared(peer, message):
  if message is None:
    bench_grpo.check_comparable([side(), peer])
    return
  with pytest.raises(SystemExit, match=message):
    bench_grpo.check_comparable([side(), peer])


def test_advantages_compare_within_a_group():
  tokens = np.array([[0, 0, 9], [9, 9, 9], [0, 9, 9], [9, 0, 9]])
  np.testing.assert_allclose(bench_grpo.advantages(tokens, 2), [1, -1, 0, 0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('peer', ['none', 'hf'])
def test_a_tiny_run_prints_a_table_and_a_row_per_side(peer):
  if peer == 'hf':
    pytest.importorskip('torch')
  done = subprocess.run([sys.executable, str(SCRIPT), f'--peer={peer}', *TINY],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  header, *table = [line for line in done.stdout.splitlines() if not line.startswith('{')]
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert 'tokens/s' in header
  assert [row['name'] for row in rows] == ['ptjax'] + ['hf generate'] * (peer == 'hf')
  assert len(table) == len(rows)
  for row in rows:
    assert row['completion_tokens'] == 2 * 2 * 6 and row['prompt_tokens'] == 16
    assert row['step_seconds'] == pytest.approx(row['rollout_seconds'] + row['update_seconds'])
    assert row['peak_rss_mib'] > 10 and row['cores_used'] > 0 and row['versions']
  assert rows[0]['compilations'] > 0 and rows[0]['compile_seconds'] > 0
