"""What an update recomputes when that is left to us: of the shapes, before anything is compiled."""

import dataclasses

import jax
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import overrides
from ptjax import remat
from ptjax import sharding
from ptjax import stages
from ptjax.models import hub
from ptjax.models import presets
from ptjax.plan import dry_batch
from ptjax.plan import dry_run

MODEL = presets.get('tiny', width=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=32)
MIB = 2**20


def planned(*assignments, algo='grpo'):
  """(plan, policies, rows) of a job on the arithmetic data."""
  config = settings.Config(algo=algo)
  for assignment in ('rollout.num_prompts=16', 'rollout.group_size=8', 'data.packing=false',
                     'rollout.max_completion_tokens=48', 'warm_start.steps=0', *assignments):
    config = overrides.override(config, assignment)
  plan, = stages.stage_plans(config)
  return plan, assembly.load_policies(config, [plan]), doors.load_rows(config)


def mesh_of(text='fsdp=1'):
  count = 2 if '2' in text else 1
  return sharding.make_mesh(text, jax.devices()[:count])


def chosen(memory, *assignments, mesh='fsdp=1', **more):
  plan, policies, rows = planned(*assignments, **more)
  door = doors.load_door(plan, policies['policy'], rows)
  found = remat.settled(plan, policies, door, mesh_of(mesh), memory=memory)
  return found.config.model_settings.remat


def test_what_is_kept_is_counted_by_hand():
  # Of each token and layer: 4 + 2 + 2 heads of 4, two of 32, and 16 three times over.
  assert remat.kept_bytes(MODEL, 100) == 4 * 100 * 3 * (8 * 4 + 2 * 32 + 3 * 16)
  assert remat.kept_bytes(MODEL, 100, tensor=2) == 4 * 100 * 3 * (4 * 4 + 32 + 3 * 16)


@pytest.mark.parametrize('held, memory, expected', [
    (0, 100 * MIB, 'dots'), (50 * MIB, 100 * MIB, 'full'), (0, 60 * MIB, 'full'),
    (10**15, None, 'dots')])
def test_dots_is_for_what_fits(held, memory, expected):
  tokens = 50 * MIB / remat.kept_bytes(MODEL, 1)  # of which the layers keep 50 MiB
  assert remat.choose(MODEL, tokens, held=held, memory=memory) == expected


def test_a_stage_takes_what_fits_and_asks_nobody_who_said_so():
  assert chosen(1.0) == 'dots' and chosen(0.1) == 'full'
  assert chosen(0.1, 'training.micro_batches=16') == 'dots'
  assert chosen(0.15) == 'full' and chosen(0.15, mesh='fsdp=2') == 'dots'
  for given in ('none', 'dots', 'full'):
    assert chosen(1e-3, f'model_settings.remat={given}') == given


def test_offline_stages_are_measured_by_their_widest_batch():
  for algo in ('sft', 'dft'):
    assert chosen(1.0, 'training.batch_size=8', algo=algo) == 'dots'
    assert chosen(0.05, 'training.batch_size=4096', algo=algo) == 'full'


def test_a_cpu_is_shared_by_its_virtual_devices():
  one, two = (remat.device_memory(mesh_of(text)) for text in ('fsdp=1', 'fsdp=2'))
  assert one == 2 * two > 2**28


@pytest.mark.slow
@pytest.mark.parametrize('assignments', [
    (), ('model_settings.dtype=bfloat16',), ('rollout.max_completion_tokens=8',)])
def test_the_estimate_is_near_what_the_compiler_says(assignments):
  plan, policies, rows = planned('rollout.num_prompts=64', *assignments)
  mesh = mesh_of()
  found = {}
  for kind in ('dots', 'full'):
    options = dataclasses.replace(plan.config.model_settings, remat=kind)
    one = dataclasses.replace(plan, config=dataclasses.replace(plan.config, model_settings=options))
    made, widest = dry_batch.make(one, policies, mesh, rows, here=False)  # in one part
    found[kind] = dry_run.update(made, widest.batch, mesh).temporaries
  tokens = widest.batch.prompt_tokens.size + widest.batch.tokens.size
  weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(
      hub.param_shapes(policies['policy'].config)))
  kept = remat.kept_bytes(policies['policy'].config, tokens)
  assert 0.8 < (found['dots'] - weights) / kept < 1.6
  assert found['full'] < 0.8 * found['dots']
