"""What a config is put together to, before anything runs."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import overrides
from ptjax import sharding
from ptjax import stages
from ptjax.models import hub
from ptjax.models import presets
from ptjax.training import step as training_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model, one with fewer tokens, and one with learned positions."""
  root = tmp_path_factory.mktemp('assembly')
  job_runs.export_model(root / 'model')
  job_runs.export_model(root / 'small', width=16, num_layers=1)
  other = json.loads((root / 'model' / 'config.json').read_text())
  (root / 'foreign').mkdir()
  for path in (root / 'model').iterdir():
    if 'token' in path.name or path.suffix == '.jinja':
      (root / 'foreign' / path.name).write_bytes(path.read_bytes())
  (root / 'foreign' / 'config.json').write_text(
      json.dumps({**other, 'vocab_size': other['vocab_size'] + 8}))
  return root


@pytest.fixture(scope='module')
def config_of(root):
  def make(*assignments, **values):
    config = settings.Config(
        **{'model': str(root / 'model'), 'dataset': 'arithmetic:max_operand=19', **values})
    for assignment in assignments:
      config = overrides.override(config, assignment)
    return config
  return make


def check(config, mesh=''):
  plans = stages.stage_plans(config)
  policy = assembly.load_policies(config, plans)['policy']
  devices = jax.devices() if mesh else jax.devices()[:1]
  assembly.check(plans, policy.config, sharding.make_mesh(mesh, devices))


def test_a_folder_name_says_what_runs():
  config = settings.Config(algo='mine/losses.py:loss', model='models/Qwen2.5/', dataset='a b.jsonl')
  assert assembly.out_dir(config) == 'runs/losses.py_loss-Qwen2.5-a_b.jsonl-0'
  assert assembly.out_dir(dataclasses.replace(config, out_dir='x')) == 'x'
  assert assembly.out_dir(dataclasses.replace(config, algo='sft,dpo')).startswith('runs/sft_dpo-')


# Models.


@pytest.mark.parametrize('algo, labels', [
    ('sft,dpo', 0), ('grpo', 0), ('rft', 0), ('rebel', 0),  # the environment's rewards
    ('reward_bt', 1), ('orm', 1), ('prm', 2)])
def test_a_stage_trains_the_head_its_loss_reads(config_of, algo, labels):
  config = config_of(algo=algo)
  policy = assembly.load_policies(config, stages.stage_plans(config))['policy']
  assert policy.config.num_labels == labels
  shapes = hub.param_shapes(policy.config)
  assert ('score' in shapes) == bool(labels)
  params = policy.load(lambda s: jax.tree.map(
      lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), s))
  assert jax.tree.structure(params) == jax.tree.structure(shapes)


def test_a_presets_seed_is_the_runs(config_of):
  def kernel(**values):
    config = config_of(model='tiny', algo='reward_bt', **values)
    policy = assembly.load_policy(config, num_labels=1)
    params = policy.load(lambda s: jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), s))
    return np.asarray(params['score']['kernel'])
  np.testing.assert_array_equal(kernel(), kernel())
  assert np.abs(kernel() - kernel(seed=1)).max() > 0


def test_a_fresh_heads_seed_is_the_runs(config_of):
  def kernel(**values):
    policy = assembly.load_policy(config_of(algo='reward_bt', **values), num_labels=1)
    return np.asarray(policy.load(lambda s: None)['score']['kernel'])
  np.testing.assert_array_equal(kernel(), kernel())
  assert np.abs(kernel() - kernel(seed=1)).max() > 0


def test_a_reward_model_and_a_policy_are_no_stages_of_one_run(config_of):
  config = config_of(algo='sft,reward_bt')
  with pytest.raises(settings.UserError, match='reward model has no next-token head'):
    assembly.load_policies(config, stages.stage_plans(config))


def test_a_teacher_may_be_smaller_but_not_of_another_vocabulary(root, config_of):
  config = config_of(algo='kd', teacher=str(root / 'small'))
  policies = assembly.load_policies(config, stages.stage_plans(config))
  assert policies['teacher'].config.width == 16 and policies['policy'].config.width == 32
  config = config_of(algo='kd', teacher=str(root / 'foreign'))
  with pytest.raises(settings.UserError) as raised:
    assembly.load_policies(config, stages.stage_plans(config))
  size = policies['policy'].config.vocab_size
  assert f'{root}/foreign: its vocabulary has {size + 8} tokens' in str(raised.value)
  # Methods without one do not look for it.
  config = config_of(algo='sft', teacher=str(root / 'absent'))
  assert set(assembly.load_policies(config, stages.stage_plans(config))) == {'policy'}


class _Gpu:
  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


@pytest.mark.parametrize('capability, found', [('8.0', 'xla'), ('9.0', 'cudnn')])
def test_the_kernel_for_attention_is_one_that_the_device_has(monkeypatch, capability, found):
  model = dataclasses.replace(presets.get('tiny'), dtype='bfloat16', head_dim=256)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [_Gpu(capability)])
  assert assembly._with_attention(model, settings.Config()).attention == found


# What cannot work.


