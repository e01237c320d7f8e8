"""The benchmark runs all sides on the same work, and refuses to compare what differs."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'scripts' / 'bench_grpo.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_grpo

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50',
        '--prompts=2', '--group=2', '--prompt=8', '--completion=6', '--repetitions=1']
TUNIX = os.environ.get('TUNIX_PYTHON')  # interpreter of an environment that has Tunix


def side(parameters=10, lengths=(6, 6), prompt_tokens=16):
  run = {'parameters': parameters, 'prompt_tokens': prompt_tokens, 'lengths': list(lengths)}
  return types.SimpleNamespace(runs=[run, run])


@pytest.mark.parametrize('peer, message', [
    (side(lengths=(6, 5)), '12 completion tokens and 11'), (side(lengths=(7, 5)), 'other lengths'),
    (side(prompt_tokens=15), 'prompt_tokens'), (side(parameters=11), 'parameters'), (side(), None)])
def test_unequal_work_is_not_compared(peer, message):
  if message is None:
    bench_grpo.check_comparable([side(), peer])
    return
  with pytest.raises(SystemExit, match=message):
    bench_grpo.check_comparable([side(), peer])


def test_the_order_of_completions_is_nobodys_work():
  bench_grpo.check_comparable([side(lengths=(6, 4)), side(lengths=(4, 6))])


def test_one_id_in_so_many_ends_a_completion_and_no_prompt_holds_one():
  _, job = bench_grpo.parse(['--vocab=640', '--mean=64', '--prompt=500'])
  ends = bench_grpo.stop_ids(job)
  assert len(ends) == 10 and 1 in ends
  assert not set(ends) & {i for ids in bench_grpo.prompt_ids(job) for i in ids}


def test_the_reward_is_the_share_of_low_ids():
  rewards = bench_grpo.low_ids([], [], completion_ids=[[0, 24, 25], [49]], vocab=[50, 50])
  np.testing.assert_allclose(rewards, [2 / 3, 0])


def test_unknown_and_impossible_peers_are_refused(capsys):
  for argv, message in ((['--peer=hf,vllm'], 'vllm'),
                        (['--peer=tunix', '--lengths=geometric'], '--lengths=fixed')):
    with pytest.raises(SystemExit):
      bench_grpo.parse(argv)
    assert message in capsys.readouterr().err


def run(*argv):
  done = subprocess.run(
      [sys.executable, str(SCRIPT), *TINY, *argv], capture_output=True, text=True, timeout=600,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''})  # one device
  assert done.returncode == 0, done.stderr
  header, *table = [line for line in done.stdout.splitlines() if not line.startswith('{')]
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert 'tokens/s' in header and len(table) == len(rows)
  for row in rows:
    assert row['prompt_tokens'] == 16 and row['parameters'] == rows[0]['parameters']
    assert row['completion_tokens'] == rows[0]['completion_tokens']
    assert row['step_seconds'] == pytest.approx(row['rollout_seconds'] + row['update_seconds'])
    assert row['peak_rss_mib'] > 10 and row['cores_used'] > 0 and row['versions']
    assert row['times_ptjax']['step_seconds'] == pytest.approx(
        row['step_seconds'] / rows[0]['step_seconds'])
  assert rows[0]['compilations'] > 0 and rows[0]['compile_seconds'] > 0
  return rows


@pytest.mark.slow
def test_trl_takes_the_same_steps():
  pytest.importorskip('trl')
  rows = run('--peer=trl')
  assert [row['name'] for row in rows] == ['ptjax', 'trl default']
  assert rows[0]['completion_tokens'] == 2 * 2 * 6


@pytest.mark.slow
def test_torch_peers_stop_where_ours_did():
  pytest.importorskip('trl')
  rows = run('--peer=trl,hf', '--setting=tuned', '--lengths=geometric', '--mean=4',
             '--completion=12')
  assert [row['name'] for row in rows] == ['ptjax', 'trl tuned', 'hf generate']
  assert rows[0]['completion_tokens'] < 2 * 2 * 12
  assert len({row['longest'] for row in rows}) == 1


@pytest.mark.slow
@pytest.mark.skipif(not TUNIX, reason='TUNIX_PYTHON names no interpreter with Tunix')
def test_tunix_takes_the_same_steps():
  rows = run('--peer=tunix', f'--peer_python={TUNIX}')
  assert [row['name'] for row in rows] == ['ptjax', 'tunix']
