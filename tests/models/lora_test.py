"""Adapters against closed forms: what they compute, what they train, what they leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import attention
from ptjax.models import cache
from ptjax.models import config as config_lib
from ptjax.models import hub
from ptjax.models import lora
from ptjax.models import policy
from ptjax.models import transformer
from ptjax.training import state as training_state

QWEN = config_lib.TransformerConfig(
    family='qwen2', vocab_size=19, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=24, max_length=32, qkv_bias=True)
GPT2 = dataclasses.replace(
    QWEN, family='gpt2', num_kv_heads=4, position='learned', norm='layer', norm_bias=True,
    gated_mlp=False, out_bias=True, mlp_bias=True, activation='gelu_tanh')
VARIANTS = ('lora', 'rslora', 'dora')
SETTINGS = {name: settings.LoraSettings(rank=3, alpha=5.0, variant=name) for name in VARIANTS}
P, S, G, T = 4, 5, 2, 4
RANDOM = np.random.default_rng(0)
BATCH = (RANDOM.integers(0, 19, (P, S)), np.array([3, 5, 1, 4]), RANDOM.integers(0, 19, (P * G, T)))


@functools.cache
def params(config):
  return transformer.init(config, jax.random.key(0))


@functools.cache
def adapters(config, variant):
  """Adapters that have trained: B is not zero, magnitudes are not the norms."""
  fresh = lora.init(params(config), SETTINGS[variant], jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.1 * RANDOM.standard_normal(x.shape).astype(x.dtype), fresh)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(config, params):
  return policy.log_probs(config, params, *BATCH)['log_probs']


# What they compute.


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('config', [QWEN, GPT2], ids=['qwen', 'gpt2'])
def test_fresh_adapters_are_the_base(config, variant):
  fresh = lora.init(params(config), SETTINGS[variant], jax.random.key(1))
  joined = log_probs(config, lora.join(params(config), fresh, SETTINGS[variant].scale))
  # DoRA divides magnitudes by norms that this program sums in its own order.
  np.testing.assert_allclose(joined, log_probs(config, params(config)), rtol=0,
                             atol=3e-6 if variant == 'dora' else 0)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('config', [QWEN, GPT2], ids=['qwen', 'gpt2'])
def test_joined_equals_merged(config, variant):
  scale, own = SETTINGS[variant].scale, adapters(config, variant)
  joined = log_probs(config, lora.join(params(config), own, scale))
  merged = lora.merge(params(config), own, scale)
  assert jax.tree.structure(merged) == jax.tree.structure(params(config))
  np.testing.assert_allclose(joined, log_probs(config, merged), atol=2e-5)
  assert np.abs(joined - log_probs(config, params(config))).max() > 0.1


@pytest.mark.parametrize('variant', VARIANTS)
def test_merged_kernel_is_the_papers(variant):
  own, scale = adapters(QWEN, variant), 5 / 3**0.5 if variant == 'rslora' else 5 / 3
  merged = lora.merge(params(QWEN), own, SETTINGS[variant].scale)
  for room, name in (('attention', 'key'), ('mlp', 'down')):
    a, b = (np.float64(own['layers'][room][name][leaf]) for leaf in ('lora_a', 'lora_b'))
    kernel = np.float64(params(QWEN)['layers'][room][name]['kernel'])
    for layer in range(QWEN.num_layers):
      expected = kernel[layer] + scale * a[layer] @ b[layer]
      if variant == 'dora':  # arXiv:2402.09353, eq. 5
        expected *= np.float64(own['layers'][room][name]['magnitude'][layer]) / np.linalg.norm(
            expected, axis=0)
      np.testing.assert_allclose(merged['layers'][room][name]['kernel'][layer], expected,
                                 rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('variant', ['lora', 'dora'])
def test_unrolled_decoding_sees_the_adapters(variant):
  """One token after a prefill, as the rollout takes it, against all at once."""
  joined = lora.join(params(QWEN), adapters(QWEN, variant), SETTINGS[variant].scale)
  tokens, lengths = jnp.asarray(BATCH[0]), jnp.full([P], S - 1)

  @jax.jit
  def decoded(joined):
    joined = transformer.split_layers(joined)
    _, store = transformer.forward(
        QWEN, joined, tokens[:, :-1].reshape(-1), jnp.tile(jnp.arange(S - 1), P),
        attention.prefill(QWEN, lengths, S - 1))
    hidden, _ = transformer.forward(
        QWEN, joined, tokens[:, -1], lengths,
        attention.decode(QWEN, lengths, jnp.zeros(P, jnp.int32), 1),
        caches=cache.join(store, cache.init_own(QWEN, P, 8)))
    return hidden

  @jax.jit
  def at_once(joined):
    return transformer.forward(
        QWEN, joined, tokens.reshape(-1), jnp.tile(jnp.arange(S), P),
        attention.prefill(QWEN, jnp.full([P], S), S))[0].reshape(P, S, -1)[:, -1]

  np.testing.assert_allclose(decoded(joined), at_once(joined), atol=1e-5)


def test_half_precision_keeps_the_adapters_exact():
  config = dataclasses.replace(QWEN, dtype='bfloat16', param_dtype='bfloat16')
  fresh = lora.init(params(config), SETTINGS['dora'], jax.random.key(1))
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype('float32')}
  own, scale = adapters(config, 'dora'), SETTINGS['dora'].scale
  merged = lora.merge(params(config), own, scale)
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype('bfloat16')}
  joined = log_probs(config, lora.join(params(config), own, scale))
  # Both round to 8 bits, the one its kernels and the other two products more.
  np.testing.assert_allclose(joined, log_probs(config, merged), atol=0.15)


def test_column_norms():
  kernel, a, b = (np.float32(RANDOM.standard_normal(shape)) for shape in ((2, 9, 7), (2, 9, 3),
                                                                          (2, 3, 7)))
  norms = lora.column_norms(kernel, {'lora_a': a, 'lora_b': b}, 1.7)
  expected = np.linalg.norm(np.float64(kernel) + 1.7 * np.float64(a) @ np.float64(b), axis=-2)
  np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_fresh_a_is_uniform_and_differs_by_layer():
  wide = {'layers': {'mlp': {name: {'kernel': jnp.zeros((2, 400, 8))} for name in ('up', 'gate')}}}
  made = lora.init(wide, settings.LoraSettings(rank=64), jax.random.key(0))['layers']['mlp']
  a = np.stack([made['up']['lora_a'], made['gate']['lora_a']]).reshape(4, -1)
  assert a.shape == (4, 400 * 64) and np.abs(a).max() <= 1 / 20  # torch: U(±1 / sqrt(in))
  np.testing.assert_allclose(a.std(-1), 1 / 20 / 3**0.5, rtol=0.02)
  assert np.abs(np.corrcoef(a) - np.eye(4)).max() < 0.03


# What trains.


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradient_is_the_full_gradient_through_the_product(variant):
  """dA = scale dW B^T and dB = scale A^T dW; DoRA's dW is rescaled, its norm a constant."""
  own, scale = adapters(QWEN, variant), SETTINGS[variant].scale
  loss = lambda tree: jnp.sin(log_probs(QWEN, tree)).sum()
  got = jax.jit(jax.grad(lambda own: loss(lora.join(params(QWEN), own, scale))))(own)
  full = jax.jit(jax.grad(loss))(lora.merge(params(QWEN), own, scale))
  checked = 0
  for room, layers in own['layers'].items():
    for name, adapter in layers.items():
      weight = np.float64(full['layers'][room][name]['kernel'])
      a, b = np.float64(adapter['lora_a']), np.float64(adapter['lora_b'])
      mine = got['layers'][room][name]
      if variant == 'dora':
        direction = np.float64(params(QWEN)['layers'][room][name]['kernel']) + scale * a @ b
        norm = np.linalg.norm(direction, axis=1)
        np.testing.assert_allclose(
            mine['magnitude'], (weight * direction).sum(1) / norm, rtol=1e-4, atol=1e-4)
        weight *= (np.float64(adapter['magnitude']) / norm)[:, None]
      np.testing.assert_allclose(
          mine['lora_a'], scale * weight @ b.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(
          mine['lora_b'], scale * a.swapaxes(1, 2) @ weight, rtol=1e-4, atol=1e-4)
      checked += 1
  assert checked == 7


def test_only_adapters_have_optimizer_state():
  own = adapters(QWEN, 'dora')
  state = jax.eval_shape(lambda: training_state.init(own, optax.adamw(1e-3)))
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(state.opt_state) == 2 * count(own) + 1
  d, f, kv, r = 16, 24, 8, 3
  pairs = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
  assert count(own) == 2 * sum(r * (i + o) + o for i, o in pairs)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('variant', ['lora', 'dora'])
def test_no_gradient_of_full_size_is_computed(variant, dtype):
  """Forward and the activations' gradient cost 2 of the 3 products per weight, the third is gone.

  XLA counts the scan's body once, which holds for both.
  """
  config = dataclasses.replace(
      QWEN, vocab_size=64, width=128, mlp_width=256, dtype=dtype)
  settings_ = settings.LoraSettings(rank=2, variant=variant)
  base = hub.param_shapes(config)
  own = jax.eval_shape(lambda p: lora.init(p, settings_, jax.random.key(0)), base)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = ints(2, 16), ints(2), ints(4, 48)
  tokens = 2 * (16 + 2 * 48)

  def loss(params, *batch):
    return policy.log_probs(config, params, *batch, with_entropy=False)['log_probs'].sum()

  def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']

  full = flops(jax.grad(loss), base, *batch)
  adapted = flops(jax.grad(
      lambda own, base, *batch: loss(lora.join(base, own, settings_.scale), *batch)),
                  own, base, *batch)
  kernels = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(base['layers'])
                if path[-1].key == 'kernel') // config.num_layers
  small = sum(leaf.size for leaf in jax.tree.leaves(own)) // config.num_layers
  # Gone are the weight gradients, 2 FLOPs per token and weight, those of the head too; here are
  # three products with the adapters.
  head = 2 * 4 * 48 * 64 * 128
  extra = 6 * tokens * small
  # What only XLA counts, norms' columns and casts among it, is three per cent of it here.
  assert full - adapted == pytest.approx(2 * tokens * kernels + head - extra, rel=0.04)
  assert adapted < 0.75 * full


