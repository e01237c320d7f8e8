"""Tests of completion log-probs: the shift, the chunks, the memory."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import sharding
from ptjax.models import attention
from ptjax.models import config as config_lib
from ptjax.models import head
from ptjax.models import policy
from ptjax.models import transformer

P, S, G, T, V = 2, 6, 3, 5, 19
B = P * G
LENGTHS = np.array([4, 6], np.int32)
RANDOM = np.random.RandomState(0)
PROMPTS = RANDOM.randint(0, V, (P, S)).astype(np.int32)
TOKENS = RANDOM.randint(0, V, (B, T)).astype(np.int32)
CONFIG = config_lib.TransformerConfig(
    family='gemma2', vocab_size=V, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=24, max_length=32, layer_windows=(3, 0), logit_softcap=4.0)


@functools.cache
def _params(config=CONFIG):
  random = np.random.RandomState(1)
  return jax.tree.map(
      lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype),
      jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))))


@functools.partial(jax.jit, static_argnames=('config', 'chunk', 'with_entropy'))
def _run(params, prompts=PROMPTS, tokens=TOKENS, temperature=1.0, **options):
  options = {'config': CONFIG, **options}
  return policy.log_probs(options.pop('config'), params, prompts, LENGTHS, tokens,
                          temperature=temperature, **options)


@functools.cache
def _reference(temperature):
  """Log-probs and entropy in float64 NumPy, from the logits of every sequence run alone."""
  @jax.jit
  def logits_of(row):
    hidden, _ = transformer.forward(CONFIG, _params(), row, jnp.arange(S + T),
                                    attention.prefill(CONFIG, jnp.array([S + T]), S + T))
    return transformer.logits(CONFIG, _params(), hidden)

  log_probs, entropy = np.zeros([B, T]), np.zeros([B, T])
  for b in range(B):
    length = LENGTHS[b // G]
    row = np.concatenate([PROMPTS[b // G, :length], TOKENS[b]])
    logits = np.asarray(logits_of(np.pad(row, (0, S + T - len(row)))), np.float64) / temperature
    logits = logits[length - 1:][:T]
    logits -= logits.max(-1, keepdims=True)
    full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs[b] = full[np.arange(T), TOKENS[b]]
    entropy[b] = -(np.exp(full) * full).sum(-1)
  return log_probs, entropy


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_scores_equal_sequences_run_alone(temperature):
  log_probs, entropy = _reference(temperature)
  out = _run(_params(), temperature=temperature)
  assert out['log_probs'].dtype == out['entropy'].dtype == jnp.float32
  np.testing.assert_allclose(out['log_probs'], log_probs, atol=2e-5)
  np.testing.assert_allclose(out['entropy'], entropy, atol=2e-5)
  assert log_probs.std() > 0.3 and entropy.std() > 0.03  # the check has something to see


@functools.partial(jax.jit, static_argnames=('chunk', 'remat'))
def _gradient(params, chunk=None, remat='none'):
  """Gradient of a function of every log-prob and every entropy."""
  weights = jnp.cos(jnp.arange(B * T)).reshape(B, T)
  def loss(params):
    out = policy.log_probs(CONFIG, params, PROMPTS, LENGTHS, TOKENS, chunk=chunk, remat=remat)
    return jnp.sum(weights * out['log_probs'] + weights**2 * out['entropy'])
  return jax.grad(loss)(params)


def test_gradient_equals_log_softmax():
  weights = jnp.cos(jnp.arange(B * T)).reshape(B, T)
  hidden = jnp.asarray(RANDOM.normal(size=(B, T, 16)), jnp.float32)

  @jax.jit
  def plain(params, hidden):
    full = jax.nn.log_softmax(transformer.logits(CONFIG, params, hidden) / 0.7)
    log_probs = jnp.take_along_axis(full, TOKENS[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * log_probs - weights**2 * jnp.sum(jnp.exp(full) * full, axis=-1))

  @jax.jit
  def ours(params, hidden):
    out = head.score(CONFIG, params, hidden, TOKENS, temperature=0.7, chunk=2)
    return jnp.sum(weights * out['log_probs'] + weights**2 * out['entropy'])

  chex.assert_trees_all_close(
      jax.grad(ours, (0, 1))(_params(), hidden), jax.grad(plain, (0, 1))(_params(), hidden),
      atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('chunk', [1, 2, 100])
def test_chunks_change_nothing(chunk):
  # 2 does not divide T = 5: the last chunk is padded.
  chex.assert_trees_all_close(
      _run(_params(), chunk=chunk), _run(_params()), atol=2e-6, rtol=1e-5)


def test_chunks_and_remat_change_no_gradient():
  expected = _gradient(_params())
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  chex.assert_trees_all_close(
      _gradient(_params(), chunk=2, remat='full'), expected, atol=1e-6 * scale, rtol=0)


def test_one_completion_per_prompt():
  tokens = TOKENS[::G]
  np.testing.assert_allclose(
      _run(_params(), tokens=tokens)['log_probs'], _run(_params())['log_probs'][::G], atol=1e-5)


def test_untied_head():
  config = dataclasses.replace(CONFIG, tie_embeddings=False)
  tied = _params()
  params = {**tied, 'head': {'kernel': tied['embed']['embedding'].T}}
  chex.assert_trees_all_close(_run(params, config=config), _run(tied), atol=1e-6)
  params['head'] = {'kernel': jnp.zeros([16, V])}
  out = _run(params, config=config)
  np.testing.assert_allclose(out['log_probs'], -np.log(V), rtol=1e-6)
  np.testing.assert_allclose(out['entropy'], np.log(V), rtol=1e-6)


def test_entropy_is_left_out_on_request():
  out = _run(_params(), with_entropy=False)
  assert sorted(out) == ['likeliest', 'log_probs']
  np.testing.assert_allclose(out['log_probs'], _run(_params())['log_probs'], atol=1e-6)


def test_padding_may_hold_anything():
  prompts, tokens = PROMPTS.copy(), TOKENS.copy()
  prompts[0, 4:] = 10**6
  tokens[:, 3:] = -1
  out, expected = _run(_params(), prompts, tokens), _run(_params())
  assert all(np.isfinite(x).all() for x in out.values())
  np.testing.assert_array_equal(out['log_probs'][:, :3], expected['log_probs'][:, :3])
  # Entropy at t is of the distribution that drew token t: it depends on the tokens before only.
  np.testing.assert_array_equal(out['entropy'][:, :4], expected['entropy'][:, :4])


def test_half_precision_is_close():
  out = _run(_params(), config=dataclasses.replace(CONFIG, dtype='bfloat16'))
  expected = _run(_params())
  assert out['log_probs'].dtype == jnp.float32
  assert 0 < np.abs(out['log_probs'] - expected['log_probs']).mean() < 0.03


def test_uneven_groups_are_refused():
  with pytest.raises(ValueError, match='5 completions do not split over 2 prompts'):
    _run(_params(), tokens=TOKENS[:5])


def _sizes(text):
  """Elements of every float32 array named in a compiled program."""
  shapes = set(re.findall(r'f32\[([\d,]+)\]', text))
  return {int(np.prod([int(n) for n in shape.split(',')])) for shape in shapes}


def test_full_logits_never_exist():
  config = dataclasses.replace(CONFIG, vocab_size=521, num_layers=1, layer_windows=None)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  def loss(params, chunk):
    out = policy.log_probs(config, params, PROMPTS, LENGTHS, TOKENS, chunk=chunk)
    return jnp.sum(out['log_probs'] + out['entropy'])
  compiled = lambda chunk: jax.jit(jax.grad(functools.partial(loss, chunk=chunk))).lower(
      shapes).compile().as_text()
  assert B * T * 521 in _sizes(compiled(T))  # the probe sees them where they are
  # Larger than one chunk's logits: nothing but at most the embedding table.
  assert max(_sizes(compiled(1))) <= 521 * 16
  assert B * 521 in _sizes(compiled(1))


@pytest.mark.parametrize('tied', [True, False])
def test_at_a_large_vocabulary_the_head_takes_little_memory(tied):
  """Compiled, never run: 2,048 positions of 151,936 logits each would be 1.2 GB."""
  b, t, vocab = 64, 32, 151_936
  config = dataclasses.replace(CONFIG, vocab_size=vocab, width=256, logit_softcap=None,
                               tie_embeddings=tied)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  arguments = ({name: shapes[name] for name in ('embed', 'head') if name in shapes},
               jax.ShapeDtypeStruct((b, t, 256), jnp.float32),
               jax.ShapeDtypeStruct((b, t), jnp.int32))

  def whole(params, states, tokens):
    full = jax.nn.log_softmax(transformer.logits(config, params, states))
    return jnp.take_along_axis(full, tokens[..., None], axis=-1)[..., 0]

  def ours(params, states, tokens):
    return head.score(config, params, states, tokens, with_entropy=False)['log_probs']

  def compiled(score):
    loss = lambda *inputs: jnp.square(score(*inputs)).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
  expected, found = compiled(whole), compiled(ours)
  temporaries = lambda program: program.memory_analysis().temp_size_in_bytes
  assert temporaries(found) < 0.1 * temporaries(expected)  # 0.064 with XLA's fusions on
  assert b * t * vocab in _sizes(expected.as_text())  # the probe sees it where it is
  assert b * t * vocab not in _sizes(found.as_text())
  # Nothing is larger than the embedding, whose gradient is added up.
  assert max(_sizes(found.as_text())) <= vocab * 256


def test_split_batch_is_not_scanned():
  """Every device computes its share only, and hidden states stay where they are."""
  mesh = sharding.make_mesh('data=8')
  config = dataclasses.replace(CONFIG, vocab_size=520, num_layers=1, layer_windows=None)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  batch = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  inputs = shapes, batch(8, S), batch(8), batch(8, T)

  def loss(params, prompts, lengths, tokens):
    out = policy.log_probs(config, params, prompts, lengths, tokens, chunk=1)
    return jnp.sum(out['log_probs'])

  alone = jax.jit(jax.grad(loss)).lower(*inputs).compile()
  with sharding.use(mesh):
    rows = sharding.batch(mesh)
    split = jax.jit(jax.grad(loss), in_shardings=(sharding.replicated(mesh), rows, rows, rows),
                    out_shardings=sharding.replicated(mesh)).lower(*inputs).compile()
  ratio = 8 * split.cost_analysis()['flops'] / alone.cost_analysis()['flops']
  assert ratio < 1.5  # 8 when the scan walks the split axis; above 1 by the gradients' sums
  assert 'all-gather' not in split.as_text()
