"""Tests of the decoder as a whole: depth, scanning, rematerialisation, dtypes, fresh weights."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from ptjax import config as settings
from ptjax.models import attention
from ptjax.models import presets
from ptjax.models import transformer

P, S = 2, 7

QWEN = tiny_models.QWEN
GEMMA = dataclasses.replace(tiny_models.GEMMA, embedding_scale=4.0, activation='gelu_tanh',
                            logit_softcap=1.5)
GPT2 = dataclasses.replace(tiny_models.GPT2, tie_embeddings=False)
_params = tiny_models.params
CONFIGS = {'qwen': QWEN, 'gemma': GEMMA, 'gpt2': GPT2}
TOKENS = np.random.RandomState(0).randint(0, QWEN.vocab_size, P * S)


def _logits(config, params, scan=None, remat='none'):
  lengths = jnp.full([P], S)
  hidden, _ = transformer.forward(
      config, params, jnp.asarray(TOKENS), jnp.tile(jnp.arange(S), P),
      attention.prefill(config, lengths, S), scan=scan, remat=remat)
  return transformer.logits(config, params, hidden)


@functools.partial(jax.jit, static_argnames=('config', 'scan', 'remat'))
def _run(config, params, scan=None, remat='none'):
  """(logits, the gradient of a function of all of them)."""
  def loss(params):
    logits = _logits(config, params, scan, remat)
    return jnp.sum(jnp.sin(logits)), logits
  gradient, logits = jax.grad(loss, has_aux=True)(params)
  return logits, gradient


def _close(a, b, tolerance=1e-5):
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
  chex.assert_trees_all_close(a, b, atol=tolerance * max(scale, 1.0), rtol=0)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_scan_equals_unrolled(config):
  _close(_run(config, _params(config)), _run(config, _params(config), scan=False))


def test_split_layers_run_unrolled():
  params = _params(QWEN)
  split = transformer.split_layers(params)
  assert len(split['layers']) == QWEN.num_layers
  logits, gradient = _run(QWEN, params)
  split_logits, split_gradient = _run(QWEN, split)
  _close(split_logits, logits)
  _close(split_gradient, transformer.split_layers(gradient))
  with pytest.raises(ValueError, match='stacked layers'):
    _run(QWEN, split, scan=True)


@pytest.mark.parametrize('remat', ['dots', 'full'])
@pytest.mark.parametrize('scan', [True, False])
def test_remat_changes_no_gradient(remat, scan):
  _close(_run(GEMMA, _params(GEMMA), scan, remat), _run(GEMMA, _params(GEMMA), True))


def test_remat_saves_memory():
  config = dataclasses.replace(QWEN, num_layers=8, mlp_width=256, layer_windows=None)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  temporary = {
      remat: _run.lower(config, shapes, remat=remat).compile().memory_analysis().temp_size_in_bytes
      for remat in transformer.REMAT}
  assert temporary['full'] < temporary['dots'] < temporary['none']


def test_unknown_remat_is_refused():
  with pytest.raises(ValueError, match='none, dots, full'):
    _run(QWEN, _params(QWEN), remat='some')


def test_program_is_flat_in_depth():
  def lines(num_layers):
    config = dataclasses.replace(QWEN, num_layers=num_layers, layer_windows=None)
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    return len(_run.lower(config, shapes).as_text().splitlines())
  assert lines(3) == lines(8)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_half_precision_is_close(config):
  exact, exact_gradient = _run(config, _params(config))
  rough, gradient = _run(dataclasses.replace(config, dtype='bfloat16'), _params(config))
  assert exact.dtype == rough.dtype == jnp.float32
  # bfloat16 keeps 8 bits; a few layers of rounding stay within a few percent of the spread.
  assert 0 < float(jnp.abs(rough - exact).mean()) < 0.03 * float(exact.std())
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
  norm = lambda tree: float(np.sqrt(sum(np.vdot(x, x) for x in jax.tree.leaves(tree))))
  difference = jax.tree.map(lambda x, y: np.asarray(x - y), gradient, exact_gradient)
  assert norm(difference) < 0.1 * norm(jax.tree.map(np.asarray, exact_gradient))


def test_parameters_may_be_stored_in_half_precision():
  config = dataclasses.replace(QWEN, param_dtype='bfloat16')
  params = _params(config)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  # Computation is in `dtype`: only the stored values are rounded.
  _close(_run(config, params)[0], _run(QWEN, wide)[0])


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_matters(config):
  paths = jax.tree_util.tree_leaves_with_path(_run(config, _params(config))[1])
  still = [jax.tree_util.keystr(path) for path, leaf in paths if np.abs(leaf).max() < 1e-5]
  # Without rope a bias of all keys shifts a query's scores by one constant: no effect.
  assert still == (["['layers']['attention']['key']['bias']"] if config is GPT2 else [])


def test_fresh_weights_have_the_planned_spread():
  config = presets.get('tiny', vocab_size=300)
  params = jax.jit(lambda: transformer.init(config, jax.random.key(0)))()
  layers = params['layers']
  scale = config.width**-0.5
  np.testing.assert_allclose(params['embed']['embedding'].std(), scale, rtol=0.05)
  np.testing.assert_allclose(layers['attention']['query']['kernel'].std(), scale, rtol=0.05)
  np.testing.assert_allclose(
      layers['mlp']['down']['kernel'].std(), scale / np.sqrt(2 * 4), rtol=0.05)
  np.testing.assert_array_equal(layers['attention']['query']['bias'], 0)
  np.testing.assert_array_equal(layers['mlp_norm']['scale'], 1)
  kernel = layers['mlp']['up']['kernel']
  assert kernel.shape == (4, 128, 384)
  assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01  # layers are drawn apart


def test_softcap_bounds_logits():
  params = {**_params(GEMMA), 'embed': jax.tree.map(lambda x: 10 * x, _params(GEMMA)['embed'])}
  hidden = jax.random.normal(jax.random.key(3), (5, GEMMA.width))
  capped = transformer.logits(GEMMA, params, hidden)
  free = transformer.logits(dataclasses.replace(GEMMA, logit_softcap=None), params, hidden)
  assert float(jnp.abs(free).max()) > 5 and float(jnp.abs(capped).max()) <= 1.5
  _close(capped, 1.5 * jnp.tanh(free / 1.5))


def test_presets_have_their_published_sizes():
  counts = {name: sum(x.size for x in jax.tree.leaves(
      jax.eval_shape(lambda name=name: transformer.init(presets.get(name), jax.random.key(0)))))
            for name in presets.names()}
  assert counts['gpt2'] == 124_439_808
  assert counts['qwen2.5-0.5b'] == 494_032_768
  assert counts['qwen2.5-1.5b'] == 1_543_714_304
  assert counts['qwen2.5-7b'] == 7_615_616_512
  assert counts['tiny'] < 1_000_000


def test_unknown_preset_lists_near_names():
  with pytest.raises(settings.UserError, match='qwen2.5-7'):
    presets.get('qwen-2.5-7b')
