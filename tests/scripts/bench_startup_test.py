"""The benchmark starts the launcher itself and says where its time went."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_startup.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_startup

SMALL = ['--set=eval.limit=8', '--set=eval.batch_size=8', '--set=rollout.num_prompts=8',
         '--set=warm_start.batch_size=8']


@pytest.mark.slow
def test_a_second_start_compiles_less():
  done = subprocess.run([sys.executable, str(SCRIPT), '--repetitions=1', *SMALL],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  cold, warm = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert (cold['name'], warm['name']) == ('cold', 'warm')
  for row in (cold, warm):
    assert 0 < row['first_step_seconds'] < row['grpo_step_seconds']
    assert 0 < row['first_step_programs'] < row['grpo_step_programs']
    parts = row['parts']
    assert set(parts) == set(bench_startup.PARTS) and all(p['seconds'] > 0 for p in parts.values())
    assert sum(p['seconds'] for p in parts.values()) <= row['grpo_step_seconds']
  # The same programs, read from the cache.
  assert warm['grpo_step_programs'] == cold['grpo_step_programs']
  assert warm['grpo_step_compile_seconds'] < 0.5 * cold['grpo_step_compile_seconds']
  assert 'cold s' in done.stdout and 'imports' in done.stdout
