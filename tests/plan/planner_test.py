"""The plan against what runs really hold, and what it refuses to plan."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from ptjax import config as settings
from ptjax import experiment
from ptjax import job
from ptjax import overrides
from ptjax import sharding
from ptjax import types
from ptjax.models import costs
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.plan import dry_run
from ptjax.plan import planner
from ptjax.plan import rates as device_rates
from ptjax.rollout import sampler
from ptjax.training import step as training_step

SMALL = presets.get('tiny', width=16, num_layers=2, mlp_width=32, vocab_size=40)


@pytest.fixture(scope='module', autouse=True)
def eight_devices():
  """Planning asks for as many devices as a mesh names, unless there are some already."""
  assert len(jax.devices()) == 8


def small_job(*assignments):
  config = experiment.tiny_job()
  for assignment in (
      'warm_start.steps=1', 'warm_start.batch_size=8', 'training.steps=1', 'eval.limit=8',
      'eval.batch_size=8', 'rollout.num_prompts=8', 'rollout.group_size=2', 'log.report=false',
      'log.tensorboard=false', 'log.compile_cache=none', *assignments):
    config = overrides.override(config, assignment)
  return config


def on_one_device(tree):
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def memory(compiled):
  found = compiled.memory_analysis()
  return (found.argument_size_in_bytes, found.temp_size_in_bytes,
          found.output_size_in_bytes - found.alias_size_in_bytes)


def planned(program):
  return program.arguments, program.temporaries, program.outputs


class Recorder:
  """Notes what a run's compiled functions are called with, and what its sampler makes."""

  def __init__(self, monkeypatch):
    self.calls = collections.defaultdict(list)  # name -> (function, shapes of its arguments)
    self.programs, self.outputs = {}, collections.defaultdict(list)
    for name in ('make_train_step', 'make_log_prob_step'):
      monkeypatch.setattr(training_step, name, functools.partial(
          self._making, name, getattr(training_step, name)))
    run = sampler.Sampler._run

    def noting(owner, shapes, name, *args, **options):
      made = run(owner, shapes, name, *args, **options)
      kind = name if isinstance(name, str) else name[0]
      self.programs[kind] = owner._programs[name, shapes]
      parts = {'prefill': ('store', 'own', 'completions'), 'weights': ('weights',)}
      values = made if kind == 'prefill' else [made]
      for part, value in zip(parts.get(kind, ()), values):
        self.outputs[part].append(on_one_device(value))
      return made
    monkeypatch.setattr(sampler.Sampler, '_run', noting)

  def _making(self, name, make, *args, **options):
    function = make(*args, **options)

    def called(*arguments, frozen=None):
      given = arguments if frozen is None else (*arguments, frozen)
      self.calls[name].append((function, jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)))
      return function(*arguments) if frozen is None else function(*arguments, frozen=frozen)
    return called

  def compiled(self, name, index, mesh):
    function, arguments = self.calls[name][index]
    with sharding.use(mesh):
      return function.lower(*arguments).compile()


@pytest.mark.slow
def test_the_plan_holds_what_the_run_holds(tmp_path, monkeypatch):
  # A run's first packed batch may have fewer targets than the widest, which is planned.
  config = small_job('mesh=data=2,fsdp=2,tensor=2', 'data.packing=false',
                     'loss.kl_coefficient=0.1', 'training.mini_batches=2',
                     f'out_dir={tmp_path / "run"}')
  mesh = planner.planning_mesh(config.mesh)
  _, (warm_start, grpo) = planner.estimate(config, mesh)
  run = Recorder(monkeypatch)
  job.run(config)
  assert planned(warm_start.programs['update']) == memory(run.compiled('make_train_step', 0, mesh))
  assert planned(grpo.programs['update']) == memory(run.compiled('make_train_step', 1, mesh))
  for index, name in enumerate(('old log-probs', 'reference log-probs')):
    assert planned(grpo.programs[name]) == memory(
        run.compiled('make_log_prob_step', index, mesh)), name
  state = run.calls['make_train_step'][1][1][0]
  params = dry_run.bytes_per_device(state.params)
  assert grpo.resident['parameters'] == grpo.resident['reference'] == params
  batch = run.calls['make_train_step'][1][1][1]
  assert grpo.resident['optimizer state'] == dry_run.bytes_per_device(state) - params
  assert grpo.resident['one batch'] == dry_run.bytes_per_device(batch)


