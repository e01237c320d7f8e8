"""The benchmark of a step's stages: a row for each arm, whose stages lie within the step."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_stages_and_what_lies_outside_make_up_the_step():
  arms = ['ppo, model, reward model']
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts' / 'bench_stages.py', '--layers=1', '--width=16',
       '--heads=2', '--kv_heads=1', '--mlp=32', '--vocab=50', '--prompts=2', '--group=2',
       '--prompt=8', '--completion=6', '--steps=6', '--arms', *arms],
      capture_output=True, text=True, timeout=600,
      env={**os.environ, 'PYTHONPATH': str(ROOT),
           'XLA_FLAGS': '--xla_backend_optimization_level=0'})  # one device
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  rows = [json.loads(line) for line in lines if line.startswith('{')]
  assert [row['name'] for row in rows] == arms
  header, *table = lines[-3:-1]
  assert header.split()[:5] == ['step', 's', 'rollout', 'reward', 'log_probs']
  assert [line[:26].strip() for line in table] == arms
  for row in rows:
    stages = [row[name] for name in ('rollout', 'reward', 'log_probs', 'update')]
    assert min(stages) > 0 and max(stages) < row['step_seconds'] and row['steps'] >= 2
    assert -0.1 < row['overhead'] < 1 and row['sizes']['completion'] == 6 and row['machine']