@pytest.mark.parametrize('variant', ['lora', 'dora'])
def test_a_descent_step_lowers_the_loss_and_leaves_the_base(variant):
  base, scale = params(QWEN), SETTINGS[variant].scale
  before = jax.tree.map(np.array, base)

  @jax.jit
  def step(own, base):
    loss = lambda own: -log_probs(QWEN, lora.join(base, own, scale)).mean()
    value, gradient = jax.value_and_grad(loss)(own)
    return value, jax.tree.map(lambda w, g: w - 0.1 * g, own, gradient)

  own = lora.init(base, SETTINGS[variant], jax.random.key(1))
  values = []
  for _ in range(20):
    value, own = step(own, base)
    values.append(float(value))
  assert values[-1] < values[0] - 0.5
  jax.tree.map(np.testing.assert_array_equal, before, base)


def test_joining_copies_nothing():
  joined = lora.join(params(QWEN), adapters(QWEN, 'lora'), 1.0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params(QWEN)):
    found = joined
    for key in path:
      found = found[key.key]
    assert found is leaf


def test_a_fresh_head_trains_whole():
  base = {**params(QWEN), 'score': {'kernel': jnp.ones((16, 1))}}
  own = lora.init(base, SETTINGS['lora'], jax.random.key(0))
  assert own['score']['kernel'] is not base['score']['kernel']  # the one may be donated
  own['score']['kernel'] += 1
  for tree in (lora.join(base, own, 1.0), lora.merge(base, own, 1.0)):
    np.testing.assert_array_equal(tree['score']['kernel'], 2.0)
  np.testing.assert_array_equal(base['score']['kernel'], 1.0)


