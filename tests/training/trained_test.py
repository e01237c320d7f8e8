"""What trains of a model, and the model again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import config as settings
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.training import trained

MODEL = presets.get('tiny', width=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=8,
                    vocab_size=11, max_length=16)
LORA = settings.LoraSettings(rank=2, alpha=6.0, targets=('query', 'down'))


@pytest.fixture(scope='module')
def params():
  return transformer.init(MODEL, jax.random.key(0))


def test_without_adapters_the_model_trains(params):
  own, frozen = trained.start(settings.LoraSettings(), params, jax.random.key(1))
  assert own is params and frozen == {}
  assert trained.whole(settings.LoraSettings(), own, frozen) is params
  assert trained.shapes(settings.LoraSettings(), params) is params


def test_adapters_are_added_to_their_kernels_alone(params):
  own, frozen = trained.start(LORA, params, jax.random.key(1))
  assert frozen == {'base': params}
  assert jax.tree.map(lambda s: (s.shape, s.dtype), trained.shapes(LORA, params)) == (
      jax.tree.map(lambda x: (x.shape, x.dtype), own))
  moved = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) / x.size, own)
  merged = trained.whole(LORA, moved, frozen)
  changed = []
  for (path, before), after in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(merged)):
    names = [key.key for key in path]
    adapter = moved
    for name in names[:-1]:
      adapter = adapter.get(name, {})
    if 'lora_a' not in adapter or names[-1] != 'kernel':
      np.testing.assert_array_equal(after, before, err_msg=str(names))
      continue
    a, b = (np.asarray(adapter[name], np.float64) for name in ('lora_a', 'lora_b'))
    expected = np.asarray(before, np.float64) + 6.0 / 2 * (a @ b)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
    changed.append(names[-2])
  assert sorted(changed) == ['down', 'query']
