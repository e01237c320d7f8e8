"""Methods that sample, through the launcher: their switches, their metrics, and what they refuse.

That every row learns is tested in online_learning_test.py; here are the rows whose samples need
earn nothing, and one of each kind of gate.
"""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

from ptjax import algorithms

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

STEPS = 3
NAMES = ('ssd', 'sdft', 'sdpo', 'seqkd', 'hpt', 'hpt_soft')
# Rows that imitate a teacher or a demonstration, whatever it earns.
WITHOUT_REWARDS = {'seqkd', 'sdft', 'ssd'}

# About half of all completions are right, so that groups differ and gates see both.
REWARD = '''
def parity(prompts, completions, completion_ids, **columns):
  return [float(sum(ids) % 2) for ids in completion_ids]

def constant(prompts, completions, **columns):
  return [1.0] * len(completions)
'''


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model, a teacher, rewards, and rows of a prompt and its demonstration."""
  root = tmp_path_factory.mktemp('online')
  sizes = {'width': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1, 'mlp_width': 16,
           'max_length': 96}
  job_runs.export_model(root / 'model', **sizes)
  job_runs.export_model(root / 'teacher', **{**sizes, 'width': 24})
  rows = [{'prompt': f'{i}+1=', 'solution': str(i + 1)} for i in range(8)]  # or completion
  (root / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (root / 'reward.py').write_text(REWARD)
  return root


@pytest.fixture(scope='module')
def train(root, compile_cache):
  """Runs the launcher; returns (exit code, records of metrics.jsonl, a weight's largest change)."""
  def run(algo, out, *more, reward='parity', **settings):
    settings = {
        'rollout__num_prompts': 4, 'rollout__group_size': 4, 'rollout__max_completion_tokens': 4,
        'data__max_prompt_tokens': 32, 'optimizer__learning_rate': 1e-2, 'log__report': False,
        'log__tensorboard': False, 'log__compile_cache': compile_cache, **settings}
    if 'teacher' in algorithms.get(algo).models and not algo.startswith(('sdft', 'sdpo')):
      more = (f'--teacher={root / "teacher"}', *more)
    code = job_runs.launch_here([
        f'--algo={algo}', f'--model={root / "model"}', f'--out_dir={root / out}',
        f'--steps={STEPS}', f'--dataset={root / "rows.jsonl"}',
        f'--reward={root / "reward.py"}:{reward}',
        *(f'--set={key.replace("__", ".")}={value}' for key, value in settings.items()), *more])
    if code:
      return code, [], 0.0
    before, after = job_runs.weights(root), job_runs.weights(root / out)
    change = max(np.abs(after[name] - before[name]).max() for name in before)
    return code, job_runs.metrics(root / out), change
  return run


def assert_finite(records):
  for record in records:
    for name, value in record.items():
      assert isinstance(value, str) or math.isfinite(value), (name, record)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_row_trains(train, name):
  code, records, change = train(name, name)
  assert code == 0
  stages = len(algorithms.get(name).stages) or 1
  assert [record['step'] for record in records] == list(range(1, stages * STEPS + 1))
  assert_finite(records)
  assert max(record['grad_norm'] for record in records) > 0
  # Adam's first steps are as long as the learning rate, however small the gradient.
  assert 1e-3 < change < 1
  record = records[-1]
  if name in WITHOUT_REWARDS:
    assert 'reward' not in record
  else:
    assert 0 < record['rewards/parity/mean'] < 1 and record['reward_std'] > 0
  assert record['entropy'] > 0
  if name.startswith('hpt'):
    shares = {'from_rollouts', 'imitated'} <= {key.removeprefix('gate/') for key in record}
    assert shares and any(0 < record[key] for key in record if key.startswith('gate/'))
  if algorithms.get(name).door == 'prompts' and 'sampling/log_prob_gap_max' in record:
    assert records[0]['sampling/log_prob_gap_max'] < 1e-3  # sampler and trainer agree


# Flags that change how a policy gradient is made of rewards, in few runs.
@pytest.mark.slow
@pytest.mark.parametrize('algo, settings, wanted', [
    ('grpo+tis+top_entropy+adaptive_entropy', {'loss__level': 'sequence'},
     {'entropy_coefficient'}),
    ('grpo+mis+opsm+entropy_bonus+kl', {
        'loss__kl_estimator': 'k1', 'rollout__reuse_log_probs': True}, {'kl'}),
    ('grpo+batch_normalized+reward_kl+adaptive_reward_kl+mask_truncated', {},
     {'kl_per_sequence', 'reward_kl_scale'}),
    ('rloo+adaptive_reward_kl', {'loss__kl_target': 0.1, 'loss__kl_horizon': 100},
     {'kl_per_sequence', 'reward_kl_scale'}),
    ('gspo+component_normalized+adaptive_kl', {
        'loss__kl_estimator': 'k2', 'training__mini_batches': 2, 'training__epochs': 2},
     {'kl', 'kl_coefficient', 'kl_per_sequence'}),
])
def test_modified_rows_train(train, algo, settings, wanted):
  code, records, change = train(algo, 'modified' + algo.replace('+', '-'), **settings)
  assert code == 0 and change > 1e-3
  assert_finite(records)
  assert wanted <= set(records[-1])
  scales = [record['reward_kl_scale'] for record in records if 'reward_kl_scale' in record]
  if 'rloo' in algo:  # the policy starts at its reference, so the coefficient falls at first
    assert scales[0] == 1 and scales[1] == pytest.approx(1 - 0.2 * 16 / 100)


MY_LOSS = '''
from ptjax.pieces import likelihood, reduction

def my_loss(log_probs, *, advantages, loss_mask, scale=2.0):
  loss, metrics = likelihood.weighted_loss(
      log_probs, loss_mask, advantages=scale * advantages, reduce=reduction.token_mean)
  return loss, {**metrics, 'my/scale': scale}
'''


@pytest.mark.slow
def test_a_users_own_loss_trains(root, train):
  path = root / 'my_loss.py'
  path.write_text(MY_LOSS)
  code, records, change = train(f'{path}:my_loss', 'mine')
  assert code == 0 and change > 1e-3 and {record['my/scale'] for record in records} == {2.0}
  assert all(record['stage'].endswith('my_loss') for record in records)
  code, records, change = train(f'{path}:my_loss', 'still', loss__scale=0.0)
  assert code == 0 and change == 0 and {record['my/scale'] for record in records} == {0.0}


# Dynamic sampling.


@pytest.mark.slow
def test_tied_groups_give_way_and_the_others_stay(train):
  """Two of eight prompts never give two rewards; DAPO replaces them, GRPO trains on nothing."""
  settings = {'rollout__max_completion_tokens': 2, 'rollout__group_size': 2, 'log__samples': 8}
  _, plain, _ = train('grpo', 'plain', **settings)
  code, dapo, _ = train('grpo', 'dynamic', rollout__extra_rollouts=5, **settings)
  assert code == 0
  # The first rollout is the same one, and metrics are of what the policy did by itself.
  assert dapo[0]['reward'] == plain[0]['reward']
  assert dapo[0]['frac_reward_zero_std'] == plain[0]['frac_reward_zero_std']
  tied = [round(4 * record['frac_reward_zero_std']) for record in dapo]
  assert max(tied) > 0
  for count, record in zip(tied, dapo):
    assert record['resampling/replaced_groups'] + record['resampling/vacant_groups'] == count
    assert bool(record['resampling/extra_rollouts']) == bool(count)
    assert record['resampling/extra_rollouts'] <= 5


@pytest.mark.slow
def test_where_nothing_differs_nothing_trains_and_the_search_ends(train):
  code, records, change = train('dapo', 'constant', reward='constant')
  assert code == 0 and change == 0
  for record in records:
    assert record['resampling/extra_rollouts'] == 3 and record['resampling/vacant_groups'] == 4
    assert record['grad_norm'] == 0


@pytest.mark.slow
def test_overlong_penalty_is_a_reward_of_its_own(train):
  code, records, _ = train('grpo', 'overlong', rewards__overlong_tokens=2)
  assert code == 0
  first = records[0]
  # Of up to 4 tokens, the third costs a half and the fourth the whole point.
  assert first['reward'] == pytest.approx(
      first['rewards/parity/mean'] + first['rewards/overlong/mean'], abs=1e-6)
  assert -1 <= first['rewards/overlong/mean'] < -0.5


@pytest.mark.parametrize('algo, settings, message', [
    ('rebel', {'rollout__group_size': 3}, 'rebel compares completions of a prompt with each other; '
     'make it a multiple of 2'),
    ('online_dpo', {'rollout__group_size': 1}, 'make it at least 2'),
    ('hpt', {'rollout__extra_rollouts': 2}, 'hpt does not train on its own samples alone'),
    ('luffy', {'rewards__overlap': 2}, 'rewards.overlap=2: luffy does not train on own samples'),
    ('grpo', {'rewards__overlong_tokens': 5}, 'rewards.overlong_tokens=5: expected 0 to'),
    ('grpo', {'rollout__reference_share': 1.5}, 'expected a fraction')])
def test_what_cannot_work_is_said_at_once(train, capsys, algo, settings, message):
  assert train(algo, 'refused', **settings)[0] == 2
  assert message in capsys.readouterr().err
