"""The doctor: each planted fault is named by its own message, once, and a healthy run by none."""

import json
import logging
import pathlib
import sys

import numpy as np
import pytest

from ptjax.training import doctor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import job_runs

HEALTHY = {
    'stage': 'grpo', 'reward': 0.4, 'reward_std': 0.2, 'frac_reward_zero_std': 0.5,
    'completions/clipped_ratio': 0.2, 'completions/max_length': 8, 'completions/mean_length': 5.0,
    'learning_rate': 1e-3, 'grad_norm': 0.3, 'perf/train_tokens_per_second': 100.0,
    'pieces/advantage_abs_mean': 0.5, 'pieces/mask_fraction': 0.1,
    'sampling/log_prob_gap_max': 1e-5, 'sampling/effective_sample_size': 0.99}
# What a fault does to the metrics, its consequences included -> the one title to be named.
PLANTED = {
    'the learning rate is zero': {'learning_rate': 0.0},
    'the reward is constant': {
        'reward_std': 0.0, 'frac_reward_zero_std': 1.0, 'pieces/advantage_abs_mean': 0.0,
        'grad_norm': 0.0},
    'no group has two different rewards': {
        'reward': lambda step: 0.1 * step, 'reward_std': 0.0, 'frac_reward_zero_std': 1.0,
        'pieces/advantage_abs_mean': 0.0, 'grad_norm': 0.0},
    'no completion has a reward': {
        'reward': None, 'frac_reward_zero_std': None, 'pieces/advantage_abs_mean': 0.0,
        'grad_norm': 0.0},
    'no completion ends by itself': {'completions/clipped_ratio': 1.0},
    'no token trains': {
        'perf/train_tokens_per_second': 0.0, 'pieces/advantage_abs_mean': 0.0, 'grad_norm': 0.0},
    'all advantages are zero': {'pieces/advantage_abs_mean': 0.0, 'grad_norm': 0.0},
    'everything is clipped': {'pieces/mask_fraction': 1.0, 'grad_norm': 0.0},
    'the gradient is zero': {'grad_norm': 0.0},
    'updates are skipped': {'bad_steps': lambda step: step + 1, 'grad_norm': float('nan')},
    'sampler and trainer disagree': {'sampling/log_prob_gap_max': 3.0},
}


def _records(changes, count=8, **more):
  def value(x, step):
    return x(step) if callable(x) else x
  records = [{'step': i + 1, **{name: value(x, i) for name, x in {**HEALTHY, **changes}.items()},
              **more} for i in range(count)]
  return [{name: x for name, x in record.items() if x is not None} for record in records]


def _watch(folder, records, params=None):
  watching = doctor.Doctor(folder)
  if params is not None:
    watching.begin_stage(params)
  for record in records:
    watching.watch(record)
  return watching.findings


@pytest.mark.parametrize('title', PLANTED)
def test_a_planted_fault_is_named_once(tmp_path, caplog, title):
  with caplog.at_level(logging.WARNING):
    findings = _watch(tmp_path, _records(PLANTED[title]))
  assert [finding['title'] for finding in findings] == [title]
  assert findings[0]['step'] == doctor.PATIENCE and findings[0]['remedy']
  assert 'nan' not in findings[0]['message']
  assert json.loads((tmp_path / 'findings.json').read_text()) == findings
  assert sum(title in message for message in caplog.messages) == 1


def test_every_fault_is_planted():
  assert set(PLANTED) | {'nothing is trainable', 'all completions are truncated'} == {
      fault.title for fault in doctor.FAULTS}


def test_nothing_trainable(tmp_path):
  findings = _watch(tmp_path, _records({'grad_norm': 0.0}), params={'layers': {}})
  assert [finding['title'] for finding in findings] == ['nothing is trainable']
  assert not _watch(tmp_path, _records({}), params={'kernel': np.ones(3)})


def test_completions_that_stopped_before_are_growing(tmp_path):
  records = _records({}, 1) + _records({'completions/clipped_ratio': 1.0}, 8)
  findings = _watch(tmp_path, records)
  assert [finding['title'] for finding in findings] == ['all completions are truncated']


def test_a_healthy_run_and_a_passing_fault_are_left_alone(tmp_path):
  assert _watch(tmp_path, _records({})) == []
  for changes in PLANTED.values():
    few = doctor.PATIENCE - 1
    assert _watch(tmp_path, _records(changes, few) + _records({}, 1) + _records(changes, few)) in (
        [], ) or 'completions/clipped_ratio' in changes
  assert not (tmp_path / 'findings.json').exists()


def test_supervised_records_have_no_rewards_to_miss(tmp_path):
  records = [{'step': i + 1, 'stage': 'sft', 'loss': 1.0, 'grad_norm': 0.5, 'learning_rate': 1e-3,
              'perf/train_tokens_per_second': 5.0} for i in range(8)]
  assert _watch(tmp_path, records) == []


def test_stages_are_told_apart(tmp_path):
  zero = {'learning_rate': 0.0}
  few = doctor.PATIENCE - 1
  records = _records(zero, few, stage='sft') + _records(zero, few, stage='grpo')
  assert _watch(tmp_path, records) == []
  findings = _watch(tmp_path, _records(zero, 6, stage='sft') + _records(zero, 6, stage='grpo'))
  assert [finding['stage'] for finding in findings] == ['sft', 'grpo']


def test_a_resumed_run_names_nothing_twice(tmp_path, caplog):
  records = _records({'learning_rate': 0.0}, 12)
  whole = _watch(tmp_path, records)
  caplog.clear()
  resumed = doctor.Doctor(tmp_path, records[:8])
  for record in records[8:]:
    resumed.watch(record)
  assert resumed.findings == whole
  assert not caplog.messages
  doctor.Doctor(tmp_path)  # a new run in the same folder
  assert not (tmp_path / 'findings.json').exists()


@pytest.mark.slow
def test_in_a_run(tmp_path, compile_cache, capsys):
  (tmp_path / 'same.py').write_text(
      'def reward(prompts, completions, **columns):\n  return [0.5] * len(prompts)\n')
  model = job_runs.export_model(tmp_path / 'model')
  assert job_runs.launch_here(job_runs.arguments(
      model, tmp_path / 'run', compile_cache, '--steps=6', f'--reward={tmp_path}/same.py:reward',
      rollout__max_completion_tokens=1, optimizer__learning_rate=0)) == 0
  wanted = {'the reward is constant', 'the learning rate is zero', 'no completion ends by itself'}
  findings = json.loads((tmp_path / 'run' / 'findings.json').read_text())
  assert {finding['title'] for finding in findings} == wanted
  page, shown = (tmp_path / 'run' / 'report.html').read_text(), capsys.readouterr().out
  assert all(title in page and title in shown for title in wanted)
