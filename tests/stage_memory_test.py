"""What a stage holds on its devices: no model twice."""

import jax
import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax.models import presets


def _begun(tmp_path, **changes):
  config = settings.Config(algo='ppo', model='tiny', out_dir=str(tmp_path), **changes)
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans)
  mesh = sharding.make_mesh('', jax.devices()[:1])
  data = doors.load_data(config, plans, policies['policy'])
  made = stage_run.StageRun(plans[0], policies, data, mesh, tmp_path)
  return made, made.begin(None)


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
  sizes = dict(width=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=32)
  get = presets.get
  monkeypatch.setattr(presets, 'get', lambda name, **changes: get(name, **{**changes, **sizes}))


@pytest.mark.parametrize('critic', ['head', 'model'])
def test_adapters_reference_and_policy_share_one_base(tmp_path, critic):
  made, state = _begun(tmp_path, lora=settings.LoraSettings(rank=2), critic=critic)
  reference = made._frozen_model('reference')
  assert reference is made.base and 'critic' not in made.base
  # The critic trains whole, beside the adapters.
  expected = {'kernel', 'bias'} if critic == 'head' else {'embed', 'layers', 'final_norm', 'score'}
  assert set(state.params) == {'layers', 'critic'} and set(state.params['critic']) == expected
  shapes = made.frozen_shapes()['base']
  assert jax.tree.structure(shapes) == jax.tree.structure(made.base)
  merged = made.whole(state.params)
  jax.tree.map(np.testing.assert_array_equal, merged, reference)  # fresh adapters change nothing


def test_a_critic_of_its_own_is_no_part_of_the_reference(tmp_path):
  made, state = _begun(tmp_path, critic='model')
  assert 'critic' in state.params and 'critic' not in made._frozen_model('reference')
  made.resume(0)
  reference = made._frozen_model('reference')
  jax.tree.map(np.testing.assert_array_equal, reference, made.whole(state.params))