# What they may be put on.


def test_targets():
  made = lora.init(params(GPT2), dataclasses.replace(
      SETTINGS['lora'], targets=('query', 'down')), jax.random.key(0))['layers']
  assert {room: sorted(layers) for room, layers in made.items()} == {
      'attention': ['query'], 'mlp': ['down']}
  made = lora.init(params(GPT2), SETTINGS['lora'], jax.random.key(0))['layers']
  assert sorted(made['mlp']) == ['down', 'up'] and len(made['attention']) == 4


def test_a_target_that_matches_nothing():
  with pytest.raises(settings.UserError) as caught:
    lora.init(params(GPT2), dataclasses.replace(
        SETTINGS['lora'], targets=('query', 'gate', 'c_attn')), jax.random.key(0))
  assert str(caught.value) == (
      'lora.targets=query,gate,c_attn: no layer of this model is called gate or c_attn; there are '
      'down, key, out, query, up, value, or all-linear for all of them')


@pytest.mark.parametrize('changes, message', [
    ({'variant': 'pissa'}, 'lora, rslora, dora'), ({'rank': -1}, 'lora.rank=-1'),
    ({'alpha': 0.0}, 'lora.alpha'), ({'targets': ()}, 'lora.targets is empty')])
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(settings.UserError, match=message):
    settings.LoraSettings(**changes)


# Where they lie.


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['lora', 'dora'])
def test_sharded_gradient_equals_the_plain_one(variant):
  own, scale = adapters(QWEN, variant), SETTINGS[variant].scale
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')

  def gradient(own, base):
    return jax.grad(lambda own: jnp.sin(policy.log_probs(
        QWEN, lora.join(base, own, scale), *BATCH)['log_probs']).sum())(own)

  plain = jax.jit(gradient)(own, params(QWEN))
  shardings = sharding.tree_sharding(mesh, own)
  base = sharding.put(params(QWEN), sharding.tree_sharding(mesh, params(QWEN)))
  with sharding.use(mesh):
    split = jax.jit(gradient, out_shardings=shardings)(sharding.put(own, shardings), base)
  # Sums over devices come in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, split)


def test_adapters_lie_as_their_kernels_do():
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  specs = jax.tree.map(lambda leaf: tuple(leaf.spec), sharding.tree_sharding(
      mesh, {**params(QWEN), 'adapters': adapters(QWEN, 'dora')}))
  for room, layers in specs['adapters']['layers'].items():
    for name, found in layers.items():
      _, rows, columns = specs['layers'][room][name]['kernel']
      assert found['lora_a'] == (None, rows, None) and found['lora_b'] == (None, None, columns)
      assert found['magnitude'] == ((None, columns) if columns == 'tensor' else ())
