"""Whole small runs: what they leave, which numbers they log, and what does not change them."""

import functools
import json
import pathlib
import sys

import numpy as np
import pytest
import transformers

from ptjax.models import hub
from ptjax.models import presets

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

ALWAYS = {'step', 'stage', 'loss', 'grad_norm', 'learning_rate', 'epoch', 'num_tokens', 'entropy',
          'step_time', 'timing_s/update', 'perf/train_tokens_per_second', 'perf/compilations'}
SUPERVISED = ALWAYS | {'mean_token_accuracy', 'pieces/advantage_abs_mean'}
ONLINE = ALWAYS | {
    'reward', 'reward_std', 'frac_reward_zero_std', 'rewards/length/mean', 'rewards/length/std',
    *(f'completions/{name}' for name in ('mean_length', 'min_length', 'max_length',
                                         'clipped_ratio')),
    *(f'clip_ratio/{name}_mean' for name in ('low', 'high', 'region')),
    *(f'pieces/{name}' for name in ('mask_fraction', 'ratio_mean', 'advantage_abs_mean')),
    'sampling/log_prob_gap_max', 'sampling/effective_sample_size'}
ROLLOUT = {'timing_s/rollout', 'timing_s/reward', 'timing_s/log_probs',
           'perf/rollout_tokens_per_second'}
EVALUATION = {f'eval/arithmetic/{name}{part}' for part in ('', '_se', '_low', '_high')
              for name in ('acc_strict', 'acc_flexible', 'format_gap', 'mean_length', 'truncated')}
# Of the supervised stage, on the task's held-out rows.
HELD_OUT = {f'eval/sft/{name}' for name in (
    'loss', 'entropy', 'mean_token_accuracy', 'pieces/advantage_abs_mean')}
