"""What a stage begins with: critics of zeros, adapters that change nothing, frozen trees."""

import pathlib
import sys

import jax
import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import overrides
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax import types

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

SIZES = dict(width=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=8, max_length=32)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return str(job_runs.export_model(tmp_path_factory.mktemp('stage') / 'model', **SIZES))


@pytest.fixture
def begin(model, tmp_path):
  """Begins the only stage of a run; returns (StageRun, state, the model's own parameters)."""
  def call(algo, *assignments):
    config = settings.Config(algo=algo, model=model, dataset='arithmetic:max_operand=9')
    for assignment in assignments:
      config = overrides.override(config, assignment)
    plan, = stages.stage_plans(config)
    policies = assembly.load_policies(config, [plan])
    mesh = sharding.make_mesh('fsdp=1', jax.devices()[:1])
    made = stage_run.StageRun(plan, policies, doors.Data({}, {}, None, None), mesh, tmp_path)
    own = policies['policy'].load(lambda shapes: sharding.tree_sharding(mesh, shapes))
    return made, made.begin(None), own
  return call


def assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_critic_is_a_head_of_zeros(begin):
  made, state, own = begin('ppo')
  critic = state.params['critic']
  assert {name: leaf.shape for name, leaf in critic.items()} == {'kernel': (8, 1), 'bias': (1,)}
  assert not any(np.any(leaf) for leaf in critic.values())
  assert_same(made.whole(state.params), own)  # which no sampler, evaluation or export sees


def test_a_critic_of_its_own_begins_with_the_policys_layers(begin):
  made, state, own = begin('ppo', 'critic=model')
  critic = dict(state.params['critic'])
  head = critic.pop('score')
  assert not np.any(head['kernel']) and not np.any(head['bias'])
  assert_same(critic, {name: tree for name, tree in own.items() if name != 'head'})
  assert_same(made.whole(state.params), own)
  moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
  assert moments.count((8, 1)) == 2  # the critic is the optimizer's, too


@pytest.mark.parametrize('variant', ['lora', 'dora'])
def test_adapters_begin_as_the_model(begin, variant):
  made, state, own = begin('grpo', 'lora.rank=2', f'lora.variant={variant}')
  assert set(state.params) == {'layers'}
  assert_same(made.base, own)
  # B is zero; a DoRA's magnitude is the norm of its column, up to rounding.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
               made.whole(state.params), own)


def test_adapters_and_a_critic_train_together(begin):
  made, state, own = begin('ppo', 'lora.rank=2')
  assert set(state.params) == {'layers', 'critic'}
  assert_same(made.whole(state.params), own)


def test_a_reference_is_kept_apart_from_what_trains(begin, tmp_path):
  made, state, own = begin('grpo', 'loss.kl_coefficient=0.1')
  assert made.keeps_start and (tmp_path / 'reference' / '0' / 'params').is_dir()
  addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)}
  kept = jax.tree.leaves(made._start)
  assert not addresses & {leaf.unsafe_buffer_pointer() for leaf in kept}  # the state is donated
  assert_same(made._start, own)
  free, _, _ = begin('grpo')
  assert not free.keeps_start and free._start is None


def test_shapes_are_those_of_what_begins(begin):
  for algo, assignments in (('ppo', ('critic=model',)), ('dpo', ('lora.rank=2',)), ('tr_dpo', ())):
    made, state, _ = begin(algo, *assignments)
    wanted = jax.tree.map(lambda s: (s.shape, s.dtype, s.sharding), made.targets())
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == wanted
    frozen = jax.tree.map(lambda s: (s.shape, s.dtype, s.sharding), made.frozen_shapes())
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), made._frozen) == frozen


def test_passes_over_whole_rollouts_do_not_shape_the_rows_of_updates(begin):
  lengths = np.random.default_rng(0).geometric(1 / 8, 64).clip(max=24)

  def batch_of(prompts):
    mask = np.arange(24) < lengths[:8 * prompts, None]
    return types.TokenBatch(
        prompt_tokens=np.ones((prompts, 4), np.int32), prompt_lengths=np.full(prompts, 4, np.int32),
        tokens=np.ones(mask.shape, np.int32), loss_mask=mask, on_policy=np.asarray(True), inputs={})

  rows = {}
  for passes in (0, 1):
    made, _, _ = begin('grpo', 'training.mini_batches=4')
    for _ in range(passes):
      assert made.lay_out(batch_of(8), 'pass').packed is not None
    rows[passes] = made.lay_out(batch_of(2)).packed.rows.prompt_tokens.shape
  assert rows[0] == rows[1]
