"""The command line: what it prints, saves and refuses."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from ptjax.inspect import __main__ as command
from ptjax.inspect import example


def test_two_algorithms_are_printed_and_saved(tmp_path, capsys):
  assert command.main(
      ['--algo=sft', '--algo=dpo', f'--out={tmp_path}/o', '--set=loss.beta=0.5']) == 0
  out = capsys.readouterr().out
  for line in ('sft: composed of pieces', 'dpo: one coefficient per response', 'built-in batch'):
    assert line in out
  assert {p.name for p in pathlib.Path(tmp_path, 'o').iterdir()} == {
      f'{name}.{kind}' for name in ('sft', 'dpo') for kind in ('txt', 'json', 'png')}
  assert (tmp_path / 'o' / 'dpo.txt').read_text().strip() in out
  numbers = json.loads((tmp_path / 'o' / 'sft.json').read_text())
  weights = np.array(numbers['weights'])[np.array(numbers['loss_mask'])]
  np.testing.assert_allclose(weights, 1 / example.LENGTHS.sum())
  assert numbers['summary']['tokens'] == example.LENGTHS.sum()
  cosine = float(out.rsplit('cosine of the gradients of sft and dpo:')[1])
  assert -1 < cosine < 1
  dpo = json.loads((tmp_path / 'o' / 'dpo.json').read_text())
  assert np.abs(dpo['parts']['policy']['advantages']).max() > 0.1, 'beta came through'


@pytest.mark.parametrize('argv, message', [
    (['--algo=grop'], "algo 'grop' is unknown; did you mean"),
    (['--algo=grpo', '--samples=/nowhere/s.jsonl'], '--samples=/nowhere/s.jsonl: no such file'),
    (['--algo=grpo', '--set=clip_hi=1'], 'clip_hi=1: no hyperparameter of grpo; did you mean'),
    (['--algo=grpo', '--set=clip_high'], '--set=clip_high: expected NAME=VALUE'),
    (['--algo=grpo', '--set=clip_low=-1'], 'clip_low=-1'),
    (['--algo=missing.py:f'], 'no file missing.py')])
def test_user_errors_end_with_2_and_one_line(argv, message, tmp_path, capsys):
  assert command.main([*argv, f'--out={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('ptjax: ') and message in error and error.count('\n') == 1


@pytest.mark.slow
def test_the_samples_of_a_run(tmp_path, capsys):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  import job_runs  # whole runs: slow to load
  model = job_runs.export_model(tmp_path / 'model')
  run = tmp_path / 'run'
  cache = jax.config.jax_compilation_cache_dir
  assert job_runs.launch_here(job_runs.arguments(
      model, run, cache, '--set=log.samples=8', '--set=log.samples_every=1')) == 0
  capsys.readouterr()
  assert command.main(['--algo=grpo', '--algo=simpo', f'--samples={run}',
                       f'--out={tmp_path}/o']) == 0
  out = capsys.readouterr().out
  assert '8 completions of step 2' in out and 'in groups of 4' in out
  assert 'the heaviest token' in out
