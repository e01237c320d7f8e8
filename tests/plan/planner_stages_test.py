"""Every kind of stage planned: by its own files, by filler, and against what its run holds."""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import keys
from ptjax import overrides
from ptjax import process
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax.models import costs
from ptjax.models import hub
from ptjax.plan import dry_batch
from ptjax.plan import dry_run
from ptjax.plan import planner
from ptjax.plan import rates as device_rates
from ptjax.plan import text as plan_text

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import job_runs

SIZES = dict(width=16, num_layers=2, num_heads=8, num_kv_heads=2, mlp_width=16, max_length=64)
SETTINGS = {
    'warm_start.steps': 0, 'training.steps': 1, 'training.batch_size': 8,
    'rollout.num_prompts': 8, 'rollout.group_size': 2, 'rollout.max_completion_tokens': 8,
    'data.max_prompt_tokens': 16, 'data.reference_cache': 'none', 'warm_start.batch_size': 8}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model, a teacher of another width, and a file of rows for each door."""
  root = tmp_path_factory.mktemp('plans')
  job_runs.export_model(root / 'model', **SIZES)
  job_runs.export_model(root / 'teacher', **{**SIZES, 'width': 32})
  rows = {'rows': [], 'pairs': [], 'steps': [], 'ranked': []}
  for i in range(16):
    prompt, good, bad = f'{i}+{i}=', str(2 * i), '12' * (i % 4) + '+'
    rows['rows'].append({'prompt': prompt, 'completion': good, 'label': i % 2 == 0})
    rows['pairs'].append({'prompt': prompt, 'chosen': good, 'rejected': bad, 'margin': 1.0,
                          'chosen_score': 1.0, 'rejected_score': 0.0})
    rows['steps'].append({'prompt': prompt, 'completions': [good, bad], 'labels': [True, False]})
    rows['ranked'].append({'prompt': prompt, 'completions': [good, bad, '='],
                           'scores': [2.0, 1.0, 0.0]})
  for name, values in rows.items():
    (root / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, values)))
  return root


def config_of(root, algo, dataset, *assignments):
  path = root / f'{dataset}.jsonl'
  config = settings.Config(
      algo=algo, model=str(root / 'model'), dataset=str(path) if path.exists() else dataset,
      reward=('length(target=4)',), teacher=str(root / 'teacher'))
  for assignment in (*(f'{name}={value}' for name, value in SETTINGS.items()), *assignments):
    config = overrides.override(config, assignment)
  return config


@pytest.fixture(scope='module')
def mesh(compile_cache):
  """Two devices; what both a plan and its run compile is compiled once."""
  before = jax.config.jax_compilation_cache_dir
  process.use_compile_cache(str(compile_cache))
  yield sharding.make_mesh('fsdp=2', jax.devices()[:2])
  jax.config.update('jax_compilation_cache_dir', before)


def begun(config, mesh, folder):
  """What the first update of a run is called with, and the StageRun that calls it."""
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans)
  data = doors.load_data(config, plans, policies['policy'], parts=sharding.batch_size(mesh))
  made = stage_run.StageRun(plans[0], policies, data, mesh, folder)
  state = made.begin(None)
  batch, _, _ = made.source().batch(state.params, 0)
  return made, (state, batch, made._frozen)


# Algorithm, rows, settings; what is there beside what trains, optimizer state and the batch.
CASES = [
    # One batch per epoch: of several packed ones the first may not be the widest.
    ('sft', 'rows', ('training.batch_size=16',), ()),
    ('dpo', 'pairs', ('training.micro_batches=2',), ()),
    ('reward_bt', 'pairs', (), ()), ('prm', 'steps', (), ()),
    ('kd', 'rows', ('training.batch_size=16',), ('teacher',)),
    ('dpo', 'pairs', ('lora.rank=2',), ('base',)), ('hpt', 'rows', (), ()),
    ('ppo', 'rows', ('training.mini_batches=2',), ('critic', 'reference')),
    ('ppo', 'rows', ('critic=model', 'loss.reward_kl_coefficient=0'), ('critic',)),
    ('nash_md', 'rows', (), ('reference',)), ('tr_dpo', 'pairs', (), ('reference',)),
    ('gkd', 'rows', (), ('teacher',))]


@pytest.mark.slow
@pytest.mark.parametrize(
    'algo, rows, assignments, beside', CASES, ids=[' '.join((a, *more)) for a, _, more, _ in CASES])
def test_the_plan_holds_what_the_run_holds(root, mesh, tmp_path, algo, rows, assignments, beside):
  config = config_of(root, algo, rows, *assignments)
  _, (stage,) = planner.estimate(config, mesh)
  made, arguments = begun(config, mesh, tmp_path)
  state, batch, frozen = arguments
  held, count = stage.resident, dry_run.bytes_per_device
  trained = 'adapters' if 'base' in beside else 'parameters'
  assert set(held) == {trained, 'optimizer state', 'one batch', *beside}
  assert held[trained] + held.get('critic', 0) == count(state.params)
  assert held['optimizer state'] == count(state) - count(state.params) - count(state.reference)
  assert held['one batch'] == count(batch)
  assert held.get('base', 0) + held.get('teacher', 0) == count(frozen)
  if 'reference' in beside:
    assert held['reference'] == count(state.reference or made._start)
  update = dry_run.compile_program(lambda: made.update().lower(*arguments), mesh)
  planned = stage.programs['update']
  for name in ('arguments', 'outputs', 'temporaries', 'received'):
    assert getattr(planned, name) == getattr(update, name), name


# Rows of the table, by what their batches hold; those of filler are as wide as the limits.
BATCHES = [
    ('cpt', 'rows', (24, 8), {}), ('tpo', 'pairs', (16, 24), {}),
    ('kto', 'rows', (16, 16), {'labels': (8,), 'reference_log_probs': (16, 8)}),
    ('orm', 'rows', (16, 8), {'labels': (8,)}),
    ('odpo', 'pairs', (16, 16), {'chosen_scores': (8,), 'rejected_scores': (8,),
                                 'reference_log_probs': (16, 8)}),
    ('reward_margin', 'pairs', (16, 16), {'margins': (8,)}),
    ('preference_model', 'pairs', (16, 16), {'labels': (16,)}),
    ('prm', 'steps', (16, 8), {'step_labels': (8, 8), 'step_mask': (8, 8)}),
    ('grpo', 'rows', (16, 16), {'advantages': (16,), 'rollout_log_probs': (16, 8)}),
    ('remax', 'rows', (16, 16), {'advantages': (16, 8), 'rollout_log_probs': (16, 8)}),
    ('opd', 'rows', (16, 16), {'rollout_log_probs': (16, 8), 'teacher_log_probs': (16, 8)})]


@pytest.mark.parametrize('local', [True, False], ids=['its own rows', 'filler'])
@pytest.mark.parametrize('algo, rows, widths, inputs', BATCHES, ids=[case[0] for case in BATCHES])
def test_the_widest_batch(root, mesh, algo, rows, widths, inputs, local):
  # Pairs as they are; text comes packed all the same.
  config = config_of(root, algo, rows, 'data.packing=false')
  plan, = stages.stage_plans(config)
  policies = assembly.load_policies(config, [plan], load=planner.load_policy)
  rows = planner.training_rows(plan, config) if local else None
  _, widest = dry_batch.make(plan, policies, mesh, rows)
  found = {name: leaf.shape for name, leaf in widest.batch.inputs.items()}
  assert found == inputs
  if local:  # prompts of 4 to 7 tokens, texts of up to 16
    assert widest.batch.prompt_tokens.shape[1] == (8 if algo != 'cpt' else 32)
  else:
    assert (widest.batch.prompt_tokens.shape[1], widest.batch.tokens.shape[0]) == widths


def test_rows_are_left_out_where_the_run_leaves_them_out(root, tmp_path):
  long = json.dumps({'prompt': '1+2+3+4+5+6+7=', 'completion': '28'})
  (tmp_path / 'rows.jsonl').write_text(f'{(root / "rows.jsonl").read_text()}\n{long}')
  (tmp_path / 'held.jsonl').write_text(long)

  def rows(*more):
    config = config_of(root, 'orm', str(tmp_path / 'rows.jsonl'),
                       f'eval.dataset={tmp_path}/held.jsonl', *more)
    plan, = stages.stage_plans(config)
    return planner.training_rows(plan, config)
  assert len(rows()) == 17
  assert list(rows('data.decontaminate=drop')) == list(rows())[:-1]
  # Which rows those are, nobody knows who cannot read what is evaluated on.
  hub_name = 'eval.dataset=openai/gsm8k@test'
  assert len(rows(hub_name)) == 17 and rows('data.decontaminate=drop', hub_name) is None


@pytest.mark.slow
def test_completions_that_share_rows_hold_less_than_planned(root, mesh):
  config = config_of(root, 'grpo', 'rows', 'rollout.max_completion_tokens=48')
  plan, = stages.stage_plans(config)
  policies = assembly.load_policies(config, [plan], load=planner.load_policy)
  made, widest = dry_batch.make(plan, policies, mesh, planner.training_rows(plan, config))
  empty = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), widest.batch)

  def laid_out(lengths):
    batch = empty.replace(loss_mask=np.arange(48) < np.reshape(lengths, (-1, 1)),
                          prompt_lengths=np.full_like(empty.prompt_lengths, 7))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.lay_out(batch))
  assert laid_out([48] * 16) == widest.batch
  packed = [laid_out([48, *[length] * 15]) for length in range(47, 0, -1)]
  dearest = next(batch for batch in packed if batch.packed is not None)
  held = [update.temporaries + update.outputs for update in (
      dry_run.update(made, batch, mesh) for batch in (widest.batch, dearest))]
  assert held[1] < held[0]


@pytest.mark.slow
def test_models_that_score_are_held_and_counted(root, mesh):
  job_runs.export_model(root / 'scorer', **SIZES, num_labels=1)
  config = config_of(root, 'grpo', 'rows')
  _, (without,) = planner.estimate(config, mesh)
  spec = f'model:{root / "scorer"}*0.5'
  _, (stage,) = planner.estimate(dataclasses.replace(config, reward=(spec,)), mesh)
  name = f'--reward={spec}'
  scorer = hub.load_config(root / 'scorer')
  assert stage.resident == {
      **without.resident, name: dry_run.bytes_per_device(dry_run.placed_params(scorer, mesh))}
  reward, = [work for work in stage.work if work.name == name]
  assert reward.flops == costs.log_prob_flops(scorer, stage.rows)


def test_who_draws_is_who_the_method_asks(root, mesh):
  def draws(algo):
    config = config_of(root, algo, 'rows')
    plan, = stages.stage_plans(config)
    policies = assembly.load_policies(config, [plan], load=planner.load_policy)
    return dry_batch.make(plan, policies, mesh, planner.training_rows(plan, config))[1].draws
  assert draws('grpo') == [('policy', costs.Rows(8, 8, 2, 8))]
  assert draws('remax') == [
      ('policy', costs.Rows(8, 8, 2, 8)), ('greedy', costs.Rows(8, 8, 1, 8))]
  assert [name for name, _ in draws('seqkd')] == ['teacher']
  assert [name for name, _ in draws('a_star_po')] == ['policy', 'reference']


@pytest.mark.slow
def test_a_chain_is_planned_stage_by_stage(root, mesh):
  config = config_of(root, 'sft,dpo', 'rows', f'stages.dpo.dataset={root}/pairs.jsonl')
  model, (sft, dpo) = planner.estimate(config, mesh)
  assert sft.rows.packed and dpo.rows.packed
  assert set(sft.programs) == {'update'}
  assert set(dpo.programs) == {'reference log-probs', 'update'}
  rates = device_rates.assumed(config.plan, model, mesh)
  text = '\n'.join(line for stage in (sft, dpo)
                   for line in plan_text._stage_lines(stage, mesh, rates))
  assert re.search(r'stage sft: \d+ packed rows? of \d+ tokens, up to \d+ of them targets', text)
  assert re.search(r'stage dpo: \d+ packed rows? of \d+ tokens', text)
  assert 'work once, before the first step' in text.partition('stage dpo')[2]


@pytest.mark.slow
def test_the_reference_of_an_offline_stage_passes_every_row_once(root, mesh):
  config = config_of(root, 'dpo', 'pairs', 'training.micro_batches=2')
  _, (stage,) = planner.estimate(config, mesh)
  once, = [work for work in stage.work if work.once]
  model = hub.load_config(root / 'model')
  # 16 rows are two batches of 8 pairs.
  assert once.flops == 2 * costs.log_prob_flops(model, stage.rows)
  made, arguments = begun(config, mesh, root / 'scored')
  state, batch, frozen = arguments
  run = dry_run.compile_program(
      lambda: made.pass_step('reference', 'log_probs').lower(state.params, batch, frozen), mesh)
  planned = stage.programs['reference log-probs']
  assert planned.temporaries == run.temporaries and planned.outputs == run.outputs
  # Forward only, in the update's parts: it never holds more than the update.
  assert planned.temporaries < stage.programs['update'].temporaries


@pytest.mark.slow
def test_a_draw_of_some_steps_counts_in_some(root, mesh):
  def decode_of(fraction, *more):
    config = config_of(root, 'gkd', 'rows', f'loss.student_fraction={fraction}', *more)
    _, (stage,) = planner.estimate(config, mesh)
    return sum(work.flops for work in stage.work if work.name == 'decode')
  always = decode_of(1.0)
  assert always > 0 and decode_of(0.0) == 0
  config = config_of(root, 'gkd', 'rows', 'training.steps=64', 'loss.student_fraction=0.25')
  plan, = stages.stage_plans(config)
  own = [bool(plan.bind().own_turn(keys.stream(0, 'own_turn', step))) for step in range(64)]
  assert decode_of(0.25, 'training.steps=64') == always * sum(own) / 64


@pytest.mark.slow
def test_critic_reference_and_reward_model_together(root, mesh, tmp_path):
  job_runs.export_model(root / 'rewarder', **SIZES, num_labels=1)
  spec = f'model:{root / "rewarder"}'
  config = dataclasses.replace(
      config_of(root, 'ppo', 'rows', 'critic=model', 'training.mini_batches=2'), reward=(spec,))
  _, (stage,) = planner.estimate(config, mesh)
  assert set(stage.resident) == {
      'parameters', 'critic', 'reference', f'--reward={spec}', 'optimizer state', 'one batch'}
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans)
  data = doors.load_data(config, plans, policies['policy'], parts=sharding.batch_size(mesh),
                         mesh=mesh)
  made = stage_run.StageRun(plans[0], policies, data, mesh, tmp_path)
  state = made.begin(None)
  count, held = dry_run.bytes_per_device, stage.resident
  assert held['parameters'] + held['critic'] == count(state.params)
  assert held['critic'] == count(state.params['critic']) > 0
  assert held['reference'] == count(made._start)
  assert held['optimizer state'] == count(state.opt_state) + count(
      (state.step, state.bad_steps, state.loss_state))
  names = {work.name for work in stage.work}
  assert {f'--reward={spec}', 'prefill', 'decode', 'old log-probs', 'old values',
          'reference log-probs', 'update'} <= names
  # Two models train, and forward and backward of one are more than three forward passes.
  model, update = hub.load_config(root / 'model'), stage.work[-1]
  rows = costs.Rows(4, *stage.rows[1:])
  assert update.flops > 2 * costs.update_flops(
      dataclasses.replace(model, num_labels=1), rows, remat='dots')
