"""The GPT-2 grid: every arm is a command the launcher understands, and one is run to its table."""

import importlib.util
import json
import pathlib
import sys

from absl.testing import flagsaver
import pytest

from ptjax import launch
from ptjax import stages

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _load():
  path = ROOT / 'experiments' / 'gpt2_sft_dpo_lora.py'
  spec = importlib.util.spec_from_file_location('gpt2_grid', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules['gpt2_grid'] = module
  spec.loader.exec_module(module)
  return module


grid = _load()


@pytest.mark.parametrize('small', [True, False])
@pytest.mark.parametrize('task, method, lora', grid.arms())
def test_an_arm_is_a_config(tmp_path, task, method, lora, small):
  command = grid.arm_command(
      tmp_path, grid.SIZES[small], 'base', tmp_path, task, method, lora, seed=3)
  with flagsaver.flagsaver():
    launch.FLAGS(['ptjax', *map(str, command[3:])])
    values = {f.name: f.value for f in launch.FLAGS.get_flags_for_module(launch)}
    config = launch.resolve(values)
  plans = stages.stage_plans(config)
  assert [plan.row.name for plan in plans] == method.split(',')
  assert bool(config.lora.rank) == lora and config.seed == 3
  rates = [plan.config.optimizer.learning_rate for plan in plans]
  full = grid.SIZES[small]['rate']
  wanted = {'sft': [full], 'dpo': [0.1 * full], 'sft,dpo': [full, 0.1 * full]}[method]
  assert rates == pytest.approx([rate * (10 if lora else 1) for rate in wanted])


def test_the_table_has_a_line_per_arm(tmp_path):
  runs = [{'before': 0.5, 'after': after, 'standard_error': 0.01, 'training_seconds': 3.0,
           'seconds': 5.0, 'cpu_seconds': 4.0, 'peak_bytes': 2**30} for after in (0.6, 0.7)]
  lines = grid.table({('quora', 'dpo', True): runs, ('quora', 'sft', False): runs[:1]}).splitlines()
  assert lines[2] == (
      '| quora | dpo | LoRA | 0.500 | 0.650 | 0.010 | ±0.050 (2) | 5 | 3 | 4 | 1024 |')
  assert lines[3].split(' | ')[6] == '-'


@pytest.mark.slow
def test_two_arms_to_their_table_and_figure(tmp_path, shared_data, monkeypatch):
  monkeypatch.setattr(grid, 'TASKS', {'quora': grid.TASKS['quora']})
  monkeypatch.setattr(grid, 'arms', lambda: [('quora', 'sft', False), ('quora', 'sft,dpo', True)])
  monkeypatch.chdir(ROOT)
  for name in ('PYTHONPATH', 'XLA_FLAGS'):  # commands for one device, as a user's are
    monkeypatch.setenv(name, job_runs.environment()[name])
  monkeypatch.setitem(grid.SIZES, True, {**grid.SIZES[True], 'sonnet_tokens': 8})
  argv = ['--small', f'--data={shared_data}', f'--out={tmp_path}', '--scale=0.02']
  grid.main(argv)
  table = (tmp_path / 'table.md').read_text()
  assert len(table.splitlines()) == 4 and (tmp_path / 'figure.png').stat().st_size
  results = json.loads((tmp_path / 'results.json').read_text())
  assert [run['peak_bytes'] > 2**20 for arm in results for run in arm['runs']] == [True, True]
  costs = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*/cost.json')}
  assert len(costs) == 2
  grid.main(argv)  # finished arms are not run again
  assert costs == {path: path.stat().st_mtime_ns for path in costs}
