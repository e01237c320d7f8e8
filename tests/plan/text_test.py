"""A plan in words."""

import jax
import pytest

from ptjax import config as settings
from ptjax import sharding
from ptjax import stages
from ptjax.models import costs
from ptjax.plan import fit as plan_fit
from ptjax.plan import planner
from ptjax.plan import rates
from ptjax.plan import text as plan_text

RATES = rates.Rates('test', flops=1e12, bytes=1e9, link=1e9, network=1e8, memory=80)


def fit_text(resident, phases, **answer):
  stage = planner.StageEstimate(
      'grpo', costs.Rows(8, 16, 2, 8), {'parameters': resident * 2**30},
      {name: {'activations': size * 2**30} for name, size in phases.items()}, (), {})
  fit = plan_fit.Fit(limit=0.92 * 80 * 2**30, **answer)
  return stage, '\n'.join(plan_text._fit_lines(settings.Config(), stage, fit, RATES))


def test_a_stage_that_does_not_fit_says_what_to_change():
  stage, text = fit_text(60, {'update': 1, 'rollout': 19}, micro_batches=1, prompts=8, rollout=4)
  assert stage.fullest == 'rollout' and stage.peak == 79 * 2**30
  assert 'does not fit into 80 GiB' in text and 'lower rollout.num_prompts' in text
  assert 'rollouts of up to 4 prompts x 8 (now 8)' in text


def test_an_update_that_fits_in_no_micro_batch_says_so():
  _, text = fit_text(79, {'update': 9}, micro_batches=None, prompts=None, rollout=0)
  assert 'no micro-batch, not even one with a prompt per device' in text
  assert 'rollouts of up to 0 prompts' in text


def test_a_stage_that_fits_is_not_told_otherwise():
  _, text = fit_text(7, {'update': 9}, micro_batches=1, prompts=8, rollout=None)
  assert 'does not fit' not in text and 'rollouts' not in text


@pytest.mark.parametrize('algo, packing, said', [
    ('sft', True, '6 examples'), ('dpo', True, '6 examples'), ('dpo', False, '6 prompts')])
def test_a_micro_batch_of_packed_rows_is_counted_in_what_batch_size_counts(algo, packing, said):
  config = settings.Config(
      algo=algo, training=settings.TrainingSettings(batch_size=12, micro_batches=2),
      data=settings.DataSettings(packing=packing))
  plan, = stages.stage_plans(config)

  def measure(plan, parts):
    held = {'update': {'activations': 60 * 2**30 * (2 / plan.config.training.micro_batches)}}
    rows = costs.Rows(4, 64, 1, 32, packed=True) if packing else costs.Rows(12, 8, 2, 8)
    return planner.StageEstimate(algo, rows, {'parameters': 2**30}, held, (), {})
  stage = measure(plan, ('update',))
  fit = plan_fit.fit(plan, stage, measure, 1, 80)
  text = '\n'.join(plan_text._fit_lines(plan.config, stage, fit, RATES))
  assert f'micro-batches of up to {said}: training.micro_batches=2 (now 2)' in text


@pytest.mark.parametrize('may_pack', [True, False])
def test_a_stage_that_may_pack_its_completions_says_so(may_pack):
  stage = planner.StageEstimate('grpo', costs.Rows(8, 16, 2, 8), {'parameters': 2**30},
                                {'update': {'activations': 2**30}}, (), {},
                                remat='dots (auto)', may_pack=may_pack)
  mesh = sharding.make_mesh('fsdp=1', jax.devices()[:1])
  text = '\n'.join(plan_text._stage_lines(stage, mesh, RATES))
  assert ('shorter ones share rows' in text) == may_pack
  assert '  remat: dots (auto)\n' in text


def test_nothing_is_said_of_an_unknown_memory():
  assert list(plan_text._fit_lines(settings.Config(), None, None, RATES)) == []


@pytest.mark.parametrize('size, text', [
    (0, '-'), (3 * 2**20, '3.0 MiB'), (999 * 2**20, '999.0 MiB'), (1022 * 2**30, '1.00 TiB'),
    (5000 * 2**50, '5,000.00 PiB')])
def test_sizes_are_short(size, text):
  assert plan_text._bytes(size) == text