AT_TIMES = {'timing_s/checkpoint', 'timing_s/eval', *EVALUATION, *HELD_OUT}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def run(root, compile_cache):
  """Trains once for each set of changes, two rollouts of two updates; returns the folder."""
  model = job_runs.export_model(root / 'model')

  @functools.cache
  def train(name, *more, devices=1, **settings):
    settings = {'rollout__num_prompts': 8, 'training__mini_batches': 2, 'log__samples_every': 1,
                'loss__kl_coefficient': 0.04, **settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    assert job_runs.launch_here(job_runs.arguments(
        model, root / name, compile_cache, '--steps=4', *more, **settings), devices) == 0
    return root / name
  return train


def assert_close(one, other, rtol=1e-4, atol=1e-5):
  """Two runs agree in every metric up to rounding, and in every sample exactly."""
  records, wanted = job_runs.metrics(one), job_runs.metrics(other)
  assert len(records) == len(wanted)
  for record, expected in zip(records, wanted):
    assert record.keys() == expected.keys()
    for name, value in expected.items():
      if isinstance(value, str):
        assert record[name] == value
      else:
        np.testing.assert_allclose(record[name], value, rtol, atol, err_msg=name)
  assert job_runs.samples(one) == job_runs.samples(other)


@pytest.mark.slow
def test_the_default_job_leaves_what_the_contract_lists(
    compile_cache, tmp_path, monkeypatch, capsys):
  small = {**presets._PRESETS['tiny'], 'width': 32, 'num_layers': 2, 'mlp_width': 64}
  monkeypatch.setitem(presets._PRESETS, 'tiny', small)
  monkeypatch.chdir(tmp_path)
  sizes = ('training.steps=2', 'warm_start.steps=2', 'warm_start.batch_size=8', 'eval.limit=8',
           'rollout.num_prompts=4', f'log.compile_cache={compile_cache}')
  assert job_runs.launch_here(['--algo=grpo', '--reward=length(target=4)',
                               *(f'--set={size}' for size in sizes)]) == 0
  folder = tmp_path / 'runs' / 'grpo-tiny-arithmetic-0'
  out = capsys.readouterr().out
  assert out.endswith(f'model   {folder}/model\nreport  {folder}/report.html\n')
  assert 'arithmetic/acc_strict' in out

  names = {path.name for path in folder.iterdir() if not path.name.startswith('.')}
  events = {name for name in names if name.startswith('events.')}
  assert len(events) == 1
  assert names - events == {'config.json', 'data.json', 'metrics.jsonl', 'samples.jsonl',
                            'checkpoints', 'model', 'report.html'}
  saved = json.loads((folder / 'config.json').read_text())
  assert saved['config']['training']['steps'] == 2 and saved['config']['algo'] == 'grpo'
  assert saved['versions']['jax'] and saved['seed'] == 0
  assert {path.name for path in (folder / 'checkpoints').iterdir()} == {'2', '4'}

  records = job_runs.metrics(folder, timing=True)
  assert [(r['step'], r['stage']) for r in records] == [
      (0, 'start'), (1, 'sft'), (2, 'sft'), (3, 'grpo'), (4, 'grpo')]
  assert records[0].keys() == EVALUATION | HELD_OUT | {'step', 'stage', 'perf/compilations'}
  for record in records[1:]:
    expected = ONLINE | ROLLOUT if record['stage'] == 'grpo' else SUPERVISED
    assert record.keys() - AT_TIMES == expected
    evaluated = record['step'] in (2, 4)  # where a stage ends
    assert (EVALUATION <= record.keys()) == evaluated == ('timing_s/eval' in record)
    assert (HELD_OUT <= record.keys()) == (record['step'] == 2)
  assert records[-1]['perf/compilations'] == records[-2]['perf/compilations']  # none in a step

  assert {sample['step'] for sample in job_runs.samples(folder)} == {3, 4}

  model = folder / 'model'
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  assert tokenizer.decode(tokenizer('12+7=').input_ids, skip_special_tokens=True) == '12+7='
  assert transformers.AutoConfig.from_pretrained(model).num_hidden_layers == 2
  assert hub.load(model)[0].width == 32


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_another(run):
  job_runs.assert_same_run(run('base'), run('again'))
  records, others = job_runs.metrics(run('base')), job_runs.metrics(run('seeded', '--seed=1'))
  assert [r['step'] for r in records] == [0, 1, 2, 3, 4]
  assert all(r['reward'] != o['reward'] for r, o in zip(records[1:], others[1:]))
  # Every rollout draws anew: of the same policy, too.
  frozen = job_runs.metrics(run('frozen', optimizer__learning_rate=0.0))
  assert frozen[1]['reward'] != frozen[3]['reward']


@pytest.mark.slow
def test_a_finished_run_can_be_extended_and_is_else_left_alone(run):
  before = job_runs.metrics(run('extended'), timing=True)
  assert job_runs.metrics(run('extended', '--steps=4'), timing=True) == before
  after = job_runs.metrics(run('extended', '--steps=6'), timing=True)
  assert after[:5] == before and [r['step'] for r in after] == [0, 1, 2, 3, 4, 5, 6]
  assert (run('extended') / 'report.html').stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize('algo', [
    'rloo',  # a reference in its advantage
    'reinforce_pp',  # advantages per token
    'clip_cov',  # draws at random
    'grpo+tis'])  # corrects for the sampler
def test_other_algorithms_train(run, algo):
  records = job_runs.metrics(run(algo, f'--algo={algo}', loss__kl_coefficient=None))
  assert [r['step'] for r in records] == [0, 1, 2, 3, 4]
  assert all(r['grad_norm'] > 0 and 'bad_steps' not in r for r in records[1:])


@pytest.mark.slow
def test_the_first_update_of_a_rollout_is_exactly_on_policy(run):
  records = job_runs.metrics(run('base'))[1:]
  ratios = [r['pieces/ratio_mean'] for r in records]
  assert ratios[0] == ratios[2] == 1.0 and ratios[1] != 1.0 and ratios[3] != 1.0
  # Both updates compare the sampler with the policy as it was before the first.
  assert all(0 < r['sampling/log_prob_gap_max'] < 1e-4 for r in records)


@pytest.mark.slow
def test_reused_log_probs_are_the_denominator_and_the_gap_is_still_logged(run):
  records = job_runs.metrics(run('reused', rollout__reuse_log_probs=True))[1:]
  for first, second in (records[:2], records[2:]):
    assert 0 < first['sampling/log_prob_gap_max'] < 1e-4
    for name in ('sampling/log_prob_gap_max', 'sampling/effective_sample_size'):
      assert second[name] == first[name]  # the policy that drew the tokens is gone
    assert first['pieces/ratio_mean'] != second['pieces/ratio_mean']
  np.testing.assert_allclose(records[0]['pieces/ratio_mean'], 1.0, rtol=1e-5)
  # Up to what the two programs differ by, both ways train alike.
  base = job_runs.metrics(run('base'))[1:]
  for record, expected in zip(records, base):
    np.testing.assert_allclose(record['loss'], expected['loss'], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing_but_rounding(run):
  assert_close(run('split', training__micro_batches=4), run('base'))


@pytest.mark.slow
def test_a_mesh_of_eight_changes_nothing_but_rounding(run):
  eight = run('mesh', '--mesh=data=2,fsdp=2,tensor=2', devices=8)
  assert_close(eight, run('base'))
  weights, wanted = job_runs.weights(eight), job_runs.weights(run('base'))
  for name in wanted:
    # Adam divides a gradient by its own size, so where it is nearly 0 rounding grows.
    np.testing.assert_allclose(weights[name], wanted[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_users_own_loss_trains_like_ours(run, root):
  (root / 'mine.py').write_text('''
from ptjax.losses import policy_gradient

def mine(log_probs, *, old_log_probs, advantages, loss_mask, reference_log_probs, scale=1.0):
  loss, metrics = policy_gradient.grpo_loss(
      log_probs, old_log_probs=old_log_probs, advantages=advantages, loss_mask=loss_mask,
      reference_log_probs=reference_log_probs, kl_coefficient=0.02 * scale)
  return loss, {**metrics, 'doubled': 2 * metrics['kl']}
''')
  own = run('own', f'--algo={root}/mine.py:mine', loss__kl_coefficient=None, loss__scale=2.0)
  records, base = job_runs.metrics(own), job_runs.metrics(run('base'))
  assert all(r['doubled'] == 2 * r['kl'] for r in records[1:])
  for record, expected in zip(records, base):
    for name in expected.keys() - {'stage'}:
      # Where sampler and trainer are apart by rounding alone, so are their gaps.
      np.testing.assert_allclose(record[name], expected[name], rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_the_kl_gradient_depends_on_the_reference(run):
  pulled, free = run('base'), run('free', loss__kl_coefficient=None)
  assert 'kl' not in job_runs.metrics(free)[-1]
  pulled, free = job_runs.metrics(pulled), job_runs.metrics(free)
  # At first policy and reference are one, and k3's gradient there is zero; afterwards it pulls.
  np.testing.assert_allclose(pulled[1]['grad_norm'], free[1]['grad_norm'], rtol=1e-5)
  assert pulled[2]['kl'] > 0
  assert abs(pulled[2]['grad_norm'] - free[2]['grad_norm']) > 1e-4


@pytest.mark.slow
def test_supervised_fine_tuning_on_a_file(run, root):
  (root / 'rows.jsonl').write_text(''.join(
      json.dumps({'prompt': f'{a}+{b}=', 'completion': str(a + b)}) + '\n'
      for a in range(4) for b in range(4)))
  folder = run('sft', '--algo=sft', f'--dataset={root}/rows.jsonl', loss__kl_coefficient=None,
               training__batch_size=8, training__mini_batches=None)
  records = job_runs.metrics(folder, timing=True)
  assert [r['step'] for r in records] == [1, 2, 3, 4]  # nothing to evaluate on, so no step 0
  for record in records:
    assert record.keys() - AT_TIMES == SUPERVISED
    assert 0 <= record['mean_token_accuracy'] <= 1
  assert records[-1]['loss'] < records[0]['loss']
  assert records[-1]['epoch'] == 1.5  # where the step's batch begins: 3 batches of 8 in 16 rows
  assert records[-1]['num_tokens'] == 2 * sum(len(str(a + b)) + 1 for a in range(4)
                                              for b in range(4))  # with each end token
  assert (folder / 'samples.jsonl').read_text() == ''
  assert (folder / 'model' / 'model.safetensors').exists()


@pytest.mark.slow
def test_a_real_checkpoint(run, root, shared_data):
  (root / 'stories.jsonl').write_text(''.join(
      json.dumps({'prompt': f'Once upon a time, there was a {name}'}) + '\n'
      for name in ('dog', 'girl', 'boy', 'cat', 'bear', 'fish', 'king', 'tree')))
  source = shared_data / 'models' / 'stories260K'
  folder = run('stories', f'--model={source}', f'--dataset={root}/stories.jsonl',
               '--reward=length(target=6)', training__mini_batches=None)
  records = job_runs.metrics(folder)
  assert [r['pieces/ratio_mean'] for r in records] == [1.0] * 4
  assert all(0 < r['sampling/log_prob_gap_max'] < 1e-3 for r in records)
  assert all('Once upon a time' in sample['prompt'] for sample in job_runs.samples(folder))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'model')
  original = transformers.AutoTokenizer.from_pretrained(source)
  assert tokenizer('Once upon a time').input_ids == original('Once upon a time').input_ids
  assert transformers.AutoConfig.from_pretrained(folder / 'model').model_type == 'llama'
  assert hub.load_stop_ids(folder / 'model', tokenizer) == hub.load_stop_ids(source, original)
