"""The benchmark of the update: arms of one batch, a row for each, and no unequal work."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_update.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_update

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50',
        '--prompts=2', '--group=2', '--prompt=8', '--long_prompt=16', '--completion=6', '--cap=24',
        '--head_vocab=60', '--repetitions=1']


def test_unequal_work_is_not_compared():
  arm = lambda tokens: types.SimpleNamespace(name=f'of {tokens}', tokens=tokens)
  bench_update.check_comparable([arm(3), arm(3)])
  with pytest.raises(SystemExit, match="not comparable: trained tokens {'of 3': 3, 'of 4': 4}"):
    bench_update.check_comparable([arm(3), arm(4)])


def test_all_arms_train_the_same_tokens_behind_the_same_prompts():
  shape = bench_update.Shape(prompts=3, group=2, vocab=9)
  found = bench_update.arrays(shape, 'lengths')
  once, repeated = (bench_update.token_batch(found, repeat=n) for n in (1, 2))
  np.testing.assert_array_equal(repeated.prompt_tokens, once.prompt_tokens[[0, 0, 1, 1, 2, 2]])
  np.testing.assert_array_equal(repeated.tokens, once.tokens)
  lengths = found['loss_mask'].sum(1)
  assert lengths.max() == found['tokens'].shape[1] and len(set(lengths)) > 2
  assert bench_update.arrays(shape, 'long')['prompts'].shape == (3, 256)
  with pytest.raises(SystemExit):
    bench_update.parse(['--compare=speed'])


@pytest.mark.slow
@pytest.mark.parametrize('peer', ['none', 'hf'])
def test_a_tiny_run_prints_a_table_and_a_row_per_arm(peer):
  if peer == 'hf':
    pytest.importorskip('torch')
    compared = ['--compare=lengths', '--peer=hf']
  else:
    compared = ['--compare=prompt,head,remat,compile']
  done = subprocess.run([sys.executable, str(SCRIPT), *compared, *TINY],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  names = {'hf': [['packed', 'padded', 'hf']],
           'none': [['once', 'repeated'], ['once', 'repeated'],
                    ['as trained', 'chunk 4', 'chunk 12', 'chunk 24', 'whole logits'],
                    ['dots', 'none', 'full'], ['update']]}[peer]
  assert [row['name'] for row in rows] == sum(names, [])
  assert len([line for line in done.stdout.splitlines() if 'compile s' in line]) == len(names)
  for row in rows:
    assert row['compile_seconds'] > 0 or row['name'] == 'hf'
    assert row['peak_rss_mib'] > 10 and row['versions'] and row['machine']['cores']
    if row['comparison'].startswith('compile'):
      assert row['seconds'] is None
      continue
    assert row['cores_used'] > 0 and row['tokens_per_second'] > 0
    if row['name'] == names[0][0]:
      assert row[f'times_{row["name"]}'] == 1.0
