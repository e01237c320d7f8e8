"""Tests of what a token sees, in every layout, against masks written out by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from ptjax.models import attention
from ptjax.models import cache as cache_lib
from ptjax.models import transformer

P, S, G, T = 2, 6, 3, 5
B = P * G
LENGTHS = np.array([4, 6], np.int32)
RANDOM = np.random.RandomState(0)
PROMPTS = RANDOM.randint(0, 19, (P, S)).astype(np.int32)
TOKENS = RANDOM.randint(0, 19, (B, T)).astype(np.int32)

QWEN, GEMMA = tiny_models.QWEN, tiny_models.GEMMA
GPT2 = dataclasses.replace(tiny_models.GPT2, layer_windows=(4, 4))
_params = tiny_models.params
CONFIGS = {'qwen': QWEN, 'gemma': GEMMA, 'gpt2': GPT2}


@functools.partial(jax.jit, static_argnames='config')
def _grouped(config, params, prompts, lengths, tokens):
  """Hidden states (of prompts [P, S, width], of completions [B, T, width])."""
  p, s = prompts.shape
  b, t = tokens.shape
  rows = jnp.concatenate([prompts, tokens.reshape(p, -1)], axis=1)
  hidden, _ = transformer.forward(
      config, params, rows.reshape(-1), attention.grouped_positions(lengths, s, b // p, t),
      attention.grouped(config, lengths, s, b // p, t))
  hidden = hidden.reshape(p, rows.shape[1], -1)
  return hidden[:, :s], hidden[:, s:].reshape(b, t, -1)


@functools.partial(jax.jit, static_argnames='config')
def _plain(config, params, prompts, lengths, tokens):
  """Hidden states of the completions [B, T, width], each run alone behind its own prompt.

  The padding between prompt and completion is taken out, so this is an ordinary causal model.
  """
  g = tokens.shape[0] // prompts.shape[0]
  s, t = prompts.shape[1], tokens.shape[1]
  prompts, lengths = jnp.repeat(prompts, g, axis=0), jnp.repeat(lengths, g)
  at = jnp.arange(s + t)[None]
  index = jnp.where(at < lengths[:, None], at, s + at - lengths[:, None])
  joined = jnp.concatenate([prompts, tokens], axis=1)
  rows = jnp.take_along_axis(joined, jnp.minimum(index, s + t - 1), axis=1)
  hidden, _ = transformer.forward(
      config, params, rows.reshape(-1), jnp.tile(jnp.arange(s + t), rows.shape[0]),
      attention.prefill(config, lengths + t, s + t))
  after = lengths[:, None, None] + jnp.arange(t)[None, :, None]
  return jnp.take_along_axis(hidden.reshape(*rows.shape, -1), after, axis=1)


@pytest.mark.parametrize('block, window', [(128, 0), (128, 1), (128, 3), (128, 7), (2, 0), (2, 3)])
@pytest.mark.parametrize('softcap', [None, 1.5])
def test_grouped_equals_masks_written_out(block, window, softcap, monkeypatch):
  monkeypatch.setattr(attention, '_BLOCK_QUERIES', block)
  config = dataclasses.replace(QWEN, attention_softcap=softcap, query_scale=0.7)
  width = S + G * T
  query = RANDOM.normal(size=(P * width, 4, 4))
  key, value = RANDOM.normal(size=(2, P * width, 2, 4))
  out, cache = jax.jit(attention.grouped(config, jnp.asarray(LENGTHS), S, G, T),
                       static_argnums=3)(*map(jnp.float32, (query, key, value)), window, None)
  assert cache is None
  out = np.asarray(out).reshape(P, width, 4, 4)

  for p in range(P):
    branch = np.array([-1] * S + [g for g in range(G) for _ in range(T)])
    position = np.array(list(range(S)) + [LENGTHS[p] + t for t in range(T)] * G)
    real = np.array([j < LENGTHS[p] for j in range(S)] + [True] * (G * T))
    rows = slice(p * width, (p + 1) * width)
    for i in np.flatnonzero(real):
      distance = position[i] - position
      visible = real & ((branch == -1) | (branch == branch[i])) & (distance >= 0)
      if window:
        visible &= distance < window
      for head in range(4):
        scores = key[rows][:, head // 2] @ query[rows][i, head] * 0.7
        if softcap:
          scores = softcap * np.tanh(scores / softcap)
        weights = np.where(visible, np.exp(scores), 0.0)
        expected = weights @ value[rows][:, head // 2] / weights.sum()
        np.testing.assert_allclose(out[p, i, head], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_grouped_equals_sequences_alone(config):
  @functools.partial(jax.jit, static_argnames='run')
  def both(params, run):
    direction = jnp.sin(jnp.arange(B * T * config.width)).reshape(B, T, -1)
    def loss(params):
      hidden = run(config, params, PROMPTS, LENGTHS, TOKENS)
      return jnp.sum(hidden * direction), hidden
    return jax.grad(loss, has_aux=True)(params)
  completions = lambda *args: _grouped(*args)[1]
  gradient, hidden = both(_params(config), completions)
  plain_gradient, plain_hidden = both(_params(config), _plain)
  np.testing.assert_allclose(hidden, plain_hidden, atol=2e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain_gradient))
  chex.assert_trees_all_close(gradient, plain_gradient, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_decoding_equals_grouped(config):
  params = _params(config)
  prompt_hidden, hidden = _grouped(config, params, PROMPTS, LENGTHS, TOKENS)

  @jax.jit
  def prefill(params):
    positions = jnp.tile(jnp.arange(S), P)
    return transformer.forward(config, params, PROMPTS.reshape(-1), positions,
                               attention.prefill(config, LENGTHS, S))

  @jax.jit
  def decode(params, store, own, tokens, step):
    out, caches = transformer.forward(
        config, params, tokens, jnp.repeat(LENGTHS, G) + step,
        attention.decode(config, LENGTHS, step, G), caches=cache_lib.join(store, own))
    return out, cache_lib.own_part(caches)

  prefilled, store = prefill(params)
  np.testing.assert_allclose(prefilled.reshape(P, S, -1), prompt_hidden, atol=1e-5)
  store = cache_lib.split(store)
  whole = cache_lib.init_own(config, B, 8)
  own = cache_lib.select(whole, 4)
  split = transformer.split_layers(params)
  # Rows may stand at different steps: row b runs token t at turn t + delay[b], and until then
  # writes what it overwrites later.
  delay = np.arange(B) % 2
  seen = np.zeros([B, T, config.width], np.float32)
  for turn in range(T + 1):
    if turn == 4:
      own = cache_lib.put_back(whole, own, np.arange(B)[None], np.zeros(B, np.int32), 4)
    step = np.clip(turn - delay, 0, T - 1).astype(np.int32)
    out, own = decode(split, store, own, TOKENS[np.arange(B), step], step)
    seen[np.arange(B), step] = out
  np.testing.assert_allclose(seen, hidden, atol=1e-5)


def test_gradients_at_unseen_places_are_exactly_zero():
  width = S + G * T
  config = dataclasses.replace(GEMMA, vocab_size=P * width)  # one row of the table per place

  @jax.jit
  def gradient(embedding, p, i):
    """How the state at place i of row p depends on each place's embedding."""
    def state(embedding):
      params = {**_params(config), 'embed': {'embedding': embedding}}
      hidden, _ = transformer.forward(
          config, params, jnp.arange(P * width), attention.grouped_positions(LENGTHS, S, G, T),
          attention.grouped(config, LENGTHS, S, G, T))
      return jnp.sum(jnp.sin(hidden.reshape(P, width, -1)[p, i]))
    return jnp.abs(jax.grad(state)(embedding)).max(-1).reshape(P, width)

  embedding = _params(config)['embed']['embedding']
  for p, g, t in ((0, 1, 2), (1, 0, 0), (1, 2, T - 1)):
    seen = np.asarray(gradient(embedding, p, S + g * T + t)) > 0
    expected = np.zeros([P, width], bool)
    expected[p, :LENGTHS[p]] = True  # the last layer is global
    expected[p, S + g * T:S + g * T + t + 1] = True
    np.testing.assert_array_equal(seen, expected)
  seen = np.asarray(gradient(embedding, 1, 3)) > 0
  assert seen[1, :4].all() and seen.sum() == 4


