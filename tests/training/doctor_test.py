"""The doctor: each planted fault is named by its own message, once, and a healthy run by none."""

import json
import logging
import pathlib
import string
import sys

import numpy as np
import pytest

from ptjax.training import doctor
from ptjax.training import experience

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


@pytest.mark.parametrize('title', ['', *PLANTED])
def test_a_healthy_run_and_a_passing_fault_are_left_alone(tmp_path, title):
  few, changes = doctor.PATIENCE - 1, PLANTED.get(title, {})
  assert _watch(tmp_path, _records(changes, few) + _records({}, 1) + _records(changes, few)) == []
  assert not (tmp_path / 'findings.json').exists()


class _Read(dict):
  """A record that remembers which metrics were asked for."""
  names = set()

  def get(self, name, default=None):
    self.names.add(name)
    return super().get(name, default)

  def __getitem__(self, name):
    self.names.add(name)
    return super().__getitem__(name)

  def __contains__(self, name):
    self.names.add(name)
    return super().__contains__(name)


def _metrics_of_faults():
  """The names of all metrics that the faults look at, and that their messages print."""
  past = {'stopped': False, 'rewarded': False, 'trained_parameters': 1}
  for changes in ({}, *PLANTED.values()):
    for fault in doctor.FAULTS:
      for stopped in (False, True):
        fault.shows([_Read(record) for record in _records(changes)], {**past, 'stopped': stopped})
  printed = {name for fault in doctor.FAULTS
             for _, name, _, _ in string.Formatter().parse(fault.message) if name}
  return _Read.names | printed


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


@pytest.fixture(scope='module')
def launch(tmp_path_factory, compile_cache):
  """Runs some steps with a reward of `text` and its place `i` in the rollout; the run's folder."""
  root = tmp_path_factory.mktemp('doctor')
  model = job_runs.export_model(root / 'model', width=16, num_layers=1, num_heads=2,
                                num_kv_heads=1, mlp_width=32)
  def run(algo, reward, *, steps=6, **settings):
    (root / f'{algo}.py').write_text(
        'def reward(prompts, completions, **columns):\n'
        f'  return [{reward} for i, text in enumerate(completions)]\n')
    assert job_runs.launch_here(job_runs.arguments(
        model, root / algo, compile_cache, f'--algo={algo}', f'--steps={steps}',
        f'--reward={root / algo}.py:reward', **settings)) == 0
    return root / algo
  return run


def _titles(run):
  path = run / 'findings.json'
  return {found['title'] for found in json.loads(path.read_text())} if path.exists() else set()


@pytest.mark.slow
def test_a_run_that_cannot_learn(launch, capsys):
  run = launch('grpo', 0.5, rollout__max_completion_tokens=1, optimizer__learning_rate=0)
  wanted = {'the reward is constant', 'the learning rate is zero', 'no completion ends by itself'}
  assert _titles(run) == wanted
  page, shown = (run / 'report.html').read_text(), capsys.readouterr().out
  assert all(title in page and title in shown for title in wanted)


@pytest.mark.slow
def test_a_run_whose_estimator_takes_everything_away(launch):
  """Of two best completions neither stands out, so pass@k's advantage is 0 though rewards vary."""
  run = launch('pass_at_k', 'float(i % 4 < 2)', log__report=False)
  assert _titles(run) == {'all advantages are zero'}
  _assert_logged(run)


@pytest.mark.slow
def test_a_run_that_leaves_its_sampler_behind(launch, monkeypatch):
  """A sampler that records other log-probs than it drew with, and epochs past a clip of 0."""
  assemble = experience.assemble
  def misreport(prompts, rollouts, **options):
    return assemble(prompts, rollouts.replace(log_probs=rollouts.log_probs - 2.0), **options)
  monkeypatch.setattr(experience, 'assemble', misreport)
  run = launch('ppo', 'float(text[:1] in "01234")', steps=8, log__report=False, training__epochs=8,
               optimizer__learning_rate=3e-3, rollout__max_completion_tokens=1,
               loss__clip_low=0, loss__clip_high=0, loss__value_coefficient=0)
  assert _titles(run) == {'sampler and trainer disagree', 'everything is clipped',
                          'no completion ends by itself'}
  _assert_logged(run)


def _assert_logged(run):
  """Whatever a fault reads, a real run logs; `bad_steps` where there are any."""
  logged = {name for record in job_runs.metrics(run, timing=True) for name in record}
  assert _metrics_of_faults() - logged == {'bad_steps'}