@pytest.mark.parametrize('assignments, values, message', [
    ((), {'algo': 'kd'}, '--algo=kd: needs a teacher; name one with --teacher=DIR'),
    (('training.mini_batches=2', 'training.micro_batches=3'), {},
     'rollout.num_prompts=8 does not split into training.mini_batches=2 x '
     'training.micro_batches=3; make it a multiple of 6'),
    (('rollout.group_size=1',), {}, 'rollout.group_size=1: '),
    (('rollout.max_completion_tokens=7',), {'model': 'gpt2-like'}, 'has 8 positions; lower one'),
])
def test_what_cannot_work_is_said_at_once(root, config_of, assignments, values, message):
  config = config_of(*assignments, **{k: v for k, v in values.items() if k != 'model'})
  plans = stages.stage_plans(config)
  model = assembly.load_policy(config).config
  if 'model' in values:
    model = dataclasses.replace(presets.get('gpt2'), max_length=8)
  with pytest.raises(settings.UserError) as raised:
    assembly.check(plans, model, sharding.make_mesh('', jax.devices()[:1]))
  assert message in str(raised.value)


@pytest.mark.parametrize('assignments, algo, message', [
    (('rollout.num_prompts=12',), 'grpo', 'rollout.num_prompts / (training.mini_batches x '
     'training.micro_batches) = 12 does not split over data x fsdp = 8 devices'),
    (('rollout.num_prompts=16', 'training.mini_batches=2', 'training.micro_batches=2'), 'grpo',
     '= 4 does not split'),
    (('training.batch_size=12',), 'dpo', 'training.batch_size / training.micro_batches = 12 does '),
    (('training.batch_size=8', 'training.micro_batches=16'), 'dpo', '= 0.5 does not split'),
    (('stages.dpo.training.batch_size=4',), 'sft,dpo', '= 4 does not split')])
def test_batches_that_do_not_split_over_the_devices(config_of, assignments, algo, message):
  with pytest.raises(settings.UserError) as raised:
    check(config_of(*assignments, algo=algo), 'data=2,fsdp=4')
  assert message in str(raised.value) and 'multiple of 8' in str(raised.value)
  check(config_of('training.batch_size=16', 'rollout.num_prompts=16', algo=algo), 'data=2,fsdp=4')


def test_heads_must_split_over_the_tensor_axis(config_of):
  check(config_of(), 'tensor=2,fsdp=4')
  with pytest.raises(settings.UserError, match="tensor=4 does not divide the model's 2 key/value"):
    check(config_of(), 'tensor=4,fsdp=2')


@pytest.mark.parametrize('algo, message', [
    ('grpo', None), ('grpo,xpo', None), ('xpo,sft,grpo', None), ('sft', None),
    ('xpo', 'rewards.overlap=4: xpo does not train on own samples alone'),
    ('sft,luffy,xpo', 'rewards.overlap=4: luffy, xpo do not train on')])
def test_rollouts_in_parts_want_one_stage_that_can(config_of, algo, message):
  config = config_of('rewards.overlap=4', algo=algo)
  if message is None:
    check(config)
    return
  with pytest.raises(settings.UserError) as raised:
    check(config)
  assert message in str(raised.value)


# Forward passes.


@pytest.mark.parametrize('algo, extra', [
    ('sft', set()), ('wpo', {'sum_squares'}), ('gkd', {'divergence'}), ('dpo', set())])
def test_a_stage_computes_what_its_loss_reads(root, config_of, algo, extra):
  config = config_of('model_settings.remat=dots', 'data.packing=false', algo=algo,
                     teacher=str(root / 'small'))
  plan, = stages.stage_plans(config)
  policies = assembly.load_policies(config, [plan])
  shapes = {role: hub.param_shapes(policy.config) for role, policy in policies.items()}
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
  rows = dataclasses.make_dataclass('Rows', ['prompt_tokens', 'prompt_lengths', 'tokens', 'packing',
                                             'inputs', 'loss_mask'])
  def outputs(role):
    forward = assembly.make_forward(plan, policies, role=role)
    def call(params, frozen, tokens, lengths):
      return forward(params, frozen, rows(tokens, lengths, tokens, None, {}, None))
    params = shapes['policy' if role == 'reference' else role]
    found = jax.eval_shape(call, params, shapes, struct(2, 4), struct(2))
    assert all(value.shape == (2, 4) for value in found.values())
    return set(found)
  assert outputs('policy') == {'log_probs', 'entropy', 'likeliest'} | extra
  assert set(training_step.model_outputs(plan.bind().loss)) <= outputs('policy')
  assert outputs('reference') == {'log_probs', 'entropy', 'likeliest'}
  if algo == 'gkd':
    assert outputs('teacher') == outputs('reference')


def test_disk_space_counts_checkpoints_and_the_model(config_of):
  config = config_of('checkpoint.keep=1')
  policy = assembly.load_policy(config)
  one = sum(leaf.size * 4 for leaf in jax.tree.leaves(hub.param_shapes(policy.config)))
  # Two checkpoints of parameters and two moments: a new one is written before the old one goes.
  assert assembly.bytes_needed(policy, config) >= one * (3 * 2 + 1)
  more = overrides.override(config, 'checkpoint.keep=2')
  assert assembly.bytes_needed(policy, more) - assembly.bytes_needed(policy, config) == 3 * one
