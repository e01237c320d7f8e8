"""The benchmark of adapters runs every arm on the same rows and says what each holds."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_lora.py'
TINY = ['--layers=2', '--width=32', '--heads=2', '--kv_heads=1', '--mlp=64', '--vocab=50',
        '--rows=2', '--prompt=8', '--completion=6', '--rank=2', '--repetitions=1']


def run(*argv):
  return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True,
                        timeout=600)


@pytest.mark.slow
def test_a_tiny_run_prints_a_table_and_a_row_per_arm():
  done = run('--arms=full,lora,rslora,dora', *TINY)
  assert done.returncode == 0, done.stderr
  header, *table = [line for line in done.stdout.splitlines() if not line.startswith('{')]
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert 'optimizer MiB' in header and len(table) == len(rows) == 4
  full, lora, rslora, dora = rows
  d, f, kv, layers, r = 32, 64, 16, 2, 2
  pairs = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
  assert lora['trained_parameters'] == layers * sum(r * (i + o) for i, o in pairs)
  assert dora['trained_parameters'] == lora['trained_parameters'] + layers * sum(
      o for _, o in pairs)
  assert full['trained_parameters'] == full['parameters'] == lora['parameters']
  for row in rows:
    assert row['optimizer_bytes'] == pytest.approx(8 * row['trained_parameters'], abs=64)
    assert row['step_bytes'] > row['weights_bytes'] + row['optimizer_bytes']
    assert row['step_seconds'] > 0
    extra = row['with_reference_bytes'] - row['step_bytes']
    assert extra == (row['weights_bytes'] if row is full else 0)
  assert rslora['step_bytes'] == lora['step_bytes'] < full['step_bytes']
  assert lora['flops'] < full['flops']


def test_an_unknown_arm_is_refused():
  done = run('--arms=full,qlora')
  assert done.returncode == 2 and 'qlora' in done.stderr and 'rslora' in done.stderr
