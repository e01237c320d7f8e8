"""The benchmark of a slow reward: a line for each number of parts, none faster than drawing."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_line_for_each_number_of_parts():
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts' / 'bench_rewards.py', '--milliseconds=40', '--prompts=4',
       '--group=2', '--tokens=2', '--parts', '1', '2', '--repeats=2'],
      capture_output=True, text=True, timeout=600,
      env={**os.environ, 'PYTHONPATH': str(ROOT),
           'XLA_FLAGS': '--xla_backend_optimization_level=0'})  # one device
  assert done.returncode == 0, done.stderr
  said, header, *table = done.stdout.splitlines()[-4:]
  drawing = float(said.split()[2])
  assert said.startswith('drawing alone') and 'reward 0.040 s' in said
  assert header.split() == ['parts', 'seconds', 'of', 'the', 'first']
  rows = [line.split() for line in table]
  assert [int(parts) for parts, *_ in rows] == [1, 2] and float(rows[0][2]) == 1.0
  assert float(rows[0][1]) >= drawing + 0.04 - 2e-3  # one after the other, to rounding
