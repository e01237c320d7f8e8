"""Tests of the block's parts, against `transformers` where it has the same part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import config as settings
from ptjax.models import config as config_lib
from ptjax.models import layers
from ptjax.models import rope


def _config(**changes):
  return config_lib.TransformerConfig(**{**dict(
      family='llama', vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
      mlp_width=24, max_length=64), **changes})


def _torch_bfloat16(x):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  return torch.tensor(np.asarray(x, np.float32)).to(torch.bfloat16)


@pytest.mark.parametrize('family', ['llama', 'gemma3', 'gpt2'])
def test_norm_rounds_like_transformers(family):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  x = jax.random.normal(jax.random.key(0), (5, 16), jnp.bfloat16) * 3
  scale, bias = jax.random.normal(jax.random.key(1), (2, 16), jnp.bfloat16)
  changes, params = {}, {'scale': scale}
  if family == 'llama':
    from transformers.models.llama import modeling_llama
    peer = modeling_llama.LlamaRMSNorm(16, 1e-6)
  elif family == 'gemma3':
    from transformers.models.gemma3 import modeling_gemma3
    peer, changes = modeling_gemma3.Gemma3RMSNorm(16, 1e-6), {'norm_offset': 1.0}
  else:
    peer, changes = torch.nn.LayerNorm(16, 1e-6), {'norm': 'layer', 'norm_bias': True}
    params['bias'] = bias
    peer.bias.data = _torch_bfloat16(bias)
  peer.weight.data = _torch_bfloat16(scale)
  config = _config(dtype='bfloat16', param_dtype='bfloat16', **changes)
  ours = layers.Norm(config, config.norm).apply({'params': params}, x)
  theirs = peer.bfloat16()(_torch_bfloat16(x)).detach().float().numpy()
  assert ours.dtype == jnp.bfloat16
  ours = np.asarray(ours, np.float32)
  # The order of the sum may move a value over a rounding boundary, by one bfloat16 step.
  assert (ours == theirs).mean() > 0.95
  np.testing.assert_allclose(ours, theirs, rtol=2**-7)


def test_fresh_norm_keeps_scale_one():
  x = jax.random.normal(jax.random.key(0), (3, 16))
  for offset in (0.0, 1.0):
    module = layers.Norm(_config(norm_offset=offset), 'rms')
    out, variables = module.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(jnp.square(out).mean(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(variables['params']['scale'], 1.0 - offset)


def test_embedding_reads_nearest_row_out_of_range():
  table = jnp.arange(12.0).reshape(6, 2)
  module = layers.Embedding(_config(width=2, num_heads=1, num_kv_heads=1), 6)
  out = module.apply({'params': {'embedding': table}}, jnp.array([-7, 0, 3, 6, 10**6]))
  np.testing.assert_array_equal(out, table[jnp.array([0, 0, 3, 5, 5])])


@pytest.mark.parametrize('name', ['silu', 'gelu_tanh', 'gelu'])
def test_activation_is_the_peer_of_its_name(name):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  x = jnp.linspace(-4, 4, 41)[:, None]
  identity = {'up': {'kernel': jnp.eye(1)}, 'down': {'kernel': jnp.eye(1)}}
  config = _config(width=1, num_heads=1, num_kv_heads=1, mlp_width=1, gated_mlp=False,
                   activation=name, head_dim=2)
  ours = layers.Mlp(config).apply({'params': identity}, x)
  functional = torch.nn.functional
  peer = {'silu': functional.silu, 'gelu': functional.gelu,
          'gelu_tanh': lambda x: functional.gelu(x, approximate='tanh')}[name]
  np.testing.assert_allclose(ours, peer(torch.tensor(np.asarray(x))).numpy(), atol=1e-6)


def test_rope_sees_distance_only():
  config = _config(head_dim=8)
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))

  def score(i, j):
    table = lambda position: rope.tables(config, jnp.array([position]))[0]
    return jnp.sum(rope.rotate(query, table(i)) * rope.rotate(key, table(j)))

  np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize('scaling', [
    {'rope_type': 'linear', 'factor': 4.0},
    {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
     'original_max_position_embeddings': 64},
    {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64},
    {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64, 'mscale': 0.7,
     'mscale_all_dim': 1.1, 'beta_fast': 16, 'truncate': False},
], ids=['linear', 'llama3', 'yarn', 'yarn_mscale'])
def test_rope_scaling_matches_transformers(scaling):
  pytest.importorskip('torch', reason='parity needs torch')
  import transformers
  from transformers import modeling_rope_utils
  peer = transformers.LlamaConfig(
      hidden_size=64, num_attention_heads=2, max_position_embeddings=256,
      rope_theta=10000.0, rope_scaling=dict(scaling))
  make = modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling['rope_type']]
  frequencies, amplitude = make(peer, 'cpu')
  config = _config(width=64, num_heads=2, num_kv_heads=2,
                   rope_scaling=tuple(sorted(scaling.items())))
  positions = np.arange(0, 50, 7)
  (cos, sin), local = rope.tables(config, jnp.asarray(positions, jnp.int32))
  angles = positions[:, None] * frequencies.numpy()[None].astype(np.float64)
  np.testing.assert_allclose(cos, np.cos(angles) * amplitude, atol=2e-5)  # 50 radians in float32
  np.testing.assert_allclose(sin, np.sin(angles) * amplitude, atol=2e-5)
  assert local is None


def test_local_rope_ignores_scaling():
  scaled = _config(local_rope_theta=100.0, rope_theta=10000.0,
                   rope_scaling=(('factor', 8.0), ('rope_type', 'linear')))
  plain = _config(rope_theta=100.0)
  positions = jnp.arange(20)
  np.testing.assert_array_equal(
      rope.tables(scaled, positions)[1][0], rope.tables(plain, positions)[0][0])


def test_unknown_rope_scaling_is_named():
  config = _config(rope_scaling=(('rope_type', 'moebius'),))
  with pytest.raises(settings.UserError, match='moebius.*linear.*llama3'):
    rope.tables(config, jnp.arange(3))


def test_product_keeps_half_precision_in_its_gradient():
  a = jax.random.normal(jax.random.key(0), (2, 5, 8))
  b = jax.random.normal(jax.random.key(1), (2, 8, 3))
  loss = lambda dtype: lambda a, b: jnp.sum(jnp.sin(layers.product(a, b, dtype)))
  exact = jax.grad(loss('float32'), (0, 1))(a, b)
  rough = jax.grad(loss('bfloat16'), (0, 1))(a, b)
  for e, r in zip(exact, rough):
    assert r.dtype == jnp.float32
    np.testing.assert_allclose(r, e, atol=0.05)
    assert np.abs(r - e).max() > 0
  jaxpr = str(jax.make_jaxpr(jax.grad(loss('bfloat16'), (0, 1)))(a, b))
  assert jaxpr.count('dot_general') == 3
  assert jaxpr.count('preferred_element_type=float32') == 3
  lowered = jax.jit(jax.grad(loss('bfloat16'), (0, 1))).lower(a, b).as_text()
  dots = [line for line in lowered.splitlines() if 'dot_general' in line]
  assert len(dots) >= 2 and all(line.count('xbf16>') == 2 for line in dots)


@pytest.mark.parametrize('changes, message', [
    (dict(num_heads=3), '3 attention heads.*2 key/value'),
    (dict(layer_windows=(4,)), 'layer_windows.*2 layers'),
    (dict(layer_windows=(4, -1)), 'layer_windows'),
    (dict(activation='relu'), "activation is 'relu'.*silu"),
    (dict(dtype='float8'), "dtype is 'float8'.*bfloat16"),
])
def test_config_refuses(changes, message):
  with pytest.raises(settings.UserError, match=message):
    _config(**changes)


def test_config_fills_the_usual_values():
  config = _config()
  assert (config.head_dim, config.query_scale, config.layer_windows) == (4, 0.5, (0, 0))
  assert hash(config) == hash(_config())
