"""A reference that follows the policy, against TRL's and against arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import following


def trees():
  rng = np.random.default_rng(0)
  make = lambda: {'kernel': rng.normal(size=(3, 2)).astype(np.float32),
                  'deep': {'bias': rng.normal(size=2).astype(np.float32)}}
  return make(), make()


def test_moves_every_few_steps_and_stands_still_between():
  reference, params = trees()
  follow = jax.jit(lambda step: following.synchronised(
      reference, params, step, reference_mixup=0.25, reference_sync_steps=3))
  for step in (1, 2, 4, 5):
    jax.tree.map(np.testing.assert_array_equal, follow(step), reference)
  for step in (3, 6):
    jax.tree.map(lambda found, old, new: np.testing.assert_allclose(
        found, 0.25 * new.astype(float) + 0.75 * old, rtol=1e-6), follow(step), reference, params)


def test_the_hard_update_is_a_copy():
  reference, params = trees()
  found = following.synchronised(reference, params, 1, reference_mixup=1.0, reference_sync_steps=1)
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_agrees_with_trl():
  torch = pytest.importorskip('torch')
  callbacks = pytest.importorskip('trl.trainer.callbacks')
  reference, params = trees()
  model, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
  for module, tree in ((model, params), (target, reference)):
    module.weight.data = torch.tensor(tree['kernel'].T.copy())
    module.bias.data = torch.tensor(tree['deep']['bias'])
  callbacks.SyncRefModelCallback._sync_target_model(model, target, 0.6)
  found = following.synchronised(reference, params, 512)  # TRL's defaults
  np.testing.assert_allclose(found['kernel'], target.weight.detach().numpy().T, rtol=1e-6)
  np.testing.assert_allclose(found['deep']['bias'], target.bias.detach().numpy(), rtol=1e-6)


def test_keeps_the_kind_of_the_weights():
  ones, zeros = {'w': jnp.ones(2, jnp.bfloat16)}, {'w': jnp.zeros(2, jnp.bfloat16)}
  found = following.synchronised(ones, zeros, 512)
  assert found['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize('settings', [
    {'reference_mixup': 0.0}, {'reference_mixup': 1.5}, {'reference_sync_steps': 0}])
def test_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match=next(iter(settings))):
    following.synchronised({}, {}, 1, **settings)
