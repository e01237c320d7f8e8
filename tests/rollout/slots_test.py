"""Completions that take turns in slots are those that are decoded all at once."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from ptjax import keys
from ptjax import sharding
from ptjax.plan import collectives
from ptjax.rollout import sampler
from ptjax.rollout import schedule

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import sampler_test as plain


@pytest.fixture(scope='module')
def rollouts():
  """What every schedule must reproduce."""
  return draw(plain.sampler_for())


def draw(sample, *limits, params=None):
  params = plain.params_of(plain.CONFIG) if params is None else params
  return plain.fetch(sample(params, plain.make_prompts(), plain.KEY, *limits))


def shapes_of_chunks(sample):
  """(slots, window) of every program decoded with."""
  return {name[1:] for name, _ in sample._programs if name[0] == 'chunk'}


# (slots, chunk, first window) -> programs it must have come to, or the test would show nothing.
SCHEDULES = {
    (0, 3, 4): {(6, 4), (6, 8), (6, 16), (3, 16), (3, 24), (1, 24)},
    (0, 2, 64): {(6, 24), (3, 24), (1, 24)}, (1, 16, 64): {(1, 24)},
    (1, 5, 8): {(1, 8), (1, 16), (1, 24)}, (2, 4, 8): {(2, 8), (2, 16), (2, 24), (1, 8)},
    (3, 1, 64): {(3, 24), (2, 24), (1, 24)}, (4, 7, 4): {(4, 8), (4, 16), (4, 24), (1, 24)},
    (5, 3, 8): {(5, 8), (5, 16), (3, 16), (3, 24), (1, 24)}}


@pytest.mark.slow
@pytest.mark.parametrize('slots, chunk, first_window', SCHEDULES)
def test_same_tokens_in_any_schedule(rollouts, monkeypatch, slots, chunk, first_window):
  monkeypatch.setattr(schedule, '_FIRST_WINDOW', first_window)
  sample = sampler.make_sampler(
      plain.CONFIG, dataclasses.replace(plain.sampler_for().options, slots=slots, chunk=chunk))
  result = draw(sample)
  plain.assert_same(result, rollouts)
  np.testing.assert_allclose(result.log_probs, rollouts.log_probs, atol=2e-6)
  assert shapes_of_chunks(sample) == SCHEDULES[slots, chunk, first_window]


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    {'temperature': 1.3, 'top_k': 20, 'top_p': 0.8, 'min_p': 0.02}, {'stop_strings': ('a', 'kb')},
    {'mixture': (0.3, 0.7)}], ids=str)
def test_same_tokens_by_slots_under_every_option(options):
  params = plain.params_of(plain.CONFIG)
  if 'mixture' in options:
    params = [params, jax.tree.map(lambda x: -0.7 * x, params)]
  whole, slots = (draw(plain.sampler_for(**options, **others), params=params)
                  for others in ({}, {'slots': 2, 'chunk': 7}))
  plain.assert_same(slots, whole)


def test_limits_cut_and_nothing_else(rollouts):
  limits = np.array([20, 1, 7, 3, 12, 5])
  sample = plain.sampler_for(slots=3, chunk=4)
  result = draw(sample, limits)
  lengths = rollouts.loss_mask.sum(1)
  kept = np.arange(plain.T)[None] < np.minimum(lengths, limits)[:, None]
  np.testing.assert_array_equal(result.loss_mask, kept)
  np.testing.assert_array_equal(result.tokens, np.where(kept, rollouts.tokens, 0))
  np.testing.assert_array_equal(result.truncated, rollouts.truncated | (limits < lengths))
  for bad in (limits[:3], limits * 0, limits + plain.T):
    with pytest.raises(ValueError, match='limits'):
      draw(sample, bad)


def test_half_the_slots_once_lengths_are_uneven():
  limits = np.array([20, 1, 7, 3, 12, 5])  # on average 8
  sample = sampler.make_sampler(plain.CONFIG, plain.sampler_for().options)
  first = draw(sample, limits)
  assert (6, 24) in shapes_of_chunks(sample)
  before = sample.last_stats['steps']
  plain.assert_same(draw(sample, limits), first)
  assert sample.last_stats['steps'] > before  # in turns
  assert sample.compilations <= 3 + len(schedule.slot_counts(6))  # with one window
  plain.assert_same(draw(sample, np.full(6, 7)), draw(plain.sampler_for(), np.full(6, 7)))
  before = sample.last_stats['steps']
  draw(sample, np.full(6, 7))  # all alike, hence together again
  assert sample.last_stats['steps'] < before


@pytest.mark.slow
def test_same_tokens_by_slots_on_a_mesh(rollouts):
  """Each of four shards decodes its own two completions, one after the other."""
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  params = plain.params_of(plain.CONFIG)
  params = sharding.put(params, sharding.tree_sharding(mesh, params))
  sample = sampler.make_sampler(plain.CONFIG, dataclasses.replace(
      plain.sampler_for().options, slots=4, chunk=5), mesh=mesh)
  plain.assert_same(draw(sample, params=params), rollouts)
  # No keys or values cross: what is gathered is less than one slot's, and those are in float32.
  program = next(p for (name, _), p in sample._programs.items() if name[0] == 'chunk')
  config = plain.CONFIG
  slot = config.num_layers * 2 * (plain.S + 24) * config.num_kv_heads * config.head_dim * 4
  assert collectives.bytes_received(program.as_text()).get('all-gather', 0) < slot


@pytest.mark.slow
def test_few_programs_for_all_lengths(monkeypatch):
  monkeypatch.setattr(schedule, '_FIRST_WINDOW', 8)
  prompts = plain.make_prompts(num=8, group=2)
  sample = sampler.make_sampler(plain.CONFIG, sampler.SamplingOptions(
      max_tokens=40, group_size=2, slots=4, chunk=4))
  rng = np.random.default_rng(0)
  programs = []
  for step in range(50):
    limits = np.minimum(rng.geometric(0.1, 16), 40)
    result = sample(plain.params_of(plain.CONFIG), prompts, keys.stream(0, 'rollout', step), limits)
    np.testing.assert_array_equal(plain.fetch(result).loss_mask.sum(1), limits)
    programs.append(sample.compilations)
  shapes = len(schedule.window_sizes(40)) * len(schedule.slot_counts(4))
  assert shapes == 9 and 6 < programs[-1] <= shapes + 3
  assert programs[9] == programs[-1]


@pytest.mark.slow
def test_a_sampler_that_remembers_goes_on_bit_for_bit(monkeypatch):
  monkeypatch.setattr(schedule, '_FIRST_WINDOW', 8)
  prompts = plain.make_prompts(num=8, group=2)
  options = sampler.SamplingOptions(max_tokens=40, group_size=2, chunk=4)
  rng = np.random.default_rng(0)
  limits = np.minimum(rng.geometric(0.1, (12, 16)), 40)

  def call(sample, step):
    found = sample(plain.params_of(plain.CONFIG), prompts, keys.stream(0, 'rollout', step),
                   limits[step])
    return plain.fetch(found), sample.last_stats

  straight, resumed, forgetful = (sampler.make_sampler(plain.CONFIG, options) for _ in range(3))
  for step in range(9):
    call(straight, step)
  resumed.memory = json.loads(json.dumps(straight.memory))
  for step in range(9, 12):
    (expected, stats), (found, its_stats) = call(straight, step), call(resumed, step)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert its_stats == stats
  assert call(forgetful, 11)[1] != stats  # what was remembered did matter
