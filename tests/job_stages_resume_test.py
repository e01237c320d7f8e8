"""Runs of several stages, with a critic, or of adapters, torn down and resumed: equal to the bit.

In this process, where a start costs little: a run dies of an exception just as it has noted a step,
and the next one goes on from its checkpoints.
"""

import json
import pathlib
import sys

import pytest

from ptjax import job

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

SIZES = dict(width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16, max_length=32)
COMMON = {'checkpoint__every_steps': 1, 'checkpoint__keep': 2, 'log__report': False,
          'log__tensorboard': False, 'training__batch_size': 4, 'eval__limit': 4}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('resumed')
  job_runs.export_model(root / 'model', **SIZES)
  rows = [{'prompt': f'{i}+1=', 'completion': str(i + 1)} for i in range(8)]
  pairs = [{'prompt': row['prompt'], 'chosen': row['completion'], 'rejected': '0'} for row in rows]
  (root / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (root / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  return root


class Torn(Exception):
  pass


def tear_after(monkeypatch, step):
  """Lets the run die as soon as it has noted `step`; None lets it live."""
  record = job._Run._record

  def recording(self, at, metrics, samples):
    record(self, at, metrics, samples)
    if at == step:
      raise Torn(f'after step {at}')
  monkeypatch.setattr(job._Run, '_record', recording)


def check(root, compile_cache, monkeypatch, name, steps, torn_after, *more, **settings):
  """Runs straight through, and torn after some of its steps; returns the folder of the latter."""
  def launch(folder):
    return job_runs.launch_here(job_runs.arguments(
        root / 'model', root / folder, compile_cache, f'--steps={steps}', *more,
        **{**COMMON, **settings}))
  assert launch(f'{name}_straight') == 0
  for step in torn_after:
    with monkeypatch.context() as patch:
      tear_after(patch, step)
      assert launch(f'{name}_torn') == 1
    assert not (root / f'{name}_torn' / 'model').exists()
    assert job_runs.metrics(root / f'{name}_torn')[-1]['step'] == step
  assert launch(f'{name}_torn') == 0
  records = job_runs.metrics(root / f'{name}_straight')
  assert all(record['grad_norm'] > 0 for record in records if record['step'])
  job_runs.assert_same_run(root / f'{name}_straight', root / f'{name}_torn')
  return root / f'{name}_torn'


@pytest.mark.slow
def test_inside_and_between_offline_stages(root, compile_cache, monkeypatch):
  # Three steps each. What is torn after a step goes on from the one before: inside the first stage,
  # behind its last step, inside the second, whose reference is what the first one left.
  folder = check(root, compile_cache, monkeypatch, 'chain', 3, (2, 4, 6), '--algo=sft,dpo',
                 f'--dataset={root}/rows.jsonl', f'--set=stages.dpo.dataset={root}/pairs.jsonl')
  records = job_runs.metrics(folder)
  assert [record['stage'] for record in records] == ['sft'] * 3 + ['dpo'] * 3
  assert [record['step'] for record in records] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_critic_and_a_rollout_in_the_middle_of_its_updates(root, compile_cache, monkeypatch):
  folder = check(root, compile_cache, monkeypatch, 'ppo', 4, (2, 4), '--algo=ppo',
                 training__mini_batches=2, training__epochs=2, log__samples_every=1)
  assert json.loads((folder / 'samples.jsonl').read_text().splitlines()[0])['step'] == 1


@pytest.mark.slow
def test_adapters_and_their_base(root, compile_cache, monkeypatch):
  folder = check(root, compile_cache, monkeypatch, 'lora', 3, (2, 3), '--algo=grpo',
                 lora__rank=2, loss__kl_coefficient=0.04, training__mini_batches=1)
  assert (folder / 'adapter').is_dir()
