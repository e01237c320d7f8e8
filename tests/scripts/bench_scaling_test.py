"""The benchmark measures what it says, and fits exponents to it."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_scaling.py'
sys.path.insert(0, str(SCRIPT.parent))
import bench_scaling

TINY = ['--layers=1', '--width=16', '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=64',
        '--prompts=4', '--group=2', '--prompt=8', '--completion=4', '--points=2',
        '--repetitions=1']


@pytest.mark.parametrize('values, expected', [
    ([3, 6, 12], 1.0), ([2, 8, 32], 2.0), ([5, 5, 5], 0.0), ([8, 4, 2], -1.0), ([0, 1, 2], None)])
def test_exponents_are_those_of_powers(values, expected):
  found = bench_scaling.exponent([1, 2, 4], values)
  assert found == expected if expected is None else abs(found - expected) < 1e-9


@pytest.mark.slow
def test_a_tiny_run_prints_a_table_and_a_row_per_point():
  done = subprocess.run([sys.executable, str(SCRIPT), '--axis=prompt', '--axis=devices', *TINY],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert [(row['axis'], row[row['axis']]) for row in rows] == [
      ('prompt', 32), ('prompt', 64), ('devices', 1), ('devices', 2)]
  assert all(row['rollout_cpu'] > 0 and row['update_cpu'] > 0 for row in rows)
  short, long, alone, half = rows
  assert long['update_flops'] > short['update_flops']
  assert long['update_temporaries'] > short['update_temporaries']
  assert half['update_flops_compiler'] < alone['update_flops_compiler']
  assert half['update_arguments'] < alone['update_arguments']
  assert done.stdout.count('exponent') == done.stdout.count('at the end') == 2
