"""Heads that score: which state they read, fresh ones, and a critic's values, in closed form."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import sharding
from ptjax import types
from ptjax.models import attention
from ptjax.models import config as config_lib
from ptjax.models import policy
from ptjax.models import transformer

P, S, G, T, V = 2, 6, 2, 5, 19
B = P * G
LENGTHS = np.array([4, 6], np.int32)
RANDOM = np.random.RandomState(0)
PROMPTS = RANDOM.randint(0, V, (P, S)).astype(np.int32)
TOKENS = RANDOM.randint(0, V, (B, T)).astype(np.int32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
LAST = [2, 4, 3, 0]
CONFIG = config_lib.TransformerConfig(
    family='llama', vocab_size=V, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=24, max_length=32)
REWARD = dataclasses.replace(CONFIG, num_labels=1)
STEPS = dataclasses.replace(CONFIG, num_labels=2, score_bias=True)


@functools.cache
def _params(config, seed=1):
  random = np.random.RandomState(seed)
  return jax.tree.map(
      lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype),
      jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))))


@functools.cache
def _states(config):
  """States [B, LENGTH + T, width] in float64 of every sequence run alone, and prompt lengths."""
  @jax.jit
  def run(row):
    return transformer.forward(config, _params(config), row, jnp.arange(S + T),
                               attention.prefill(config, jnp.array([S + T]), S + T))[0]
  out = []
  for b in range(B):
    row = np.concatenate([PROMPTS[b // G, :LENGTHS[b // G]], TOKENS[b]])
    out.append(np.asarray(run(np.pad(row, (0, S + T - len(row)))), np.float64))
  return out


def _own(config, b):
  """States [T, width] of row b's completion tokens."""
  return _states(config)[b][LENGTHS[b // G]:][:T]


def _before(config, b):
  """States [T, width] that predict row b's completion tokens."""
  return _states(config)[b][LENGTHS[b // G] - 1:][:T]


def test_a_score_is_read_at_the_last_trained_token():
  scores = jax.jit(functools.partial(policy.scores, REWARD))(
      _params(REWARD), PROMPTS, LENGTHS, TOKENS, loss_mask=MASK)
  kernel = _params(REWARD)['score']['kernel']
  expected = [float((_own(REWARD, b)[LAST[b]] @ kernel)[0]) for b in range(B)]
  assert scores.shape == (B,) and scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, expected, atol=2e-6)
  assert np.std(expected) > 0.1


def test_token_scores_are_read_at_the_tokens_themselves():
  out = jax.jit(functools.partial(policy.token_scores, STEPS))(
      _params(STEPS), PROMPTS, LENGTHS, TOKENS)
  head = _params(STEPS)['score']
  assert head['bias'].any()
  for b in range(B):
    np.testing.assert_allclose(out[b], _own(STEPS, b) @ head['kernel'] + head['bias'], atol=2e-6)


def _packed_rows():
  """Both completions of prompt 0 in one row, three of their tokens being targets."""
  prompt = PROMPTS[0, :LENGTHS[0]]
  row = np.concatenate([prompt, TOKENS[0], prompt, TOKENS[1]])
  n = LENGTHS[0] + T
  packing = types.Packing(
      segments=np.repeat([1, 2], n)[None], positions=np.tile(np.arange(n), 2)[None],
      predictors=np.array([[LENGTHS[0] + 1, n + LENGTHS[0] - 1, 2 * n - 2]]))
  targets = np.array([[TOKENS[0][2], TOKENS[1][0], TOKENS[1][T - 1]]])
  return row[None], np.array([2 * n]), targets, packing, [(0, 2), (1, 0), (1, T - 1)]


def test_token_scores_of_packed_rows():
  *arrays, packing, places = _packed_rows()
  out = jax.jit(functools.partial(policy.token_scores, STEPS))(
      _params(STEPS), *arrays, packing=packing)
  head = _params(STEPS)['score']
  expected = [_own(STEPS, b)[t] @ head['kernel'] + head['bias'] for b, t in places]
  np.testing.assert_allclose(out[0], expected, atol=2e-6)


def test_values_of_a_head_on_the_policy():
  critic = {'kernel': RANDOM.normal(size=(16, 1)).astype(np.float32), 'bias': np.float32([0.7])}
  @jax.jit
  def run(params):
    states = policy.hidden(CONFIG, params, PROMPTS, LENGTHS, TOKENS)
    return policy.values(CONFIG, params, states, PROMPTS, LENGTHS, TOKENS)
  params = {**_params(CONFIG), 'critic': critic}
  values = run(params)
  for b in range(B):
    np.testing.assert_allclose(
        values[b], (_before(CONFIG, b) @ critic['kernel'])[:, 0] + 0.7, atol=5e-6)
  # The head is part of the policy's network: its loss reaches the body.
  gradient = jax.jit(jax.grad(lambda params: jnp.square(run(params)).sum()))(params)
  assert np.abs(gradient['layers']['mlp']['down']['kernel']).max() > 0


@pytest.mark.parametrize('given', [False, True])
def test_values_of_a_whole_model(given):
  """Its shape is the policy's where no other is given."""
  policy_config = dataclasses.replace(CONFIG, width=8, head_dim=4) if given else CONFIG
  params = {**_params(policy_config), 'critic': _params(REWARD, seed=1)}
  states = np.full((B, T, policy_config.width), np.nan, np.float32)  # the policy's are not read
  values = jax.jit(functools.partial(policy.values, policy_config,
                                     critic_config=REWARD if given else None))(
      params, states, PROMPTS, LENGTHS, TOKENS)
  kernel = _params(REWARD)['score']['kernel']
  for b in range(B):
    np.testing.assert_allclose(values[b], (_before(REWARD, b) @ kernel)[:, 0], atol=2e-6)


def test_values_of_packed_rows():
  *arrays, packing, places = _packed_rows()
  values = jax.jit(functools.partial(policy.values, CONFIG))(
      {'critic': _params(REWARD)}, None, *arrays, packing=packing)
  kernel = _params(REWARD)['score']['kernel']
  expected = [(_before(REWARD, b)[t] @ kernel)[0] for b, t in places]
  np.testing.assert_allclose(values[0], expected, atol=2e-6)


def test_a_value_sees_nothing_of_its_own_token():
  tokens = TOKENS.copy()
  tokens[:, 2] = (tokens[:, 2] + 1) % V
  run = jax.jit(lambda tokens: policy.values(
      CONFIG, {'critic': _params(REWARD)}, None, PROMPTS, LENGTHS, tokens))
  one, other = run(TOKENS), run(tokens)
  np.testing.assert_array_equal(one[:, :3], other[:, :3])
  assert (one[:, 3:] != other[:, 3:]).all()


@pytest.mark.parametrize('text', ['fsdp=4,tensor=2', 'data=2,fsdp=2,tensor=2'])
def test_devices_change_nothing(text):
  @jax.jit
  def gradient(params, prompts, lengths, tokens, mask):
    def loss(params):
      rewards = policy.scores(REWARD, params['reward'], prompts, lengths, tokens, loss_mask=mask)
      steps = policy.token_scores(STEPS, params['steps'], prompts, lengths, tokens)
      values = policy.values(CONFIG, {'critic': params['reward']}, None, prompts, lengths, tokens)
      return jnp.square(rewards).sum() + sum(
          jnp.sum(jnp.sin(x), where=mask[..., None]) for x in (steps, values[..., None]))
    return jax.grad(loss)(params)
  # Two prompts more, to split over four devices.
  rows = tuple(np.concatenate([x, x[::-1]]) for x in (PROMPTS, LENGTHS, TOKENS, MASK))
  params = {'reward': _params(REWARD), 'steps': _params(STEPS)}
  expected = gradient(params, *rows)
  mesh = sharding.make_mesh(text)
  with sharding.use(mesh):
    found = gradient(sharding.put(params, sharding.tree_sharding(mesh, params)),
                     *sharding.put(rows, sharding.batch(mesh)))
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  chex.assert_trees_all_close(
      jax.device_get(found), jax.device_get(expected), atol=2e-6 * scale, rtol=0)


def test_fresh_heads():
  plain = transformer.init(CONFIG, jax.random.key(0))
  wide = dataclasses.replace(STEPS, width=512, num_labels=40, tie_embeddings=False)
  head = transformer.init_score(wide, jax.random.key(3))
  assert head['kernel'].shape == (512, 40) and not head['bias'].any()
  # 20,480 draws: the mean is within four standard errors, the deviation within four per cent.
  assert abs(float(head['kernel'].mean())) < 4 * 0.02 / 20480**0.5
  assert float(head['kernel'].std()) == pytest.approx(0.02, rel=0.04)
  params = transformer.init(STEPS, jax.random.key(0))
  assert set(params) == {*plain, 'score'} and set(params['score']) == {'kernel', 'bias'}
  assert set(transformer.init(REWARD, jax.random.key(0))['score']) == {'kernel'}
  assert 'head' not in jax.eval_shape(lambda: transformer.init(wide, jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, params['layers'], plain['layers'])


def test_what_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match='one label, the model has 2'):
    policy.scores(STEPS, None, PROMPTS, LENGTHS, TOKENS, loss_mask=MASK)
  with pytest.raises(ValueError, match='packed rows hold several sequences'):
    policy.scores(REWARD, None, PROMPTS, LENGTHS, TOKENS, loss_mask=MASK, packing=object())
  with pytest.raises(ValueError, match=r'score head \(1 labels\) has no vocabulary head'):
    policy.log_probs(REWARD, _params(REWARD), PROMPTS, LENGTHS, TOKENS)
