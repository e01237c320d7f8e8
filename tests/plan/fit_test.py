"""The largest sizes that fit, searched over sizes whose memory is known here."""

import dataclasses

import pytest

from ptjax import config as settings
from ptjax import stages
from ptjax.models import costs
from ptjax.plan import fit as plan_fit
from ptjax.plan import planner

GIB = 2**30
DEVICES = 2


def stage_plan(algo='grpo', **training):
  config = dataclasses.replace(
      settings.Config(algo=algo), training=settings.TrainingSettings(**training),
      rollout=settings.RolloutSettings(num_prompts=16))
  plan, = stages.stage_plans(config)
  return plan


def memory_of(tried):
  """A stage of 10 GiB; a prompt's caches take a tenth, its activations 1 GiB on each device."""
  def measure(plan, parts):
    config = plan.config
    online = config.rollout.num_prompts / DEVICES
    rows = online / config.training.mini_batches if plan.online else (
        config.training.batch_size / DEVICES)
    every = {'rollout': {'KV cache': 0.1 * online * GIB},
             'old log-probs': {'activations': 0.05 * online * GIB},
             'update': {'activations': rows / config.training.micro_batches * GIB}}
    wanted = {'rollout': 'rollout', 'old log-probs': 'passes', 'update': 'update'}
    tried.append((config.rollout.num_prompts, config.training.micro_batches, parts))
    return planner.StageEstimate(
        plan.stage.name, costs.Rows(1, 1, 1, 1), {'parameters': 10 * GIB},
        {name: held for name, held in every.items() if wanted[name] in parts}, (), {})
  return measure


def fit(plan, memory):
  tried = []
  measure = memory_of(tried)
  estimate = measure(plan, planner.PARTS)
  tried.clear()
  return plan_fit.fit(plan, estimate, measure, DEVICES, memory / plan_fit.ROOM), tried


@pytest.mark.parametrize('memory, parts', [(18.5, 1), (17, 2), (12, 4), (11, 8), (10.5, None)])
@pytest.mark.parametrize('now', [1, 2, 8])
def test_the_fewest_micro_batches_that_fit(memory, parts, now):
  found, tried = fit(stage_plan(micro_batches=now), memory)
  assert found.micro_batches == parts
  assert found.prompts == (None if parts is None else 16 // parts)
  assert len([1 for *_, asked in tried if asked == ('update',)]) <= 2


@pytest.mark.parametrize('memory, prompts', [(12.05, 40), (10.85, 16), (10.31, 6), (10.05, 0)])
def test_the_largest_rollout_that_fits(memory, prompts):
  found, tried = fit(stage_plan(micro_batches=4), memory)
  assert found.rollout == prompts
  # No part of a larger rollout is larger than the run's own: 16 prompts in 4 parts.
  assert all(size / count <= 4 for size, count, asked in tried if asked != ('update',))
  assert len(tried) <= 7


def test_on_a_cpu_rollout_and_update_lie_side_by_side():
  plan, tried = stage_plan(micro_batches=4), []
  measure = memory_of(tried)
  estimate = measure(plan, planner.PARTS)
  estimate.phases['update'][plan_fit.KEPT] = 0.8 * GIB  # the rollout's, of 16 prompts
  limits = {2: 14.85, 4: 12.85}  # 10 of the stage, 0.8, and 4 or 2 of activations
  for parts, limit in limits.items():
    found = plan_fit.fit(plan, estimate, measure, DEVICES, limit / plan_fit.ROOM)
    assert found.micro_batches == parts
    assert found.rollout == (16 if parts == 4 else 56)


@pytest.mark.parametrize('bend, sizes', [(0.0, 2), (0.01, 2), (-0.05, 3)])
def test_a_rollout_that_all_but_fills_the_memory_is_large_enough(bend, sizes):
  """Memory that bends with size: no line predicts it, and yet few sizes are compiled."""
  plan, tried = stage_plan(micro_batches=4), []
  straight = memory_of(tried)

  def measure(plan, parts):
    estimate = straight(plan, parts)
    if 'rollout' in parts:
      times = plan.config.rollout.num_prompts / 16
      estimate.phases['rollout']['KV cache'] *= times**-bend
    return estimate
  estimate = measure(plan, planner.PARTS)
  tried.clear()
  limit = 30 * GIB
  found = plan_fit.fit(plan, estimate, measure, DEVICES, limit / plan_fit.ROOM / GIB)
  held = measure(plan_fit.changed(plan, micro_batches=1, num_prompts=found.rollout),
                 ('rollout',)).peak
  assert 0.97 * limit <= held <= limit
  assert len([1 for *_, parts in tried[:-1] if 'rollout' in parts]) == sizes


def test_a_rollout_past_all_wishes_is_not_sought():
  found, _ = fit(stage_plan(), 10_000)
  assert found.rollout == plan_fit.MOST * 16


def test_mini_batches_divide_what_an_update_takes():
  found, _ = fit(stage_plan(mini_batches=4), 12)
  assert (found.micro_batches, found.prompts) == (1, 4)


def test_an_offline_stage_has_no_rollout():
  plan = stage_plan('sft', batch_size=8)
  found, _ = fit(plan, 12)
  assert (found.micro_batches, found.prompts, found.rollout) == (2, 4, None)


def test_unknown_memory_gives_no_answer():
  assert plan_fit.fit(stage_plan(), None, None, 1, None) is None
