"""The benchmark of losses runs, on every kind of row."""

import importlib.util
import pathlib

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench_losses.py'


def test_one_row_of_each_kind(capsys):
  spec = importlib.util.spec_from_file_location('bench_losses', SCRIPT)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  names = ['sft', 'ssd', 'dpo', 'bco', 'reward_kwise', 'prm']
  script.main([*names, '--completions=8', '--tokens=4', '--repeats=1'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines[3:-2]] == ['sft', 'dpo', 'bco', 'reward_kwise', 'prm']
  assert lines[-1].startswith('5 losses')