def test_padding_may_hold_anything():
  prompts, tokens = PROMPTS.copy(), TOKENS.copy()
  prompts[0, 4:] = [-(2**31), 2**31 - 1]
  tokens[:, 3:] = 10**6
  prompt_hidden, hidden = _grouped(QWEN, _params(QWEN), PROMPTS, LENGTHS, TOKENS)
  other_prompt_hidden, other_hidden = _grouped(QWEN, _params(QWEN), prompts, LENGTHS, tokens)
  np.testing.assert_array_equal(other_prompt_hidden[0, :4], prompt_hidden[0, :4])
  np.testing.assert_array_equal(other_prompt_hidden[1], prompt_hidden[1])
  np.testing.assert_array_equal(other_hidden[:, :3], hidden[:, :3])
  assert np.isfinite(other_hidden).all()


def test_write_clamps_its_index():
  own = cache_lib.init_own(QWEN, 2, 3)[0]
  new = jnp.ones([2, 2, 4])
  key, value = cache_lib.write(*own, new, new, jnp.array([-5, 7]))
  np.testing.assert_array_equal(key.sum((1, 2)), [[8, 0, 0], [0, 0, 8]])
  np.testing.assert_array_equal(value.sum((1, 3)), [[8, 0, 0], [0, 0, 8]])


def test_a_window_of_some_rows_is_put_back_where_it_belongs():
  own = cache_lib.init_own(QWEN, 3, 6)
  part = jax.tree.map(jnp.ones_like, cache_lib.select(own, 4, lambda x: x[jnp.array([2, 0])]))
  key, value = cache_lib.put_back(own, part, np.array([[2, 0]]), np.array([1, 2]), 2)[0]
  assert key.shape == own[0][0].shape and value.shape == own[0][1].shape
  filled = np.zeros([3, 6])
  filled[2, 1:3] = filled[0, 2:4] = 1  # two columns each, from the row's own start
  np.testing.assert_array_equal(key, np.broadcast_to(filled[:, None, None], key.shape))
  np.testing.assert_array_equal(value, np.broadcast_to(filled[:, None, :, None], value.shape))


def test_mixed_up_shapes_are_found_while_tracing():
  attend = attention.prefill(QWEN, LENGTHS, S)
  with pytest.raises(AssertionError):
    attend(jnp.zeros([P * S, 4, 4]), jnp.zeros([P * S, 4, 4]), jnp.zeros([P * S, 4, 4]), 0, None)
  with pytest.raises(AssertionError):
    attention.decode(QWEN, LENGTHS, jnp.zeros([P], jnp.int32), G)