def test_the_plan_holds_what_a_rollout_holds(monkeypatch):
  rows = costs.Rows(prompts=4, prompt_tokens=16, group_size=2, completion_tokens=100)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  options = sampler.SamplingOptions(max_tokens=rows.completion_tokens, group_size=rows.group_size)
  plan = dry_run.rollout(SMALL, options, mesh, rows)
  run = Recorder(monkeypatch)
  params = jax.jit(functools.partial(transformer.init, SMALL), out_shardings=sharding.tree_sharding(
      mesh, hub.param_shapes(SMALL)))(jax.random.key(0))
  sample = sampler.make_sampler(SMALL, options, mesh=mesh)
  sample(params, types.Prompts(
      tokens=np.ones((4, 16), np.int32), lengths=np.full(4, 9, np.int32),
      ids=np.arange(4, dtype=np.int32), sample_ids=np.zeros((4, 2), np.int32)), jax.random.key(1))
  assert plan.windows == (64,) * 4 + (112,) * 3
  for part in ('store', 'own', 'weights', 'completions'):
    assert [getattr(plan, part)] == run.outputs[part]
  layers, batch, heads, width = SMALL.num_layers, 4 * 2 // 4, SMALL.num_kv_heads // 2, 112
  assert plan.own == layers * 2 * batch * heads * SMALL.head_dim * width * 4
  assert len(plan.windows) * plan.steps == sample.last_stats['steps']
  for name, program in plan.programs.items():
    assert planned(program) == memory(run.programs[name]), name
  assert set(plan.programs) == {'weights', 'prefill', 'chunk'}
  # Each half of a layer's heads and MLP makes a summand.
  assert plan.programs['chunk'].received['all-reduce'] > 0
  # A narrow window's caches are a copy beside the others; half the slots have copies of prompts.
  assert plan.copies == max(plan.own * 64 // width, plan.own // 2 + plan.store)

  # With half as many slots as completions, these are drawn in two rounds.
  halved = dry_run.rollout(SMALL, dataclasses.replace(options, slots=4), mesh, rows)
  assert halved.own * 2 == plan.own and halved.share == 0.5 and halved.store == plan.store
  assert halved.windows == plan.windows * 2


def test_bfloat16_counts_in_what_is_kept_and_not_in_what_is_compiled():
  rows = costs.Rows(prompts=8, prompt_tokens=16, group_size=2, completion_tokens=8)
  mesh = sharding.make_mesh('fsdp=8')
  half = presets.get('tiny', width=16, num_layers=2, mlp_width=32, dtype='bfloat16')
  options = sampler.SamplingOptions(max_tokens=8, group_size=2)
  wide, narrow = (dry_run.rollout(model, options, mesh, rows) for model in (
      dry_run.compiled_dtype(half, mesh), half))
  assert narrow.own * 2 == wide.own and narrow.store * 2 == wide.store
  assert narrow.programs['chunk'].temporaries == wide.programs['chunk'].temporaries


@pytest.fixture(scope='module')
def tiny_plan():
  return planner.plan(small_job('mesh=data=1,fsdp=4,tensor=2', 'warm_start.steps=0'))


@pytest.mark.slow
@pytest.mark.parametrize('line', [
    '"num_prompts": 8', 'model   tiny: 0.8 M parameters', 'fsdp=4, tensor=2, planned on 8 cpu',
    'lengths the longest of the data', 'stage grpo: 8 prompts x 2, up to 8 + ',
    'optimizer state', 'update: gradients', 'KV cache of prompts', 'KV cache of completions',
    'rollout: weights', 'peak, in ', 'prefill', 'decode', 'together', 'nothing was run',
    '40% of the data sheet of H100',
    'received per optimizer step, by collective', 'all-gather', 'fits into 92% of 80 GiB',
    'micro-batches of up to 8 prompts: training.micro_batches=1 (now 1)',
    'rollouts of up to 512, or more prompts x 2 (now 8)'])
def test_the_text_says(tiny_plan, line):
  assert line in tiny_plan


@pytest.mark.parametrize('assignments, message', [
    (('mesh=fsdp=3',), 'does not split over data x fsdp = 3 devices'),
    (('mesh=fsdp=four',), 'not axis=size'), (('mesh=model=8',), "unknown axis 'model'"),
    (('mesh=fsdp=0',), 'must be positive'), (('mesh=fsdp=2,tensor=4',), 'tensor=4 does not divide'),
    (('mesh=fsdp=-1,tensor=3',), 'there are 8 devices'),
    (('algo=grpoo',), 'did you mean'), (('loss.clip=1',), 'no such hyperparameter'),
    (('dataset=missing.jsonl',), 'missing.jsonl'), (('model=missing-model/',), 'missing-model'),
    (('data.max_prompt_tokens=2', 'data.overlong=error'), 'longer than data.max_prompt_tokens=2'),
    (('rollout.max_completion_tokens=2000',), 'do not fit into the 1024 positions'),
])
def test_what_cannot_run_is_not_planned(assignments, message):
  with pytest.raises(settings.UserError, match=message):
    planner.plan(small_job('warm_start.steps=0', *assignments))


def test_seconds_follow_from_the_tighter_of_computing_and_memory():
  rates = device_rates.Rates('test', flops=100.0, bytes=10.0, link=1.0, network=0.5)
  assert planner.Work('', flops=800.0, moved=10.0).seconds(rates, 4) == 2.0
  work = planner.Work('', flops=800.0, moved=30.0, received={'all-gather': 2.0, 'all-reduce': 3.0})
  assert work.seconds(rates, 4) == 13.0  # all of it from other nodes
  work = dataclasses.replace(work, near=5.0)
  assert work.seconds(rates, 4) == 8.0
  assert work.shared(2).seconds(rates, 4) == 4.0
